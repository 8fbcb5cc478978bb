"""Key ranges of query tiles, against the mask written out."""

import pytest
import torch

from lla_compile import masks

SHAPES = [(1, 1), (7, 7), (5, 12), (12, 5), (1, 9), (9, 1)]


def visible(n, m, causal, window):
    """Dense (n, m) mask, from the definition."""
    rows = []
    for i in range(n):
        last = i + m - n
        rows.append([not causal or (j <= last and (window is None or last - j < window)) for j in range(m)])
    return torch.tensor(rows, dtype=torch.bool).reshape(n, m)


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 1), (True, 3), (True, 50)])
def test_ranges_and_tiles(n, m, causal, window):
    mask = visible(n, m, causal, window)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            keys = masks.key_range(start, stop, n, m, causal, window)
            rows = mask[start:stop]
            some, every = rows.any(0).nonzero().flatten(), rows.all(0).nonzero().flatten()
            assert list(range(keys.start, keys.stop)) == some.tolist()
            assert list(range(keys.full_start, keys.full_stop)) == every.tolist()
            assert keys.start <= keys.full_start <= keys.full_stop <= keys.stop
            for block in (1, 2, 5):
                covered = []
                for key_start, key_stop, needs_mask in keys.tiles(block):
                    assert 0 < key_stop - key_start <= block
                    assert needs_mask == (not rows[:, key_start:key_stop].all())
                    covered += range(key_start, key_stop)
                assert covered == some.tolist()


@pytest.mark.parametrize("n, m", SHAPES + [(4, 0), (0, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_first_row_with_keys(n, m, causal):
    has_keys = visible(n, m, causal, None).any(1)
    first = masks.first_row_with_keys(n, m, causal)
    assert not has_keys[:first].any() and has_keys[first:].all()


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_is_visible_on_tensors(n, m, window):
    i, j = torch.arange(n)[:, None], torch.arange(m)
    assert torch.equal(masks.is_visible(i, j, n, m, window), visible(n, m, True, window))
