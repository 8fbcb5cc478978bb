"""From a kernel's source to a cubin: one built ahead of time, one kept on disk by an earlier process, or a new one."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Mapping

from lla_compile.backends import CompileError
from lla_compile.backends.cuda import nvrtc

BUILT_VARIABLE = "LLA_COMPILE_CUBINS"

_FOLDER = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size
_OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r"^#include <(\S+)>$", re.MULTILINE)


@dataclass(frozen=True)
class _Unit:
    """What is given to the compiler, and the name of its result: the same text and options have the same name."""

    source: str
    text: str
    options: tuple[str, ...]
    printed: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls, source: str, defines: Mapping[str, str], compute_capability: str, printed: Mapping[str, str] | None
    ) -> _Unit:
        options = (*_OPTIONS, f"--gpu-architecture={architecture(compute_capability)}")
        options += tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))
        text = (_FOLDER / source).read_text(encoding="utf-8")
        return cls(source, text, options, tuple(sorted((printed or {}).items())))

    @property
    def headers(self) -> dict[str, str]:
        return _included(self.text, dict(self.printed))

    @property
    def name(self) -> str:
        what = repr((self.options, self.headers, self.text))
        return f"{Path(self.source).stem}-{hashlib.sha256(what.encode()).hexdigest()[:32]}"

    def compile(self, compiler: nvrtc.Nvrtc) -> bytes:
        return compiler.compile(self.text, self.source, self.headers, self.options)


def compile_kernel(
    source: str, defines: Mapping[str, str], compute_capability: str, printed: Mapping[str, str] | None = None
) -> bytes:
    """The cubin of a kernel: from the folder LLA_COMPILE_CUBINS, see :func:`build_kernel`, if it has one of these sources;
    else compiled, at most once for a toolchain. No GPU is needed.

    Args:
        source: name of a ``.cu`` file of this folder.
        defines: its macros.
        compute_capability: e.g. "9.0".
        printed: headers beside those of this folder, by name.

    Raises:
        CompileError: it does not compile.
        ImportError: it was not built, and there is no NVRTC.
    """
    unit = _Unit.of(source, defines, compute_capability, printed)
    folder = built_folder()
    if folder is not None and (built := _read(folder / f"{unit.name}.cubin")) is not None:
        return built
    compiler = nvrtc.load()
    path = _cache_folder() / f"{unit.name}-{'.'.join(map(str, compiler.version))}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = unit.compile(compiler)
        try:
            _write(path, cubin)
        except OSError:
            return cubin  # a disk that cannot be written to costs the next process a compilation, no more
    return cubin


def build_kernel(
    source: str,
    defines: Mapping[str, str],
    compute_capability: str,
    folder: Path,
    printed: Mapping[str, str] | None = None,
) -> Path:
    """Compile a kernel into ``folder``, for machines without a compiler; returns the file.

    Raises:
        CompileError: it does not compile.
        ImportError: there is no NVRTC.
        OSError: the folder cannot be written to.
    """
    unit = _Unit.of(source, defines, compute_capability, printed)
    path = folder / f"{unit.name}.cubin"
    if _read(path) is None:
        _write(path, unit.compile(nvrtc.load()))
        path.chmod(0o644)  # it is for another user than the one that builds
    return path


def built_folder() -> Path | None:
    """Where kernels that were built ahead of time are, if LLA_COMPILE_CUBINS names a folder."""
    named = os.environ.get(BUILT_VARIABLE)
    return Path(named) if named else None


def unavailable() -> str | None:
    """Why no kernel can be had here, or None."""
    if built_folder() is not None:
        return None
    try:
        nvrtc.load()
    except (ImportError, CompileError) as error:
        return str(error)
    return None


def architecture(compute_capability: str) -> str:
    """The target that ptxas is given; "a" unlocks the instructions that only this architecture has."""
    number = compute_capability.replace(".", "")
    return f"sm_{number}a" if number == "90" else f"sm_{number}"


@lru_cache(maxsize=None)
def read_headers() -> dict[str, str]:
    """All headers of the kernels, by the names that they are included by."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((_FOLDER / "include").glob("*.cuh"))}


def _included(text: str, printed: Mapping[str, str]) -> dict[str, str]:
    """What a kernel includes, itself or through others, of the headers of the kernels and of those printed."""
    known = read_headers() | printed
    found: dict[str, str] = {}
    names = _INCLUDE.findall(text)
    while names:
        name = names.pop()
        if name not in found:
            found[name] = known[name]
            names += _INCLUDE.findall(known[name])
    return dict(sorted(found.items()))


def source_hash(
    sources: tuple[str, ...], python_files: tuple[str, ...], printed: Mapping[str, str] | None = None
) -> str:
    """Hash of kernels, of what they include, and of the Python that decides their constants."""
    kernels = [(_FOLDER / name).read_text(encoding="utf-8") for name in sources]
    headers: dict[str, str] = {}
    for kernel in kernels:
        headers |= _included(kernel, printed or {})
    digest = hashlib.sha256()
    for text in (*kernels, *headers.values(), *((_FOLDER / name).read_text(encoding="utf-8") for name in python_files)):
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
    """Whole or not at all; that two processes may write the same does no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(cubin).digest() + cubin)
    os.replace(file.name, path)
