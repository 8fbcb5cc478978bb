"""Gradients of the eager backend against the float64 reference: limits, shapes, masks, precision tiers, subsets."""

import itertools

import pytest
import torch
from eager_cases import BLOCKS, DTYPES, PACKED, SHAPES, any_problem
from problems import (
    assert_gradients_close,
    make_grad_out,
    make_problem,
    relative_errors,
    run_backward,
)

from lla_compile.autograd import GRADIENTS
from lla_compile.lowering import INFO
from lla_compile.precision import error_limit

# (ridge, largest error of dq, dk and dv there). The gradients of ridge and scale, one number a row made of two vectors
# that both carry an error, get twice of it.
GRADIENT_LIMITS = {
    (torch.float64, "accurate"): (0.1, 1e-9),
    (torch.float64, "fast"): (0.1, 1e-4),
    (torch.float32, "accurate"): (0.1, 2e-5),
    (torch.float32, "fast"): (1.0, 1e-2),
    (torch.bfloat16, "accurate"): (0.1, 5e-3),
    (torch.bfloat16, "fast"): (1.0, 3e-2),
    (torch.float16, "accurate"): (0.1, 5e-3),
    (torch.float16, "fast"): (1.0, 3e-2),
}


@pytest.mark.parametrize("fields", SHAPES + PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_gradients_against_the_reference(dtype, precision, fields):
    ridge, limit = GRADIENT_LIMITS[dtype, precision]
    p = any_problem(fields, dtype=dtype, ridge=ridge)
    grad_out = make_grad_out(p)
    results = run_backward(p, grad_out, precision=precision, **BLOCKS)
    assert results["dq"].dtype == results["dk"].dtype == results["dv"].dtype == dtype
    expected = p.reference_gradients(grad_out)
    for names, allowed in ((("dq", "dk", "dv"), limit), (("dridge", "dscale"), 2 * limit)):
        assert_gradients_close({name: results[name] for name in names}, expected, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_error_limits_of_gradients(dtype, ridge):
    p = make_problem(heads=1, seqlen_q=128, head_dim=64, dtype=dtype, ridge=ridge)
    grad_out = make_grad_out(p)
    expected = p.reference_gradients(grad_out)
    for precision in ("fast", "accurate"):
        limit = error_limit(str(dtype).removeprefix("torch."), precision, ridge, "backward")
        results = run_backward(p, grad_out, precision=precision)
        assert all(x.isfinite().all() for x in results.values())
        assert_gradients_close(results, expected, limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_with_ridge_per_query_and_scale_as_tensors(dtype):
    p = make_problem(batch=2, heads=4, kv_heads=2, seqlen_q=40, dtype=dtype)
    p.ridge = torch.rand(2, 1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.2
    grad_out, scale = make_grad_out(p), torch.tensor(0.3, dtype=torch.float64)
    results = run_backward(p, grad_out, scale=scale, **BLOCKS)
    assert_gradients_close(results, p.reference_gradients(grad_out, scale), GRADIENT_LIMITS[dtype, "accurate"][1])


@pytest.mark.parametrize("fields", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_schedules_give_the_same_gradients_exactly(fields, precision):
    p = make_problem(dtype=torch.bfloat16, ridge=0.1, **fields)
    grad_out = make_grad_out(p)
    knobs = BLOCKS | dict(precision=precision, cg_max_iters=8)
    split = run_backward(p, grad_out, schedule="split", **knobs)
    for wanted in (GRADIENTS, ("dq", "dridge", "dscale")):  # with and without the sweep that holds keys
        fused = run_backward(p, grad_out, schedule="fused", wanted=wanted, **knobs)
        for name, x in fused.items():
            assert torch.equal(x, split[name]), name


@pytest.mark.parametrize(
    "fields",
    [
        dict(heads=4, kv_heads=2, seqlen_q=20, seqlen_k=14, window_size=9, head_dim_v=5),
        dict(lengths_q=[5, 0, 9, 3], lengths_k=[5, 2, 6, 0], dtype=torch.float16),
    ],
    ids=str,
)
def test_each_subset_of_the_gradients_is_the_same_exactly(fields):
    p = any_problem(fields, head_dim=8)
    grad_out, knobs = make_grad_out(p), dict(block_q=8, block_k=6, cg_max_iters=5)
    everything = run_backward(p, grad_out, wanted=(*GRADIENTS, *INFO), **knobs)
    for count in range(1, 5):
        for wanted in itertools.combinations(GRADIENTS, count):
            results = run_backward(p, grad_out, wanted=wanted, **knobs)
            assert tuple(results) == wanted
            for name, x in results.items():
                assert torch.equal(x, everything[name]), (wanted, name)


def test_blocks_change_only_the_rounding_of_gradients():
    p = make_problem(seqlen_q=50, seqlen_k=71, window_size=30, dtype=torch.float64, ridge=1.0)
    grad_out = make_grad_out(p)
    expected = run_backward(p, grad_out, block_q=512, block_k=512)
    expected["dscale"] = expected["dscale"].sum()
    for block_q, block_k in ((3, 512), (16, 7), (33, 16)):
        results = run_backward(p, grad_out, block_q=block_q, block_k=block_k)
        assert max(relative_errors(results, expected).values()) < 1e-9


def test_gradients_of_many_keys_in_float16():
    """As in the forward pass; a large ``grad_out`` keeps dk, which is float16 too, in its range."""
    p = make_problem(seqlen_q=3, seqlen_k=100_162, head_dim=8, dtype=torch.float16, is_causal=False)
    p.q = torch.zeros_like(p.q)
    grad_out = 64 * make_grad_out(p)
    results = run_backward(p, grad_out, precision="fast", wanted=("dq", "dk", "dv", "dridge"))
    assert_gradients_close(results, p.reference_gradients(grad_out), 5e-3)


@pytest.mark.parametrize("precision, limit", [("accurate", 5e-3), ("fast", 3e-2)])
def test_gradients_of_keys_that_share_an_offset(precision, limit):
    """dridge = u.s is left out: an offset makes u long, and what u.s loses by cancellation is lost to any solver."""
    p = make_problem(heads=1, seqlen_q=200, head_dim=64, dtype=torch.float64, ridge=1.0)
    offset = 4 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    p.q, p.k, p.v = p.q.bfloat16(), (p.k + offset).bfloat16(), p.v.bfloat16()
    grad_out = make_grad_out(p)
    results = run_backward(p, grad_out, precision=precision, wanted=("dq", "dk", "dv"), block_q=64, block_k=64)
    assert_gradients_close(results, p.reference_gradients(grad_out), limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("keys", ["normal", "equal", "repeated", "large"])
def test_gradients_at_small_ridges_stay_finite(dtype, precision, keys):
    p = make_problem(heads=1, seqlen_q=80, head_dim=64, dtype=dtype)
    if keys == "equal":
        p.k = p.k[:, :, :1].expand_as(p.k)
    elif keys == "repeated":
        p.k = p.k[:, :, :4].repeat(1, 1, 20, 1)
    elif keys == "large":
        p.k = p.k * 30
    for ridge in (0.01, 1e-4):
        p.ridge = ridge
        results = run_backward(p, make_grad_out(p), precision=precision, wanted=(*GRADIENTS, *INFO), cg_max_iters=64)
        for name, x in results.items():
            assert x.isfinite().all(), name


def test_large_ridge_has_the_gradients_of_softmax_attention():
    p = make_problem(seqlen_q=40, ridge=1e9, dtype=torch.float64)
    grad_out = make_grad_out(p)
    qkv = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, grad_out)))
    assert_gradients_close(run_backward(p, grad_out, wanted=tuple(expected), **BLOCKS), expected, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_does_not_take_part_has_no_gradient(dtype):
    p = make_problem(seqlen_q=40, seqlen_k=11, dtype=dtype)
    results = run_backward(p, make_grad_out(p), wanted=(*GRADIENTS, *INFO), **BLOCKS)
    for name in ("dq", "dridge", "dscale", *INFO):
        hidden, seen = results[name][:, :, :29], results[name][:, :, 29:]
        assert hidden.eq(0).all() and seen.ne(0).any(), name
    p = make_problem(seqlen_q=8, seqlen_k=40, window_size=5, dtype=dtype)
    results = run_backward(p, make_grad_out(p), **BLOCKS)
    for name in ("dk", "dv"):
        assert results[name][:, :, :28].eq(0).all() and results[name][:, :, 28:].ne(0).any(-1).all(), name


@pytest.mark.parametrize("fields", [dict(batch=0), dict(seqlen_q=0), dict(seqlen_k=0), dict(batch=0, seqlen_k=0)])
@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_gradients_of_empty_tensors(fields, schedule):
    p = make_problem(head_dim_v=5, **fields)
    results = run_backward(p, make_grad_out(p), schedule=schedule, wanted=(*GRADIENTS, *INFO))
    assert [results[name].shape for name in ("dq", "dk", "dv")] == [p.q.shape, p.k.shape, p.v.shape]
    assert all(x.eq(0).all() for x in results.values())


def test_the_adjoint_solve_is_reported():
    p = make_problem(seqlen_q=60, ridge=0.1)
    knobs = BLOCKS | dict(cg_tol=1e-4, wanted=("dq", *INFO))
    results = run_backward(p, make_grad_out(p), **knobs)
    iterations, residual = results["iterations"], results["final_residual"]
    assert iterations.dtype == torch.int32 and iterations.shape == residual.shape == (1, 2, 60)
    assert 0 < residual.max() <= 1e-4 and 1 < iterations.max() < 60
    capped = run_backward(p, make_grad_out(p), cg_max_iters=3, **knobs)
    assert capped["iterations"].max() == 3 and capped["final_residual"].max() > 1e-4
