"""The joint search space of the backends that may run a problem."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Collection, Iterator, Mapping, Sequence

from lla_compile import backends
from lla_compile.backends import Backend
from lla_compile.devices import DeviceInfo
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec

if TYPE_CHECKING:
    import optuna

Knobs = Mapping[str, tuple]
_MISSING = object()


@dataclass(frozen=True)
class SearchSpace:
    """Values of every knob, by backend.

    A knob is a parameter of its own for each backend ("triton.block_q"), conditional on "backend": values that suit
    one say nothing of another, and what a backend lacks is never suggested for it.
    """

    spec: LLASpec
    device: DeviceInfo
    backends: Mapping[str, Backend]
    knobs: Mapping[str, Knobs]

    @classmethod
    def joint(cls, spec: LLASpec, device: DeviceInfo, allowed: Mapping[str, Backend]) -> SearchSpace:
        """The space of ``allowed``, each backend's heuristic default included."""
        return cls(spec, device, allowed, {name: _with_default(b, spec, device) for name, b in allowed.items()})

    def default(self) -> KernelConfig:
        """What would run untuned: the heuristic of the first backend."""
        return next(iter(self.backends.values())).default_config(self.spec, self.device)

    def openings(self) -> list[KernelConfig]:
        """What is tried first: the default of every backend, and the backends' own alternatives."""
        backends = self.backends.values()
        defaults = (x.default_config(self.spec, self.device) for x in backends)
        others = (config for x in backends for config in x.alternatives(self.spec, self.device))
        return [*defaults, *others]

    def infeasible(self, config: KernelConfig) -> str | None:
        """The limit that a configuration breaks, or None."""
        return self.backends[config.backend].infeasible(self.spec, config, self.device)

    def suggest(self, trial: optuna.Trial) -> KernelConfig:
        name = trial.suggest_categorical("backend", list(self.knobs))
        knobs = self.knobs[name].items()
        chosen = {knob: trial.suggest_categorical(f"{name}.{knob}", list(values)) for knob, values in knobs}
        return KernelConfig(backend=name, **chosen)

    def contains(self, config: KernelConfig) -> bool:
        """Whether :meth:`suggest` can come up with ``config``."""
        knobs = self.knobs.get(config.backend, {})
        unknown = config.as_dict().keys() - {"backend"} - knobs.keys()
        return not unknown and all(getattr(config, knob) in values for knob, values in knobs.items())

    def nearest(self, config: KernelConfig) -> KernelConfig | None:
        """The configuration of the space that differs from ``config`` only where the space lacks a number, and there
        by the least factor; None if something else is missing."""
        values = {knob: _nearest(getattr(config, knob), x) for knob, x in self.knobs.get(config.backend, {}).items()}
        near = replace(config, **values)
        return near if self.contains(near) else None

    def parameters(self, config: KernelConfig) -> dict:
        """The study's parameters that :meth:`suggest` turns into ``config``."""
        knobs = {f"{config.backend}.{knob}": getattr(config, knob) for knob in self.knobs[config.backend]}
        return {"backend": config.backend} | knobs

    def config(self, parameters: Mapping) -> KernelConfig | None:
        """Inverse of :meth:`parameters`; what has a single value may be left out, None if anything else is."""
        name = parameters.get("backend", _only(self.knobs))
        knobs = {knob: parameters.get(f"{name}.{knob}", _only(x)) for knob, x in self.knobs.get(name, {}).items()}
        return None if _MISSING in (name, *knobs.values()) else KernelConfig(backend=name, **knobs)

    def shuffled(self, seed: int) -> Iterator[KernelConfig]:
        """Every configuration that breaks no limit, one by one in random order: none is looked at before its turn.

        Backends and schedules take turns, as long as they last: one with few feasible configurations is seen early
        too.
        """
        generator = random.Random(seed)
        orders = [
            self._in_random_order(name, {**knobs, "schedule": (schedule,)}, random.Random(generator.random()))
            for name, knobs in self.knobs.items()
            for schedule in knobs["schedule"]
        ]
        generator.shuffle(orders)
        while orders:
            for order in list(orders):
                config = next(order, None)
                if config is None:
                    orders.remove(order)
                else:
                    yield config

    def _in_random_order(self, name: str, knobs: Knobs, generator: random.Random) -> Iterator[KernelConfig]:
        """The feasible ones of a backend's configurations that ``knobs`` span."""
        for index in _permutation(math.prod(map(len, knobs.values())), generator):
            chosen = {}
            for knob, values in knobs.items():
                index, place = divmod(index, len(values))
                chosen[knob] = values[place]
            config = KernelConfig(backend=name, **chosen)
            if self.infeasible(config) is None:
                yield config

    def digest(self, toolchain: Mapping) -> str:
        """Hash of all that makes earlier trials comparable: kernel sources, knobs and toolchain."""
        sources = {}
        for name, backend in self.backends.items():
            default = backend.default_config(self.spec, self.device)
            for schedule in self.knobs[name].get("schedule", (default.schedule,)):
                sources[f"{name} {schedule}"] = backend.source_hash(self.spec, replace(default, schedule=schedule))
        knobs = {name: dict(knobs) for name, knobs in self.knobs.items()}
        text = json.dumps([sources, knobs, dict(toolchain)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def usable_backends(spec: LLASpec, device: DeviceInfo, requested: Sequence[str] = ()) -> dict[str, Backend]:
    """The backends to search, in order of preference.

    Eager, the slowest, is searched where it is named or where nothing else runs; on a CPU the others only run in an
    interpreter and must be named.

    Raises:
        ValueError: none of them can run the spec on the device; the message says why.
    """
    names = requested or (("eager",) if device.is_cpu else backends.NAMES)
    usable, refused = {}, []
    for name in names:
        if name == "eager" and usable and not requested:
            continue
        try:
            backend = backends.get(name)
        except ImportError as error:
            refused.append(f"{name} does not import ({error})")
            continue
        if why := backend.unsupported(spec, device):
            refused.append(f"{name}: {why}")
        else:
            usable[name] = backend
    if not usable:
        raise ValueError(f"no backend can run {spec.describe()} on {device.id}: {'; '.join(refused)}")
    return usable


def _nearest(value, values: Sequence):
    """``value`` if it is among ``values`` or no number, else the one of them that is the least factor away."""
    numbers = [x for x in values if type(x) is int]
    if value in values or type(value) is not int or not numbers:
        return value
    return min(numbers, key=lambda x: abs(math.log2(x / value)))


def _only(values: Collection):
    """The single one of ``values``, if there is no other."""
    return next(iter(values)) if len(values) == 1 else _MISSING


def _with_default(backend: Backend, spec: LLASpec, device: DeviceInfo) -> Knobs:
    default = backend.default_config(spec, device)
    space = backend.search_space(spec, device)
    return {
        knob: tuple(values) if getattr(default, knob) in values else (*values, getattr(default, knob))
        for knob, values in space.items()
    }


def _permutation(count: int, generator: random.Random) -> Iterator[int]:
    """The numbers below ``count`` in random order, in time and memory of as many as are taken."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        place = generator.randint(0, last)
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)
