"""Launches of kernels that may start before the kernel in front of them has ended, which CuPy has no call for."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Callable

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
_VALUE_BYTES = 64  # of CUlaunchAttributeValue, a union


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("_room", ctypes.c_int), ("value", ctypes.c_int * (_VALUE_BYTES // 4))]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


@lru_cache(maxsize=None)
def _launch() -> Callable:
    """cuLaunchKernelEx of the driver that CuPy has loaded."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return launch


class DependentLaunch:
    """A function of a stream and of the address of a kernel's parameters, for one kernel and grid.

    The kernel must wait for the one in front of it by itself, with ``griddepcontrol.wait``. The one in front lets it start
    early with ``griddepcontrol.launch_dependents``.
    """

    def __init__(self, function: int, name: str, grid: tuple[int, int], threads: int, shared_bytes: int):
        self._function, self._name = function, name
        self._sizes = (*grid, 1), (threads, 1, 1), shared_bytes
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
        self._configs: dict[int, _Config] = {}  # by stream; none is written to once it is here

    def __call__(self, stream: int, parameters: int) -> None:
        config = self._configs.get(stream)
        if config is None:
            config = self._configs[stream] = _Config(*self._sizes, stream, ctypes.pointer(self._attribute), 1)
        status = _launch()(config, self._function, parameters, None)
        if status:
            raise RuntimeError(f"the driver refuses to launch {self._name}: cuLaunchKernelEx returned {status}")
