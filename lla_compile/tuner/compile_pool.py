"""Compilation ahead of timing, in processes that can be killed when a compiler hangs.

`concurrent.futures` cannot stop one task without breaking the pool, so each worker has its own pipe here and holds
one task at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from multiprocessing.connection import Connection, wait
from typing import Callable, Sequence

from lla_compile import backends
from lla_compile.devices import DeviceInfo
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.tuner.outcome import Kind, Outcome, one_line, outcome_of

# Importing PyTorch on a loaded machine takes seconds; that is not a compiler that hangs.
_START_TIMEOUT_S = 120.0

Compile = Callable[[Sequence[LLASpec], KernelConfig, DeviceInfo], None]
Task = tuple[tuple[LLASpec, ...], KernelConfig]


def precompile(specs: Sequence[LLASpec], config: KernelConfig, device: DeviceInfo) -> None:
    """Fill the cache of the configuration's backend for each of ``specs``."""
    backend = backends.get(config.backend)
    for spec in specs:
        backend.precompile(spec, config, device)


class CompilePool:
    """Compiles in parallel, for one problem after another; see :meth:`compiler`.

    Args:
        device: the device compiled for.
        workers: processes; they start with the first task.
        timeout_s: time after which a task is given up and its worker killed.
        compile_: what a worker runs; a function that can be imported by name.
    """

    def __init__(self, device: DeviceInfo, workers: int, timeout_s: float, compile_: Compile = precompile):
        self._device = device
        self._timeout_s = timeout_s
        self._compile = compile_
        self._idle = workers
        self._workers: list[_Worker] = []
        self._queue: deque[Task] = deque()
        self._results: dict[Task, Outcome] = {}

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.kill()

    def compiler(self, specs: Sequence[LLASpec]) -> ProblemCompiler:
        """Compiles configurations for each of ``specs``; what an earlier problem left in the queue is dropped."""
        self._queue.clear()
        return ProblemCompiler(self, tuple(specs))

    def submit(self, task: Task) -> None:
        """Queue a task; it starts as soon as a worker is free."""
        self._queue.append(task)
        self._advance(0.0)

    def result(self, task: Task) -> Outcome:
        """Wait for a submitted task."""
        while task not in self._results:
            self._advance(0.1)
        return self._results.pop(task)

    def _advance(self, seconds: float) -> None:
        """Hand out tasks, collect results for up to ``seconds``, kill workers that are over their time."""
        for worker in self._workers:
            if worker.task is None and self._queue:
                worker.assign(self._queue.popleft())
        while self._queue and self._idle:
            self._idle -= 1
            worker = _Worker(self._device, self._compile)
            self._workers.append(worker)
            worker.assign(self._queue.popleft())
        ready = wait([worker.pipe for worker in self._workers], seconds)
        for worker in list(self._workers):
            if worker.pipe in ready:
                self._collect(worker)
            elif worker.task is not None and worker.seconds() > self._limit(worker):
                self._results[worker.task] = Outcome(Kind.TIMEOUT, f"compiling took over {self._limit(worker):g} s")
                self._discard(worker)

    def _collect(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            if worker.task is not None:
                reason = f"the compiler's process ended with code {worker.process.exitcode}"
                self._results[worker.task] = Outcome(Kind.COMPILE, reason)
            self._discard(worker)
            return
        if message is None:
            worker.started()
        else:
            self._results[worker.task] = message
            worker.task = None

    def _limit(self, worker: _Worker) -> float:
        return self._timeout_s if worker.running else _START_TIMEOUT_S

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._idle += 1


class ProblemCompiler:
    """A pool's service for one problem: the compiler that a search asks for."""

    def __init__(self, pool: CompilePool, specs: tuple[LLASpec, ...]):
        self._pool = pool
        self._specs = specs

    def submit(self, config: KernelConfig) -> None:
        """Start compiling ahead."""
        self._pool.submit((self._specs, config))

    def result(self, config: KernelConfig) -> Outcome | None:
        """Wait for a submitted configuration: None if it compiled, else what became of it."""
        outcome = self._pool.result((self._specs, config))
        return None if outcome.ok else outcome


class _Worker:
    """A process and the task that it holds. Its clock starts when it reports that it has begun."""

    def __init__(self, device: DeviceInfo, compile_: Compile):
        # A forked child would inherit a CUDA context that it cannot use.
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=_work, args=(remote, device, compile_), daemon=True)
        self.process.start()
        remote.close()
        self.task: Task | None = None
        self.running = False
        self._since = time.monotonic()

    def assign(self, task: Task) -> None:
        self.task, self.running, self._since = task, False, time.monotonic()
        with contextlib.suppress(OSError):  # of a worker that has died: its pipe says so when it is read
            self.pipe.send(task)

    def started(self) -> None:
        self.running, self._since = True, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._since

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, device: DeviceInfo, compile_: Compile) -> None:
    # Ctrl-C reaches the whole process group; the parent decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            specs, config = pipe.recv()
        except EOFError:
            return
        pipe.send(None)
        try:
            compile_(specs, config, device)
            outcome = Outcome(Kind.OK)
        except Exception as error:  # whatever a compiler raises is this configuration's outcome
            outcome = outcome_of(error)
            if outcome.kind is Kind.RUNTIME:
                outcome = Outcome(Kind.COMPILE, one_line(error))
        pipe.send(outcome)


def worker_count(timing: bool = True) -> int:
    """Processes to compile with: one core is left to the process that times, if one does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - timing))
