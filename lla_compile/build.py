"""``lla-compile build``: the CUDA kernels of a device's plans, compiled ahead for servers that have no compiler."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Iterator, Sequence

from lla_compile import backends
from lla_compile.backends import CompileError
from lla_compile.devices import DeviceInfo, resolve
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.tuning_db import DatabaseError, device_file, overlay_dir, shipped_dir, store

BACKEND = "cuda"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; parsing sets ``run``, which takes the parsed options and returns a status."""
    parser.description = (
        "Compile the CUDA kernels of the plans that the tuning database has for a GPU; no GPU is needed. Set "
        "LLA_COMPILE_CUBINS to the folder where they are used: kernels of the same sources are loaded from it."
    )
    parser.add_argument("--gpu", required=True, help="a device id or an alias such as h100")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--defaults", action="store_true",
        help="also what backend=\"cuda\" runs by default where another backend won (so it is if none of its own has)",
    )  # fmt: skip
    parser.add_argument(
        "--page-size", nargs="+", type=int, default=[], metavar="N",
        help="also for caches in pages of so many keys (default: dense caches only)",
    )  # fmt: skip
    parser.add_argument(
        "--packed", action="store_true", help="also for packed sequences, forward and backward (default: batches only)"
    )
    parser.add_argument(
        "--windowed", action="store_true", help="also for sliding windows, forward and backward (default: none)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        device = resolve(options.gpu)
        asked = options.page_size, options.packed, options.windowed
        plans = list(dict.fromkeys(plans_of(device, options.defaults, *asked)))
        if not plans and not options.defaults:
            plans = list(dict.fromkeys(plans_of(device, True, *asked)))
            if plans:
                print(f"no plan of {device.id} is of backend {BACKEND}: its defaults for the keys there are")
        if not plans:
            raise ValueError(
                f"no key of {device.id} in the database is for backend {BACKEND}; python -m lla_compile.tune "
                f"--gpu {device.id} --backend {BACKEND} makes some"
            )
        backend = backends.get(BACKEND)
        built = {path for spec, config in plans for path in backend.build(spec, config, device, options.out)}
    except (ValueError, DatabaseError, ImportError, CompileError, OSError) as error:
        print(f"lla-compile build: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in built)
    print(f"{len(built)} kernels of {len(plans)} plans for {device.id}: {size >> 10} KiB in {options.out}")
    return 0


def plans_of(
    device: DeviceInfo,
    defaults: bool,
    page_sizes: Sequence[int] = (),
    packed: bool = False,
    windowed: bool = False,
) -> Iterator[tuple[LLASpec, KernelConfig]]:
    """The plans of this backend in the overlay and in the shipped database, for dense caches and for ``page_sizes``.

    Args:
        device: whose entries are read.
        defaults: whether to give the backend's default where an entry is of another one.
        page_sizes: keys of a page.
        packed: whether plans of both passes are for packed sequences as well.
        windowed: whether causal plans of both passes are for sliding windows as well, those that have room for one.
    """
    backend = backends.get(BACKEND)
    for directory in (overlay_dir(), shipped_dir()):
        document = store.load(device_file(directory, device.id))
        for entry in document.entries if document else ():
            for spec in _variants(entry.spec(), page_sizes, packed, windowed):
                if entry.config.backend == BACKEND and backend.infeasible(spec, entry.config, device) is None:
                    yield spec, entry.config
                elif defaults and backend.unsupported_spec(spec, device) is None:
                    yield spec, backend.default_config(spec, device)


def _variants(spec: LLASpec, page_sizes: Sequence[int], packed: bool, windowed: bool) -> Iterator[LLASpec]:
    """The spec, and what else has its plan and kernels of its own. Kernels of decoding have windows in any case."""
    if spec.phase == "decode":
        yield spec
        yield from (_paged(spec, page_size) for page_size in page_sizes)
        return
    # Kernels are the same for windows of any size, and for any number of sequences.
    windows = (None, spec.seqlen_k) if windowed and spec.is_causal else (None,)
    for window_size in windows:
        for num_sequences in (None, 1) if packed else (None,):
            yield replace(spec, window_size=window_size, num_sequences=num_sequences)


def _paged(spec: LLASpec, page_size: int) -> LLASpec:
    """The same over a cache in pages, of at least as many keys."""
    return replace(spec, page_size=page_size, seqlen_k=-(-spec.seqlen_k // page_size) * page_size)
