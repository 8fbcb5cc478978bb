"""Packed sequences: each is attended as lla_attention would alone."""

import pytest
import torch

from lla_compile import SolveInfo, dispatch, lla_attention, lla_attention_varlen

pytestmark = pytest.mark.usefixtures("clean")

CASES = [
    dict(lengths_q=[7, 12, 3]),
    dict(lengths_q=[5, 0, 9, 1], lengths_k=[5, 4, 0, 14]),
    dict(lengths_q=[0, 6, 0], lengths_k=[0, 11, 0], is_causal=False),
    dict(lengths_q=[9, 4], lengths_k=[3, 10]),
    dict(lengths_q=[20, 8], window_size=6),
    dict(lengths_q=[3, 15], lengths_k=[18, 2], window_size=5),
    dict(lengths_q=[4]),
]


class Packed:
    """Random packed sequences, their ends and the options of the call."""

    def __init__(
        self, lengths_q, lengths_k=None, heads=4, kv_heads=2, head_dim=6, head_dim_v=3, dtype=torch.float64, **options
    ):
        self.lengths = lengths_q, lengths_q if lengths_k is None else lengths_k
        self.options = options
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        total_q, total_k = map(sum, self.lengths)
        self.q, self.grad_out = normal(total_q, heads, head_dim), normal(total_q, heads, head_dim_v)
        self.k, self.v = normal(total_k, kv_heads, head_dim), normal(total_k, kv_heads, head_dim_v)
        self.ends = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in self.lengths]

    def call(self, q, k, v, ridge=0.5, **options):
        return lla_attention_varlen(q, k, v, *self.ends, ridge, **self.options, **options)

    def one_by_one(self, q, k, v, ridge=0.5, **options):
        """The same by lla_attention, sequence by sequence."""
        outs = []
        rows = ridge.expand(q.shape[:2]).split(self.lengths[0]) if isinstance(ridge, torch.Tensor) else None
        parts = zip(q.split(self.lengths[0]), k.split(self.lengths[1]), v.split(self.lengths[1]))
        for i, tensors in enumerate(parts):
            batched = (x.transpose(0, 1)[None] for x in tensors)
            own = ridge if rows is None else rows[i].T[None]
            outs.append(lla_attention(*batched, own, **self.options, **options)[0].transpose(0, 1))
        return torch.cat(outs)

    def gradients(self, function, ridge, scale):
        inputs = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, ridge, scale)]
        out = function(*inputs[:4], scale=inputs[4])
        return out, torch.autograd.grad(out, inputs, self.grad_out)


def ridge_of(*shape):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_equals_sequence_by_sequence(fields):
    p = Packed(**fields)
    ridge, scale = ridge_of(p.q.shape[0], 4), torch.tensor(0.4, dtype=torch.float64)
    out, gradients = p.gradients(p.call, ridge, scale)
    expected, expected_gradients = p.gradients(p.one_by_one, ridge, scale)
    assert out.shape == p.grad_out.shape and out.is_contiguous()
    torch.testing.assert_close(out, expected)
    for name, a, b in zip(("q", "k", "v", "ridge", "scale"), gradients, expected_gradients):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_every_type_and_tier(dtype, precision):
    """The sums are taken in the same order, up to the tiles that the plan of each length chooses."""
    p = Packed([9, 0, 20], [12, 3, 20], dtype=dtype)
    out = p.call(p.q, p.k, p.v, precision=precision)
    assert out.dtype == dtype
    torch.testing.assert_close(out, p.one_by_one(p.q, p.k, p.v, precision=precision))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (21, 1), (1, 4), (21, 4)], ids=str)
def test_ridge_by_query_and_head(shape):
    p = Packed([8, 13])
    ridge, scale = ridge_of(*shape), torch.tensor(0.4, dtype=torch.float64)
    out, gradients = p.gradients(p.call, ridge, scale)
    expected, expected_gradients = p.gradients(p.one_by_one, ridge, scale)
    torch.testing.assert_close(out, expected)
    assert gradients[3].shape == ridge.shape
    torch.testing.assert_close(gradients[3], expected_gradients[3])


def test_no_sequence_sees_another():
    p = Packed([6, 5, 7])
    k, v = p.k.clone(), p.v.clone()
    k[6:11], v[6:11] = torch.nan, torch.nan
    out = p.call(p.q, k, v)
    expected = p.call(p.q, p.k, p.v)
    assert torch.equal(out[:6], expected[:6]) and torch.equal(out[11:], expected[11:]) and out[6:11].isnan().all()


def test_info_has_a_row_for_every_query_and_a_column_for_every_head():
    p = Packed([8, 0, 13], [5, 2, 13], dtype=torch.float32)
    q = p.q.requires_grad_()
    out, info = p.call(q, p.k, p.v, return_info=True, cg_max_iters=4)
    assert isinstance(info, SolveInfo) and info.iterations.dtype == torch.int32
    assert info.iterations.shape == info.residual.shape == (21, 4)
    assert info.iterations[:3].eq(0).all() and info.iterations[3:8].ne(0).any() and info.iterations.max() == 4
    out.sum().backward()
    adjoint = info.adjoint
    assert adjoint.iterations.shape == adjoint.residual.shape == (21, 4)
    assert adjoint.iterations[:3].eq(0).all() and adjoint.iterations[3:8].ne(0).any()
    with torch.no_grad():
        assert p.call(q, p.k, p.v, return_info=True)[1].adjoint is None


@pytest.mark.parametrize("lengths_q, lengths_k", [([], []), ([0], [0]), ([0, 0], [3, 1]), ([2, 0], [0, 0])], ids=str)
def test_nothing_to_compute(lengths_q, lengths_k):
    p = Packed(lengths_q, lengths_k)
    out, gradients = p.gradients(p.call, ridge_of(4), torch.tensor(0.4, dtype=torch.float64))
    assert out.shape == p.grad_out.shape and out.eq(0).all()
    for x, gradient in zip((p.q, p.k, p.v), gradients):
        assert gradient.shape == x.shape and gradient.eq(0).all()
    assert p.call(p.q, p.k, p.v, return_info=True)[1].iterations.shape == p.q.shape[:2]


def test_queries_without_keys_beside_keys_without_queries():
    """There are queries and there are keys, and none meet."""
    p = Packed([4, 0], [0, 6])
    out, gradients = p.gradients(p.call, ridge_of(4), torch.tensor(0.4, dtype=torch.float64))
    assert out.eq(0).all() and all(x.eq(0).all() for x in gradients)


def test_what_a_projection_of_all_heads_gives_is_taken_as_it_lies(monkeypatch):
    """q, k and v cut out of one tensor, (total, 3, H, D): no copy is made of any of them."""
    p = Packed([5, 7], heads=2, kv_heads=2, head_dim_v=6)
    q, k, v = torch.stack([p.q, p.k, p.v], 1).unbind(1)
    seen, original = [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda phase, *args: seen.append(args[0]) or original(phase, *args))
    torch.testing.assert_close(p.call(q, k, v), p.call(p.q, p.k, p.v))
    assert [x.data_ptr() for x in seen[0][:3]] == [x.data_ptr() for x in (q, k, v)]
    strided = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(p.call(strided, p.k, p.v), p.call(p.q, p.k, p.v))


def ends(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int32} | options)


Q, K = torch.randn(6, 4, 8), torch.randn(6, 2, 8)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, r"q must be 3-D \(total, heads, head_dim\), got shape \(1, 6, 4, 8\)", dict(q=Q[None])),
        (ValueError, r"v must be 3-D \(total, heads, head_dim\), got shape \(6, 8\)", dict(v=K[:, 0])),
        (TypeError, "q must be a torch.Tensor, got list", dict(q=[1.0])),
        (TypeError, "k must be a torch.Tensor, got NoneType", dict(k=None)),
        (TypeError, "q, k and v must have one dtype, got q float32 and k float16", dict(k=K.half())),
        (ValueError, "k and v must have the same seqlen, got k 6 and v 5", dict(v=K[:5])),
        (ValueError, "multiple of the heads of k .* got q 3 and k 2", dict(q=Q[:, :3])),
        (TypeError, "cu_seqlens_q must be an int32 tensor, got int64", dict(cu_seqlens_q=torch.tensor([0, 2, 6]))),
        (TypeError, "cu_seqlens_k must be an int32 tensor, got list", dict(cu_seqlens_k=[0, 2, 6])),
        (ValueError, r"cu_seqlens_q must be 1-D with .*, got \(1, 3\)", dict(cu_seqlens_q=ends(0, 2, 6)[None])),
        (ValueError, r"cu_seqlens_k must be 1-D with .*, got \(0,\)", dict(cu_seqlens_k=ends())),
        (ValueError, r"cu_seqlens_q must be 1-D with .*, got \(\)", dict(cu_seqlens_q=ends(6)[0])),
        (ValueError, "cu_seqlens_k must be on the device of q, got meta", dict(cu_seqlens_k=ends(0, 6, device="meta"))),
        (ValueError, "cu_seqlens_q and cu_seqlens_k must have one length, got 3 and 2", dict(cu_seqlens_k=ends(0, 6))),
        (ValueError, r"cu_seqlens_q must rise from 0 to the 6 .* got \[0, 4, 3\]", dict(cu_seqlens_q=ends(0, 4, 3))),
        (ValueError, r"cu_seqlens_k must rise from 0 .* got \[0, 7, 6\]", dict(cu_seqlens_k=ends(0, 7, 6))),
        (ValueError, r"cu_seqlens_q must rise from 0 .* got \[1, 2, 6\]", dict(cu_seqlens_q=ends(1, 2, 6))),
        (ValueError, r"cu_seqlens_k must rise from 0 .* got \[0, 2, 5\]", dict(cu_seqlens_k=ends(0, 2, 5))),
        (ValueError, r"ridge must broadcast to \(total, heads\) = \(6, 4\), got .*\(6,\)", dict(ridge=torch.ones(6))),
        (ValueError, r"ridge must broadcast to .* got shape \(1, 4, 6\)", dict(ridge=torch.ones(1, 4, 6))),
        (ValueError, "ridge must be positive and finite", dict(ridge=torch.tensor([1.0, -1.0, 1.0, 1.0]))),
        (ValueError, "ridge must be positive and finite, got 0.0", dict(ridge=0)),
        (ValueError, r"scale must be a 0-dim tensor, got shape \(4,\)", dict(scale=torch.ones(4))),
        (ValueError, "window_size needs is_causal=True", dict(window_size=2, is_causal=False)),
        (ValueError, "backend must name triton, cuda, eager, got 'cudnn'", dict(backend="cudnn")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(error, message, changes):
    good = dict(q=Q, k=K, v=K, cu_seqlens_q=ends(0, 2, 6), cu_seqlens_k=ends(0, 2, 6))
    lla_attention_varlen(**good)  # a remembered call must not let a wrong argument through
    with pytest.raises(error, match=message):
        lla_attention_varlen(**good | changes)


def test_many_wrong_ends_are_cut_short():
    many = torch.arange(13, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, '...', 9, 10, 11, 12\]"):
        lla_attention_varlen(Q, K, K, many, many)


def test_ends_may_be_a_view():
    every_other = torch.tensor([0, 9, 2, 9, 6, 9], dtype=torch.int32)[::2]
    expected = lla_attention_varlen(Q, K, K, ends(0, 2, 6), ends(0, 2, 6))
    assert torch.equal(lla_attention_varlen(Q, K, K, every_other, every_other), expected)
