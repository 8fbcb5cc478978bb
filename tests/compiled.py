"""Kernels compiled for tests of their machine code."""

from dataclasses import dataclass

import pytest

from lla_compile.backends.cuda import nvrtc
from lla_compile.devices import DeviceInfo, resolve
from lla_compile.prediction.cubin import Cubin
from lla_compile.spec import LLASpec


def _has_nvrtc() -> bool:
    try:
        return bool(nvrtc.load())
    except ImportError:
        return False


NEEDS_NVRTC = pytest.mark.skipif(not _has_nvrtc(), reason="NVRTC is not installed")


def decode_spec(dtype: str, head_dim: int, head_dim_v: int | None = None, **fields) -> LLASpec:
    """One new token over a few thousand keys."""
    sizes = dict(batch=2, num_heads=16, num_kv_heads=16, seqlen_q=1, seqlen_k=4096, phase="decode")
    return LLASpec(dtype, head_dim, head_dim_v or head_dim, **sizes | fields)


@dataclass(frozen=True)
class DecodeCase:
    """Decoding on a device."""

    gpu: str
    head_dim: int
    dtype: str = "bfloat16"
    page_size: int | None = None

    def __str__(self) -> str:
        return f"{self.gpu}-{self.head_dim}-{self.dtype}-{'paged' if self.page_size else 'dense'}"

    @property
    def device(self) -> DeviceInfo:
        return resolve(self.gpu)

    @property
    def spec(self) -> LLASpec:
        return decode_spec(self.dtype, self.head_dim, page_size=self.page_size)


def cubin_of(kernel) -> Cubin:
    """What Triton has compiled, in a form that crosses processes."""
    return Cubin(kernel.name, kernel.metadata.num_warps, kernel.metadata.shared, kernel.asm["cubin"])


def compile_cubins(spec, config, device, **variant) -> list[Cubin]:
    """``compile_variant`` in that form."""
    from lla_compile.backends.triton.launcher import compile_variant

    return [cubin_of(kernel) for kernel in compile_variant(spec, config, device, **variant)]
