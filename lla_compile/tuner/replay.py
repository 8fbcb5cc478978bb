"""A recorded space: a search runs on it as on a device, so that searches are studied without one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Mapping

from lla_compile.devices import DeviceInfo, resolve
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.tuner.outcome import Kind, Outcome
from lla_compile.tuner.space import Knobs, SearchSpace
from lla_compile.tuner.timing import Timing


@dataclass(frozen=True)
class Recording:
    """Outcomes of all feasible configurations of one key.

    Attributes:
        spec: what was recorded.
        device_id: where.
        provenance: "measured", or "predicted" by the model of times.
        knobs: the space, by backend.
        default: the heuristic default.
        outcomes: by configuration; what is missing is infeasible.
    """

    spec: LLASpec
    device_id: str
    provenance: str
    knobs: Mapping[str, Knobs]
    default: KernelConfig
    outcomes: Mapping[KernelConfig, Outcome]

    @property
    def best_ms(self) -> float:
        return min(outcome.median_ms for outcome in self.outcomes.values() if outcome.ok)

    def space(self) -> SearchSpace:
        """The search space as it was recorded, whatever the backends would say today."""
        backends = {name: _Recorded(name, self) for name in self.knobs}
        return SearchSpace(self.spec, resolve(self.device_id), backends, self.knobs)

    def save(self, path: Path) -> None:
        """Write a file, a configuration a line."""
        header = {
            "spec": asdict(self.spec),
            "device": self.device_id,
            "provenance": self.provenance,
            "knobs": self.knobs,
            "default": self.default.as_dict(),
        }
        lines = [json.dumps([config.as_dict(), _set(outcome)]) for config, outcome in self.outcomes.items()]
        text = json.dumps(header, default=dict)
        path.write_text(text[:-1] + ', "outcomes": [\n' + ",\n".join(lines) + "\n]}\n")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Inverse of :meth:`save`."""
        data = json.loads(path.read_text())
        return cls(
            spec=LLASpec(**data["spec"]),
            device_id=data["device"],
            provenance=data["provenance"],
            knobs={
                name: {knob: tuple(values) for knob, values in knobs.items()} for name, knobs in data["knobs"].items()
            },
            default=KernelConfig.from_dict(data["default"]),
            outcomes={KernelConfig.from_dict(plan): Outcome.from_dict(outcome) for plan, outcome in data["outcomes"]},
        )


class Replay:
    """The evaluator of a recording."""

    def __init__(self, recording: Recording):
        self._outcomes = recording.outcomes

    def __call__(self, config: KernelConfig) -> Outcome:
        return self._outcomes.get(config, Outcome(Kind.RESOURCES, "it was infeasible when the space was recorded"))

    def verify(self, config: KernelConfig) -> None:
        """All that is known is known from the trial."""

    def retime(self, configs: list[KernelConfig]) -> list[Timing]:
        outcomes = [self._outcomes[config] for config in configs]
        return [Timing(outcome.median_ms, outcome.spread) for outcome in outcomes]


class _Recorded:
    """What a search asks of a backend, from a recording."""

    def __init__(self, name: str, recording: Recording):
        self.name = name
        self._recording = recording

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        return self._recording.default

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        return ()

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        return None if config in self._recording.outcomes else "it was infeasible when the space was recorded"


def _set(outcome: Outcome) -> dict:
    return {name: value for name, value in outcome.as_dict().items() if value not in (None, "")}
