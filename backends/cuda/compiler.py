"""From a kernel's source to a cubin, kept on disk for the next process."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Mapping

from lla_compile.backends.cuda import nvrtc

_FOLDER = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size
_OPTIONS = ("--std=c++17",)


def compile_kernel(source: str, defines: Mapping[str, str], compute_capability: str) -> bytes:
    """The cubin of a kernel, compiled at most once for a toolchain; no GPU is needed.

    Args:
        source: name of a ``.cu`` file of this folder.
        defines: its macros.
        compute_capability: e.g. "9.0".

    Raises:
        CompileError: it does not compile.
        ImportError: there is no NVRTC.
    """
    compiler = nvrtc.load()
    options = (*_OPTIONS, f"--gpu-architecture={architecture(compute_capability)}")
    options += tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))
    headers, text = read_headers(), (_FOLDER / source).read_text(encoding="utf-8")
    what = repr((compiler.version, options, headers, text))
    path = _cache_folder() / f"{Path(source).stem}-{hashlib.sha256(what.encode()).hexdigest()[:32]}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = compiler.compile(text, source, headers, options)
        _write(path, cubin)
    return cubin


def architecture(compute_capability: str) -> str:
    """The target that ptxas is given; "a" unlocks the instructions that only this architecture has."""
    number = compute_capability.replace(".", "")
    return f"sm_{number}a" if number == "90" else f"sm_{number}"


@lru_cache(maxsize=None)
def read_headers() -> dict[str, str]:
    """All headers of the kernels, by the names that they are included by."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((_FOLDER / "include").glob("*.cuh"))}


def source_hash(sources: tuple[str, ...], python_files: tuple[str, ...]) -> str:
    """Hash of kernels, all headers, and the Python that decides their constants."""
    digest = hashlib.sha256()
    for text in (*read_headers().values(), *((_FOLDER / name).read_text() for name in (*sources, *python_files))):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("lla_compile")) / "cubin"


def _read(path: Path) -> bytes | None:
    """A cached cubin, or None if there is none or the file is not what was written."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """Whole or not at all; that two processes may compile the same does no harm. A disk that cannot be written to costs
    the next process a compilation, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, path)
    except OSError:
        return
