"""Versions of what compiles and runs a plan."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch


@lru_cache(maxsize=None)
def toolchain(device_type: str) -> dict[str, str]:
    """Versions by name, as an entry carries them; a CPU needs PyTorch alone."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    if device_type == "cuda":
        versions |= {"triton": installed("triton"), "cuda": torch.version.cuda, "driver": driver()}
    return {name: str(found) for name, found in versions.items() if found}


def compilers() -> dict[str, str]:
    """Versions of what compiles for a device that is not there."""
    return {name: found for name, found in toolchain("cuda").items() if name in ("torch", "triton")}


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
