"""A decoding plan in parts bound to its kernels: what a call passes to them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Callable

import torch

from lla_compile.backends.cuda import compiler, part_kernels, runtime
from lla_compile.backends.cuda.part_source import print_parts
from lla_compile.backends.part_layout import part_numel
from lla_compile.backends.scalars import scalars_of
from lla_compile.storage import layout

if TYPE_CHECKING:
    from pathlib import Path

    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_ALIGNMENT = 16  # bytes; of whatever is copied asynchronously


def precompile_parts(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what calls with aligned tensors need."""
    for kernel in part_kernels.kernels(spec, config, device):
        defines = kernel.defines | {"ALIGNED": "1"}
        compiler.compile_kernel(kernel.source, defines, device.compute_capability, kernel.printed)


def build_parts(spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
    """Compile what any call needs into ``folder``; returns the files."""
    return [
        compiler.build_kernel(
            kernel.source, kernel.defines | {"ALIGNED": aligned}, device.compute_capability, folder, kernel.printed
        )
        for kernel in part_kernels.kernels(spec, config, device)
        for aligned in ("1", "0")
    ]


class PartLauncher:
    """Executable of a plan; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        self._plan = plan
        spec, splits = plan.spec, plan.config.num_splits
        self._program = print_parts(spec.op).program
        self._kernels = part_kernels.kernels(spec, plan.config, plan.device)
        self._element_alignment = _ALIGNMENT // getattr(torch, spec.dtype).itemsize
        rows = spec.batch * spec.num_heads * spec.seqlen_q
        self.workspace_numel = rows * splits * part_numel(self._program, spec) if splits > 1 else 0
        inputs = len(self._program.row_inputs)
        # PartArguments of part_arguments.cuh: pointers, strides, numbers.
        self._arguments = struct.Struct(f"{inputs + 7}Q{3 * (inputs + 3) + 1}qf6i0q")
        self._bound: dict[tuple, list[Callable]] = {}

    def __call__(self, inputs, wanted):
        spec, program = self._plan.spec, self._program
        q, k, v = (inputs[name] for name in "qkv")
        *_, scale_tensor, scale = scalars_of(inputs)
        out = inputs.get("out")
        if out is None:
            out = layout(program, "out", q, k, v, spec.precision, packed=False).empty(q)
        parts = inputs.get("workspace")
        if parts is None and self.workspace_numel:
            parts = q.new_empty(self.workspace_numel, dtype=torch.float32)
        read = [inputs[name] for name in (*program.row_inputs, *program.col_inputs)]
        strides = [stride for x in read for stride in x.stride()[:3]]
        aligned = not any(x.data_ptr() % _ALIGNMENT for x in read) and not any(
            stride % self._element_alignment for stride in strides
        )
        table = inputs.get("block_table")
        pointers = map(_pointer, (*read, inputs["seqlens"], table, scale_tensor, parts, out))
        packed = self._arguments.pack(
            *pointers, *strides, *out.stride()[:3], 0 if table is None else table.stride(0), scale, spec.num_kv_heads,
            spec.group_size, spec.seqlen_q, spec.seqlen_k, spec.window_size or 0, self._plan.config.num_splits,
        )  # fmt: skip
        launches = self._bound.get((aligned, q.device))
        if launches is None:
            launches = self._bound[aligned, q.device] = self._bind(aligned)
        runtime.launch(launches, packed, q.device)
        return {name: out for name in wanted}

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
