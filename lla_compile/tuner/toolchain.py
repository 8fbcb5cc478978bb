"""Versions of what compiles and runs a plan."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Collection

import torch

from lla_compile.backends.cuda import nvrtc


@lru_cache(maxsize=None)
def toolchain(device_type: str) -> dict[str, str]:
    """Versions by name, as an entry carries them; a CPU needs PyTorch alone."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    if device_type == "cuda":
        versions |= {"triton": installed("triton"), "cuda": torch.version.cuda, "driver": driver()}
    return {name: str(found) for name, found in versions.items() if found}


def compilers(backends: Collection[str]) -> dict[str, str]:
    """Versions of what compiles these backends' kernels for a device that is not there: "cuda" is NVRTC's."""
    versions = {"torch": torch.__version__}
    if "triton" in backends:
        versions["triton"] = installed("triton")
    if "cuda" in backends:
        versions["cuda"] = ".".join(map(str, nvrtc.load().version))
    return {name: str(found) for name, found in versions.items() if found}


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The driver's version; PyTorch has no call for it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
