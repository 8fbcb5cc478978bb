"""Lengths, widths, masks, strides and offsets on the GPU."""

import pytest
import torch
from on_gpu import bound, forward, forward_info, gpu_packed, gpu_problem, need_free_memory, poison_free_memory
from problems import assert_close, relative_error

from lla_compile.reference import lla_reference

SCHEDULES = pytest.mark.parametrize("schedule", ["fused", "split"])
LIMIT = 2.5e-3
SHAPES = [
    dict(seqlen_q=1000),
    dict(seqlen_q=1023),
    dict(seqlen_q=17),
    dict(seqlen_q=1),
    dict(seqlen_q=1, seqlen_k=777),
    dict(seqlen_q=100, seqlen_k=333),
    dict(seqlen_q=333, seqlen_k=100),
    dict(batch=2, heads=6, kv_heads=2, seqlen_q=200),
    dict(batch=3, heads=5, kv_heads=1, seqlen_q=65),
    dict(seqlen_q=300, is_causal=False),
    dict(seqlen_q=70, seqlen_k=129, is_causal=False),
    dict(seqlen_q=500, window_size=100),
    dict(seqlen_q=500, window_size=1),
    dict(seqlen_q=130, seqlen_k=500, window_size=64),
    dict(seqlen_q=500, seqlen_k=130, window_size=1000),
]
PACKED = [
    dict(lengths_q=(300, 17, 0, 129, 1, 512), heads=4, kv_heads=2),
    dict(lengths_q=(100, 0, 5, 200), lengths_k=(333, 4, 0, 90)),
    dict(lengths_q=(0, 70, 0), lengths_k=(0, 99, 0), is_causal=False),
    dict(lengths_q=(500, 130), window_size=64),
    dict(lengths_q=(3,) * 40, head_dim=40, head_dim_v=24),
    dict(lengths_q=(1000, 2000, 77), head_dim=128),
]
WIDTHS = [(1, 1), (8, 24), (16, 16), (32, 5), (40, 40), (96, 96), (192, 192), (256, 256), (64, 40), (40, 128)]


@SCHEDULES
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_lengths_and_masks(backend, fields, schedule):
    p = gpu_problem(**fields)
    assert_close(forward(backend, p, schedule=schedule), p.reference(), LIMIT)


@SCHEDULES
@pytest.mark.parametrize("precision, limit", [("fast", 8e-3), ("accurate", LIMIT)])
@pytest.mark.parametrize("fields", PACKED, ids=str)
def test_packed_sequences(backend, fields, precision, limit, schedule):
    p = gpu_packed(**fields, ridge=4.0)
    assert_close(forward(backend, p, precision, schedule=schedule), p.reference(), limit)


@pytest.mark.parametrize("head_dim, head_dim_v", WIDTHS)
def test_widths(backend, head_dim, head_dim_v):
    p = gpu_problem(seqlen_q=300, head_dim=head_dim, head_dim_v=head_dim_v)
    assert_close(forward(backend, p), p.reference(), LIMIT)


@pytest.mark.parametrize("head_dim, head_dim_v", [(1, 1), (40, 40), (256, 256)])
def test_widths_of_a_split_schedule(backend, head_dim, head_dim_v):
    p = gpu_problem(seqlen_q=300, head_dim=head_dim, head_dim_v=head_dim_v)
    assert_close(forward(backend, p, schedule="split"), p.reference(), LIMIT)


@SCHEDULES
def test_rows_without_keys_are_zero(backend, schedule):
    p = gpu_problem(seqlen_q=300, seqlen_k=77)
    out, iterations, residual = forward_info(backend, p, schedule=schedule)
    assert (out[:, :, :223] == 0).all() and (out[:, :, 223:] != 0).any(-1).all()
    assert (iterations[:, :, :223] == 0).all() and (residual[:, :, :223] == 0).all()


@SCHEDULES
def test_transposed_inputs(backend, schedule):
    """(B, N, H, D) in memory, as most models have it."""
    p = gpu_problem(batch=2, heads=4, kv_heads=2, seqlen_q=200)
    expected = forward(backend, p, schedule=schedule)
    for name in ("q", "k", "v"):
        setattr(p, name, getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2))
    assert not p.q.is_contiguous()
    assert torch.equal(forward(backend, p, schedule=schedule), expected)


@SCHEDULES
def test_unaligned_inputs(backend, schedule):
    """Neither the pointers nor the row strides are multiples of 16 bytes; what lies between the rows is NaN."""
    p = gpu_problem(heads=3, seqlen_q=200)
    expected = p.reference()
    for name, before in (("q", 1), ("k", 3), ("v", 5)):
        wide = torch.nn.functional.pad(getattr(p, name), (before, 2), value=torch.nan)
        setattr(p, name, wide[..., before:-2])
    assert p.q.data_ptr() % 16 and p.k.stride(2) % 8
    assert_close(forward(backend, p, schedule=schedule), expected, LIMIT)


@SCHEDULES
def test_ridge_and_scale_tensors(backend, schedule):
    p = gpu_problem(batch=2, heads=3, seqlen_q=150)
    ridge = torch.rand(2, 3, 150, generator=torch.Generator().manual_seed(1)).cuda() + 0.2
    for p.ridge in (ridge, ridge[:, :, :1].expand(2, 3, 150), ridge.bfloat16()):
        expected = lla_reference(p.q, p.k, p.v, p.ridge, scale=0.2)
        assert_close(forward(backend, p, schedule=schedule, scale=torch.tensor(0.2, device="cuda")), expected, LIMIT)


@SCHEDULES
def test_what_fresh_memory_holds_does_not_matter(backend, schedule):
    p = gpu_problem(heads=3, seqlen_q=1000, head_dim=40)
    expected = forward_info(backend, p, schedule=schedule)
    poison_free_memory()
    probe = torch.empty(1 << 16, device="cuda")
    assert probe.isnan().any(), "the allocator did not hand a poisoned block back: this test shows nothing"
    del probe
    for a, b in zip(forward_info(backend, p, schedule=schedule), expected):
        assert torch.equal(a, b)


@SCHEDULES
def test_runs_repeat_bit_for_bit(backend, schedule):
    p = gpu_problem(batch=2, heads=8, seqlen_q=777, ridge=0.1)
    launch = bound(backend, p, schedule=schedule)
    expected = launch()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        different += (launch() != expected).sum()
    assert different.item() == 0


def test_inputs_beyond_32_bit_offsets(backend):
    """Row strides that put the last rows of q, k and v past 2**31 elements. Triton's interpreter cannot run this: it
    would take the memory for real and has no 32-bit registers to overflow."""
    need_free_memory(16)
    small = gpu_problem(heads=2, seqlen_q=1024, window_size=64)
    p = gpu_problem(heads=2, seqlen_q=1024, window_size=64)
    stride = (1 << 21) + 4096
    buffer = torch.full((1024 * stride,), torch.nan, dtype=torch.bfloat16, device="cuda")
    for position, name in enumerate(("q", "k", "v")):
        view = buffer.as_strided((1, 2, 1024, 64), (0, 64, stride, 1), 1024 * position)
        setattr(p, name, view.copy_(getattr(small, name)))
    assert buffer.numel() > 1 << 31
    assert torch.equal(forward(backend, p), forward(backend, small))


@pytest.mark.slow
@SCHEDULES
def test_outputs_and_state_beyond_32_bit_offsets(backend, schedule):
    """B*H*N*D past 2**31. All heads are one head, so that only the output and a split schedule's state take memory."""
    need_free_memory(24 if schedule == "fused" else 100)
    heads = (1 << 15) + 8
    one = gpu_problem(heads=1, seqlen_q=1024, window_size=16, ridge=4.0)
    p = gpu_problem(heads=1, seqlen_q=1024, window_size=16, ridge=4.0)
    p.q = one.q.expand(1, heads, 1024, 64)
    out = forward(backend, p, schedule=schedule, cg_max_iters=8)
    expected = forward(backend, one, schedule=schedule, cg_max_iters=8)
    assert out.numel() > 1 << 31
    assert relative_error(expected, one.reference()) < LIMIT
    assert all(torch.equal(chunk, expected.expand_as(chunk)) for chunk in out.split(512, dim=1))
