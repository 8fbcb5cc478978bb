"""The tuner's command line: ``python -m lla_compile.tune``.

    python -m lla_compile.tune --quick
    python -m lla_compile.tune --gpu auto --phase backward --head-dim 128 --seqlen 4096
    python -m lla_compile.tune --gpu h200 --dtype bfloat16 --head-dim 64 128 --seqlen 4096 --trials 100
    python -m lla_compile.tune --phase decode --head-dim 128 --seqlen 16384 --batch-heads 8 256 --group 1 4 8

For a GPU that is not in this machine times are predicted: every configuration is compiled for it, and a model of the
device ranks what the machine code says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Sequence

import optuna
import torch

from lla_compile import backends
from lla_compile.devices import DeviceInfo, identify, resolve
from lla_compile.prediction.model import require_rates
from lla_compile.spec import DTYPES, PHASES, PRECISIONS, LLASpec
from lla_compile.tuner.compile_pool import CompilePool, worker_count
from lla_compile.tuner.evaluate import synchronize
from lla_compile.tuner.grid import Grid
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import DeviceLost, one_line
from lla_compile.tuner.predictor import ahead
from lla_compile.tuner.presets import PRESETS, Preset
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.progress import ProgressReport, make_console, print_results
from lla_compile.tuner.session import KeyResult, Settings, Watcher, tune_key
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import quiet_optuna
from lla_compile.tuner.trials_file import TrialsFile
from lla_compile.tuner.writer import out_file, require_writable
from lla_compile.tuning_db import DatabaseError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the keys that the arguments name; returns the exit code.

    0: every key has a winner; 1: some have none; 2: an argument cannot be used; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        info, device = find_device(args.gpu)
        predicts = device is None
        preset = _preset(args, info, predicts)
        if predicts:
            require_rates(info)
        specs = _specs(args, preset)
        path = out_file(args.out, info.id)
        require_writable(path, info)
        with quiet_optuna():
            storage = open_storage(args.storage)
            problems = [Problem(spec, info, device or torch.device("cpu")) for spec in specs]
            named = tuple(args.backend or ())
            with contextlib.ExitStack() as stack:
                interruption = stack.enter_context(Interruption())
                pool = features = None  # nothing that runs on a CPU has a compiler
                if predicts:
                    features = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lla_compile-")))
                    workers = worker_count(timing=False)
                    pool = stack.enter_context(CompilePool(info, workers, preset.compile_timeout_s, ahead(features)))
                elif not info.is_cpu:
                    pool = stack.enter_context(CompilePool(info, worker_count(), preset.compile_timeout_s))
                settings = Settings(preset, args.seed, args.resume, storage, path, interruption, named, pool, features)
                return _tune(problems, settings, args.trials_out)
    except (ValueError, OSError, DatabaseError, optuna.exceptions.StorageInternalError) as error:
        print(f"lla_compile.tune: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def find_device(name: str) -> tuple[DeviceInfo, torch.device | None]:
    """The device that ``--gpu`` means, and where it is; None if it is not in this machine.

    Args:
        name: "auto" (the CUDA device if there is one, else the CPU), an id or an alias.

    Raises:
        ValueError: nothing is called that.
    """
    present = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [torch.device("cpu")]
    if name == "auto":
        return identify(present[0]), present[0]
    here = {device: identify(device) for device in present}
    for device, info in here.items():
        if info.id == name:
            return info, device
    wanted = resolve(name, here.values())
    for device, info in here.items():
        if info.id == wanted.id:
            return info, device
    return wanted, None


def _tune(problems: Sequence[Problem], settings: Settings, trials_out: Path | None) -> int:
    console = make_console()
    info, device = problems[0].device, problems[0].torch_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    what = f"{len(problems)} key(s) on {info.name} ({info.id})"
    if settings.features is None:
        opening = f"Tuning {what}"
    else:
        opening = f"Predicting {what}, which is not in this machine: times come from a model, none is measured"
    console.print(opening, markup=False, soft_wrap=True)
    report = ProgressReport(console, len(problems))
    watcher = TrialsFile(trials_out, report) if trials_out else report
    code, ending = EXIT_OK, ""
    try:
        with report:
            for problem in problems:
                settings.interruption.check()
                if not _tune_or_note(problem, settings, watcher):
                    code = EXIT_FAILED
    except KeyboardInterrupt:
        code, ending = EXIT_INTERRUPTED, "Interrupted."
    except DeviceLost as error:
        code, ending = EXIT_FAILED, f"The GPU's context is broken, so that nothing more can run here: {error}."
    print_results(console, report.results, settings.path)
    if ending:
        ending += " Finished trials are kept; the same command with --resume goes on."
        console.print(ending, markup=False, soft_wrap=True)
    return code


def _tune_or_note(problem: Problem, settings: Settings, watcher: Watcher) -> bool:
    """Tune a key; what makes one key impossible is noted and does not keep the others from being tuned."""
    try:
        return tune_key(problem, settings, watcher).decision is not None
    except DeviceLost:
        raise
    except (ValueError, RuntimeError) as error:
        if isinstance(error, DatabaseError):
            raise
        try:
            synchronize(problem.torch_device)
        except RuntimeError:
            raise DeviceLost(one_line(error)) from error
        # A ValueError or NotImplementedError is addressed to the user, anything else names its type.
        worded = isinstance(error, (ValueError, NotImplementedError))
        watcher.end(KeyResult(problem.spec, note=" ".join(str(error).split()) if worded else one_line(error)))
        return False


def _preset(args: argparse.Namespace, info: DeviceInfo, predicts: bool) -> Preset:
    """The preset of the device with the command line's effort."""
    kind = "prediction" if predicts else "cpu" if info.is_cpu else "gpu"
    preset = PRESETS["quick" if args.quick else "full", kind]
    given = {"trials": args.trials, "timeout_s": args.timeout}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def _specs(args: argparse.Namespace, preset: Preset) -> list[LLASpec]:
    """What the phases' grids span.

    Raises:
        ValueError: a value is not allowed, or nothing is left to tune; the message names it.
    """
    if args.group and "decode" not in args.phase:
        raise ValueError("--group is for --phase decode")
    grids = [_grid(phase, args, preset) for phase in args.phase]
    left_out = [f"--batch-heads {heads} is no multiple of --group {n}" for g in grids for heads, n in g.indivisible]
    specs = [spec for grid in grids for spec in grid.specs()]
    if not specs:
        raise ValueError("; ".join(left_out))
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return specs


def _grid(phase: str, args: argparse.Namespace, preset: Preset) -> Grid:
    """The preset's grid of a phase with the command line's values in place of its own."""
    decode = phase == "decode"
    return Grid(
        phase=phase,
        dtypes=tuple(args.dtype or preset.dtypes),
        head_dims=tuple(args.head_dim or preset.head_dims),
        head_dims_v=tuple(args.head_dim_v or ()),
        seqlens=tuple(args.seqlen or (preset.decode_seqlens if decode else preset.seqlens)),
        batch_heads=tuple(args.batch_heads or (preset.decode_batch_heads if decode else preset.batch_heads)),
        precisions=tuple(args.precision or preset.precisions),
        causal=(args.causal,),
        groups=tuple(args.group or preset.groups),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lla_compile.tune",
        description="Search the fastest correct plan of each key and write it into the tuning database. "
        "Options that take several values span a grid of keys, tuned one after another.",
    )
    positive = _number(int, "a positive integer")
    parser.add_argument(
        "--gpu",
        default="auto",
        help="auto, a device id or an alias such as h200 (default: auto); times on one that is not here are predicted",
    )
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=["forward"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--head-dim", nargs="+", type=positive, metavar="D", help="width of query and key")
    parser.add_argument("--head-dim-v", nargs="+", type=positive, metavar="D", help="width of the value (default: D)")
    parser.add_argument("--seqlen", nargs="+", type=positive, metavar="N", help="of a cache: its slots")
    parser.add_argument("--batch-heads", nargs="+", type=positive, metavar="BH", help="batch times query heads")
    parser.add_argument("--group", nargs="+", type=positive, metavar="G", help="query heads a key head, to decode")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backend", nargs="+", choices=backends.NAMES, help="search these backends only")
    parser.add_argument("--trials", type=positive, help="configurations evaluated for a key")
    parser.add_argument("--timeout", type=_number(float, "a positive number"), metavar="S", help="seconds for a key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the last search of the same keys and seed")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage URL (default: a file in the user's state)")
    parser.add_argument("--out", type=Path, help="YAML file or directory to write to (default: the user's overlay)")
    parser.add_argument("--trials-out", type=Path, metavar="FILE", help="append every trial to it, a JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few keys, few trials")
    return parser


def _number(kind: type, allowed: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
