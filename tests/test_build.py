"""Kernels built ahead of time: what `lla-compile build` writes, and how a machine without a compiler takes it."""

from dataclasses import asdict, replace

import pytest
from compiled import NEEDS_NVRTC
from tuned import make_entry

from lla_compile import backends, cli
from lla_compile.backends.cuda import backward_kernels, compiler, gram_kernels, nvrtc, sweep_kernels
from lla_compile.build import plans_of
from lla_compile.devices import resolve
from lla_compile.key import TuningKey
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.tuning_db import record, store

H200 = resolve("h200")
SPEC = LLASpec.decoding("bfloat16", 16, 1024, 8)
KEY = TuningKey("lla", "decode", "bfloat16", 16, 16, "accurate", True, 1)


pytestmark = NEEDS_NVRTC


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An empty database, an empty cache, no folder of built kernels."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.delenv(compiler.BUILT_VARIABLE, raising=False)
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr("lla_compile.build.shipped_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(compiler, "_cache_folder", lambda: tmp_path / "cache")
    store.clear_cache()
    yield
    store.clear_cache()


def remove_compiler(monkeypatch) -> None:
    def load():
        raise ImportError("NVRTC is not installed")

    monkeypatch.setattr(nvrtc, "load", load)


def config() -> KernelConfig:
    return backends.get("cuda").default_config(SPEC, H200)


def record_entry(backend: str) -> None:
    plan = config() if backend == "cuda" else backends.get("triton").default_config(SPEC, H200)
    record(H200, [make_entry(1024, 8, KEY, valid=((768, 1535), (8, 8)), **plan.as_dict())])


def load_all() -> list[bytes]:
    return [
        compiler.compile_kernel(kernel.source, kernel.defines | {"ALIGNED": "1"}, "9.0")
        for kernel in gram_kernels.kernels(SPEC, config(), H200)
    ]


def test_built_kernels_need_no_compiler(tmp_path, monkeypatch, capsys):
    record_entry("cuda")
    out = tmp_path / "cubins"
    assert cli.main(["build", "--gpu", "h200", "--out", str(out)]) == 0
    files = sorted(out.iterdir())
    assert f"{len(files)} kernels of 1 plans for nvidia-h200" in capsys.readouterr().out
    compiled = load_all()
    remove_compiler(monkeypatch)
    with pytest.raises(ImportError, match="NVRTC"):
        load_all()
    monkeypatch.setenv(compiler.BUILT_VARIABLE, str(out))
    assert load_all() == compiled and compiler.unavailable() is None


@pytest.mark.parametrize("sequences, num_splits", [(1, 1), (1, 16), (40, 3), (40, 1)])
def test_a_plan_is_built_for_other_numbers_of_heads(tmp_path, monkeypatch, sequences, num_splits):
    """Of eight heads: no compiler is needed for 320, nor for more or fewer parts."""
    backends.get("cuda").build(SPEC, config(), H200, tmp_path)
    remove_compiler(monkeypatch)
    monkeypatch.setenv(compiler.BUILT_VARIABLE, str(tmp_path))
    other = replace(SPEC, batch=sequences * SPEC.batch)
    for kernel in gram_kernels.kernels(other, replace(config(), num_splits=num_splits), H200):
        assert compiler.compile_kernel(kernel.source, kernel.defines | {"ALIGNED": "1"}, "9.0").startswith(b"\x7fELF")


def test_other_sources_and_damaged_files_are_not_taken(tmp_path, monkeypatch):
    kernel = gram_kernels.kernels(SPEC, config(), H200)[-1]
    defines = kernel.defines | {"ALIGNED": "1"}
    file = compiler.build_kernel(kernel.source, defines, "9.0", tmp_path)
    remove_compiler(monkeypatch)
    monkeypatch.setenv(compiler.BUILT_VARIABLE, str(tmp_path))
    assert compiler.compile_kernel(kernel.source, defines, "9.0").startswith(b"\x7fELF")
    with pytest.raises(ImportError, match="NVRTC"):
        compiler.compile_kernel(kernel.source, defines | {"DIRECT_AFTER": "7"}, "9.0")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ImportError, match="NVRTC"):
        compiler.compile_kernel(kernel.source, defines, "9.0")


def test_defaults_are_built_where_another_backend_won(tmp_path, capsys):
    record_entry("triton")
    arguments = ["build", "--gpu", "h200", "--out", str(tmp_path / "cubins")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "no plan of nvidia-h200 is of backend cuda: its defaults" in printed and "of 1 plans" in printed
    assert cli.main([*arguments, "--defaults", "--page-size", "16"]) == 0
    assert "of 2 plans" in capsys.readouterr().out


def test_a_device_without_keys_is_an_error(tmp_path, capsys):
    assert cli.main(["build", "--gpu", "h200", "--out", str(tmp_path / "cubins")]) == 2
    assert "--gpu nvidia-h200 --backend cuda makes some" in capsys.readouterr().err


def test_packed_sequences_have_kernels_of_their_own():
    """The plan that batches have, and one launch more."""
    key = TuningKey("lla", "forward", "bfloat16", 64, 64, "fast", True, 1)
    spec = LLASpec.self_attention("bfloat16", 64, 1024, 8, precision="fast")
    plan = backends.get("cuda").default_config(spec, H200)
    record(H200, [make_entry(1024, 8, key, valid=((768, 1535), (8, 8)), **plan.as_dict())])
    [(alone, _)] = plans_of(H200, False)
    [batch, (packed, config)] = plans_of(H200, False, packed=True)
    assert batch == (alone, plan) and config == plan and packed.num_sequences is not None
    names = [[kernel.name for kernel in sweep_kernels.launches(x, plan, H200)] for x in (alone, packed)]
    assert names == [["sweeps_wgmma"], ["tile_order", "sweeps_wgmma"]]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_windows_and_packed_sequences_have_kernels_of_their_own(phase):
    """The same for windows of any size and any number of sequences."""
    key = TuningKey("parallax", phase, "bfloat16", 64, 64, "accurate", True)
    spec = LLASpec.self_attention("bfloat16", 64, 1024, 8, op="parallax", phase=phase)
    plan = backends.get("cuda").default_config(spec, H200)
    record(H200, [make_entry(1024, 8, key, valid=((768, 1535), (8, 8)), **asdict(plan))])
    built = [kernels_of(*planned) for planned in plans_of(H200, False, packed=True, windowed=True)]
    called = [
        kernels_of(replace(spec, seqlen_q=300, seqlen_k=300, window_size=window, num_sequences=sequences), plan)
        for window in (None, 100)
        for sequences in (None, 7)
    ]
    assert built == called and len(set(built)) == 4
    assert [kernels_of(*planned) for planned in plans_of(H200, False)] == called[:1]


def kernels_of(spec: LLASpec, config: KernelConfig) -> tuple:
    """What tells the kernels of a plan from those of others."""
    kernels = backward_kernels.kernels if spec.phase == "backward" else sweep_kernels.launches
    return tuple((kernel.source, *sorted(kernel.defines.items())) for kernel in kernels(spec, config, H200))


def test_without_a_compiler_nothing_is_built(tmp_path, monkeypatch, capsys):
    record_entry("cuda")
    remove_compiler(monkeypatch)
    assert cli.main(["build", "--gpu", "h200", "--out", str(tmp_path / "cubins")]) == 2
    assert capsys.readouterr().err == "lla-compile build: NVRTC is not installed\n"
