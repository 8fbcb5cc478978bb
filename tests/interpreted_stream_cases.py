"""Decoding by the streaming schedule in Triton's interpreter; see interpreted_cases.py."""

import pytest
import torch
from decode_problems import CASES, STREAM, STREAM_CASES, decode, decode_info, make_decode_problem
from problems import assert_close

LIMIT = 2e-3
TILES = STREAM | dict(num_warps=1, num_stages=1)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


def stream(problem):
    return decode(problem, "triton", **TILES)


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
        problem, "triton", scale=scale, given={"out": out}, **TILES
    )
    assert returned is out
    assert_close(out, problem.reference(0.3), LIMIT)
    assert (iterations[0] == 0).all() and (residual[0] == 0).all()
    assert (iterations[1:] > 0).all() and (residual[1:] <= 10**-3.5).all()
