"""A plan of sweeps that hold query rows bound to its kernel: what a call passes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch

from lla_compile.backends.cuda import compiler, runtime, sweep_kernels
from lla_compile.backends.cuda.sweep_parts import print_sweeps
from lla_compile.backends.head_groups import heads_per_group
from lla_compile.backends.scalars import scalars_of
from lla_compile.storage import layout

if TYPE_CHECKING:
    from pathlib import Path

    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_ALIGNMENT = 16  # bytes; of whatever is copied asynchronously


def precompile_sweeps(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what calls with aligned tensors need."""
    for kernel in sweep_kernels.launches(spec, config, device):
        defines = kernel.defines | {"ALIGNED": "1"}
        compiler.compile_kernel(kernel.source, defines, device.compute_capability, kernel.printed)


def build_sweeps(spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
    """Compile what any call needs into ``folder``; returns the files."""
    return [
        compiler.build_kernel(
            kernel.source, kernel.defines | {"ALIGNED": aligned}, device.compute_capability, folder, kernel.printed
        )
        for kernel in sweep_kernels.launches(spec, config, device)
        for aligned in ("1", "0")
    ]


class SweepLauncher:
    """Executable of a plan; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        self._plan = plan
        spec, config = plan.spec, plan.config
        self._source = print_sweeps(spec.op, spec.phase, config.schedule)
        self._arguments = self._source.arguments
        self._kernels = sweep_kernels.launches(spec, config, plan.device, plan.cg_max_iters or 0)
        self._in_memory = self._source.state[int(self._kernels[-1].defines["PARKED"]) :]
        self._is_packed = spec.num_sequences is not None
        heads, item = spec.batch * spec.num_heads, getattr(torch, spec.dtype).itemsize
        self._element_alignment = _ALIGNMENT // item
        columns = spec.mean_seqlens[1] * (spec.head_dim + spec.head_dim_v) * item
        self._counts = (
            heads, spec.num_heads, spec.group_size, heads_per_group(heads, columns, spec.group_size, plan.device),
            spec.seqlen_q, spec.seqlen_k, spec.window_size or 0, spec.num_sequences or 0,
        )  # fmt: skip
        self._scalars = tuple(float(getattr(plan, name)) for name in self._source.program.scalars)
        self._bound: dict[tuple, list[Callable]] = {}

    def __call__(self, inputs, wanted):
        spec, program = self._plan.spec, self._source.program
        q, k, v = (inputs[name] for name in "qkv")
        ridge_tensor, ridge, ridge_strides, scale_tensor, scale = scalars_of(inputs)
        made = {
            name: layout(program, name, q, k, v, spec.precision, self._is_packed).empty(q)
            for name in dict.fromkeys((*wanted, *self._in_memory))
        }
        streamed = [inputs[name] for name in (*program.row_inputs, *program.col_inputs)]
        strides = [stride for x in streamed for stride in x.stride()[:3]]
        aligned = not any(x.data_ptr() % _ALIGNMENT for x in streamed) and not any(
            stride % self._element_alignment for stride in strides
        )
        for name, stored in program.outputs.items():
            if stored == "input":
                strides += made[name].stride()[:3] if name in made else (0, 0, 0)
        pointers = [x.data_ptr() for x in streamed]
        others = (name for name in self._source.state if name not in program.outputs)
        pointers += [_pointer(made.get(name)) for name in (*program.outputs, *others)]
        tables = (*self._ends(inputs), *self._loops_of_groups(q))
        scalars = {"ridge": (ridge_tensor, ridge, ridge_strides)}
        row_scalars = [scalars[name] for name in program.row_scalars]
        packed = self._arguments.pack(
            *pointers, _pointer(scale_tensor), *(_pointer(tensor) for tensor, _, _ in row_scalars), *strides,
            *(stride for _, _, of in row_scalars for stride in of), q.shape[0] * q.shape[1] * q.shape[2], scale,
            *(number for _, number, _ in row_scalars), *self._scalars, *self._counts, *map(_pointer, tables),
        )  # fmt: skip
        launches = self._bound.get((aligned, q.device))
        if launches is None:
            launches = self._bound[aligned, q.device] = self._bind(aligned)
        runtime.launch(launches, packed, q.device)
        return {name: made[name] for name in wanted}

    def _ends(self, inputs) -> tuple[torch.Tensor | None, ...]:
        """Where packed sequences end, and the memory of the table that says which tile runs when."""
        if not self._is_packed:
            return None, None, None
        ends_q, ends_k = inputs["cu_seqlens_q"], inputs["cu_seqlens_k"]
        return ends_q, ends_k, ends_q.new_empty((sweep_kernels.max_tiles(self._plan.spec, self._plan.config), 2))

    def _loops_of_groups(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Memory of which of the loops each group of rows is in, which `split` alone takes."""
        plan = self._plan
        if plan.config.schedule == "fused":
            return ()
        return (q.new_empty(sweep_kernels.row_groups(plan.spec, plan.config, plan.device), dtype=torch.int32),)

    def _bind(self, aligned: bool) -> list[Callable]:
        """The kernels as the runtime launches them; a plan without queries has none."""
        capability, alignment = self._plan.device.compute_capability, {"ALIGNED": str(int(aligned))}
        if not all(kernel.grid[0] for kernel in self._kernels):
            return []
        own = dict.fromkeys(self._kernels)
        loaded = {kernel: runtime.load(kernel, kernel.defines | alignment, capability) for kernel in own}
        return [loaded[kernel] for kernel in self._kernels]


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
