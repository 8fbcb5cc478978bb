"""Evaluate every feasible configuration of one key and keep all outcomes, so that searches can be replayed.

    python -m benchmarks.space --head-dim 64 --seqlen 4096 --out tests/data/space.json
    python -m benchmarks.space --gpu h200 --phase decode --head-dim 128 --seqlen 16384 --out space.json

On a GPU that is not in this machine times are predicted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Sequence

import torch

from lla_compile import backends
from lla_compile.spec import PHASES, PRECISIONS, LLASpec
from lla_compile.tune import find_device
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.outcome import Outcome
from lla_compile.tuner.predictor import Predictor, comparable
from lla_compile.tuner.presets import PRESETS
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.replay import Recording
from lla_compile.tuner.space import SearchSpace, usable_backends


def main(argv: Sequence[str] | None = None) -> int:
    """Record one space."""
    args = _parser().parse_args(argv)
    info, device = find_device(args.gpu)
    spec = _spec(args)
    problem = Problem(spec, info, device or torch.device("cpu"))
    space = SearchSpace.joint(spec, info, usable_backends(spec, info, args.backend or ()))
    with tempfile.TemporaryDirectory() as folder:
        if device is None:
            space, evaluate = comparable(space), Predictor(problem, Path(folder))
        else:
            evaluate = Evaluator(problem, space.backends, PRESETS["full", "cpu" if info.is_cpu else "gpu"])
        outcomes: dict = {}
        for config in space.shuffled(0):
            outcome: Outcome = evaluate(config)
            outcomes[config] = outcome
            print(f"{len(outcomes)} {config.describe()}: {outcome.median_ms or outcome.message}", flush=True)
    provenance = "predicted" if device is None else "measured"
    Recording(spec, info.id, provenance, space.knobs, space.default(), outcomes).save(args.out)
    print(f"{len(outcomes)} configurations in {args.out}")
    return 0


def _spec(args: argparse.Namespace) -> LLASpec:
    sizes = args.dtype, args.head_dim, args.seqlen, args.batch_heads, args.head_dim
    fields = {"is_causal": True, "precision": args.precision}
    if args.phase == "decode":
        return LLASpec.decoding(*sizes, group_size=args.group, **fields)
    return LLASpec.self_attention(*sizes, phase=args.phase, **fields)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.space", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="auto", help="as for lla_compile.tune")
    parser.add_argument("--phase", choices=PHASES, default="forward")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--batch-heads", type=int, default=32)
    parser.add_argument("--group", type=int, default=1, help="query heads a key head, to decode")
    parser.add_argument("--precision", choices=PRECISIONS, default="fast")
    parser.add_argument("--backend", nargs="+", choices=backends.NAMES, help="record these backends' spaces only")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
