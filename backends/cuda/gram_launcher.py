"""A decoding plan of the `gram` schedule bound to its kernels: what a call passes to them."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Callable

import torch

from lla_compile.backends.cuda import compiler, gram_kernels, runtime
from lla_compile.backends.gram_parts import part_numel
from lla_compile.backends.scalars import scalars_of
from lla_compile.lowering import lower
from lla_compile.storage import layout

if TYPE_CHECKING:
    from pathlib import Path

    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

# GramArguments of gram_arguments.cuh: pointers, strides, numbers.
ARGUMENTS = struct.Struct("12Q16q3f7i")
_ALIGNMENT = 16  # bytes; of the state, and of whatever is copied asynchronously


def precompile_gram(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what calls with aligned caches need."""
    for kernel in gram_kernels.kernels(spec, config, device):
        compiler.compile_kernel(kernel.source, kernel.defines | {"ALIGNED": "1"}, device.compute_capability)


def build_gram(spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
    """Compile what any call needs into ``folder``; returns the files.

    A plan serves other numbers of heads and sequences, in as many parts as they need, and some constants depend on those.
    """
    few = replace(spec, batch=1, num_heads=spec.group_size, num_kv_heads=1)
    kernels = {
        (kernel.source, tuple(kernel.defines.items())): kernel
        for shape in (few, replace(few, batch=device.sms + 1))
        for num_splits in (1, 2)
        for kernel in gram_kernels.kernels(shape, replace(config, num_splits=num_splits), device)
    }
    return [
        compiler.build_kernel(kernel.source, kernel.defines | {"ALIGNED": aligned}, device.compute_capability, folder)
        for kernel in kernels.values()
        for aligned in ("1", "0")
    ]


class GramLauncher:
    """Executable of the `gram` schedule; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        self._plan = plan
        spec, config = plan.spec, plan.config
        queries = spec.batch * spec.num_heads * spec.seqlen_q
        part = 4 * part_numel(spec)
        self._merges = config.num_splits > 1
        self._merged_at = queries * config.num_splits * part  # bytes from the first part
        self._state_bytes = self._merged_at + queries * part * self._merges
        self._kernels = gram_kernels.kernels(spec, config, plan.device)
        self._program = lower(spec.op, spec.phase)
        self._element_alignment = _ALIGNMENT // getattr(torch, spec.dtype).itemsize
        self._bound: dict[tuple, list[Callable]] = {}

    @property
    def workspace_numel(self) -> int:
        """The parts of every query, after them what they merge to, and room to align them."""
        return (self._state_bytes + _ALIGNMENT) // 4

    def __call__(self, inputs, wanted):
        spec, plan = self._plan.spec, self._plan
        q, k, v = (inputs[name] for name in "qkv")
        ridge_tensor, ridge, ridge_strides, scale_tensor, scale = scalars_of(inputs)
        results = {
            name: inputs[name]
            if name in inputs
            else layout(self._program, name, q, k, v, spec.precision, packed=False).empty(q)
            for name in wanted
        }
        workspace = inputs.get("workspace")
        if workspace is None:
            workspace = q.new_empty(self.workspace_numel, dtype=torch.float32)
        state = -(-workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        merged = state + self._merged_at if self._merges else state
        seqlens, table, out = inputs["seqlens"], inputs.get("block_table"), results["out"]
        cache_strides = (*k.stride()[:3], *v.stride()[:3])
        packed = ARGUMENTS.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), _pointer(seqlens), _pointer(table), _pointer(scale_tensor),
            _pointer(ridge_tensor), state, merged, out.data_ptr(), _pointer(results.get("iterations")),
            _pointer(results.get("final_residual")), *q.stride()[:3], *cache_strides, *out.stride()[:3], *ridge_strides,
            0 if table is None else table.stride(0), scale, ridge, plan.cg_tol, plan.cg_max_iters, spec.num_kv_heads,
            spec.group_size, spec.seqlen_q, spec.seqlen_k, spec.window_size or 0, plan.config.num_splits,
        )  # fmt: skip
        aligned = not (k.data_ptr() % _ALIGNMENT or v.data_ptr() % _ALIGNMENT) and not any(
            stride % self._element_alignment for stride in cache_strides
        )
        launches = self._bound.get((aligned, q.device))
        if launches is None:
            launches = self._bound[aligned, q.device] = self._bind(aligned)
        runtime.launch(launches, packed, q.device)
        return results

    def _bind(self, aligned: bool) -> list[Callable]:
        """The kernels as the runtime launches them; a plan without queries has none."""
        capability = self._plan.device.compute_capability
        return [
            runtime.load(kernel, kernel.defines | {"ALIGNED": str(int(aligned))}, capability)
            for kernel in self._kernels
            if kernel.grid[0]
        ]


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
