"""Features of compiled kernels by what they are compiled from: each distinct kernel is compiled and read once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Mapping, Sequence

from lla_compile import backends
from lla_compile.devices import DeviceInfo
from lla_compile.key import key_of
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin
from lla_compile.prediction.features import KernelFeatures
from lla_compile.spec import LLASpec
from lla_compile.tuning_db.short import short

Features = tuple[KernelFeatures, ...]


class Library:
    """Features by identity of what was compiled, in memory and on request in a file."""

    def __init__(self):
        self._known: dict[str, Features] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, identity: str) -> bool:
        return identity in self._known

    def __getitem__(self, identity: str) -> Features:
        return self._known[identity]

    def features(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> Features:
        """The kernels of a plan in launch order, compiled if they are not known.

        Raises:
            CompileError: the compiler refuses.
        """
        identity = identity_of(spec, config, device)
        if identity not in self._known:
            self._known[identity] = compile_features(spec, config, device)
        return self._known[identity]

    def save(self, path: Path) -> None:
        """Write all to a file, a plan a line."""
        lines = (
            f"{json.dumps(identity)}: {json.dumps([kernel.as_dict() for kernel in kernels])}"
            for identity, kernels in sorted(self._known.items())
        )
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def load(self, path: Path) -> None:
        """Add what a file holds."""
        self.add(json.loads(path.read_text()))

    def add(self, features: Mapping[str, Sequence[Mapping]]) -> None:
        """Add the kernels of plans by identity, as :meth:`save` writes them."""
        for identity, kernels in features.items():
            self._known[identity] = tuple(map(KernelFeatures.from_dict, kernels))


def identity_of(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str:
    """What decides the machine code: neither sizes nor caps on iterations do.

    The parts of a query are merged by a kernel for a power of two of them.
    """
    splits = config.num_splits and 1 << (config.num_splits - 1).bit_length()
    own = short(replace(config, cg_max_iters=None, num_splits=splits))
    key = replace(key_of(spec), group=None).describe()
    kinds = {
        "windowed": spec.window_size is not None,
        "packed": spec.num_sequences is not None,
        "grouped": spec.phase != "decode" and spec.group_size > 1,
        f"page {spec.page_size}": spec.page_size is not None,
    }
    marks = "".join(f", {name}" for name, present in kinds.items() if present)
    return f"{device.compute_capability}: {key}{marks}: {own}"


def compile_features(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> Features:
    """Compile a plan's kernels for a device that need not be there, and read them."""
    binaries = backends.get(config.backend).binaries(spec, config, device)
    return tuple(KernelFeatures.of(Cubin(*binary), by_hand=config.backend == "cuda") for binary in binaries)
