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
    device, spec = resolve("h200"), spec_of(parse_log(LOG.splitlines())[0])
    configs = [KernelConfig("triton", "fused", 64, 64, 32, 4, stages) for stages in (1, 2, 3)]
    trials = [prediction.Trial(("k",), ("f",), spec, c, (), ms) for c, ms in zip(configs, (2.0, 1.0, 1.5))]
    scores = prediction.score(trials, np.array([3.0, 2.0, 1.0]), device)
    assert scores["mean_regret"] == 1.5 and scores["keys"][0]["spearman"] == 0.5
    refused = prediction.score(trials, np.array([3.0, 1.0, np.inf]), device)
    assert refused["mean_regret"] == 1.0 and refused["refused"] == 1


def test_searches_of_a_key_agree_on_the_plans_of_both():
    spec = spec_of(parse_log(LOG.splitlines())[0])
    configs = [KernelConfig("triton", "fused", 64, 64, 32, 4, stages) for stages in (1, 2, 3, 4)]
    first, second = (1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 2.0)
    trials = [
        prediction.Trial(("k", search), ("f",), spec, config, (), ms)
        for search, of in (("one", first), ("other", second))
        for config, ms in zip(configs, of)
    ]
    assert prediction.retest(trials) == {"pairs_of_searches": 1, "mean_spearman_within_keys": 0.5}
    assert prediction.retest(trials[:4]) is None


def test_a_fit_finds_constants_that_explain_the_times():
    """Times made with other constants: a fit comes nearer to them, and predictions rank as they do."""
    folder, device = prediction.RESULTS / prediction.DEVICE, resolve("h200")
    library = prediction.Library()
    library.load(folder / "features.json")
    trials = [t for t in prediction.load(folder, library, device)[0] if (*t.key[:2], t.config.backend) == FITTED]
    truth = prediction.replace(START, load=200.0, wait=200.0, cpi=1.0)
    made = prediction.times(trials, device, truth)
    kept = np.isfinite(made)
    made_up = [prediction.replace(t, median_ms=float(ms)) for t, ms, ok in zip(trials, made, kept) if ok]
    before = prediction.loss(made_up, device, START)
    fitted = prediction.fit(made_up, device, steps=40)
    assert prediction.loss(made_up, device, fitted) < 0.5 * before


FITTED = "lla forward bfloat16 D64 Dv64 fast causal", 1024, "triton"


def test_the_constants_of_the_package_are_those_that_were_evaluated():
    path = prediction.RESULTS / prediction.DEVICE / "prediction.json"
    backends = json.loads(path.read_text())["backends"]
    assert {name: set(phases) for name, phases in backends.items()} == dict.fromkeys(
        prediction.BACKENDS, {"forward", "backward", "decode"}
    )
    for backend, phases in backends.items():
        for phase, report in phases.items():
            own = prediction.efficiency.BY_BACKEND[backend][phase]
            assert prediction.asdict(own) == pytest.approx(report["constants"], rel=1e-3)
            assert report["model_version"] == prediction.efficiency.VERSION


FLEET_LOG = """\
Searching 2 key(s) on 2 devices: cuda:0, cuda:1
cuda:0  parallax forward bfloat16 D64 Dv64 accurate causal, N 1024, B*H 32
cuda:1  parallax forward bfloat16 D64 Dv64 accurate causal, N 1024, B*H 32
  cuda:0 triton fused 128x128, 8 warps, 3 stages: 0.040 ms
cuda:0  parallax backward bfloat16 D64 Dv64 accurate causal, N 4096, B*H 32
  cuda:0 cuda fused 128x64, 4 stages; kv 64x128, 4 stages: 0.739 ms
  cuda:1 cuda fused 192x64, 16 warps, 8 stages: 0.041 ms
Tuning 2 key(s) on NVIDIA H200 (nvidia-h200)
[1/2] parallax forward bfloat16 D64 Dv64 accurate causal, N 1024, B*H 32, resumed after 2 trials
"""


def test_the_log_of_several_devices_becomes_trials_key_by_key():
    first, second, third = parse_log(FLEET_LOG.splitlines())
    assert [x["plan"]["backend"] for x in (first, second, third)] == ["triton", "cuda", "cuda"]
    assert first["key"] == second["key"] and third["median_ms"] == 0.739
    assert "cg_max_iters" not in third["plan"] and third["plan"]["kv_block_k"] == 128
    spec = spec_of(third)
    assert (spec.op, spec.phase, spec.seqlen_q) == ("parallax", "backward", 4096)


def test_a_key_that_comes_back_is_of_another_search(tmp_path):
    trial = {"key": "lla forward bfloat16 D64 Dv64 fast causal", "batch_heads": 32, "kind": "ok", "median_ms": 1.0,
             "plan": KernelConfig("triton", "fused", 64, 64, 32, 4, 3).as_dict()}  # fmt: skip
    lines = [json.dumps(trial | {"seqlen": n}) for n in (1024, 1024, 4096, 1024)]
    (tmp_path / prediction.TRIALS[0]).write_text("\n".join(lines))
    searches = [search.split()[-1] for _, _, _, search in prediction._records(tmp_path)]
    assert searches == ["1", "1", "1", "2"]


def test_the_choice_between_backends_is_scored_where_both_were_measured():
    device, spec = resolve("h200"), spec_of(parse_log(LOG.splitlines())[0])
    triton, cuda = KernelConfig("triton", "fused", 64, 64, 32, 4, 3), KernelConfig("cuda", "fused", 64, 64, 32, 8, 3)
    both = [("a", triton, 2.0, 2.5), ("a", cuda, 1.0, 2.0), ("b", triton, 1.0, 1.5), ("b", cuda, 1.5, 1.0)]
    rows = [*both, ("c", cuda, 1.0, 1.0)]
    trials = [prediction.Trial((key,), ("f",), spec, config, (), ms) for key, config, ms, _ in rows]
    scores = prediction.score_choice(trials, np.array([predicted for *_, predicted in rows]), device)
    assert scores["keys_of_right_backend"] == 1 and scores["trials"] == 4 and scores["pairs_in_order"] == 0.5
    assert [k["regret"] for k in scores["keys"]] == [1.0, 1.5]
    assert prediction.score_choice(trials[4:], np.ones(1), device) is None
