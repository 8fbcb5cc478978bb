"""Compiled kernels read without a GPU: resources and loops of a cubin, through the cuobjdump that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;&?]*)")
_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


@dataclass(frozen=True)
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
        lines = _cuobjdump("-sass", self.binary).splitlines()
        found = (_INSTRUCTION.match(line) for line in lines)
        return tuple((int(m[1], 16), m[2], m[3]) for m in found if m)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Innermost loops, that is bodies of backward branches that hold no other."""
        spans = set()
        for address, name, operands in self.instructions:
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            if target and int(target[1], 16) < address:
                spans.add((int(target[1], 16), address))
        inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return tuple(self._loop(*span) for span in sorted(inner))

    def count(self, name: str) -> int:
        """Instructions of this name (without modifiers) in the whole kernel."""
        return self._loop(0, 1 << 62)[name]

    @cached_property
    def _resources(self) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", _cuobjdump("-res-usage", self.binary))}

    def _loop(self, start: int, stop: int) -> Loop:
        modified = Counter(name for address, name, _ in self.instructions if start <= address <= stop)
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
