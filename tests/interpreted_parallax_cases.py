"""Parallax and softmax attention in Triton's interpreter; see interpreted_cases.py."""

import pytest
import torch
from parallax_problems import SHAPES, gradients, grown, make_parallax_problem
from problems import assert_close, assert_gradients_close

from lla_compile import LLASpec, backends, dispatch, parallax_attention, parallax_attention_varlen
from lla_compile.arguments import Options, dtype_name
from lla_compile.decode_arguments import heads_first
from lla_compile.devices import identify
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import parallax_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
TYPES = pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 2e-6), (torch.float16, 1e-3)], ids=["float32", "float16"]
)


def attend(*tensors, **options):
    return parallax_attention(*tensors, backend="triton", **options)


@TYPES
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_values_and_gradients(fields, dtype, limit):
    p = make_parallax_problem(dtype=dtype, **fields)
    assert_close(attend(*p.tensors, **p.options), p.reference(), limit)
    expected = p.reference_gradients()
    del expected["dscale"]
    assert_gradients_close(gradients(p, attend), expected, limit)


@pytest.mark.parametrize("scale", [-0.4, 0.0, torch.tensor(-0.4), torch.tensor(0.0)], ids=str)
def test_any_scale(scale):
    """A kernel takes positive numbers; all others come in a tensor."""
    p = make_parallax_problem(40)
    assert_close(attend(*p.tensors, scale=scale), p.reference(float(scale)), 2e-6)


def test_gradient_of_the_scale():
    p = make_parallax_problem(40)
    scale = torch.tensor(16**-0.5, requires_grad=True)
    (got,) = torch.autograd.grad(attend(*p.tensors, scale=scale), scale, p.grad_out)
    torch.testing.assert_close(got.double(), p.reference_gradients()["dscale"], rtol=1e-4, atol=1e-4)


def test_an_offset_of_the_keys_costs_no_digits():
    p = make_parallax_problem(200, dtype=torch.float16, offset=20.0, head_dim=32)
    assert_close(attend(*p.tensors), p.reference(), 5e-4)


@TYPES
@pytest.mark.parametrize("growth", [0.0, 3.0, 30.0])
def test_maxima_that_grow_along_the_keys(growth, dtype, limit):
    """Tiles that rescale follow tiles that do not, and the other way round, in some rows of a block alone."""
    p = grown(make_parallax_problem(90, dtype=dtype, offset=2.0), growth)
    q, r, k, _ = p.tensors
    run = _bound("parallax", "forward", p, KernelConfig("triton", "fused", 32, 16, None, 1, 1))
    out, probe_mean = run(p.inputs(), ("out", "probe_mean")).values()
    assert_close(out, p.reference(), limit)
    masked = (0.25 * q.double() @ k.double().mT).masked_fill(torch.ones(90, 90).triu(1) > 0, float("-inf"))
    expected = (masked.softmax(-1) * (r.double() @ k.double().mT)).sum(-1)
    assert_close(probe_mean.view_as(expected), expected, 2e-6)


@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_schedules_of_the_backward_pass(schedule):
    p = make_parallax_problem(40)
    run = _bound("parallax", "forward", p, KernelConfig("triton", "fused", 16, 32, None, 1, 1))
    inputs = dict(zip("qrkv", p.tensors)) | {"scale": 0.25}
    forward = run(inputs, ("out", "lse", "probe_mean", "value_mean"))
    config = KernelConfig("triton", schedule, 16, 32, None, 1, 1, 32, 16, 1, 1)
    backward = _bound("parallax", "backward", p, config)
    names = ("dq", "dr", "dk", "dv")
    got = backward(inputs | dict(forward) | {"grad_out": p.grad_out}, names)
    expected = p.reference_gradients()
    assert_gradients_close({name: got[name] for name in names}, {name: expected[name] for name in names}, 2e-6)
    (dv,) = backward(inputs | dict(forward) | {"grad_out": p.grad_out}, ("dv",)).values()
    assert torch.equal(dv, got["dv"])


def test_packed_sequences():
    p = make_parallax_problem(50, heads=4, kv_heads=2)
    ends = torch.tensor([0, 21, 21, 50], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in p.tensors]
    out = parallax_attention_varlen(*packed, ends, ends, backend="triton")
    for start, stop in ((0, 21), (21, 50)):
        expected = parallax_reference(*(x[:, :, start:stop] for x in p.tensors))
        assert_close(out[start:stop].transpose(0, 1)[None], expected, 2e-6)


@TYPES
def test_softmax_attention(dtype, limit):
    p = make_parallax_problem(60, heads=4, kv_heads=2, dtype=dtype)
    q, _, k, v = p.tensors
    options = Options(op="softmax", backend="triton")
    out = dispatch.run("forward", dispatch.Inputs(q, k, v, None, None), options, ("out",))["out"]
    assert_close(out, parallax_reference(q, None, k, v), limit)


@TYPES
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("queries, window, op", [(1, None, "parallax"), (3, None, "softmax"), (2, 9, "parallax")])
@pytest.mark.parametrize("page", [None, 7])
def test_decoding(splits, queries, window, op, page, dtype, limit):
    """The keys of a sequence in parts, more of them than some have tiles, and NaN wherever nothing is seen."""
    lengths = (70, 33, 0)
    p = make_parallax_problem(queries, 70, batch=3, heads=4, kv_heads=2, head_dim=24, head_dim_v=16, dtype=dtype)
    q, r, k, v = (x.clone() for x in p.tensors)
    probe = r if op == "parallax" else None
    expected = torch.cat([
        parallax_reference(
            q[i : i + 1], None if probe is None else r[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n],
            window_size=window,
        )
        for i, n in enumerate(lengths)
    ])  # fmt: skip
    for i, n in enumerate(lengths):
        k[i, :, n:] = v[i, :, n:] = float("nan")
    inputs = {"q": q, "scale": 24**-0.5, "seqlens": torch.tensor(lengths, dtype=torch.int32)}
    if probe is not None:
        inputs["r"] = r
    if page:
        order = torch.randperm(30)
        k, v = (x.reshape(3, 2, 10, page, -1).permute(0, 2, 3, 1, 4).reshape(30, page, 2, -1)[order] for x in (k, v))
        k, v = heads_first(k, True), heads_first(v, True)
        inputs["block_table"] = order.argsort().view(3, 10).int()
    spec = LLASpec(
        dtype_name(q), 24, 16, 3, 4, 2, queries, 70, window_size=window, page_size=page, op=op, phase="decode"
    )
    config = KernelConfig("triton", "fused", 16, 16, None, 1, 1, num_splits=splits)
    run = backends.get("triton").bind(_plan(spec, config))
    out = torch.full((3, 4, queries, 16), torch.nan, dtype=dtype)
    workspace = torch.full((run.workspace_numel,), torch.nan)
    assert bool(run.workspace_numel) == (splits > 1)
    assert run(inputs | {"k": k, "v": v, "out": out, "workspace": workspace}, ("out",))["out"] is out
    assert_close(out, expected, limit)


def _plan(spec: LLASpec, config: KernelConfig) -> Plan:
    return Plan(spec, identify(torch.device("cpu")), config, Source.REQUESTED, 0.0, "")


def _bound(op: str, phase: str, problem, config: KernelConfig):
    q, _, k, v = problem.tensors
    spec = LLASpec(dtype_name(q), 16, 16, 1, q.shape[1], k.shape[1], q.shape[2], k.shape[2], op=op, phase=phase)
    return backends.get("triton").bind(_plan(spec, config))
