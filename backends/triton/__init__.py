"""Triton backend: sweeps printed as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends import Binary
from lla_compile.backends.triton import config as config_module
from lla_compile.backends.triton import decode_config, resources
from lla_compile.backends.triton.source import print_module, print_parts

if TYPE_CHECKING:
    from lla_compile.backends import Executable
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_MIN_COMPUTE_CAPABILITY = 8.0


class TritonBackend:
    """See :class:`lla_compile.backends.Backend`."""

    name = "triton"

    def unsupported(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton; Linux only)"
        if not resources.interpreting():
            return self.unsupported_spec(spec, device)
        if spec.dtype == "bfloat16":
            return "Triton's interpreter cannot multiply bfloat16"  # it gets the products wrong
        return _unsupported_type(spec)

    def unsupported_spec(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        if reason := _unsupported_type(spec):
            return reason
        if device.vendor != "nvidia":
            return f"{device.id} is not an NVIDIA GPU (set TRITON_INTERPRET=1 to interpret kernels on the CPU)"
        if float(device.compute_capability) < _MIN_COMPUTE_CAPABILITY:
            return f"compute capability {device.compute_capability} < {_MIN_COMPUTE_CAPABILITY}"
        if reason := self.infeasible(spec, self.default_config(spec, device), device):
            return f"no configuration fits: {reason}"
        return None

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        return _choices(spec).default_config(spec, device)

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        return decode_config.alternatives(spec, device) if spec.phase == "decode" else ()

    def search_space(self, spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
        return _choices(spec).search_space(spec, device)

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        return (decode_config if spec.phase == "decode" else resources).infeasible(spec, config, device)

    def source_hash(self, spec: LLASpec, config: KernelConfig) -> str:
        if config.schedule == "gram":
            own = "gram_kernels.py", "gram_launcher.py", "cache_primitives.py", "primitives.py"
            return _hash_of_files(*own, "../gram_parts.py")
        if spec.phase == "decode" and not spec.solves:
            return _hash_of_parts(spec.op, config.num_splits == 1)
        written = ("primitives.py", "cache_primitives.py" if spec.phase == "decode" else "packing.py")
        if not spec.solves:
            written += ("mean_primitives.py",)
        return _hash_of_files(
            *written, printed=(spec.op, spec.phase, config.schedule, resources.one_sum_a_sweep(spec, config))
        )

    def precompile(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
        if config.schedule == "gram":
            from lla_compile.backends.triton.gram_launcher import precompile_gram as precompile
        elif spec.phase == "decode" and not spec.solves:
            from lla_compile.backends.triton.part_launcher import precompile_parts as precompile
        elif spec.phase == "decode":
            from lla_compile.backends.triton.stream_launcher import precompile_stream as precompile
        else:
            from lla_compile.backends.triton.launcher import compile_variant as precompile
        precompile(spec, config, device)

    def binaries(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> list[Binary]:
        if spec.phase == "decode":
            from lla_compile.backends.triton.decode_launcher import ordinary_absences
            from lla_compile.backends.triton.gram_launcher import compile_gram
            from lla_compile.backends.triton.stream_launcher import compile_stream

            absent = ordinary_absences(spec.page_size is not None)[-1]
            if config.schedule == "gram":
                kernels = compile_gram(spec, config, device, absent=absent)
            elif not spec.solves:
                from lla_compile.backends.triton.part_launcher import compile_parts

                kernels = compile_parts(spec, config, device, absent=absent)
            else:
                kernels = [compile_stream(spec, config, device, absent=absent)]
        else:
            from lla_compile.backends.triton.launcher import compile_variant

            kernels = compile_variant(spec, config, device)
        return [Binary(k.name, k.metadata.num_warps, k.metadata.shared, k.asm["cubin"]) for k in kernels]

    def bind(self, plan: Plan) -> Executable:
        if plan.config.schedule == "gram":
            from lla_compile.backends.triton.gram_launcher import GramLauncher as Bound
        elif plan.spec.phase == "decode" and not plan.spec.solves:
            from lla_compile.backends.triton.part_launcher import PartLauncher as Bound
        elif plan.spec.phase == "decode":
            from lla_compile.backends.triton.stream_launcher import StreamLauncher as Bound
        else:
            from lla_compile.backends.triton.launcher import Launcher as Bound
        return Bound(plan)


def _unsupported_type(spec: LLASpec) -> str | None:
    if spec.dtype in ("float16", "bfloat16", "float32"):
        return None
    return f"{spec.dtype} has no tensor-core products; the eager backend runs it"


def _choices(spec: LLASpec):
    """Where the default and the search space of a phase are."""
    return decode_config if spec.phase == "decode" else config_module


@lru_cache(maxsize=None)
def _hash_of_parts(op: str, whole: bool) -> str:
    """Of decoding in parts, or where the keys are one."""
    text = print_module(op, "decode", "fused").text if whole else print_parts(op).text
    return _hash_of_files("primitives.py", "cache_primitives.py", "mean_primitives.py", text=text)


@lru_cache(maxsize=None)
def _hash_of_files(*names: str, printed: tuple | None = None, text: str = "") -> str:
    """Of what a plan compiles: what :func:`print_module` makes of ``printed``, or ``text``, and files beside it."""
    text = print_module(*printed).text if printed else text
    written = text + "".join((Path(__file__).parent / name).read_text() for name in names)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


BACKEND = TritonBackend()
