"""Which loops of a kernel turn over tiles, and which warps take them: told by what the loops contain.

Three layouts are known. Where every warp does the same, one loop copies and multiplies. Where groups of warps divide
the work, one has a loop that copies, each other one a loop that multiplies, and they wait for each other: a turn is
both of them. Where a turn goes through its keys in steps, the loops that multiply are inside the one that copies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Sequence

from lla_compile.prediction.features import KernelFeatures, LoopMix
from lla_compile.prediction.workload import Pass

_GROUP = 4  # warps, of those that copy and of each of those that multiply
# Stages that are not being copied to: one is multiplied; the one before it, or the one that is weighed; all three.
_IN_USE, _IN_USE_BY_GROUPS, _IN_USE_WEIGHED = 1, 2, 3
_STEP = 16  # keys that a matrix instruction of one warp takes
_INNER = 3  # loops of a turn in steps: one makes weights, one multiplies with keys, one with values


class Unpredictable(ValueError):
    """The model does not know the device or the kernel well enough; the message says what is missing."""


@dataclass(frozen=True)
class Part:
    """Warps of a block that do the same.

    Attributes:
        mix: what one of them executes in a turn.
        warps: how many they are.
        groups: of these warps that do not wait for each other.
        ahead: whether products of a tile run while the next one's weights are made.
        latencies: of copies to shared memory, that pass in a turn: of the tiles of a turn over those under way.
    """

    mix: LoopMix
    warps: float
    groups: float = 1.0
    ahead: bool = False
    latencies: float = 0.0


Turn = tuple[Part, ...]


def turns_of_passes(kernel: KernelFeatures, passes: Sequence[Pass]) -> list[tuple[Turn, Turn]]:
    """One turn over an unmasked and one over a masked tile, for each sweep of a kernel.

    Raises:
        Unpredictable: the kernel has other loops than its sweeps need.
    """
    if any(loop.signals and not loop.matrix for loop in kernel.loops):
        return _of_groups(kernel, passes)
    if any(loop.inner == _INNER for loop in kernel.loops):
        return _in_steps(kernel, passes)
    return _of_all_warps(kernel, passes)


def _of_all_warps(kernel: KernelFeatures, passes: Sequence[Pass]) -> list[tuple[Turn, Turn]]:
    """One to three loops a sweep: the last turns over masked tiles, of three the second over others, of two the
    first."""
    loading = [loop for loop in kernel.loops if loop.matrix and loop.loads and not loop.inner]
    each, rest = divmod(len(loading), len(passes))
    if rest or not 1 <= each <= 3:
        raise _unknown(kernel, len(loading), passes)
    groups = [loading[i * each : (i + 1) * each] for i in range(len(passes))]
    pairs = [(group[1] if each == 3 else group[0], group[-1]) for group in groups]

    def turn(mix: LoopMix, own: Pass) -> Turn:
        # Threads wait for each other whenever a tile has come, where stages are counted.
        return (Part(mix, kernel.num_warps, latencies=_latencies(max(mix.barriers, 1), own, _IN_USE)),)

    return [(turn(hot, own), turn(masked, own)) for (hot, masked), own in zip(pairs, passes)]


def _of_groups(kernel: KernelFeatures, passes: Sequence[Pass]) -> list[tuple[Turn, Turn]]:
    """Loops that multiply, in the order of the sweeps, and those of the group that copies.

    Sweeps of a solver that follow each other stream the same tiles, which are copied by one loop. A loop that makes
    weights besides does so for a product in one term and one in two, of which the first has two tiles a turn, each
    waited for once.
    """
    multiplying = [loop for loop in kernel.loops if loop.grouped]
    copying = [loop for loop in kernel.loops if loop.signals and not loop.matrix]
    in_use = _IN_USE_BY_GROUPS
    groups = 1.0
    if weighing := [loop for loop in copying if loop.special]:
        # Warps that weigh may have tiles of their own, and turn once in several tiles. Signals are of more than copies.
        share = min(1.0, _tile_bytes(passes[0]) / (_GROUP * weighing[0].copied_bytes))
        copying = [replace(LoopMix.sum_of((loop, share)), signals=1) for loop in weighing]
        groups = 1 / share
        in_use = _IN_USE_WEIGHED
        chosen = multiplying[0 if len(passes) == 1 and passes[0].terms == 2 else -1 :][:1]
        multiplying = [LoopMix.sum_of((loop, 1 / max(loop.waits, 1))) for loop in chosen]
    changes = [not (before.solves and after.solves) for before, after in zip(passes, passes[1:])]
    streams = [0, *itertools.accumulate(map(int, changes))]
    if len(multiplying) != len(passes) or len(copying) != 1 + streams[-1]:
        raise _unknown(kernel, len(multiplying), passes)
    warps, turns = kernel.num_warps - _GROUP, []
    for loop, stream, own in zip(multiplying, streams, passes):
        copies = copying[stream]
        rows = Part(loop, warps, warps / _GROUP, ahead=True)
        turns.append((rows, Part(copies, _GROUP, groups, latencies=_latencies(copies.signals, own, in_use))))
    return [(turn, turn) for turn in turns]


def _in_steps(kernel: KernelFeatures, passes: Sequence[Pass]) -> list[tuple[Turn, Turn]]:
    """Half of the warps multiply with keys, the others with values; weights are made by as many as have keys to."""
    around = [place for place, loop in enumerate(kernel.loops) if loop.inner == _INNER]
    if len(passes) != 1 or len(around) > 2:
        raise _unknown(kernel, len(around), passes)
    (own,) = passes
    place = around[0 if own.terms == 2 else -1]
    outer, weigh, *products = kernel.loops[place : place + 1 + _INNER]
    steps = own.streamed / _STEP
    turn = tuple(
        Part(
            LoopMix.sum_of((outer, 1), (weigh, steps / kernel.num_warps), (product, steps)), kernel.num_warps / 2,
            latencies=_latencies(1, own, _IN_USE_BY_GROUPS),
        )
        for product in products
    )  # fmt: skip
    return [(turn, turn)]


def _latencies(tiles: int, own: Pass, in_use: int) -> float:
    """Of the copies of a turn; none where the stages are the compiler's."""
    return tiles / max(own.stages - in_use, 1) if own.stages else 0.0


def _tile_bytes(own: Pass) -> float:
    """Of the keys and values of a turn, in numbers of 16 bits."""
    return 2.0 * own.streamed * own.columns


def _unknown(kernel: KernelFeatures, loops: int, passes: Sequence[Pass]) -> Unpredictable:
    return Unpredictable(f"{kernel.name} has {loops} loops over tiles for {len(passes)} sweep(s)")
