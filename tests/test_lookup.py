"""The order of a look-up, what it may use, and what it says."""

import builtins
import importlib
import logging
from dataclasses import replace

import pytest
from tuned import KEY, TOOLCHAIN, make_entry

from lla_compile.devices import identify_properties, resolve
from lla_compile.key import Bucket, bucket_of
from lla_compile.plans import Source
from lla_compile.tuning_db import lookup, record, store

lookup_module = importlib.import_module("lla_compile.tuning_db.lookup")  # the package's attribute is the function
H200, NVL, H100, A100 = (resolve(name) for name in ("h200", "h200-nvl", "h100", "a100"))
WIDE = ((1, 1 << 20), (1, 1 << 20))


@pytest.fixture(autouse=True)
def overlay(tmp_path, monkeypatch):
    """An empty overlay and an empty shipped database."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(lookup_module, "_reported_toolchains", set())
    monkeypatch.setattr(lookup_module, "_running", TOOLCHAIN.get)
    store.clear_cache()
    yield tmp_path / "overlay"
    store.clear_cache()


@pytest.fixture
def shipped(tmp_path):
    """Record into the shipped database."""
    return lambda device, *entries: record(device, entries, path=tmp_path / "shipped" / f"{device.id}.yaml")


def find(seqlen=4096, batch_heads=32, key=KEY, device=H200, reject=lambda config, entry: None, cg_max_iters=None):
    bucket, sizes = bucket_of(seqlen, batch_heads), {"seqlen": seqlen, "batch_heads": batch_heads}
    return lookup(key, bucket, **sizes, device=device, reject=reject, cg_max_iters=cg_max_iters)


def test_nothing_anywhere():
    match = find()
    assert (match.entry, match.source, match.distance, match.file) == (None, Source.HEURISTIC, 0.0, None)
    assert match.reason == "nothing is tuned for nvidia-h200"


def test_exact():
    path = record(H200, [make_entry()])
    match = find(4000, 30)
    assert (match.entry, match.source, match.distance, match.file) == (make_entry(), Source.EXACT, 0.0, str(path))
    assert match.reason == "measured at seqlen 4096, batch_heads 32 on 2026-03-01"


@pytest.mark.parametrize("sizes", [(4096, 32), (3072, 8)], ids=["exact", "nearest"])
def test_of_several_backends_the_fastest_that_can_run(sizes):
    slow, fast = make_entry(median_ms=1.5), make_entry(backend="cuda", num_warps=12, median_ms=1.2)
    record(H200, [fast])
    record(H200, [slow])
    assert find(*sizes).entry == fast
    without = find(*sizes, reject=lambda config, entry: "no CuPy" if config.backend == "cuda" else None)
    assert without.entry == slow and "no CuPy" in without.reason
    record(H200, [faster := make_entry(median_ms=1.1, date="2026-03-02T10:00:00Z")])
    assert find(*sizes).entry == faster


@pytest.mark.parametrize("cap, schedule", [(None, "gram"), (20, "gram"), (4, "gram"), (3, "fused"), (1, "fused")])
def test_few_iterations_make_streaming_the_faster_plan(cap, schedule):
    """13 passes over a cache take 2.6 ms at 10 iterations, so that 7 take 1.4 ms and 6 take 1.2 ms."""
    plan = {"backend": "triton", "schedule": "fused", "block_q": 16, "block_k": 64, "cg_max_iters": 256}
    streaming = {"plan": plan, "median_ms": 2.6, "iterations": 10.0, "kernel_hash": "5678"}
    entry = make_entry(schedule="gram", block_q=1, median_ms=1.3)
    record(H200, [replace(entry, result=entry.result | {"streaming": streaming})])
    seen = []
    match = find(cg_max_iters=cap, reject=lambda config, entry: seen.append(entry.search["kernel_hash"]))
    assert match.entry.config.schedule == schedule and match.source is Source.EXACT
    assert seen == ["0123abcd" if schedule == "gram" else "5678"]
    assert (f"at most {cap} iterations take less than gram" in match.reason) == (schedule == "fused")
    assert find(cg_max_iters=cap, reject=lambda config, entry: "no").entry is None


@pytest.mark.parametrize("seqlen, batch_heads", [(3072, 8), (6144, 512), (3072, 512)])
def test_validity_range_is_inclusive(seqlen, batch_heads):
    record(H200, [make_entry()])
    assert find(seqlen, batch_heads).entry is not None


@pytest.mark.parametrize("seqlen, batch_heads", [(3071, 32), (6145, 32), (4096, 7), (4096, 513)])
def test_nothing_outside_the_validity_range(seqlen, batch_heads):
    record(H200, [make_entry()])
    match = find(seqlen, batch_heads)
    assert match.source is Source.HEURISTIC
    assert "the nearest entry differs: valid for" in match.reason


def test_nearest_is_the_smallest_distance():
    record(H200, [make_entry(seqlen=s, batch_heads=h, valid=WIDE) for s, h in ((1024, 32), (16384, 64), (8192, 4))])
    match = find(4096, 32)
    assert (match.source, match.entry.tuned, match.distance) == (Source.NEAREST, Bucket(1024, 32), 2.0)
    assert "2 octaves from the bucket asked for" in match.reason


@pytest.mark.parametrize(
    "change",
    [
        {"op": "parallax"}, {"phase": "backward"}, {"dtype": "float16"}, {"head_dim": 64}, {"head_dim_v": 64},
        {"precision": "fast"}, {"causal": False},
    ],
)  # fmt: skip
def test_every_field_of_the_key_must_agree(change):
    record(H200, [make_entry(valid=WIDE)])
    record(H100, [make_entry(valid=WIDE)])
    match = find(key=replace(KEY, **change))
    ((name, value),) = change.items()
    assert match.source is Source.HEURISTIC
    assert f"the nearest entry differs: {name} {getattr(KEY, name)}, not {value}" in match.reason


def test_the_group_of_a_cache_must_agree_and_other_phases_have_none():
    keys = [replace(KEY, phase="decode", group=group) for group in (1, 4, 8)]
    record(H200, [make_entry(key=key, num_splits=key.group) for key in keys[:2]])
    assert [find(key=key).entry.config.num_splits for key in keys[:2]] == [1, 4]
    assert "the nearest entry differs: group " in find(key=keys[2]).reason
    assert "the nearest entry differs: phase decode, not forward" in find().reason


def test_level_goes_before_database_and_database_before_distance(shipped):
    """Exact in shipped beats nearest in the overlay; at one level the overlay wins, however far."""
    near, far, exact = (make_entry(seqlen=s, valid=WIDE) for s in (2048, 512, 4096))
    shipped(H200, exact)
    record(H200, [far])
    assert find().entry == exact
    shipped_file = shipped(H200, near)
    assert find(seqlen=1024).entry == far
    assert find(seqlen=2048).file == str(shipped_file)
    record(H200, [replace(exact, config=replace(exact.config, block_q=128))])
    assert find().entry.config.block_q == 128


def test_same_architecture_is_after_the_devices_own():
    own, other = make_entry(seqlen=1024, valid=WIDE), make_entry()
    record(NVL, [other])
    match = find()
    assert (match.source, match.entry, match.distance) == (Source.SAME_ARCH, other, 0.0)
    assert "for nvidia-h200-nvl, also of compute capability 9.0" in match.reason
    record(H200, [own])
    assert find().source is Source.NEAREST


def test_same_architecture_prefers_the_nearest_bucket_then_the_closest_size():
    pcie = resolve("h100-pcie")
    for device in (pcie, H100):
        record(device, [make_entry(seqlen=4096, valid=WIDE, block_q=device.sms), make_entry(seqlen=1024, valid=WIDE)])
    match = find()
    assert (match.entry.tuned.seqlen, match.entry.config.block_q) == (4096, 132)


def test_same_architecture_needs_bucket_or_range():
    record(NVL, [make_entry(valid=((4096, 4096), (32, 32)))])
    assert find(4000, 32).source is Source.SAME_ARCH  # outside the range, in the bucket
    assert find(8192, 32).source is Source.HEURISTIC


def test_another_architecture_is_not_used():
    record(A100, [make_entry(valid=WIDE)])
    assert find().source is Source.HEURISTIC
    amd = identify_properties("Instinct", "9.0", 304, vendor="amd")
    record(H100, [make_entry(valid=WIDE)])
    assert find(device=amd).source is Source.HEURISTIC


def test_a_cpu_takes_nothing_from_other_devices_without_capability():
    cpu = resolve("cpu")
    record(replace(cpu, id="meta"), [make_entry(valid=WIDE)])
    assert find(device=cpu).source is Source.HEURISTIC


def test_a_slice_of_a_gpu_is_another_device():
    record(H200, [make_entry(valid=WIDE)])
    mig = identify_properties("NVIDIA H200 MIG 3g.71gb", "9.0", 60, 70.0)
    assert find(device=mig).source is Source.SAME_ARCH


def test_a_refused_entry_falls_to_the_next_and_is_named():
    record(H200, [make_entry(kernel_hash="old"), make_entry(seqlen=1024, valid=WIDE)])
    asked = []

    def reject(config, entry):
        assert config is entry.config
        asked.append(entry.tuned.seqlen)
        return "it was measured with other kernel sources" if entry.search["kernel_hash"] == "old" else None

    match = find(reject=reject)
    assert (match.source, match.entry.tuned.seqlen) == (Source.NEAREST, 1024)
    assert "refused lla forward bfloat16 D128" in match.reason and "other kernel sources" in match.reason
    assert asked == [4096, 1024]  # each entry is judged once


def test_all_refused():
    record(H200, [make_entry(seqlen=2**i, valid=WIDE) for i in range(8, 14)])
    match = find(reject=lambda config, entry: "too big")
    assert match.source is Source.HEURISTIC
    assert match.reason.count("too big") == 3 and match.reason.endswith("; and 3 more")


def test_nothing_is_read_twice(overlay, monkeypatch):
    record(H200, [make_entry()])
    store.clear_cache()
    find(), find(device=NVL), find(seqlen=64, device=NVL)

    def forbidden(*arguments, **options):
        raise AssertionError(f"file access: {arguments}")

    with monkeypatch.context() as patch:
        for owner, name in ((builtins, "open"), (store.Path, "stat"), (store.Path, "read_text"), (store.Path, "glob")):
            patch.setattr(owner, name, forbidden)
        found = [find(seqlen=4100), find(device=NVL), find(seqlen=64, device=NVL)]
    assert [match.source for match in found] == [Source.EXACT, Source.SAME_ARCH, Source.HEURISTIC]


def test_a_write_is_seen_by_the_next_lookup():
    assert find().entry is None and find(device=NVL).entry is None
    record(H200, [make_entry()])
    assert find().source is Source.EXACT
    assert find(device=NVL).source is Source.SAME_ARCH


def test_a_broken_overlay_falls_back_to_shipped_with_one_warning(overlay, shipped, caplog):
    shipped(H200, make_entry())
    overlay.mkdir()
    (overlay / "nvidia-h200.yaml").write_text("schema: [")
    assert find().source is Source.EXACT
    assert find(device=NVL).source is Source.SAME_ARCH
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "running, backend, note",
    [
        ({"torch": "2.11.3+cu130", "triton": "3.6.1"}, "triton", None),
        ({"torch": "2.13.0+cpu", "triton": "3.6.0"}, "triton", "torch 2.11.0 (running 2.13.0+cpu)"),
        ({"torch": "2.11.0", "triton": "3.9.0"}, "triton", "triton 3.6.0 (running 3.9.0)"),
        ({"torch": "2.11.0", "triton": "3.9.0"}, "eager", None),
        ({"torch": "2.11.0"}, "triton", None),
    ],
)
def test_another_toolchain_is_used_and_logged_once_a_file(running, backend, note, monkeypatch, caplog):
    monkeypatch.setattr(lookup_module, "_running", running.get)
    caplog.set_level(logging.INFO)
    record(H200, [make_entry(backend=backend), make_entry(seqlen=1024, backend=backend)])
    for seqlen in (4096, 1024, 4096):
        match = find(seqlen)
        assert match.source is Source.EXACT
        assert match.reason.endswith(f"; tuned with {note}") if note else "tuned with" not in match.reason
    assert len([m for m in caplog.messages if "tuned with" in m]) == (1 if note else 0)
