"""A backend whose times follow a formula, and a clock that only it moves: searches without a device or a compiler."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import torch

from lla_compile.devices import identify
from lla_compile.plans import KernelConfig
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.presets import PRESETS
from lla_compile.tuner.problem import Problem

SPEC = LLASpec("float32", 8, 8, batch=1, num_heads=1, num_kv_heads=1, seqlen_q=48, seqlen_k=48)
PRESET = replace(PRESETS["quick", "cpu"], error_seqlen=40, error_heads=1, repeats=(3, 3))
BLOCKS = (16, 32, 64, 128, 256)
ITERATIONS = (8, 16, 32, 64)


def milliseconds(config: KernelConfig) -> float:
    """Fastest at block_q 64, block_k 128, split, with as few iterations as possible; no two plans take equally long."""
    slope = abs(BLOCKS.index(config.block_q) - 2) + 1.1 * abs(BLOCKS.index(config.block_k) - 3)
    return (1 + slope) * (1.0 if config.schedule == "split" else 1.3) * (1 + config.cg_max_iters / 100)


def accurate(config: KernelConfig) -> bool:
    """Fewer than 32 iterations are too few."""
    return config.cg_max_iters >= 32


BEST = KernelConfig("eager", "split", 64, 128, 32)


class Landscape:
    """A backend that gives the reference's output, off by 1 % where it is not ``correct``.

    ``failures`` maps a configuration to the exception that launching it raises.
    """

    def __init__(
        self, name="eager", time=milliseconds, correct=accurate, failures=None, limit=1 << 30, extra_knobs=None
    ):
        self.name = name
        self.launches, self.checks = Counter(), Counter()
        self.now = 0.0
        self._time, self._correct, self._failures = time, correct, failures or {}
        self._limit, self._extra = limit, extra_knobs or {}

    def unsupported(self, spec, device):
        return None

    def alternatives(self, spec, device):
        return ()

    def default_config(self, spec, device):
        return KernelConfig(self.name, "fused", 32, 32, 32, **{knob: values[0] for knob, values in self._extra.items()})

    def search_space(self, spec, device):
        space = {"schedule": ("fused", "split"), "block_q": BLOCKS, "block_k": BLOCKS, "cg_max_iters": ITERATIONS}
        return space | self._extra

    def infeasible(self, spec, config, device):
        size = config.block_q * config.block_k
        return f"a tile of {size} elements, allowed are {self._limit}" if size > self._limit else None

    def source_hash(self, spec, config):
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def precompile(self, spec, config, device):
        """Nothing to compile."""

    def bind(self, plan):
        config = plan.config

        def executable(inputs, wanted):
            if config in self._failures:
                raise self._failures[config]
            q, k, v, ridge, scale = (inputs[name] for name in ("q", "k", "v", "ridge", "scale"))
            self.launches[config] += 1
            self.checks[config] += q.shape[2] % 2  # only the ragged held-out inputs have an odd length
            self.now += self._time(config)
            out = lla_reference(q, k, v, ridge, scale=scale, is_causal=plan.spec.is_causal)
            return {name: (out if self._correct(config) else out * 1.01).to(q.dtype) for name in wanted}

        return executable


class LandscapeTimer:
    """Reads the landscape's clock."""

    def __init__(self, *landscapes):
        self._landscapes = landscapes

    def once(self, launch):
        before = sum(x.now for x in self._landscapes)
        launch()
        return sum(x.now for x in self._landscapes) - before


def problem(spec=SPEC) -> Problem:
    return Problem(spec, identify("cpu"), torch.device("cpu"))


def evaluator(*landscapes, preset=PRESET) -> Evaluator:
    return Evaluator(problem(), {x.name: x for x in landscapes}, preset, LandscapeTimer(*landscapes))
