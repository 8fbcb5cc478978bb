"""The eager backend against the float64 reference: limits, shapes, masks, precision tiers, memory."""

from dataclasses import replace

import pytest
import torch
from eager_cases import BLOCKS, DTYPES, PACKED, SHAPES, any_problem
from lla_compile.backends.eager import interpreter
from problems import (
    CPU,
    assert_close,
    make_grad_out,
    make_plan,
    make_problem,
    relative_error,
    run,
    run_backward,
    run_forward,
    run_info,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lla_compile import backends
from lla_compile.expr import dot, log2, row, tile, vector
from lla_compile.lowering import INFO, SAVED
from lla_compile.plans import KernelConfig
from lla_compile.precision import error_limit
from lla_compile.spec import LLASpec
from lla_compile.sweeps import Accumulator, Assign, P, Score, Sweep, SweepList

BACKEND = backends.get("eager")


@pytest.mark.parametrize("fields", SHAPES + PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_against_the_reference(dtype, precision, fields):
    p = any_problem(fields, dtype=dtype, ridge=0.5)
    limit = error_limit(str(dtype).removeprefix("torch."), precision, 0.5)
    out = run(p, precision=precision, **BLOCKS)
    assert out.dtype == dtype
    assert_close(out, p.reference(), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_error_limits(dtype, ridge):
    p = make_problem(heads=1, seqlen_q=256, head_dim=64, dtype=dtype, ridge=ridge)
    ref = p.reference()
    for precision in ("fast", "accurate"):
        limit = error_limit(str(dtype).removeprefix("torch."), precision, ridge)
        iterations = {"cg_max_iters": 128} if ridge == 0.01 and dtype is not torch.float64 else {}
        out = run(p, precision=precision, **iterations)
        assert out.isfinite().all()
        assert relative_error(out, ref) <= limit


def test_float16_weights_of_many_keys():
    """Weights of 1 / 100162 are subnormal in float16: without a shift all would round up, by 0.3 percent."""
    p = make_problem(seqlen_q=3, seqlen_k=100_162, head_dim=8, dtype=torch.float16, is_causal=False, ridge=1e6)
    p.q = torch.zeros_like(p.q)
    p.v = p.v + 1
    assert_close(run(p, precision="fast"), p.reference(), 1e-3)


def test_no_element_is_an_outlier():
    p = make_problem(heads=1, seqlen_q=128, head_dim=64, dtype=torch.bfloat16, ridge=0.1)
    assert_close(run(p), p.reference(), 2.5e-3, low_precision=run(p, precision="fast"))


@pytest.mark.parametrize("fields", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_schedules_agree_exactly(fields, precision):
    p = make_problem(dtype=torch.bfloat16, ridge=0.1, **fields)
    fused = run_info(p, precision=precision, schedule="fused", **BLOCKS)
    split = run_info(p, precision=precision, schedule="split", **BLOCKS)
    for a, b in zip(fused, split):
        assert torch.equal(a, b)


def test_only_what_is_wanted_is_returned():
    p = make_problem(seqlen_q=20)
    expected = run_forward(p, ("out", *INFO, *SAVED))
    for wanted in (("out",), ("lse",), ("probe_mean", "out"), ("final_residual", "unit_probe")):
        results = run_forward(p, wanted)
        assert tuple(results) == wanted
        for name, x in results.items():
            assert torch.equal(x, expected[name])
    with pytest.raises(ValueError, match="lla_forward has no output dq"):
        run_forward(p, ("dq",))


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_blocks_change_only_rounding(fields):
    p = make_problem(dtype=torch.float64, ridge=1.0, **fields)
    expected = run(p, block_q=512, block_k=512)
    for block_q, block_k in ((3, 512), (16, 7), (33, 16)):
        assert relative_error(run(p, block_q=block_q, block_k=block_k), expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_ridge_is_softmax_attention(dtype):
    p = make_problem(seqlen_q=70, ridge=1e6, dtype=dtype)
    q, k, v = (x.double() for x in (p.q, p.k, p.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(run(p, **BLOCKS), expected, 2.5e-3 if dtype is torch.bfloat16 else 1e-5)


def test_affine_values_are_reproduced_at_the_query():
    p = make_problem(seqlen_q=10, seqlen_k=60, head_dim=6, is_causal=False, ridge=1e-9, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    p.v = p.k @ matrix + 2.5
    assert_close(run(p), p.q @ matrix + 2.5, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_one_visible_key_gives_its_value(dtype, precision):
    p = make_problem(seqlen_q=40, window_size=1, ridge=0.1, dtype=dtype)
    # eps * ||k|| * ||u||, with u = (k - q) / ridge
    limit = {torch.float64: 1e-12, torch.float32: 2e-4}.get(dtype, 5e-3)
    assert_close(run(p, precision=precision, **BLOCKS), p.v.double(), limit)


@pytest.mark.parametrize("fields", [dict(seqlen_q=60, seqlen_k=11), dict(seqlen_q=9, seqlen_k=0), dict(seqlen_q=0)])
def test_rows_without_keys_are_zero(fields):
    p = make_problem(dtype=torch.bfloat16, **fields)
    out, iterations, residual = run_info(p, **BLOCKS)
    hidden = max(p.q.shape[2] - p.k.shape[2], 0)
    assert out[:, :, :hidden].eq(0).all() and out[:, :, hidden:].ne(0).any(-1).all()
    assert iterations[:, :, :hidden].eq(0).all() and residual[:, :, :hidden].eq(0).all()
    assert run(replace(p, is_causal=False)).isfinite().all()


@pytest.mark.parametrize("fields", [dict(batch=0), dict(seqlen_q=0), dict(seqlen_k=0), dict(batch=0, seqlen_k=0)])
@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_empty_tensors(fields, schedule):
    p = make_problem(head_dim_v=5, **fields)
    out, iterations, residual = run_info(p, schedule=schedule)
    assert out.shape == (*p.q.shape[:3], 5) and iterations.shape == residual.shape == p.q.shape[:3]
    assert out.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("keys", ["normal", "equal", "repeated", "large"])
def test_small_ridges_stay_finite(dtype, precision, keys):
    p = make_problem(heads=1, seqlen_q=160, head_dim=64, dtype=dtype)
    if keys == "equal":
        p.k = p.k[:, :, :1].expand_as(p.k)
    elif keys == "repeated":
        p.k = p.k[:, :, :4].repeat(1, 1, 40, 1)
    elif keys == "large":
        p.k = p.k * 30
    for ridge in (0.01, 1e-3, 1e-4):
        p.ridge = ridge
        out, _, residual = run_info(p, precision=precision, cg_max_iters=64)
        assert out.isfinite().all() and residual.isfinite().all()


def test_equal_keys_give_the_mean_value():
    p = make_problem(seqlen_q=50, ridge=0.1)
    p.k = p.k[:, :, :1].expand_as(p.k)
    mean = p.v.double().cumsum(2) / torch.arange(1, 51)[:, None]
    assert_close(run(p, **BLOCKS), mean, 1e-4)


@pytest.mark.parametrize("precision, limit", [("accurate", 2.5e-3), ("fast", 3e-2)])
def test_keys_that_share_an_offset(precision, limit):
    """kbar must stay a mean of the keys in rounded arithmetic: its error would be that of the weights' sum * offset."""
    p = make_problem(heads=1, seqlen_q=200, head_dim=64, dtype=torch.float64, ridge=1.0)
    offset = 4 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p.q, p.k, p.v = p.q.bfloat16(), (p.k + offset).bfloat16(), p.v.bfloat16()
    assert_close(run(p, precision=precision, block_q=64, block_k=64), p.reference(), limit)


def test_ridge_per_query_and_scale_as_tensors():
    p = make_problem(batch=2, heads=4, kv_heads=2, dtype=torch.float64)
    p.ridge = torch.rand(2, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.2
    out = run_info(p, scale=torch.tensor(32**-0.5), **BLOCKS)[0]
    assert_close(out, p.reference(), 1e-7)  # the scale is a float32 number


def test_strided_inputs():
    p = make_problem(batch=2, dtype=torch.float64)
    expected = run(p)
    for name in ("q", "k", "v"):
        x = getattr(p, name)
        setattr(p, name, x.transpose(1, 2).contiguous().transpose(1, 2))
        assert not getattr(p, name).is_contiguous()
    assert torch.equal(run(p), expected)


def test_info_reports_the_solve():
    p = make_problem(seqlen_q=60, ridge=0.1)
    _, iterations, residual = run_info(p, cg_tol=1e-4, **BLOCKS)
    assert iterations.dtype == torch.int32 and residual.dtype == torch.float32
    assert 0 < residual.max() <= 1e-4 and 1 < iterations.max() < 60
    assert iterations[:, :, 1:].min() >= 1 and iterations.min() < iterations.max()
    _, capped, unfinished = run_info(p, cg_tol=1e-4, cg_max_iters=3, **BLOCKS)
    assert capped.max() == 3 and unfinished.max() > 1e-4
    assert make_plan(p).config.cg_max_iters > 3


@pytest.mark.parametrize(
    "dtype, precision, sweeps",
    [
        (torch.float32, "accurate", {"coarse_cg_step"}),
        (torch.bfloat16, "fast", {"coarse_cg_step"}),
        (torch.bfloat16, "accurate", {"cg_step", "coarse_cg_step"}),
    ],
)
def test_a_tile_leaves_the_loop_when_all_its_rows_have_converged(dtype, precision, sweeps, monkeypatch):
    """Operands are split where they are two terms, and only while a residual is large."""
    p = make_problem(seqlen_q=64, ridge=1e3, dtype=dtype)
    turns = []
    original = interpreter._Run._sweep
    monkeypatch.setattr(
        interpreter._Run, "_sweep", lambda self, sweep, *args: turns.append(sweep.name) or original(self, sweep, *args)
    )
    _, iterations, _ = run_info(p, precision=precision, block_q=32, block_k=32, cg_tol=1e-3, cg_max_iters=50)
    turns = [name for name in turns if name not in ("stats", "output")]
    assert set(turns) == sweeps
    assert len(turns) == iterations.reshape(1, 2, 2, 32).amax((0, 1, 3)).sum() < 20


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (list, tuple)) else [result]
        self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_no_tensor_grows_with_the_square_of_the_length(schedule, phase):
    for seqlen in (256, 512):
        p = make_problem(heads=2, seqlen_q=seqlen, head_dim=16, ridge=10.0)
        grad_out = make_grad_out(p)
        with LargestTensor() as largest:
            knobs = dict(schedule=schedule, block_q=64, block_k=64, cg_max_iters=2)
            run(p, **knobs) if phase == "forward" else run_backward(p, grad_out, **knobs)
        assert largest.elements == max(p.q.numel(), 2 * 64 * 64)


def test_an_operator_that_the_backend_has_never_seen(monkeypatch):
    """Sum of p (mean.v - ||mean||^2) v with a softmax mean of v, and for each key the weight that it got from the
    queries, times them: nothing in the backend knows it."""
    mean = Sweep(
        name="mean",
        softmax="online",
        scores=(Score("s", "q", "k"),),
        accumulators=(Accumulator("total", P, "v"),),
        epilogue=(
            Assign("mean", vector("total") / row("row_sum")),
            Assign("square", dot(vector("mean"), vector("mean"))),
            Assign("lse", row("row_max") + log2(row("row_sum"))),
        ),
    )
    spread = Sweep(
        name="spread",
        softmax="saved",
        scores=(Score("s", "q", "k"), Score("a", "mean", "v", center="square")),
        accumulators=(Accumulator("out", P * tile("a"), "v"),),
    )
    received = Sweep(
        name="received",
        softmax="saved",
        holds="keys",
        scores=(Score("s", "q", "k"),),
        accumulators=(Accumulator("received", P, "q"), Accumulator("received", P * row("square"), "q")),
    )
    spreads = SweepList(
        name="spreads",
        stages=(mean, spread, received),
        row_inputs=("q",),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs={"out": "input", "received": "input"},
        ordinary=("out",),
        value_wide=frozenset({"v", "out"}),
    )
    monkeypatch.setattr(interpreter, "lower", lambda op, phase: spreads)
    p = make_problem(seqlen_q=40, dtype=torch.float64, head_dim_v=9)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    weights = torch.softmax((p.q @ p.k.mT * 32**-0.5).masked_fill(hidden, -torch.inf), -1)
    means = weights @ p.v
    squares = (means * means).sum(-1, keepdim=True)
    results = run_forward(p, ("received", "out"), **BLOCKS)
    assert_close(results["out"], (weights * (means @ p.v.mT - squares)) @ p.v, 1e-12)
    assert_close(results["received"], weights.mT @ (p.q * (1 + squares)), 1e-12)


def config(**knobs) -> KernelConfig:
    return KernelConfig(**(dict(backend="eager", schedule="fused", block_q=64, block_k=64, cg_max_iters=32) | knobs))


def spec(**fields) -> LLASpec:
    defaults = dict(
        dtype="float32", head_dim=64, head_dim_v=64, batch=1, num_heads=8, num_kv_heads=8, seqlen_q=1024, seqlen_k=1024
    )
    return LLASpec(**(defaults | fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(batch=0),
        dict(seqlen_q=0),
        dict(dtype="float64"),
        dict(dtype="bfloat16", precision="fast"),
        dict(batch=4096),
        dict(batch=100_000, head_dim=1, head_dim_v=1),
    ],
)
def test_default_is_feasible_and_in_the_search_space(fields):
    s = spec(**fields)
    default = BACKEND.default_config(s, CPU)
    assert BACKEND.unsupported(s, CPU) is None
    assert BACKEND.infeasible(s, default, CPU) is None
    space = BACKEND.search_space(s, CPU)
    assert set(space) == {"schedule", "block_q", "block_k", "cg_max_iters"}
    for name, values in space.items():
        assert getattr(default, name) in values


def test_infeasible_counts_the_tiles_of_all_heads():
    assert BACKEND.infeasible(spec(), config(block_q=512, block_k=512), CPU) is None
    reason = BACKEND.infeasible(spec(batch=64), config(block_q=512, block_k=512), CPU)
    assert reason == "tiles of all heads need 2048 MiB at once, allowed are 512 MiB"
    short = spec(batch=64, seqlen_q=16, seqlen_k=16)
    assert BACKEND.infeasible(short, config(block_q=512, block_k=512), CPU) is None


def test_source_hash_is_stable():
    assert BACKEND.source_hash(spec(), config()) == BACKEND.source_hash(spec(batch=2), config(block_q=32))
    assert len(BACKEND.source_hash(spec(), config())) == 16
