"""How many heads run together: those whose streamed operands fit in the L2 cache beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo

# Of the L2, for what is streamed. On an H200 groups of 4 to 32 MB were within 8 % of the fastest at every size tried; all
# heads at once cost up to 15 % at N = 16384.
_L2_SHARE = 0.2


def heads_per_group(heads: int, bytes_per_head: int, sharing: int, device: DeviceInfo) -> int:
    """Heads that run together, in groups of about equal size; ``sharing`` of them stream the same operands."""
    together = max(2, int(device.l2_bytes * _L2_SHARE) // max(1, bytes_per_head))
    groups = max(1, -(-heads // (together * sharing)))
    return max(1, -(-heads // groups))
