"""Parallax and softmax attention in Triton's interpreter; see interpreted_cases.py."""

import pytest
import torch
from parallax_decode_problems import CASES, make_parallax_decode_problem
from parallax_problems import SHAPES, gradients, grown, make_parallax_problem
from problems import assert_close, assert_gradients_close

from lla_compile import LLASpec, backends, dispatch, parallax_attention, parallax_attention_varlen
from lla_compile.arguments import Options, dtype_name
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
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decoding(fields, splits, dtype, limit):
    """Keys in parts, more of them than some sequences have tiles; test_cuda_decode_parts.py has the same cases."""
    p = make_parallax_decode_problem(dtype=dtype, **fields)
    tiles = dict(block_q=16, block_k=16, num_warps=1, num_stages=1)
    p.assert_decoded("triton", identify(torch.device("cpu")), limit, num_splits=splits, **tiles)


def _plan(spec: LLASpec, config: KernelConfig) -> Plan:
    return Plan(spec, identify(torch.device("cpu")), config, Source.REQUESTED, 0.0, "")


def _bound(op: str, phase: str, problem, config: KernelConfig):
    q, _, k, v = problem.tensors
    spec = LLASpec(dtype_name(q), 16, 16, 1, q.shape[1], k.shape[1], q.shape[2], k.shape[2], op=op, phase=phase)
    return backends.get("triton").bind(_plan(spec, config))
