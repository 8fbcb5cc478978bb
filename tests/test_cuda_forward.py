"""The CUDA kernels of the forward pass on the CPU, thread by thread."""

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from problems import (
    assert_close,
    assert_gradients_close,
    make_grad_out,
    make_packed_problem,
    make_plan,
    make_problem,
    run_forward,
    run_info,
)

from lla_compile import backends
from lla_compile.autograd import GRADIENTS
from lla_compile.backends.cuda import runtime
from lla_compile.backends.cuda.sweep_launcher import SweepLauncher
from lla_compile.devices import resolve
from lla_compile.lowering import INFO, SAVED
from lla_compile.precision import error_limit

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
# With wgmma (one warp group of rows, two, three) and with mma.sync; tiles of 32, 64 and 96 keys, rings of all lengths.
TILES = {
    ("h200", 64): dict(block_q=64, block_k=32, num_warps=8, num_stages=3),
    ("h200", 128): dict(block_q=128, block_k=64, num_warps=12, num_stages=3),
    ("h200", 192): dict(block_q=192, block_k=64, num_warps=16, num_stages=4),
    ("a100", 64): dict(block_q=64, block_k=64, num_warps=4, num_stages=2),
    ("a100", 128): dict(block_q=128, block_k=32, num_warps=8, num_stages=4),
}
GPUS = pytest.mark.parametrize("gpu", ["h200", "a100"])
SHAPES = [
    dict(),
    dict(is_causal=False, seqlen_q=70, seqlen_k=99),
    dict(seqlen_q=45, seqlen_k=130),
    dict(seqlen_q=130, seqlen_k=30),
    dict(heads=4, kv_heads=2, batch=2, seqlen_q=33),
    dict(window_size=40, seqlen_q=200),
    dict(window_size=1, seqlen_q=20),
    dict(head_dim=40, head_dim_v=5),
    dict(head_dim=33, head_dim_v=77, seqlen_q=50),
    dict(head_dim=128, seqlen_q=150),
    dict(head_dim=96, head_dim_v=128, seqlen_q=20),
    dict(dtype=torch.float16),
]
# Lengths of queries, and of keys where they differ, beside fields of the problem; tiles and masks that others compile.
PACKED = [
    ("h200", 128, "accurate", dict(lengths_q=[70, 0, 33, 1, 129])),
    ("h200", 128, "accurate", dict(lengths_q=[150, 20], lengths_k=[30, 65], heads=2, kv_heads=1)),
    ("h200", 192, "fast", dict(lengths_q=[140, 61], window_size=40)),
    ("a100", 128, "accurate", dict(lengths_q=[5, 0, 90, 7], lengths_k=[40, 4, 0, 130])),
    ("a100", 128, "accurate", dict(lengths_q=[0, 70, 0], lengths_k=[0, 99, 3], is_causal=False)),
    ("a100", 128, "fast", dict(lengths_q=[33, 40], lengths_k=[90, 40], window_size=17)),
]
# What crosses launches: in registers, in shared memory; odd widths, rows without keys, tiles without rows.
SPLIT = [
    ("h200", 128, "accurate", dict(window_size=40, seqlen_q=150, seqlen_k=120, heads=2, kv_heads=1)),
    ("a100", 128, "accurate", dict(head_dim=33, head_dim_v=8, lengths_q=[70, 0, 33], lengths_k=[30, 5, 50])),
    ("a100", 64, "fast", dict(head_dim=16, seqlen_q=90, seqlen_k=60, dtype=torch.float16)),
]
NARROW = [
    dict(head_dim=1, head_dim_v=3),
    dict(head_dim=8, head_dim_v=24),
    dict(head_dim=16, head_dim_v=128, is_causal=False),
    dict(head_dim=32, head_dim_v=64, window_size=20),
]


def problem(**fields):
    return make_problem(**dict(heads=1, seqlen_q=100, head_dim=64, dtype=torch.bfloat16) | fields)


def run(p, precision="accurate", gpu="h200", block_q=128, **knobs):
    scale = knobs.pop("scale", None)
    return run_info(p, "cuda", precision, resolve(gpu), scale, **TILES[gpu, block_q] | knobs)


def limit(p, precision="accurate", ridge=1.0):
    return error_limit(str(p.q.dtype).removeprefix("torch."), precision, ridge)


@GPUS
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_shapes(fields, gpu):
    p = problem(**fields)
    out, _, residual = run(p, gpu=gpu)
    assert_close(out, p.reference(), limit(p))
    assert residual.max() <= 1e-3


@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("fields", NARROW, ids=str)
def test_narrow_heads_take_the_same_instructions_everywhere(fields, precision):
    p = problem(seqlen_q=150, **fields)
    out = run(p, precision, "a100")[0]
    assert_close(out, p.reference(), limit(p, precision))
    hopper = run_info(p, "cuda", precision, resolve("h200"), **TILES["a100", 128])
    assert torch.equal(hopper[0], out)


def packed_problem(**fields):
    """As calls have it: all heads of a position lie side by side, and every row has its ridge."""
    p = make_packed_problem(**dict(heads=1, head_dim=64, dtype=torch.bfloat16) | fields)
    p.q, p.k, p.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.q, p.k, p.v))
    p.ridge = torch.rand(p.q.shape[:3], generator=torch.Generator().manual_seed(1)) + 1.5
    return p


@pytest.mark.parametrize("gpu, block_q, precision, fields", PACKED, ids=str)
def test_packed_sequences(gpu, block_q, precision, fields):
    """Every sequence is attended as it would be alone, bit for bit."""
    p = packed_problem(**fields)
    wanted, options = ("out", *INFO, *SAVED), ("cuda", precision, resolve(gpu))
    together = run_forward(p, wanted, *options, **TILES[gpu, block_q])
    assert_close(together["out"], p.reference(), limit(p, precision, 1.5))
    assert together["out"].transpose(1, 2).is_contiguous()
    for alone, rows, _ in p.sequences():
        expected = run_forward(alone, wanted, *options, **TILES[gpu, block_q])
        for name, value in expected.items():
            found = together[name][:, :, :, rows] if name == "unit_probe" else together[name][:, :, rows]
            assert torch.equal(found, value), name


@pytest.mark.parametrize(
    "lengths", [[300, 0, 129, 1, 1500, 700], [], [0], [128, 128], [3] * 200, [500, 20, 1000]], ids=len
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_of_packed_sequences_run_in_the_order_of_their_work(monkeypatch, emulated, is_causal, lengths):  # noqa: F811
    p = packed_problem(lengths_q=lengths, lengths_k=[max(n - 200, 7) for n in lengths], is_causal=is_causal)
    tables, ends, launch = [], SweepLauncher._ends, runtime.launch
    monkeypatch.setattr(SweepLauncher, "_ends", lambda *args: tables.append(ends(*args)) or tables[-1])
    monkeypatch.setattr(runtime, "launch", lambda starts, *args: launch(starts[:1], *args))
    run(p, gpu="a100")
    [(_, _, table)] = tables
    order = [tuple(tile) for tile in table.tolist()]
    tiles = [(sequence, tile) for sequence, length in enumerate(lengths) for tile in range(-(-length // 128))]
    assert sorted(order[: len(tiles)]) == tiles and set(order[len(tiles) :]) <= {(-1, 0)}
    work = [work_of(p, 128, *tile) for tile in order[: len(tiles)]]
    assert work == sorted(work, reverse=True)


def work_of(p, block, sequence, tile):
    """Keys that the last row of a tile sees; the first tiles of causal sequences go before all."""
    queries, keys = (ends.diff()[sequence].item() for ends in (p.cu_seqlens_q, p.cu_seqlens_k))
    if not p.is_causal:
        return keys
    return max(0, keys + min(0, (tile + 1) * block - queries)) if tile else float("inf")


@pytest.mark.parametrize("gpu, block_q, precision, fields", SPLIT, ids=str)
def test_split_is_fused_in_several_launches(emulated, gpu, block_q, precision, fields):  # noqa: F811
    """What crosses a launch crosses exactly, asked for or not, so that schedules differ in nothing but time."""
    p = (packed_problem if "lengths_q" in fields else problem)(**fields)
    plans = {
        schedule: make_plan(
            p, "cuda", precision, resolve(gpu), schedule=schedule, **TILES[gpu, block_q], cg_max_iters=7
        )
        for schedule in ("fused", "split")
    }
    wanted = ("out", *INFO, *SAVED)
    expected = SweepLauncher(plans["fused"])(p.inputs(), wanted)
    assert expected["iterations"].unique().numel() > 3
    split = SweepLauncher(plans["split"])
    for names, backwards in ((wanted, False), (("out",), True), (("lse", "final_residual"), False)):
        emulated["backwards"] = backwards
        found = split(p.inputs(), names)
        assert found.keys() == set(names)
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    [launches] = split._bound.values()
    stats, *turns, output = launches[p.cu_seqlens_q is not None :]
    assert turns == 7 * turns[:1]
    for kernel in (stats, turns[0], output):
        assert kernel.library.shared_size() == kernel.kernel.shared
        assert kernel.library.arguments_size() == split._arguments.size


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "gpu, block_q, block_k",
    [("h200", 64, 32), ("h200", 128, 96), ("h200", 192, 64), ("a100", 64, 64), ("a100", 128, 32)],
)
def test_tiles(emulated, gpu, block_q, block_k, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    p = problem(seqlen_q=230, window_size=150)
    assert_close(run(p, "fast", gpu, block_q, block_k=block_k)[0], p.reference(), limit(p, "fast"))


@GPUS
@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_saved_state_and_info_are_those_of_the_eager_backend(precision, gpu):
    p = problem(seqlen_q=90, head_dim_v=40, ridge=0.5)
    wanted = ("out", *INFO, *SAVED)
    got = run_forward(p, wanted, "cuda", precision, resolve(gpu), **TILES[gpu, 128])
    expected = run_forward(p, wanted, precision=precision, block_q=64)
    terms = got["unit_probe"].shape[0]
    for name, value in got.items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype)
    assert (got["iterations"] - expected["iterations"]).abs().max() <= 1
    for name in ("lse", "kbar", "probe_norm"):
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-3)
    probes = [x["unit_probe"].float().sum(0) for x in (got, expected)]
    torch.testing.assert_close(*probes, rtol=0, atol=1e-2)
    if terms == 2:
        assert (got["unit_probe"][1].float().abs() <= got["unit_probe"][0].float().abs() / 128).all()


@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_another_backend_goes_backward_from_what_is_saved(precision):
    p = problem(seqlen_q=80)
    grad_out = make_grad_out(p)
    saved = run_forward(p, tuple(SAVED), "cuda", precision, resolve("h200"), **TILES["h200", 128])
    given = {"grad_out": grad_out} | saved
    backward = backends.get("eager").bind(make_plan(p, precision=precision, phase="backward"))
    got = backward(p.inputs() | given, GRADIENTS)
    assert_gradients_close(got, p.reference_gradients(grad_out), error_limit("bfloat16", precision, 1.0, "backward"))


@GPUS
def test_any_strides_and_alignment(gpu):
    p = problem(batch=2, heads=2, kv_heads=1, seqlen_q=30)
    expected = run(p, gpu=gpu)[0]
    p.q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(p, gpu=gpu)[0], expected)
    p.k = torch.nn.functional.pad(p.k, (3, 2, 1, 4), value=torch.nan)[:, :, 1:-4, 3:-2]
    p.v = p.v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert torch.equal(run(p, gpu=gpu)[0], expected)


def test_tensors_of_ridge_and_scale():
    p = problem(heads=2, seqlen_q=40)
    p.ridge = (torch.rand((2, 40), generator=torch.Generator().manual_seed(1)) + 0.5).expand(1, 2, 40)
    scale = torch.tensor(0.2)
    out = run(p, scale=scale)[0]
    assert_close(out, p.reference(scale), limit(p))


@GPUS
def test_rows_without_keys_are_zero(gpu):
    p = problem(seqlen_q=150, seqlen_k=8)
    out, iterations, residual = run(p, gpu=gpu, cg_max_iters=8)
    assert (out[:, :, :142] == 0).all() and (out[:, :, 142:] != 0).any(-1).all()
    assert (iterations[:, :, :142] == 0).all() and (residual[:, :, :142] == 0).all()


@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_duplicate_keys_at_a_small_ridge_are_finite(precision):
    p = problem(seqlen_q=33, ridge=1e-4)
    p.k = p.k[:, :, :3].repeat(1, 1, 11, 1)
    out, _, residual = run(p, precision, cg_tol=0, cg_max_iters=12)
    assert out.isfinite().all() and residual.isfinite().all()


def test_groups_of_rows_stop_by_themselves():
    """The first rows see few keys and take many iterations; the cap binds all."""
    p = problem(seqlen_q=128)
    p.ridge = torch.where(torch.arange(128) < 64, 0.5, 5.0).expand(1, 1, 128)
    _, iterations, residual = run(p)
    first, second = iterations[..., :64].max(), iterations[..., 64:].max()
    assert first > second + 3 and residual.max() <= 1e-3
    _, capped, unfinished = run(p, cg_max_iters=3)
    assert capped.max() == 3 and unfinished.max() > 1e-3


@pytest.mark.parametrize("fields", [dict(), dict(head_dim=128, head_dim_v=40)], ids=str)
@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("gpu, block_q", TILES)
def test_python_and_cuda_agree_on_sizes(gpu, block_q, precision, fields):
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    p = problem(seqlen_q=3, **fields)
    plan = make_plan(p, "cuda", precision, resolve(gpu), **TILES[gpu, block_q])
    if why := backends.get("cuda").infeasible(plan.spec, plan.config, plan.device):
        pytest.skip(why)
    launcher = SweepLauncher(plan)
    launcher(p.inputs(), ("out",))
    [[kernel]] = launcher._bound.values()
    assert kernel.library.shared_size() == kernel.kernel.shared
    assert kernel.library.arguments_size() == launcher._arguments.size
