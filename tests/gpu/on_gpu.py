"""Problems on the GPU and the backends on them, in the few kernel variants that the tests share."""

from __future__ import annotations

import pytest
import torch
from decode_problems import DecodeProblem, decode, decode_plan, make_decode_problem
from parallax_problems import ParallaxProblem, make_parallax_problem
from problems import Problem, make_packed_problem, make_plan, make_problem, run_backward, run_info

from lla_compile import backends
from lla_compile.devices import identify
from lla_compile.spec import LLASpec


def gpu_problem(**fields) -> Problem:
    """Defaults are chosen so that most tests share one compiled kernel: bfloat16, D 64, causal."""
    return make_problem(**dict(dtype=torch.bfloat16, head_dim=64, device="cuda") | fields)


def gpu_packed(lengths_q, lengths_k=None, **fields) -> Problem:
    return make_packed_problem(lengths_q, lengths_k, **dict(dtype=torch.bfloat16, head_dim=64, device="cuda") | fields)


def forward_info(backend: str, p: Problem, precision: str = "accurate", **knobs):
    """Output, iterations and residual; a test of what the backend does not take is skipped with its reason."""
    skip_unless_taken(backend, p, precision, **knobs)
    return run_info(p, backend, precision, device=identify("cuda"), **knobs)


def forward(backend: str, p: Problem, precision: str = "accurate", **knobs) -> torch.Tensor:
    return forward_info(backend, p, precision, **knobs)[0]


def bound(backend: str, p: Problem, precision: str = "accurate", **knobs):
    """A function without arguments that launches the kernels on the problem as it then is, asking for no info."""
    skip_unless_taken(backend, p, precision, **knobs)
    executable = backends.get(backend).bind(make_plan(p, backend, precision, identify("cuda"), **knobs))
    return lambda: executable(p.inputs(), ("out",))["out"]


def skip_unless_supported(backend: str, spec: LLASpec) -> None:
    """A test of what the backend does not take is skipped with its reason."""
    if reason := backends.get(backend).unsupported(spec, identify("cuda")):
        pytest.skip(f"{backend}: {reason}")


def skip_unless_taken(backend: str, p: Problem, precision: str, scale=None, **knobs) -> None:
    device = identify("cuda")
    skip_unless_supported(backend, p.spec(precision))
    made = make_plan(p, backend, precision, device, **knobs)
    if reason := backends.get(backend).infeasible(made.spec, made.config, device):
        pytest.skip(f"{backend}: {reason}")


def gradients(p: Problem, grad_out: torch.Tensor, precision: str = "accurate", **knobs) -> dict[str, torch.Tensor]:
    """All five gradients by name."""
    return run_backward(p, grad_out, "triton", precision, device=identify("cuda"), **knobs)


def gpu_parallax_problem(**fields) -> ParallaxProblem:
    return make_parallax_problem(**dict(dtype=torch.bfloat16, device="cuda") | fields)


def gpu_decode_problem(**fields) -> DecodeProblem:
    return make_decode_problem(**dict(dtype=torch.bfloat16, head_dim=64, device="cuda") | fields)


def gpu_decode(backend: str, p: DecodeProblem, precision: str = "accurate", **knobs) -> torch.Tensor:
    return decode(p, backend, precision, device=identify("cuda"), **knobs)


def bound_decode(backend: str, p: DecodeProblem, precision: str = "accurate", **knobs):
    """The executable of a decoding problem."""
    return backends.get(backend).bind(decode_plan(p, backend, precision, identify("cuda"), **knobs))


def poison_free_memory() -> None:
    """Fill what the caching allocator will hand out next, small blocks and large, with NaN."""
    sizes = [size for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24) for _ in range(8)]
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks


def need_free_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} are free")
