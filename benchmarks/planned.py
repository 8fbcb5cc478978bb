"""Plans as launches to time: their executables, what they read, and which backends are measured at all."""

from __future__ import annotations

from typing import Mapping

from benchmarks.report import Target
from benchmarks.timing import Launch
from lla_compile import LLASpec, backends, plan
from lla_compile.backends import Executable
from lla_compile.plans import Plan
from lla_compile.tuner.problem import Case


def bind(chosen: Plan) -> Executable:
    """What runs a plan."""
    return backends.get(chosen.config.backend).bind(chosen)


def launch(executable: Executable, inputs: Mapping, outputs: tuple[str, ...]) -> Launch:
    """A call for some outputs."""
    return lambda: executable(inputs, outputs)


def case(spec: LLASpec, target: Target) -> Case:
    """The inputs of a spec, the same in every run; a backward pass follows the forward pass that is planned."""
    return Case(spec, target.device, "benchmark", lambda of: bind(plan(of, device=target.info)))


def measured_backends(spec: LLASpec, target: Target) -> list[str]:
    """The backends that take the spec; eager PyTorch counts where nothing else runs."""
    names = [name for name in backends.NAMES if (name == "eager") != target.is_cuda]
    return [name for name in names if not backends.get(name).unsupported(spec, target.info)]
