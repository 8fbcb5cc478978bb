"""``lla-compile doctor``: what this machine is, what is tuned for it, what is missing, and whether it works."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from typing import Iterator, Sequence

import torch

import lla_compile
from lla_compile import planner
from lla_compile.devices import DeviceInfo, identify, known_devices
from lla_compile.dispatch import BACKENDS, lookup
from lla_compile.plans import Source
from lla_compile.self_test import case, self_test
from lla_compile.spec import PHASES, LLASpec
from lla_compile.tuner.grid import Grid
from lla_compile.tuner.presets import PRESETS
from lla_compile.tuner.toolchain import driver, installed
from lla_compile.tuning_db import DatabaseError, device_file, overlay_dir, shipped_dir, store

SELF_TEST_S = 10.0

# Commands shown of a device that lacks single keys of the common ones; --json has all.
_COMMANDS_SHOWN = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; parsing sets ``run``, which takes the parsed options and returns a status."""
    parser.description = (
        "Say what this GPU or CPU is, which tuned plans apply to it, what is missing and the command that would fill "
        "it, which versions are installed and which backends work, and check every backend that does against the "
        "float64 reference. Exits with 1 if something that should work is broken, with 0 otherwise: nothing tuned is "
        "not broken."
    )
    parser.add_argument("--gpu", default="auto", help="auto, or a device of this machine: an id, an alias, cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        info, device = _find_device(options.gpu)
    except ValueError as error:
        print(f"lla-compile doctor: {error}", file=sys.stderr)
        return 2
    findings = examine(info, device)
    print(json.dumps(findings, indent=2) if options.json else "\n".join(_lines(findings)))
    return 1 if findings["broken"] else 0


def examine(info: DeviceInfo, device: torch.device, seconds: float = SELF_TEST_S) -> dict:
    """All findings, as ``--json`` prints them; what should work and does not is listed under "broken"."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    versions = _versions()
    backends, refused = _backends(info)
    database, unreadable = _database(info)
    checks = self_test(info, device, backends, seconds)
    (not_tuned, common), commands = _missing(info)
    broken = list(unreadable)
    broken += [f"{c.backend} {c.phase}: {c.message}" for c in checks if c.status == "broken"]
    if not backends:
        broken.append("no backend works")
    if versions["driver"] and not torch.cuda.is_available():
        why = "is built without CUDA" if versions["cuda"] is None else "cannot use it"
        broken.append(f"there is an NVIDIA driver {versions['driver']}, but this PyTorch {why}")
    return {
        "device": _device(info, device),
        "versions": versions,
        "backends": {"usable": list(backends), "not_usable": refused},
        "database": database,
        "missing": {"common_keys": common, "not_tuned": not_tuned, "commands": commands},
        "self_test": [asdict(check) for check in checks],
        "broken": broken,
    }


def _find_device(name: str) -> tuple[DeviceInfo, torch.device]:
    if name == "auto":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        return identify(device), device
    # Imported only here: a doctor that needs optuna could not say that it is missing.
    from lla_compile.tune import find_device

    info, device = find_device(name)
    if device is None:
        raise ValueError(f"--gpu {name}: there is no {info.id} in this machine")
    return info, device


def _device(info: DeviceInfo, device: torch.device) -> dict:
    if info.is_cpu:
        how = "no GPU; all CPUs share this id, so that shipped plans were measured on another one"
        name = info.name
    else:
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        what = f"the driver's name {name!r}, compute capability {info.compute_capability} and {info.sms} SMs"
        if info in known_devices():
            how = f"{what} are those of {info.name} in devices.yaml"
        else:
            how = f"no product in devices.yaml has {what}; its limits are those that the driver reports"
    return {
        "id": info.id,
        "name": name,
        "torch_device": str(device),
        "identified_by": how,
        "compute_capability": info.compute_capability,
        "sms": info.sms,
        "memory_gib": info.memory_gib,
        "all_gpus": [identify(torch.device("cuda", i)).id for i in range(torch.cuda.device_count())],
    }


def _versions() -> dict[str, str | None]:
    cupy = sorted(d.name for d in metadata.distributions() if d.name and d.name.lower().startswith("cupy"))
    return {
        "lla_compile": lla_compile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cupy": " ".join(f"{name} {installed(name)}" for name in cupy) or None,
        "optuna": installed("optuna"),
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def _backends(info: DeviceInfo) -> tuple[dict, dict[str, str]]:
    """The backends that the planner would use for at least one phase, and why it would not use the others."""
    usable, refused = {}, {}
    for phase in PHASES:
        found, why = planner.usable_backends(case(phase, info), info, BACKENDS)
        usable |= found
        refused = why | refused
    order = [name for name in BACKENDS if name in usable]
    if info.is_cpu:
        refused |= {name: "a CPU runs the eager backend" for name in BACKENDS if name not in usable}
    return {name: usable[name] for name in order}, {n: why for n, why in refused.items() if n not in usable}


def _database(info: DeviceInfo) -> tuple[list[dict], list[str]]:
    """The files of the device with counts of their entries, and those that cannot be read."""
    files, unreadable = [], []
    for origin, directory in (("overlay", overlay_dir()), ("shipped", shipped_dir())):
        path = device_file(directory, info.id)
        found = {"origin": origin, "path": str(path), "exists": path.exists(), "entries": [], "refused": {}}
        files.append(found)
        if not path.exists():
            continue
        try:
            document = store.read(path)
        except DatabaseError as error:
            unreadable.append(str(error))
            continue
        counts, refused = Counter(), Counter()
        for entry in document.entries:
            reason = planner.refusal(entry, info, BACKENDS)
            counts[entry.key.phase, entry.key.dtype, entry.provenance, reason is None] += 1
            if reason is not None:
                refused[reason] += 1
        names = "phase", "dtype", "provenance", "used"
        found["entries"] = [dict(zip(names, key), count=count) for key, count in sorted(counts.items())]
        found["refused"] = dict(refused)
    return files, unreadable


def _missing(info: DeviceInfo) -> tuple[tuple[int, int], list[str]]:
    """How many of the common keys have no plan of their own, how many there are, and the commands that tune them."""
    missing, total, commands = 0, 0, []
    for phase in PHASES:
        specs = _common(phase, info)
        total += len(specs)
        lacking = [spec for spec in specs if _is_missing(spec, info)]
        missing += len(lacking)
        commands += _commands(lacking, info)
    return (missing, total), commands


def _common(phase: str, info: DeviceInfo) -> list[LLASpec]:
    """What the tuner tunes when nothing but the phase is named."""
    preset = PRESETS["full", "cpu" if info.is_cpu else "gpu"]
    decode = phase == "decode"
    grid = Grid(
        phase, preset.dtypes, preset.head_dims, (), preset.decode_seqlens if decode else preset.seqlens,
        preset.decode_batch_heads if decode else preset.batch_heads, preset.precisions, (True,), preset.groups,
    )  # fmt: skip
    return grid.specs()


def _is_missing(spec: LLASpec, info: DeviceInfo) -> bool:
    try:
        return planner.make_plan(spec, info, BACKENDS, lookup).source is not Source.EXACT
    except NotImplementedError:
        return False  # no tuning helps where no backend runs it


def _commands(specs: Sequence[LLASpec], info: DeviceInfo) -> list[str]:
    """The commands that tune these specs of one phase and no others: a single one where they are a whole grid."""
    axes = {
        "--dtype": sorted({spec.dtype for spec in specs}),
        "--head-dim": sorted({spec.head_dim for spec in specs}),
        "--seqlen": sorted({spec.seqlen_k for spec in specs}),
        "--batch-heads": sorted({spec.batch_heads for spec in specs}),
        "--precision": sorted({spec.precision for spec in specs}),
    }
    decode = bool(specs) and specs[0].phase == "decode"
    if decode:
        axes["--group"] = sorted({spec.group_size for spec in specs})
    spanned = math.prod(map(len, axes.values()))
    if decode:
        pairs = [(heads, group) for heads in axes["--batch-heads"] for group in axes["--group"]]
        indivisible = sum(heads % group != 0 for heads, group in pairs)
        spanned -= indivisible * spanned // len(pairs)
    if not specs or spanned != len(specs):
        return [planner.tune_command(spec, info) for spec in specs]
    options = " ".join(f"{option} {' '.join(map(str, values))}" for option, values in axes.items())
    return [f"python -m lla_compile.tune --gpu {info.id} --phase {specs[0].phase} {options}"]


def _lines(findings: dict) -> Iterator[str]:
    device, missing = findings["device"], findings["missing"]
    yield f"device    {device['name']} ({device['id']}), {device['torch_device']}"
    yield f"          {device['identified_by']}"
    if len(device["all_gpus"]) > 1:
        yield f"          GPUs here: {', '.join(device['all_gpus'])}"
    versions = (f"{name} {version or 'not found'}" for name, version in findings["versions"].items())
    yield f"versions  {', '.join(versions)}"
    yield f"backends  {', '.join(findings['backends']['usable']) or 'none'}"
    for name, why in findings["backends"]["not_usable"].items():
        yield f"          not {name}: {why}"
    for number, file in enumerate(findings["database"]):
        label = "database" if number == 0 else ""
        yield f"{label:<8}  {file['origin']}: {file['path']}" + ("" if file["exists"] else " (no such file)")
        for row in file["entries"]:
            used = "" if row["used"] else ", not used"
            yield f"            {row['count']:>4} {row['phase']} {row['dtype']} {row['provenance']}{used}"
        for reason, count in file["refused"].items():
            yield f"            {count:>4} refused: {reason}"
    tuned = missing["common_keys"] - missing["not_tuned"]
    yield f"tuned     {tuned} of the {missing['common_keys']} common keys"
    for command in missing["commands"][:_COMMANDS_SHOWN]:
        yield f"          fill: {command}"
    if len(missing["commands"]) > _COMMANDS_SHOWN:
        yield f"          and {len(missing['commands']) - _COMMANDS_SHOWN} more (--json lists them)"
    for number, check in enumerate(findings["self_test"]):
        yield f"{'self-test' if number == 0 else '':<9} {_check_line(check)}"
    for number, problem in enumerate(findings["broken"]):
        yield f"{'broken' if number == 0 else '':<9} {problem}"
    if not findings["broken"]:
        yield "result    nothing is broken"


def _check_line(check: dict) -> str:
    what = f"{check['backend']:<7} {check['phase']:<9}"
    if check["error"] is None:
        return f"{what} {check['status']}: {check['message']}"
    figures = f"error {check['error']:.1e}, limit {check['error_limit']:.1e}"
    time = "" if check["median_ms"] is None else f", {check['median_ms']:.3f} ms"
    return f"{what} {check['status']}: {figures}{time}"
