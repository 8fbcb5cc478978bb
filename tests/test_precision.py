"""Rounding of operands, and the table of allowed errors."""

import math

import pytest
import torch

from lla_compile.precision import FLOAT16_MAX, error_limit, round_operand, split_terms, split_tol, weight_shift


@pytest.mark.parametrize("dtype, bits", [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("terms", [1, 2])
def test_each_term_adds_the_bits_of_the_type(dtype, bits, terms):
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 0.5
    error = ((round_operand(x, dtype, terms) - x) / x).abs().max().item()
    bound = 2.0 ** -(bits * terms)
    assert bound / 8 < error <= bound


@pytest.mark.parametrize("dtype, terms", [("bfloat16", 1), ("bfloat16", 2), ("float16", 1), ("float16", 2)])
def test_rounding_twice_is_rounding_once(dtype, terms):
    x = round_operand(torch.randn(10_000, generator=torch.Generator().manual_seed(1)), dtype, terms)
    assert torch.equal(round_operand(x, dtype, terms), x)


def test_float16_saturates():
    x = torch.tensor([1e6, -1e6, 1.0])
    assert round_operand(x, "float16", 1).tolist() == [FLOAT16_MAX, -FLOAT16_MAX, 1.0]
    assert round_operand(x, "float16", 2).isfinite().all()
    assert round_operand(torch.tensor(float("nan")), "float16", 1).isnan()


def test_wide_types_are_left_alone():
    x = torch.randn(10)
    assert round_operand(x, "float32", 1) is x
    assert round_operand(x.double(), "float64", 1).dtype is torch.float64


def test_weight_shift_keeps_small_weights_normal():
    smallest_normal = torch.finfo(torch.float16).smallest_normal
    assert 2.0**-16 < smallest_normal <= 2.0**-16 * 2 ** weight_shift("float16")
    assert weight_shift("bfloat16") == weight_shift("float32") == 0


def test_terms():
    assert split_terms("bfloat16", "accurate") == split_terms("float16", "accurate") == 2
    assert split_terms("bfloat16", "fast") == split_terms("float32", "accurate") == 1
    assert split_tol("bfloat16", "accurate") == 0.1
    assert split_tol("bfloat16", "fast") == split_tol("float32", "accurate") == 0


def test_error_limits():
    assert error_limit("bfloat16", "accurate", 0.1) == error_limit("float16", "accurate", 5.0) == 2.5e-3
    assert error_limit("bfloat16", "accurate", 0.01) == 5e-3
    assert error_limit("bfloat16", "fast", 1.0) == 8e-3
    assert error_limit("bfloat16", "fast", 0.5) == 2.7e-2
    assert error_limit("bfloat16", "fast", 0.01) == math.inf
    assert error_limit("float32", "accurate", 0.1) == 1e-5
    assert error_limit("bfloat16", "accurate", 0.1, "backward") == 5e-3
    assert error_limit("float16", "fast", 1.0, "backward") == 3e-2
    assert error_limit("bfloat16", "accurate", 0.01, "backward") == math.inf
