"""NVRTC, NVIDIA's run-time compiler, through the few functions of its C interface that are needed.

The library comes with every CUDA build of PyTorch (the wheel nvidia-cuda-nvrtc), has had this interface for ten years,
and compiles with no GPU, driver or toolkit present; a Python binding would be one more package, and CuPy's does not
import everywhere that one wants to compile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import lru_cache
from pathlib import Path
from typing import Mapping, Sequence

from lla_compile.backends import CompileError

_SUCCESS = 0


class Nvrtc:
    """The loaded library.

    Attributes:
        version: (major, minor) of the compiler.
    """

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """The cubin of ``source``; ``headers`` are what it may include, by name.

        Raises:
            CompileError: with the compiler's first error.
        """
        program = ctypes.c_void_p()
        count = len(headers)
        contents = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * count)(*(header.encode() for header in headers))
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), count, contents, names)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._library.nvrtcCompileProgram(program, len(options), given) != _SUCCESS:
                raise CompileError(f"{name} did not compile: {_first_error(self._bytes(program, 'ProgramLog'))}")
            return self._bytes(program, "CUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments) -> None:
        if (status := getattr(self._library, function)(*arguments)) != _SUCCESS:
            raise CompileError(f"{function} failed with status {status}")


def _first_error(log: bytes) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").rstrip("\0").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no reason was given")


@lru_cache(maxsize=None)
def load() -> Nvrtc:
    """The library of the nvidia-cuda-nvrtc wheel, else of CUDA_HOME or CUDA_PATH, else the system's.

    Raises:
        ImportError: there is none.
    """
    for path in _candidates():
        try:
            return Nvrtc(ctypes.CDLL(path))
        except OSError:
            continue
    raise ImportError("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


def _candidates():
    package = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (package.submodule_search_locations or ()) if package] if package else []
    # The newest major version first: a machine may have the wheels of several.
    wheels = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    yield from (str(path) for path in sorted(wheels, key=lambda path: int(path.suffix[1:]), reverse=True))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield str(Path(root) / "lib64" / "libnvrtc.so")
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so")
