"""One configuration from plan to outcome on a device that is not there: compile it, read it, predict its time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Sequence

from lla_compile import backends
from lla_compile.backends import Backend
from lla_compile.devices import DeviceInfo
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.prediction.features import KernelFeatures
from lla_compile.prediction.library import Features, compile_features, identity_of
from lla_compile.prediction.model import predict
from lla_compile.spec import LLASpec
from lla_compile.tuner.outcome import Kind, Outcome, outcome_of
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.timing import Timing

# Searched unless others are named: a GPU's machine has Triton from PyTorch, but CuPy, which the CUDA backend launches
# through, only if somebody has installed it.
_SEARCHED = ("triton",)


class Predictor:
    """Evaluates configurations of one problem by the model; nothing runs, so that no error is known.

    Args:
        problem: what is tuned.
        folder: where features of compiled kernels are kept.
    """

    def __init__(self, problem: Problem, folder: Path):
        self._problem = problem
        self._folder = folder

    def specs(self) -> tuple[LLASpec, ...]:
        """All that a configuration is compiled for."""
        return (self._problem.spec,)

    def __call__(self, config: KernelConfig) -> Outcome:
        """Predict the time of a configuration; one that spills or does not fit is a failure of resources."""
        spec, device = self._problem.spec, self._problem.device
        try:
            prediction = predict(spec, config, device, features_of(spec, config, device, self._folder))
        except Exception as error:  # what cannot be compiled or read is this configuration's outcome
            return outcome_of(error)
        if prediction.limit:
            return Outcome(Kind.RESOURCES, prediction.limit)
        return Outcome(Kind.OK, "", prediction.milliseconds, 0.0)

    def verify(self, config: KernelConfig) -> None:
        """Nothing can be checked."""

    def retime(self, configs: list[KernelConfig]) -> list[Timing]:
        """The same predictions again."""
        return [Timing(self(config).median_ms, 0.0) for config in configs]


def ahead(folder: Path):
    """What a compile pool runs for predictions: it leaves features in ``folder``."""
    return partial(_compile_ahead, folder=folder)


def predictable_backends(spec: LLASpec, device: DeviceInfo, requested: Sequence[str] = ()) -> dict[str, Backend]:
    """The backends whose times can be predicted here, in order of preference; Triton's alone unless others are named.

    Raises:
        ValueError: none of them, or what compiles one that is named is missing; the message says what to do.
    """
    modelled = ", ".join(efficiency.BY_BACKEND)
    found, refused = {}, []
    for name in requested or _SEARCHED:
        if name not in efficiency.BY_BACKEND:
            refused.append(f"{name} compiles no kernels that could be read: measure it on the device")
            continue
        missing = _cannot_compile(name)
        if missing and requested:
            raise ValueError(f"--backend names {name}, whose times cannot be predicted here: {missing}")
        if why := missing or backends.get(name).unsupported_spec(spec, device):
            refused.append(f"{name}: {why}")
        else:
            found[name] = backends.get(name)
    if not found:
        raise ValueError(
            f"times of {spec.describe()} on {device.id} cannot be predicted: {'; '.join(refused)}; --backend takes "
            f"{modelled}"
        )
    return found


def _cannot_compile(name: str) -> str | None:
    """What is missing on this machine to compile a backend's kernels and to read them, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, whose disassembler reads kernels (pip install triton)"
    if name == "cuda":
        from lla_compile.backends.cuda import compiler

        return compiler.unavailable()
    return None


def comparable(space: SearchSpace) -> SearchSpace:
    """The part of a space whose accuracy is that of the defaults, since none can be measured: the cap on iterations,
    and for decoding the schedule, are those of each backend's default."""
    knobs = {}
    for name, own in space.knobs.items():
        default = space.backends[name].default_config(space.spec, space.device)
        fixed = ("cg_max_iters", "schedule") if space.spec.phase == "decode" else ("cg_max_iters",)
        knobs[name] = dict(own) | {knob: (getattr(default, knob),) for knob in fixed}
        if space.spec.phase == "decode":  # None stands for a knob of the other schedule
            kept = {knob: tuple(x for x in values if x is not None) for knob, values in knobs[name].items()}
            knobs[name] = {
                knob: values if getattr(default, knob) is not None else (None,) for knob, values in kept.items()
            }
    return replace(space, knobs=knobs)


def features_of(spec: LLASpec, config: KernelConfig, device: DeviceInfo, folder: Path) -> Features:
    """What ``folder`` has of a plan's kernels; compiled and added if it has nothing.

    Raises:
        CompileError: the compiler refuses.
    """
    digest = hashlib.sha256(identity_of(spec, config, device).encode()).hexdigest()[:24]
    path = folder / f"{digest}.json"
    if path.exists():
        return tuple(map(KernelFeatures.from_dict, json.loads(path.read_text())))
    features = compile_features(spec, config, device)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps([kernel.as_dict() for kernel in features]))
    os.replace(temporary, path)
    return features


def _compile_ahead(specs: Sequence[LLASpec], config: KernelConfig, device: DeviceInfo, folder: Path) -> None:
    for spec in specs:
        features_of(spec, config, device, folder)
