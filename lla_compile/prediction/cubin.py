"""Compiled kernels read without a GPU: resources and loops of a cubin, through the cuobjdump that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;&?]*)")
_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
_CONDITION = re.compile(r"\bU?P\d")  # of a jump, among its operands
_DIVERGENCE = (".DIV", ".CONV")  # jumps that a warp takes only where its lanes have parted
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True, eq=False)
class Loop:
    """The instructions between a backward branch and its target.

    Attributes:
        start, stop: addresses of the target and of the branch.
        counts: by name: ``{"HGMMA": 8, "LDL": 0, ...}``.
        modified: by name with modifiers, which tell widths and shapes: ``{"HGMMA.64x64x16.F32.BF16": 8, ...}``.
    """

    start: int
    stop: int
    counts: Counter
    modified: Counter

    def __getitem__(self, name: str) -> int:
        return self.counts[name]


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    Attributes:
        name: of the kernel.
        num_warps: warps of a block.
        shared: bytes of shared memory of a block, static and dynamic.
        binary: the cubin.
    """

    name: str
    num_warps: int
    shared: int
    binary: bytes = field(repr=False)

    @cached_property
    def registers(self) -> int:
        return self._resources["REG"]

    @cached_property
    def stack(self) -> int:
        """Bytes of local memory that a thread keeps, spilled registers among them."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @cached_property
    def instructions(self) -> tuple[tuple[int, str, str], ...]:
        """(address, name with modifiers, operands) of every machine instruction."""
        return tuple((int(m[1], 16), m[3], m[4]) for m in self._listing)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Innermost loops, that is bodies of backward branches that hold no other."""
        spans = self._spans
        inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return tuple(self._loop(*span) for span in sorted(inner))

    @cached_property
    def enclosing(self) -> dict[Loop, tuple[Loop, ...]]:
        """The bodies of loops around innermost ones, without these, and the innermost ones that each holds."""
        around: dict[tuple[int, int], list[Loop]] = {}
        for loop in self.loops:
            own = loop.start, loop.stop
            holders = [span for span in self._spans if span != own and span[0] <= own[0] and own[1] <= span[1]]
            if holders:
                around.setdefault(min(holders, key=lambda span: span[1] - span[0]), []).append(loop)
        found = {}
        for span, inner in around.items():
            own = self._loop(*span)
            for loop in inner:
                own.counts.subtract(loop.counts)
                own.modified.subtract(loop.modified)
            found[own] = tuple(inner)
        return found

    def ordinary_turn(self, loop: Loop) -> Loop:
        """What a turn of an innermost loop executes where it jumps over all that it can: of the ways through it that
        have the most tile products (exponentials if it has none), then copies to shared memory, then signals of
        barriers, the shortest."""
        body = [i for i, (address, _, _) in enumerate(self.instructions) if loop.start <= address <= loop.stop]
        product = next((name for name in ("HGMMA", "HMMA") if loop[name]), "MUFU")
        places = {self.instructions[i][0]: i for i in body}
        best: dict[int, tuple[tuple[int, ...], int | None]] = {}  # what lies before the end, and the next instruction
        for i in reversed(body):
            address, name, operands = self.instructions[i]
            worth = name.partition(".")[0]
            own = (worth == product, worth == "LDGSTS", worth == "SYNCS", -1)
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            ways = [places.get(int(target[1], 16))] if target else []
            if i + 1 in best and (not name.startswith(("BRA", *_ENDS)) or self._is_conditional(i)):
                ways.append(i + 1)
            ways = [way for way in ways if way in best and way > i]
            if address == loop.stop:
                best[i] = own, None
            elif ways:
                way = max(ways, key=lambda w: best[w][0])
                best[i] = tuple(map(sum, zip(own, best[way][0]))), way
        if body[0] not in best:
            return loop
        names, at = Counter(), body[0]
        while at is not None:
            names[self.instructions[at][1]] += 1
            at = best[at][1]
        return _counted(loop.start, loop.stop, names)

    def count(self, name: str) -> int:
        """Instructions of this name (without modifiers) in the whole kernel."""
        return self._loop(0, 1 << 62)[name]

    @cached_property
    def _resources(self) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", _cuobjdump("-res-usage", self.binary))}

    @cached_property
    def _listing(self) -> tuple[re.Match, ...]:
        found = (_INSTRUCTION.match(line) for line in _cuobjdump("-sass", self.binary).splitlines())
        return tuple(match for match in found if match)

    @cached_property
    def _spans(self) -> frozenset[tuple[int, int]]:
        """(target, address) of the backward branches."""
        spans = set()
        for address, name, operands in self.instructions:
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            if target and int(target[1], 16) < address:
                spans.add((int(target[1], 16), address))
        return frozenset(spans)

    def _is_conditional(self, place: int) -> bool:
        """Whether a jump may be passed."""
        _, predicate, name, operands = self._listing[place].groups()
        return bool(predicate or _CONDITION.search(operands)) or any(part in name for part in _DIVERGENCE)

    def _loop(self, start: int, stop: int) -> Loop:
        return _counted(start, stop, Counter(name for at, name, _ in self.instructions if start <= at <= stop))


def _counted(start: int, stop: int, modified: Counter) -> Loop:
    counts: Counter = Counter()
    for name, count in modified.items():
        counts[name.partition(".")[0]] += count
    return Loop(start, stop, counts, modified)


def _cuobjdump(option: str, binary: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
