"""How many heads run together: those whose streamed operands fit in the L2 cache beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo

# Of the L2, for what is streamed. On an H200 groups of 4 to 32 MB were within 8 % of the fastest at every size tried; all
# heads at once cost up to 15 % at N = 16384.
_L2_SHARE = 0.2
_LEAST, _MOST = 0.5, 1.5  # of the share, that a group may take


def heads_per_group(heads: int, bytes_per_head: int, sharing: int, device: DeviceInfo) -> int:
    """Heads that run together; ``sharing`` of them stream the same operands.

    Of the sizes near the cache's share the one that leaves most heads to the last group, and then the largest: that
    group's tiles are what balances the multiprocessors at the end, and two heads' are too few (10 % of the time at
    32 heads of 4096 rows).
    """
    share = max(2.0, device.l2_bytes * _L2_SHARE / max(1, bytes_per_head))
    least, most = max(1, round(share * _LEAST)), max(2, int(share * _MOST))
    sizes = [min(heads, count * sharing) for count in range(least, most + 1)]
    return max(sizes, key=lambda size: ((heads - 1) % size + 1, size))
