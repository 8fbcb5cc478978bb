"""CUDA backend: kernels in CUDA C++, compiled by NVRTC and launched through CuPy, for NVIDIA GPUs.

Decoding and the forward pass run from compute capability 8.0 on, with wgmma on 9.0 except where operators that solve
nothing decode; the backward pass of these operators runs on 9.0 alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends import Binary
from lla_compile.backends.cuda import (
    backward_config,
    backward_kernels,
    gram_config,
    gram_kernels,
    part_config,
    part_kernels,
    sweep_config,
    sweep_kernels,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lla_compile.backends import Executable
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_MIN_COMPUTE_CAPABILITY = 8.0


class CudaBackend:
    """See :class:`lla_compile.backends.Backend`."""

    name = "cuda"

    def unsupported(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        from lla_compile.backends.cuda import runtime

        return self.unsupported_spec(spec, device) or runtime.unavailable()

    def unsupported_spec(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        """The same, whatever is installed on this machine."""
        if device.vendor != "nvidia":
            return f"{device.id} is not an NVIDIA GPU"
        if float(device.compute_capability) < _MIN_COMPUTE_CAPABILITY:
            return f"compute capability {device.compute_capability} < {_MIN_COMPUTE_CAPABILITY}"
        if why := _choices(spec).unsupported(spec, device):
            return why
        if reason := self.infeasible(spec, self.default_config(spec, device), device):
            return f"no configuration fits: {reason}"
        return None

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        return _choices(spec).default_config(spec, device)

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        """The other instruction path's default, where the device has two; otherwise other tiles."""
        return _choices(spec).alternatives(spec, device)

    def search_space(self, spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
        return _choices(spec).search_space(spec, device)

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        return _choices(spec).infeasible(spec, config, device)

    def source_hash(self, spec: LLASpec, config: KernelConfig) -> str:
        if spec.phase == "decode":
            return _gram_source_hash() if spec.solves else _part_source_hash(spec.op)
        if spec.phase == "backward":
            return _backward_source_hash(spec.op)
        return _sweep_source_hash(spec.op, spec.phase, config.schedule)

    def precompile(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
        if spec.phase == "decode" and spec.solves:
            from lla_compile.backends.cuda.gram_launcher import precompile_gram as precompile
        elif spec.phase == "decode":
            from lla_compile.backends.cuda.part_launcher import precompile_parts as precompile
        elif spec.phase == "backward":
            from lla_compile.backends.cuda.backward_launcher import precompile_backward as precompile
        else:
            from lla_compile.backends.cuda.sweep_launcher import precompile_sweeps as precompile
        precompile(spec, config, device)

    def binaries(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> list[Binary]:
        from lla_compile.backends.cuda.compiler import compile_kernel

        compiled = (
            (
                kernel,
                compile_kernel(
                    kernel.source, kernel.defines | {"ALIGNED": "1"}, device.compute_capability, kernel.printed
                ),
            )
            for kernel in _kernels(spec, config, device)
        )
        return [Binary(kernel.name, kernel.threads // 32, kernel.shared, cubin) for kernel, cubin in compiled]

    def build(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
        """Compile a plan's kernels into ``folder``, where LLA_COMPILE_CUBINS lets a machine without a compiler find them.

        Raises:
            CompileError: a kernel does not compile.
            ImportError: there is no NVRTC.
            OSError: the folder cannot be written to.
        """
        if spec.phase == "decode" and spec.solves:
            from lla_compile.backends.cuda.gram_launcher import build_gram as build
        elif spec.phase == "decode":
            from lla_compile.backends.cuda.part_launcher import build_parts as build
        elif spec.phase == "backward":
            from lla_compile.backends.cuda.backward_launcher import build_backward as build
        else:
            from lla_compile.backends.cuda.sweep_launcher import build_sweeps as build
        return build(spec, config, device, folder)

    def bind(self, plan: Plan) -> Executable:
        if plan.spec.phase == "decode" and plan.spec.solves:
            from lla_compile.backends.cuda.gram_launcher import GramLauncher as Bound
        elif plan.spec.phase == "decode":
            from lla_compile.backends.cuda.part_launcher import PartLauncher as Bound
        elif plan.spec.phase == "backward":
            from lla_compile.backends.cuda.backward_launcher import BackwardLauncher as Bound
        else:
            from lla_compile.backends.cuda.sweep_launcher import SweepLauncher as Bound
        return Bound(plan)


def _choices(spec: LLASpec):
    """Where the limits, the default and the search space of a phase are."""
    decoding = gram_config if spec.solves else part_config
    return {"decode": decoding, "backward": backward_config}.get(spec.phase, sweep_config)


def _kernels(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> tuple[gram_kernels.Kernel, ...]:
    decoding = gram_kernels if spec.solves else part_kernels
    kernels = {"decode": decoding, "backward": backward_kernels}.get(spec.phase, sweep_kernels)
    return kernels.kernels(spec, config, device)


@lru_cache(maxsize=None)
def _gram_source_hash() -> str:
    """Of the kernels of decoding with covariances and of what decides their constants."""
    from lla_compile.backends.cuda.compiler import source_hash

    return source_hash(
        ("gram_pass_mma.cu", "gram_pass_wgmma.cu", "gram_merge.cu", "gram_solve.cu"),
        ("gram_kernels.py", "gram_launcher.py", "../gram_parts.py"),
    )


@lru_cache(maxsize=None)
def _part_source_hash(op: str) -> str:
    """Of the kernels of decoding in parts, what is printed among them, and of what decides their constants."""
    from lla_compile.backends.cuda.compiler import source_hash
    from lla_compile.backends.cuda.part_source import print_parts

    python_files = ("part_kernels.py", "part_launcher.py", "../part_layout.py")
    return source_hash(("part_pass.cu", "part_merge.cu"), python_files, print_parts(op).headers)


@lru_cache(maxsize=None)
def _sweep_source_hash(op: str, phase: str, schedule: str) -> str:
    """Of the kernels of sweeps that hold query rows, what is printed among them."""
    from lla_compile.backends.cuda.compiler import source_hash
    from lla_compile.backends.cuda.sweep_parts import print_sweeps

    headers = [part.headers for part in print_sweeps(op, phase, schedule).parts]
    printed = {name: "".join(texts[name] for texts in headers) for name in headers[0]}
    sources = ("sweeps_mma.cu", "sweeps_wgmma.cu", "tile_order.cu")
    python_files = ("sweep_kernels.py", "sweep_launcher.py", "../head_groups.py")
    return source_hash(sources, python_files, printed)


@lru_cache(maxsize=None)
def _backward_source_hash(op: str) -> str:
    """Of the kernels of a backward pass, all that is printed for all of its outputs among them."""
    from lla_compile.backends.cuda.backward_source import print_backward
    from lla_compile.backends.cuda.compiler import source_hash
    from lla_compile.lowering import lower

    source = print_backward(op, tuple(lower(op, "backward").outputs))
    printed = dict(source.headers)
    for sweep in source.sweeps:
        for name, text in sweep.headers.items():
            printed[name] = text if name in source.headers else printed.get(name, "") + text
    python_files = ("backward_kernels.py", "backward_launcher.py", "../head_groups.py")
    sources = ("backward_order.cu", "backward_rows.cu", "backward_sweep.cu")
    return source_hash(sources, python_files, printed)


BACKEND = CudaBackend()
