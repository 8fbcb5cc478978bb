"""The tuner's command line: ``python -m lla_compile.tune``.

    python -m lla_compile.tune --quick
    python -m lla_compile.tune --gpu auto --phase backward --head-dim 128 --seqlen 4096
    python -m lla_compile.tune --gpu h200 --dtype bfloat16 --head-dim 64 128 --seqlen 4096 --trials 100
    python -m lla_compile.tune --phase decode --head-dim 128 --seqlen 16384 --batch-heads 8 256 --group 1 4 8
    python -m lla_compile.tune --verify --phase decode
    python -m lla_compile.tune --devices all --storage postgresql+psycopg://tuner@db/studies --resume

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
from lla_compile.spec import DTYPES, OPS, PHASES, PRECISIONS, SOLVING_OPS, LLASpec
from lla_compile.tuner import fleet, trials_file, verify
from lla_compile.tuner.compile_pool import CompilePool, worker_count
from lla_compile.tuner.evaluate import synchronize
from lla_compile.tuner.grid import Grid
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import DeviceLost, one_line
from lla_compile.tuner.predictor import ahead
from lla_compile.tuner.presets import PRESETS, Preset
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.progress import ProgressReport, make_console, print_results
from lla_compile.tuner.session import KeyResult, Settings, Watcher, begin_key, tune_key
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import quiet_optuna
from lla_compile.tuner.writer import out_file, require_writable
from lla_compile.tuning_db import DatabaseError, Entry

# Times of one plan on one device vary by a few per cent with clocks and drivers.
DRIFT = 0.10

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the keys that the arguments name; returns the exit code.

    0: every key has a winner; 1: some have none; 2: an argument cannot be used; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        if args.verify and args.devices:
            raise ValueError("--devices is for searches; entries are verified on one device: choose it with --gpu")
        info, devices = find_devices(args.gpu, args.devices)
        predicts = not devices
        if predicts and args.verify:
            raise ValueError(f"--verify measures, and {info.id} is not in this machine; choose one that is with --gpu")
        preset = _preset(args, info, predicts)
        if predicts:
            require_rates(info)
        entries = _entries(args, info) if args.verify else ()
        specs = [entry.spec() for entry in entries] or _specs(args, preset)
        path = out_file(args.out, info.id)
        require_writable(path, info)
        with quiet_optuna():
            storage = open_storage(args.storage)
            problems = [Problem(spec, info, devices[0] if devices else torch.device("cpu")) for spec in specs]
            named = tuple(args.backend or ())
            with contextlib.ExitStack() as stack:
                interruption = stack.enter_context(Interruption())
                if len(devices) > 1:
                    task = fleet.Task(tuple(specs), info, preset, args.seed, named, args.storage, path, args.trials_out)
                    if not _explore(problems, task, devices, storage, interruption, args.resume):
                        return EXIT_INTERRUPTED
                pool = features = None  # nothing that runs on a CPU has a compiler
                if predicts:
                    features = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lla_compile-")))
                    workers = worker_count(timing=False)
                    pool = stack.enter_context(CompilePool(info, workers, preset.compile_timeout_s, ahead(features)))
                elif not info.is_cpu:
                    pool = stack.enter_context(CompilePool(info, worker_count(), preset.compile_timeout_s))
                # What is off is searched anew; what a fleet has searched is only decided here.
                resume = not args.verify and (args.resume or len(devices) > 1)
                settings = Settings(preset, args.seed, resume, storage, path, interruption, named, pool, features)
                if args.verify:
                    return _verify(problems, entries, args.drift, settings, args.trials_out)
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


def find_devices(gpu: str, which: str | None) -> tuple[DeviceInfo, list[torch.device]]:
    """The devices of this machine that ``--gpu`` and ``--devices`` mean; all of them are the same product.

    Args:
        gpu: as :func:`find_device` takes it.
        which: None (that one device, or none if it is not in this machine), "all" (every GPU that is the same), or
            indices such as "0,1".

    Raises:
        ValueError: nothing is called that, a device of ``which`` is not in this machine, or they differ.
    """
    if which is None or which == "all":
        info, device = find_device(gpu)
        if which is None:
            return info, [device] if device is not None else []
        if device is None:
            raise ValueError(f"--devices all: there is no {info.id} in this machine")
        indices = range(torch.cuda.device_count())
        devices = [torch.device("cuda", i) for i in indices if identify(torch.device("cuda", i)) == info]
    else:
        try:
            devices = [torch.device("cuda", int(index)) for index in which.split(",")]
        except (ValueError, RuntimeError):
            raise ValueError(f"--devices must be all or indices such as 0,1, got {which!r}") from None
        if len(set(devices)) < len(devices):
            raise ValueError(f"--devices {which} names a device twice")
        found = {device: identify(device) for device in devices}
        info = found[devices[0]] if gpu == "auto" else find_device(gpu)[0]
        for device, other in found.items():
            if other != info:
                raise ValueError(f"--devices {which}: {device} is {other.id}, not {info.id}; tune them one by one")
    if not devices:
        raise ValueError(f"--devices is for GPUs: searches that share a CPU ({info.id}) would time each other")
    return info, devices


def _explore(problems, task: fleet.Task, devices, storage, interruption: Interruption, resume: bool) -> bool:
    """Search on several devices; False if that was interrupted."""
    print(f"Searching {len(problems)} key(s) on {len(devices)} devices: {', '.join(map(str, devices))}", flush=True)
    settings = Settings(task.preset, task.seed, resume, storage, task.path, interruption, task.backends)
    for problem in () if resume else problems:
        with contextlib.suppress(ValueError):  # said where the key is decided
            begin_key(problem, settings)
    try:
        fleet.explore(task, devices, interruption)
    except KeyboardInterrupt:
        print("Interrupted. Finished trials are kept; the same command with --resume goes on.")
        return False
    return True


def _entries(args: argparse.Namespace, info: DeviceInfo) -> Sequence[Entry]:
    """The entries to measure again: those that the given options name.

    Raises:
        ValueError: there are none.
    """
    given = {
        "op": args.op, "phase": args.phase, "dtype": args.dtype, "head_dim": args.head_dim,
        "head_dim_v": args.head_dim_v, "seqlen": args.seqlen, "batch_heads": args.batch_heads, "group": args.group,
        "precision": args.precision, "backend": args.backend, "causal": None if args.causal is None else [args.causal],
    }  # fmt: skip
    selection = verify.select(info, {name: values for name, values in given.items() if values})
    for reason, count in selection.left_out.items():
        print(f"left out: {count} of {info.id}: {reason}", file=sys.stderr)
    if not selection.used:
        raise ValueError(f"nothing measured for {info.id} is in use here that the other options name")
    return selection.used


def _verify(
    problems: Sequence[Problem],
    entries: Sequence[Entry],
    tolerance: float,
    settings: Settings,
    trials_out: Path | None,
) -> int:
    """Measure entries again, and tune those that are off."""
    console = make_console()
    info, device = problems[0].device, problems[0].torch_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console.print(f"Verifying {len(entries)} entries of {info.id}", markup=False, soft_wrap=True)
    readings: list[verify.Reading] = []

    def report(reading: verify.Reading) -> None:
        readings.append(reading)
        text = f"[{len(readings)}/{len(entries)}] {verify.line(reading, tolerance)}"
        console.print(text, markup=False, soft_wrap=True)

    code, ending = EXIT_OK, ""
    try:
        verify.verify(entries, info, device, settings, tolerance, report)
    except KeyboardInterrupt:
        code, ending = EXIT_INTERRUPTED, "Interrupted; "
    except DeviceLost as error:
        code, ending = EXIT_FAILED, f"The GPU's context is broken ({error}); "
    off = [problem for problem, reading in zip(problems, readings) if not reading.holds(tolerance)]
    written = sum(reading.outcome.ok for reading in readings)
    ending += f"{len(readings) - len(off)} of {len(readings)} hold; {written} written to {settings.path}"
    console.print(ending, markup=False, soft_wrap=True)
    return _tune(off, settings, trials_out) if off and code == EXIT_OK else code


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
    watcher = trials_file.following(report, trials_out)
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
    phases = args.phase or ["forward"]
    if args.group and "decode" not in phases:
        raise ValueError("--group is for --phase decode")
    grids = [_grid(op, phase, args, preset) for op in args.op or ["lla"] for phase in phases]
    left_out = [f"--batch-heads {heads} is no multiple of --group {n}" for g in grids for heads, n in g.indivisible]
    specs = [spec for grid in grids for spec in grid.specs()]
    if not specs:
        raise ValueError("; ".join(left_out))
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return specs


def _grid(op: str, phase: str, args: argparse.Namespace, preset: Preset) -> Grid:
    """The preset's grid of a phase with the command line's values in place of its own."""
    decode = phase == "decode"
    # Of operators that solve nothing only float32 has two tiers.
    precisions = preset.precisions if op in SOLVING_OPS else preset.precisions[:1]
    return Grid(
        op=op,
        phase=phase,
        dtypes=tuple(args.dtype or preset.dtypes),
        head_dims=tuple(args.head_dim or preset.head_dims),
        head_dims_v=tuple(args.head_dim_v or ()),
        seqlens=tuple(args.seqlen or (preset.decode_seqlens if decode else preset.seqlens)),
        batch_heads=tuple(args.batch_heads or (preset.decode_batch_heads if decode else preset.batch_heads)),
        precisions=tuple(args.precision or precisions),
        causal=(args.causal is not False,),
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
    parser.add_argument("--op", nargs="+", choices=OPS, help="default: lla; to verify, all")
    parser.add_argument("--phase", nargs="+", choices=PHASES, help="default: forward; to verify, all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--head-dim", nargs="+", type=positive, metavar="D", help="width of query and key")
    parser.add_argument("--head-dim-v", nargs="+", type=positive, metavar="D", help="width of the value (default: D)")
    parser.add_argument("--seqlen", nargs="+", type=positive, metavar="N", help="of a cache: its slots")
    parser.add_argument("--batch-heads", nargs="+", type=positive, metavar="BH", help="batch times query heads")
    parser.add_argument("--group", nargs="+", type=positive, metavar="G", help="query heads a key head, to decode")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="default: causal")
    parser.add_argument(
        "--backend", nargs="+", choices=backends.NAMES,
        help="search these backends only (default: all that can run; where times are predicted, triton)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="instead of searching, measure what the database says of this machine again, write the new figures and "
        "tune what is off; the options above choose the entries",
    )  # fmt: skip
    parser.add_argument(
        "--drift", type=_number(float, "a positive number"), default=DRIFT, metavar="X",
        help="with --verify: how far a time may be off; the same plan varies by a few per cent from day to day, so "
        "that less would tune noise (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--trials", type=positive, help="configurations evaluated for a key")
    parser.add_argument("--timeout", type=_number(float, "a positive number"), metavar="S", help="seconds for a key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the last search of the same keys and seed, or join it where another process is at it",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="URL",
        help="where searches are kept, for several hosts to share them: any Optuna storage URL such as "
        "postgresql+psycopg://USER@HOST/NAME, or journal:///FILE (default: a file in the user's state)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", metavar="all|0,1", help="search on several GPUs of this host together (default: on one)"
    )
    parser.add_argument("--out", type=Path, help="YAML file or directory to write to (default: the user's overlay)")
    parser.add_argument(
        "--trials-out", type=Path, metavar="FILE", help="append every trial to it, a JSON object a line"
    )
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
