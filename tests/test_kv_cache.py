"""The cache of keys and values: what it holds after appends, and that decoding over it is attention."""

import doctest

import pytest
import torch
from problems import assert_close

from lla_compile import KVCache, kv_cache, lla_attention, lla_decode

pytestmark = pytest.mark.usefixtures("clean")
PAGE_SIZES = pytest.mark.parametrize("page_size", [None, 4, 1])


def make(page_size=None, capacity=16, **options):
    return KVCache(3, 2, capacity, 6, 5, page_size=page_size, **{"dtype": torch.float32} | options)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 2, count, width, generator=generator) for width in (6, 5))


def contents(cache, sequence):
    """Keys and values of one sequence in order, (Hkv, length, width)."""
    length = int(cache.seqlens[sequence])
    if cache.page_size is None:
        return [x[sequence, :, :length] for x in (cache.k, cache.v)]
    pages = cache.block_table[sequence].long()
    return [x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (cache.k, cache.v)]


@PAGE_SIZES
def test_holds_what_was_appended(page_size):
    cache = make(page_size)
    lengths = torch.tensor([7, 1, 0], dtype=torch.int32)
    prompt, more, last = tokens(7), tokens(1, 1), tokens(3, 2)
    cache.append(*prompt, lengths=lengths)
    cache.append(*more)
    cache.append(*last, lengths=lengths.clamp(max=2).long())
    assert cache.seqlens.tolist() == [10, 3, 1] and cache.seqlens.dtype == torch.int32
    for sequence, (first, final) in enumerate([(7, 2), (1, 1), (0, 0)]):
        for x, *parts in zip(contents(cache, sequence), prompt, more, last):
            pieces = [part[sequence, :, :count] for part, count in zip(parts, (first, 1, final))]
            torch.testing.assert_close(x, torch.cat(pieces, 1), rtol=0, atol=0)


@PAGE_SIZES
def test_shapes(page_size):
    cache = make(page_size, dtype=torch.float16)
    assert cache.k.dtype == cache.v.dtype == torch.float16 and cache.capacity == 16
    if page_size is None:
        assert cache.k.shape == (3, 2, 16, 6) and cache.v.shape == (3, 2, 16, 5) and cache.block_table is None
    else:
        assert cache.k.shape[1:] == (page_size, 2, 6) and cache.v.shape[1:] == (page_size, 2, 5)
        assert cache.block_table.shape == (3, 16 // page_size) and cache.block_table.dtype == torch.int32
        assert cache.block_table.unique().numel() == 48 // page_size


@PAGE_SIZES
def test_a_block_table_of_ones_own(page_size):
    if page_size is None:
        return
    cache, other = make(page_size), make(page_size)
    other.block_table.copy_(cache.block_table.flip(0).flip(1))
    for c in (cache, other):
        c.append(*tokens(6), lengths=torch.tensor([6, 2, 5]))
        c.append(*tokens(2, 1))
    for sequence in range(3):
        for a, b in zip(contents(cache, sequence), contents(other, sequence)):
            assert torch.equal(a, b)
    assert not torch.equal(cache.k, other.k)


@PAGE_SIZES
def test_no_tensor_moves(page_size):
    cache = make(page_size)
    before = [x.data_ptr() for x in (cache.k, cache.v, cache.seqlens)]
    cache.append(*tokens(3))
    cache.append(*tokens(1), lengths=torch.tensor([1, 0, 1]))
    assert before == [x.data_ptr() for x in (cache.k, cache.v, cache.seqlens)]


@PAGE_SIZES
@pytest.mark.parametrize("window_size", [None, 4])
def test_decoding_is_attention(page_size, window_size):
    """Two sequences are appended to out of step, one to three tokens at a time."""
    q = torch.randn(3, 4, 16, 6, generator=torch.Generator().manual_seed(5))
    k, v = tokens(16, 6)
    expected = lla_attention(q, k, v, 0.5, window_size=window_size, cg_tol=1e-7, cg_max_iters=100)
    cache, ends = make(page_size), torch.tensor([5, 0, 9])
    cache.append(k[:, :, :9], v[:, :, :9], lengths=ends)
    for count in (1, 3, 2, 1):
        index = ends[:, None] + torch.arange(count)
        rows = torch.arange(3)[:, None]
        new_q, new_k, new_v = (x[rows, :, index].transpose(1, 2) for x in (q, k, v))
        cache.append(new_k, new_v)
        out = lla_decode(
            new_q, cache.k, cache.v, 0.5, seqlens=cache.seqlens, block_table=cache.block_table, window_size=window_size
        )
        assert_close(out, expected[rows, :, index].transpose(1, 2), 1e-5)
        ends = ends + count


@PAGE_SIZES
def test_full_to_the_last_slot_and_over(page_size):
    cache = make(page_size)
    cache.append(*tokens(15))
    cache.append(*tokens(1, 1))
    assert cache.seqlens.tolist() == [16] * 3
    kept = [x.clone() for x in contents(cache, 0)]
    with pytest.raises(ValueError, match="the cache is full: a sequence would have 17 keys, its capacity is 16"):
        cache.append(*tokens(1))
    assert cache.seqlens.tolist() == [16] * 3 and all(map(torch.equal, contents(cache, 0), kept))
    cache.append(*tokens(5), lengths=torch.zeros(3, dtype=torch.int32))
    cache.reset()
    assert cache.seqlens.tolist() == [0] * 3
    cache.append(*tokens(16))


@PAGE_SIZES
def test_what_the_host_cannot_know_is_dropped(page_size):
    """Lengths that changed on the device behind its back."""
    cache, (k, v) = make(page_size), tokens(10)
    cache.append(k, v)
    kept = [[x.clone() for x in contents(cache, sequence)] for sequence in range(3)]
    cache.seqlens += torch.tensor([6, 4, 0], dtype=torch.int32)
    cache.append(*tokens(4, 1))
    assert cache.seqlens.tolist() == [20, 18, 14]
    for sequence, (keys, values) in enumerate(kept):
        now_k, now_v = contents(cache, sequence)
        assert torch.equal(now_k[:, :10], keys) and torch.equal(now_v[:, :10], values)
    for x, new in zip(contents(cache, 1), tokens(4, 1)):
        assert torch.equal(x[:, 14:16], new[1, :, :2])


@PAGE_SIZES
def test_nothing_is_read_back(page_size):
    """Tensors without data stand for those of a device: to look at a value is an error."""
    cache = make(page_size, device="meta")
    k, v = (x.to("meta") for x in tokens(9))
    cache.append(k, v)
    cache.append(k, v, lengths=torch.empty(3, dtype=torch.int32, device="meta"))  # how many fit, the host cannot know
    with pytest.raises(ValueError, match="the cache is full"):
        cache.append(k, v)
    with pytest.raises(RuntimeError):
        cache.seqlens.tolist()


K, V = tokens(2)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "k must have the dtype of the cache, float32, got float16", dict(k=K.half())),
        (ValueError, "v must be on the device of the cache, cpu, got meta", dict(v=V.to("meta"))),
        (ValueError, r"k must be \(3, 2, tokens, 6\), got shape \(3, 1, 2, 6\)", dict(k=K[:, :1])),
        (ValueError, r"v must be \(3, 2, tokens, 5\), got shape \(3, 2, 2, 6\)", dict(v=K)),
        (ValueError, r"k must be \(3, 2, tokens, 6\), got shape \(2, 2, 6\)", dict(k=K[0])),
        (ValueError, "k and v must have the same number of tokens, got 2 and 1", dict(v=V[:, :, :1])),
        (ValueError, r"lengths must be integers of shape \(3,\), got int64 \(2,\)", dict(lengths=torch.tensor([1, 2]))),
        (ValueError, r"lengths must be integers of shape \(3,\), got float32 \(3,\)", dict(lengths=torch.ones(3))),
        (ValueError, r"lengths must lie between 0 and the 2 .*got \[1, 3, 0\]", dict(lengths=torch.tensor([1, 3, 0]))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("page_size", [None, 4])
def test_wrong_arguments(error, message, changes, page_size):
    cache = make(page_size)
    with pytest.raises(error, match=message):
        cache.append(**dict(k=K, v=V) | changes)
    assert cache.seqlens.eq(0).all() and cache.k.eq(0).all()


def test_capacity_is_made_of_whole_pages():
    with pytest.raises(ValueError, match="capacity must be a multiple of page_size, got 16 and 3"):
        make(3)


def test_example_in_the_docstring():
    results = doctest.testmod(kv_cache)
    assert results.attempted >= 7 and results.failed == 0
