"""Decoding on Triton kernels that run in its interpreter; see interpreted_cases.py."""

import pytest
import torch
from decode_problems import CASES, STREAM, STREAM_CASES, decode, decode_info, decode_plan, make_decode_problem
from problems import assert_close

from lla_compile import backends
from lla_compile.lowering import INFO

BLOCKS = dict(block_k=16, num_warps=1, num_stages=1)
LIMIT = 2e-3
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


def triton_decode(problem, **knobs):
    return decode(problem, "triton", **(BLOCKS | dict(num_splits=3) | knobs))


def stream(problem, **knobs):
    return decode(problem, "triton", **(STREAM | dict(num_warps=1, num_stages=1) | knobs))


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decode_cases(fields):
    problem = make_decode_problem(dtype=torch.float16, **fields)
    assert_close(triton_decode(problem), problem.reference(), LIMIT)


@pytest.mark.parametrize("fields", CASES + STREAM_CASES, ids=str)
def test_streaming_cases(fields):
    problem = make_decode_problem(dtype=torch.float16, **fields)
    assert_close(stream(problem), problem.reference(), LIMIT)


@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_streaming_in_float32(ridge):
    problem = make_decode_problem(heads=4, kv_heads=1, queries=2, ridge=ridge)
    assert_close(stream(problem), problem.reference(), 1e-5)


def test_streaming_in_tiles_of_a_group():
    """More queries than a tile has rows."""
    problem = make_decode_problem(dtype=torch.float16, heads=9, kv_heads=1, queries=4, lengths=[40, 4, 2], page_size=8)
    assert_close(stream(problem), problem.reference(), LIMIT)


def test_streaming_takes_tensors_of_ridge_and_scale_and_reports_the_solve():
    ridge = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    problem = make_decode_problem(dtype=torch.float16, heads=4, queries=2, lengths=[0, 40, 9], ridge=ridge)
    scale = torch.tensor(0.3)
    out = torch.full((3, 2, 4, 16), torch.nan, dtype=torch.float16).transpose(1, 2)
    returned, iterations, residual = decode_info(
        problem, "triton", scale=scale, given={"out": out}, **STREAM | dict(num_warps=1)
    )
    assert returned is out
    assert_close(out, problem.reference(0.3), LIMIT)
    assert (iterations[0] == 0).all() and (residual[0] == 0).all()
    assert (iterations[1:] > 0).all() and (residual[1:] <= 10**-3.5).all()


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_decode_splits(num_splits, ridge):
    problem = make_decode_problem(dtype=torch.float16, capacity=70, lengths=[70, 3, 41], ridge=ridge)
    assert_close(triton_decode(problem, num_splits=num_splits), problem.reference(), LIMIT)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_rows_in_blocks(num_splits):
    problem = make_decode_problem(dtype=torch.float16, head_dim=24)
    assert_close(triton_decode(problem, block_d=16, num_splits=num_splits), problem.reference(), LIMIT)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_keys_with_an_offset(num_splits):
    problem = make_decode_problem(dtype=torch.float16, lengths=None)
    problem.k += 20.0
    problem.k_cache = problem.k
    assert_close(triton_decode(problem, num_splits=num_splits), problem.reference(), 3e-3)


def test_decode_equal_keys():
    problem = make_decode_problem(dtype=torch.float16, lengths=None, ridge=0.1)
    problem.k[:] = problem.k[:, :, :1]
    problem.k_cache = problem.k
    assert_close(triton_decode(problem), problem.reference(), LIMIT)


def test_decode_scores_that_grow():
    """The reference of the weights has to follow the largest score."""
    problem = make_decode_problem(dtype=torch.float16, batch=1, heads=1, kv_heads=1, capacity=96, lengths=None)
    problem.k[:] = problem.k.sign() * torch.linspace(0, 4, 96)[:, None].half() * problem.q.sign()
    problem.k_cache = problem.k
    assert_close(triton_decode(problem, num_splits=1), problem.reference(), 3e-3)


def test_decode_fast_takes_one_term():
    problem = make_decode_problem(dtype=torch.float16, ridge=0.1)
    assert_close(triton_decode(problem, precision="fast"), problem.reference(), 5e-3)


def test_decode_tensors_of_ridge_and_scale():
    ridge = torch.rand(3, 2, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    problem = make_decode_problem(dtype=torch.float16, ridge=ridge)
    scale = torch.tensor(0.3)
    out, *_ = decode_info(problem, "triton", scale=scale, **BLOCKS, num_splits=3)
    assert_close(out, problem.reference(0.3), LIMIT)


def test_decode_reports_the_solve():
    problem = make_decode_problem(dtype=torch.float16, lengths=[0, 40, 9], ridge=0.1)
    _, iterations, residual = decode_info(problem, "triton", **BLOCKS, num_splits=3)
    assert (iterations[0] == 0).all() and (residual[0] == 0).all()
    assert (iterations[1:] > 0).all() and (residual[1:] <= 10**-3.5).all()
    _, capped, unsolved = decode_info(problem, "triton", **BLOCKS, num_splits=3, cg_max_iters=1)
    assert (capped <= 1).all() and unsolved.max() > 10**-3.5


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_out_and_workspace(num_splits):
    problem = make_decode_problem(dtype=torch.float16, lengths=[1, 40, 17])
    plan = decode_plan(problem, "triton", **BLOCKS, num_splits=num_splits)
    executable = backends.get("triton").bind(plan)
    workspace = torch.full((executable.workspace_numel,), torch.nan)
    out = torch.full((3, 1, 2, 16), torch.nan, dtype=torch.float16).transpose(1, 2)
    results = executable(problem.inputs() | {"out": out, "workspace": workspace}, ("out", *INFO))
    assert results["out"] is out
    assert_close(out, problem.reference(), LIMIT)
