"""Compilation in killable processes."""

import os
import time
from dataclasses import replace

from tune_landscape import BEST, SPEC, problem

from lla_compile.backends import CompileError
from lla_compile.tuner.compile_pool import CompilePool, precompile
from lla_compile.tuner.outcome import Kind


def compile_by_block(specs, config, device):
    """Stands for a compiler; what happens is chosen by ``block_q``."""
    if config.block_q == 2:
        raise CompileError(f"cannot compile {len(specs)} specs for {device.id}")
    if config.block_q == 3:
        time.sleep(600)
    if config.block_q == 4:
        os._exit(7)
    if config.block_q == 5:
        raise ValueError("a compiler's own bug")


def test_a_pool_turns_every_ending_into_an_outcome():
    configs = [replace(BEST, block_q=q) for q in (3, 1, 2, 4, 5, 6, 7)]
    with CompilePool(problem().device, workers=2, timeout_s=0.5, compile_=compile_by_block) as pool:
        compiler = pool.compiler([SPEC])
        for config in configs:
            compiler.submit(config)
        found = {config.block_q: compiler.result(config) for config in configs}
        later = pool.compiler([SPEC, SPEC])  # the same workers serve the next problem
        later.submit(configs[2])
        assert "2 specs" in later.result(configs[2]).message
        processes = [worker.process for worker in pool._workers]
    assert found[1] is found[6] is found[7] is None
    assert (found[2].kind, found[2].message) == (Kind.COMPILE, "CompileError: cannot compile 1 specs for cpu")
    assert found[3].kind is Kind.TIMEOUT and "0.5 s" in found[3].message
    assert found[4].kind is Kind.COMPILE and "code 7" in found[4].message
    assert found[5].kind is Kind.COMPILE and "a compiler's own bug" in found[5].message
    assert processes and not any(process.is_alive() for process in processes)


def test_precompile_asks_the_backend_for_every_spec(monkeypatch):
    asked = []

    class Recorder:
        def precompile(self, spec, config, device):
            asked.append(spec)

    monkeypatch.setattr("lla_compile.backends.get", lambda name: Recorder())
    precompile([SPEC, replace(SPEC, batch=2)], BEST, problem().device)
    assert asked == [SPEC, replace(SPEC, batch=2)]
