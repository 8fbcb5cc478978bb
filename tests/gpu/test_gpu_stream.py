"""Decoding by the streaming schedule on the GPU."""

import pytest
import torch
from decode_problems import CASES, STREAM, STREAM_CASES
from on_gpu import gpu_decode, gpu_decode_problem
from problems import assert_close, relative_error

LIMIT = 2.5e-3
LENGTHS = (1, 2, 7, 33, 64, 128, 500, 1024, 2049)


def limit_of(p) -> float:
    """Beside the type's own limit: a query of fewer keys than dimensions has a probe of norm |q|/ridge, whose products
    with keys are about head_dim/ridge and rounded in float32."""
    own = 1e-5 if p.q.dtype == torch.float32 else LIMIT
    return own + torch.finfo(torch.float32).eps * p.q.shape[3] / p.ridge


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fields", CASES + STREAM_CASES, ids=str)
def test_cases(fields, dtype):
    p = gpu_decode_problem(**dict(head_dim=16, dtype=dtype) | fields)
    assert_close(gpu_decode("triton", p, **STREAM), p.reference(), limit_of(p))


@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_any_length(head_dim, ridge):
    sizes = dict(batch=len(LENGTHS), heads=4, capacity=max(LENGTHS), lengths=LENGTHS)
    p = gpu_decode_problem(head_dim=head_dim, ridge=ridge, **sizes)
    outs = gpu_decode("triton", p, **STREAM | dict(block_k=64))
    errors = [relative_error(x, y) for x, y in zip(outs, p.reference(), strict=True)]
    assert max(errors) <= limit_of(p), [f"{error:.1e}" for error in errors]
