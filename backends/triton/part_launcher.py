"""Decoding plans of operators of one sweep: a pass over each part of the keys, and a merge where there are several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from lla_compile.backends.part_layout import part_numel
from lla_compile.backends.triton.compiler import compile_kernel, load_functions
from lla_compile.backends.triton.decode_launcher import DecodeLauncher, Launch, ordinary_absences
from lla_compile.backends.triton.launcher import constants
from lla_compile.backends.triton.source import print_module, print_parts

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

    from lla_compile.backends.triton.source import Module
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_MERGE_WARPS = 4


def module_of_parts(spec: LLASpec, config: KernelConfig) -> Module:
    """What is printed for a plan: one kernel where the keys are one part."""
    if config.num_splits == 1:
        return print_module(spec.op, spec.phase, config.schedule)
    return print_parts(spec.op)


def _constants(spec: LLASpec, config: KernelConfig, device: DeviceInfo, absent: frozenset[str]) -> tuple:
    """Names and values of the compile-time constants, in the kernels' order."""
    module = module_of_parts(spec, config)
    values = constants(spec, config, device, scale_tensor="scale_ptr" not in absent) | {
        "PAGE_SIZE": spec.page_size or 0,
        "PART": part_numel(module.program, spec),
        "BLOCK_SPLITS": triton.next_power_of_2(config.num_splits),
    }
    return tuple((name, values[name]) for name in module.constexprs)


def compile_parts(
    spec: LLASpec, config: KernelConfig, device: DeviceInfo, *, absent: frozenset[str], aligned: bool = True
) -> list[CompiledKernel]:
    """Compile the kernels of a plan, in launch order; ``absent`` names the pointers that are None."""
    module = module_of_parts(spec, config)
    functions = load_functions(module)
    return [
        compile_kernel(
            functions[kernel.name],
            module.parameters,
            dtype=spec.dtype,
            wide=False,
            constants=dict(_constants(spec, config, device, absent)),
            absent=absent & {name for name, _ in module.parameters},
            aligned=aligned,
            compute_capability=device.compute_capability,
            num_warps=config.num_warps if kernel is module.kernels[0] else _MERGE_WARPS,
            num_stages=config.num_stages,
        )
        for kernel in module.kernels
    ]


def precompile_parts(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what ordinary calls need."""
    for absent in ordinary_absences(spec.page_size is not None):
        compile_parts(spec, config, device, absent=absent)


class PartLauncher(DecodeLauncher):
    """The parts lie in the workspace."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        spec, config = plan.spec, plan.config
        self._rows = spec.batch * spec.num_heads * spec.seqlen_q
        numel = part_numel(module_of_parts(spec, config).program, spec)
        self.workspace_numel = self._rows * config.num_splits * numel if config.num_splits > 1 else 0

    def _own_arguments(self, inputs):
        if not self.workspace_numel:
            return {}
        parts = inputs.get("workspace")
        if parts is None:
            parts = inputs["q"].new_empty(self.workspace_numel, dtype=torch.float32)
        return {"parts_ptr": parts, "num_splits": self._plan.config.num_splits}

    def _bind(self, absent, aligned):
        spec, config, device = self._plan.spec, self._plan.config, self._plan.device
        module = module_of_parts(spec, config)
        if triton.knobs.runtime.interpret:
            functions = load_functions(module)
            runners = [functions[kernel.name] for kernel in module.kernels]
        else:
            runners = compile_parts(spec, config, device, absent=absent, aligned=aligned)
        tiles = triton.cdiv(spec.group_size * spec.seqlen_q, config.block_q)
        grids = [(spec.batch * spec.num_kv_heads * tiles, config.num_splits, 1), (self._rows, 1, 1)]
        names = tuple(name for name, _ in module.parameters)
        values = tuple(value for _, value in _constants(spec, config, device, absent))
        return [Launch(runner[grid], names, values) for runner, grid in zip(runners, grids)]
