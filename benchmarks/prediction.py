"""How well predicted times rank measured trials, and the fit of the model's constants to them.

    python -m benchmarks.prediction                    evaluate; needs no compiler
    python -m benchmarks.prediction --fit              fit the constants anew and print them
    python -m benchmarks.prediction --compile          first compile what is not in features.json (minutes to hours)

Held out: trials are split into families of a phase, width and tier, which share their compiled kernels. The constants
with which a family is predicted are fitted to the other families of its phase alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Sequence

import numpy as np

from benchmarks.report import RESULTS
from benchmarks.trials import read_trials, spec_of
from lla_compile import backends
from lla_compile.devices import DeviceInfo, resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.prediction.efficiency import Efficiency
from lla_compile.prediction.library import Features, Library, identity_of
from lla_compile.prediction.model import Prediction, predict
from lla_compile.spec import PHASES, LLASpec

DEVICE = "nvidia-h200"
TRIALS = ("trials-forward-bfloat16.jsonl", "trials-backward-bfloat16.jsonl", "trials-decode-bfloat16.jsonl")
_FIT_STEPS = 250
# As many keys are fitted to at most, evenly taken.
_FIT_KEYS = 24
_HELD_OUT = "each family (phase, head_dim, precision), with constants fitted to the other families of its phase"
_SEED = 0
# Factors are drawn around 1 with this deviation of their logarithm, to begin with.
_STEP = 0.3
# Weight of the absolute time beside that of the order within a key.
_ABSOLUTE = 0.2
# Weight of a constant's distance from where it started: what no trial tells of stays there.
_PRIOR = 2e-4
# Constants that are shares of a peak.
_SHARES = ("tensor", "legacy_tensor", "issue", "shared", "dram")


@dataclass(frozen=True)
class Trial:
    """A measured configuration whose kernels have been read."""

    key: tuple
    family: tuple
    spec: LLASpec
    config: KernelConfig
    features: Features
    median_ms: float

    @cached_property
    def alike(self) -> tuple:
        """What the model looks at: a fused kernel leaves its loop before the cap."""
        split = self.config.schedule == "split"
        return self.spec, self.config if split else replace(self.config, cg_max_iters=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and on request compile and fit."""
    args = _parser().parse_args(argv)
    device, folder = resolve(DEVICE), args.results / DEVICE
    library = Library()
    if (path := folder / "features.json").exists():
        library.load(path)
    if args.compile:
        _compile(folder, library, device, path)
    trials, left_out = load(folder, library, device)
    path = folder / "prediction.json"
    report = json.loads(path.read_text()) if path.exists() else {"device": DEVICE, "held_out": _HELD_OUT, "phases": {}}
    for phase in args.phase:
        own = [t for t in trials if t.family[0] == phase]
        print(f"{phase}: {len(own)} trials of {len({t.key for t in own})} keys, {left_out[phase]} without features")
        constants = fit(own, device) if args.fit else efficiency.BY_PHASE[phase]
        scores = {"fitted to all": score(own, times(own, device, constants), device)}
        if args.fit:
            print(constants, flush=True)
            scores["held out"] = score(own, held_out_times(own, device), device)
            report["phases"][phase] = {
                "model_version": efficiency.VERSION,
                "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "without_features": left_out[phase],
                "constants": {name: _rounded(value) for name, value in asdict(constants).items()},
                "scores": scores,
            }
            path.write_text(json.dumps(report, indent=1) + "\n")
        for name, values in scores.items():
            print(name, json.dumps({k: v for k, v in values.items() if k != "keys"}), flush=True)
    return 0


def load(folder: Path, library: Library, device: DeviceInfo) -> tuple[list[Trial], Counter]:
    """The correct trials whose kernels are in the library, and by phase how many are not."""
    trials, left_out = [], Counter()
    for spec, config, record in _records(folder):
        identity = identity_of(spec, config, device)
        if identity not in library:
            left_out[spec.phase] += 1
            continue
        key = (record["key"], record["seqlen"], record["batch_heads"])
        family = (spec.phase, spec.head_dim, spec.precision)
        trials.append(Trial(key, family, spec, config, library[identity], record["median_ms"]))
    return trials, left_out


def times(trials: Sequence[Trial], device: DeviceInfo, constants: Efficiency) -> np.ndarray:
    """Predicted milliseconds; infinite where the prediction is that a limit of the device is broken."""
    return np.array([math.inf if p.limit else p.milliseconds for p in _predictions(trials, device, constants)])


def held_out_times(trials: Sequence[Trial], device: DeviceInfo) -> np.ndarray:
    """Predictions of each family with constants that have not seen it."""
    predicted = np.zeros(len(trials))
    for family in dict.fromkeys(t.family for t in trials):
        constants = fit([t for t in trials if t.family != family], device)
        inside = [i for i, t in enumerate(trials) if t.family == family]
        predicted[inside] = times([trials[i] for i in inside], device, constants)
    return predicted


def fit(trials: Sequence[Trial], device: DeviceInfo, steps: int = _FIT_STEPS) -> Efficiency:
    """Constants near the start with the least loss: one random step after another, kept if it is better."""
    keys = list(dict.fromkeys(t.key for t in trials))
    chosen_keys = set(keys[:: max(1, len(keys) // _FIT_KEYS)])
    trials = [t for t in trials if t.key in chosen_keys]
    start, generator = efficiency.START, np.random.default_rng(_SEED)
    names = [f.name for f in fields(Efficiency)]

    def cost(constants: Efficiency) -> float:
        drift = sum(math.log(getattr(constants, n) / getattr(start, n)) ** 2 for n in names)
        return loss(trials, device, constants) + _PRIOR * drift

    best, best_loss, step = start, cost(start), _STEP
    for _ in range(steps):
        chosen = generator.random(len(names)) < 0.35
        factors = np.exp(step * generator.standard_normal(len(names)) * chosen)
        values = {n: float(getattr(best, n) * f) for n, f in zip(names, factors)}
        drawn = replace(best, **values | {n: min(values[n], 1.0) for n in _SHARES})
        if (found := cost(drawn)) < best_loss:
            best, best_loss, step = drawn, found, min(step * 1.3, 0.6)
        else:
            step = max(step * 0.97, 0.03)
    return best


def loss(trials: Sequence[Trial], device: DeviceInfo, constants: Efficiency) -> float:
    """Mean square of the logarithmic error, most of it within keys; fast configurations count the most."""
    predicted = np.array([p.milliseconds for p in _predictions(trials, device, constants)])
    measured = np.array([t.median_ms for t in trials])
    errors, total = np.log(predicted / measured), 0.0
    for inside in _by_key(trials):
        weights = measured[inside].min() / measured[inside]
        weights /= weights.sum()
        mean = float(weights @ errors[inside])
        total += float(weights @ (errors[inside] - mean) ** 2) + _ABSOLUTE * mean**2
    return total / len(_by_key(trials))


def score(trials: Sequence[Trial], predicted: np.ndarray, device: DeviceInfo) -> dict:
    """Rank correlations, and times of the model's and the heuristic's choices over the best of each key."""
    measured, keys = np.array([t.median_ms for t in trials]), []
    for inside in _by_key(trials):
        own, best = [trials[i] for i in inside], measured[inside].min()
        choice = predicted[inside] == predicted[inside].min()  # fused plans that differ in their cap are one to it
        default = backends.get("triton").default_config(own[0].spec, device)
        at_default = [t.median_ms for t in own if t.config == default]
        keys.append(
            {
                "key": " ".join(map(str, own[0].key)),
                "trials": len(own),
                "spearman": spearman(predicted[inside], measured[inside]),
                "regret": _rounded(float(measured[inside][choice].mean() / best)),
                "default_regret": _rounded(at_default[0] / best) if at_default else None,
            }
        )
    finite = np.isfinite(predicted)
    within = [k["spearman"] for k in keys if k["spearman"] is not None]
    defaults = [k["default_regret"] for k in keys if k["default_regret"] is not None]
    return {
        "trials": len(trials),
        "refused": int((~finite).sum()),
        "spearman": spearman(predicted, measured),
        "mean_spearman_within_keys": _rounded(float(np.mean(within))),
        "least_spearman_within_keys": min(within),
        "mean_regret": _rounded(float(np.mean([k["regret"] for k in keys]))),
        "worst_regret": max(k["regret"] for k in keys),
        "mean_default_regret": _rounded(float(np.mean(defaults))) if defaults else None,
        "worst_default_regret": max(defaults, default=None),
        "median_ratio_to_measured": _rounded(float(np.median(predicted[finite] / measured[finite]))),
        "keys": keys,
    }


def _predictions(trials: Sequence[Trial], device: DeviceInfo, constants: Efficiency) -> list[Prediction]:
    """Of every trial; those that differ in nothing that the model looks at share theirs."""
    known: dict[tuple, Prediction] = {}
    for t in trials:
        if t.alike not in known:
            known[t.alike] = predict(t.spec, t.config, device, t.features, constants)
    return [known[t.alike] for t in trials]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks, equal values sharing the mean of theirs; None of fewer than three."""
    ranks = _ranks(a), _ranks(b)
    if len(a) < 3 or not all(x.std() for x in ranks):
        return None
    return _rounded(float(np.corrcoef(*ranks)[0, 1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _by_key(trials: Sequence[Trial]) -> list[list[int]]:
    places: dict[tuple, list[int]] = {}
    for place, trial in enumerate(trials):
        places.setdefault(trial.key, []).append(place)
    return list(places.values())


def _records(folder: Path):
    """Spec, configuration and record of every correct trial."""
    files = [folder / name for name in TRIALS]
    for record in itertools.chain.from_iterable(read_trials(path) for path in files if path.exists()):
        if record["kind"] == "ok":
            yield spec_of(record), KernelConfig.from_dict(record["plan"]), record


def _compile(folder: Path, library: Library, device: DeviceInfo, path: Path) -> None:
    for spec, config, _ in _records(folder):
        if (identity := identity_of(spec, config, device)) not in library:
            start = time.perf_counter()
            library.features(spec, config, device)
            print(f"{time.perf_counter() - start:.1f} s: {identity}", flush=True)
            library.save(path)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile the kernels that features.json lacks")
    parser.add_argument("--fit", action="store_true", help="fit the constants and write prediction.json")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
