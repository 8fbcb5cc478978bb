"""The Triton backend's kernels on the CPU, through Triton's interpreter.

Run by test_triton_interpreter.py in a process of its own, since TRITON_INTERPRET has to be set before Triton is
imported. By hand: ``TRITON_INTERPRET=1 pytest tests/interpreted_cases.py``. No bfloat16: the interpreter multiplies
it wrongly.
"""

from dataclasses import replace

import pytest
import torch
from problems import CPU, assert_close, make_problem, relative_error, run, run_info

from lla_compile.precision import error_limit
from lla_compile.reference import lla_reference

BLOCKS = dict(block_q=32, block_k=16, num_warps=1, num_stages=1, cg_max_iters=24)
# A first row sees one key: there delta and its products are exactly 0, and numpy warns where a GPU gives inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
SHAPES = [
    dict(),
    dict(is_causal=False),
    dict(seqlen_q=17, seqlen_k=45),
    dict(seqlen_q=21, seqlen_k=45, is_causal=False),
    dict(seqlen_q=45, seqlen_k=19),
    dict(seqlen_q=1, seqlen_k=33),
    dict(heads=2, kv_heads=1, batch=2, seqlen_q=17),
    dict(window_size=9),
    dict(seqlen_q=20, seqlen_k=60, window_size=33),
    dict(seqlen_q=45, seqlen_k=30, window_size=1),
    dict(head_dim=24, head_dim_v=5),
    dict(head_dim=16, head_dim_v=40),
    dict(head_dim=40),
    dict(head_dim=1),
]


def problem(dtype=torch.float32, **fields):
    """One small head; the ridge keeps the solve short."""
    return make_problem(**dict(heads=1, seqlen_q=37, head_dim=16, dtype=dtype, ridge=2.0) | fields)


def interpreted(p, precision="accurate", **knobs):
    """Output, iterations and residual of the Triton backend."""
    return run_info(p, "triton", precision, **BLOCKS | knobs)


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_shapes(fields):
    p = problem(**fields)
    assert_close(interpreted(p)[0], p.reference(), 1e-5)


@pytest.mark.parametrize("fields", [SHAPES[i] for i in (3, 4, 6, 8, 10)], ids=str)
@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_split_is_fused_in_several_launches(fields, precision):
    """What crosses a launch crosses exactly, so that schedules differ in nothing but time. Three iterations are enough
    to see it: the tiles that are done and those that are not."""
    p = problem(torch.float16, **fields)
    knobs = dict(cg_max_iters=3, cg_tol=0.1)
    for fused, split in zip(interpreted(p, precision, **knobs), interpreted(p, precision, schedule="split", **knobs)):
        assert torch.equal(fused, split)


@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_precision_tiers(dtype, precision, schedule):
    p = problem(dtype, head_dim=32, ridge=1.0, is_causal=False)
    out = interpreted(p, precision, schedule=schedule)[0]
    assert out.dtype == dtype
    low_precision = run(p, precision="fast") if dtype is torch.float16 else None
    assert_close(out, p.reference(), error_limit(str(dtype).removeprefix("torch."), precision, 1.0), low_precision)


def test_accurate_has_the_digits_that_fast_rounds_away():
    """Against its own error limit, a kernel that ignored the second term might pass for accurate."""
    p = problem(torch.float16, ridge=0.2)
    ref = p.reference()
    fast, accurate = (relative_error(interpreted(p, tier, cg_tol=1e-3)[0], ref) for tier in ("fast", "accurate"))
    assert accurate < 0.5 * fast


@pytest.mark.parametrize("block_q, block_k", [(16, 16), (16, 64), (64, 32)])
def test_blocks_change_only_rounding(block_q, block_k):
    p = problem(window_size=30)
    expected = run(p, cg_tol=1e-6, cg_max_iters=24, block_q=37, block_k=37)
    assert relative_error(interpreted(p, block_q=block_q, block_k=block_k)[0], expected) < 2e-6


def test_any_strides():
    p = problem(batch=2, heads=2, kv_heads=1, seqlen_q=13)
    expected = interpreted(p)[0]
    p.q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    p.k = torch.nn.functional.pad(p.k, (3, 2, 1, 4), value=torch.nan)[:, :, 1:-4, 3:-2]
    p.v = p.v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert not (p.q.is_contiguous() or p.k.is_contiguous() or p.v.is_contiguous())
    assert torch.equal(interpreted(p)[0], expected)


@pytest.mark.parametrize("shape", [(2, 1), (1, 19), (2, 19)], ids=str)
def test_ridge_per_head_and_per_query(shape):
    p = problem(heads=2, seqlen_q=19)
    p.ridge = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5).expand(1, 2, 19)
    assert_close(interpreted(p)[0], p.reference(), 1e-5)


def test_scale_tensor():
    p = problem()
    expected = lla_reference(p.q, p.k, p.v, p.ridge, scale=0.6)
    for scale in (0.6, torch.tensor(0.6), torch.tensor(0.6, dtype=torch.float64)):
        assert_close(interpreted(p, scale=scale)[0], expected, 1e-5)


@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_rows_without_keys_are_zero(schedule):
    p = problem(seqlen_q=45, seqlen_k=8)  # the first tile of 32 rows sees no key at all
    out, iterations, residual = interpreted(p, schedule=schedule, cg_max_iters=8)
    assert (out[:, :, :37] == 0).all() and (out[:, :, 37:] != 0).any(-1).all()
    assert (iterations[:, :, :37] == 0).all() and (residual[:, :, :37] == 0).all()


@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_duplicate_keys_at_a_small_ridge_are_finite(dtype, precision):
    p = problem(dtype, seqlen_q=33, ridge=1e-4)
    p.k = p.k[:, :, :3].repeat(1, 1, 11, 1)
    out, _, residual = interpreted(p, precision, cg_tol=0)
    assert out.isfinite().all() and residual.isfinite().all()


def test_info_is_that_of_the_eager_backend():
    p = problem(seqlen_q=40, ridge=0.3)
    _, iterations, residual = interpreted(p, cg_tol=1e-3)
    _, expected, _ = run_info(p, cg_max_iters=24, cg_tol=1e-3)
    assert iterations.dtype == torch.int32 and residual.dtype == torch.float32
    assert (iterations - expected).abs().max() <= 1 and (iterations == expected).float().mean() > 0.9
    assert 0 < residual.max() <= 1e-3 and iterations.max() > 4
    _, capped, unfinished = interpreted(p, cg_tol=1e-3, cg_max_iters=3)
    assert capped.max() == 3 and unfinished.max() > 1e-3


@pytest.mark.parametrize("schedule", ["fused", "split"])
def test_what_fresh_memory_holds_does_not_matter(schedule, monkeypatch):
    """New memory may hold NaN, and rows and columns that pad a tile may read it, where 0 * NaN would spread."""
    p = problem(torch.float16, heads=2, head_dim=24, head_dim_v=20, window_size=20)
    knobs = dict(schedule=schedule, cg_max_iters=3)
    expected = interpreted(p, **knobs)
    new_empty, made = torch.Tensor.new_empty, []

    def poisoned(self, *args, **options):
        made.append(new_empty(self, *args, **options))
        poison = made[-1].is_floating_point() and made[-1].device.type == "cpu"
        return made[-1].fill_(torch.nan) if poison else made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out = interpreted(p, **knobs)
    assert len(made) > (3 if schedule == "fused" else 10)  # outputs, and the state between launches
    for a, b in zip(out, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads_per_group", [1, 2, 3, 5])
def test_every_head_is_visited_once(heads_per_group):
    """Heads run in groups that share the L2 cache, the last of them smaller."""
    p = problem(heads=5, seqlen_q=40)
    l2_bytes = 2 * heads_per_group * 2 * p.k[0, 0].numel() * p.k.element_size()  # half of the cache is the group's
    out = interpreted(p, device=replace(CPU, l2_bytes=l2_bytes), cg_max_iters=2)[0]
    expected = run(p, cg_tol=1e-6, cg_max_iters=2, **{name: BLOCKS[name] for name in ("block_q", "block_k")})
    assert_close(out, expected, 1e-5)
