"""Errors against float64 on the GPU: the promised limits, all types, tiers and schedules, and hard inputs."""

import pytest
import torch
from on_gpu import forward, forward_info, gpu_problem
from problems import assert_close, relative_error, run, run_info

from lla_compile.devices import identify
from lla_compile.precision import error_limit

SCHEDULES = pytest.mark.parametrize("schedule", ["fused", "split"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])
# Largest errors of `fast` at N 1024: (head_dim, ridge) -> limit.
FAST = {(64, 1.0): 5.7e-3, (128, 1.0): 8.1e-3, (64, 0.1): 2.7e-2, (128, 0.1): 4.2e-2}


def target(head_dim: int, ridge: float, dtype=torch.bfloat16):
    return gpu_problem(batch=2, heads=4, seqlen_q=1024, head_dim=head_dim, ridge=ridge, dtype=dtype)


TILES = {
    "triton": [dict(block_q=64, block_k=32), dict(block_q=128, block_k=64, num_warps=8)],
    "cuda": [dict(block_q=64, block_k=32, num_warps=8), dict(block_k=96, num_stages=4)],
}


@SCHEDULES
@HEAD_DIMS
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_accurate(backend, head_dim, ridge, schedule):
    p = target(head_dim, ridge)
    assert_close(forward(backend, p, schedule=schedule), p.reference(), 2.5e-3)


@HEAD_DIMS
def test_accurate_at_a_small_ridge(backend, head_dim):
    p = target(head_dim, 0.01)
    assert_close(forward(backend, p, cg_max_iters=128), p.reference(), 5e-3)


@SCHEDULES
@HEAD_DIMS
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_fast(backend, head_dim, ridge, schedule):
    p = target(head_dim, ridge)
    assert_close(forward(backend, p, "fast", schedule=schedule), p.reference(), FAST[head_dim, ridge])


@HEAD_DIMS
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_float16_is_no_worse_than_bfloat16(backend, head_dim, ridge):
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        p = target(head_dim, ridge, dtype)
        errors[dtype] = relative_error(forward(backend, p), p.reference())
    assert errors[torch.float16] <= 1.05 * errors[torch.bfloat16]


@SCHEDULES
def test_float16_fast(backend, schedule):
    p = target(64, 0.1, torch.float16)
    assert_close(forward(backend, p, "fast", schedule=schedule), p.reference(), FAST[64, 0.1])


@pytest.mark.parametrize(
    "schedule, head_dim", [("fused", 64), ("split", 64), pytest.param("fused", 128, marks=pytest.mark.slow)]
)
def test_float32_accurate(backend, schedule, head_dim):
    p = target(head_dim, 0.1, torch.float32)
    assert_close(forward(backend, p, schedule=schedule, cg_max_iters=128), p.reference(), 1e-5)


@SCHEDULES
def test_float32_fast(backend, schedule):
    p = target(64, 0.1, torch.float32)
    assert_close(forward(backend, p, "fast", schedule=schedule), p.reference(), error_limit("float32", "fast", 0.1))


def test_no_element_is_an_outlier(backend):
    p = target(64, 0.1)
    low_precision = run(p, "eager", "fast", device=identify("cuda"))
    assert_close(forward(backend, p), p.reference(), 2.5e-3, low_precision)


def test_schedules_agree(backend):
    """They differ in what the compiler contracts or reorders, not in what they round."""
    p = target(64, 0.1)
    split, fused = (forward(backend, p, schedule=schedule) for schedule in ("split", "fused"))
    assert relative_error(split, fused.double()) < 2.5e-3


def test_blocks_change_only_rounding(backend):
    p = target(64, 0.1)
    ref = p.reference()
    for knobs in TILES[backend]:
        assert_close(forward(backend, p, **knobs), ref, 2.5e-3)


@pytest.mark.parametrize("keys", ["normal", "equal", "repeated", "large"])
@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_ridges_stay_finite(backend, dtype, precision, keys):
    p = gpu_problem(seqlen_q=512, dtype=dtype)
    hard_keys(p, keys)
    for ridge in (0.1, 0.01, 1e-3, 1e-4):
        p.ridge = ridge
        out, _, residual = forward_info(backend, p, precision, cg_max_iters=64)
        assert out.isfinite().all() and residual.isfinite().all()


@pytest.mark.parametrize("keys", ["equal", "repeated"])
def test_small_ridges_stay_finite_in_float32(backend, keys):
    p = gpu_problem(seqlen_q=512, dtype=torch.float32, ridge=1e-4)
    hard_keys(p, keys)
    assert forward(backend, p, cg_max_iters=128).isfinite().all()


def hard_keys(p, kind: str) -> None:
    if kind == "equal":
        p.k = p.k[:, :, :1].expand_as(p.k).contiguous()
    elif kind == "repeated":
        p.k = p.k[:, :, :4].repeat(1, 1, p.k.shape[2] // 4, 1)
    elif kind == "large":
        p.k = p.k * 30


def test_equal_keys_give_the_mean_value(backend):
    p = gpu_problem(seqlen_q=500, ridge=0.1)
    hard_keys(p, "equal")
    mean = p.v.double().cumsum(2) / torch.arange(1, 501, device="cuda")[:, None]
    assert_close(forward(backend, p), mean, 2.5e-3)


def test_keys_that_share_an_offset(backend):
    """kbar stays a mean of the keys in rounded arithmetic, however far from 0 they lie."""
    p = gpu_problem(seqlen_q=400)
    generator = torch.Generator().manual_seed(5)
    p.k = (p.k.double() + 4 * torch.randn(64, dtype=torch.float64, generator=generator).cuda()).bfloat16()
    assert_close(forward(backend, p), p.reference(), 2.5e-3)


def test_iterations_are_those_of_the_eager_backend(backend):
    p = target(64, 1.0)
    _, iterations, residual = forward_info(backend, p)
    _, expected, _ = run_info(p, "eager", device=identify("cuda"))
    assert residual.max() <= 1e-3
    assert (iterations - expected).abs().max() <= 2 and (iterations == expected).float().mean() > 0.9
