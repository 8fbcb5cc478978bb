"""How well predicted times rank measured trials, and the fit of the model's constants to them.

    python -m benchmarks.prediction                    evaluate; needs no compiler
    python -m benchmarks.prediction --fit              fit the constants anew and print them
    python -m benchmarks.prediction --write            write prediction.json
    python -m benchmarks.prediction --compile          first compile what is not in features.json (minutes to hours)

Held out: trials are split into families of an operator, phase, width and tier, which share their compiled kernels. The
constants with which a family is predicted are fitted to the other families of its backend and phase alone. The choice
between backends is evaluated where one search measured both.
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
TRIALS = (
    "trials-forward-bfloat16.jsonl", "trials-forward-float16.jsonl", "trials-backward-bfloat16.jsonl",
    "trials-backward-float16.jsonl", "trials-decode-bfloat16.jsonl", "backends-forward-bfloat16.jsonl",
    "backends-decode-bfloat16.jsonl", "parallax-trials-bfloat16.jsonl",
    "backends-parallax-bfloat16.jsonl",
)  # fmt: skip
BACKENDS = tuple(efficiency.BY_BACKEND)
# Trials of a file that features.json has the kernels of; those after them ran other sources of the same plans.
_READ = {"backends-decode-bfloat16.jsonl": 1167}
# Searches whose kernels of a backend have changed since (rows in registers, groups of heads): those trials tell of the
# choice between backends alone.
_CHANGED_SINCE = {("backends-forward-bfloat16 1", "cuda")}
_FIT_STEPS = 250
# As many keys are fitted to at most, evenly taken.
_FIT_KEYS = 24
_HELD_OUT = (
    "each family (op, phase, head_dim, precision), with constants fitted to the others of its backend and phase"
)
_SEED = 0
# Factors are drawn around 1 with this deviation of their logarithm, to begin with.
_STEP = 0.3
# Weight of the absolute time beside that of the order within a key.
_ABSOLUTE = 0.2
# Weight of a constant's distance from where it started: what no trial tells of stays there.
_PRIOR = 2e-4
# Of one device's times it cannot be told from `tensor`.
_NOT_FITTED = "hopper_tensor"
# Times that differ by a larger factor differ by more than noise.
_CLEARLY = 1.05
# Constants that are shares of a peak.
_SHARES = ("tensor", "legacy_tensor", "issue", "shared", "dram")


@dataclass(frozen=True)
class Trial:
    """A measured configuration whose kernels have been read.

    Attributes:
        key: what was timed, and in which search.
        family: see the module's text.
        spec, config, features, median_ms: the plan, its kernels and its time.
        is_current: whether the kernels that were measured are those that were read.
    """

    key: tuple
    family: tuple
    spec: LLASpec
    config: KernelConfig
    features: Features
    median_ms: float
    is_current: bool = True

    @cached_property
    def alike(self) -> tuple:
        """What the model looks at: a fused kernel leaves its loop before the cap."""
        split = self.config.schedule == "split"
        return self.spec, self.config if split else replace(self.config, cg_max_iters=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and on request compile, fit and write down."""
    args = _parser().parse_args(argv)
    device, folder = resolve(DEVICE), args.results / DEVICE
    library = Library()
    if (path := folder / "features.json").exists():
        library.load(path)
    if args.merge:
        library.add(json.loads(args.merge.read_text())["features"])
        library.save(path)
    if args.compile:
        _compile(folder, library, device, path)
    trials, left_out = load(folder, library, device)
    path = folder / "prediction.json"
    report = json.loads(path.read_text()) if path.exists() else {"device": DEVICE, "held_out": _HELD_OUT}
    for phase in args.phase:
        held_out: list[tuple[list[Trial], np.ndarray]] = []
        for backend in args.backend:
            known = [t for t in trials if (t.config.backend, t.spec.phase) == (backend, phase)]
            own = [t for t in known if t.is_current]
            missing = left_out[backend, phase]
            print(f"{backend} {phase}: {len(own)} trials of {len(_by_key(own))} keys, {missing} without features")
            if not own:
                continue
            if args.fit:
                print(fit(own, device, args.steps), flush=True)
            constants = efficiency.BY_BACKEND[backend][phase]
            scores = {"constants of the package": score(own, times(own, device, constants), device)}
            if again := retest(own):
                scores["measured twice"] = again
            if args.write:
                predicted = held_out_times(known, device, args.steps)
                held_out.append((known, predicted))
                scores["held out"] = score(own, predicted[[t.is_current for t in known]], device)
                report.setdefault("backends", {}).setdefault(backend, {})[phase] = {
                    "model_version": efficiency.VERSION,
                    "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "without_features": missing,
                    "fit_steps": args.steps,
                    "constants": {name: _rounded(value) for name, value in asdict(constants).items()},
                    "scores": scores,
                }
            _print(scores)
        if len(held_out) > 1:
            all_trials = [t for known, _ in held_out for t in known]
            if choice := score_choice(all_trials, np.concatenate([x for _, x in held_out]), device):
                report.setdefault("choice", {})[phase] = choice
                _print({"between backends, held out": choice})
    if args.write:
        path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def load(folder: Path, library: Library, device: DeviceInfo) -> tuple[list[Trial], Counter]:
    """The correct trials whose kernels are in the library, and by backend and phase how many are not."""
    trials, left_out = [], Counter()
    for spec, config, record, search in _records(folder):
        identity = identity_of(spec, config, device)
        if identity not in library:
            left_out[config.backend, spec.phase] += 1
            continue
        key = (record["key"], record["seqlen"], record["batch_heads"], search)
        family = (spec.op, spec.phase, spec.head_dim, spec.precision)
        is_current = (search, config.backend) not in _CHANGED_SINCE
        trials.append(Trial(key, family, spec, config, library[identity], record["median_ms"], is_current))
    return trials, left_out


def times(trials: Sequence[Trial], device: DeviceInfo, constants: Efficiency) -> np.ndarray:
    """Predicted milliseconds; infinite where the prediction is that a limit of the device is broken."""
    return np.array([math.inf if p.limit else p.milliseconds for p in _predictions(trials, device, constants)])


def held_out_times(trials: Sequence[Trial], device: DeviceInfo, steps: int) -> np.ndarray:
    """Predictions of each family with constants that have not seen it."""
    predicted = np.zeros(len(trials))
    for family in dict.fromkeys(t.family for t in trials):
        constants = fit([t for t in trials if t.family != family and t.is_current], device, steps)
        inside = [i for i, t in enumerate(trials) if t.family == family]
        predicted[inside] = times([trials[i] for i in inside], device, constants)
    return predicted


def fit(trials: Sequence[Trial], device: DeviceInfo, steps: int = _FIT_STEPS) -> Efficiency:
    """Constants near the start with the least loss: one random step after another, kept if it is better."""
    keys = list(dict.fromkeys(t.key for t in trials))
    chosen_keys = set(keys[:: max(1, len(keys) // _FIT_KEYS)])
    trials = [t for t in trials if t.key in chosen_keys]
    start, generator = efficiency.START, np.random.default_rng(_SEED)
    names = [f.name for f in fields(Efficiency) if f.name != _NOT_FITTED]

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
    measured = _measured(trials)
    errors, total = np.log(predicted / measured), 0.0
    for inside in _by_key(trials):
        weights = measured[inside].min() / measured[inside]
        weights /= weights.sum()
        mean = float(weights @ errors[inside])
        total += float(weights @ (errors[inside] - mean) ** 2) + _ABSOLUTE * mean**2
    return total / len(_by_key(trials))


def score(trials: Sequence[Trial], predicted: np.ndarray, device: DeviceInfo) -> dict:
    """Rank correlations, and times of the model's and the heuristic's choices over the best of each key."""
    measured, keys = _measured(trials), []
    for inside in _by_key(trials):
        own, best = [trials[i] for i in inside], measured[inside].min()
        choice = predicted[inside] == predicted[inside].min()  # fused plans that differ in their cap are one to it
        first = min((t.config.backend for t in own), key=BACKENDS.index)
        default = backends.get(first).default_config(own[0].spec, device)
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
        "mean_spearman_within_keys": _rounded(float(np.mean(within))) if within else None,
        "least_spearman_within_keys": min(within, default=None),
        "mean_regret": _rounded(float(np.mean([k["regret"] for k in keys]))),
        "worst_regret": max(k["regret"] for k in keys),
        "mean_default_regret": _rounded(float(np.mean(defaults))) if defaults else None,
        "worst_default_regret": max(defaults, default=None),
        "pairs_in_order": _rounded(_pairs_in_order(trials, predicted, measured)),
        "median_ratio_to_measured": _rounded(float(np.median(predicted[finite] / measured[finite]))),
        "keys": keys,
    }


def score_choice(trials: Sequence[Trial], predicted: np.ndarray, device: DeviceInfo) -> dict | None:
    """The scores where searches measured several backends, and how often the model's choice is of the best one's."""
    groups = [inside for inside in _by_key(trials) if len({trials[i].config.backend for i in inside}) > 1]
    if not groups:
        return None
    places = [i for inside in groups for i in inside]
    mixed, right = [trials[i] for i in places], 0
    for inside in groups:
        best, choice = (min(inside, key=times.__getitem__) for times in (_measured(trials), predicted))
        right += trials[best].config.backend == trials[choice].config.backend
    return {"keys_of_right_backend": right} | score(mixed, predicted[places], device)


def retest(trials: Sequence[Trial]) -> dict | None:
    """How well two searches of a key agree on the order of the plans that both have timed: what a model can reach."""
    searches: dict[tuple, dict[str, dict[KernelConfig, float]]] = {}
    for t in trials:
        searches.setdefault(t.key[:-1], {}).setdefault(t.key[-1], {})[t.config] = t.median_ms
    found = []
    for of_key in searches.values():
        for one, other in itertools.combinations(of_key.values(), 2):
            shared = [config for config in one if config in other]
            order = spearman(*(np.array([times[config] for config in shared]) for times in (one, other)))
            found += [] if order is None else [order]
    if not found:
        return None
    return {"pairs_of_searches": len(found), "mean_spearman_within_keys": _rounded(float(np.mean(found)))}


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


def _pairs_in_order(trials: Sequence[Trial], predicted: np.ndarray, measured: np.ndarray) -> float:
    """Share of the pairs of a key's trials which the model has in their order, of those whose times differ clearly."""
    right = total = 0
    for inside in _by_key(trials):
        for i, j in itertools.combinations(sorted(inside, key=measured.__getitem__), 2):
            if measured[j] > _CLEARLY * measured[i]:
                right += predicted[i] < predicted[j]
                total += 1
    return right / total if total else math.nan


def _measured(trials: Sequence[Trial]) -> np.ndarray:
    return np.array([t.median_ms for t in trials])


def _by_key(trials: Sequence[Trial]) -> list[list[int]]:
    places: dict[tuple, list[int]] = {}
    for place, trial in enumerate(trials):
        places.setdefault(trial.key, []).append(place)
    return list(places.values())


def _records(folder: Path):
    """Spec, configuration, record and search of every correct trial.

    Times compare within a search: a file may hold several, and a key that comes back after others is of another one.
    """
    for path in (folder / name for name in TRIALS):
        searches: Counter = Counter()
        last = None
        for record in read_trials(path)[: _READ.get(path.name)] if path.exists() else ():
            key = (record["key"], record["seqlen"], record["batch_heads"])
            searches[key] += key != last
            last = key
            if record["kind"] == "ok":
                search = f"{path.stem} {searches[key]}"
                yield spec_of(record), KernelConfig.from_dict(record["plan"]), record, search


def _compile(folder: Path, library: Library, device: DeviceInfo, path: Path) -> None:
    for spec, config, _, _ in _records(folder):
        if (identity := identity_of(spec, config, device)) not in library:
            start = time.perf_counter()
            library.features(spec, config, device)
            print(f"{time.perf_counter() - start:.1f} s: {identity}", flush=True)
            library.save(path)


def _print(scores: dict) -> None:
    for name, values in scores.items():
        print(name, json.dumps({k: v for k, v in values.items() if k != "keys"}), flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile the kernels that features.json lacks")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="take features that were read elsewhere into features.json"
    )
    parser.add_argument("--fit", action="store_true", help="fit the constants to all trials and print them")
    parser.add_argument(
        "--write", action="store_true", help="write prediction.json, with scores of held-out trials (minutes)"
    )
    parser.add_argument("--steps", type=int, default=_FIT_STEPS, help="of each fit (default: %(default)s)")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
