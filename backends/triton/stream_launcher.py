"""Decoding plans of the `fused` schedule: every sweep streams the cache, CG included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from lla_compile.backends.triton.compiler import compile_kernel, load_functions
from lla_compile.backends.triton.decode_launcher import DecodeLauncher, Launch, ordinary_absences
from lla_compile.backends.triton.launcher import constants, module_of
from lla_compile.lowering import lower
from lla_compile.precision import is_wide

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

    from lla_compile.backends.triton.source import Module
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec


def _module(spec: LLASpec, config: KernelConfig, absent: frozenset[str]) -> Module:
    """What is printed for calls without the pointers ``absent``: outputs without one are not stored."""
    outputs = lower(spec.op, spec.phase).outputs
    return module_of(spec, config, tuple(name for name in outputs if f"{name}_ptr" not in absent))


def _constants(spec: LLASpec, config: KernelConfig, device: DeviceInfo, absent: frozenset[str]) -> dict[str, object]:
    """Compile-time values in the kernel's order."""
    kinds = dict(ridge_tensor="ridge_ptr" not in absent, scale_tensor="scale_ptr" not in absent)
    values = constants(spec, config, device, **kinds) | {"PAGE_SIZE": spec.page_size or 0}
    return {name: values[name] for name in _module(spec, config, absent).constexprs}


def compile_stream(
    spec: LLASpec, config: KernelConfig, device: DeviceInfo, *, absent: frozenset[str], aligned: bool = True
) -> CompiledKernel:
    """Compile the kernel of a plan; ``absent`` names the pointers that are None."""
    module = _module(spec, config, absent)
    return compile_kernel(
        load_functions(module)[module.kernels[0].name],
        module.parameters,
        dtype=spec.dtype,
        wide=is_wide(spec.dtype, spec.precision),
        constants=_constants(spec, config, device, absent),
        absent=absent & {name for name, _ in module.parameters},
        aligned=aligned,
        compute_capability=device.compute_capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def precompile_stream(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what ordinary calls need."""
    for absent in ordinary_absences(spec.page_size is not None):
        compile_stream(spec, config, device, absent=absent)


class StreamLauncher(DecodeLauncher):
    """One launch; a program holds rows of a group, which stop together."""

    def _bind(self, absent, aligned):
        spec, config, device = self._plan.spec, self._plan.config, self._plan.device
        module = _module(spec, config, absent)
        if triton.knobs.runtime.interpret:
            runner = load_functions(module)[module.kernels[0].name]
        else:
            runner = compile_stream(spec, config, device, absent=absent, aligned=aligned)
        tiles = triton.cdiv(spec.group_size * spec.seqlen_q, config.block_q)
        values = tuple(_constants(spec, config, device, absent).values())
        names = tuple(name for name, _ in module.parameters)
        return [Launch(runner[spec.batch * spec.num_kv_heads * tiles, 1, 1], names, values)]
