"""The inputs of a key: those that are timed, and the held-out ones whose error against float64 is checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lla_compile.devices import DeviceInfo
from lla_compile.precision import error_limit
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec

# Taken off the length of the held-out inputs to leave ragged tiles behind: 1024 becomes the odd 999.
_RAGGED = 25


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

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normal_inputs(self.spec, self.torch_device, "timed")


@dataclass(frozen=True)
class HeldOut:
    """Inputs that no trial is timed on, with the float64 reference of their output."""

    spec: LLASpec
    torch_device: torch.device
    ridges: tuple[float, ...]

    @cached_property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normal_inputs(self.spec, self.torch_device, "held out")

    @cached_property
    def references(self) -> dict[float, torch.Tensor]:
        scale = self.spec.head_dim**-0.5
        return {
            ridge: lla_reference(
                *self.inputs, ridge, scale=scale, is_causal=self.spec.is_causal, window_size=self.spec.window_size
            )
            for ridge in self.ridges
        }

    def limit(self, ridge: float) -> float:
        return error_limit(self.spec.dtype, self.spec.precision, ridge)

    def error(self, output: torch.Tensor, ridge: float) -> float:
        """||output - reference|| / ||reference||; NaN where the output has one."""
        reference = self.references[ridge]
        return ((output.double() - reference).norm() / reference.norm()).item()


def held_out(problem: Problem, seqlen: int, heads: int, ridges: tuple[float, ...]) -> tuple[HeldOut, ...]:
    """Held-out inputs of the key's own types and widths: one of at most ``seqlen`` keys, one shorter and ragged."""
    seqlen = min(seqlen, problem.spec.seqlen_k)
    heads = min(heads, problem.spec.batch_heads)
    lengths = {seqlen, max(1, seqlen - _RAGGED)}
    specs = (
        replace(problem.spec, batch=1, num_heads=heads, num_kv_heads=heads, seqlen_q=length, seqlen_k=length)
        for length in sorted(lengths, reverse=True)
    )
    return tuple(HeldOut(spec, problem.torch_device, ridges) for spec in specs)


def normal_inputs(spec: LLASpec, device: torch.device, purpose: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a spec: standard normal, the same in every run for the same spec and purpose."""
    digest = hashlib.sha256(f"{purpose}: {spec.describe()}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
    dtype = getattr(torch, spec.dtype)

    def normal(heads: int, length: int, width: int) -> torch.Tensor:
        shape = (spec.batch, heads, length, width)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return (
        normal(spec.num_heads, spec.seqlen_q, spec.head_dim),
        normal(spec.num_kv_heads, spec.seqlen_k, spec.head_dim),
        normal(spec.num_kv_heads, spec.seqlen_k, spec.head_dim_v),
    )
