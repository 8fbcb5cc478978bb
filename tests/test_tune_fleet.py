"""Several processes, GPUs and hosts share one search: no configuration twice, and a killed process loses one trial."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import fleet_worker
import optuna
import pytest
import torch
from fleet_worker import evaluations, open_study
from postgres import postgres
from tune_landscape import SPEC, Landscape, problem

from lla_compile import tune
from lla_compile.devices import identify, resolve
from lla_compile.tuner import workers
from lla_compile.tuner.outcome import Kind, Outcome
from lla_compile.tuner.search import evaluated, failures
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import TuningStudy, quiet_optuna
from lla_compile.tuning_db import read, store

TRIALS = 24


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """The user's overlay and state are left alone."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    store.clear_cache()
    with quiet_optuna():
        yield
    store.clear_cache()


@pytest.fixture(params=("journal", "sqlite", "postgresql"))
def url(request, tmp_path):
    if request.param == "postgresql":
        with postgres() as server:
            yield server
    else:
        urls = {"journal": f"journal://{tmp_path}/studies.log", "sqlite": f"sqlite:///{tmp_path}/s.sqlite3"}
        yield urls[request.param]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def trials_of(database):
    """All trials in a storage."""
    names = optuna.get_all_study_names(database)
    return [t for name in names for t in optuna.load_study(study_name=name, storage=database, sampler=None).trials]


def test_processes_share_a_search_and_one_of_them_is_killed(url, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    barrier, gone = context.Barrier(3), tmp_path / "gone"
    # The others leave some of the budget until the first one is gone, however slow it is.
    processes = [
        context.Process(target=fleet_worker.work, args=(url, log, TRIALS, barrier, gone, 3)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    victim = processes[0].pid
    try:
        wait_for(lambda: sum(pid == victim for pid, _ in evaluations(log)) == 4)
        processes[0].kill()
        gone.touch()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [-9, 0, 0]
    finally:
        for process in processes:
            process.kill()
    lost = [config for pid, config in evaluations(log) if pid == victim][-1]
    times = Counter(config for _, config in evaluations(log))
    assert times.pop(lost) == 2 and set(times.values()) == {1}
    assert len(times) + 1 in range(TRIALS, TRIALS + 3)  # each process may have taken the last one
    assert {pid for pid, config in evaluations(log) if config == lost} - {victim} < {p.pid for p in processes}
    study = open_study(url, Landscape())
    assert evaluated(study.records()) == len({r.config for r in study.records()}) == len(times) + 1
    assert "RUNNING" not in {trial.state.name for trial in trials_of(open_storage(url))}


def test_a_queued_trial_is_taken_once(url):
    queued, takers = 60, 3
    study = optuna.create_study(study_name="queue", storage=open_storage(url))
    for number in range(queued):
        study.enqueue_trial({"number": number})
    taken = []

    def take():
        own = optuna.load_study(study_name="queue", storage=open_storage(url))
        taken.extend(own.ask().number for _ in range(queued // takers))

    threads = [threading.Thread(target=take) for _ in range(takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(queued))


class TestClaims:
    """Two processes, played by one."""

    @pytest.fixture
    def studies(self, monkeypatch):
        storage = optuna.storages.InMemoryStorage()
        space = SearchSpace.joint(SPEC, problem().device, {"eager": Landscape()})
        self.current = None

        class Played(TuningStudy):
            """Says that it is another process whenever it is used."""

            def __getattribute__(played, name):
                monkeypatch.setattr(workers, "_this_process", lambda: object.__getattribute__(played, "process"))
                return super().__getattribute__(name)

        made = []
        for process in (("here", os.getpid()), ("there", 1)):
            study = object.__new__(Played)
            object.__setattr__(study, "process", process)
            study.__init__(storage, "study", space, 0)
            made.append(study)
        return made

    def test_what_another_is_at_is_not_claimed(self, studies):
        first, second = studies
        config = Landscape().default_config(SPEC, None)
        first.enqueue([config, config])
        mine, same = first.ask(), second.ask()
        assert mine.config == same.config == config
        assert first.claim(mine) and not second.claim(same)
        second.abandon(same)
        assert second.elsewhere() == [config] and first.elsewhere() == []
        assert first.tell(mine, Outcome(Kind.OK, "", 1.0, 0.0, 0.0, 1.0)) is not None
        second.enqueue([config])
        assert not second.claim(second.ask())  # nor is what has been evaluated

    def test_the_later_trial_keeps_what_it_held_first(self, studies):
        first, second = studies
        config = Landscape().default_config(SPEC, None)
        first.enqueue([config, config])
        early, late = first.ask(), second.ask()
        assert early.trial.number < late.trial.number
        assert second.claim(late) and not first.claim(early)

    def test_silence_is_death_after_a_while_and_what_is_told_then_is_ignored(self, studies, monkeypatch):
        first, second = studies
        now = [100.0]
        monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
        config = Landscape().default_config(SPEC, None)
        first.enqueue([config])
        with second.present():
            proposal = second.ask()
            assert second.claim(proposal)
            second.start(proposal)
            for _ in range(4):
                now[0] += 0.6 * workers._GRACE_S
                second._study.set_user_attr(workers._beat_key(second.process), int(now[0]))
                assert first.fail_lost() == 0
        assert first.fail_lost() == 0
        now[0] += 1.1 * workers._GRACE_S
        assert first.fail_lost() == 1 and first.elsewhere() == []
        assert second.tell(proposal, Outcome(Kind.OK, "", 1.0, 0.0, 0.0, 1.0)) is None
        retry = first.ask()
        assert retry.config == config and first.claim(retry)

    def test_a_configuration_that_kills_two_processes_is_not_tried_a_third_time(self, studies):
        first, second = studies
        config = Landscape().default_config(SPEC, None)
        first.enqueue([config])
        for _ in range(2):
            assert first.records() == []
            proposal = second.ask()
            assert proposal.config == config and second.claim(proposal)
            second.start(proposal)
            proposal.trial.set_user_attr("owner", ["here", 2**22 + 1])  # a process of this host that is no more
            assert first.fail_lost() == 1
        (record,) = first.records()
        assert record.config == config and failures([record])["runtime"] == 1
        assert "2 processes died" in record.outcome.message and not record.free

    def test_what_only_waited_for_its_turn_is_not_to_blame(self, studies):
        first, second = studies
        config = Landscape().default_config(SPEC, None)
        first.enqueue([config])
        for _ in range(3):
            proposal = second.ask()
            assert proposal.config == config and second.claim(proposal)
            proposal.trial.set_user_attr("owner", ["here", 2**22 + 1])
            assert first.fail_lost() == 1
        assert first.records() == []


class TestDevices:
    @pytest.fixture
    def gpus(self, monkeypatch):
        products = [resolve("h200"), resolve("l4"), resolve("h200")]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(products))

        def identify_fake(device):
            if device.type == "cpu":
                return resolve("cpu")
            if device.index >= len(products):
                raise ValueError(f"device {device}: PyTorch sees 3 CUDA device(s), cuda:0 to cuda:2")
            return products[device.index]

        monkeypatch.setattr(tune, "identify", identify_fake)

    @pytest.mark.parametrize(
        "gpu, which, indices",
        [
            ("auto", "all", (0, 2)),
            ("auto", None, (0,)),
            ("l4", "all", (1,)),
            ("auto", "2,0", (2, 0)),
            ("l4", "1", (1,)),
        ],
    )
    def test_which_devices(self, gpus, gpu, which, indices):
        _, devices = tune.find_devices(gpu, which)
        assert devices == [torch.device("cuda", i) for i in indices]

    @pytest.mark.parametrize(
        "gpu, which, message",
        [
            ("auto", "0,1", "cuda:1 is nvidia-l4, not nvidia-h200"),
            ("l4", "0", "cuda:0 is nvidia-h200, not nvidia-l4"),
            ("auto", "0,7", "PyTorch sees 3"),
            ("auto", "0,0", "twice"),
            ("auto", "first", "must be all or indices such as 0,1, got 'first'"),
            ("cpu", "all", "--devices is for GPUs"),
        ],
    )
    def test_devices_that_cannot_share_a_search(self, gpus, gpu, which, message):
        with pytest.raises(ValueError, match=message):
            tune.find_devices(gpu, which)

    def test_two_devices_search_and_one_process_decides(self, tmp_path, monkeypatch, capfd):
        cpu = torch.device("cpu")
        monkeypatch.setattr(tune, "find_devices", lambda gpu, which: (identify("cpu"), [cpu, cpu]))
        arguments = "--head-dim 8 --seqlen 32 --batch-heads 1 --trials 10 --devices all".split()
        url, trials = f"sqlite:///{tmp_path}/s.sqlite3", tmp_path / "trials.jsonl"
        arguments += ["--storage", url, "--trials-out", str(trials), "--out", str(tmp_path / "cpu.yaml")]
        assert tune.main(arguments) == tune.EXIT_OK
        (entry,) = read(Path(tmp_path / "cpu.yaml")).entries
        assert entry.search["trials"] in (10, 11)  # each may have taken the last one
        evaluated_here = [t for t in trials_of(open_storage(url)) if t.user_attrs.get("free") is False]
        assert len(trials.read_text().splitlines()) == len(evaluated_here)
        owners = {tuple(trial.user_attrs["owner"]) for trial in evaluated_here}
        assert len(owners) == 2 and not any(pid == os.getpid() for _, pid in owners)
        out = capfd.readouterr().out
        assert "on 2 devices: cpu, cpu" in out and "resumed after 1" in out and "1 of 1 written" in out

    def test_an_interrupted_fleet_leaves_nothing_running(self, tmp_path, monkeypatch, capfd):
        cpu = torch.device("cpu")
        monkeypatch.setattr(tune, "find_devices", lambda gpu, which: (identify("cpu"), [cpu, cpu]))
        url = f"sqlite:///{tmp_path}/s.sqlite3"
        database = open_storage(url)
        arguments = "--head-dim 8 --seqlen 32 --batch-heads 1 --trials 400 --devices all".split()

        def finished() -> int:
            return sum(trial.state.is_finished() for trial in trials_of(database))

        def interrupt():
            wait_for(lambda: finished() >= 3)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        code = tune.main([*arguments, "--storage", url, "--out", str(tmp_path / "cpu.yaml")])
        thread.join()
        assert code == tune.EXIT_INTERRUPTED and not (tmp_path / "cpu.yaml").exists()
        assert "RUNNING" not in {trial.state.name for trial in trials_of(database)} and finished() < 400
        captured = capfd.readouterr()
        assert "--resume goes on" in captured.out and "Traceback" not in captured.err
