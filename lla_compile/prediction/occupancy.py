"""How many blocks share a multiprocessor, and how long a grid of blocks takes on all of them."""

from __future__ import annotations

import numpy as np

from lla_compile.devices import DeviceInfo

_LANES = 32
_REGISTERS_OF_A_WARP = 256  # are handed out in units of so many
_SYSTEM_SHARED_BYTES = 1024  # of every block, from compute capability 8.0 on

# A grid of so many times the blocks that run at once is balanced: its end hardly shows.
_BALANCED = 4


def blocks_per_sm(registers: int, shared: int, num_warps: int, device: DeviceInfo) -> int:
    """Blocks that are resident together; 0 if not even one fits.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        num_warps: of a block.
        device: whose limits count.
    """
    of_a_warp = -(-registers * _LANES // _REGISTERS_OF_A_WARP) * _REGISTERS_OF_A_WARP
    limits = [
        device.registers_per_sm // (of_a_warp * num_warps) if registers else device.blocks_per_sm,
        device.shared_memory_per_sm // (shared + _SYSTEM_SHARED_BYTES),
        device.warps_per_sm // num_warps,
        device.blocks_per_sm,
    ]
    return min(limits) if shared <= device.shared_memory_per_block else 0


def makespan(durations: np.ndarray, copies: int | np.ndarray, slots: int) -> float:
    """The time until all blocks have run.

    Args:
        durations: of the blocks in launch order.
        copies: blocks of each duration, launched one after another; one number for all or one for each.
        slots: blocks that run at a time.
    """
    copies = np.broadcast_to(copies, durations.shape)
    if not copies.any():
        return 0.0
    total = float(durations @ copies)
    if copies.sum() > _BALANCED * slots:
        return max(total / slots + total / float(copies.sum()) / 2, float(durations.max()))
    free = np.zeros(slots)
    for duration, left in zip(durations, copies):
        if not duration:
            continue
        while left:
            # None of these slots is free for a second block before each has had its first.
            together = int((free < free.min() + duration).sum())
            count = min(left, together)
            if count < slots:
                free[np.argpartition(free, count - 1)[:count]] += duration
            else:
                free += duration
            left -= count
    return float(free.max())
