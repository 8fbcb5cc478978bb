"""The tuning database: tuned plans, one YAML file a device, looked up by the runtime and written by the tuner."""

from lla_compile.tuning_db.document import SCHEMA, DeviceHeader, Document
from lla_compile.tuning_db.entry import Entry
from lla_compile.tuning_db.lookup import Match, lookup
from lla_compile.tuning_db.store import (
    OVERLAY_VARIABLE,
    DatabaseError,
    clear_cache,
    device_file,
    merge,
    overlay_dir,
    read,
    record,
    shipped_dir,
)

__all__ = [
    "OVERLAY_VARIABLE",
    "SCHEMA",
    "DatabaseError",
    "DeviceHeader",
    "Document",
    "Entry",
    "Match",
    "clear_cache",
    "device_file",
    "lookup",
    "merge",
    "overlay_dir",
    "read",
    "record",
    "shipped_dir",
]
