"""The CUDA kernels of the backward pass of Parallax and softmax attention on the CPU, thread by thread."""

from dataclasses import replace

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from parallax_problems import (
    GRADIENTS,
    BoundBackward,
    ParallaxProblem,
    bound_backward,
    make_packed_parallax_problem,
    make_parallax_problem,
)
from problems import assert_gradients_close

from lla_compile.arguments import dtype_name
from lla_compile.backends.cuda import runtime
from lla_compile.backends.cuda.backward_launcher import BackwardLauncher
from lla_compile.devices import resolve
from lla_compile.precision import error_limit
from lla_compile.reference import parallax_reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
WINDOWED = dict(head_dim=40, head_dim_v=72, window_size=70, dtype=torch.float16)
NOT_CAUSAL = dict(head_dim=100, head_dim_v=24, is_causal=False)
WANTED = (*GRADIENTS, "dscale")
SHAPES = [
    dict(seqlen_q=150, heads=1),
    dict(seqlen_q=33, seqlen_k=150),
    dict(seqlen_q=150, seqlen_k=33, heads=1),
    dict(batch=2, heads=4, kv_heads=2, seqlen_q=70),
    dict(seqlen_q=210, heads=1, **WINDOWED),
    dict(seqlen_q=33, seqlen_k=150, heads=3, kv_heads=1, **WINDOWED),
    dict(seqlen_q=40, seqlen_k=161, heads=2, kv_heads=1, **NOT_CAUSAL),
    dict(seqlen_q=130, seqlen_k=1, heads=1, **NOT_CAUSAL),
]


def block(held: int, streamed: int, stages: int) -> dict[str, int]:
    """The knobs of both sweeps."""
    rows = dict(block_q=held, block_k=streamed, num_stages=stages)
    return rows | dict(kv_block_q=streamed, kv_block_k=held, kv_num_stages=stages)


# Lengths of queries and of keys, other fields, knobs.
PACKED = [
    ((70, 0, 33, 230), None, dict(heads=2, kv_heads=1), block(192, 32, 3)),
    ((150, 5, 0, 60), (170, 0, 9, 40), dict(heads=3, kv_heads=1, **WINDOWED), {}),
    ((40, 129), (161, 64), dict(heads=2, **NOT_CAUSAL), {}),
]


def problem(**fields) -> ParallaxProblem:
    return make_parallax_problem(**dict(head_dim=64, dtype=torch.bfloat16) | fields)


def packed_problem(*lengths, **fields) -> ParallaxProblem:
    return make_packed_parallax_problem(*lengths, **dict(head_dim=64, dtype=torch.bfloat16) | fields)


def bound(p: ParallaxProblem, **options) -> BoundBackward:
    return bound_backward(p, "cuda", resolve("h200"), **options)


def assert_close(got, p: ParallaxProblem, expected=None):
    """Of the gradient of the scale, what each row adds."""
    expected = expected or p.reference_gradients() | {"dscale": p.reference_row_dscale()}
    expected = {name: expected[name] for name in got}
    assert_gradients_close(got, expected, error_limit(dtype_name(p.grad_out), "accurate", None, "backward"))


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_shapes(fields):
    p = problem(**fields)
    assert_close(bound(p)(*WANTED), p)


@pytest.mark.parametrize("backwards", [False, True])
def test_groups_that_take_turns(emulated, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    p = problem(seqlen_q=230, heads=1)
    assert_close(bound(p, **block(192, 32, 3))(*WANTED), p)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scale", [None, torch.tensor(-0.3), torch.tensor(0.0)], ids=str)
def test_softmax_attention_with_one_group(emulated, scale, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    p = problem(seqlen_q=200, heads=2, kv_heads=1)
    q, _, k, v = (x.double().requires_grad_() for x in p.tensors)
    number = 0.125 if scale is None else float(scale)
    out = parallax_reference(q, None, k, v, scale=number)
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), p.grad_out.double())))
    got = bound(p, op="softmax", scale=scale, **block(64, 128, 2))("dq", "dk", "dv")
    if number == 0:
        assert (got.pop("dq") == 0).all() and (got.pop("dk") == 0).all()
    assert_close(got, p, expected)


def test_each_gradient_is_computed_by_itself():
    p = problem(seqlen_q=70, heads=1)
    run = bound(p)
    together = run(*WANTED)
    alone = run("dv")
    assert tuple(alone) == ("dv",) and torch.equal(alone["dv"], together["dv"])


def test_rows_without_keys_and_keys_without_rows():
    p = problem(seqlen_q=150, seqlen_k=20, heads=1)
    got = bound(p)(*WANTED)
    assert (got["dq"][:, :, :130] == 0).all() and (got["dr"][:, :, :130] == 0).all()
    assert (got["dq"][:, :, 131:] != 0).any(-1).all()
    q, r, k, v = p.tensors
    got = bound(replace(p, tensors=(q[:, :, :0], r[:, :, :0], k, v), grad_out=p.grad_out[:, :, :0]))(*WANTED)
    assert (got["dk"] == 0).all() and (got["dv"] == 0).all()


@pytest.mark.parametrize("lengths_q, lengths_k, fields, knobs", PACKED, ids=str)
def test_packed_sequences(lengths_q, lengths_k, fields, knobs):
    """Every sequence has the gradients that it would have alone, bit for bit."""
    p = packed_problem(lengths_q, lengths_k, **fields)
    together = bound(p, **knobs)(*WANTED)
    assert all(together[name].transpose(1, 2).is_contiguous() for name in GRADIENTS)
    for alone, rows, keys in p.sequences():
        for name, expected in bound(alone, **knobs)(*WANTED).items():
            assert torch.equal(together[name][:, :, keys if name in ("dk", "dv") else rows], expected), name


@pytest.mark.parametrize(
    "lengths", [(300, 0, 129, 1, 900, 700), (0, 5), (128, 128), (3,) * 200, (500, 20, 1000)], ids=len
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_of_packed_sequences_run_in_the_order_of_their_work(monkeypatch, emulated, is_causal, lengths):  # noqa: F811
    lengths_k, tables, made, load = [max(n - 200, 7) for n in lengths], [], BackwardLauncher._tables, runtime.load
    monkeypatch.setattr(BackwardLauncher, "_tables", lambda *args: tables.append(made(*args)) or tables[-1])
    monkeypatch.setattr(
        runtime, "load",
        lambda kernel, *args: load(kernel, *args) if kernel.name == "backward_order" else lambda *_: None,
    )  # fmt: skip
    p = packed_problem(lengths, lengths_k, heads=1, is_causal=is_causal)
    run = bound(p)
    run("dq")
    config = run.executable._plan.config
    [(_, _, *sides)] = tables
    for table, block, own, other, keys in (
        (sides[0], config.block_q, lengths, lengths_k, False),
        (sides[1], config.kv_block_k, lengths_k, lengths, True),
    ):
        order = [tuple(tile) for tile in table.tolist()]
        tiles = [(sequence, tile) for sequence, length in enumerate(own) for tile in range(-(-length // block))]
        assert sorted(order[: len(tiles)]) == tiles and set(order[len(tiles) :]) <= {(-1, 0)}
        work = [work_of(own[n], other[n], tile * block, block, keys, is_causal) for n, tile in order[: len(tiles)]]
        assert work == sorted(work, reverse=True)


def work_of(held, streamed, first, block, holds_keys, is_causal):
    """Keys that the last row of a tile sees, or rows that see its first key."""
    if not is_causal:
        return streamed
    if holds_keys:
        return min(streamed, held - first)
    return max(0, streamed - held + min(held, first + block))


def test_any_strides_and_nothing_around_the_tensors():
    def amid_nan(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (8, 8, 1, 4), value=torch.nan)[:, :, 1:-4, 8:-8]

    p = problem(seqlen_q=70, heads=2, batch=2)
    expected = bound(p)(*WANTED)
    q, r, k, v = p.tensors
    tensors = amid_nan(q), amid_nan(r), k.transpose(1, 2).contiguous().transpose(1, 2), amid_nan(v)
    got = bound(replace(p, tensors=tensors, grad_out=amid_nan(p.grad_out)))(*WANTED)
    assert all(torch.equal(got[name], expected[name]) for name in WANTED)


@pytest.mark.parametrize("p, order", [
    (problem(seqlen_q=3, heads=1), []),
    (problem(seqlen_q=3, heads=1, **NOT_CAUSAL), []),
    (packed_problem((3,), heads=1, **NOT_CAUSAL), ["backward_order"]),
], ids=["", "wide", "packed"])  # fmt: skip
def test_python_and_cuda_agree_on_sizes(p, order):
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    run = bound(p)
    run(*WANTED)
    [kernels] = run.executable._bound.values()
    assert [kernel.kernel.name for kernel in kernels] == [*order, "backward_rows", "grad_q", "grad_kv"]
    for kernel in kernels:
        assert kernel.library.arguments_size() == run.executable._arguments.size
    for kernel in kernels[-2:]:
        assert kernel.library.shared_size() == kernel.kernel.shared
