"""The reference against the paper's own equations, against autograd, and at its limits."""

import pytest
import torch
from problems import make_problem, relative_error

from lla_compile import reference
from lla_compile.reference import lla_reference, lla_reference_backward, lla_reference_uncentred

CASES = [
    dict(),
    dict(is_causal=False, seqlen_k=9, head_dim_v=5),
    dict(heads=4, kv_heads=2, seqlen_q=11, seqlen_k=7),
    dict(batch=2, seqlen_q=7, seqlen_k=15, window_size=4),
]


def problem(seqlen_q=12, head_dim=6, **fields):
    return make_problem(seqlen_q=seqlen_q, head_dim=head_dim, dtype=torch.float64, **fields)


@pytest.mark.parametrize("fields", CASES)
@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_centred_form_equals_the_papers(fields, ridge):
    p = problem(ridge=ridge, **fields)
    uncentred = lla_reference_uncentred(p.q, p.k, p.v, ridge, is_causal=p.is_causal, window_size=p.window_size)
    assert relative_error(p.reference(), uncentred) < 1e-12


@pytest.mark.parametrize("fields", CASES)
def test_gradients(fields):
    p = problem(**{"seqlen_q": 5, "head_dim": 3, **fields})
    ridge = torch.rand(p.q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    scale = torch.tensor(0.7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (p.q, p.k, p.v, ridge, scale)]

    def forward(q, k, v, ridge, scale):
        return lla_reference(q, k, v, ridge, scale=scale, is_causal=p.is_causal, window_size=p.window_size)

    out = forward(*inputs)
    grad_out = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(out, inputs, grad_out)
    with torch.no_grad():
        grads = lla_reference_backward(
            grad_out, p.q, p.k, p.v, ridge, scale=scale, is_causal=p.is_causal, window_size=p.window_size
        )
    for name, ours, theirs in zip(("dq", "dk", "dv", "dridge", "dscale"), grads, expected):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-11, name


def test_gradcheck():
    p = problem(seqlen_q=4, head_dim=2, heads=1)
    ridge = torch.full((1, 1, 4), 0.3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (p.q, p.k, p.v, ridge)]
    assert torch.autograd.gradcheck(lla_reference, inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_large_ridge_is_softmax_attention(causal):
    p = problem(is_causal=causal, ridge=1e12)
    expected = torch.nn.functional.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=causal)
    assert relative_error(p.reference(), expected) < 1e-10


def test_affine_values_are_reproduced_at_the_query():
    p = problem(seqlen_q=5, seqlen_k=40, is_causal=False, ridge=1e-10)
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    offset = torch.randn(4, dtype=torch.float64, generator=generator)
    p.v = p.k @ matrix + offset
    assert relative_error(p.reference(), p.q @ matrix + offset) < 1e-7


def test_one_visible_key_gives_its_value():
    p = problem(window_size=1, ridge=0.01)
    assert relative_error(p.reference(), p.v) < 1e-14


def test_rows_without_keys_are_zero():
    p = problem(seqlen_q=9, seqlen_k=4)
    out = p.reference()
    assert out[:, :, :5].eq(0).all() and out[:, :, 5:].ne(0).all()
    assert problem(seqlen_k=0).reference().eq(0).all()


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    p = problem(ridge=0.1)
    expected = p.reference()
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 5 * 12 * 6)
    assert relative_error(p.reference(), expected) < 1e-14


def test_ridge_per_query_and_custom_scale():
    p = problem(heads=1)
    ridge = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    out = lla_reference(p.q, p.k, p.v, ridge, scale=0.3)
    alone = lla_reference(p.q, p.k, p.v, ridge[7].item(), scale=0.3)
    assert relative_error(out[:, :, 7], alone[:, :, 7]) < 1e-14


def test_wrong_arguments():
    p = problem(heads=3)
    with pytest.raises(ValueError, match="multiple of key heads, got 3 and 2"):
        lla_reference(p.q, p.k[:, :2], p.v[:, :2])
    with pytest.raises(ValueError, match="window_size needs is_causal"):
        lla_reference(p.q, p.k, p.v, is_causal=False, window_size=2)
    with pytest.raises(ValueError, match="ridge must be positive"):
        lla_reference(p.q, p.k, p.v, 0.0)
    with pytest.raises(ValueError, match="ridge must be positive, its smallest value is -1"):
        lla_reference(p.q, p.k, p.v, torch.tensor(-1.0))
