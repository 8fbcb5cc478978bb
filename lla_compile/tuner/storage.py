"""Where studies live: an embedded file by default, any Optuna storage URL when asked."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import platformdirs

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "redis": 6379, "rediss": 6379}
_CONNECT_TIMEOUT_S = 10


# Several processes may share a study; SQLite lets one of them write at a time.
_SQLITE_LOCK_TIMEOUT_S = 60


def default_file() -> Path:
    """The embedded database of the user's studies."""
    return platformdirs.user_state_path("lla_compile", appauthor=False) / "studies.sqlite3"


def open_storage(url: str | None) -> optuna.storages.BaseStorage:
    """Open a storage.

    Args:
        url: an SQLAlchemy URL, redis://..., or None for the embedded file.

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
        if dialect in ("redis", "rediss"):
            backend = optuna.storages.journal.JournalRedisBackend(url)
            return optuna.storages.JournalStorage(backend)
        options = {"connect_args": {"timeout": _SQLITE_LOCK_TIMEOUT_S}} if dialect == "sqlite" else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except ImportError as error:
        reason = f"needs a driver that is not installed: {_first_line(error)}"
    except Exception as error:  # every driver has errors of its own, and all of them mean the same to the user
        reason = f"cannot be opened: {_first_line(error.__cause__ or error)}"
    raise ValueError(f"--storage {_public(url)} {reason}")


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
