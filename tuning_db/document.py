"""One database file in memory: a device, and the plans tuned for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Callable, Iterable, Mapping

from lla_compile.devices import DeviceInfo
from lla_compile.tuning_db.entry import Entry, better

SCHEMA = "lla_compile/1"


@dataclass(frozen=True)
class DeviceHeader:
    """The device of a file: enough to tell which device the plans are for without any other file."""

    id: str
    compute_capability: str
    sms: int
    memory_gib: float

    def __post_init__(self):
        # An unquoted 9.0 in YAML is a number and would never equal a device's "9.0".
        if not (isinstance(self.id, str) and isinstance(self.compute_capability, str) and isinstance(self.sms, int)):
            raise ValueError("id and compute_capability must be text, sms an integer")

    @classmethod
    def of(cls, device: DeviceInfo) -> DeviceHeader:
        memory = int(device.memory_gib) if device.memory_gib == int(device.memory_gib) else device.memory_gib
        return cls(device.id, device.compute_capability, device.sms, memory)

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it one device; the driver's idea of its memory varies by version."""
        return self.id, self.compute_capability, self.sms

    @property
    def vendor(self) -> str:
        return self.id.partition("-")[0]

    def same_architecture(self, device: DeviceInfo) -> bool:
        """Whether a plan for this device may serve on ``device``; CPUs have no architecture in common."""
        return bool(device.compute_capability) and (self.vendor, self.compute_capability) == (
            device.vendor,
            device.compute_capability,
        )


@dataclass(frozen=True)
class Document:
    """A device and its entries, at most one for each slot, in the order of :meth:`Entry.order`."""

    device: DeviceHeader
    entries: tuple[Entry, ...] = ()

    def with_entry(self, entry: Entry, choose: Callable[[Entry, Entry], Entry]) -> Document:
        """With ``entry`` added; where its slot is taken, ``choose(old, new)`` decides which stays."""
        slots = {e.slot: e for e in self.entries}
        slots[entry.slot] = choose(slots[entry.slot], entry) if entry.slot in slots else entry
        return replace(self, entries=tuple(sorted(slots.values(), key=Entry.order)))

    def fastest(self) -> tuple[Entry, ...]:
        """Of each problem's entries, one for each backend, the one that runs where its backend does."""
        best: dict[tuple, Entry] = {}
        for entry in sorted(self.entries, key=lambda entry: (not entry.measured, entry.time_ms)):
            best.setdefault((entry.key, entry.tuned), entry)
        return tuple(best.values())

    def to_dict(self) -> dict:
        """The file's content; inverse of :meth:`from_dict`."""
        toolchain = self._common_toolchain()
        return {
            "schema": SCHEMA,
            "device": asdict(self.device),
            "toolchain": toolchain,
            "entries": [
                e.to_dict() if e.toolchain == toolchain else {**e.to_dict(), "toolchain": dict(e.toolchain)}
                for e in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, data) -> Document:
        """A document from a parsed file.

        Raises:
            ValueError: it is no database file, its schema is unknown, or an entry is malformed or there twice.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise ValueError(f"not a tuning database: it has no field 'schema: {SCHEMA}'")
        if data["schema"] != SCHEMA:
            raise ValueError(f"unknown schema {data['schema']!r}; this version reads {SCHEMA}")
        try:
            header = DeviceHeader(**data["device"])
            toolchain, listed = data["toolchain"], list(data["entries"])
        except KeyError as error:
            raise ValueError(f"it has no field {error.args[0]!r}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"its header is malformed: {error}") from None
        document = cls(header)
        for item in listed:
            document = document.with_entry(Entry.from_dict(item, toolchain), _refuse_duplicate)
        return document

    def _common_toolchain(self) -> dict:
        """What most entries were tuned with, so that the fewest carry their own."""
        counts = Counter(tuple(sorted(e.toolchain.items())) for e in self.entries)
        if not counts:
            return {}
        common = max(counts, key=lambda items: (counts[items], repr(items)))
        return next(dict(e.toolchain) for e in self.entries if tuple(sorted(e.toolchain.items())) == common)


def merged(documents: Iterable[Document]) -> Document:
    """All entries of the documents, the better one where two are for one slot; the order of documents is irrelevant.

    Raises:
        ValueError: there is no document, or they are for different devices.
    """
    documents = list(documents)
    if not documents:
        raise ValueError("nothing to merge")
    if len({d.device.identity for d in documents}) > 1:
        names = sorted({f"{d.device.id} ({d.device.sms} SMs)" for d in documents})
        raise ValueError(f"the files are for different devices: {', '.join(names)}")
    result = Document(min((d.device for d in documents), key=lambda header: header.memory_gib))
    for document in documents:
        for entry in document.entries:
            result = result.with_entry(entry, better)
    return result


def _refuse_duplicate(old: Entry, new: Entry) -> Entry:
    raise ValueError(f"two entries are for {new.describe()}")
