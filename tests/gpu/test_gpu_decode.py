"""Decoding on the GPU: errors, masks, pages, what unused memory holds, CUDA graphs, allocations, the host's waiting."""

import functools

import pytest
import torch
from decode_problems import CASES
from on_gpu import bound_decode, gpu_decode, gpu_decode_problem, gpu_problem, need_free_memory, poison_free_memory
from problems import assert_close, relative_error

from lla_compile import KVCache, lla_attention, lla_decode, lla_decode_workspace, plan
from lla_compile.reference import lla_reference

LIMIT = 2.5e-3
FAST_LIMIT = 5e-3
LENGTHS = (1, 2, 7, 33, 64, 100, 128, 200, 256, 500, 1024, 2049)
SPLITS = (1, 3, 16)
RIDGES = pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
PAGES = pytest.mark.parametrize("page_size", [None, 16])
EACH_SPLIT = pytest.mark.parametrize("num_splits", SPLITS)


pytestmark = pytest.mark.usefixtures("backend")  # also where a test names none


@functools.cache
def long_problem(head_dim: int, lengths: tuple = LENGTHS, dtype: torch.dtype = torch.bfloat16):
    return gpu_decode_problem(
        batch=len(lengths), heads=4, capacity=max(lengths), lengths=lengths, head_dim=head_dim, dtype=dtype
    )


def medium_problem(**fields):
    """A few hundred keys, dense or in pages: what most tests here decode, to share kernels."""
    return gpu_decode_problem(**dict(heads=4, capacity=336, lengths=[336, 16, 101]) | fields)


def assert_each_close(out, expected, limit, what=""):
    """Every sequence by itself: errors of short ones do not hide behind long ones."""
    assert out.isfinite().all()
    errors = [relative_error(x, y) for x, y in zip(out, expected, strict=True)]
    assert max(errors) <= limit, f"{what} errors {[f'{error:.1e}' for error in errors]}, limit {limit:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decode_cases(backend, fields, dtype):
    p = gpu_decode_problem(**dict(head_dim=16, dtype=dtype) | fields)
    assert_close(gpu_decode(backend, p, num_splits=3), p.reference(), LIMIT)


@RIDGES
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_any_length_and_any_number_of_splits(backend, head_dim, ridge):
    p = long_problem(head_dim)
    p.ridge = ridge
    expected = p.reference()
    for num_splits in SPLITS:
        assert_each_close(gpu_decode(backend, p, num_splits=num_splits), expected, LIMIT, f"num_splits {num_splits}:")


@RIDGES
def test_any_length_in_float16(backend, ridge):
    p = long_problem(64, dtype=torch.float16)
    p.ridge = ridge
    expected = p.reference()
    for num_splits in (1, 16):
        assert_each_close(gpu_decode(backend, p, num_splits=num_splits), expected, LIMIT, f"num_splits {num_splits}:")


@RIDGES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fast_where_keys_are_many(backend, head_dim, ridge):
    p = long_problem(head_dim, (16 * head_dim, 16 * head_dim + 1, 24 * head_dim - 5, 2100))
    p.ridge = ridge
    expected = p.reference()
    for num_splits in SPLITS:
        assert_each_close(gpu_decode(backend, p, "fast", num_splits=num_splits), expected, FAST_LIMIT, f"{num_splits}:")


@EACH_SPLIT
@pytest.mark.parametrize("block_d", [64, 128])
def test_rows_in_blocks(backend, block_d, num_splits):
    if backend == "cuda" and block_d == 64:
        pytest.skip("its blocks hold all rows")
    p = long_problem(128)
    p.ridge = 0.1
    assert_each_close(gpu_decode(backend, p, num_splits=num_splits, block_d=block_d), p.reference(), LIMIT)


@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_a_step_is_a_row_of_attention(backend, ridge):
    """All rows at once, as sequences that share their keys."""
    p = gpu_problem(heads=4, kv_heads=2, seqlen_q=400, ridge=ridge)
    rows = lla_attention(p.q, p.k, p.v, ridge)[0].transpose(0, 1)[:, :, None]
    q = p.q[0].transpose(0, 1)[:, :, None]
    k, v = (x.expand(400, -1, -1, -1) for x in (p.k, p.v))
    seqlens = torch.arange(1, 401, dtype=torch.int32, device="cuda")
    steps = lla_decode(q, k, v, ridge, seqlens=seqlens, backend=backend)
    expected = p.reference()[0].transpose(0, 1)[:, :, None]
    norm = expected.norm()
    errors = [(x - expected).norm() / norm for x in (steps.double(), rows.double())]
    assert max(errors) <= LIMIT
    for a, b, size in zip(steps.double().split(50), rows.double().split(50), expected.split(50)):
        assert (a - b).norm() <= 2 * LIMIT * size.norm()


@PAGES
@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.parametrize("group", [4, 8])
def test_groups_and_several_tokens(backend, group, queries, page_size):
    p = medium_problem(heads=8, kv_heads=8 // group, queries=queries, lengths=[336, 3, 101], page_size=page_size)
    for num_splits in (1, 3):
        assert_close(gpu_decode(backend, p, num_splits=num_splits), p.reference(), LIMIT)


@PAGES
@pytest.mark.parametrize("window_size", [1, 70, 1000])
def test_windows(backend, window_size, page_size):
    p = medium_problem(queries=5, window_size=window_size, page_size=page_size)
    assert_close(gpu_decode(backend, p, num_splits=3), p.reference(), LIMIT)


def test_ridge_and_scale_tensors(backend):
    p = medium_problem()
    p.ridge = torch.rand(3, 4, 1, generator=torch.Generator().manual_seed(1)).cuda() + 0.1
    scale = torch.tensor(0.2, device="cuda")
    out = lla_decode(**p.arguments(), scale=scale, backend=backend)
    assert_close(out, p.reference(scale=0.2), LIMIT)


def test_unaligned_caches(backend):
    """Neither the pointers nor the row strides are multiples of 16 bytes; what lies between the rows is NaN."""
    p = medium_problem()
    for name, before in (("q", 1), ("k_cache", 3), ("v_cache", 5)):
        wide = torch.nn.functional.pad(getattr(p, name), (before, 2), value=torch.nan)
        setattr(p, name, wide[..., before:-2])
    assert p.q.data_ptr() % 16 and p.k_cache.stride(2) % 8
    assert_close(gpu_decode(backend, p, num_splits=3), p.reference(), LIMIT)


@PAGES
@EACH_SPLIT
def test_unused_memory_may_hold_anything(backend, num_splits, page_size):
    """Slots and pages that nobody uses are NaN in all problems; here they change, and so does the workspace."""
    p = medium_problem(page_size=page_size)
    expected = gpu_decode(backend, p, num_splits=num_splits)
    executable = bound_decode(backend, p, num_splits=num_splits)
    unused = [x.isnan() for x in (p.k_cache, p.v_cache)]
    for value in (torch.nan, torch.inf, 0.0):
        for cache, where in zip((p.k_cache, p.v_cache), unused):
            cache.masked_fill_(where, value)
        workspace = torch.full((executable.workspace_numel,), value, device="cuda")
        out = torch.full_like(expected, value)
        results = executable(p.inputs() | {"out": out, "workspace": workspace}, ("out",))
        assert results["out"] is out and torch.equal(out, expected)
    assert_close(expected, p.reference(), LIMIT)


def test_what_fresh_memory_holds_does_not_matter(backend):
    p = medium_problem()
    expected = gpu_decode(backend, p, num_splits=3)
    poison_free_memory()
    assert torch.equal(gpu_decode(backend, p, num_splits=3), expected)


@EACH_SPLIT
def test_runs_repeat_bit_for_bit(backend, num_splits):
    p = long_problem(64)
    p.ridge = 0.1
    executable, inputs = bound_decode(backend, p, num_splits=num_splits), p.inputs()
    expected = executable(inputs, ("out",))["out"]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        different += (executable(inputs, ("out",))["out"] != expected).sum()
    assert different.item() == 0


@PAGES
def test_inputs_beyond_32_bit_offsets(backend, page_size):
    """Row strides that put the last keys and values past 2**31 elements."""
    need_free_memory(12)
    small = gpu_decode_problem(batch=1, heads=4, capacity=1024, lengths=[1000])
    expected = lla_decode(**small.arguments(), backend=backend)
    stride = (1 << 21) + 4096
    buffer = torch.full((1024 * stride,), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert buffer.numel() > 1 << 31
    block_table, caches = None, []
    for position, x in enumerate((small.k_cache, small.v_cache)):
        view = buffer.as_strided((1, 2, 1024, 64), (0, 64, stride, 1), 1024 * position).copy_(x)
        caches.append(view if page_size is None else view[0].transpose(0, 1).unflatten(0, (-1, page_size)))
    if page_size is not None:
        block_table = torch.arange(1024 // page_size, dtype=torch.int32, device="cuda")[None]
    out = lla_decode(small.q, *caches, small.ridge, seqlens=small.seqlens, block_table=block_table, backend=backend)
    assert torch.equal(out, expected) if page_size is None else relative_error(out, expected) < LIMIT


def test_the_planner_chooses_triton(backend, monkeypatch):
    monkeypatch.delenv("LLA_COMPILE_BACKENDS")
    p = medium_problem()
    chosen = plan(p.q, p.k_cache, p.v_cache, phase="decode").config
    assert chosen.backend == "triton" and chosen.schedule == "gram"
    assert_close(lla_decode(**p.arguments()), p.reference(), LIMIT)


@pytest.mark.parametrize("fields", [dict(head_dim=256), dict(head_dim_v=256), dict(dtype=torch.float32)], ids=str)
def test_what_gram_does_not_take(backend, fields):
    p = medium_problem(**fields)
    chosen = plan(p.q, p.k_cache, p.v_cache, phase="decode").config
    assert (chosen.backend, chosen.schedule) == {"triton": ("triton", "fused"), "cuda": ("eager", "gram")}[backend]
    assert_close(lla_decode(**p.arguments()), p.reference(), LIMIT)


@PAGES
def test_cuda_graph_with_growing_lengths(page_size):
    """Replays read the lengths of their time; the keys past them are NaN until then."""
    p = medium_problem(lengths=None, page_size=page_size)
    p.seqlens = torch.zeros(3, dtype=torch.int32, device="cuda")
    keys, values = p.k_cache, p.v_cache
    p.k_cache, p.v_cache = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    workspace = lla_decode_workspace(p.q, p.k_cache, p.v_cache, block_table=p.block_table)
    out = torch.empty_like(p.q)

    def step():
        return lla_decode(**p.arguments(), out=out, workspace=workspace)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([1, 0, 17], [2, 1, 18], [64, 100, 65], [300, 101, 256], [336, 336, 336]):
        p.lengths = lengths
        p.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for b, length in enumerate(lengths):
            for cache, source in ((p.k_cache, keys), (p.v_cache, values)):
                if page_size is None:
                    cache[b, :, :length] = source[b, :, :length]
                    continue
                slots = torch.arange(length, device="cuda")
                where = p.block_table[b].long()[slots // page_size], slots % page_size
                cache[where] = source[where]
        workspace.fill_(torch.nan)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, p.reference(), LIMIT)
        assert torch.equal(out, lla_decode(**p.arguments()))


@PAGES
def test_cache_and_decoding_in_one_graph(page_size):
    """A captured step appends a token and decodes it; replays go on where the last one ended."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    cache = KVCache(2, 2, 64, 64, page_size=page_size, device="cuda")
    prompt = normal(2, 2, 20, 64), normal(2, 2, 20, 64)
    cache.append(*prompt, lengths=torch.tensor([20, 5]))
    held = [[x[b, :, :length] for x in prompt] for b, length in enumerate((20, 5))]
    q, k, v = normal(2, 4, 1, 64), normal(2, 2, 1, 64), normal(2, 2, 1, 64)
    workspace = lla_decode_workspace(q, cache.k, cache.v, block_table=cache.block_table)
    out = torch.empty_like(q)

    def step():
        cache.append(k, v)
        seqlens, block_table = cache.seqlens, cache.block_table
        lla_decode(q, cache.k, cache.v, seqlens=seqlens, block_table=block_table, out=out, workspace=workspace)

    def check():
        for b, kept in enumerate(held):
            held[b] = [torch.cat([x, new[b]], 1) for x, new in zip(kept, (k, v))]
            assert_close(out[b : b + 1], lla_reference(q[b : b + 1], *(x[None] for x in held[b])), LIMIT)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(40):
        for x in (q, k, v):
            x.copy_(normal(*x.shape))
        graph.replay()
        check()
    assert cache.seqlens.tolist() == [61, 46]


@PAGES
def test_nothing_is_allocated_after_the_first_call(page_size):
    p = medium_problem(page_size=page_size)
    workspace = lla_decode_workspace(p.q, p.k_cache, p.v_cache, block_table=p.block_table)
    out = torch.empty_like(p.q)
    lla_decode(**p.arguments(), out=out, workspace=workspace)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        assert lla_decode(**p.arguments(), out=out, workspace=workspace) is out
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_workspace_grows_with_the_splits_only(backend):
    sizes = {
        (capacity, num_splits): bound_decode(
            backend, gpu_decode_problem(capacity=capacity, lengths=None), num_splits=num_splits
        ).workspace_numel
        for capacity in (64, 4096)
        for num_splits in (3, 6)
    }
    assert all(sizes[64, num_splits] == sizes[4096, num_splits] for num_splits in (3, 6))
    assert sizes[64, 3] < sizes[64, 6] <= 2 * sizes[64, 3]


@PAGES
def test_the_host_does_not_wait(page_size):
    p = medium_problem(page_size=page_size)
    p.ridge = torch.ones(3, 4, 1, device="cuda")
    scale = torch.tensor(0.125, device="cuda")
    cache = KVCache(3, 2, 64, 64, page_size=page_size, device="cuda")
    token, lengths = torch.zeros(3, 2, 1, 64, dtype=torch.bfloat16, device="cuda"), torch.ones_like(p.seqlens)

    def step():
        cache.append(token, token, lengths=lengths)
        return lla_decode(**p.arguments(), scale=scale)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
