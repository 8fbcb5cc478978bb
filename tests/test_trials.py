"""Trials recovered from a printed search, and the figures of merit of predictions."""

import json

import numpy as np
import pytest

from benchmarks import prediction
from benchmarks.trials import main, parse_log, parse_plan, read_trials, spec_of
from lla_compile.devices import resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.efficiency import START
from lla_compile.spec import LLASpec
from lla_compile.tuning_db.short import short

LOG = """\
Tuning 1 key(s) on NVIDIA H200 (nvidia-h200)
[1/1] lla backward bfloat16 D64 Dv64 fast causal, N 1024, B*H 32
  1/2 triton fused 64x64, 4 warps, 3 stages, 32 CG; kv 32x64, 4 warps, 3 stages: 0.244 ms
  2/2 triton split 64x32, 4 warps, 4 stages, 24 CG; kv 32x128, 8 warps, 3 stages: wrong: dridge has error 5.1e-03
key    best plan    time
"""


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("triton", "fused", 64, 32, 48, 8, 2),
        KernelConfig("triton", "split", 128, 64, 24, 4, 3, 32, 64, 4, 1),
        KernelConfig("triton", "gram", 1, 64, 256, 8, 3, num_splits=4, block_d=128),
        KernelConfig("eager", "fused", 128, 256, 64),
    ],
    ids=short,
)
def test_a_printed_plan_reads_back(config):
    assert parse_plan(short(config)) == config


def test_a_log_becomes_trials(tmp_path):
    first, second = parse_log(LOG.splitlines())
    assert first["kind"] == "ok" and first["median_ms"] == 0.244 and first["plan"]["kv_block_q"] == 32
    assert second["kind"] == "wrong" and second["message"].startswith("dridge") and "median_ms" not in second
    expected = LLASpec.self_attention(
        "bfloat16", 64, 1024, 32, 64, phase="backward", precision="fast", is_causal=True
    )  # fmt: skip
    assert spec_of(first) == expected
    (tmp_path / "log").write_text(LOG)
    assert main([str(tmp_path / "log"), "--out", str(tmp_path / "trials.jsonl")]) == 0
    assert read_trials(tmp_path / "trials.jsonl") == [first, second]


def test_rank_correlation():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert prediction.spearman(a, a**3) == 1.0 and prediction.spearman(a, -a) == -1.0
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5).
    assert prediction.spearman(np.array([2.0, 2.0, 3.0, 4.0]), a) == pytest.approx(0.9487, abs=1e-4)
    assert prediction.spearman(a[:2], a[:2]) is None


def test_regret_is_the_measured_time_of_the_choice():
    device, spec = resolve("h200"), spec_of(next(iter(parse_log(LOG.splitlines()))))
    configs = [KernelConfig("triton", "fused", 64, 64, 32, 4, stages) for stages in (1, 2, 3)]
    trials = [prediction.Trial(("k",), ("f",), spec, c, (), ms) for c, ms in zip(configs, (2.0, 1.0, 1.5))]
    scores = prediction.score(trials, np.array([3.0, 2.0, 1.0]), device)
    assert scores["mean_regret"] == 1.5 and scores["keys"][0]["spearman"] == 0.5
    refused = prediction.score(trials, np.array([3.0, 1.0, np.inf]), device)
    assert refused["mean_regret"] == 1.0 and refused["refused"] == 1


def test_a_fit_finds_constants_that_explain_the_times():
    """Times made with other constants: a fit comes nearer to them, and predictions rank as they do."""
    folder, device = prediction.RESULTS / prediction.DEVICE, resolve("h200")
    library = prediction.Library()
    library.load(folder / "features.json")
    trials = [t for t in prediction.load(folder, library, device)[0] if t.key[:2] == trials_key()]
    truth = prediction.replace(START, load=200.0, wait=200.0, cpi=1.0)
    made = prediction.times(trials, device, truth)
    kept = np.isfinite(made)
    made_up = [prediction.replace(t, median_ms=float(ms)) for t, ms, ok in zip(trials, made, kept) if ok]
    before = prediction.loss(made_up, device, START)
    fitted = prediction.fit(made_up, device, steps=40)
    assert prediction.loss(made_up, device, fitted) < 0.5 * before


def trials_key() -> tuple[str, int]:
    return "lla forward bfloat16 D64 Dv64 fast causal", 1024


def test_the_constants_of_the_package_are_those_that_were_fitted():
    path = prediction.RESULTS / prediction.DEVICE / "prediction.json"
    for phase, report in json.loads(path.read_text())["phases"].items():
        own = prediction.efficiency.BY_PHASE[phase]
        assert prediction.asdict(own) == pytest.approx(report["constants"], rel=1e-3)
        assert report["model_version"] == prediction.efficiency.VERSION
