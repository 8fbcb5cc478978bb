"""Parallax and softmax attention on the eager backend: values, gradients, arguments, what wraps autograd, decoding."""

import pytest
import torch
from parallax_problems import SHAPES, gradients, make_parallax_problem
from problems import assert_close, assert_gradients_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from lla_compile import (
    KVCache,
    LLASpec,
    clear_cache,
    dispatch,
    parallax_attention,
    parallax_attention_varlen,
    parallax_decode,
    parallax_decode_workspace,
    plan,
)
from lla_compile.arguments import Options
from lla_compile.lowering import lower
from lla_compile.reference import lla_reference, parallax_reference, parallax_reference_backward

pytestmark = pytest.mark.usefixtures("clean")


def softmax_attention(q, k, v, backend="eager", **mask):
    options = Options(op="softmax", backend=backend, **mask)
    return dispatch.run("forward", dispatch.Inputs(q, k, v, None, None), options, ("out",))["out"]


class TestReference:
    def test_it_is_local_linear_attention_with_its_own_probe(self):
        """With r the solution u of LLA's system, both give the same."""
        p = make_parallax_problem(6, head_dim=4, dtype=torch.float64, is_causal=False)
        q, _, k, v = p.tensors
        weights = (q @ k.mT / 2).softmax(-1)
        mean = weights @ k
        offsets = k.unsqueeze(2) - mean.unsqueeze(3)
        covariance = (weights.unsqueeze(-1) * offsets).mT @ offsets
        u = torch.linalg.solve(covariance + 0.3 * torch.eye(4), (mean - q).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(
            parallax_reference(q, u, k, v, is_causal=False), lla_reference(q, k, v, 0.3, is_causal=False)
        )

    @pytest.mark.parametrize("fields", SHAPES, ids=str)
    def test_closed_gradients_are_those_of_autograd(self, fields):
        p = make_parallax_problem(dtype=torch.float64, **fields)
        scale, leaves = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), p.leaves()
        out = parallax_reference(*leaves, scale=scale, **p.options)
        expected = torch.autograd.grad(out, [*leaves, scale], p.grad_out)
        closed = parallax_reference_backward(p.grad_out, *p.tensors, scale=0.7, **p.options)
        for x, y in zip(closed.values(), expected):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("fields", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str)
def test_values_and_gradients(fields, dtype, limit):
    p = make_parallax_problem(dtype=dtype, **fields)
    assert_close(parallax_attention(*p.tensors, **p.options), p.reference(), limit)
    expected = p.reference_gradients()
    del expected["dscale"]
    assert_gradients_close(gradients(p, parallax_attention), expected, limit)


@pytest.mark.parametrize("blocks", [(8, 8), (16, 64), (128, 8)], ids=str)
def test_running_means_meet_across_tiles(blocks, monkeypatch):
    from lla_compile.plans import KernelConfig

    p = make_parallax_problem(50, dtype=torch.float64, offset=30.0)
    config = KernelConfig("eager", "fused", *blocks)
    monkeypatch.setattr(dispatch.BACKENDS["eager"].__class__, "default_config", lambda *_: config)
    assert_close(parallax_attention(*p.tensors), p.reference(), 1e-12)


def test_an_offset_of_the_keys_costs_no_digits():
    """a_j is relative to its mean before it is rounded; weights P r.k would have thirty times the error."""
    p = make_parallax_problem(300, dtype=torch.bfloat16, offset=30.0, head_dim=32)
    assert_close(parallax_attention(*p.tensors), p.reference(), 2.5e-3)


def test_gradcheck():
    p = make_parallax_problem(5, 7, heads=2, kv_heads=1, head_dim=3, head_dim_v=2, dtype=torch.float64)
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: parallax_attention(*x[:4], scale=x[4]), (*p.leaves(), scale))


def test_a_probe_of_zero_is_softmax_attention():
    p = make_parallax_problem(40, probe=0.0)
    q, r, k, v = p.tensors
    softmax = softmax_attention(q, k, v)
    assert torch.equal(parallax_attention(q, r, k, v), softmax)
    torch.testing.assert_close(softmax, scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("fields", SHAPES[:2], ids=str)
def test_softmax_gradients(fields):
    p = make_parallax_problem(**fields)
    q, _, k, v = (x.clone().requires_grad_() for x in p.tensors)
    from lla_compile import call

    options = Options(op="softmax", **p.options)
    out, _, _ = call.attend(dispatch.Inputs(q, k, v, None, None), options)
    got = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), p.grad_out)))
    expected = parallax_reference_backward(p.grad_out, p.tensors[0], None, *p.tensors[2:], **p.options)
    del expected["dscale"]
    assert_gradients_close(got, expected, 2e-6)


@pytest.mark.parametrize("scale", [-0.4, 0.0, torch.tensor(-0.4)], ids=str)
def test_any_scale(scale):
    p = make_parallax_problem(20)
    assert_close(parallax_attention(*p.tensors, scale=scale), p.reference(float(scale)), 2e-6)


def test_packed_sequences():
    p = make_parallax_problem(12, heads=4, kv_heads=2)
    ends = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = [x[0].transpose(0, 1).clone().requires_grad_() for x in p.tensors]
    out = parallax_attention_varlen(*packed, ends, ends)
    assert out.shape == (12, 4, 16)
    grads = torch.autograd.grad(out, packed, p.grad_out[0].transpose(0, 1))
    for start, stop in ((0, 5), (5, 12)):
        alone = [x[:, :, start:stop].clone().requires_grad_() for x in p.tensors]
        expected = parallax_attention(*alone)
        torch.testing.assert_close(out[start:stop], expected[0].transpose(0, 1))
        each = torch.autograd.grad(expected, alone, p.grad_out[:, :, start:stop])
        for x, y in zip(grads, each):
            torch.testing.assert_close(x[start:stop], y[0].transpose(0, 1))


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "r must be a torch.Tensor, got NoneType", dict(r=None)),
        (TypeError, "r must have the dtype of q, float32, got float64", dict(r=torch.zeros(1, 2, 8, 4).double())),
        (ValueError, r"r must have the shape of q, \(1, 2, 8, 4\), got \(1, 2, 8, 3\)", dict(r=torch.zeros(1, 2, 8, 3))),
        (ValueError, "r must be on the device of q", dict(r=torch.zeros(1, 2, 8, 4, device="meta"))),
        (NotImplementedError, "r must be a dense tensor", dict(r=torch.zeros(1, 2, 8, 4).to_sparse())),
        (ValueError, "k and v must have the same seqlen", dict(v=torch.zeros(1, 2, 9, 4))),
        (ValueError, "precision must be one of", dict(precision="exact")),
        (ValueError, "window_size needs is_causal=True", dict(window_size=3, is_causal=False)),
        (TypeError, "scale must be None, a number or a 0-dim tensor", dict(scale="1")),
        (ValueError, "scale must be finite", dict(scale=float("nan"))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(error, message, changes):
    good = dict(zip("qrkv", torch.zeros(4, 1, 2, 8, 4)))
    parallax_attention(**good)  # a remembered call must not let a wrong argument through
    for _ in range(2):
        with pytest.raises(error, match=message):
            parallax_attention(**good | changes)


def test_a_spec_that_solves_nothing_has_no_solver_settings():
    spec = LLASpec.self_attention("bfloat16", 64, 256, 8, op="parallax")
    assert (spec.solves, spec.terms, spec.cg_tol) == (False, 1, None)
    for setting in (dict(cg_tol=0.1), dict(cg_max_iters=3)):
        with pytest.raises(ValueError, match="is for op lla, which solves for its probe"):
            LLASpec.self_attention("bfloat16", 64, 256, 8, op="parallax", **setting)


@pytest.mark.parametrize("phase, line", [("forward", "attend 4"), ("backward", "grad_q 5, grad_kv 6"), ("decode", "attend 4")])
def test_a_plan_says_nothing_of_cg(phase, line):
    q = torch.zeros(1, 2, 1 if phase == "decode" else 32, 8)
    text = str(plan(q, torch.zeros(1, 2, 32, 8), torch.zeros(1, 2, 32, 8), op="parallax", phase=phase))
    assert f"sweeps   {line}: tile products" in text and "CG" not in text and "cg" not in text


def test_products_of_softmax_attention():
    assert [sweep.products for phase in ("forward", "backward") for sweep in lower("softmax", phase).sweeps] == [2, 3, 4]


class TestOperators:
    def test_opcheck(self):
        tensors = make_parallax_problem(12, heads=2, kv_heads=1, head_dim=8, head_dim_v=5).leaves()
        ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        for numbers in ((None, None, None, None), (None, torch.tensor(0.3, requires_grad=True), ends, ends)):
            args = (*tensors, *numbers, True, None, "accurate", None)
            torch.library.opcheck(torch.ops.lla_compile.parallax_forward_train.default, args)
        with torch.no_grad():
            torch.library.opcheck(torch.ops.lla_compile.parallax_forward.default, args)

    @pytest.mark.parametrize("op", ["parallax", "softmax"])
    def test_opcheck_of_the_backward_pass(self, op):
        q, r, k, v = make_parallax_problem(12, head_dim=8).tensors
        tensors = (q, r, k, v) if op == "parallax" else (q, k, v)
        args = (*tensors, None, None, None, None, True, None, "accurate", None)
        out, *saved = getattr(torch.ops.lla_compile, f"{op}_forward_train")(*args)
        function = getattr(torch.ops.lla_compile, f"{op}_backward").default
        torch.library.opcheck(function, (*args, torch.randn_like(out), out, *saved, ["dq", "dk"]))

    def test_opcheck_of_decoding(self):
        q, r, k, v = make_parallax_problem(2, 20, heads=4, kv_heads=2, head_dim=8).tensors
        args = (q, r, k, v, 0.3, None, torch.tensor([11], dtype=torch.int32), None, None, "fast", None)
        torch.library.opcheck(torch.ops.lla_compile.parallax_decode.default, args)

    def test_compiles_without_a_graph_break(self):
        p = make_parallax_problem(12, head_dim=8)
        compiled = torch.compile(lambda *x: parallax_attention(*x, window_size=5) * 2, fullgraph=True, backend="aot_eager")
        leaves, again = p.leaves(), p.leaves()
        torch.testing.assert_close(compiled(*leaves), parallax_attention(*again, window_size=5) * 2)
        got = torch.autograd.grad(compiled(*leaves), leaves, p.grad_out)
        expected = torch.autograd.grad(parallax_attention(*again, window_size=5) * 2, again, p.grad_out)
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y)

    def test_decoding_compiles_without_a_graph_break(self):
        q, r, k, v = make_parallax_problem(2, 20, head_dim=8).tensors
        compiled = torch.compile(parallax_decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, r, k, v), parallax_decode(q, r, k, v))

    def test_fake_tensors(self):
        with FakeTensorMode():
            q, r, k, v = torch.empty(4, 2, 4, 16, 8, dtype=torch.bfloat16).unbind()
            assert parallax_attention(q, r, k[:, :2], v[:, :2]).shape == (2, 4, 16, 8)

    def test_autocast(self):
        tensors = make_parallax_problem(8).tensors
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert parallax_attention(*tensors).dtype == torch.bfloat16


class TestDecoding:
    @pytest.mark.parametrize("queries, window", [(1, None), (3, None), (2, 9)])
    @pytest.mark.parametrize("paged", [False, True])
    def test_it_is_the_last_rows(self, queries, window, paged):
        lengths = (40, 17, 0)
        p = make_parallax_problem(40, batch=3, heads=4, kv_heads=2)
        q, r, k, v = (x.clone() for x in p.tensors)
        rows, expected = {"q": [], "r": []}, []
        for i, length in enumerate(lengths):
            row = slice(max(length, queries) - queries, max(length, queries))
            rows["q"].append(q[i, :, row])
            rows["r"].append(r[i, :, row])
            tensors = (q[i : i + 1, :, row], r[i : i + 1, :, row], k[i : i + 1, :, :length], v[i : i + 1, :, :length])
            expected.append(parallax_reference(*tensors, window_size=window))
            k[i, :, length:] = v[i, :, length:] = float("nan")
        options = dict(seqlens=torch.tensor(lengths, dtype=torch.int32), window_size=window)
        if paged:
            k, v = (x.reshape(3, 2, 5, 8, 16).permute(0, 2, 3, 1, 4).reshape(15, 8, 2, 16) for x in (k, v))
            order = torch.randperm(15)
            k, v = k[order], v[order]
            options["block_table"] = order.argsort().view(3, 5).int()
        out = parallax_decode(torch.stack(rows["q"]), torch.stack(rows["r"]), k, v, **options)
        torch.testing.assert_close(out, torch.cat(expected).float(), atol=1e-5, rtol=1e-5)

    def test_out_workspace_and_a_cache(self):
        cache = KVCache(1, 2, capacity=32, head_dim=8, page_size=8, dtype=torch.float32)
        q, r, k, v = make_parallax_problem(20, head_dim=8).tensors
        cache.append(k, v)
        last = (q[:, :, -1:], r[:, :, -1:])
        out = torch.empty_like(last[0])
        workspace = parallax_decode_workspace(last[0], cache.k, cache.v, block_table=cache.block_table)
        options = dict(seqlens=cache.seqlens, block_table=cache.block_table, out=out, workspace=workspace)
        assert parallax_decode(*last, cache.k, cache.v, **options) is out
        torch.testing.assert_close(out, parallax_attention(q, r, k, v)[:, :, -1:])

    def test_it_refuses_gradients_and_wrong_probes(self):
        q, r, k, v = make_parallax_problem(1, 8).tensors
        with pytest.raises(NotImplementedError, match="parallax_decode has no gradient, but r requires one"):
            parallax_decode(q, r.requires_grad_(), k, v)
        with pytest.raises(ValueError, match="r must have the shape of q"):
            parallax_decode(q, r.detach()[..., :3], k, v)


def test_a_miss_names_the_command_that_tunes_it(caplog):
    clear_cache()
    with caplog.at_level("INFO", logger="lla_compile"):
        parallax_attention(*make_parallax_problem(9).tensors)
    assert "python -m lla_compile.tune --gpu cpu --op parallax --phase forward --dtype float32" in caplog.text
