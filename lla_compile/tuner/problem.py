"""What is tuned, and inputs for it: complete for the phase, and the same in every run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable

import torch
from torch import Tensor

from lla_compile.autograd import kept, saved
from lla_compile.backends import Executable
from lla_compile.devices import DeviceInfo
from lla_compile.lowering import lower
from lla_compile.spec import LLASpec

# Binds the forward pass that a backward pass belongs to.
BindForward = Callable[[LLASpec], Executable]


@dataclass(frozen=True)
class Problem:
    """One key to tune: a spec on a device.

    Attributes:
        spec: the problem that is timed.
        device: what the database knows of the device.
        torch_device: where tensors are made.
    """

    spec: LLASpec
    device: DeviceInfo
    torch_device: torch.device


@dataclass(frozen=True)
class Case:
    """Inputs of one spec; in phase "backward" with what the forward pass has saved, computed once for each ridge.

    Attributes:
        spec: what they are inputs of.
        torch_device: where they are.
        purpose: sets them apart from others of the same spec.
        bind_forward: where saved state comes from; only phase "backward" needs it.
        seqlens: in phase "decode" how many slots of the cache each sequence uses, NaN filling the others; None: all.
    """

    spec: LLASpec
    torch_device: torch.device
    purpose: str
    bind_forward: BindForward | None = None
    seqlens: tuple[int, ...] | None = None

    @property
    def ordinary(self) -> tuple[str, ...]:
        """The outputs of an ordinary call."""
        return lower(self.spec.op, self.spec.phase).ordinary

    def inputs(self, ridge: float | None) -> dict[str, Tensor | float | None]:
        """All that an executable of the spec reads, by name; ``ridge`` is None where the operator has none."""
        inputs = self._tensors | {"scale": self.spec.head_dim**-0.5}
        if ridge is not None:
            inputs["ridge"] = ridge
        if self.spec.phase != "backward":
            return inputs
        if ridge not in self._saved:
            # Solved to the tolerance of its own phase, as in a call that names none.
            forward = self.bind_forward(replace(self.spec, phase="forward", cg_tol=None))
            inputs_of_forward = {name: x for name, x in inputs.items() if name != "grad_out"}
            results = forward(inputs_of_forward, ("out", *saved(self.spec.op)))
            self._saved[ridge] = {name: results[name] for name in kept(self.spec.op)}
        return inputs | self._saved[ridge]

    @cached_property
    def _tensors(self) -> dict[str, Tensor | None]:
        tensors = normal_tensors(self.spec, self.torch_device, self.purpose)
        if self.spec.phase != "decode":
            return tensors
        if self.seqlens is None:
            return tensors | {"seqlens": None}
        for sequence, length in enumerate(self.seqlens):
            tensors["k"][sequence, :, length:] = float("nan")
            tensors["v"][sequence, :, length:] = float("nan")
        return tensors | {"seqlens": torch.tensor(self.seqlens, dtype=torch.int32, device=self.torch_device)}

    @cached_property
    def _saved(self) -> dict[float | None, dict[str, Tensor]]:
        return {}


def normal_tensors(spec: LLASpec, device: torch.device, purpose: str) -> dict[str, Tensor]:
    """Query, key, value, a given probe, and in phase "backward" the gradient of the output, by name.

    Standard normal, and the same in every run for the same spec and purpose; a probe is such that its products with keys
    are.
    """
    digest = hashlib.sha256(f"{purpose}: {spec.describe()}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
    dtype = getattr(torch, spec.dtype)
    shapes = {
        "q": (spec.num_heads, spec.seqlen_q, spec.head_dim),
        "k": (spec.num_kv_heads, spec.seqlen_k, spec.head_dim),
        "v": (spec.num_kv_heads, spec.seqlen_k, spec.head_dim_v),
    }
    if spec.op == "parallax":
        shapes["r"] = shapes["q"]
    if spec.phase == "backward":
        shapes["grad_out"] = (spec.num_heads, spec.seqlen_q, spec.head_dim_v)
    tensors = {
        name: torch.randn((spec.batch, *shape), generator=generator, device=device, dtype=torch.float32)
        for name, shape in shapes.items()
    }
    if "r" in tensors:
        tensors["r"] *= spec.head_dim**-0.5
    return {name: x.to(dtype) for name, x in tensors.items()}
