"""A plan of a backward pass bound to its kernels: what a call passes to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch

from lla_compile.backends.cuda import backward_kernels, compiler, runtime
from lla_compile.backends.cuda.backward_source import print_backward
from lla_compile.backends.head_groups import heads_per_group
from lla_compile.backends.scalars import scalars_of
from lla_compile.lowering import lower
from lla_compile.storage import layout

if TYPE_CHECKING:
    from pathlib import Path

    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_ALIGNMENT = 16  # bytes; of whatever is copied asynchronously


def precompile_backward(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what ordinary calls with aligned tensors need."""
    for kernel in backward_kernels.kernels(spec, config, device):
        defines = kernel.defines | {"ALIGNED": "1"}
        compiler.compile_kernel(kernel.source, defines, device.compute_capability, kernel.printed)


def build_backward(spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
    """Compile what calls for all gradients need into ``folder``, with that of the scale and without; returns the files."""
    program = lower(spec.op, "backward")
    found = {}
    for wanted in (program.ordinary, tuple(program.outputs)):
        for kernel in backward_kernels.kernels(spec, config, device, wanted):
            for aligned in ("1", "0"):
                path = compiler.build_kernel(
                    kernel.source, kernel.defines | {"ALIGNED": aligned}, device.compute_capability, folder,
                    kernel.printed,
                )  # fmt: skip
                found[path] = None
    return list(found)


class BackwardLauncher:
    """Executable of a `fused` plan; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        self._plan = plan
        spec, config = plan.spec, plan.config
        source = print_backward(spec.op)
        self._program, self._arguments, self._numbers = (source.program, source.arguments, len(source.numbers))
        self._table_rows = backward_kernels.table_rows(spec, config)
        self._is_packed = spec.num_sequences is not None
        self._row_tiles = backward_kernels.held_tiles(spec, spec.seqlen_q, config.block_q)
        self._key_tiles = backward_kernels.held_tiles(spec, spec.seqlen_k, config.holding_keys.block_k)
        heads, item = spec.batch * spec.num_heads, getattr(torch, spec.dtype).itemsize
        self._element_alignment = _ALIGNMENT // item
        length_q, length_k = (max(1, length) for length in spec.mean_seqlens)
        columns = length_k * (spec.head_dim + spec.head_dim_v) * item
        rows = length_q * (2 * spec.head_dim + spec.head_dim_v) * item * spec.group_size
        self._counts = (
            heads, spec.num_heads, spec.group_size, heads_per_group(heads, columns, spec.group_size, plan.device),
            heads_per_group(heads // spec.group_size, rows, 1, plan.device), spec.seqlen_q, spec.seqlen_k,
            spec.window_size or 0, self._table_rows, spec.num_sequences or 0,
        )  # fmt: skip
        self._bound: dict[tuple, list[Callable]] = {}

    def __call__(self, inputs, wanted):
        spec, program = self._plan.spec, self._program
        q, k, v = (inputs[name] for name in "qkv")
        _, _, _, scale_tensor, scale = scalars_of(inputs)
        made = {name: layout(program, name, q, k, v, spec.precision, self._is_packed).empty(q) for name in wanted}
        table = q.new_empty((q.shape[0] * q.shape[1] * self._table_rows * self._numbers,), dtype=torch.float32)
        read = [inputs[name] for name in (*program.row_inputs, *program.col_inputs)]
        strides = [stride for x in read for stride in x.stride()[:3]]
        aligned = not any(x.data_ptr() % _ALIGNMENT for x in read) and not any(
            stride % self._element_alignment for stride in strides
        )
        for name, stored in program.outputs.items():
            if stored == "input":
                strides += made[name].stride()[:3] if name in made else (0, 0, 0)
        pointers = [x.data_ptr() for x in (*read, *(inputs[name] for name in program.given))]
        pointers += [made[name].data_ptr() if name in made else 0 for name in program.outputs]
        pointers += [table.data_ptr(), 0 if scale_tensor is None else scale_tensor.data_ptr()]
        tables = self._tables(inputs)
        packed = self._arguments.pack(
            *pointers, *strides, scale, *self._counts, *(0 if x is None else x.data_ptr() for x in tables)
        )
        launches = self._bound.get((wanted, aligned, q.device))
        if launches is None:
            launches = self._bound[wanted, aligned, q.device] = self._bind(wanted, aligned)
        runtime.launch(launches, packed, q.device)
        return made

    def _tables(self, inputs) -> tuple[torch.Tensor | None, ...]:
        """Where packed sequences end, and the memory of the tables that say which tile of either side runs when."""
        if not self._is_packed:
            return None, None, None, None
        ends_q, ends_k = inputs["cu_seqlens_q"], inputs["cu_seqlens_k"]
        return ends_q, ends_k, ends_q.new_empty((self._row_tiles, 2)), ends_q.new_empty((self._key_tiles, 2))

    def _bind(self, wanted: tuple[str, ...], aligned: bool) -> list[Callable]:
        """The kernels as the runtime launches them; one without rows or keys to hold is left out."""
        spec, config, device = self._plan.spec, self._plan.config, self._plan.device
        return [
            runtime.load(kernel, kernel.defines | {"ALIGNED": str(int(aligned))}, device.compute_capability)
            for kernel in backward_kernels.kernels(spec, config, device, wanted)
            if kernel.grid[0]
        ]
