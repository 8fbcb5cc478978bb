"""How a spec will run: a kernel configuration, where it came from, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING

from lla_compile.spec import LLASpec

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo

SCHEDULES = ("fused", "split")


@dataclass(frozen=True)
class KernelConfig:
    """The tunable knobs: an entry's ``plan`` in the database.

    Args:
        backend: name of a backend, e.g. "triton" or "eager".
        schedule: "fused" (one launch runs all sweeps of a query tile) or "split" (one launch a sweep).
        block_q: query rows of a tile, B_r.
        block_k: keys of a tile, B_c.
        cg_max_iters: cap on the CG iterations unless the caller gives one.
        num_warps: warps of a program; None where the backend has no such knob.
        num_stages: depth of the software pipeline over key tiles; None likewise.
    """

    backend: str
    schedule: str
    block_q: int
    block_k: int
    cg_max_iters: int
    num_warps: int | None = None
    num_stages: int | None = None

    def as_dict(self) -> dict:
        """The knobs that are set, in the order of the database."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, knobs: dict) -> KernelConfig:
        """Inverse of :meth:`as_dict`; raises ValueError on a missing or unknown knob."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(knobs) - known):
            raise ValueError(f"unknown plan knob {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            return cls(**knobs)
        except TypeError as error:
            raise ValueError(f"incomplete plan: {error}") from None

    def describe(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.as_dict().items())


class Source(Enum):
    """Where a configuration came from, best first."""

    EXACT = "tuned for this device and bucket"
    NEAREST = "tuned for this device, another bucket"
    SAME_ARCH = "tuned for another device of this compute capability"
    HEURISTIC = "heuristic default"
    REQUESTED = "given by the caller"


@dataclass(frozen=True)
class Plan:
    """The decision for one spec on one device; ``print(plan)`` explains it.

    Attributes:
        spec: what is computed.
        device: where.
        config: the kernel configuration.
        source: how well the configuration fits.
        distance: octaves between the bucket that was tuned and the one that is asked for; 0 when exact or heuristic.
        reason: one sentence on how the configuration was found.
    """

    spec: LLASpec
    device: DeviceInfo
    config: KernelConfig
    source: Source
    distance: float
    reason: str
    notes: tuple[str, ...] = field(default=())

    @property
    def cg_max_iters(self) -> int:
        """The cap in force: the caller's, else the configuration's."""
        return self.spec.cg_max_iters or self.config.cg_max_iters
