"""States of parts of the keys: what they say, and that they merge exactly."""

import doctest
import itertools

import pytest
import torch
from problems import assert_close, make_problem, relative_error

from lla_compile import GramState, gram
from lla_compile.reference import lla_reference


def problem(**fields):
    return make_problem(
        **dict(seqlen_q=5, seqlen_k=60, head_dim=12, head_dim_v=7, dtype=torch.float64, is_causal=False) | fields
    )


def split(p, sizes):
    """The states of consecutive parts of these sizes."""
    return [GramState.of(p.q, k, v) for k, v in zip(p.k.split(sizes, 2), p.v.split(sizes, 2))]


def assert_same(a, b, tolerance=1e-12):
    for name, x, y in zip(GramState._fields, a, b):
        assert x.shape == y.shape, name
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)


def test_moments_are_what_they_are_called():
    p = problem(heads=1, seqlen_q=3)
    state = GramState.of(p.q, p.k, p.v, scale=0.3)
    scores = 0.3 * p.q[0, 0] @ p.k[0, 0].T
    weights = scores.softmax(-1)
    key_mean, value_mean = weights @ p.k[0, 0], weights @ p.v[0, 0]
    keys, values = p.k[0, 0] - key_mean[:, None], p.v[0, 0] - value_mean[:, None]
    covariances = (torch.einsum("nm,nmd,nme->nde", weights, keys, x) for x in (keys, values))
    assert_same(state, [x[None, None] for x in (scores.logsumexp(-1), key_mean, value_mean, *covariances)])


@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("seqlen_k", [1, 2, 9, 60])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_attends_as_the_reference(ridge, seqlen_k, offset):
    p = problem(batch=2, heads=4, kv_heads=2, seqlen_k=seqlen_k)
    p.k = p.k + offset
    expected = lla_reference(p.q, p.k, p.v, ridge, is_causal=False)
    for sizes in ([seqlen_k], [1] * seqlen_k, [seqlen_k // 2, 0, seqlen_k - seqlen_k // 2]):
        assert_close(GramState.merge(split(p, sizes)).attend(p.q, ridge), expected, 1e-10)


def test_any_number_and_order_of_splits():
    p = problem(heads=4, kv_heads=2)
    whole = GramState.of(p.q, p.k, p.v)
    for sizes in ([60], [20, 40], [0, 60], [7] * 8 + [4], [1] * 60):
        assert_same(GramState.merge(split(p, sizes)), whole)
    parts = split(p, [10, 1, 0, 30, 19])
    for order in itertools.permutations(parts):
        assert_same(GramState.merge(order), whole)


def test_merging_is_associative():
    p = problem()
    a, b, c, d = split(p, [3, 20, 1, 36])
    whole, merge = GramState.merge([a, b, c, d]), GramState.merge
    assert_same(merge([merge([merge([a, b]), c]), d]), whole)
    assert_same(merge([a, merge([b, merge([c, d])])]), whole)
    assert_same(merge([merge([d, b]), merge([c, a])]), whole)


def test_parts_without_keys():
    p = problem()
    empty = GramState.of(p.q, p.k[:, :, :0], p.v[:, :, :0])
    assert empty.lse.eq(-torch.inf).all() and all(x.eq(0).all() for x in empty[1:])
    nothing = GramState.merge([empty, empty])
    assert_same(nothing, empty)
    assert nothing.attend(p.q, 0.1).eq(0).all()
    whole = GramState.of(p.q, p.k, p.v)
    assert_same(GramState.merge([empty, whole, empty]), whole)


def test_parts_that_outweigh_others_by_any_factor():
    """exp(lse) of one part overflows, of another underflows."""
    p = problem(heads=1)
    p.k[:, :, :30] *= 2000
    p.k[:, :, 30:] *= 0.001
    assert_same(GramState.merge(split(p, [30, 30])), GramState.of(p.q, p.k, p.v), 1e-9)


def test_mask_by_query_and_head():
    p = problem(batch=2, heads=4, kv_heads=2)
    mask = torch.rand(2, 4, 5, 60, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, 1, 2] = False  # a query that sees nothing
    mask[:, :, :, 50:] = False  # keys that nobody sees
    state = GramState.of(p.q, p.k.index_fill(2, torch.arange(50, 60), torch.nan), p.v, mask=mask)
    out = state.attend(p.q, 0.3)
    assert out[0, 1, 2].eq(0).all()
    for b, h, i in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
        seen = mask[b, h, i]
        q, k, v = p.q[b, h, i], p.k[b, h // 2, seen], p.v[b, h // 2, seen]
        expected = lla_reference(q[None, None, None], k[None, None], v[None, None], 0.3, is_causal=False)
        assert_close(out[b, h, i], expected[0, 0, 0], 1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (2, 4, 5)], ids=str)
def test_ridge_and_scale_tensors(shape):
    p = problem(batch=2, heads=4, kv_heads=2)
    ridge = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    scale = torch.tensor(0.4, dtype=torch.float64)
    expected = lla_reference(p.q, p.k, p.v, ridge, scale=scale, is_causal=False)
    assert_close(GramState.of(p.q, p.k, p.v, scale=scale).attend(p.q, ridge), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_low_precision_inputs_keep_a_float32_state(dtype, ridge):
    p = problem(dtype=dtype, head_dim=32, seqlen_k=200)
    state = GramState.merge(split(p, [70, 70, 60]))
    assert all(x.dtype == torch.float32 for x in state)
    assert relative_error(state.attend(p.q, ridge), lla_reference(p.q, p.k, p.v, ridge, is_causal=False)) < 1e-5


def rounded_state(p, dtype=torch.bfloat16):
    """As a kernel makes it that rounds the weighted keys, with one head and one query."""
    k, v = p.k[0, 0], p.v[0, 0]
    weights = ((k @ p.q[0, 0, 0]) * k.shape[1] ** -0.5).softmax(-1)
    key_mean, value_mean = weights @ k, weights @ v
    x = (weights[:, None] * (k - k.mean(0))).to(dtype).double()
    covariances = (x.T @ y - torch.outer(x.sum(0), mean) for y, mean in ((k, key_mean), (v, value_mean)))
    return GramState(*(x[None, None, None] for x in (torch.zeros(()).double(), key_mean, value_mean, *covariances)))


def test_rounded_weighted_keys_do_no_harm():
    """Fewer keys than dimensions, a small ridge: the probe has norm 100 ||q||, which does not multiply the errors."""
    p = problem(heads=1, seqlen_q=1, seqlen_k=40, head_dim=64, head_dim_v=16)
    expected = lla_reference(p.q, p.k, p.v, 0.01, is_causal=False)
    state = rounded_state(p)
    untransposed = state._replace(key_covariance=state.key_covariance.mT)
    symmetric = state._replace(key_covariance=(state.key_covariance + state.key_covariance.mT) / 2)
    good, *bad = (relative_error(s.attend(p.q, 0.01), expected) for s in (state, untransposed, symmetric))
    assert good < 5e-3 and min(bad) > 10 * good


def test_moves():
    p = problem()
    state = GramState.of(p.q, p.k, p.v)
    assert all(x.dtype == torch.float32 for x in state.to(torch.float32))
    assert all(x.device.type == "meta" for x in state.to("meta"))


def test_example_in_the_docstring():
    torch.manual_seed(0)
    results = doctest.testmod(gram)
    assert results.attempted >= 5 and results.failed == 0
