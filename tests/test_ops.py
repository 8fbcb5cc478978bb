import shutil

import pytest
import torch
from problems import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

from lla_compile import SolveInfo, lla_attention, lla_attention_varlen
from lla_compile.autograd import GRADIENTS, TRAINED
from lla_compile.lowering import SAVED

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


ENDS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
RIDGE, SCALE = torch.full((2, 12), 0.5), torch.tensor(0.3)
# Ridge, scale and ends of packed sequences, as the flat arguments have them.
CASES = {
    "numbers": (1.0, None, None, None, None, None),
    "ridge tensor": (None, RIDGE, 0.3, None, None, None),
    "scale tensor": (0.5, None, None, SCALE, None, None),
    "packed": (0.5, None, None, None, ENDS, ENDS),
    "packed, tensors": (None, RIDGE, None, SCALE, ENDS, ENDS),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.mark.parametrize("name", ["forward", "forward_info", "forward_train"])
@EACH_CASE
def test_opcheck(name, case):
    q, k, v = tensors(heads=2, kv_heads=1, head_dim_v=5)
    torch.library.opcheck(getattr(torch.ops.lla_compile, name).default, (q, k, v, *case, *OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ends", [(None, None), (ENDS, ENDS)], ids=["", "packed"])
def test_opcheck_with_gradients(ends, dtype):
    """Also that the backward pass is registered where the forward pass finds it."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(heads=2, kv_heads=1, head_dim_v=5))
    ridge = torch.full((2, 1), 0.5, requires_grad=True)
    scale = torch.tensor(0.3, requires_grad=True)
    args = (q, k, v, None, ridge, None, scale, *ends, *OPTIONS)
    torch.library.opcheck(torch.ops.lla_compile.forward_train.default, args)


@pytest.mark.parametrize("wanted", [GRADIENTS, ("dq", "dv")], ids=" ".join)
@EACH_CASE
def test_opcheck_of_the_backward_pass(wanted, case):
    args = (*tensors(heads=2, kv_heads=1, head_dim_v=5), *case, *OPTIONS)
    trained = dict(zip(TRAINED, torch.ops.lla_compile.forward_train(*args)))
    saved = [trained[name] for name in SAVED]
    grad_out = torch.randn(1, 2, 12, 5)
    torch.library.opcheck(torch.ops.lla_compile.backward.default, (*args, grad_out, *saved, list(wanted)))
    results = dict(zip(GRADIENTS, torch.ops.lla_compile.backward(*args, grad_out, *saved, list(wanted))))
    assert {name for name, x in results.items() if x.numel()} == set(wanted)


def test_opcheck_with_strides_and_a_window():
    q, k, v = tensors(heads=2, is_causal=True)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    options = (1.0, None, None, None, None, None, True, 4, "fast", 0.01, 5, "eager")
    for name in ("forward", "forward_train"):
        torch.library.opcheck(getattr(torch.ops.lla_compile, name).default, (q, k, v, *options))


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


class Block(torch.nn.Module):
    """The attention half of a transformer block: grouped-query, with ridges and a scale that are learnt."""

    def __init__(self, width=16, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = torch.nn.Linear(width, width)
        self.log_ridge = torch.nn.Parameter(torch.zeros(heads, 1))
        self.scale = torch.nn.Parameter(torch.tensor(0.4))

    def forward(self, x, ends=None):
        """(B, N, width), or packed sequences (total, width) that end at ``ends``."""
        q, k, v = (
            self.qkv(self.norm(x))
            .unflatten(-1, (-1, self.head_dim))
            .split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        )
        ridge = self.log_ridge.exp()
        if ends is None:
            heads_first = (y.transpose(1, 2) for y in (q, k, v))
            mixed = lla_attention(*heads_first, ridge, scale=self.scale, window_size=7).transpose(1, 2)
        else:
            mixed = lla_attention_varlen(q, k, v, ends, ends, ridge.T, scale=self.scale, window_size=7)
        return x + self.out(mixed.flatten(-2))


def gradients(block, *args) -> list[torch.Tensor]:
    """Output of a block and the gradients of its input and parameters."""
    args = (args[0].detach().requires_grad_(), *args[1:])
    out = block(*args)
    leaves = [args[0], *block.parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("backend, packed", [("aot_eager", False), *((backend, True) for backend in BACKENDS)])
def test_training_compiles_without_a_graph_break(backend, packed):
    torch.manual_seed(0)
    block = Block()
    args = (torch.randn(12, 16), ENDS) if packed else (torch.randn(2, 12, 16),)
    expected = gradients(block, *args)
    compiled = gradients(torch.compile(block, fullgraph=True, backend=backend), *args)
    for a, b in zip(compiled, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", ["q", "v", "ridge", "scale"])
def test_compiled_gradient_of_one_input(needs):
    q, k, v = tensors()
    named = dict(q=q, k=k, v=v, ridge=torch.tensor(0.5), scale=torch.tensor(0.3))
    named[needs].requires_grad_()
    (expected,) = torch.autograd.grad(lla_attention(**named).sum(), named[needs])
    attend = torch.compile(lambda named: lla_attention(**named).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(attend(named), named[needs])[0], expected)


def test_compiled_code_under_autocast():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(block, x)
        compiled = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    for a, b in zip(compiled, expected):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_training_at_a_dynamic_length_compiles_once():
    torch.manual_seed(0)
    block = Block()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (12, 17, 40):
        x = torch.randn(2, length, 16)
        torch._dynamo.mark_dynamic(x, 1)
        out, expected = compiled(x), block(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        found, wanted = (torch.autograd.grad(y.sum(), list(block.parameters())) for y in (out, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_packed_sequences_of_a_dynamic_length_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda *args: lla_attention_varlen(*args, return_info=True), fullgraph=True, backend=counter)
    for lengths in ([5, 7], [3, 0, 20], [9, 1, 1, 4]):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        q, k, v = torch.randn(3, sum(lengths), 2, 8).unbind()
        for x in (q, k, v, ends):
            torch._dynamo.mark_dynamic(x, 0)
        (out, info), (expected, expected_info) = (
            f(q, k, v, ends, ends) for f in (attend, lambda *args: lla_attention_varlen(*args, return_info=True))
        )
        torch.testing.assert_close(out, expected)
        assert torch.equal(info.iterations, expected_info.iterations) and info.iterations.shape == (sum(lengths), 2)
    assert counter.frame_count == 1


def test_fake_tensors_give_shapes_of_gradients():
    with FakeTensorMode():
        q = torch.empty(2, 6, 9, 16, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 3, 9, 16, dtype=torch.bfloat16, requires_grad=True)
        ridge = torch.ones(6, 1, requires_grad=True)
        lla_attention(q, k, k, ridge).sum().backward()
        for x in (q, k, ridge):
            assert x.grad.shape == x.shape and x.grad.dtype == x.dtype


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return lla_attention(q, k, v, 0.5)

    q, k, v = tensors()
    program = torch.export.export(Layer(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), lla_attention(q, k, v, 0.5))
