"""CUDA backend: kernels in CUDA C++, compiled by NVRTC and launched through CuPy; NVIDIA GPUs from 8.0 on, decoding."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends import Binary
from lla_compile.backends.cuda import gram_config, gram_kernels

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
        if why := gram_config.unsupported(spec):
            return why
        if device.vendor != "nvidia":
            return f"{device.id} is not an NVIDIA GPU"
        if float(device.compute_capability) < _MIN_COMPUTE_CAPABILITY:
            return f"compute capability {device.compute_capability} < {_MIN_COMPUTE_CAPABILITY}"
        if reason := self.infeasible(spec, self.default_config(spec, device), device):
            return f"no configuration fits: {reason}"
        return None

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        return gram_config.default_config(spec, device)

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        """The default of the other instruction path, where the device has two."""
        return gram_config.alternatives(spec, device)

    def search_space(self, spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
        return gram_config.search_space(spec, device)

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        return gram_config.infeasible(spec, config, device)

    def source_hash(self, spec: LLASpec, config: KernelConfig) -> str:
        return _gram_source_hash()

    def precompile(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
        from lla_compile.backends.cuda.gram_launcher import precompile_gram

        precompile_gram(spec, config, device)

    def binaries(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> list[Binary]:
        from lla_compile.backends.cuda.compiler import compile_kernel

        compiled = (
            (kernel, compile_kernel(kernel.source, kernel.defines | {"ALIGNED": "1"}, device.compute_capability))
            for kernel in gram_kernels.kernels(spec, config, device)
        )
        return [Binary(kernel.name, kernel.threads // 32, kernel.shared, cubin) for kernel, cubin in compiled]

    def build(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> list[Path]:
        """Compile a plan's kernels into ``folder``, where LLA_COMPILE_CUBINS lets a machine without a compiler find them.

        Raises:
            CompileError: a kernel does not compile.
            ImportError: there is no NVRTC.
            OSError: the folder cannot be written to.
        """
        from lla_compile.backends.cuda.gram_launcher import build_gram

        return build_gram(spec, config, device, folder)

    def bind(self, plan: Plan) -> Executable:
        from lla_compile.backends.cuda.gram_launcher import GramLauncher

        return GramLauncher(plan)


@lru_cache(maxsize=None)
def _gram_source_hash() -> str:
    """Of the kernels of decoding and of what decides their constants."""
    from lla_compile.backends.cuda.compiler import source_hash

    return source_hash(
        ("gram_pass_mma.cu", "gram_pass_wgmma.cu", "gram_merge.cu", "gram_solve.cu"),
        ("gram_kernels.py", "gram_launcher.py", "../gram_parts.py"),
    )


BACKEND = CudaBackend()
