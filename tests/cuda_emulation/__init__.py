"""The CUDA kernels compiled as C++ and run on the CPU, thread by thread: see ptx.cuh and fibers.h in this folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from lla_compile.backends import cuda
from lla_compile.backends.cuda import runtime
from lla_compile.backends.cuda.compiler import read_headers

_HERE = Path(__file__).parent
_KERNELS = Path(cuda.__file__).parent
_OPTIONS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-w")
_ARGUMENTS = {"gram": "GramArguments", "part": "PartArguments"}  # by the beginning of the source's name
COMPILER = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)


class EmulatedKernel:
    """A kernel as a function of a stream, which means nothing here, and of the address of the arguments' address."""

    def __init__(self, kernel, defines, backwards: bool = False):
        self.kernel, self._backwards = kernel, backwards
        self.library = _library(
            kernel.name, kernel.source, tuple(sorted(defines.items())), tuple(sorted(kernel.printed.items()))
        )

    def __call__(self, stream: int, parameters: int) -> None:
        arguments = ctypes.c_void_p.from_address(parameters)
        self.library.launch(arguments, *self.kernel.grid, self.kernel.threads, self._backwards)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Kernels run on the CPU; the threads of a block take turns in the order that the returned dictionary says."""
    order = {"backwards": False}

    def load(kernel, defines, compute_capability):
        return EmulatedKernel(kernel, defines, order["backwards"])

    def launch(starts, packed, device):
        arguments = ctypes.create_string_buffer(packed, len(packed))
        address = ctypes.c_void_p(ctypes.addressof(arguments))
        for start in starts:
            start(0, ctypes.addressof(address))

    monkeypatch.setattr(runtime, "load", load)
    monkeypatch.setattr(runtime, "launch", launch)
    return order


@lru_cache(maxsize=None)
def _library(
    name: str, source: str, defines: tuple[tuple[str, str], ...], printed: tuple[tuple[str, str], ...]
) -> ctypes.CDLL:
    options = [*_OPTIONS, f"-I{_HERE}", f"-I{_KERNELS / 'include'}"]
    options.append(f"-DARGUMENTS={_ARGUMENTS.get(source.partition('_')[0], 'SweepArguments')}")
    options += [f"-D{key}={value}" for key, value in defines]
    options += [f'-DKERNEL_SOURCE="{_KERNELS / source}"', f"-DKERNEL_NAME={name}"]
    texts = [path.read_text() for path in (*sorted(_HERE.glob("*.*")), _KERNELS / source)] + list(
        read_headers().values()
    )
    path = _folder() / f"{hashlib.sha256(repr((options, printed, texts)).encode()).hexdigest()[:32]}.so"
    if not path.exists():
        partial, headers = path.with_suffix(f".{os.getpid()}"), path.with_suffix(".headers")
        headers.mkdir(exist_ok=True)
        for header, text in printed:
            (headers / header).write_text(text)
        options.append(f"-I{headers}")
        subprocess.run([COMPILER, *options, str(_HERE / "launch.cpp"), "-o", partial], check=True)
        os.replace(partial, path)
    return ctypes.CDLL(str(path))


@lru_cache(maxsize=None)
def _folder() -> Path:
    """Of these tests, unless LLA_COMPILE_EMULATION says where libraries may stay for the next ones."""
    folder = Path(os.environ["LLA_COMPILE_EMULATION"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder
