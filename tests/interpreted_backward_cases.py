"""The backward pass and packed sequences on Triton kernels that run in its interpreter; see interpreted_cases.py."""

import pytest
import torch
from problems import (
    GRADIENTS,
    assert_close,
    assert_gradients_close,
    make_grad_out,
    make_packed_problem,
    make_plan,
    make_problem,
    run,
    run_backward,
    run_forward,
)

from lla_compile import backends
from lla_compile.lowering import INFO, SAVED

BLOCKS = dict(
    block_q=32, block_k=16, num_warps=1, num_stages=1, cg_max_iters=32,
    kv_block_q=16, kv_block_k=32, kv_num_warps=1, kv_num_stages=1,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
SHAPES = [
    dict(),
    dict(is_causal=False, seqlen_k=45),
    dict(seqlen_q=17, seqlen_k=45),
    dict(seqlen_q=45, seqlen_k=19),
    dict(seqlen_q=1, seqlen_k=33),
    dict(heads=4, kv_heads=2, batch=2, seqlen_q=17),
    dict(seqlen_q=50, window_size=9),
    dict(seqlen_q=20, seqlen_k=60, window_size=33),
    dict(seqlen_q=45, seqlen_k=30, window_size=2),
    dict(head_dim=24, head_dim_v=5),
    dict(head_dim=1),
]
PACKED = [
    dict(lengths_q=(20, 0, 33), heads=2, kv_heads=1),
    dict(lengths_q=(20, 5, 0), lengths_k=(33, 0, 7), window_size=9),
    dict(lengths_q=(3, 20), lengths_k=(18, 2), is_causal=False),
]


def problem(dtype=torch.float32, **fields):
    """One small head; the ridge keeps the solves short."""
    return make_problem(**dict(heads=1, seqlen_q=37, head_dim=16, dtype=dtype, ridge=2.0) | fields)


def packed(**fields):
    return make_packed_problem(**dict(heads=1, head_dim=16, ridge=2.0) | fields)


def interpreted(p, grad_out, precision="accurate", **knobs):
    return run_backward(p, grad_out, "triton", precision, **BLOCKS | knobs)


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_gradients(fields):
    p = problem(**fields)
    grad_out = make_grad_out(p)
    limit = 2e-4 if p.q.shape[2] == 1 else 5e-5  # of a single row, u.s is small beside |u| |s|
    assert_gradients_close(interpreted(p, grad_out), p.reference_gradients(grad_out), limit)


@pytest.mark.parametrize("fields", PACKED, ids=str)
def test_packed_sequences(fields):
    p = packed(**fields)
    forward = {name: x for name, x in BLOCKS.items() if not name.startswith("kv_")}
    assert_close(run(p, "triton", **forward), p.reference(), 1e-5)
    grad_out = make_grad_out(p)
    assert_gradients_close(interpreted(p, grad_out), p.reference_gradients(grad_out), 5e-5)


@pytest.mark.parametrize("precision, limit", [("fast", 3e-2), ("accurate", 5e-3)])
def test_float16_tiers(precision, limit):
    p = problem(torch.float16, is_causal=False, ridge=1.0)
    grad_out = make_grad_out(p)
    assert_gradients_close(interpreted(p, grad_out, precision), p.reference_gradients(grad_out), limit)


@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_split_is_fused_in_several_launches(precision):
    p = problem(torch.float16, seqlen_q=45, seqlen_k=50)
    grad_out = make_grad_out(p)
    fused, split = (interpreted(p, grad_out, precision, schedule=s, cg_max_iters=3) for s in ("fused", "split"))
    for name in GRADIENTS:
        assert torch.equal(fused[name], split[name]), name


@pytest.mark.parametrize("wanted", [("dq",), ("dk",), ("dv",), ("dridge",), ("dscale",), ("dv", "dq"), INFO], ids=str)
def test_what_is_asked_for_does_not_change_it(wanted):
    p = problem()
    grad_out = make_grad_out(p)
    everything = interpreted(p, grad_out, wanted=(*GRADIENTS, *INFO))
    some = interpreted(p, grad_out, wanted=tuple(wanted))
    assert list(some) == list(wanted)
    for name, x in some.items():
        assert torch.equal(x, everything[name]), name


def test_a_result_a_sweep_for_wide_heads():
    """Heads wider than 128 have a sweep for dk and one for dv."""
    p = problem(head_dim=136, head_dim_v=8, seqlen_q=20)
    grad_out = make_grad_out(p)
    assert_gradients_close(interpreted(p, grad_out), p.reference_gradients(grad_out), 5e-5)


def test_ridge_per_query_and_scale_tensor():
    p = problem(heads=2, seqlen_q=19)
    p.ridge = torch.rand(1, 2, 19, generator=torch.Generator().manual_seed(1)) + 0.5
    grad_out = make_grad_out(p)
    got = interpreted(p, grad_out, scale=torch.tensor(0.6))
    assert_gradients_close(got, p.reference_gradients(grad_out, scale=0.6), 5e-5)


def test_what_fresh_memory_holds_does_not_matter(monkeypatch):
    p = problem(torch.float16, head_dim=24, head_dim_v=20, window_size=20, seqlen_q=20)
    grad_out = make_grad_out(p)
    knobs = dict(schedule="split", cg_max_iters=3)
    expected = interpreted(p, grad_out, **knobs)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **options):
        made = new_empty(self, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() and made.device.type == "cpu" else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for name, x in interpreted(p, grad_out, **knobs).items():
        assert torch.equal(x, expected[name]), name


def test_saved_state_is_that_of_the_eager_backend():
    """The two passes may run on different backends."""
    p = problem(torch.float16, heads=2, kv_heads=1)
    grad_out = make_grad_out(p)
    knobs = dict(block_q=32, block_k=16, cg_max_iters=32)
    saved = run_forward(p, ("out", *SAVED), "eager", **knobs)
    given = {name: saved[name] for name in SAVED} | {"grad_out": grad_out}
    plan = make_plan(p, "triton", phase="backward", **BLOCKS)
    mixed = backends.get("triton").bind(plan)(p.inputs() | given, GRADIENTS)
    assert_gradients_close(mixed, p.reference_gradients(grad_out), 5e-3)
