"""Several GPUs of one host search together: a process for each, all of them at one study for each key."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Sequence

import torch

from lla_compile.devices import DeviceInfo
from lla_compile.spec import LLASpec
from lla_compile.tuner import trials_file
from lla_compile.tuner.compile_pool import CompilePool, worker_count
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import DeviceLost
from lla_compile.tuner.presets import Preset
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.progress import ProgressReport, make_console
from lla_compile.tuner.session import Settings, explore_key
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import quiet_optuna

# A process that was told to end has this long to fail its trials, so that others can take them at once.
_END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Task:
    """What each process needs to take part; it is sent to a new interpreter.

    Attributes:
        specs: the keys, in the order in which they are searched.
        info: what all devices are.
        preset, seed, backends: as in :class:`lla_compile.tuner.session.Settings`.
        storage: URL of the studies, None for the embedded file.
        path: the database file that neighbours are looked up for; nothing is written to it.
        trials_out: where each process appends its trials, a line at a time; None: nowhere.
    """

    specs: tuple[LLASpec, ...]
    info: DeviceInfo
    preset: Preset
    seed: int
    backends: tuple[str, ...]
    storage: str | None
    path: Path
    trials_out: Path | None


def explore(task: Task, devices: Sequence[torch.device], interruption: Interruption) -> None:
    """Search the keys of ``task`` on all devices until their budgets are spent; nothing is decided or written.

    The studies exist already; each process goes on with the last run of every key. One that dies is reported, and the
    others try its trials.

    Raises:
        KeyboardInterrupt: every process has ended, and finished trials are recorded.
    """
    # A forked child would inherit a CUDA context that it cannot use.
    context = multiprocessing.get_context("spawn")
    compilers = max(1, worker_count() // len(devices))
    processes = {
        f"{device} ({number})": context.Process(target=_work, args=(task, str(device), compilers))
        for number, device in enumerate(devices)
    }
    for process in processes.values():
        process.start()
    try:
        while running := [p.sentinel for p in processes.values() if p.is_alive()]:
            with interruption.prompt():
                wait(running)
    finally:
        _end(processes.values())
    for name, process in processes.items():
        if process.exitcode:
            print(f"the process on {name} ended with code {process.exitcode}; the others went on", file=sys.stderr)


def _end(processes) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        _join(process)


def _join(process: BaseProcess) -> None:
    process.join(_END_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()


def _work(task: Task, device_name: str, compilers: int) -> None:
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = ProgressReport(make_console(force_terminal=False), len(task.specs), label=device_name)
    watcher = trials_file.following(report, task.trials_out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_optuna())
        interruption = stack.enter_context(Interruption())
        # Ctrl-C reaches the whole process group; the parent decides when a process ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool = None
        if not task.info.is_cpu:
            pool = stack.enter_context(CompilePool(task.info, compilers, task.preset.compile_timeout_s))
        storage = open_storage(task.storage)
        settings = Settings(task.preset, task.seed, True, storage, task.path, interruption, task.backends, pool)
        try:
            for spec in task.specs:
                interruption.check()
                try:
                    explore_key(Problem(spec, task.info, device), settings, watcher)
                except DeviceLost:
                    raise
                except (ValueError, RuntimeError):
                    continue  # what makes a key impossible is said once, by the process that decides
        except KeyboardInterrupt:
            return
        except DeviceLost as error:
            sys.exit(f"{device_name}: the GPU's context is broken: {error}")
