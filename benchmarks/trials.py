"""Every trial of a search, one JSON object a line: the tuner's ``--trials-out``, or recovered from a printed log.

    python -m benchmarks.trials benchmarks/results/nvidia-h200/tune-forward-bfloat16.log --out trials.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Sequence

from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.tuner.outcome import Kind

# Of a search on several devices each line begins with its device.
_HEADER = re.compile(
    r"(?:\[\d+/\d+\] |(?P<device>cuda:\d+)  )(?P<key>.+), N (?P<seqlen>\d+), B\*H (?P<batch_heads>\d+)"
)
_TRIAL = re.compile(
    r"\s+(?:\d+/\d+|(?P<device>cuda:\d+)) (?P<plan>[a-z]+ (?:fused|split|gram) [^:]+): (?P<ending>.+)"
)
_PLAN = re.compile(
    r"(?P<backend>[a-z]+) (?P<schedule>[a-z]+) (?P<tile>.+?)(?:, (?P<iterations>\d+) CG)?(?:; kv (?P<kv_tile>.+))?"
)
_TILE = re.compile(
    r"(\d+)x(\d+)(?:, (\d+) warps)?(?:, (\d+) stages)?(?:, (\d+) splits)?(?:, block_d (\d+))?"
)
_TIME = re.compile(r"([\d.]+) ms")
_KEY = re.compile(
    r"(?P<op>\w+) (?P<phase>\w+) (?P<dtype>\w+) D(?P<head_dim>\d+) Dv(?P<head_dim_v>\d+) (?P<precision>\w+) "
    r"(?P<mask>causal|full)(?: group (?P<group>\d+))?"
)
_TILE_KNOBS = ("block_q", "block_k", "num_warps", "num_stages")


def parse_plan(text: str) -> KernelConfig:
    """The inverse of ``tuning_db.short.short``."""
    plan = _PLAN.fullmatch(text)
    names = (*_TILE_KNOBS, "num_splits", "block_d")
    knobs = dict(zip(names, _TILE.fullmatch(plan["tile"]).groups()))
    if plan["kv_tile"]:
        own = _TILE.fullmatch(plan["kv_tile"]).groups()
        knobs |= {f"kv_{name}": value for name, value in zip(_TILE_KNOBS, own)}
    numbers = {name: int(value) for name, value in knobs.items() if value is not None}
    iterations = int(plan["iterations"]) if plan["iterations"] else None
    return KernelConfig(plan["backend"], plan["schedule"], cg_max_iters=iterations, **numbers)


def parse_log(lines: Sequence[str]) -> list[dict]:
    """The trials of a printed search, key by key. A printed time has three decimals and no spread; a printed failure no
    figures."""
    headers: dict[str | None, dict] = {}
    trials: dict[tuple, list[dict]] = {}
    for line in lines:
        if match := _HEADER.match(line):
            headers[match["device"]] = {
                "key": match["key"], "seqlen": int(match["seqlen"]), "batch_heads": int(match["batch_heads"]),
            }  # fmt: skip
        elif match := _TRIAL.match(line):
            config, ending, header = parse_plan(match["plan"]), match["ending"], headers[match["device"]]
            if time := _TIME.fullmatch(ending):
                outcome = {"kind": Kind.OK.value, "median_ms": float(time[1])}
            else:
                kind, _, message = ending.partition(": ")
                outcome = {"kind": Kind(kind).value, "message": message}
            own = trials.setdefault(tuple(header.values()), [])
            own.append(header | {"plan": config.as_dict()} | outcome)
    return [trial for own in trials.values() for trial in own]


def read_trials(path: Path) -> list[dict]:
    """The trials of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def spec_of(trial: dict) -> LLASpec:
    """What a trial timed."""
    key = _KEY.fullmatch(trial["key"])
    sizes = key["dtype"], int(key["head_dim"]), trial["seqlen"], trial["batch_heads"], int(key["head_dim_v"])
    fields = {"op": key["op"], "is_causal": key["mask"] == "causal", "precision": key["precision"]}
    if key["phase"] == "decode":
        return LLASpec.decoding(*sizes, group_size=int(key["group"]), **fields)
    return LLASpec.self_attention(*sizes, phase=key["phase"], **fields)


def main(argv: Sequence[str] | None = None) -> int:
    """Turn a log into trials."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    trials = parse_log(args.log.read_text().splitlines())
    args.out.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    print(f"{len(trials)} trials in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
