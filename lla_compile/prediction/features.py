"""What the model wants to know of a kernel, read from its machine code: resources, and the work of its loops."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Iterable, Mapping, Sequence

from lla_compile.prediction.cubin import Cubin, Loop

_LANES = 32
_SPECIAL = ("MUFU", "F2F", "F2I", "I2F")  # on the pipe of special functions: a conversion costs as much as an exp2
_SHARED = ("LDS", "LDSM", "STS")
_MATRIX = re.compile(r"[A-Z]*?(HGMMA|HMMA|MMA)\.(?:(\d+)x(\d+)x(\d+)|(\d+))")
_MATRIX_NAMES = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA")
_MATRIX_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_WARPS_OF_A_GROUP = 4


@dataclass(frozen=True)
class LoopMix:
    """One turn of a loop, for one warp.

    Attributes:
        issue: instructions.
        special: those of the special-function pipe.
        matrix: tile products of the tensor cores.
        matrix_flops: their work where the binary tells their shape; 0 where only the kernel's descriptors do.
        grouped: whether four warps issue them together (HGMMA).
        waits: times that the warp waits for tile products to end.
        barriers: times that the block's warps wait for each other.
        shared_bytes: moved between registers and shared memory.
        copied_bytes: copied from global to shared memory behind the warp's back.
        loaded_bytes: loaded from global memory into registers.
        local: accesses of local memory, that is of spilled registers.
        signals: instructions on barriers in shared memory, by which groups of warps wait for each other.
        inner: innermost loops that it goes through besides; 0 of an innermost one.
    """

    issue: int
    special: int
    matrix: int
    matrix_flops: int
    grouped: bool
    waits: int
    barriers: int
    shared_bytes: int
    copied_bytes: int
    loaded_bytes: int
    local: int
    signals: int = 0
    inner: int = 0

    @property
    def loads(self) -> bool:
        """Whether it brings data from global memory: the loops over tiles do."""
        return self.copied_bytes + self.loaded_bytes > 0

    @property
    def masked(self) -> bool:
        """Whether it tests what it loads, which keeps copies from running behind the warp's back."""
        return self.loaded_bytes > 0

    @classmethod
    def of(cls, loop: Loop, inner: int = 0) -> LoopMix:
        counts = loop.counts
        flops, grouped = _matrix_flops(loop.modified)
        return cls(
            issue=sum(counts.values()),
            special=sum(counts[name] for name in _SPECIAL),
            matrix=sum(counts[name] for name in _MATRIX_NAMES),
            matrix_flops=flops,
            grouped=grouped,
            waits=sum(n for name, n in loop.modified.items() if name.startswith("WARPGROUP.DEPBAR")),
            barriers=counts["BAR"],
            shared_bytes=_bytes(loop.modified, _SHARED),
            copied_bytes=_bytes(loop.modified, ("LDGSTS",)),
            loaded_bytes=_bytes(loop.modified, ("LDG",)),
            local=counts["LDL"] + counts["STL"],
            signals=counts["SYNCS"],
            inner=inner,
        )

    @classmethod
    def sum_of(cls, *parts: tuple[LoopMix, float]) -> LoopMix:
        """Several loops, each turned so many times."""
        totals = {
            f.name: sum(getattr(mix, f.name) * times for mix, times in parts)
            for f in fields(cls)
            if f.name not in ("grouped", "inner")
        }
        return cls(**totals, grouped=any(mix.grouped for mix, _ in parts))


@dataclass(frozen=True)
class KernelFeatures:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        num_warps: warps of a block.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        stack: bytes of local memory of a thread.
        issue: instructions of the whole kernel, each counted once.
        loops: in the order of the code, the innermost loops that use tensor cores; of kernels whose warps do different
            things also those that copy, and what is around several that use tensor cores.
    """

    name: str
    num_warps: int
    registers: int
    shared: int
    stack: int
    issue: int
    loops: tuple[LoopMix, ...]

    @classmethod
    def of(cls, cubin: Cubin, by_hand: bool = False) -> KernelFeatures:
        """Read a kernel; one that is written ``by_hand`` jumps over what a turn rarely needs, such as masks."""
        mixes = _loops_by_hand(cubin) if by_hand else tuple(map(LoopMix.of, cubin.loops))
        return cls(
            name=cubin.name,
            num_warps=cubin.num_warps,
            registers=cubin.registers,
            shared=cubin.shared,
            stack=cubin.stack,
            issue=len(cubin.instructions),
            loops=tuple(mix for mix in mixes if mix.matrix or by_hand and mix.copied_bytes),
        )

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> KernelFeatures:
        return cls(**(dict(values) | {"loops": tuple(LoopMix(**mix) for mix in values["loops"])}))


def _loops_by_hand(cubin: Cubin) -> tuple[LoopMix, ...]:
    """Ordinary turns of the innermost loops, and of what is around several that use tensor cores."""
    found = {loop.start: LoopMix.of(cubin.ordinary_turn(loop)) for loop in cubin.loops}
    around = sorted(cubin.enclosing.items(), key=lambda item: item[0].stop - item[0].start)
    for loop, inner in around:
        if len(inner) > 1 and all(found[x.start].matrix for x in inner):
            found[loop.start] = LoopMix.of(loop, len(inner))
    # Warps that weigh copy by themselves in an ordinary turn, and by loops inside where keys are masked.
    for loop, inner in around:
        if loop["MUFU"] and loop["LDGSTS"] and not loop["HGMMA"] and _only_copy(found[x.start] for x in inner):
            found[loop.start] = LoopMix.of(cubin.ordinary_turn(loop))
            break
    return tuple(mix for _, mix in sorted(found.items()))


def _only_copy(mixes: Iterable[LoopMix]) -> bool:
    return all(mix.copied_bytes and not (mix.matrix or mix.signals) for mix in mixes)


def _matrix_flops(modified: Counter) -> tuple[int, bool]:
    """Flops of a warp's share in the tile products, and whether they are issued by groups of warps."""
    flops, grouped = 0, False
    for name, count in modified.items():
        shape = _MATRIX.match(name)
        if shape is None:
            continue
        sizes = tuple(map(int, shape.groups()[1:4])) if shape[2] else _MATRIX_SHAPES.get(shape[5], (0, 0, 0))
        work = 2 * sizes[0] * sizes[1] * sizes[2] * count
        if shape[1] == "HGMMA":
            grouped, work = True, work // _WARPS_OF_A_GROUP
        flops += work
    return flops, grouped


def _bytes(modified: Counter, names: Sequence[str]) -> int:
    """What a warp moves by these instructions."""
    moved = 0
    for name, count in modified.items():
        parts = name.split(".")
        if parts[0] in names:
            moved += count * _LANES * (_matrix_load(parts) if parts[0] == "LDSM" else _width(parts))
    return moved


def _width(parts: Sequence[str]) -> int:
    """Bytes that a lane moves: 4 unless a modifier says otherwise."""
    widths = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((widths[part] for part in parts if part in widths), 4)


def _matrix_load(parts: Sequence[str]) -> int:
    """Bytes that a lane gets: 4 of each 8 x 8 matrix."""
    return 4 * (int(parts[-1]) if parts[-1].isdigit() else 1)
