"""Kernels compiled for tests of their machine code."""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import pytest

from lla_compile.backends.cuda import compiler, nvrtc
from lla_compile.devices import DeviceInfo, resolve
from lla_compile.prediction.cubin import Cubin, Loop
from lla_compile.spec import LLASpec


def _has_nvrtc() -> bool:
    try:
        return bool(nvrtc.load())
    except ImportError:
        return False


NEEDS_NVRTC = pytest.mark.skipif(not _has_nvrtc(), reason="NVRTC is not installed")


@contextmanager
def shared_cubins() -> Iterator[None]:
    """What any process of these tests compiles by NVRTC is there for all of them; the user's cache is left alone."""
    folder = Path(os.environ["LLA_COMPILE_TEST_CUBINS"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_cache_folder", lambda: folder)
        yield


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


# ---- machine code ----

_NO_RESULT = ("ST", "BAR", "SYNCS", "RED", "BRA")  # instructions whose first register is read
_ROW_PRODUCT = re.compile(r"R\d+, R(\d+), gdesc\[\w+\](?!\.tnspB)")


def code_of(cubin: Cubin, loop: Loop) -> list[tuple[str, str]]:
    """(name, operands) of a loop's instructions."""
    return [(name, text.strip()) for address, name, text in cubin.instructions if loop.start <= address <= loop.stop]


def lost_operands(code: list[tuple[str, str]]) -> list[str]:
    """Products of rows with tiles whose rows lie in registers that the loop writes to: the next round would multiply
    something else. Some versions of ptxas lose them so."""
    written = {register for name, operands in code for register in _written(name, operands)}
    lost = []
    for name, operands in code:
        left = _ROW_PRODUCT.match(operands) if name.startswith("HGMMA") else None
        registers = range(int(left[1]), int(left[1]) + 4) if left else ()
        lost += [f"{name} {operands}: R{register}" for register in registers if register in written]
    return lost


def _written(name: str, operands: str) -> range:
    first = re.match(r"R(\d+)(?=,|$)", operands)
    if first is None or name.startswith(_NO_RESULT):
        return range(0)
    if columns := re.match(r"HGMMA\.64x(\d+)x16", name):
        count = int(columns[1]) // 2
    elif name.endswith(".M88.4") or ".128" in name:
        count = 4
    else:
        count = 2 if ".64" in name or ".WIDE" in name else 1
    return range(int(first[1]), int(first[1]) + count)
