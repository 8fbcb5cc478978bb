"""The database on disk: its text, what may replace what, and that no write loses or half-writes anything."""

import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tuned import KEY, TOOLCHAIN, make_entry

from lla_compile.devices import resolve
from lla_compile.tuning_db import DatabaseError, merge, overlay_dir, read, record, shipped_dir, store, yaml_format
from lla_compile.tuning_db.document import DeviceHeader, Document
from lla_compile.tuning_db.entry import Entry
from lla_compile.tuning_db.short import short

H200 = resolve("h200")


@pytest.fixture(autouse=True)
def overlay(tmp_path, monkeypatch):
    """An empty overlay, and nothing remembered from other tests."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    store.clear_cache()
    yield tmp_path / "overlay"
    store.clear_cache()


TEXT = """\
schema: lla_compile/1
device: {id: nvidia-h200, compute_capability: '9.0', sms: 132, memory_gib: 140}
toolchain: {torch: 2.11.0, triton: 3.6.0, cuda: '13.0', driver: 580.159.03}
entries:
- key: {op: lla, phase: forward, dtype: bfloat16, head_dim: 128, head_dim_v: 128, precision: accurate, causal: true}
  valid: {seqlen: [3072, 6144], batch_heads: [8, 512]}
  tuned: {seqlen: 4096, batch_heads: 32}
  plan: {backend: triton, schedule: fused, block_q: 64, block_k: 64, cg_max_iters: 32, num_warps: 4, num_stages: 2}
  provenance: measured
  result: {median_ms: 1.5, spread: 0.01, default_ms: 2.0, error: 0.0017, error_limit: 0.0025}
  search: {trials: 30, failed: {compile: 1, timeout: 0}, seed: 0, date: '2026-03-01T10:00:00Z', kernel_hash: 0123abcd}
"""


class TestFormat:
    def test_text_is_what_people_read_and_reads_back(self):
        path = record(H200, [make_entry()])
        assert path.read_text() == TEXT
        assert read(path) == Document(DeviceHeader.of(H200), (make_entry(),))

    def test_rewriting_changes_nothing(self):
        path = record(H200, [make_entry(seqlen=s, block_q=b) for s, b in ((16384, 32), (1024, 16), (4096, 64))])
        before = path.read_text()
        store.update(path, lambda document: document)
        assert path.read_text() == before
        assert [e.tuned.seqlen for e in read(path).entries] == [1024, 4096, 16384]

    @pytest.mark.parametrize("value", ["1e5", "007", "12e4567", "yes", "null", "2026-01-01", "a: b", "", "é"])
    def test_text_values_stay_text(self, value):
        entry = make_entry(kernel_hash=value, toolchain={"torch": value})
        assert read(record(H200, [entry])).entries == (entry,)

    @pytest.mark.parametrize("value", [1e-05, 3.0, 1e300, 0.1 + 0.2])
    def test_numbers_stay_what_they_are(self, value):
        assert read(record(H200, [make_entry(median_ms=value)])).entries[0].result["median_ms"] == value

    def test_unquoted_dates_and_versions_are_text(self):
        text = TEXT.replace("'2026-03-01T10:00:00Z'", "2026-03-01").replace("580.159.03", "580.159")
        document = Document.from_dict(yaml_format.load(text))
        assert document.entries[0].date == "2026-03-01"
        assert document.entries[0].toolchain["driver"] == "580.159"
        assert store.schema_problems(yaml_format.load(text)) == []

    def test_entries_of_another_toolchain_keep_their_own(self):
        old = make_entry(toolchain={"torch": "2.11.0"})
        record(H200, [old])
        path = record(H200, [make_entry(seqlen=s, toolchain={}) for s in (1024, 2048)], toolchain={"torch": "2.13.0"})
        content = yaml.safe_load(path.read_text())
        assert content["toolchain"] == {"torch": "2.13.0"}
        assert [e.get("toolchain") for e in content["entries"]] == [None, None, {"torch": "2.11.0"}]
        assert {e.tuned.seqlen: e.toolchain["torch"] for e in read(path).entries} == {
            1024: "2.13.0", 2048: "2.13.0", 4096: "2.11.0",
        }  # fmt: skip

    def test_schema_is_a_valid_schema(self):
        from jsonschema import Draft202012Validator

        Draft202012Validator.check_schema(json.loads((shipped_dir() / "schema.json").read_text()))

    @pytest.mark.parametrize(
        "change",
        [
            {"result": {}},
            {"result": {"median_ms": -1.0, "error": 0.1}},
            {"search": {"date": "yesterday", "kernel_hash": "x"}},
            {"search": {"date": "2026-01-01"}},
            {"valid": {"seqlen": (0, 5), "batch_heads": (1, 2)}},
        ],
    )
    def test_the_schema_guards_every_write(self, change, overlay):
        path = record(H200, [make_entry()])
        with pytest.raises(ValueError, match="refusing to write .*entries"):
            record(H200, [replace(make_entry(seqlen=1024), **change)])
        assert path.read_text() == TEXT
        assert sorted(p.name for p in overlay.iterdir() if p.suffix != ".lock") == ["nvidia-h200.yaml"]

    @pytest.mark.parametrize("path", [p for p in shipped_dir().glob("*.yaml") if p.name != "devices.yaml"], ids=str)
    def test_shipped_files_fit_the_schema(self, path):
        assert store.schema_problems(yaml_format.load(path.read_text())) == []
        assert read(path).device.id == path.stem

    @pytest.mark.parametrize(
        "fields",
        [
            {"provenance": "guessed"},
            {"valid": {"seqlen": (1, 2)}},
            {"valid": {"seqlen": (5, 2), "batch_heads": (1, 2)}},
            {"valid": {"seqlen": (1.5, 2), "batch_heads": (1, 2)}},
        ],
    )
    def test_an_entry_refuses_nonsense(self, fields):
        with pytest.raises(ValueError):
            replace(make_entry(), **fields)


class TestReplacement:
    """What stays when an entry is recorded for a slot that is taken."""

    @pytest.mark.parametrize(
        "old, new, stays",
        [
            (dict(provenance="predicted"), dict(provenance="measured"), "new"),
            (dict(provenance="measured"), dict(provenance="predicted", date="2027-01-01"), "old"),
            (dict(provenance="measured"), dict(provenance="predicted", median_ms=0.1), "old"),
            (dict(date="2026-01-01"), dict(date="2026-02-01", median_ms=9.0), "new"),
            (dict(date="2026-02-01"), dict(date="2026-01-01", median_ms=0.1), "old"),
            (dict(date="2026-02-01"), dict(date="2026-02-01T08:00:00Z"), "new"),
            (dict(), dict(), "new"),
        ],
    )
    def test_record(self, old, new, stays):
        record(H200, [make_entry(block_q=16, **old)])
        (entry,) = read(record(H200, [make_entry(block_q=32, **new)])).entries
        assert entry.config.block_q == {"old": 16, "new": 32}[stays]

    def test_other_buckets_and_keys_are_other_slots(self):
        full = replace(KEY, causal=False)
        entries = [make_entry(), make_entry(batch_heads=64), make_entry(seqlen=2048), make_entry(key=full)]
        assert len(read(record(H200, entries)).entries) == 4

    def test_merge_keeps_the_best_in_any_order(self, tmp_path):
        variants = [
            make_entry(median_ms=1.2, block_q=16),
            make_entry(median_ms=1.1, block_q=32, date="2026-01-01"),
            make_entry(median_ms=0.5, block_q=64, provenance="predicted", date="2027-01-01"),
            make_entry(median_ms=1.1, block_q=128, date="2026-01-02"),
            make_entry(median_ms=1.1, block_q=256, date="2026-01-02", toolchain={"torch": "2.13.0"}),
        ]
        paths = [record(H200, [entry], path=tmp_path / f"{i}.yaml") for i, entry in enumerate(variants)]
        record(H200, [make_entry(seqlen=1024)], path=paths[0])
        texts = set()
        for i, order in enumerate(list(itertools.permutations(paths))[::11]):
            out = tmp_path / f"out{i}" / "nvidia-h200.yaml"
            merge(out, order)
            texts.add(out.read_text())
        assert len(texts) == 1
        first, second = read(out).entries
        assert first.tuned.seqlen == 1024
        assert second.config.block_q in (128, 256)
        assert sorted(origin["plan"]["block_q"] for origin in second.origins) == [16, 32, 64, 128, 256]
        assert not first.origins

    def test_merge_lists_both_findings_however_merges_are_nested(self, tmp_path):
        entries = [
            make_entry(median_ms=1.3, date="2026-02-01"),
            make_entry(median_ms=1.1, date="2026-01-01", block_q=128, toolchain={"torch": "2.13.0"}),
            make_entry(median_ms=0.4, provenance="predicted"),
        ]
        a, b, c = (record(H200, [entry], path=tmp_path / f"{i}.yaml") for i, entry in enumerate(entries))
        merge(tmp_path / "ab.yaml", [a, b])
        merge(tmp_path / "bc.yaml", [c, b])
        merge(tmp_path / "left.yaml", [tmp_path / "ab.yaml", c])
        merge(tmp_path / "right.yaml", [a, tmp_path / "bc.yaml"])
        text = (tmp_path / "left.yaml").read_text()
        assert (tmp_path / "right.yaml").read_text() == text
        (entry,) = read(tmp_path / "left.yaml").entries
        assert (entry.measured, entry.result["median_ms"], entry.config.block_q) == (True, 1.1, 128)
        found = {(o["provenance"], o["median_ms"], o["date"][:7], o["toolchain"]["torch"]) for o in entry.origins}
        assert found == {
            ("measured", 1.1, "2026-01", "2.13.0"),
            ("measured", 1.3, "2026-02", "2.11.0"),
            ("predicted", 0.4, "2026-03", "2.11.0"),
        }
        merge(tmp_path / "left.yaml", [a, b, c, tmp_path / "ab.yaml"])  # all known already
        assert (tmp_path / "left.yaml").read_text() == text

    def test_merging_a_file_with_itself_changes_nothing(self, tmp_path):
        path = record(H200, [make_entry()])
        merge(tmp_path / "out.yaml", [path, path])
        assert (tmp_path / "out.yaml").read_text() == TEXT

    def test_merge_adds_to_what_is_there(self, tmp_path):
        out = record(H200, [make_entry(seqlen=1024)])
        other = record(H200, [make_entry(seqlen=2048)], path=tmp_path / "other.yaml")
        merge(out, [other])
        assert [e.tuned.seqlen for e in read(out).entries] == [1024, 2048]

    def test_merge_refuses_two_devices(self, tmp_path):
        paths = [record(d, [make_entry()], path=tmp_path / d.id) for d in (H200, resolve("h100"))]
        with pytest.raises(DatabaseError, match=r"different devices: nvidia-h100-sxm \(132 SMs\), nvidia-h200"):
            merge(tmp_path / "out.yaml", paths)
        assert not (tmp_path / "out.yaml").exists()

    def test_record_refuses_another_devices_file(self):
        path = record(H200, [make_entry()])
        with pytest.raises(DatabaseError, match="is for nvidia-h200 with 132 SMs, not for nvidia-h100-pcie"):
            record(resolve("h100-pcie"), [make_entry()], path=path)
        assert path.read_text() == TEXT


BROKEN = {
    "empty": "",
    "not yaml": "schema: [",
    "binary": "\x00\x01",
    "a list": "- 1\n- 2\n",
    "foreign": "name: my settings\nvalues: [1, 2]\n",
    "future schema": TEXT.replace("lla_compile/1", "lla_compile/2"),
    "no device": TEXT.replace("device:", "gadget:"),
    "unquoted capability": TEXT.replace("'9.0'", "9.0"),
    "another device": TEXT.replace("nvidia-h200", "nvidia-b200"),
    "truncated entry": TEXT[: TEXT.index("  plan:")],
    "unknown key field": TEXT.replace("op: lla", "op: lla, colour: red"),
    "unknown knob": TEXT.replace("block_q", "block_z"),
    "text for a number": TEXT.replace("block_q: 64", "block_q: many"),
    "odd bucket": TEXT.replace("tuned: {seqlen: 4096", "tuned: {seqlen: 4095"),
    "duplicate": TEXT + TEXT[TEXT.index("- key") :],
    "entries a number": TEXT[: TEXT.index("entries")] + "entries: 5\n",
    "entry a number": TEXT[: TEXT.index("- key")] + "- 5\n",
}


class TestBrokenFiles:
    @pytest.fixture(params=BROKEN, ids=str)
    def broken(self, request, overlay):
        overlay.mkdir()
        path = overlay / "nvidia-h200.yaml"
        path.write_text(BROKEN[request.param])
        return path

    def test_skipped_with_one_warning(self, broken, caplog):
        assert store.load(broken) is None
        assert store.load(broken) is None
        assert store.load_all(broken.parent) == {}
        (message,) = caplog.messages
        assert caplog.records[0].levelno == logging.WARNING
        assert str(broken) in message and "\n" not in message

    def test_never_overwritten(self, broken):
        before = broken.read_bytes()
        with pytest.raises(DatabaseError) as caught:
            record(H200, [make_entry()])
        assert str(broken) in str(caught.value)
        with pytest.raises(DatabaseError):
            merge(broken, [record(H200, [make_entry()], path=broken.parent / "good.yaml")])
        assert broken.read_bytes() == before

    def test_not_utf8(self, overlay, caplog):
        overlay.mkdir()
        path = overlay / "nvidia-h200.yaml"
        path.write_bytes(b"schema: \xff\xfe")
        assert store.load(path) is None
        assert len(caplog.messages) == 1

    def test_no_file_is_no_warning(self, overlay, caplog):
        assert store.load(overlay / "nvidia-h200.yaml") is None
        assert store.load_all(overlay) == {}
        assert caplog.messages == []


class TestPlaces:
    def test_overlay_is_the_environments_else_the_users(self, overlay, monkeypatch, tmp_path):
        assert overlay_dir() == overlay
        monkeypatch.delenv("LLA_COMPILE_TUNING_DB")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        store._user_data_dir.cache_clear()
        assert overlay_dir().name == "lla_compile" and overlay_dir() != shipped_dir()
        store._user_data_dir.cache_clear()

    def test_writes_go_to_the_overlay(self, overlay):
        shipped = {p: p.read_bytes() for p in shipped_dir().glob("*.*")}
        assert record(H200, [make_entry()]).parent == overlay
        assert {p: p.read_bytes() for p in shipped_dir().glob("*.*")} == shipped

    def test_overlay_that_is_a_file(self, overlay, caplog):
        overlay.write_text("not a directory")
        with pytest.raises(DatabaseError, match="set LLA_COMPILE_TUNING_DB to a directory you can write to"):
            record(H200, [make_entry()])
        assert store.load(overlay / "nvidia-h200.yaml") is None
        assert len(caplog.messages) == 1
        assert overlay.read_text() == "not a directory"

    def test_read_only_overlay(self, overlay, monkeypatch):
        path = record(H200, [make_entry()])
        opened = open

        def read_only(file, mode="r", **options):
            if "w" in mode:
                raise OSError(30, "Read-only file system")
            return opened(file, mode, **options)

        monkeypatch.setattr("builtins.open", read_only)
        with pytest.raises(DatabaseError, match="Read-only file system; set LLA_COMPILE_TUNING_DB"):
            record(H200, [make_entry(seqlen=1024)])
        monkeypatch.undo()
        assert path.read_text() == TEXT

    def test_full_disk_leaves_the_old_file(self, overlay, monkeypatch):
        path = record(H200, [make_entry()])

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DatabaseError, match="No space left on device"):
            record(H200, [make_entry(seqlen=1024)])
        assert path.read_text() == TEXT
        assert not [p for p in overlay.iterdir() if p.suffix == ".tmp"]

    def test_a_held_lock_is_a_clear_error(self, overlay, monkeypatch):
        from filelock import FileLock

        path = record(H200, [make_entry()])
        monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.05)
        with FileLock(path.with_name(f".{path.name}.lock")):
            with pytest.raises(DatabaseError, match="locked by another process"):
                record(H200, [make_entry(seqlen=1024)])


def _record_many(directory: str, batch_heads: int) -> None:
    for power in range(10):
        record(H200, [make_entry(seqlen=2**power, batch_heads=batch_heads)], path=Path(directory) / "nvidia-h200.yaml")


class TestConcurrency:
    def test_two_writers_lose_nothing(self, overlay):
        context = multiprocessing.get_context("spawn")
        writers = [context.Process(target=_record_many, args=(str(overlay), heads)) for heads in (1, 2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        assert len(read(overlay / "nvidia-h200.yaml").entries) == 20

    def test_kill_during_a_write_leaves_the_old_file(self, overlay):
        path = record(H200, [make_entry()])
        code = (
            "import os\n"
            "from tuned import make_entry\n"
            "from lla_compile.devices import resolve\n"
            "from lla_compile.tuning_db import record\n"
            "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"  # everything is written, nothing is in place
            "record(resolve('h200'), [make_entry(seqlen=1024)])\n"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert killed.returncode == -9
        assert path.read_text() == TEXT
        assert list(store.load_all(overlay)) == [path]  # what the dead writer left is not taken for a database
        record(H200, [make_entry(seqlen=1024)])  # and neither its lock nor its temporary file is in the way
        assert len(read(path).entries) == 2
        assert not [p for p in overlay.iterdir() if p.suffix == ".tmp"]


def test_a_tile_of_its_own_for_the_sweep_that_holds_keys():
    """Of a backward entry: written after the common knobs, read back, and refused where it is no size."""
    kv = dict(kv_block_q=32, kv_block_k=128, kv_num_warps=8, kv_num_stages=1)
    entry = make_entry(key=replace(KEY, phase="backward"), **kv)
    path = record(H200, [entry, make_entry()])
    assert "num_stages: 2, kv_block_q: 32, kv_block_k: 128, kv_num_warps: 8, kv_num_stages: 1}" in path.read_text()
    assert read(path).entries == (entry, make_entry())
    assert store.schema_problems(yaml_format.load(path.read_text())) == []
    for knob in kv:
        with pytest.raises(ValueError, match=f"{knob} must be positive"):
            make_entry(**{knob: 0})
        broken = yaml_format.load(path.read_text())
        broken["entries"][0]["plan"][knob] = 0
        assert len(store.schema_problems(broken)) == 1


@pytest.mark.parametrize(
    "knobs, text",
    [
        ({}, "triton fused 64x64, 4 warps, 2 stages, 32 CG"),
        (dict(backend="eager", num_warps=None, num_stages=None), "eager fused 64x64, 32 CG"),
        (
            dict(kv_block_q=32, kv_block_k=128, kv_num_warps=8, kv_num_stages=1),
            "triton fused 64x64, 4 warps, 2 stages, 32 CG; kv 32x128, 8 warps, 1 stages",
        ),
        (dict(kv_num_warps=8), "triton fused 64x64, 4 warps, 2 stages, 32 CG; kv 64x64, 8 warps, 2 stages"),
        (dict(kv_block_q=64), "triton fused 64x64, 4 warps, 2 stages, 32 CG"),
        (dict(num_splits=1, block_d=64), "triton fused 64x64, 4 warps, 2 stages, 32 CG"),
        (
            dict(schedule="gram", block_q=1, num_splits=16, block_d=64),
            "triton gram 1x64, 4 warps, 2 stages, 16 splits, block_d 64, 32 CG",
        ),
    ],
)
def test_a_plan_in_a_few_words(knobs, text):
    assert short(make_entry(**knobs).config) == text


def test_entry_survives_its_dictionary():
    entry = make_entry(num_warps=None, num_stages=None, backend="eager")
    assert Entry.from_dict(entry.to_dict(), TOOLCHAIN) == entry
    assert "num_warps" not in entry.to_dict()["plan"]
