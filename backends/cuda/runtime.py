"""Launching through CuPy: on PyTorch's current stream, with one structure as the argument of every kernel."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

from lla_compile.backends import CompileError
from lla_compile.backends.cuda import compiler
from lla_compile.backends.cuda.dependent_launch import DependentLaunch

if TYPE_CHECKING:
    import torch

    from lla_compile.backends.cuda.gram_kernels import Kernel

# Of CUfunction_attribute. All kernels ask for the same split of a multiprocessor's memory, the one with the most shared
# memory: the driver's own choice leaves room for a single block, and a change between kernels would wait for both.
_MAX_DYNAMIC_SHARED_SIZE, _SHARED_CARVEOUT = 8, 9
_ALL_SHARED = 100


@lru_cache(maxsize=None)
def unavailable() -> str | None:
    """Why kernels cannot be compiled and launched here, or None."""
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        return f"CuPy does not import (pip install cupy-cuda12x or cupy-cuda13x): {reason}"
    return compiler.unavailable()


def load(kernel: Kernel, defines: Mapping[str, str], compute_capability: str) -> Callable[[int, int], None]:
    """The kernel compiled and loaded on the current device: a function of a stream and of the address of the arguments.

    Raises:
        CompileError: it does not compile, or the driver refuses it.
    """
    import cupy

    driver = cupy.cuda.driver
    cubin = compiler.compile_kernel(kernel.source, defines, compute_capability, kernel.printed)
    module = cupy.cuda.Module()
    try:
        module.load(cubin)
        function = module.get_function(kernel.name)
        driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED_SIZE, kernel.shared)
        driver.funcSetAttribute(function.ptr, _SHARED_CARVEOUT, _ALL_SHARED)
    except driver.CUDADriverError as error:
        raise CompileError(f"the driver refuses {kernel.name}: {error}") from error

    if kernel.overlaps:
        dependent = DependentLaunch(function.ptr, kernel.name, kernel.grid, kernel.threads, kernel.shared)
        return lambda stream, parameters, *, handle=function: dependent(stream, parameters)

    # CuPy's own launch would take tens of microseconds to look at the arguments. The function keeps its module alive.
    def start(stream: int, parameters: int, *, handle=function) -> None:
        x, y = kernel.grid
        driver.launchKernel(handle.ptr, x, y, 1, kernel.threads, 1, 1, kernel.shared, stream, parameters, 0)

    return start


def launch(starts: Sequence[Callable[[int, int], None]], packed: bytes, device: torch.device) -> None:
    """Start kernels one after another with the same arguments, which the driver copies."""
    import torch

    arguments = ctypes.create_string_buffer(packed, len(packed))
    parameters = ctypes.c_void_p(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream(device).cuda_stream
    for start in starts:
        start(stream, ctypes.addressof(parameters))
