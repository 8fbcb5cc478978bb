"""Tuning phase "decode": its keys and inputs, what every length is held to, and a space that is mostly infeasible."""

import math
import time
from dataclasses import replace

import optuna
import pytest
import torch
from tune_landscape import PRESET, LandscapeTimer, problem
from tuned import KEY, make_entry

from lla_compile import backends, clear_cache, dispatch, lla_decode, plan, tune
from lla_compile.key import Bucket, key_of
from lla_compile.plans import KernelConfig, Source
from lla_compile.precision import error_limit
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec
from lla_compile.tuner import evaluate
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.held_out import held_out
from lla_compile.tuner.outcome import Kind
from lla_compile.tuner.problem import Case
from lla_compile.tuner.search import Budget, Search, evaluated
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.study import TuningStudy, quiet_optuna
from lla_compile.tuner.timing import Timing
from lla_compile.tuner.writer import neighbours
from lla_compile.tuning_db import read, record, store

SPEC = LLASpec.decoding("float32", 8, 64, 4, head_dim_v=12, group_size=2)
CPU = torch.device("cpu")
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)


def no_forward(spec):
    raise AssertionError("the decode phase is complete in itself")


class Cache:
    """A backend with the reference's output; what it was called with is in ``calls``.

    ``distort`` changes the output of each sequence, given its length.
    """

    name = "eager"

    def __init__(self, distort=lambda out, length: out):
        self.calls, self.now, self._distort = [], 0.0, distort

    def unsupported(self, spec, device):
        return None

    def alternatives(self, spec, device):
        return ()

    def default_config(self, spec, device):
        return KernelConfig(self.name, "gram", 1, 64, 32, num_warps=4, num_stages=2, num_splits=1, block_d=16)

    def search_space(self, spec, device):
        return {
            "schedule": ("gram", "fused"), "block_q": (1, 16), "block_k": (16, 32, 64, 128), "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4), "num_splits": SPLITS, "block_d": (16, 32, 64, 128), "cg_max_iters": (16, 32),
        }  # fmt: skip

    def infeasible(self, spec, config, device):
        gram = config.schedule == "gram"
        if (config.block_q == 1) != gram:
            return "block_q"
        if not gram and (config.num_splits, config.block_d) != (1, 16):
            return "knobs of gram"
        return "too large" if config.block_k * config.block_d > 4096 else None

    def source_hash(self, spec, config):
        return "0123456789abcdef"

    def precompile(self, spec, config, device):
        """Nothing to compile."""

    def bind(self, plan):
        def executable(inputs, wanted):
            self.calls.append((plan.spec, inputs, wanted))
            self.now += self.milliseconds(plan.config)
            q, k, v, seqlens, ridge = (inputs[name] for name in ("q", "k", "v", "seqlens", "ridge"))
            lengths = [k.shape[2]] * k.shape[0] if seqlens is None else seqlens.tolist()
            outs = [
                self._distort(lla_reference(q[b, None], k[b, None, :, :n], v[b, None, :, :n], ridge), n)
                for b, n in enumerate(lengths)
            ]
            assert wanted == ("out",)
            return {"out": inputs["out"].copy_(torch.cat(outs))}

        executable.workspace_numel = 7
        return executable

    @staticmethod
    def milliseconds(config):
        """Fastest as gram, with 16 splits and as few threads and rows as possible."""
        slope = abs(math.log2(config.num_splits / 16)) + math.log2(config.num_warps * config.block_d / 32)
        return (1 + slope + math.log2(config.block_k / 16) / 10) * (1 if config.schedule == "gram" else 5)


def evaluator(backend, spec=SPEC):
    return Evaluator(problem(spec), {"eager": backend}, PRESET, LandscapeTimer(backend))


class TestInputs:
    def test_the_timed_cache_is_full_and_the_caller_gives_output_and_workspace(self):
        backend = Cache()
        run = evaluator(backend)
        run.retime([backend.default_config(SPEC, None)])
        spec, inputs, wanted = backend.calls[-1]
        assert spec == SPEC and wanted == ("out",) and inputs["seqlens"] is None
        assert inputs["q"].shape == (2, 2, 1, 8) and inputs["out"].shape == (2, 2, 1, 12)
        assert inputs["k"].shape == (2, 1, 64, 8) and inputs["v"].shape == (2, 1, 64, 12)
        assert (inputs["ridge"], inputs["scale"]) == (1.0, 8**-0.5)
        assert inputs["workspace"].shape == (7,) and inputs["workspace"].dtype == torch.float32
        assert all(call[1]["workspace"] is inputs["workspace"] for call in backend.calls)

    def test_unused_slots_hold_nan_and_the_lengths_are_given(self):
        inputs = Case(SPEC, CPU, "held out", no_forward, (3, 64)).inputs(0.1)
        assert inputs["seqlens"].tolist() == [3, 64] and inputs["seqlens"].dtype == torch.int32
        for name in "kv":
            assert inputs[name][0, :, 3:].isnan().all() and inputs[name].isnan().sum() == inputs[name][0, :, 3:].numel()

    def test_held_out_caches_are_full_and_ragged_with_the_keys_own_group(self):
        spec = LLASpec.decoding("bfloat16", 128, 16384, 256, group_size=8)
        full, ragged = held_out(problem(spec), no_forward, seqlen=1024, heads=4)
        assert (full.spec.batch, full.spec.seqlen_k, full.seqlens) == (1, 1024, None)
        assert (ragged.spec.batch, ragged.spec.seqlen_k, ragged.seqlens) == (5, 999, (1, 2, 17, 128, 999))
        for case in (full, ragged):
            assert key_of(case.spec) == key_of(spec) and case.spec.num_kv_heads == 1
            assert case.checked == case.ordinary == ("out",)
            assert case.limit(0.01) == error_limit("bfloat16", "accurate", 0.01, "decode") == 2.5e-3
        ungrouped = held_out(problem(replace(spec, num_heads=1)), no_forward, 1024, 4)
        assert [case.spec.num_kv_heads for case in ungrouped] == [4, 4]
        tiny = held_out(problem(replace(SPEC, seqlen_k=1)), no_forward, 1024, 4)
        assert [case.seqlens for case in tiny] == [None, (1,) * 5]


class TestErrors:
    def test_each_sequence_is_relative_to_its_own_reference(self):
        case = held_out(problem(SPEC), no_forward, 64, 4)[1]
        inputs, out = case.inputs(0.1), case.reference(0.1)["out"]
        only_value = inputs["v"][0, :, :1].double().repeat_interleave(2, 0)
        assert (out[0] - only_value).norm() < 1e-12 and not out.isnan().any()
        assert (out.flatten(1).norm(dim=1) > 0.1).all()
        wrong = out.clone()
        wrong[2] *= 1.01
        errors = case.errors({"out": wrong}, 0.1)
        assert errors.keys() == {f"out of {n} keys" for n in (1, 2, 8, 17, 39)}
        assert case.worst({"out": wrong}, 0.1) == ("out of 17 keys", pytest.approx(0.01))
        assert sorted(errors.values())[-2] == 0

    @pytest.mark.parametrize("length", (40, 21, 17, 8, 2, 1))
    def test_a_configuration_that_is_wrong_at_one_length_is_wrong(self, length):
        backend = Cache(lambda out, n: out * 1.001 if n == length else out)
        outcome = evaluator(backend)(backend.default_config(SPEC, None))
        assert outcome.kind is Kind.WRONG and outcome.error == pytest.approx(1e-3, rel=1e-3)
        where = "out has" if length == 40 else f"out of {length} keys has"
        assert outcome.message.startswith(where)

    def test_small_ridges_are_held_to_their_limit_too(self):
        spec = replace(SPEC, dtype="bfloat16", cg_tol=None)
        backend = Cache()
        assert evaluator(backend, spec)(backend.default_config(spec, None)).ok
        checked = {inputs["ridge"] for spec, inputs, _ in backend.calls if spec.batch == 5}
        assert checked == {1.0, 0.1, 0.01}

    def test_what_is_not_written_shows(self):
        class Lazy(Cache):
            def bind(self, plan):
                executable = super().bind(plan)

                def lazy(inputs, wanted):
                    kept = inputs["out"][:, :, :, 3].clone()
                    executable(inputs, wanted)["out"][:, :, :, 3] = kept
                    return {"out": inputs["out"]}

                lazy.workspace_numel = 0
                return lazy

        backend = Lazy()
        assert "not finite" in evaluator(backend)(backend.default_config(SPEC, None)).message


class TestSearch:
    """Of the 12288 combinations of the knobs 21 % are feasible, and of those with the schedule fused 1.6 %."""

    def search(self, backend, trials, enqueue=()):
        class Timed:
            def __call__(self, config):
                return evaluate.Outcome(Kind.OK, "", backend.milliseconds(config), 0.0, 0.0, 1.0)

            def verify(self, config):
                return None

            def retime(self, configs):
                return [Timing(backend.milliseconds(config), 0.0) for config in configs]

            def iterations(self, config):
                return 12.5

        space = SearchSpace.joint(SPEC, problem().device, {"eager": backend})
        with quiet_optuna():
            study = TuningStudy(optuna.storages.InMemoryStorage(), "study", space, 0)
            search = Search(study, space, Timed(), Budget(trials, math.inf, finalists=3))
            return search.run(enqueue), search.records

    def test_few_proposals_are_wasted_and_both_schedules_measured(self):
        start = time.perf_counter()
        decision, records = self.search(Cache(), 40)
        assert time.perf_counter() - start < 20
        assert evaluated(records) == 40 and len(records) < 80
        measured = [record.config for record in records if record.outcome.ok]
        assert sum(config.schedule == "fused" for config in measured) >= 4
        assert decision.config.schedule == "gram" and decision.config.num_splits in (8, 16, 32)
        fastest = min((config for config in measured if config.schedule == "fused"), key=Cache().milliseconds)
        streaming = decision.streaming
        assert (streaming.config, streaming.median_ms) == (fastest, Cache().milliseconds(fastest))
        assert streaming.iterations == 12.5

    def test_a_neighbours_number_of_splits_comes_as_near_as_the_space_has_it(self):
        winner = replace(Cache().default_config(SPEC, None), num_splits=300, block_d=32)
        _, records = self.search(Cache(), 3, [winner])
        assert [record.config for record in records[:2]] == [
            Cache().default_config(SPEC, None), replace(winner, num_splits=128),
        ]  # fmt: skip


class TestCommand:
    @pytest.fixture(autouse=True)
    def own_places(self, clean, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")

    @pytest.fixture
    def cache(self, monkeypatch):
        fake = Cache()
        monkeypatch.setattr(backends, "get", lambda name: fake)
        monkeypatch.setattr(evaluate, "timer_for", lambda device, info: LandscapeTimer(fake))
        return fake

    def run(self, *args):
        return tune.main("--phase decode --head-dim 8 --seqlen 32 --trials 2".split() + list(args))

    def test_an_entry_of_the_eager_backend_is_written_found_and_used(self, tmp_path):
        assert self.run("--batch-heads", "4", "--group", "2", "--trials", "3") == tune.EXIT_OK
        (entry,) = read(tmp_path / "cpu.yaml").entries
        assert entry.key.group == 2 and entry.config.schedule == "gram" and entry.result["error_limit"] == 1e-5
        q, cache = torch.randn(2, 2, 1, 8), torch.randn(2, 1, 32, 8)
        clear_cache()
        assert (plan(q, cache, cache, phase="decode").source, entry.valid["seqlen"]) == (Source.EXACT, (24, 95))
        out = lla_decode(q, cache, cache, 0.1)
        assert [call.plan.config for call in dispatch._calls.values()] == [entry.config]
        reference = lla_reference(q, cache, cache, 0.1)
        assert (out - reference).norm() <= 1e-5 * reference.norm()

    def test_groups_are_keys_of_their_own(self, tmp_path, cache, capsys):
        assert self.run("--batch-heads", "4", "16", "--group", "1", "8") == tune.EXIT_OK
        entries = read(tmp_path / "cpu.yaml").entries
        assert [(e.key.group, e.tuned) for e in entries] == [
            (1, Bucket(32, 4)), (1, Bucket(32, 16)), (8, Bucket(32, 16)),
        ]  # fmt: skip
        assert entries[0].valid == {"seqlen": (24, 95), "batch_heads": (3, 11)}
        assert store.schema_problems(read(tmp_path / "cpu.yaml").to_dict()) == []
        captured = capsys.readouterr()
        assert captured.err == "left out: --batch-heads 4 is no multiple of --group 8\n"
        assert "[3/3] lla decode float32 D8 Dv8 accurate causal group 8, N 32, B*H 16" in captured.out
        assert "splits, block_d" in captured.out and "3 of 3 written" in captured.out

    @pytest.mark.parametrize(
        "args, message",
        (
            ("--batch-heads 4 --group 8", "--batch-heads 4 is no multiple of --group 8"),
            ("--phase forward --group 8", "--group is for --phase decode"),
            ("--no-causal", "decoding is causal"),
        ),
    )
    def test_what_cannot_be_decoded_is_refused(self, cache, capsys, args, message):
        assert self.run(*args.split()) == tune.EXIT_USAGE
        assert message in capsys.readouterr().err and not cache.calls

    def test_the_default_grid_is_that_of_the_phase(self, cache, tmp_path):
        assert tune.main(["--quick", "--phase", "forward", "decode", "--trials", "1"]) == tune.EXIT_FAILED
        # The fake has no forward phase.
        (entry,) = read(tmp_path / "cpu.yaml").entries
        assert (entry.key.phase, entry.key.group) == ("decode", 1)

    def test_neighbours_are_those_of_the_nearest_group(self):
        keys = [replace(KEY, phase="decode", group=group) for group in (1, 2, 8)]
        entries = [make_entry(key=key, num_splits=key.group) for key in keys]
        record(problem().device, [make_entry(), *entries])
        spec = LLASpec.decoding("bfloat16", 128, 4096, 32, group_size=8)
        assert [config.num_splits for config in neighbours(problem(spec))] == [8, 1, 2]
