"""``lla-compile db`` as a user runs it: output, exit status, one line an error."""

import re
import subprocess
import sys
import types
from dataclasses import replace

import pytest
from tuned import KEY, make_entry

from lla_compile.cli import main
from lla_compile.devices import identify_properties, resolve
from lla_compile.tuning_db import read, record, store

H200 = resolve("h200")


@pytest.fixture(autouse=True)
def overlay(tmp_path, monkeypatch):
    """An empty overlay and an empty shipped database."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    store.clear_cache()
    yield tmp_path / "overlay"
    store.clear_cache()


def run(capsys, *arguments):
    """Exit status, output and error output of one command."""
    status = main(["db", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def eager_entry(**changes):
    """An entry whose plan the eager backend, which every machine has, accepts."""
    return make_entry(**(dict(seqlen=256, batch_heads=4, valid=((1, 512), (1, 8)), backend="eager") | changes))


def test_list(capsys, tmp_path):
    assert "nothing is tuned yet; run `lla-compile tune --gpu auto`" in run(capsys, "list")[1]
    record(H200, [make_entry(), make_entry(seqlen=1024, provenance="predicted"), make_entry(seqlen=2048)])
    record(resolve("cpu"), [eager_entry()], path=tmp_path / "shipped" / "cpu.yaml")
    status, out, err = run(capsys, "list")
    rows = [line.split()[:4] for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert ["nvidia-h200", "overlay", "2", "1"] in rows and ["cpu", "shipped", "1", "0"] in rows
    assert str(tmp_path / "overlay") in out


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_reader_that_has_enough_sees_no_traceback(command):
    """As in `lla-compile db verify | head -1`, with rich's tables and with lines of our own."""
    script = f"from lla_compile.cli import main; raise SystemExit(main(['db', '{command}']))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        process.stdout.close()  # before anything is printed
        assert process.wait(timeout=120) == 1 and process.stderr.read() == ""


def test_show(capsys):
    record(H200, [make_entry(), make_entry(key=replace(KEY, dtype="float16", head_dim=64, causal=False), block_q=128)])
    status, out, err = run(capsys, "show", "h200")
    assert (status, err, len(out.splitlines())) == (0, "", 3)
    for text in (
        "4096",
        "triton fused 64x64, 4 warps, 2 stages, 32 CG",
        "1.5",
        "1.7e-03",
        "2026-03-01",
        "measured",
        "overlay",
    ):
        assert text in out
    for filters in (["dtype=float16"], ["head_dim=64", "causal=false"]):
        _, out, _ = run(capsys, "show", "nvidia-h200", "--key", *filters)
        assert "fused 128x64" in out and "fused 64x64" not in out


def test_the_backend_that_is_the_fastest_for_a_problem_is_named(capsys):
    cuda = dict(backend="cuda", num_warps=12, num_stages=3)
    record(
        H200,
        [
            make_entry(median_ms=1.5),
            make_entry(median_ms=1.2, block_q=128, **cuda),
            make_entry(seqlen=8192, median_ms=1.5),
            make_entry(seqlen=8192, median_ms=1.9, block_q=128, **cuda),
            make_entry(seqlen=1024, median_ms=1.5),
        ],
    )
    (row,) = [line for line in run(capsys, "list")[1].splitlines() if "nvidia-h200" in line and "overlay" in line]
    assert "triton 2, cuda 1" in row
    shown = run(capsys, "show", "h200")[1]
    rows = re.findall(r" (\d+) +32  (cuda|triton) fused .*? (yes|no) ", shown)
    assert sorted(rows) == [
        ("1024", "triton", "yes"),
        ("4096", "cuda", "yes"),
        ("4096", "triton", "no"),
        ("8192", "cuda", "no"),
        ("8192", "triton", "yes"),
    ]


def test_a_backward_plan_is_shown_with_its_second_tile_and_verified(capsys):
    kv = dict(kv_block_q=32, kv_block_k=128, kv_num_warps=8, kv_num_stages=1)
    key = replace(KEY, phase="backward")
    record(H200, [make_entry(block_q=128), make_entry(key=key, **kv)])
    _, out, _ = run(capsys, "show", "h200", "--key", "phase=backward")
    assert "lla backward bfloat16 D128" in out and "32 CG; kv 32x128, 8 warps, 1 stages" in out and "128x64" not in out
    path = record(resolve("cpu"), [eager_entry(key=key), eager_entry()])
    assert run(capsys, "verify", path) == (0, "1 files checked, 0 with problems\n", "")


def test_decoding_plans_are_shown_by_group_with_their_splits(capsys):
    keys = [replace(KEY, phase="decode", group=group) for group in (1, 4)]
    gram = dict(schedule="gram", block_q=1, block_d=64)
    record(H200, [make_entry(), *(make_entry(key=key, num_splits=8 * key.group, **gram) for key in keys)])
    _, out, _ = run(capsys, "show", "h200", "--key", "group=4")
    (line,) = out.splitlines()[1:]
    assert "lla decode bfloat16" in line and "causal group 4" in line and "32 splits, block_d 64" in line
    path = record(resolve("cpu"), [eager_entry(key=key, num_warps=None, num_stages=None, **gram) for key in keys])
    assert run(capsys, "verify", path) == (0, "1 files checked, 0 with problems\n", "")
    status, _, err = run(capsys, "show", "h200", "--key", "group=four")
    assert status == 2 and "--key group takes int, got 'four'" in err


def test_show_nothing(capsys):
    assert run(capsys, "show", "a100") == (
        0, "nothing is tuned for nvidia-a100-40gb; run `lla-compile tune --gpu nvidia-a100-40gb` on that device\n", "",
    )  # fmt: skip


def test_show_a_device_that_only_has_a_file(capsys):
    record(identify_properties("NVIDIA H20", "9.0", 78), [make_entry()])
    assert "fused 64x64" in run(capsys, "show", "nvidia-h20-78sm")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "h20"], "unknown device 'h20'; nearest known: h200"),
        (["show", "h200", "--key", "colour=red"], "--key takes FIELD=VALUE with a field of op, phase, dtype"),
        (["show", "h200", "--key", "dtype"], "--key takes FIELD=VALUE"),
        (["show", "h200", "--key", "head_dim=big"], "--key head_dim takes int, got 'big'"),
        (["merge", "out.yaml", "missing.yaml"], "cannot read missing.yaml: No such file or directory"),
    ],
)
def test_user_errors_are_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_merge(capsys, tmp_path):
    fast, slow = (make_entry(median_ms=ms, block_q=int(64 * ms)) for ms in (1.0, 2.0))
    paths = [record(H200, [e], path=tmp_path / f"{i}.yaml") for i, e in enumerate((slow, fast))]
    out = tmp_path / "nvidia-h200.yaml"
    assert run(capsys, "merge", out, *paths) == (0, f"{out}: 1 entries for nvidia-h200\n", "")
    (entry,) = read(out).entries
    assert replace(entry, origins=()) == fast and [origin["median_ms"] for origin in entry.origins] == [1.0, 2.0]
    record(H200, [entry])
    assert "measured, best of 2" in run(capsys, "show", "h200")[1]


def test_merge_never_overwrites_what_it_cannot_read(capsys, tmp_path):
    good = record(H200, [make_entry()], path=tmp_path / "good.yaml")
    out = tmp_path / "out.yaml"
    out.write_text("my notes")
    status, _, err = run(capsys, "merge", out, good)
    assert status == 2 and "not a tuning database" in err and len(err.splitlines()) == 1
    assert out.read_text() == "my notes"


def test_verify_good_files(capsys, tmp_path):
    record(resolve("cpu"), [eager_entry()])
    record(H200, [eager_entry()], path=tmp_path / "elsewhere.yaml")
    assert run(capsys, "verify") == (0, "1 files checked, 0 with problems\n", "")
    assert run(capsys, "verify", tmp_path / "elsewhere.yaml")[0] == 0


@pytest.mark.parametrize(
    "entry, problem",
    [
        (eager_entry(valid=((512, 1024), (1, 8))), "validity range leaves out the sizes that it was tuned at"),
        (eager_entry(backend="abacus"), "backend must be one of"),
        (eager_entry(key=replace(KEY, op="fft")), "op must be one of lla, parallax, softmax, got 'fft'"),
        (eager_entry(key=replace(KEY, head_dim=512)), "head_dim must be an integer from 1 to 256, got 512"),
        (eager_entry(seqlen=16384, valid=((1, 16384), (1, 8)), block_q=16384, block_k=16384), "MiB"),
    ],
)
def test_verify_names_bad_entries(capsys, entry, problem):
    path = record(resolve("cpu"), [entry])
    status, out, _ = run(capsys, "verify", path)
    line, summary = out.splitlines()
    assert status == 1
    assert line.startswith(f"{path}: lla" if entry.key.op == "lla" else f"{path}: fft") and problem in line
    assert summary == "1 files checked, 1 with problems"


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("schema: lla_compile/1", "schema: other", "schema: 'lla_compile/1' was expected"),
        ("median_ms: 1.5, ", "", "entries[0].result: 'median_ms' is a required property"),
        ("sms: 132", "sms: 78", "says 78 SMs and capability 9.0 for nvidia-h200"),
        ("id: nvidia-h200", "id: nvidia-h200-nvl", "is for nvidia-h200-nvl, so look-ups skip it under this name"),
        ("error: 0.0017", "error: 0.1", "error 1.0e-01 is above the limit 2.5e-03"),
        ("key:", "[", "not YAML"),
        ("lla_compile/1", "\u00e9", "was expected"),
    ],
)
def test_verify_names_bad_files(capsys, old, new, problem):
    path = record(H200, [eager_entry()])
    path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    status, out, _ = run(capsys, "verify")
    assert status == 1
    assert out.splitlines()[0].startswith(f"{path}: ") and problem in out
    assert out.splitlines()[-1] == "1 files checked, 1 with problems" and len(out.splitlines()) == 2


def test_verify_duplicates_and_missing(capsys, overlay):
    path = record(H200, [eager_entry()])
    text = path.read_text()
    path.write_text(text + text[text.index("- key") :])
    status, out, _ = run(capsys, "verify", path, overlay / "none.yaml")
    assert status == 1
    assert "two entries are for lla forward" in out
    assert "none.yaml: cannot be read: No such file or directory" in out


def test_the_shipped_database_verifies(capsys, monkeypatch):
    monkeypatch.undo()
    paths = [path for path in store.shipped_dir().glob("*.yaml") if path.name != "devices.yaml"]
    assert not paths or run(capsys, "verify", *paths)[0] == 0


@pytest.mark.parametrize(
    "arguments, names", [(["--help"], ("tune", "db")), (["db", "--help"], ("list", "show", "verify", "merge"))]
)
def test_help(arguments, names):
    command = [sys.executable, "-c", "import sys; from lla_compile.cli import main; sys.exit(main())", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in names)


def test_tune_is_handed_over_with_its_arguments(monkeypatch):
    tune = types.ModuleType("lla_compile.tune")
    received = []
    tune.main = lambda argv: received.append(argv) or 3
    monkeypatch.setitem(sys.modules, "lla_compile.tune", tune)
    assert main(["tune", "--gpu", "auto", "--help"]) == 3
    assert received == [["--gpu", "auto", "--help"]]
