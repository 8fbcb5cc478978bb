"""Tuning the backward pass: what it is given, what every gradient is held to, and that the entry is used."""

import math
from dataclasses import replace

import optuna
import pytest
import torch
from tune_landscape import PRESET, problem
from tuned import KEY, make_entry

from lla_compile import backends, clear_cache, dispatch, lla_attention, plan, tune
from lla_compile.autograd import GRADIENTS
from lla_compile.lowering import SAVED
from lla_compile.plans import Plan, Source
from lla_compile.precision import error_limit
from lla_compile.reference import lla_reference_backward
from lla_compile.spec import LLASpec
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.held_out import held_out
from lla_compile.tuner.outcome import Kind
from lla_compile.tuner.problem import Case
from lla_compile.tuner.search import Budget, Search, failures
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.study import TuningStudy, quiet_optuna
from lla_compile.tuner.timing import Timing
from lla_compile.tuner.writer import neighbours
from lla_compile.tuning_db import read, record, store

EAGER = backends.get("eager")
SPEC = LLASpec.self_attention("float32", 8, 32, 1, head_dim_v=12, phase="backward")
CPU = torch.device("cpu")
ORDINARY = ("dq", "dk", "dv", "dridge")


class Perturbed:
    """The eager backend with one gradient off by a tenth of its size where ``affects`` holds for the configuration."""

    def __init__(self, name=None, affects=lambda config: True):
        self.name, self._gradient, self._affects = "eager", name, affects
        self.asked = []

    def __getattr__(self, attribute):
        return getattr(EAGER, attribute)

    def bind(self, plan):
        executable = EAGER.bind(plan)

        def perturbed(inputs, wanted):
            self.asked.append((plan.spec.phase, plan.spec.seqlen_q, wanted))
            outputs = dict(executable(inputs, wanted))
            if self._gradient in outputs and self._affects(plan.config):
                outputs[self._gradient] += 0.1 * outputs[self._gradient].abs()
            return outputs

        return perturbed


def default_of(spec):
    return EAGER.default_config(spec, problem().device)


def bind_forward(spec):
    return EAGER.bind(Plan(spec, problem().device, default_of(spec), Source.REQUESTED, 0.0, "a test"))


def evaluator(backend):
    return Evaluator(problem(SPEC), {"eager": backend}, PRESET)


def run(*args):
    return tune.main("--head-dim 8 --seqlen 32 --batch-heads 1 --trials 2".split() + list(args))


class TestInputs:
    def test_the_forward_pass_runs_once_for_each_ridge_with_the_tolerance_of_its_phase(self):
        bound = []
        spec = replace(SPEC, dtype="bfloat16", cg_tol=None)
        case = Case(spec, CPU, "timed", lambda spec: bound.append(spec) or bind_forward(spec))
        inputs, again, other = case.inputs(1.0), case.inputs(1.0), case.inputs(0.1)
        assert inputs.keys() == {"q", "k", "v", "grad_out", "ridge", "scale", *SAVED}
        assert bound == [LLASpec.self_attention("bfloat16", 8, 32, 1, head_dim_v=12)] * 2
        assert bound[0].cg_tol > spec.cg_tol
        assert inputs["grad_out"].shape == (1, 1, 32, 12) and inputs["grad_out"].dtype == torch.bfloat16
        assert again["probe_norm"] is inputs["probe_norm"] and other["q"] is inputs["q"]
        assert not torch.equal(other["probe_norm"], inputs["probe_norm"])

    def test_held_out_inputs_are_as_for_the_forward_pass_and_complete(self):
        cases = held_out(problem(SPEC), bind_forward, 1024, 4)
        assert [case.spec.seqlen_q for case in cases] == [32, 17]
        for case in cases:
            assert case.checked == GRADIENTS and case.ordinary == ORDINARY
            assert case.limit(0.1) == error_limit("float32", "accurate", 0.1, "backward")
            assert case.inputs(1.0)["grad_out"].abs().sum() > 0


class TestErrors:
    @pytest.fixture
    def case(self):
        return held_out(problem(SPEC), bind_forward, 32, 1)[1]

    @pytest.fixture
    def exact(self, case):
        """The reference's gradients; dscale as rows of either sign."""
        gradients = {name: x.clone() for name, x in case.reference(1.0).items()}
        rows = torch.randn(1, 1, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gradients["dscale"] = rows + (gradients["dscale"] - rows.sum()) / 17
        return gradients

    def test_the_reference_has_none(self, case, exact):
        inputs = case.inputs(1.0)
        named = [inputs[name] for name in ("grad_out", "q", "k", "v", "ridge")]
        for name, x in zip(GRADIENTS, lla_reference_backward(*named)):
            assert torch.equal(case.reference(1.0)[name], x)
        errors = case.errors(exact, 1.0)
        assert errors.pop("dscale") < 1e-15 and set(errors.values()) == {0.0}

    @pytest.mark.parametrize("name", ORDINARY)
    def test_each_is_relative_to_its_own_reference(self, case, exact, name):
        exact[name] = exact[name] * 1.01
        errors = case.errors(exact, 1.0)
        assert errors.pop(name) == pytest.approx(0.01) and max(errors.values()) < 1e-15
        assert case.worst(exact, 1.0) == (name, pytest.approx(0.01))

    def test_that_of_the_scale_is_relative_to_its_rows(self, case, exact):
        exact["dscale"][0, 0, 3] += 0.5
        assert case.worst(exact, 1.0) == ("dscale", pytest.approx(0.5 / exact["dscale"].norm().item()))

    @pytest.mark.parametrize("name", GRADIENTS)
    @pytest.mark.parametrize("value", (math.nan, math.inf))
    def test_one_that_is_not_finite_is_the_worst(self, case, exact, name, value):
        exact["dv"] = exact["dv"] * 100
        exact[name].view(-1)[5] = value
        worst, error = case.worst(exact, 1.0)
        assert worst == name and not math.isfinite(error)

    def test_only_what_was_asked_for_is_compared(self, case, exact):
        assert case.errors({"dv": exact["dv"]}, 1.0) == {"dv": 0.0}

    def test_gradients_that_vanish_have_absolute_errors(self):
        (case,) = held_out(problem(replace(SPEC, seqlen_q=1, seqlen_k=1)), bind_forward, 1, 1)
        zeros = {name: torch.zeros_like(x) for name, x in case.reference(1.0).items()}
        assert case.errors(zeros, 1.0) == dict.fromkeys(("dq", "dk", "dridge", "dscale"), 0.0) | {"dv": 1.0}

    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    @pytest.mark.parametrize("precision", ("accurate", "fast"))
    def test_the_eager_default_is_within_all_limits(self, dtype, precision):
        spec = LLASpec.self_attention(dtype, 16, 64, 2, phase="backward", precision=precision)
        run = Evaluator(problem(spec), {"eager": EAGER}, PRESET)
        for outcome in (run(default_of(spec)), run.verify(default_of(spec))):
            assert outcome.ok, outcome
            assert 0 < outcome.error <= outcome.error_limit


class TestTrial:
    @pytest.mark.parametrize("name", ORDINARY)
    def test_a_wrong_gradient_is_wrong_and_named(self, name):
        outcome = evaluator(Perturbed(name))(default_of(SPEC))
        assert outcome.kind is Kind.WRONG and outcome.violation > 0
        assert outcome.message.startswith(f"{name} has error 1.0e-01, the limit is 5.0e-05 (N 32, ridge 1)")
        assert outcome.error == pytest.approx(0.1, rel=1e-3)

    def test_what_an_ordinary_call_leaves_out_is_verified(self):
        run = evaluator(Perturbed("dscale"))
        assert run(default_of(SPEC)).ok
        outcome = run.verify(default_of(SPEC))
        assert outcome.kind is Kind.WRONG and outcome.message.startswith("dscale has error")

    def test_ordinary_outputs_are_timed_and_the_forward_pass_is_not(self):
        backend = Perturbed()
        run = evaluator(backend)
        assert run(default_of(SPEC)).ok
        forward = [asked for asked in backend.asked if asked[0] == "forward"]
        assert len(forward) == 1 + 4 and {wanted for _, _, wanted in forward} == {("out", *SAVED)}
        assert {wanted for phase, _, wanted in backend.asked if phase == "backward"} == {ORDINARY}
        backend.asked.clear()
        run.retime([default_of(SPEC)])
        assert {asked[:2] for asked in backend.asked} == {("backward", 32)}
        backend.asked.clear()
        assert run.verify(default_of(SPEC)).ok
        assert {asked[2] for asked in backend.asked} == {GRADIENTS} and len(backend.asked) == 4

    def test_a_forward_pass_that_fails_is_no_fault_of_the_configuration(self):
        class Failing(Perturbed):
            def bind(self, plan):
                if plan.spec.phase == "forward":
                    raise RuntimeError("no forward pass")
                return super().bind(plan)

        with pytest.raises(RuntimeError, match="no forward pass"):
            evaluator(Failing())(default_of(SPEC))


def test_a_winner_that_fails_its_verification_is_wrong_and_another_wins():
    storage = optuna.storages.InMemoryStorage()
    backend = Perturbed("dscale", affects=lambda config: config.schedule == "fused")
    run = evaluator(backend)

    class FusedIsFaster:
        verify = run.verify

        def __call__(self, config):
            outcome = run(config)
            return replace(outcome, median_ms=1.0 if config.schedule == "fused" else 2.0) if outcome.ok else outcome

        def retime(self, configs):
            return [Timing(1.0 if config.schedule == "fused" else 2.0, 0.0) for config in configs]

    with quiet_optuna():
        space = SearchSpace.joint(SPEC, problem().device, {"eager": backend})
        study = TuningStudy(storage, "study", space, 0)
        decision = Search(study, space, FusedIsFaster(), Budget(8, math.inf, finalists=2)).run()
        assert decision.config.schedule == "split" and decision.default_ms is None
        records = TuningStudy(storage, "study", space, 0).records()
    fused = [r.outcome for r in records if r.config.schedule == "fused" and not r.free]
    assert fused and {o.kind for o in fused} == {Kind.WRONG} and all("dscale" in o.message for o in fused)
    assert failures(records)["wrong"] == len(fused)


class TestCommand:
    @pytest.fixture(autouse=True)
    def own_places(self, clean, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")

    def test_an_entry_is_written_found_and_used(self, tmp_path, capsys, monkeypatch):
        assert run("--phase", "backward") == tune.EXIT_OK
        (entry,) = read(tmp_path / "cpu.yaml").entries
        assert entry.key.phase == "backward" and entry.result["error"] <= entry.result["error_limit"] == 5e-5
        out = capsys.readouterr().out
        assert "lla backward float32 D8" in out and "1 of 1 written to" in out
        clear_cache()
        q, k, v = (torch.randn(1, 1, 32, 8, requires_grad=True) for _ in "qkv")
        found = plan(q, k, v, phase="backward")
        assert (found.source, found.config) == (Source.EXACT, entry.config)
        assert plan(q, k, v).source is Source.HEURISTIC
        out = lla_attention(q, k, v)
        out.backward(torch.ones_like(out))
        used = {call.plan.spec.phase: call.plan for call in dispatch._calls.values()}
        assert used["backward"].config == entry.config and used["backward"].source is Source.EXACT
        reference = lla_reference_backward(torch.ones_like(out), q.detach(), k.detach(), v.detach())
        for x, expected in zip((q, k, v), reference):
            assert (x.grad - expected).norm() <= 5e-5 * expected.norm()

    def test_both_phases_in_one_command(self, tmp_path, capsys):
        assert run("--phase", "forward", "backward") == tune.EXIT_OK
        entries = read(tmp_path / "cpu.yaml").entries
        assert {e.key.phase: e.result["error_limit"] for e in entries} == {"forward": 1e-5, "backward": 5e-5}
        out = capsys.readouterr().out
        assert "[1/2] lla forward" in out and "[2/2] lla backward" in out and "2 of 2 written" in out

    def test_neighbours_are_of_the_same_phase(self):
        cpu = problem().device
        keys = {phase: replace(KEY, phase=phase) for phase in ("forward", "backward")}
        record(cpu, [make_entry(key=keys["forward"], block_q=16), make_entry(key=keys["backward"], kv_block_q=32)])
        assert [(c.block_q, c.kv_block_q) for c in neighbours(problem(SPEC))] == [(64, 32)]
        assert [(c.block_q, c.kv_block_q) for c in neighbours(problem())] == [(16, None)]

    def test_a_wrong_gradient_is_never_written(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(backends, "get", lambda name: Perturbed("dk"))
        assert run("--phase", "backward") == tune.EXIT_FAILED
        assert not (tmp_path / "cpu.yaml").exists()
        out = capsys.readouterr().out
        assert "wrong: dk has error 1.0e-01, the limit is 5.0e-05" in out and "no configuration is correct" in out
