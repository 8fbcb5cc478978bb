"""Gradients on the GPU: errors against float64, shapes and masks, training steps, packed sequences, memory."""

import pytest
import torch
from on_gpu import forward, gpu_packed, gpu_problem, gradients, poison_free_memory
from problems import GRADIENTS, assert_close, assert_gradients_close, make_grad_out, relative_errors

from lla_compile import lla_attention, lla_attention_varlen
from lla_compile.precision import error_limit

SCHEDULES = pytest.mark.parametrize("schedule", ["fused", "split"])
TENSORS = ("dq", "dk", "dv", "dridge")
SHAPES = [
    dict(seqlen_q=17),
    dict(seqlen_q=1, seqlen_k=777),
    dict(seqlen_q=100, seqlen_k=333),
    dict(seqlen_q=333, seqlen_k=100),
    dict(batch=2, heads=6, kv_heads=2, seqlen_q=200),
    dict(batch=3, heads=5, kv_heads=1, seqlen_q=65),
    dict(seqlen_q=300, is_causal=False),
    dict(seqlen_q=70, seqlen_k=129, is_causal=False),
    dict(seqlen_q=500, window_size=100),
    dict(seqlen_q=130, seqlen_k=500, window_size=64),
    dict(seqlen_q=500, seqlen_k=130, window_size=1000),
]
WIDTHS = [(1, 1), (16, 16), (40, 40), (64, 40), (40, 128), (192, 192), (256, 256)]
PACKED = [
    dict(lengths_q=(300, 0, 77, 1, 512), heads=4, kv_heads=2),
    dict(lengths_q=(100, 5, 0, 333), lengths_k=(400, 0, 70, 333)),
    dict(lengths_q=(333, 200), lengths_k=(180, 400), is_causal=False),
    dict(lengths_q=(400, 3, 129), window_size=90),
]


@pytest.mark.parametrize("seqlen", [1000, 1024])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_accurate(seqlen, head_dim, ridge):
    p = gpu_problem(heads=4, seqlen_q=seqlen, head_dim=head_dim, ridge=ridge)
    grad_out = make_grad_out(p)
    assert_gradients_close(gradients(p, grad_out), p.reference_gradients(grad_out), 5e-3)


@pytest.mark.parametrize("seqlen", [1000, 1024])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_fast(seqlen, head_dim):
    p = gpu_problem(heads=4, seqlen_q=seqlen, head_dim=head_dim, ridge=1.0)
    grad_out = make_grad_out(p)
    assert_gradients_close(gradients(p, grad_out, "fast"), p.reference_gradients(grad_out), 3e-2)


@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_types(dtype, precision):
    p = gpu_problem(seqlen_q=500, dtype=getattr(torch, dtype), ridge=1.0)
    grad_out = make_grad_out(p)
    limit = error_limit(dtype, precision, 1.0, "backward")
    assert_gradients_close(gradients(p, grad_out, precision), p.reference_gradients(grad_out), limit)


@SCHEDULES
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_lengths_and_masks(fields, schedule):
    p = gpu_problem(**fields)
    grad_out = make_grad_out(p)
    got, expected = gradients(p, grad_out, schedule=schedule), p.reference_gradients(grad_out)
    errors = relative_errors(got, expected)
    # Few rows: u.s of a single one is small beside |u| |s|, and sums of few have not averaged out.
    assert all(errors[name] <= 5e-3 for name in ("dq", "dk", "dv")), errors
    assert errors["dridge"] <= 2e-2 and errors["dscale"] <= 2e-2, errors


@pytest.mark.parametrize("head_dim, head_dim_v", WIDTHS)
def test_widths(head_dim, head_dim_v):
    p = gpu_problem(seqlen_q=300, head_dim=head_dim, head_dim_v=head_dim_v)
    grad_out = make_grad_out(p)
    errors = relative_errors(gradients(p, grad_out), p.reference_gradients(grad_out))
    assert all(errors[name] <= 5e-3 for name in ("dq", "dk", "dv")), errors
    assert errors["dridge"] <= 2e-2 and errors["dscale"] <= 2e-2, errors


@pytest.mark.parametrize("fields", PACKED, ids=str)
def test_packed_sequences(fields):
    p = gpu_packed(**fields)
    assert_close(forward("triton", p), p.reference(), 2.5e-3)
    grad_out = make_grad_out(p)
    got, expected = gradients(p, grad_out), p.reference_gradients(grad_out)
    assert_gradients_close({name: got[name] for name in TENSORS}, expected, 5e-3)


@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("ridge", [0.1, 0.01, 1e-4])
def test_hard_keys_stay_finite(ridge, precision):
    for repeat in (1, 4):
        p = gpu_problem(seqlen_q=512, ridge=ridge)
        p.k = p.k[:, :, :repeat].repeat(1, 1, 512 // repeat, 1)
        for name, x in gradients(p, make_grad_out(p), precision).items():
            assert x.isfinite().all(), name


@SCHEDULES
def test_what_fresh_memory_holds_does_not_matter(schedule):
    p = gpu_problem(heads=3, seqlen_q=1000, head_dim=40)
    grad_out = make_grad_out(p)
    expected = gradients(p, grad_out, schedule=schedule)
    poison_free_memory()
    for name, x in gradients(p, grad_out, schedule=schedule).items():
        assert torch.equal(x, expected[name]), name


def leaves(p) -> list[torch.Tensor]:
    ridge = torch.full((p.q.shape[1], 1), 0.7, device="cuda")
    scale = torch.tensor(0.13, device="cuda")
    return [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, ridge, scale)]


def step(inputs: list[torch.Tensor], grad_out: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    q, k, v, ridge, scale = inputs
    return torch.autograd.grad(lla_attention(q, k, v, ridge, scale=scale, **options), inputs, grad_out)


def test_autograd():
    p = gpu_problem(batch=2, heads=4, kv_heads=2, seqlen_q=300)
    grad_out = make_grad_out(p)
    inputs = leaves(p)
    dq, dk, dv, dridge, dscale = step(inputs, grad_out)
    assert [x.dtype for x in (dq, dk, dv, dridge)] == [torch.bfloat16] * 3 + [torch.float32]
    assert dridge.shape == inputs[3].shape and dscale.shape == ()
    p.ridge = inputs[3].detach()
    expected = p.reference_gradients(grad_out, scale=0.13)
    assert_gradients_close(dict(dq=dq, dk=dk, dv=dv), expected, 5e-3)
    assert_close(dridge, expected["dridge"].sum_to_size(4, 1), 2e-2)


def test_gradients_repeat_bit_for_bit():
    p = gpu_problem(batch=2, heads=8, kv_heads=4, seqlen_q=777, ridge=0.1)
    grad_out = make_grad_out(p)
    inputs = leaves(p)
    expected = step(inputs, grad_out)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        for x, y in zip(step(inputs, grad_out), expected):
            different += (x != y).sum()
    assert different.item() == 0


def test_cuda_graph_of_a_training_step():
    p = gpu_problem(batch=2, heads=4, seqlen_q=300)
    grad_out = make_grad_out(p)
    inputs = leaves(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, grad_out)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, grad_out)
    with torch.no_grad():
        inputs[0].copy_(gpu_problem(batch=2, heads=4, seqlen_q=300, seed=3).q)
    graph.replay()
    for x, y in zip(captured, step(inputs, grad_out)):
        assert torch.equal(x, y)


def test_cuda_graph_of_packed_sequences_follows_their_lengths(backend):
    p = gpu_packed((300, 100, 112))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (p.q, p.k, p.v))
    ends = p.cu_seqlens_q.clone()
    lla_attention_varlen(q, k, v, ends, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lla_attention_varlen(q, k, v, ends, ends)
    ends.copy_(gpu_packed((5, 250, 257)).cu_seqlens_q)
    graph.replay()
    assert torch.equal(out, lla_attention_varlen(q, k, v, ends, ends))


def test_torch_compile_of_a_training_step():
    p = gpu_problem(heads=4, kv_heads=2, seqlen_q=200)
    inputs = leaves(p)

    def layer(q, k, v, ridge, scale):
        return lla_attention(q * 2, k, v, torch.sigmoid(ridge), scale=scale) + 1

    expected = torch.autograd.grad(layer(*inputs).float().square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True)
    for x, y in zip(torch.autograd.grad(compiled(*inputs).float().square().sum(), inputs), expected):
        assert_close(x, y.double(), 1e-2)


def test_autocast():
    inputs = leaves(gpu_problem(heads=4, seqlen_q=200, dtype=torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        out = lla_attention(*inputs[:4], scale=inputs[4])
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), inputs))


def test_adjoint_info():
    p = gpu_problem(seqlen_q=300)
    inputs = leaves(p)
    out, info = lla_attention(*inputs[:4], return_info=True)
    out.sum().backward()
    assert info.adjoint.iterations.shape == p.q.shape[:3] and 0 < info.adjoint.residual.max() <= 10**-3.5


def test_extra_memory_is_linear_in_the_length():
    extra = {}
    for seqlen in (1024, 4096, 16384, 65536):
        inputs = leaves(gpu_problem(seqlen_q=seqlen))[:3]
        grad_out = torch.ones_like(inputs[0])
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            found = torch.autograd.grad(lla_attention(*inputs, 4.0, window_size=128), inputs, grad_out)
            torch.cuda.synchronize()
            extra[seqlen] = torch.cuda.max_memory_allocated() - before
            del found
    allocator_blocks = 32 << 20
    for seqlen, size in extra.items():
        assert size <= seqlen / 1024 * extra[1024] + allocator_blocks, extra


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_gradient_alone(name):
    """Other kernels, that compute nothing else: only what the compiler contracts may differ."""
    p = gpu_problem(heads=4, seqlen_q=500)
    grad_out = make_grad_out(p)
    alone, everything = gradients(p, grad_out, wanted=(name,)), gradients(p, grad_out)
    assert list(alone) == [name]
    assert_close(alone[name], everything[name].double(), 5e-3)
