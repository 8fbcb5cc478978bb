import shutil

import pytest
import torch
from problems import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

from lla_compile import SolveInfo, lla_attention

BACKENDS = ["aot_eager"]
if shutil.which("g++") or shutil.which("clang++"):
    BACKENDS.append("inductor")

OPTIONS = (True, None, "accurate", None, None, None)


def tensors(**shape):
    problem = make_problem(**{"seqlen_q": 12, "head_dim": 8} | shape)
    return problem.q, problem.k, problem.v


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["forward", "forward_info"])
@pytest.mark.parametrize(
    "ridge, scale",
    [
        ((1.0, None), (None, None)),
        ((None, torch.full((2, 12), 0.5)), (0.3, None)),
        ((0.5, None), (None, torch.tensor(0.3))),
    ],
    ids=["numbers", "ridge tensor", "scale tensor"],
)
def test_opcheck(name, ridge, scale):
    q, k, v = tensors(heads=2, kv_heads=1, head_dim_v=5)
    op = getattr(torch.ops.lla_compile, name).default
    torch.library.opcheck(op, (q, k, v, *ridge, *scale, *OPTIONS))


def test_opcheck_with_strides_and_a_window():
    q, k, v = tensors(heads=2, is_causal=True)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    args = (q, k, v, 1.0, None, None, None, True, 4, "fast", 0.01, 5, "eager")
    torch.library.opcheck(torch.ops.lla_compile.forward.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_info", [False, True])
def test_compiles_without_a_graph_break(backend, return_info):
    def layer(q, k, v, ridge):
        result = lla_attention(torch.tanh(q), k, v, ridge.exp(), window_size=7, return_info=return_info)
        out, info = result if return_info else (result, None)
        return out * 2, info

    q, k, v = tensors()
    ridge = torch.zeros(2, 1)
    expected, info = layer(q, k, v, ridge)
    out, compiled_info = torch.compile(layer, fullgraph=True, backend=backend)(q, k, v, ridge)
    torch.testing.assert_close(out, expected)
    if return_info:
        assert isinstance(compiled_info, SolveInfo)
        torch.testing.assert_close(compiled_info.residual, info.residual, atol=1e-5, rtol=0.1)
        assert compiled_info.iterations.dtype == torch.int32 and compiled_info.iterations.shape == (1, 2, 12)


def test_compiled_code_goes_through_the_operator():
    seen = []

    def record(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(lambda *qkv: lla_attention(*qkv), fullgraph=True, backend=record)(*tensors())
    assert any("lla_compile.forward" in str(target) for target in seen), seen


def test_dynamic_sequence_length_compiles_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda *qkv: lla_attention(*qkv, 0.5) + 1, fullgraph=True, backend=counter)
    for seqlen in (12, 17, 40):
        q, k, v = tensors(seqlen_q=seqlen)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(attend(q, k, v), lla_attention(q, k, v, 0.5) + 1)
    assert counter.frame_count == 1


def test_numbers_that_change_do_not_break():
    attend = torch.compile(
        lambda q, k, v, ridge, scale: lla_attention(q, k, v, ridge, scale=scale), fullgraph=True, backend="aot_eager"
    )
    q, k, v = tensors()
    for ridge, scale in ((1.0, 0.5), (0.5, 0.3), (0.25, 0.1), (2, None)):
        torch.testing.assert_close(attend(q, k, v, ridge, scale), lla_attention(q, k, v, ridge, scale=scale))


def test_fake_tensors_give_shapes_and_strides():
    with FakeTensorMode():
        q = torch.empty(2, 9, 6, 16, dtype=torch.bfloat16).transpose(1, 2)
        k, v = torch.empty(2, 3, 9, 16, dtype=torch.bfloat16), torch.empty(2, 3, 9, 5, dtype=torch.bfloat16)
        out, info = lla_attention(q, k, v, return_info=True)
    assert out.shape == (2, 6, 9, 5) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert info.iterations.shape == info.residual.shape == (2, 6, 9)
    assert (info.iterations.dtype, info.residual.dtype) == (torch.int32, torch.float32)


def test_wrong_shapes_are_refused_while_compiling():
    q, k, v = tensors()
    with pytest.raises(Exception, match="q and k must have one head_dim, got q 8 and k 7"):
        torch.compile(lambda *qkv: lla_attention(*qkv), fullgraph=True, backend="aot_eager")(q, k[..., :7], v)


def test_wrong_values_are_refused_when_run():
    attend = torch.compile(lambda q, k, v, ridge: lla_attention(q, k, v, ridge), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="ridge must be positive"):
        attend(*tensors(), torch.tensor(-1.0))


def test_gradients_through_the_operator_are_refused():
    q, k, v = (x.requires_grad_() for x in tensors())
    with pytest.raises(Exception, match="no backward pass in compiled code yet"):
        torch.compile(lambda *qkv: lla_attention(*qkv).sum(), fullgraph=True, backend="aot_eager")(q, k, v).backward()
    with torch.no_grad():
        torch.compile(lambda *qkv: lla_attention(*qkv), fullgraph=True, backend="aot_eager")(q, k, v)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return lla_attention(q, k, v, 0.5)

    q, k, v = tensors()
    program = torch.export.export(Layer(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), lla_attention(q, k, v, 0.5))
