"""Which keys a query sees, as integer arithmetic that every backend shares.

Query i of N sees key j of M when ``j <= i + M - N`` (causal, aligned at the bottom right) and, with a window,
``j > i + M - N - window_size``. Without ``is_causal`` it sees all keys.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple


class KeyRange(NamedTuple):
    """Keys of a tile of query rows: ``[start, stop)`` some row sees, ``[full_start, full_stop)`` every row sees.

    ``start <= full_start <= full_stop <= stop`` always; equal ends mean an empty range.
    """

    start: int
    stop: int
    full_start: int
    full_stop: int

    def tiles(self, block_k: int) -> Iterator[tuple[int, int, bool]]:
        """Cut the range into tiles ``(key_start, key_stop, needs_mask)`` of at most ``block_k`` keys."""
        for key_start in range(self.start, self.stop, block_k):
            key_stop = min(key_start + block_k, self.stop)
            yield key_start, key_stop, key_start < self.full_start or key_stop > self.full_stop


def key_range(
    row_start: int, row_stop: int, seqlen_q: int, seqlen_k: int, is_causal: bool, window_size: int | None = None
) -> KeyRange:
    """Keys seen by the query rows ``[row_start, row_stop)``, where ``row_start < row_stop <= seqlen_q``."""
    if not is_causal:
        return KeyRange(0, seqlen_k, 0, seqlen_k)
    offset = seqlen_k - seqlen_q
    window = seqlen_q + seqlen_k if window_size is None else window_size  # wider than any distance: no window
    stop = max(row_stop + offset, 0)
    start = min(max(row_start + offset - window + 1, 0), stop)
    full_start = min(max(row_stop + offset - window, 0), stop)
    full_stop = max(row_start + offset + 1, full_start)
    return KeyRange(start, stop, full_start, full_stop)


def first_row_with_keys(seqlen_q: int, seqlen_k: int, is_causal: bool) -> int:
    """Rows below this one see no key; every row from it on sees at least one."""
    if is_causal:
        return max(seqlen_q - seqlen_k, 0)
    return 0 if seqlen_k else seqlen_q


def is_visible(i, j, seqlen_q: int, seqlen_k: int, window_size: int | None = None):
    """Whether query ``i`` sees key ``j`` under the causal mask; integers or broadcastable integer tensors."""
    distance = i + (seqlen_k - seqlen_q) - j
    return distance >= 0 if window_size is None else (distance >= 0) & (distance < window_size)
