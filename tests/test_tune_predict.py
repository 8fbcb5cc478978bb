"""Tuning for a GPU that is not here: predictions as outcomes, entries, and what look-ups make of them."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tuned import KEY, make_entry

from lla_compile import backends, clear_cache, plan, tune
from lla_compile.backends import CompileError
from lla_compile.devices import resolve
from lla_compile.key import bucket_of
from lla_compile.plans import KernelConfig, Source
from lla_compile.prediction.features import KernelFeatures, LoopMix
from lla_compile.spec import LLASpec
from lla_compile.tuner import predictor, toolchain
from lla_compile.tuner.outcome import Kind
from lla_compile.tuner.predictor import Predictor, comparable, features_of, predictable_backends
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuning_db import lookup, read, record, store

A100, H200 = resolve("a100"), resolve("h200")
SPEC = LLASpec.self_attention("bfloat16", 64, 1024, 32, None, phase="forward", precision="fast", is_causal=True)
WIDE = ((1, 1 << 20), (1, 1 << 20))


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """The user's overlay and state are left alone, and nothing is shipped."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    store.clear_cache()
    clear_cache()
    yield
    store.clear_cache()
    clear_cache()


def made_up(config: KernelConfig) -> tuple[KernelFeatures, ...]:
    """Machine code that is better the nearer a tile is to 128 x 64, and spills with 8 warps and one stage."""
    distance = abs(config.block_q - 128) + abs(config.block_k - 64)
    local = 50 if (config.num_warps, config.num_stages) == (8, 1) else 0
    mixes = tuple(
        LoopMix(300 + distance, 32, 12, 0, False, 0, 2, 0, 2048 * (i % 2 == 0), 2048 * (i % 2), local) for i in range(6)
    )
    kernels = 4 if config.schedule == "split" else 1
    loops = mixes if kernels == 1 else mixes[:2]
    return tuple(KernelFeatures(f"k{i}", config.num_warps, 128, 40_000, 0, 3000, loops) for i in range(kernels))


@pytest.fixture
def no_compiler(monkeypatch):
    """Made-up machine code in the place of the compiler's, in this process."""
    monkeypatch.setattr(predictor, "features_of", lambda spec, config, device, folder: made_up(config))
    monkeypatch.setattr(tune, "CompilePool", NoPool)


class NoPool:
    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def compiler(self, specs):
        return None


def space_of(spec=SPEC, device=A100, names=()) -> SearchSpace:
    return comparable(SearchSpace.joint(spec, device, predictable_backends(spec, device, names)))


def test_a_prediction_is_an_outcome_without_an_error(tmp_path, no_compiler):
    evaluate = Predictor(Problem(SPEC, A100, torch.device("cpu")), tmp_path)
    default = space_of().default()
    outcome = evaluate(default)
    assert outcome.ok and outcome.median_ms > 0 and outcome.error is None and outcome.violation == 0
    assert evaluate.retime([default])[0].median_ms == outcome.median_ms and evaluate.verify(default) is None
    spilling = evaluate(replace(default, num_warps=8, num_stages=1))
    assert spilling.kind is Kind.RESOURCES and "spills" in spilling.message and spilling.violation > 0


def test_a_compiler_that_refuses_is_an_outcome(tmp_path, monkeypatch):
    class Refusing:
        def binaries(self, spec, config, device):
            raise CompileError("no")

    monkeypatch.setattr(backends, "get", lambda name: Refusing())
    outcome = Predictor(Problem(SPEC, A100, torch.device("cpu")), tmp_path)(space_of_default())
    assert outcome.kind is Kind.COMPILE and not list(tmp_path.iterdir())


def space_of_default() -> KernelConfig:
    return KernelConfig("triton", "fused", 64, 64, 32, 4, 3)


def test_features_are_read_once(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(predictor, "compile_features", lambda *args: compiled.append(args) or made_up(args[1]))
    config = space_of_default()
    first = features_of(SPEC, config, A100, tmp_path)
    longer = replace(SPEC, seqlen_q=4096, seqlen_k=4096)
    # Neither the length nor the cap is compiled in.
    assert features_of(longer, replace(config, cg_max_iters=48), A100, tmp_path) == first and len(compiled) == 1
    features_of(SPEC, replace(config, block_k=32), A100, tmp_path)
    features_of(SPEC, config, H200, tmp_path)
    assert len(compiled) == 3 and len(list(tmp_path.iterdir())) == 3


def test_what_changes_the_accuracy_is_not_searched():
    space = space_of()
    assert space.knobs["triton"]["cg_max_iters"] == (space.default().cg_max_iters,) and space.contains(space.default())
    assert len(space.knobs["triton"]["block_k"]) > 1 and len(space.knobs["triton"]["schedule"]) == 2
    cache = LLASpec.decoding("bfloat16", 64, 4096, 8, 64, group_size=1, is_causal=True, precision="fast")
    space = space_of(cache, H200)
    assert space.knobs["triton"]["schedule"] == ("gram",) and None not in space.knobs["triton"]["num_splits"]
    assert space.contains(space.default()) and next(space.shuffled(0)).schedule == "gram"


def test_tune_for_an_absent_gpu_writes_a_prediction_that_plans_use(tmp_path, no_compiler, capsys):
    arguments = "--gpu a100 --head-dim 64 --seqlen 1024 --precision fast --trials 12 --seed 1".split()
    trials = tmp_path / "trials.jsonl"
    assert tune.main([*arguments, "--trials-out", str(trials)]) == tune.EXIT_OK
    document = read(tmp_path / "overlay" / "nvidia-a100-40gb.yaml")
    (entry,) = document.entries
    assert store.schema_problems(document.to_dict()) == []
    assert entry.provenance == "predicted" and entry.search["model_version"] == 1
    assert set(entry.result) == {"predicted_ms", "predicted_default_ms"}
    assert entry.result["predicted_ms"] <= entry.result["predicted_default_ms"]
    assert entry.config.cg_max_iters == space_of().default().cg_max_iters
    assert set(entry.toolchain) == {"torch", "triton"}
    found = plan(SPEC, device="a100")
    assert found.source is Source.EXACT and found.config == entry.config and found.reason.startswith("predicted at")
    out = capsys.readouterr().out
    assert "which is not in this machine" in out and "none is measured" in out
    lines = [json.loads(line) for line in trials.read_text().splitlines()]
    assert len(lines) == 12 and all(x["key"] == entry.key.describe() and x["seqlen"] == 1024 for x in lines)
    best = min((x for x in lines if x["kind"] == "ok"), key=lambda x: x["median_ms"])
    assert best["median_ms"] == pytest.approx(entry.result["predicted_ms"], rel=1e-3)


def test_backends_that_are_named_are_ranked_together(tmp_path, no_compiler, monkeypatch, capsys):
    """By their predicted times, with neither CuPy nor the GPU here; Triton's alone unless others are named."""

    def features(spec, config, device, folder):
        kernels = 1 if config.schedule == "fused" else 3 if config.backend == "cuda" else 4
        (kernel,) = made_up(replace(config, schedule="fused"))
        slower = 20 if config.backend == "triton" else 1
        loops = tuple(replace(mix, issue=slower * mix.issue) for mix in kernel.loops)
        return kernels * (replace(kernel, loops=loops if kernels == 1 else loops[:2]),)

    monkeypatch.setattr(predictor, "features_of", features)
    monkeypatch.setattr(predictor, "_cannot_compile", lambda name: None)
    monkeypatch.setattr(toolchain.nvrtc, "load", lambda: SimpleNamespace(version=(13, 0)))
    arguments = "--gpu a100 --head-dim 64 --seqlen 1024 --precision fast --trials 8 --seed 1".split()
    trials = tmp_path / "trials.jsonl"
    assert tune.main([*arguments, "--trials-out", str(trials), "--backend", "triton", "cuda"]) == tune.EXIT_OK
    tried = [json.loads(line) for line in trials.read_text().splitlines()]
    best = min((x for x in tried if x["kind"] == "ok"), key=lambda x: x["median_ms"])
    assert {x["plan"]["backend"] for x in tried} == {"triton", "cuda"} and best["plan"]["backend"] == "cuda"
    (entry,) = read(tmp_path / "overlay" / "nvidia-a100-40gb.yaml").entries
    assert entry.config.as_dict() == best["plan"] and entry.toolchain == {"torch": torch.__version__, "cuda": "13.0"}
    assert entry.result["predicted_default_ms"] > entry.result["predicted_ms"]
    assert list(space_of().knobs) == ["triton"]
    capsys.readouterr()
    assert tune.main([*arguments, "--backend", "eager"]) == tune.EXIT_FAILED
    assert "eager compiles no kernels that could be read: measure it on the device; --backend takes triton, cuda" in (
        " ".join(capsys.readouterr().out.split())
    )


def test_what_a_backend_lacks_is_said(monkeypatch):
    monkeypatch.setattr(predictor, "_cannot_compile", lambda name: None)
    with pytest.raises(ValueError, match="its backward kernels are of operators that solve nothing"):
        predictable_backends(replace(SPEC, phase="backward"), H200, ("cuda",))
    monkeypatch.setattr(predictor, "_cannot_compile", lambda name: "no compiler" if name == "cuda" else None)
    assert list(predictable_backends(SPEC, A100)) == ["triton"]
    with pytest.raises(ValueError, match="--backend names cuda, whose times cannot be predicted here: no compiler"):
        predictable_backends(SPEC, A100, ("triton", "cuda"))


def test_a_gpu_of_unknown_rates_is_refused(monkeypatch, capsys):
    unknown = replace(A100, special_per_clock=0)
    monkeypatch.setattr(tune, "find_device", lambda name: (unknown, None))
    assert tune.main(["--gpu", "a100", "--quick"]) == tune.EXIT_USAGE
    assert "special_per_clock not known" in capsys.readouterr().err


def find(seqlen=4096, batch_heads=32, device=H200):
    sizes = {"seqlen": seqlen, "batch_heads": batch_heads}
    return lookup(KEY, bucket_of(seqlen, batch_heads), **sizes, device=device, reject=lambda config, entry: None)


def test_a_prediction_never_shadows_a_measurement(tmp_path):
    """Measured and near, in the shipped files, before predicted and exact in the overlay."""
    record(H200, [make_entry(seqlen=4096, provenance="predicted", block_q=128, valid=WIDE)])
    assert find().entry.provenance == "predicted" and find().source is Source.EXACT
    record(H200, [make_entry(seqlen=1024, valid=WIDE)], path=tmp_path / "shipped" / "nvidia-h200.yaml")
    match = find()
    assert match.entry.measured and match.source is Source.NEAREST and match.entry.tuned.seqlen == 1024
    # The same slot: recording keeps the measured one.
    record(H200, [make_entry(seqlen=4096)])
    record(H200, [make_entry(seqlen=4096, provenance="predicted", block_q=128, date="2030-01-01")])
    assert find().entry.measured and find().source is Source.EXACT


def test_of_predictions_the_fastest_backend_goes_first():
    """Each backend has its own; what the first cannot run, the next does."""
    for name, time in {"triton": 2.0, "cuda": 1.0}.items():
        record(H200, [make_entry(seqlen=4096, provenance="predicted", backend=name, median_ms=time)])

    def found(refused=()):
        match = lookup(KEY, bucket_of(4096, 32), seqlen=4096, batch_heads=32, device=H200,
                       reject=lambda config, entry: "no" if config.backend in refused else None)  # fmt: skip
        return match.entry.config.backend

    assert found() == "cuda" and found({"cuda"}) == "triton"
    record(H200, [make_entry(seqlen=4096, median_ms=3.0)])
    assert find().entry.measured and find().entry.config.backend == "triton"


def test_a_prediction_fills_what_no_measurement_covers(tmp_path):
    record(H200, [make_entry(seqlen=1024, valid=((768, 1535), (1, 512)))])
    record(H200, [make_entry(seqlen=4096, provenance="predicted")])
    assert find(1024).entry.measured and find(4096).entry.provenance == "predicted"
    # Its own prediction, rather than what was measured on a relative.
    other = resolve("h100")
    assert find(1024, device=other).source is Source.SAME_ARCH
    record(other, [make_entry(seqlen=1024, provenance="predicted")])
    assert find(1024, device=other).source is Source.EXACT


def test_of_two_relatives_the_measured_one_goes_first():
    record(resolve("h100"), [make_entry(provenance="predicted", valid=WIDE)])
    record(resolve("h100-pcie"), [make_entry(seqlen=1024, valid=WIDE)])
    assert find(4096).entry.measured and find(4096).source is Source.SAME_ARCH


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_one_small_key_from_the_compiler_to_the_plan(tmp_path):
    arguments = "--gpu a100 --head-dim 16 --seqlen 256 --batch-heads 4 --precision fast --trials 1".split()
    assert tune.main(arguments) == tune.EXIT_OK
    spec = LLASpec.self_attention("bfloat16", 16, 256, 4, None, phase="forward", precision="fast", is_causal=True)
    assert plan(spec, device="a100").reason.startswith("predicted")
