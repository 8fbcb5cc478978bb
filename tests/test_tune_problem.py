"""What a trial is measured with: inputs, held-out errors, times, database entries."""

import math
from dataclasses import replace

import pytest
import torch
from tune_landscape import SPEC, problem

from lla_compile.devices import resolve
from lla_compile.key import Bucket, bucket_of_spec
from lla_compile.precision import error_limit
from lla_compile.tuner import timing
from lla_compile.tuner.held_out import held_out
from lla_compile.tuner.presets import PRESETS
from lla_compile.tuner.problem import normal_tensors
from lla_compile.tuner.timing import CpuTimer, Timing, interleaved
from lla_compile.tuner.writer import out_file, validity

LONG = replace(SPEC, dtype="bfloat16", num_heads=8, num_kv_heads=8, seqlen_q=4096, seqlen_k=4096, head_dim_v=16)


def no_forward(spec):
    raise AssertionError("the forward phase is complete in itself")


def test_inputs_are_the_same_in_every_run_and_held_out_ones_differ():
    cpu = torch.device("cpu")
    first, again, other = (normal_tensors(SPEC, cpu, purpose) for purpose in ("timed", "timed", "held out"))
    assert first.keys() == {"q", "k", "v"} and all(torch.equal(x, again[name]) for name, x in first.items())
    assert not torch.equal(first["q"], other["q"])
    assert abs(first["q"].std().item() - 1) < 0.2


def test_held_out_inputs_are_small_and_ragged_but_of_the_keys_own_kind():
    cases = held_out(problem(LONG), no_forward, seqlen=1024, heads=4)
    assert [case.spec.seqlen_q for case in cases] == [1024, 999]
    for case in cases:
        kept = ("dtype", "head_dim", "head_dim_v", "precision", "is_causal", "cg_tol", "phase")
        assert all(getattr(case.spec, name) == getattr(LONG, name) for name in kept)
        assert case.spec.batch_heads == 4 and case.spec.seqlen_k == case.spec.seqlen_q
        inputs = case.inputs(0.1)
        assert [inputs[name].dtype for name in "qkv"] == [torch.bfloat16] * 3 and inputs["ridge"] == 0.1
        assert case.limit(0.1) == error_limit("bfloat16", "accurate", 0.1)
    assert [c.spec.seqlen_q for c in held_out(problem(SPEC), no_forward, 1024, 4)] == [48, 25]
    assert [c.spec.seqlen_q for c in held_out(problem(SPEC), no_forward, 1, 1)] == [1]


def test_the_error_is_relative_to_the_reference_and_nan_stays_nan():
    case = held_out(problem(), no_forward, seqlen=40, heads=1)[0]
    for ridge in (1.0, 0.1):
        out = case.reference(ridge)["out"]
        assert case.errors({"out": out}, ridge) == {"out": 0}
        assert case.worst({"out": 1.01 * out}, ridge) == ("out", pytest.approx(0.01))
        assert math.isnan(case.worst({"out": out * float("nan")}, ridge)[1])
    assert not torch.equal(case.reference(1.0)["out"], case.reference(0.1)["out"])


def test_timing_is_the_median_and_the_relative_interquartile_range():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing == Timing(3.0, pytest.approx(2 / 3))


def test_launches_are_timed_in_turns_within_the_budget():
    order = []

    class Clock:
        def once(self, launch):
            return launch()

    launches = [lambda: order.append("a") or 2.0, lambda: order.append("b") or 8.0]
    timings = interleaved(Clock(), launches, budget_ms=50.0, repeats=(3, 100))
    assert [t.median_ms for t in timings] == [2.0, 8.0]
    assert order == ["a", "b"] * (1 + 10)
    order.clear()
    interleaved(Clock(), launches, budget_ms=1.0, repeats=(3, 100))
    assert order == ["a", "b"] * (1 + 3)
    assert CpuTimer().once(lambda: None) >= 0


def test_validity_is_the_bucket_and_similar_batches():
    bucket = bucket_of_spec(LONG)
    assert bucket == Bucket(4096, 8)
    for phase in ("forward", "backward"):
        assert validity(bucket, phase) == {"seqlen": (3072, 6143), "batch_heads": (2, 128)}
        assert validity(Bucket(1024, 2), phase)["batch_heads"] == (1, 32)


def test_decoding_plans_stand_in_for_longer_caches_and_larger_batches_but_not_for_smaller():
    assert validity(Bucket(4096, 8), "decode") == {"seqlen": (3072, 12287), "batch_heads": (6, 23)}
    assert validity(Bucket(1024, 1), "decode")["batch_heads"] == (1, 2)
    grid = [validity(Bucket(1024, heads), "decode")["batch_heads"] for heads in (8, 32, 128, 512)]
    assert all(low == high + 1 for (_, high), (low, _) in zip(grid, grid[1:]))  # every fourth bucket leaves no gap


def test_a_gpu_is_kept_busy_and_its_cache_emptied_before_each_launch(monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "CudaTimer", lambda device, flush_bytes: asked.append(flush_bytes))
    timing.timer_for(torch.device("cuda"), resolve("h200"))
    unknown = replace(resolve("h200"), bandwidth_gbs=0.0, l2_bytes=1 << 30)
    timing.timer_for(torch.device("cuda"), unknown)
    assert asked == [int(0.4e-3 * 4800e9), 2 << 30]
    assert isinstance(timing.timer_for(torch.device("cpu"), resolve("cpu")), CpuTimer)


def test_out_is_a_file_or_a_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path))
    assert out_file(None, "cpu") == tmp_path / "cpu.yaml"
    assert out_file(tmp_path / "db", "cpu") == tmp_path / "db" / "cpu.yaml"
    assert out_file(tmp_path / "mine.yaml", "cpu") == tmp_path / "mine.yaml"


def test_quick_is_smaller_than_full():
    for kind in ("gpu", "cpu"):
        quick, full = PRESETS["quick", kind], PRESETS["full", kind]
        assert quick.trials < full.trials and quick.timeout_s < full.timeout_s
        assert len(quick.seqlens) <= len(full.seqlens) and 1.0 in quick.error_ridges and 0.1 in quick.error_ridges
    shipped = PRESETS["full", "gpu"]
    assert (shipped.head_dims, shipped.seqlens) == ((64, 128), (1024, 4096, 16384))
