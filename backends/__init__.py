"""Backends turn a planned spec into something that runs. This file is their common interface and their registry."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import TYPE_CHECKING, Mapping, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

# In order of preference when nothing is tuned.
NAMES = ("triton", "cuda", "eager")


class Executable(Protocol):
    """A plan bound to everything but the tensors: calling it launches work and never waits for it.

    Attributes:
        workspace_numel: in phase "decode", how many float32 numbers a call wants as scratch memory; 0 for none.
    """

    workspace_numel: int

    def __call__(
        self, inputs: Mapping[str, torch.Tensor | float], wanted: tuple[str, ...]
    ) -> Mapping[str, torch.Tensor]:
        """Compute outputs of the plan's sweeps (see :class:`lla_compile.sweeps.SweepList`).

        Args:
            inputs: by name. In phases "forward" and "backward" the row and key inputs of the sweeps, with a last stride
                of 1; what is given, laid out as :func:`lla_compile.storage.layout` does; ``ridge`` of operators that
                solve, a number or a (B, Hq, N) tensor; ``scale``, a number or a 0-dim tensor; ``cu_seqlens_q`` and
                ``cu_seqlens_k``, int32, if sequences are packed.
                In phase "decode", with last strides of 1: ``q`` (B, Hq, Nq, D), and ``r`` like it in op "parallax";
                ``k`` and ``v``, (B, Hkv, M, width) or pages (pages, Hkv, page_size, width), with any other strides; ``ridge`` and ``scale`` as above;
                ``seqlens``, contiguous int32 (B,), cut to 0 .. ``spec.seqlen_k`` by the backend, or None where every
                sequence has that many keys; ``block_table``, contiguous int32 (B, pages of a sequence), if there are
                pages; and if the caller gave them ``out`` (B, Hq, Nq, Dv) to write into, and ``workspace``, 1-D, at
                least ``workspace_numel`` long. Query i sees keys j <= seqlens[b] - Nq + i, with a window the last of
                them; one that sees none gives zeros. Slots, pages and numbers of pages that no query needs may be
                anything.
            wanted: the outputs to compute; nothing that only others depend on is.

        Returns:
            ``wanted`` by name, as :func:`lla_compile.storage.layout` lays them out.
        """


class Binary(NamedTuple):
    """A compiled kernel: its name, the warps and the bytes of shared memory of a block, and its cubin."""

    name: str
    num_warps: int
    shared: int
    cubin: bytes


class Backend(Protocol):
    """What the planner, the tuner and dispatch ask of a backend. All answers are cheap and need no device."""

    name: str

    def unsupported(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        """Why this backend cannot run ``spec`` on ``device``, or None if it can."""

    def unsupported_spec(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        """The same of any machine with such a device: what is installed on this one does not count."""

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        """The heuristic choice: always within :meth:`infeasible`'s limits."""

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        """What the heuristic passes over and a measurement may prefer: defaults of other schedules, within limits."""

    def search_space(self, spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
        """Values worth trying for each knob of KernelConfig but ``backend``."""

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        """The hardware limit that ``config`` breaks, or None: the one resource model of the backend."""

    def source_hash(self, spec: LLASpec, config: KernelConfig) -> str:
        """Hash of the sources that ``config`` compiles or runs."""

    def precompile(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
        """Compile into the backend's cache; callable from any process. Raises CompileError."""

    def binaries(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> list[Binary]:
        """The machine code of an ordinary call's kernels, in launch order, for a device that need not be there.

        Empty if the backend compiles none. Raises CompileError.
        """

    def bind(self, plan: Plan) -> Executable:
        """Compile (or load) the plan's kernels and return what launches them."""


class CompileError(RuntimeError):
    """A kernel did not compile, or needs more than the device has."""


@lru_cache(maxsize=None)
def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"lla_compile.backends.{name}").BACKEND
