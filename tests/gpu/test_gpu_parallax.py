"""Parallax on the GPU: errors against float64, shapes and masks, repeatability, CUDA graphs, fla beside it."""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from on_gpu import gpu_parallax_problem, poison_free_memory, skip_unless_supported
from parallax_problems import (
    GRADIENTS,
    SHAPES,
    bound,
    bound_backward,
    gradients,
    grown,
    make_packed_parallax_problem,
    run_forward,
)
from problems import assert_close, assert_gradients_close, relative_error

from lla_compile import backends, dispatch, parallax_attention, parallax_attention_varlen
from lla_compile.arguments import Options
from lla_compile.autograd import trained
from lla_compile.devices import identify
from lla_compile.reference import parallax_reference

PACKED = [
    dict(lengths_q=(70, 0, 33), head_dim=40, head_dim_v=24, kv_heads=1),
    dict(lengths_q=(300, 5, 0, 177), lengths_k=(333, 0, 9, 177), head_dim=64, window_size=100),
    dict(lengths_q=(600, 129, 1, 1000), heads=4, kv_heads=2, head_dim=128),
    dict(lengths_q=(200, 40), lengths_k=(161, 500), head_dim=96, head_dim_v=64, is_causal=False),
    dict(lengths_q=(40, 7) * 60, head_dim=64),
]
OUT_LIMIT, GRADIENT_LIMIT = 2.5e-3, 5e-3
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"])
LARGER = [
    dict(seqlen_q=1000, heads=6, kv_heads=2, head_dim=96),
    dict(seqlen_q=1024, heads=4, head_dim=128),
    dict(seqlen_q=777, head_dim=64, window_size=100),
    dict(seqlen_q=300, seqlen_k=777, head_dim=64, head_dim_v=128),
    dict(seqlen_q=333, head_dim=256, is_causal=False),
    dict(seqlen_q=65, head_dim=1, head_dim_v=40),
]


def packed(*lengths, **fields):
    return make_packed_parallax_problem(*lengths, **dict(dtype=torch.bfloat16, device="cuda") | fields)


def attend(*tensors, backend="triton", **options):
    return parallax_attention(*tensors, backend=backend, **options)


def attend_on(backend, p):
    """:func:`attend` with the passes of a backend, where it takes the forward pass; it may leave the backward pass to
    another."""
    skip_unless_supported(backend, p.spec())
    return partial(attend, backend=backend)


def gradients_of(backend, p, op="parallax", names=GRADIENTS):
    """After Triton's forward pass; a test of what the backend does not take is skipped with its reason."""
    skip_unless_supported(backend, p.spec(op, "backward"))
    return bound_backward(p, backend, identify("cuda"), "triton", op)(*names)


@BACKENDS
@pytest.mark.parametrize("fields", SHAPES + LARGER, ids=str)
def test_values_and_gradients(fields, backend):
    p = gpu_parallax_problem(**fields)
    attend = attend_on(backend, p)
    poison_free_memory()
    assert_close(attend(*p.tensors, **p.options), p.reference(), OUT_LIMIT)
    expected = p.reference_gradients()
    del expected["dscale"]
    assert_gradients_close(gradients(p, attend), expected, GRADIENT_LIMIT)


@BACKENDS
@pytest.mark.parametrize("fields", SHAPES + LARGER, ids=str)
def test_gradients_after_another_forward_pass(fields, backend):
    p = gpu_parallax_problem(**fields)
    poison_free_memory()
    expected = p.reference_gradients()
    del expected["dscale"]
    assert_gradients_close(gradients_of(backend, p), expected, GRADIENT_LIMIT)


@BACKENDS
def test_gradient_of_the_scale(backend):
    p = gpu_parallax_problem(seqlen_q=300, head_dim=64)
    got = gradients_of(backend, p, names=("dscale",))["dscale"]
    assert relative_error(got, p.reference_row_dscale()) <= GRADIENT_LIMIT


@BACKENDS
@pytest.mark.parametrize("wanted", [("dv",), ("dk",), ("dq", "dv"), ("dr", "dk")], ids=str)
def test_some_gradients(wanted, backend):
    p = gpu_parallax_problem(seqlen_q=300, head_dim=64)
    together, alone = gradients_of(backend, p), gradients_of(backend, p, names=wanted)
    assert all(torch.equal(alone[name], together[name]) for name in wanted)


@BACKENDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_softmax_attention(head_dim, backend):
    p = gpu_parallax_problem(seqlen_q=700, heads=4, kv_heads=2, head_dim=head_dim)
    q, _, k, v = (x.double().requires_grad_() for x in p.tensors)
    out = parallax_reference(q, None, k, v)
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), p.grad_out.double())))
    assert_gradients_close(gradients_of(backend, p, "softmax", tuple(expected)), expected, GRADIENT_LIMIT)


@BACKENDS
@pytest.mark.parametrize("op", ["parallax", "softmax"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tile_of_the_backward_pass(head_dim, op, backend):
    p, device = gpu_parallax_problem(seqlen_q=500, heads=4, kv_heads=2, head_dim=head_dim), identify("cuda")
    names = GRADIENTS if op == "parallax" else ("dq", "dk", "dv")
    expected, spec = gradients_of(backend, p, op, names), p.spec(op, "backward")
    for config in backends.get(backend).alternatives(spec, device):
        knobs = {name: value for name, value in config.as_dict().items() if name != "backend"}
        got = bound_backward(p, backend, device, "triton", op, **knobs)(*names)
        for name in names:
            assert relative_error(got[name], expected[name].double()) < GRADIENT_LIMIT, (name, config.describe())


@BACKENDS
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.float32, 1e-5)], ids=str)
def test_other_types(dtype, limit, backend):
    p = gpu_parallax_problem(seqlen_q=500, head_dim=64, dtype=dtype)
    attend = attend_on(backend, p)
    assert_close(attend(*p.tensors), p.reference(), limit)
    expected = p.reference_gradients()
    del expected["dscale"]
    assert_gradients_close(gradients(p, attend), expected, 5 * limit)


@BACKENDS
@pytest.mark.parametrize("fields", [dict(offset=20.0), dict(offset=2.0, growth=8.0)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_offsets_and_growth_of_the_keys_cost_no_digits(head_dim, fields, backend):
    level = gpu_parallax_problem(seqlen_q=1024, head_dim=head_dim, offset=fields["offset"])
    p = grown(level, fields.get("growth", 0.0))
    assert_close(attend_on(backend, p)(*p.tensors), p.reference(), OUT_LIMIT)


@BACKENDS
@pytest.mark.parametrize("op", ["parallax", "softmax"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tile_and_what_it_saves(head_dim, op, backend):
    p, device = gpu_parallax_problem(seqlen_q=500, heads=4, kv_heads=2, head_dim=head_dim), identify("cuda")
    attend_on(backend, p)
    executor, spec = backends.get(backend), p.spec(op)
    double = replace(p, tensors=tuple(x.double() for x in p.tensors))
    expected = run_forward(double, trained(op), "eager", device, op)
    for config in (executor.default_config(spec, device), *executor.alternatives(spec, device)):
        knobs = {name: value for name, value in config.as_dict().items() if name != "backend"}
        got = run_forward(p, trained(op), backend, device, op, **knobs)
        for name in expected:
            assert relative_error(got[name], expected[name]) < OUT_LIMIT, (name, config.describe())


@BACKENDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_are_the_same_bit_for_bit(head_dim, backend):
    p = gpu_parallax_problem(seqlen_q=700, heads=4, kv_heads=2, head_dim=head_dim)
    attend = attend_on(backend, p)
    first, second = (gradients(p, attend) | {"out": attend(*p.tensors)} for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in (*GRADIENTS, "out"))


@BACKENDS
def test_a_probe_of_zero_is_softmax_attention(backend):
    p = gpu_parallax_problem(seqlen_q=500, head_dim=64, probe=0.0)
    attend = attend_on(backend, p)
    q, r, k, v = p.tensors
    options = Options(op="softmax", backend=backend)
    softmax = dispatch.run("forward", dispatch.Inputs(q, k, v, None, None), options, ("out",))["out"]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert relative_error(softmax, expected.double()) < 4e-3
    assert relative_error(attend(q, r, k, v), softmax.double()) < 2e-3


@BACKENDS
def test_packed_sequences(backend):
    p = gpu_parallax_problem(seqlen_q=600, heads=4, kv_heads=2, head_dim=64)
    attend_on(backend, p)
    ends = torch.tensor([0, 177, 177, 600], dtype=torch.int32, device="cuda")
    packed = [x[0].transpose(0, 1).clone().requires_grad_() for x in p.tensors]
    out = parallax_attention_varlen(*packed, ends, ends, backend=backend)
    grads = torch.autograd.grad(out, packed, p.grad_out[0].transpose(0, 1))
    for start, stop in ((0, 177), (177, 600)):
        alone = [x[:, :, start:stop].double().requires_grad_() for x in p.tensors]
        expected = parallax_reference(*alone)
        assert_close(out[start:stop].transpose(0, 1)[None], expected, OUT_LIMIT)
        for x, y in zip(grads, torch.autograd.grad(expected, alone, p.grad_out[:, :, start:stop].double())):
            assert_close(x[start:stop].transpose(0, 1)[None], y, GRADIENT_LIMIT)


@BACKENDS
@pytest.mark.parametrize("fields", PACKED, ids=["narrow", "windowed", "wide", "full", "many"])
def test_gradients_of_packed_sequences(fields, backend):
    p = packed(**fields)
    poison_free_memory()
    expected = p.reference_gradients() | {"dscale": p.reference_row_dscale()}
    assert_gradients_close(gradients_of(backend, p, names=tuple(expected)), expected, GRADIENT_LIMIT)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_packed_sequences_are_those_of_each_alone(head_dim):
    """Bit for bit, from what the same forward pass has saved."""
    p, device = packed((300, 129, 0, 1, 700), heads=4, kv_heads=2, head_dim=head_dim), identify("cuda")
    skip_unless_supported("cuda", p.spec("parallax", "backward"))
    run = bound_backward(p, "cuda", device, "triton")
    together, of_keys = run(*GRADIENTS), ("k", "v", "dk", "dv")
    for alone, rows, keys in p.sequences():
        parts = {
            name: x[:, :, keys if name in of_keys else rows].contiguous()
            for name, x in run.inputs.items()
            if isinstance(x, torch.Tensor) and not name.startswith("cu_seqlens")
        }
        expected = bound(alone, "cuda", device, phase="backward")(run.inputs | parts, GRADIENTS)
        for name in GRADIENTS:
            assert torch.equal(together[name][:, :, keys if name in of_keys else rows], expected[name]), name


@BACKENDS
def test_a_cuda_graph_follows_the_lengths_of_packed_sequences(backend):
    p, other = packed((300, 100, 112), head_dim=64), packed((5, 250, 257), head_dim=64)
    attend_on(backend, p)
    leaves = [x[0].transpose(0, 1).clone().requires_grad_() for x in p.tensors]
    ends, grad_out = p.cu_seqlens[0].clone(), p.grad_out[0].transpose(0, 1)

    def step():
        out = parallax_attention_varlen(*leaves, ends, ends, backend=backend)
        return torch.autograd.grad(out, leaves, grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ends.copy_(other.cu_seqlens[0])
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step()))


@BACKENDS
def test_training_in_a_cuda_graph(backend):
    p = gpu_parallax_problem(seqlen_q=300, head_dim=64)
    leaves, attend = p.leaves(), attend_on(backend, p)

    def step():
        return torch.autograd.grad(attend(*leaves), leaves, p.grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step()))


@BACKENDS
def test_compiled_code(backend):
    p = gpu_parallax_problem(seqlen_q=200, head_dim=64)
    attend = attend_on(backend, p)
    compiled = torch.compile(lambda *x: attend(*x) * 2, fullgraph=True)
    leaves = p.leaves()
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves), leaves, p.grad_out),
        torch.autograd.grad(attend(*leaves) * 2, leaves, p.grad_out),
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
@BACKENDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_errors_are_no_larger_than_those_of_flash_linear_attention(head_dim, backend):
    """A few per cent are the luck of the rounding."""
    from fla.ops.parallax import parallel_parallax

    p = gpu_parallax_problem(seqlen_q=1024, heads=4, head_dim=head_dim)
    attend = attend_on(backend, p)

    def fla(*tensors):
        return parallel_parallax(*(x.transpose(1, 2).contiguous() for x in tensors)).transpose(1, 2)

    expected = p.reference_gradients() | {"out": p.reference()}
    del expected["dscale"]
    ours, theirs = (gradients(p, op) | {"out": op(*p.tensors)} for op in (attend, fla))
    for name, exact in expected.items():
        assert relative_error(ours[name], exact) <= 1.05 * relative_error(theirs[name], exact), name
