"""Gradients through lla_attention: against numbers, for what is asked for, through what wraps autograd."""

import pytest
import torch
from fakes import FakeBackend, lookup_in
from problems import assert_gradients_close, make_grad_out, make_packed_problem, make_problem, relative_error
from torch.utils.checkpoint import checkpoint

from lla_compile import AdjointInfo, clear_cache, dispatch, lla_attention, lla_attention_varlen
from lla_compile.autograd import GRADIENTS
from lla_compile.lowering import SAVED

NAMES = ("q", "k", "v", "ridge", "scale")

pytestmark = pytest.mark.usefixtures("clean")


def leaves(ridge_shape=(), seed=3, **fields) -> dict[str, torch.Tensor]:
    """q, k, v, ridge and scale that need gradients, of a small problem in float64 unless ``fields`` say otherwise."""
    p = make_problem(**{"seqlen_q": 6, "head_dim": 3, "dtype": torch.float64} | fields)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    ridge = torch.rand(ridge_shape, generator=generator, dtype=dtype) + 0.4
    tensors = p.q, p.k, p.v, ridge, torch.tensor(0.6, dtype=dtype)
    return {name: x.requires_grad_() for name, x in zip(NAMES, tensors)}


def attend(x: dict, **options) -> torch.Tensor:
    return lla_attention(x["q"], x["k"], x["v"], x["ridge"], scale=x["scale"], **options)


def gradients(x: dict, grad_out=None, names=NAMES, **options) -> dict[str, torch.Tensor]:
    out = attend(x, **options)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    return dict(zip(names, torch.autograd.grad(out, [x[name] for name in names], grad_out)))


@pytest.fixture
def spy(monkeypatch):
    """A fake in place of the eager backend; ``spy()`` is what the last call wanted."""
    fake = FakeBackend("eager")
    monkeypatch.setattr(dispatch, "BACKENDS", {"eager": fake})
    monkeypatch.setattr(dispatch, "lookup", lookup_in())
    clear_cache()
    return lambda: fake.calls[-1][1]


def gradcheck(function, inputs) -> bool:
    """Along random directions: element by element would take thousands of calls."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "ridge_shape, fields, options",
    [
        ((), dict(), dict()),
        ((2, 1), dict(heads=2, kv_heads=1, head_dim_v=2), dict()),
        ((1, 2, 6), dict(seqlen_k=9), dict(window_size=4)),
        ((6,), dict(seqlen_k=4), dict()),
        ((2, 1, 1), dict(batch=2, heads=1, seqlen_q=4, head_dim_v=5), dict(is_causal=False)),
    ],
    ids=["number", "per head, GQA", "per query, window", "rows without keys", "per batch, not causal"],
)
def test_gradcheck(ridge_shape, fields, options):
    inputs = leaves(ridge_shape, **fields)

    def function(*tensors):
        return attend(dict(zip(NAMES, tensors)), **options)

    assert gradcheck(function, tuple(inputs.values()))


def test_gradcheck_of_every_element():
    inputs = leaves((2, 3), seqlen_q=3, head_dim=2)
    assert torch.autograd.gradcheck(lambda *x: attend(dict(zip(NAMES, x))), tuple(inputs.values()))


@pytest.mark.parametrize("ridge_shape", [(), (2,), (8, 2), (8, 1)], ids=str)
def test_gradcheck_of_packed_sequences(ridge_shape):
    p = make_packed_problem([3, 0, 1, 4], [3, 2, 0, 5], kv_heads=1, head_dim=3, head_dim_v=2, dtype=torch.float64)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (p.q, p.k, p.v))
    ridge = torch.rand(ridge_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    inputs = [x.requires_grad_() for x in (q, k, v, ridge, torch.tensor(0.6, dtype=torch.float64))]

    def function(q, k, v, ridge, scale):
        return lla_attention_varlen(q, k, v, p.cu_seqlens_q, p.cu_seqlens_k, ridge, scale=scale)

    assert gradcheck(function, inputs)


@pytest.mark.parametrize("ridge_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 1), (2, 1, 1), (2, 3, 6)], ids=str)
def test_gradients_have_the_shape_and_type_of_what_they_belong_to(shape, ridge_dtype):
    x = leaves(batch=2, heads=3, kv_heads=1, dtype=torch.bfloat16)
    x["ridge"] = torch.full(shape, 0.5, dtype=ridge_dtype, requires_grad=True)
    x["scale"] = torch.tensor(0.6, dtype=ridge_dtype, requires_grad=True)
    for name, gradient in gradients(x).items():
        assert (gradient.shape, gradient.dtype) == (x[name].shape, x[name].dtype), name
    by_row = x | {"ridge": torch.full((2, 3, 6), 0.5, requires_grad=True)}
    expected = gradients(by_row)["ridge"].sum_to_size(shape)
    torch.testing.assert_close(gradients(x)["ridge"].float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("needs", ["q", "k", "v", "ridge", "scale", "qk", "kv", "q ridge", "v scale", "qkv"])
def test_only_what_needs_a_gradient_is_computed(spy, needs):
    names = needs.split() if needs in NAMES or " " in needs else list(needs)
    x = {name: tensor.detach() for name, tensor in leaves(dtype=torch.float32).items()}
    for name in names:
        x[name].requires_grad_()
    attend(x).sum().backward()
    assert spy() == tuple("d" + name for name in NAMES if name in names)
    assert {name for name in NAMES if x[name].grad is not None} == set(names)


@pytest.mark.parametrize("alone", NAMES)
def test_a_gradient_alone_is_that_of_all(alone):
    x = leaves((2, 6))
    expected = gradients(x)
    only = {name: tensor.detach().requires_grad_(name == alone) for name, tensor in x.items()}
    assert torch.equal(gradients(only, names=(alone,))[alone], expected[alone])


def test_an_output_that_is_not_used_gives_no_gradient(spy):
    x = leaves(dtype=torch.float32)
    (attend(x) * 0 + x["q"]).detach().sum()
    out, info = attend(x, return_info=True)
    wanted = spy()
    total = info.residual.sum() + x["q"].sum()
    total.backward()
    assert spy() == wanted  # no further call
    assert x["k"].grad is None and info.adjoint.iterations is None
    assert not (info.iterations.requires_grad or info.residual.requires_grad) and out.requires_grad


def test_gradients_are_the_same_every_time():
    x = leaves((2, 50), seqlen_q=50, head_dim=16, dtype=torch.bfloat16)
    first, second = gradients(x), gradients(x)
    out = attend(x)
    third = [torch.autograd.grad(out.sum(), tuple(x.values()), retain_graph=True) for _ in range(2)]
    for name, a, b in zip(NAMES, *third):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], a) and torch.equal(a, b)


def test_strides_do_not_matter():
    x = leaves(seqlen_q=20, head_dim=8)
    expected = gradients(x)  # grad_out is dense here, and expanded from one number below
    torch.testing.assert_close(torch.autograd.grad(attend(x).sum(), list(x.values())), tuple(expected.values()))
    strided = dict(x)
    strided["q"] = x["q"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided["k"] = x["k"].detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    strided["v"] = torch.stack([x["v"].detach()] * 2, -1)[..., 0].requires_grad_()
    grad_out = torch.ones(1, 2, 8, 20, dtype=torch.float64).transpose(2, 3)
    for name, gradient in gradients(strided, grad_out).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_part_of_a_tensor(name):
    """The gradient of a view is scattered into what it is a view of."""
    x = leaves()
    wide = torch.cat([x[name].detach()] * 2, -1).requires_grad_()
    narrowed = x | {name: wide[..., : x[name].shape[-1]]}
    attend(narrowed).sum().backward()
    half = wide.shape[-1] // 2
    torch.testing.assert_close(wide.grad[..., :half], gradients(x)[name])
    assert wide.grad[..., half:].eq(0).all()


def test_one_tensor_as_query_key_and_value():
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert gradcheck(lambda x: lla_attention(x, x, x, 0.5), x)


def test_without_gradients():
    x = leaves()
    expected = attend(x).detach()
    with torch.no_grad():
        assert not attend(x).requires_grad
    with torch.inference_mode():
        out, info = attend(x, return_info=True)
        assert out.is_inference() and torch.equal(out, expected) and info.adjoint is None
    assert attend({name: tensor.detach() for name, tensor in x.items()}, return_info=True)[1].adjoint is None


def test_the_adjoint_solve_is_reported_after_the_backward_pass():
    x = leaves(seqlen_q=20, head_dim=8, dtype=torch.float32)
    out, info = attend(x, return_info=True, cg_max_iters=3)
    adjoint = info.adjoint
    assert isinstance(adjoint, AdjointInfo) and adjoint.iterations is None and adjoint.residual is None
    assert repr(adjoint) == "AdjointInfo(iterations=None, residual=None)"
    out.sum().backward()
    assert adjoint.iterations.shape == adjoint.residual.shape == (1, 2, 20)
    assert adjoint.iterations.dtype == torch.int32 and adjoint.iterations.max() == 3
    assert 0 < adjoint.residual.max() < 1 and "AdjointInfo(iterations=tensor(" in repr(adjoint)


def test_nothing_of_the_size_of_the_scores_is_saved():
    def saved_elements(seqlen):
        x = leaves((2, seqlen), seqlen_q=seqlen, head_dim=16, dtype=torch.bfloat16)
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attend(x, cg_max_iters=2)
        return sum(saved)

    small, large = saved_elements(64), saved_elements(128)
    rows = 2 * 128
    # Query, key and value; kbar; the probe in two terms; ridge, lse, the probe's norm and mean; the scale.
    assert large == rows * 16 * (3 + 1 + 2) + rows * 4 + 1
    assert large - 1 == 2 * (small - 1)


def test_what_the_backward_pass_needs_must_not_be_overwritten():
    x = leaves()
    v = x["v"] * 1
    out = attend(x | {"v": v})
    v.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_gradients_are_refused():
    x = leaves()
    (dq,) = torch.autograd.grad(attend(x).pow(2).sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_functional_gradients():
    x = leaves((2, 6))
    expected = gradients(x)
    plain = tuple(tensor.detach() for tensor in x.values())

    def total(*tensors):
        return attend(dict(zip(NAMES, tensors))).sum()

    for name, got in zip(NAMES, torch.func.grad(total, argnums=tuple(range(5)))(*plain)):
        torch.testing.assert_close(got, expected[name], msg=name)
    out, pull = torch.func.vjp(lambda q: lla_attention(q, *plain[1:4], scale=plain[4]), plain[0])
    torch.testing.assert_close(pull(torch.ones_like(out))[0], expected["q"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x = leaves((2, 6))
    expected = gradients(x)

    def layer(*tensors):
        return attend(dict(zip(NAMES, tensors)))

    checkpoint(layer, *x.values(), use_reentrant=use_reentrant).sum().backward()
    for name, tensor in x.items():
        assert torch.equal(tensor.grad, expected[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed):
    x = leaves((2, 20) if not packed else (20, 2), seqlen_q=20, head_dim=8, dtype=torch.float32)
    seen = []

    def call(x, **options):
        if not packed:
            return attend(x, **options)
        ends = torch.tensor([0, 12, 20], dtype=torch.int32)
        q, k, v = (x[name][0].transpose(0, 1) for name in ("q", "k", "v"))
        return lla_attention_varlen(q, k, v, ends, ends, x["ridge"], scale=x["scale"], **options)

    original = dispatch.run

    def record(phase, inputs, *rest):
        seen.append((phase, inputs.q.dtype, inputs.ridge.dtype, inputs.scale.dtype))
        return original(phase, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "run", record)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert seen == [(phase, torch.bfloat16, torch.float32, torch.float32) for phase in ("forward", "backward")]
    low = {name: y.detach().bfloat16() if name in "qkv" else y.detach() for name, y in x.items()}
    for y in low.values():
        y.requires_grad_()
    expected = call(low)
    assert torch.equal(out, expected)
    expected.float().sum().backward()
    for name, y in x.items():
        assert y.grad.dtype == torch.float32 and torch.equal(y.grad, low[name].grad.float()), name


def test_autocast_leaves_float64_alone_and_can_be_left():
    x = leaves()
    expected = gradients(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(x)
        assert out.dtype == torch.float64
        got = torch.autograd.grad(out.sum(), list(x.values()))  # the backward pass inside of it too
    for name, gradient in zip(NAMES, got):
        torch.testing.assert_close(gradient, expected[name])
    half = {name: y.detach().to(torch.float16) if name in "qkv" else y.detach() for name, y in x.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(half).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert attend(half).dtype == torch.float16


@pytest.mark.parametrize("factor", [2.0**-10, 1.0, 2.0**8, 2.0**12])
def test_a_scaled_loss_scales_the_gradients(factor):
    """It grows until gradients overflow: the weights on the way to them, which saturate, must not be first."""
    p = make_problem(seqlen_q=40, head_dim=16, dtype=torch.float16, ridge=0.5)
    x = dict(zip(NAMES, (p.q, p.k, p.v, torch.tensor(0.5), torch.tensor(0.25))))
    for tensor in x.values():
        tensor.requires_grad_()
    grad_out = factor * make_grad_out(p)
    got = gradients(x, grad_out)
    expected = p.reference_gradients(grad_out)
    for name in ("q", "k", "v"):
        assert relative_error(got[name], expected["d" + name]) < 5e-3, name
    torch.testing.assert_close(got["ridge"].double(), expected["dridge"].sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_is_not_hidden(dtype, value):
    x = leaves(dtype=dtype)
    grad_out = torch.ones(1, 2, 6, 3, dtype=dtype)
    grad_out[0, 1, 4, 2] = value
    for name, gradient in gradients(x, grad_out).items():
        assert not gradient.isfinite().all(), name


def test_gradients_that_overflow_are_seen():
    """What a loss scaler waits for, to make the scale smaller."""
    x = leaves(seqlen_q=12, head_dim=8, dtype=torch.float16)
    x["v"] = (200 * x["v"].detach()).requires_grad_()
    grad_out = torch.full((1, 2, 12, 8), 6e4, dtype=torch.float16)
    got = gradients(x, grad_out)
    assert got["q"].isinf().any() and not got["q"].isnan().any()


@pytest.mark.parametrize("names", [(), ("lse",), ("unit_probe", "kbar")])
def test_the_forward_pass_can_be_asked_for_what_it_saves(names):
    """``forward_train`` and eager calls ask for all of it; each part is there alone."""
    p = make_problem(seqlen_q=9, head_dim=4)
    options = dispatch.Options()
    inputs = dispatch.Inputs(p.q, p.k, p.v, 1.0, None)
    everything = dispatch.run("forward", inputs, options, ("out", *SAVED))
    for name, value in dispatch.run("forward", inputs, options, names).items():
        assert torch.equal(value, everything[name])


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_reference(dtype, precision):
    p = make_problem(heads=4, kv_heads=2, seqlen_q=30, seqlen_k=37, head_dim=16, dtype=dtype, ridge=1.0, window_size=25)
    x = dict(zip(NAMES, (p.q, p.k, p.v, torch.ones(4, 30), torch.tensor(0.25))))
    for tensor in x.values():
        tensor.requires_grad_()
    grad_out = make_grad_out(p)
    got = gradients(x, grad_out, window_size=25, precision=precision)
    got = {"d" + name: gradient for name, gradient in got.items()}
    expected = p.reference_gradients(grad_out)
    expected["dridge"] = expected["dridge"].sum(0)
    limit = 2e-5 if (dtype, precision) == (torch.float32, "accurate") else 5e-3 if precision == "accurate" else 3e-2
    assert_gradients_close({name: got[name] for name in GRADIENTS[:4]}, expected, limit)


def test_empty_tensors():
    for shape_q, shape_k in (((0, 2, 5, 4), (0, 2, 5, 4)), ((1, 2, 0, 4), (1, 2, 5, 4)), ((1, 2, 5, 4), (1, 2, 0, 4))):
        for dtype in (torch.float32, torch.float16):
            q = torch.randn(shape_q, dtype=dtype, requires_grad=True)
            k, v = (torch.randn(shape_k, dtype=dtype, requires_grad=True) for _ in range(2))
            ridge = torch.tensor(1.0, requires_grad=True)
            out, info = lla_attention(q, k, v, ridge, return_info=True)
            out.sum().backward()
            assert all(x.grad.eq(0).all() and x.grad.shape == x.shape for x in (q, k, v, ridge))
            assert info.adjoint.iterations.shape == shape_q[:3]


def test_meta_tensors():
    q, k, v = (torch.empty(2, 4, 8, 16, device="meta", requires_grad=True) for _ in range(3))
    lla_attention(q, k, v).sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.is_meta for x in (q, k, v))
