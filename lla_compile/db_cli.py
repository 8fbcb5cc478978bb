"""``lla-compile db``: look at the tuning database, check files and merge them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Iterator

from lla_compile.devices import DeviceInfo, identify_properties, known_devices, resolve
from lla_compile.key import TuningKey
from lla_compile.tuning_db import store, yaml_format
from lla_compile.tuning_db.document import DeviceHeader, Document
from lla_compile.tuning_db.entry import Entry
from lla_compile.tuning_db.short import short

_KEY_FIELDS = tuple(f.name for f in fields(TuningKey))
_SHOWN = (
    "key", "seqlen", "batch_heads", "plan", "fastest", "median ms", "default ms", "error", "date", "provenance", "database"
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the ``db`` commands; parsing sets ``run``, which takes the parsed options and returns a status."""
    commands = parser.add_subparsers(dest="db_command", required=True, metavar="{list,show,verify,merge}")

    command = commands.add_parser(
        "list", help="devices, files, how many plans each has, and for how many problems each backend is the fastest"
    )
    command.set_defaults(run=_user_errors(_list))

    command = commands.add_parser("show", help="the plans of one device")
    command.add_argument("device", help="id or alias, e.g. nvidia-h200 or h200")
    command.add_argument(
        "--key",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help=f"only plans with this key, e.g. dtype=bfloat16 head_dim=128; fields: {', '.join(_KEY_FIELDS)}",
    )
    command.set_defaults(run=_user_errors(_show))

    command = commands.add_parser("verify", help="check files: schema, duplicates, limits of the device")
    command.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: overlay and shipped database")
    command.set_defaults(run=_user_errors(_verify))

    command = commands.add_parser(
        "merge",
        help="write the best of several files for one device to OUT",
        description="Write to OUT, for each key and size, the best of the entries of all files: measured before "
        "predicted, then the fastest. It lists what the others had found. The order of files is irrelevant.",
    )
    command.add_argument("out", type=Path, metavar="OUT", help="kept and added to if it exists")
    command.add_argument("files", nargs="+", type=Path, metavar="IN")
    command.set_defaults(run=_user_errors(_merge))


def _user_errors(command):
    """A wrong input ends in one line and status 2."""

    def run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except (ValueError, store.DatabaseError) as error:
            print(f"lla-compile db: {error}", file=sys.stderr)
            return 2

    return run


def _list(options: argparse.Namespace) -> int:
    table = _table("device", "database", "measured", "predicted", "fastest", "file", right=(2, 3))
    rows = 0
    for origin, directory in _databases():
        for path, document in store.load_all(directory).items():
            measured = sum(entry.measured for entry in document.entries)
            predicted = len(document.entries) - measured
            wins = Counter(entry.config.backend for entry in document.fastest())
            fastest = ", ".join(f"{backend} {count}" for backend, count in wins.most_common())
            table.add_row(document.device.id, origin, str(measured), str(predicted), fastest, str(path))
            rows += 1
    if rows:
        _print(table)
    else:
        print("nothing is tuned yet; run `lla-compile tune --gpu auto`")
    print(f"overlay: {store.overlay_dir()} (set {store.OVERLAY_VARIABLE} to use another directory)")
    return 0


def _show(options: argparse.Namespace) -> int:
    wanted = _key_filters(options.key)
    device_id = _device_id(options.device)
    table = _table(*_SHOWN, right=(1, 2, 5, 6, 7))
    for origin, directory in _databases():
        document = store.load(store.device_file(directory, device_id))
        if document is None:
            continue
        fastest = {entry.slot for entry in document.fastest()}
        for entry in document.entries:
            if wanted.items() <= entry.key.as_dict().items():
                table.add_row(*_cells(entry, entry.slot in fastest), origin)
    if table.row_count:
        _print(table)
    else:
        which = f" with {' '.join(options.key)}" if options.key else ""
        print(f"nothing is tuned for {device_id}{which}; run `lla-compile tune --gpu {device_id}` on that device")
    return 0


def _verify(options: argparse.Namespace) -> int:
    paths = options.files or [path for _, directory in _databases() for path in _files(directory)]
    failed = 0
    for path in paths:
        problems = list(_problems(path))
        for problem in problems:
            print(f"{path}: {problem}")
        failed += bool(problems)
    print(f"{len(paths)} files checked, {failed} with problems")
    return 1 if failed else 0


def _merge(options: argparse.Namespace) -> int:
    document = store.merge(options.out, options.files)
    print(f"{options.out}: {len(document.entries)} entries for {document.device.id}")
    return 0


def _databases() -> tuple[tuple[str, Path], ...]:
    return ("overlay", store.overlay_dir()), ("shipped", store.shipped_dir())


def _files(directory: Path) -> list[Path]:
    """Every file that claims to be of the database, usable or not."""
    return sorted(p for p in directory.glob("*.yaml") if p.name != "devices.yaml") if directory.is_dir() else []


def _device_id(name: str) -> str:
    """The id of a listed device, or of one that only has a file."""
    for _, directory in _databases():
        if store.device_file(directory, name).exists():
            return name
    return resolve(name).id


def _key_filters(items: list[str]) -> dict:
    """``dtype=bfloat16 head_dim=128`` as a mapping with the types of the key."""
    types = {f.name: f.type.partition(" ")[0] for f in fields(TuningKey)}
    wanted = {}
    for item in items:
        name, given, value = item.partition("=")
        if not given or name not in types:
            raise ValueError(f"--key takes FIELD=VALUE with a field of {', '.join(types)}, got {item!r}")
        parsed = value if types[name] == "str" else yaml_format.load(value)
        if type(parsed).__name__ != types[name]:
            raise ValueError(f"--key {name} takes {types[name]}, got {value!r}")
        wanted[name] = parsed
    return wanted


def _cells(entry: Entry, fastest: bool) -> tuple[str, ...]:
    def number(form: str, *names: str) -> str:
        value = next((entry.result[name] for name in names if name in entry.result), None)
        return "" if value is None else format(value, form)

    return (
        entry.key.describe(),
        str(entry.tuned.seqlen),
        str(entry.tuned.batch_heads),
        short(entry.config),
        "yes" if fastest else "no",
        number(".4g", "median_ms", "predicted_ms"),
        number(".4g", "default_ms", "predicted_default_ms"),
        number(".1e", "error"),
        entry.date[:10],
        f"{entry.provenance}, best of {len(entry.origins)}" if entry.origins else entry.provenance,
    )


def _problems(path: Path) -> Iterator[str]:
    """What is wrong with a file, one line each."""
    try:
        content = yaml_format.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    except ValueError as error:
        yield " ".join(str(error).split())
        return
    if broken := store.schema_problems(content):
        yield from broken
        return
    try:
        document = Document.from_dict(content)
    except ValueError as error:
        yield str(error)
        return
    if path.stem != document.device.id and path.parent in (directory for _, directory in _databases()):
        yield f"is for {document.device.id}, so look-ups skip it under this name"
    device = _device_of(document.device)
    if DeviceHeader.of(device).identity != document.device.identity:
        yield f"says {document.device.sms} SMs and capability {document.device.compute_capability} for {device.id}"
        return
    for entry in document.entries:
        if problem := _entry_problem(entry, device):
            yield f"{entry.describe()}: {problem}"


def _device_of(header: DeviceHeader) -> DeviceInfo:
    """The listed device, or for another one a description with the limits of its compute capability."""
    for device in known_devices():
        if device.id == header.id:
            return device
    name = header.id.removesuffix(f"-{header.sms}sm")
    return identify_properties(name, header.compute_capability, header.sms, header.memory_gib, vendor=header.vendor)


def _entry_problem(entry: Entry, device: DeviceInfo) -> str | None:
    from lla_compile import backends

    tuned = entry.tuned
    if not entry.covers(tuned.seqlen, tuned.batch_heads):
        return "its validity range leaves out the sizes that it was tuned at"
    if entry.measured and entry.result["error"] > entry.result.get("error_limit", float("inf")):
        return f"error {entry.result['error']:.1e} is above the limit {entry.result['error_limit']:.1e}"
    try:
        spec = entry.spec()
        backend = backends.get(entry.config.backend)
    except ValueError as error:
        return str(error)
    except ImportError:
        return None  # this machine lacks what the backend needs: its limits cannot be checked here
    # Whatever is installed here: the plans of a file are for other machines too.
    return backend.unsupported_spec(spec, device) or backend.infeasible(spec, entry.config, device)


def _table(*columns: str, right: tuple[int, ...] = ()):
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        wrap = column in ("key", "plan", "file")
        table.add_column(column, justify="right" if index in right else "left", overflow="fold", no_wrap=not wrap)
    return table


def _print(table) -> None:
    """To the terminal's width; into a pipe or a file, one line a row."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 400).print(table)
