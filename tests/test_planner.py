import logging
from dataclasses import replace

import pytest
from fakes import FakeBackend, entry_of, lookup_in
from problems import CPU

from lla_compile import LLASpec
from lla_compile.key import Bucket, key_of
from lla_compile.plans import Source
from lla_compile.planner import TuningMiss, forget_reports, make_plan, report_miss, tune_command

GPU = replace(
    CPU, id="nvidia-h200", name="NVIDIA H200", vendor="nvidia", compute_capability="9.0", tensor_tflops=1000.0
)
SPEC = LLASpec("bfloat16", 128, 128, batch=4, num_heads=8, num_kv_heads=8, seqlen_q=4000, seqlen_k=4000)
NOTHING = lookup_in()


def pair(**triton):
    return {"triton": FakeBackend("triton", **triton), "eager": FakeBackend("eager")}


class Missing(dict):
    """Backends of which "triton" does not import."""

    def __getitem__(self, name):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return super().__getitem__(name)


def test_first_backend_that_supports_the_spec():
    assert make_plan(SPEC, GPU, pair(), NOTHING).config.backend == "triton"
    plan = make_plan(SPEC, GPU, pair(refuses="no float64"), NOTHING)
    assert plan.config.backend == "eager"
    assert any("no float64" in note for note in plan.notes)


def test_backend_that_does_not_import_is_passed_over():
    plan = make_plan(SPEC, GPU, Missing(pair()), NOTHING)
    assert plan.config.backend == "eager" and "No module named 'triton'" in str(plan)
    with pytest.raises(NotImplementedError, match="No module named 'triton'"):
        make_plan(SPEC, GPU, Missing(pair()), NOTHING, backend="triton")


@pytest.mark.parametrize(
    "heads, queries, seqlen, splits",
    [
        (8, 1, 16384, 16),  # as tuned
        (16, 1, 16384, 8),
        (8, 2, 16384, 8),  # each query has its own parts
        (12, 1, 16384, 10),  # no more than the device was filled with
        (1, 1, 16384, 64),  # the most there can be
        (4, 1, 2000, 16),  # more would have few keys each
        (1000, 1, 16384, 1),
    ],
)
def test_a_cache_is_cut_for_as_many_parts_as_were_tuned(heads, queries, seqlen, splits):
    entry = entry_of("triton", tuned=Bucket(16384, 8), num_splits=16)
    spec = LLASpec("bfloat16", 128, 128, 1, heads, heads, queries, seqlen, phase="decode")
    plan = make_plan(spec, GPU, pair(), lookup_in(entry))
    assert plan.config == replace(entry.config, num_splits=splits)
    assert ("parts a query" in plan.reason) == (splits != 16)


def test_cpu_takes_eager_unless_another_is_named():
    assert make_plan(SPEC, CPU, pair(), NOTHING).config.backend == "eager"
    assert make_plan(SPEC, CPU, pair(), NOTHING, backend="triton").config.backend == "triton"


def test_named_backend_wins_over_allowed_ones_and_entries():
    lookup = lookup_in(entry_of("triton"))
    plan = make_plan(SPEC, GPU, pair(), lookup, backend="eager", allowed=("triton",))
    assert plan.config.backend == "eager" and plan.source is Source.HEURISTIC
    assert "not among those allowed" in plan.reason


def test_named_backend_leaves_a_backward_pass_that_it_has_not_to_the_others():
    spec = replace(SPEC, phase="backward", cg_tol=None)
    plan = make_plan(spec, GPU, pair(refuses="no backward kernels"), NOTHING, backend="triton")
    assert plan.config.backend == "eager" and "no backward kernels" in str(plan)


def test_named_backend_that_cannot_is_an_error():
    with pytest.raises(NotImplementedError, match="NVIDIA H200.*triton: no float64"):
        make_plan(SPEC, GPU, pair(refuses="no float64"), NOTHING, backend="triton")


def test_allowed_restricts():
    assert make_plan(SPEC, GPU, pair(), NOTHING, allowed=("eager",)).config.backend == "eager"
    with pytest.raises(NotImplementedError, match="LLA_COMPILE_BACKENDS=triton leaves it out"):
        make_plan(SPEC, CPU, pair(), NOTHING, allowed=("triton",))


def test_unknown_names():
    with pytest.raises(ValueError, match="backend must name triton, eager, got 'cuda'"):
        make_plan(SPEC, GPU, pair(), NOTHING, backend="cuda")
    with pytest.raises(ValueError, match="LLA_COMPILE_BACKENDS must name triton, eager, got 'tritn'"):
        make_plan(SPEC, GPU, pair(), NOTHING, allowed=("tritn",))


def test_entry_decides():
    plan = make_plan(SPEC, GPU, pair(), lookup_in(entry_of("eager", block_q=96), source=Source.NEAREST, distance=1.5))
    assert (plan.config.backend, plan.config.block_q) == ("eager", 96)
    assert (plan.source, plan.distance, plan.reason) == (Source.NEAREST, 1.5, "found")


def test_stale_entry_is_refused_for_the_next():
    lookup = lookup_in(entry_of("triton", kernel_hash="old", block_q=16), entry_of("triton", block_q=32))
    assert make_plan(SPEC, GPU, pair(), lookup).config.block_q == 32
    plan = make_plan(SPEC, GPU, pair(), lookup_in(entry_of("triton", kernel_hash="old")))
    assert plan.source is Source.HEURISTIC and "other kernel sources" in plan.reason


def test_infeasible_entry_is_refused():
    plan = make_plan(SPEC, GPU, pair(infeasible="300 KiB of shared memory"), lookup_in(entry_of("triton")))
    assert plan.source is Source.HEURISTIC and "300 KiB of shared memory" in plan.reason


def test_entry_of_a_backend_that_cannot_run_is_refused():
    plan = make_plan(SPEC, GPU, Missing(pair()), lookup_in(entry_of("triton")))
    assert plan.config.backend == "eager" and "No module named 'triton'" in plan.reason


def test_window_counts_as_the_length():
    lookup = lookup_in()
    make_plan(replace(SPEC, window_size=500), GPU, pair(), lookup)
    _, bucket, seqlen, batch_heads, device = lookup.queries[0]
    assert (bucket, seqlen, batch_heads, device) == (Bucket(512, 32), 500, 32, GPU)


def test_strict():
    command = (
        "python -m lla_compile.tune --gpu nvidia-h200 --phase forward --dtype bfloat16 --head-dim 128 --seqlen 4096 "
        "--batch-heads 32 --precision accurate"
    )
    assert tune_command(SPEC, GPU) == command
    with pytest.raises(TuningMiss, match=command):
        make_plan(SPEC, GPU, pair(), NOTHING, strict=True)
    assert make_plan(SPEC, GPU, pair(), lookup_in(entry_of("triton")), strict=True).source is Source.EXACT
    assert make_plan(replace(SPEC, batch=0), GPU, pair(), NOTHING, strict=True)  # nothing to compute, nothing to tune


def test_tune_command_names_what_differs_from_the_usual():
    command = tune_command(replace(SPEC, head_dim_v=64, is_causal=False), GPU)
    assert "--head-dim-v 64" in command and "--no-causal" in command


def test_tune_command_is_one_that_the_tuner_takes():
    from lla_compile.tune import _parser

    words = tune_command(replace(SPEC, head_dim_v=64, is_causal=False, precision="fast"), GPU).split()
    assert words[:3] == ["python", "-m", "lla_compile.tune"]
    args = _parser().parse_args(words[3:])
    assert (args.gpu, args.phase, args.dtype, args.precision) == ("nvidia-h200", ["forward"], ["bfloat16"], ["fast"])
    assert (args.head_dim, args.head_dim_v, args.seqlen, args.batch_heads) == ([128], [64], [4096], [32])
    assert args.causal is False


@pytest.mark.parametrize("queries, heads", ((1, 8), (4, 32)))
def test_tune_command_of_a_cache_names_the_queries_that_share_a_key(queries, heads):
    from lla_compile.tune import _parser, _specs
    from lla_compile.tuner.presets import PRESETS

    spec = replace(LLASpec.decoding("bfloat16", 64, 1024, 8, group_size=8), seqlen_q=queries)
    command = tune_command(spec, GPU)
    assert f"--phase decode --dtype bfloat16 --head-dim 64 --seqlen 1024 --batch-heads {heads} " in command
    assert command.endswith(f"--group {8 * queries}")
    (tuned,) = _specs(_parser().parse_args(command.split()[3:]), PRESETS["full", "gpu"])
    assert key_of(tuned) == key_of(spec)


def test_a_miss_is_reported_once_and_louder_with_distance(caplog):
    caplog.set_level(logging.INFO, "lla_compile")
    forget_reports()
    miss = make_plan(SPEC, GPU, pair(), NOTHING)
    for plan in (miss, miss, make_plan(replace(SPEC, seqlen_q=100), GPU, pair(), NOTHING)):
        report_miss(plan)
    report_miss(make_plan(SPEC, GPU, pair(), lookup_in(entry_of("triton"), source=Source.NEAREST)))
    report_miss(make_plan(SPEC, GPU, pair(), lookup_in(entry_of("triton"), source=Source.EXACT)))
    report_miss(make_plan(SPEC, CPU, pair(), NOTHING))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
    assert tune_command(SPEC, GPU) in caplog.messages[0]


def test_plan_explains_itself():
    spec = LLASpec("bfloat16", 64, 32, batch=2, num_heads=4, num_kv_heads=2, seqlen_q=8, seqlen_k=8, cg_max_iters=7)
    text = str(make_plan(spec, GPU, pair(), lookup_in(entry_of("triton"), source=Source.NEAREST, distance=1.5)))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["spec"] == spec.describe()
    assert lines["device"] == "NVIDIA H200 (nvidia-h200)"
    assert lines["backend"] == "triton, schedule split"
    assert lines["tile"] == "block_q 128, block_k 64"
    assert lines["CG"] == "until ||r|| <= 0.001 ||r_0||, at most 7 iterations, operands split until 0.1 ||r_0||"
    assert lines["source"] == "tuned for this device, another bucket, 1.5 octaves away"
    assert lines["reason"] == "found"
    assert "stats 2, cg_step 3 (each CG iteration), output 3" in lines["sweeps"]
    pairs = 8 * 36  # eight heads, 1 + 2 + ... + 8 pairs each
    outside, iteration = 2 * pairs * (2 * 64 + 2 * 64 + 32), 2 * pairs * 3 * 64
    assert lines["work"] == f"288 visible pairs, {outside / 1e6:.3g} MFLOP + {iteration / 1e6:.3g} MFLOP a CG iteration"
    assert f"{(outside + 7 * iteration) / 1e15 * 1e6:.3g} us at the cap" in lines["floor"]
    assert len(text.splitlines()) <= 12


def test_floor_is_left_out_where_the_peak_is_unknown():
    assert "floor" not in str(make_plan(SPEC, CPU, pair(), NOTHING))
