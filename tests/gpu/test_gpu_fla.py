"""Parallax against flash-linear-attention's on the same inputs: outputs, gradients, and errors against float64."""

import pytest
import torch

from lla_compile import parallax_attention
from lla_compile.nn import ParallaxAttention

fla = pytest.importorskip("fla.ops.parallax", reason="flash-linear-attention is not installed: pip install fla-core")


def relative_error(actual, wanted):
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def exact(q, r, k, v, scale):
    """Parallax in float64 as its definition has it; heads first."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    projected = p * (r @ k.mT)
    return (1 + projected.sum(-1, keepdim=True)) * (p @ v) - projected @ v


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_outputs_and_gradients(head_dim, kv_heads):
    torch.manual_seed(0)
    shapes = [(2, heads, 300, head_dim) for heads in (4, 4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    inputs[1] *= head_dim**-0.5
    grad_out = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    scale = head_dim**-0.5

    def run(function, dtype=torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]

    def theirs(*heads_first):
        return fla.parallel_parallax(*(x.transpose(1, 2) for x in heads_first), scale=scale).transpose(1, 2)

    truth = run(lambda *x: exact(*x, scale), torch.float64)
    ours, others = run(lambda *x: parallax_attention(*x, scale=scale)), run(theirs)
    for name, x, y, wanted in zip(("out", "dq", "dr", "dk", "dv"), ours, others, truth):
        own, other = relative_error(x, wanted), relative_error(y, wanted)
        print(f"{name}: {own:.1e}, fla {other:.1e}, between them {relative_error(x, y):.1e}")
        assert own <= 1.05 * other, name  # the same rounding of the result is in both


def test_a_layer_with_their_function_between_its_projections():
    torch.manual_seed(0)
    layer = ParallaxAttention(128, 2, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.r_proj.weight, std=0.05)
    x = torch.randn(2, 200, 128, device="cuda", dtype=torch.bfloat16)
    queries, k, v = layer.project(x, None)
    expected = layer.o_proj(fla.parallel_parallax(queries["q"], queries["r"], k, v).flatten(2))
    assert relative_error(layer(x), expected) < 1e-2
