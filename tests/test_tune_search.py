"""The search: who wins, what is recorded, what is never run twice."""

import os
import signal
import time
from dataclasses import replace

import optuna
import pytest
from tune_landscape import BEST, BLOCKS, PRESET, SPEC, Landscape, evaluator, milliseconds, problem

from lla_compile.backends import CompileError
from lla_compile.plans import KernelConfig
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import DeviceLost, Kind, Outcome
from lla_compile.tuner.search import Budget, Search, evaluated, failures, ranked
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.study import TuningStudy, quiet_optuna, study_name
from lla_compile.tuner.timing import Timing


@pytest.fixture(autouse=True)
def quiet():
    with quiet_optuna():
        yield


@pytest.fixture
def storage():
    return optuna.storages.InMemoryStorage()


def make_search(storage, *landscapes, trials=40, seed=0, name="study", seconds=60.0, evaluate=None, **options):
    space = SearchSpace.joint(SPEC, problem().device, {x.name: x for x in landscapes})
    budget = Budget(trials, time.monotonic() + seconds, finalists=3)
    study = TuningStudy(storage, name, space, seed)
    return Search(study, space, evaluate or evaluator(*landscapes), budget, **options)


@pytest.mark.parametrize("seed", (0, 1))
def test_it_finds_the_fastest_correct_plan(storage, seed):
    landscape = Landscape()
    search = make_search(storage, landscape, trials=60, seed=seed)
    decision = search.run()
    assert milliseconds(decision.config) <= 1.5 * milliseconds(BEST)
    assert decision.outcome.error <= decision.outcome.error_limit
    assert decision.outcome.median_ms == pytest.approx(milliseconds(decision.config))
    assert decision.default_ms == pytest.approx(milliseconds(landscape.default_config(SPEC, None)))
    assert evaluated(search.records) == decision.trials == 60


def test_a_wrong_plan_never_wins_however_fast(storage):
    def correct(config):
        return config == Landscape().default_config(SPEC, None)

    search = make_search(storage, Landscape(correct=correct), trials=25)
    decision = search.run()
    assert correct(decision.config)
    wrong = [r.outcome for r in search.records if r.outcome.kind is Kind.WRONG and not r.free]
    assert len(wrong) == 24 and all(o.violation > 0 and "limit" in o.message for o in wrong)


def test_nothing_correct_is_no_winner(storage):
    assert make_search(storage, Landscape(correct=lambda config: False), trials=5).run() is None


def test_the_seed_fixes_the_sequence():
    def sequence(seed, lookahead=1):
        search = make_search(optuna.storages.InMemoryStorage(), Landscape(), trials=25, seed=seed, lookahead=lookahead)
        search.run()
        return [r.config for r in search.records]

    assert sequence(0) == sequence(0) != sequence(1)
    assert sequence(0, lookahead=4) == sequence(0, lookahead=4)


def test_every_kind_of_failure_is_an_outcome(storage):
    class OutOfResources(Exception):
        """Named like Triton's."""

    default = Landscape().default_config(SPEC, None)
    plans = [replace(default, block_q=q, block_k=k) for q, k in ((16, 16), (16, 32), (16, 64), (32, 16), (256, 256))]
    nested = RuntimeError("launch failed")
    nested.__cause__ = OutOfResources("shared memory")
    raised = [CompileError("no such\ninstruction"), nested, RuntimeError("boom"), TimeoutError("took too long")]
    landscape = Landscape(failures=dict(zip(plans, raised)), limit=256 * 128)
    search = make_search(storage, landscape, trials=6)
    search.run(enqueue=plans)
    found = {r.config: (r.outcome.kind, r.outcome.message, r.free) for r in search.records}
    assert found[plans[0]] == (Kind.COMPILE, "CompileError: no such instruction", False)
    assert found[plans[1]][0] is Kind.RESOURCES
    assert found[plans[2]] == (Kind.RUNTIME, "RuntimeError: boom", False)
    assert found[plans[3]][0] is Kind.TIMEOUT
    assert found[plans[4]] == (Kind.RESOURCES, "a tile of 65536 elements, allowed are 32768", True)
    assert landscape.checks[plans[4]] == 0
    counts = failures(search.records)
    assert (counts["compile"], counts["runtime"], counts["timeout"], counts["resources"]) == (1, 1, 1, 2)


def test_an_output_that_is_not_finite_is_wrong():
    landscape = Landscape()
    config = landscape.default_config(SPEC, None)
    run = evaluator(landscape)
    bound = landscape.bind

    def bind_nan(plan):
        executable = bound(plan)
        return lambda *args: {name: x * float("nan") for name, x in executable(*args).items()}

    landscape.bind = bind_nan
    outcome = run(config)
    assert outcome.kind is Kind.WRONG and "not finite" in outcome.message and outcome.violation > 0


def test_a_launch_that_takes_too_long_is_a_timeout():
    landscape = Landscape(time=lambda config: time.sleep(0.02) or 1.0)
    outcome = evaluator(landscape, preset=replace(PRESET, run_timeout_s=0.01))(landscape.default_config(SPEC, None))
    assert outcome.kind is Kind.TIMEOUT


def test_no_plan_is_evaluated_twice(storage):
    landscape = Landscape()
    search = make_search(storage, landscape, trials=60)
    search.run()
    assert max(landscape.checks.values()) == len(PRESET.error_ridges)
    paid = [r.config for r in search.records if not r.free]
    assert len(paid) == len(set(paid)) == 60


def test_a_small_space_is_searched_to_its_end(storage):
    landscape = Landscape(limit=16 * 32)
    search = make_search(storage, landscape, trials=1000, lookahead=4)
    default = KernelConfig("eager", "fused", 16, 16, 32)
    landscape.default_config = lambda spec, device: default
    search.run()
    assert evaluated(search.records) == 3 * 2 * 4  # tiles 16x16, 16x32, 32x16; schedules; iterations
    assert ranked(search.records)[0].config.cg_max_iters == 32


def test_the_default_comes_first_and_neighbours_next(storage):
    landscape = Landscape()
    foreign = replace(BEST, block_q=48)
    search = make_search(storage, landscape, trials=4)
    search.run(enqueue=[foreign, BEST])
    assert [r.config for r in search.records][:2] == [landscape.default_config(SPEC, None), BEST]
    assert foreign not in {r.config for r in search.records}


def test_the_default_stands_if_the_last_comparison_favours_it(storage):
    class Moody:
        """Fast in the search, slow in the comparison: a plan that was measured by luck."""

        def __init__(self):
            self.landscape = Landscape()
            self.inner = evaluator(self.landscape)
            self.default = self.landscape.default_config(SPEC, None)

        def __call__(self, config):
            return self.inner(config)

        def verify(self, config):
            return None

        def retime(self, configs):
            return [Timing(1.0 if config == self.default else 2.0, 0.0) for config in configs]

    moody = Moody()
    decision = make_search(storage, moody.landscape, trials=10, evaluate=moody).run()
    assert decision.config == moody.default
    assert decision.outcome.median_ms == decision.default_ms == 1.0


def test_the_default_is_evaluated_even_without_time(storage):
    search = make_search(storage, Landscape(), seconds=-1.0)
    assert search.run().config == Landscape().default_config(SPEC, None)
    assert evaluated(search.records) == 1


def test_resuming_a_finished_search_runs_nothing_and_ends_the_same(storage):
    first = make_search(storage, Landscape(), trials=20).run()
    landscape = Landscape(time=lambda config: 1.0)
    assert make_search(storage, landscape, trials=20).run() == first
    assert not landscape.launches and not landscape.checks


def test_resuming_an_exhausted_search_ends_the_same(storage):
    landscape = Landscape(limit=32 * 16, correct=lambda config: True)
    landscape.default_config = lambda spec, device: KernelConfig("eager", "fused", 16, 16, 32)
    first = make_search(storage, landscape, trials=100).run()
    landscape.launches.clear()
    assert make_search(storage, landscape, trials=100).run() == first
    assert not landscape.launches


def test_more_trials_continue_a_finished_search(storage):
    first = make_search(storage, Landscape(), trials=5)
    first.run()
    known = {r.config for r in first.records}
    landscape = Landscape()
    assert make_search(storage, landscape, trials=12).run().trials == 12
    assert len(landscape.launches.keys() - known) == 7
    assert not any(landscape.checks[config] for config in known)


@pytest.mark.parametrize("lookahead", (1, 4))
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(storage, lookahead):
    landscape = Landscape()
    run = evaluator(landscape)

    class Interrupted:
        calls = 0
        retime, verify = run.retime, run.verify

        def __call__(self, config):
            self.calls += 1
            if self.calls == 8:
                raise KeyboardInterrupt
            return run(config)

    with pytest.raises(KeyboardInterrupt):
        make_search(storage, landscape, trials=20, evaluate=Interrupted(), lookahead=lookahead).run()
    states = [t.state.name for t in storage.get_all_trials(0)]
    assert states.count("COMPLETE") + states.count("PRUNED") >= 7
    assert "RUNNING" not in states and states.count("FAIL") >= lookahead
    assert make_search(storage, landscape, trials=20, lookahead=lookahead).run().trials == 20
    assert len(landscape.launches) == 20 and max(landscape.checks.values()) == len(PRESET.error_ridges)


def test_a_signal_waits_until_nothing_is_half_recorded():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        for safe_point in (interruption.check, interruption.prompt().__enter__):
            with pytest.raises(KeyboardInterrupt):
                safe_point()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # the second one does not wait
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt), interruption.prompt():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("a prompt section went on")
    Interruption().check()


def test_a_signal_that_a_finalizer_swallows_still_ends_the_search(storage):
    landscape = Landscape()
    run = evaluator(landscape)

    class Swallowing:
        retime, verify = run.retime, run.verify

        def __call__(self, config):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                return run(config)

    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        make_search(storage, landscape, trials=5, evaluate=Swallowing(), interruption=interruption).run()
    assert [t.state.name for t in storage.get_all_trials(0) if t.state.name != "WAITING"] == ["FAIL"]


def test_what_a_killed_process_left_running_is_failed(storage):
    search = make_search(storage, Landscape(), trials=3)
    study = search._study
    ours, theirs, foreign = study.ask(), study.ask(), study.ask()
    theirs.trial.set_user_attr("owner", [*theirs.trial.user_attrs["owner"][:1], 2**22 + 1])
    foreign.trial.set_user_attr("owner", ["another-host", 1])
    assert study.fail_stale() == 2
    running = [t.number for t in storage.get_all_trials(0) if t.state.name == "RUNNING"]
    assert running == [foreign.trial.number] and ours.trial.number == 0


def test_a_lost_device_ends_the_search_and_the_culprit_is_not_tried_again(storage):
    landscape = Landscape()
    run = evaluator(landscape)

    class Losing:
        tried = []
        retime, verify = run.retime, run.verify

        def __call__(self, config):
            self.tried.append(config)
            if len(self.tried) == 3:
                raise DeviceLost("illegal memory access")
            return run(config)

    losing = Losing()
    with pytest.raises(DeviceLost):
        make_search(storage, landscape, trials=8, evaluate=losing).run()
    search = make_search(storage, landscape, trials=8)
    search.run()
    culprit = next(r for r in search.records if r.config == losing.tried[2])
    assert culprit.outcome == Outcome(Kind.RUNTIME, "illegal memory access")
    assert landscape.checks[losing.tried[2]] == 0


def test_compilation_runs_ahead_and_its_failures_are_outcomes(storage):
    class Compiler:
        submitted, waited = [], []

        def submit(self, config):
            self.submitted.append(config)

        def result(self, config):
            self.waited.append((config, len(self.submitted)))
            return Outcome(Kind.TIMEOUT, "compiling took over 1 s") if config.block_q == 256 else None

    landscape, compiler = Landscape(), Compiler()
    search = make_search(storage, landscape, trials=30, compiler=compiler, lookahead=4)
    search.run()
    assert compiler.submitted == [config for config, _ in compiler.waited]
    ahead = [submitted - place for place, (_, submitted) in enumerate(compiler.waited)]
    assert ahead == [4] * 27 + [3, 2, 1]
    stuck = [r for r in search.records if r.config.block_q == 256]
    assert stuck and {r.outcome.kind for r in stuck} == {Kind.TIMEOUT}
    assert not any(landscape.launches[r.config] for r in stuck)


def test_several_backends_are_searched_jointly(storage):
    slow = Landscape("slow", time=lambda config: 10 * milliseconds(config))
    fast = Landscape("fast", extra_knobs={"num_warps": (4, 8), "num_stages": (1, 2)})
    search = make_search(storage, slow, fast, trials=40)
    decision = search.run()
    assert decision.config.backend == "fast" and decision.config.num_warps in (4, 8)
    assert {r.config.backend for r in search.records} == {"slow", "fast"}
    for trial in storage.get_all_trials(0):
        backend = trial.params["backend"]
        assert all(name == "backend" or name.startswith(f"{backend}.") for name in trial.params)
        assert ("fast.num_warps" in trial.params) == (backend == "fast")


def test_a_large_sparse_space_is_neither_enumerated_nor_clogged_with_infeasible_proposals(storage):
    """Four more knobs, as the sweep that holds keys brings: 20 000 points, a fifth of which fits."""
    kv = {"kv_block_q": BLOCKS, "kv_block_k": BLOCKS, "kv_num_warps": (1, 2, 4, 8)}

    class Sparse(Landscape):
        looked_at = 0

        def infeasible(self, spec, config, device):
            self.looked_at += 1
            too_wide = config.kv_block_q * config.kv_block_k > 16 * 64 * config.kv_num_warps
            return "no room for the second tile" if too_wide else super().infeasible(spec, config, device)

    landscape = Sparse(limit=32 * 64, extra_knobs=kv)
    space = SearchSpace.joint(SPEC, problem().device, {"eager": landscape})
    points = sum(1 for config in space.shuffled(0))
    assert landscape.looked_at == 2 * 4 * 25 * 4 * 25 and points == 0.2 * landscape.looked_at
    landscape.looked_at = 0
    search = make_search(storage, landscape, trials=40, lookahead=4)
    search.run()
    assert evaluated(search.records) == 40
    assert sum(record.free for record in search.records) < 40
    assert landscape.looked_at < 3000


def test_a_new_run_never_touches_an_old_study(storage):
    assert study_name(storage, "key", resume=True) == "key/run1"
    optuna.create_study(storage=storage, study_name="key/run1")
    assert study_name(storage, "key", resume=False) == "key/run2"
    assert study_name(storage, "key", resume=True) == "key/run1"
