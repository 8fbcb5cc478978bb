"""Where studies live: an embedded file by default, any Optuna storage URL when asked."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import platformdirs
import sqlalchemy

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "redis": 6379, "rediss": 6379}
_CONNECT_TIMEOUT_S = 10

# Processes that open an empty database together get in each other's way when they make its tables.
_ATTEMPTS = 4
_PAUSE_S = 0.5

_INSTALL = {
    "postgresql": "pip install 'lla-compile[postgresql]' and use postgresql+psycopg://",
    "mysql": "pip install pymysql and use mysql+pymysql://",
    "redis": "pip install redis",
}

# Several processes may share a study; SQLite lets one of them write at a time.
_SQLITE_LOCK_TIMEOUT_S = 60


def default_file() -> Path:
    """The embedded database of the user's studies."""
    return platformdirs.user_state_path("lla_compile", appauthor=False) / "studies.sqlite3"


def open_storage(url: str | None) -> optuna.storages.BaseStorage:
    """Open a storage.

    Args:
        url: an SQLAlchemy URL, redis://..., journal:///FILE for a file that hosts share, or None for the embedded
            file.

    Raises:
        ValueError: the URL is none, or what it names cannot be reached; the message says what to do.
    """
    if url is None:
        file = default_file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"cannot make {file.parent} for the studies ({reason}); give a --storage") from error
        url = f"sqlite:///{file}"
    parts = urlsplit(url)
    dialect = parts.scheme.partition("+")[0]
    if not dialect or "://" not in url:
        raise ValueError(f"--storage must be a URL such as sqlite:///studies.sqlite3, got {url!r}")
    if parts.hostname:
        _require_host(url, parts.hostname, parts.port or _DEFAULT_PORTS.get(dialect))
    try:
        if dialect == "journal":
            return optuna.storages.JournalStorage(_journal_file(url))
        if dialect in ("redis", "rediss"):
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalRedisBackend(url))
        return _open_database(url, dialect)
    except ImportError as error:
        reason = f"needs a driver that is not installed: {_first_line(error)}"
        if hint := _INSTALL.get(dialect):
            reason += f"; {hint}"
    except Exception as error:  # every driver has errors of its own, and all of them mean the same to the user
        reason = f"cannot be opened: {_first_line(error.__cause__ or error)}"
    raise ValueError(f"--storage {_public(url)} {reason}")


def _journal_file(url: str) -> optuna.storages.journal.JournalFileBackend:
    """A journal needs no server, and unlike SQLite it may lie on a network file system."""
    path = Path(url.partition("://")[2])
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory")
    return optuna.storages.journal.JournalFileBackend(str(path))


def _open_database(url: str, dialect: str) -> optuna.storages.RDBStorage:
    if dialect == "sqlite":
        options = {"connect_args": {"timeout": _SQLITE_LOCK_TIMEOUT_S}}
    else:
        options = {"pool_pre_ping": True}  # a server may have closed a connection that a long trial left idle
    for attempt in range(_ATTEMPTS):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
            break
        except sqlalchemy.exc.DBAPIError as error:
            is_race = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if not is_race or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_S)
    if dialect == "sqlite":
        _lock_for_whole_transactions(storage.engine)
    return storage


def _lock_for_whole_transactions(engine: sqlalchemy.Engine) -> None:
    """Let one process at a time read and write an SQLite file.

    Optuna reads a queued trial's state FOR UPDATE before it takes the trial. SQLite ignores these words, and Python's
    driver opens a transaction with the first write only, so that two processes would take the same trial.
    """

    def began(connection: sqlalchemy.Connection) -> None:
        connection.connection.driver_connection.isolation_level = None  # the driver begins none of its own
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "begin", began)


def _require_host(url: str, host: str, port: int | None) -> None:
    """Refuse a host that does not answer before a driver spends minutes on it."""
    if port is None:
        return
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = f"{host}:{port} does not answer ({error})"
        raise ValueError(f"--storage {_public(url)} cannot be reached: {reason}; check that it runs") from error


def _public(url: str) -> str:
    """The URL without its user and password."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
