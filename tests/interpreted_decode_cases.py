"""Decoding on kernels that run on the CPU: here Triton's in its interpreter, see interpreted_cases.py.

test_cuda_emulation.py takes the same cases for the CUDA kernels, with a ``kernels`` of its own.
"""

from dataclasses import dataclass

import pytest
import torch
from decode_problems import CASES, decode, decode_info, decode_plan, make_decode_problem
from problems import CPU, assert_close

from lla_compile import backends
from lla_compile.devices import DeviceInfo
from lla_compile.lowering import INFO

LIMIT = 2e-3
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@dataclass(frozen=True)
class Kernels:
    """A backend, knobs that make its tiles small, and the device that it believes in."""

    backend: str
    knobs: dict
    device: DeviceInfo = CPU

    def decode(self, problem, **knobs):
        return decode(problem, self.backend, device=self.device, **(self.knobs | dict(num_splits=3) | knobs))

    def info(self, problem, **knobs):
        return decode_info(problem, self.backend, device=self.device, **(self.knobs | dict(num_splits=3) | knobs))

    def bind(self, problem, **knobs):
        plan = decode_plan(problem, self.backend, device=self.device, **(self.knobs | knobs))
        return backends.get(self.backend).bind(plan)


@pytest.fixture
def kernels():
    return Kernels("triton", dict(block_k=16, num_warps=1, num_stages=1))


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decode_cases(kernels, fields):
    problem = make_decode_problem(dtype=torch.float16, **fields)
    assert_close(kernels.decode(problem), problem.reference(), LIMIT)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_decode_splits(kernels, num_splits, ridge):
    problem = make_decode_problem(dtype=torch.float16, capacity=70, lengths=[70, 3, 41], ridge=ridge)
    assert_close(kernels.decode(problem, num_splits=num_splits), problem.reference(), LIMIT)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_rows_in_blocks(kernels, num_splits):
    problem = make_decode_problem(dtype=torch.float16, head_dim=24)
    assert_close(kernels.decode(problem, block_d=16, num_splits=num_splits), problem.reference(), LIMIT)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_keys_with_an_offset(kernels, num_splits):
    problem = make_decode_problem(dtype=torch.float16, lengths=None)
    problem.k += 20.0
    problem.k_cache = problem.k
    assert_close(kernels.decode(problem, num_splits=num_splits), problem.reference(), 3e-3)


def test_decode_equal_keys(kernels):
    problem = make_decode_problem(dtype=torch.float16, lengths=None, ridge=0.1)
    problem.k[:] = problem.k[:, :, :1]
    problem.k_cache = problem.k
    assert_close(kernels.decode(problem), problem.reference(), LIMIT)


def test_decode_scores_that_grow(kernels):
    """The reference of the weights has to follow the largest score."""
    problem = make_decode_problem(dtype=torch.float16, batch=1, heads=1, kv_heads=1, capacity=96, lengths=None)
    problem.k[:] = problem.k.sign() * torch.linspace(0, 4, 96)[:, None].half() * problem.q.sign()
    problem.k_cache = problem.k
    assert_close(kernels.decode(problem, num_splits=1), problem.reference(), 3e-3)


def test_decode_fast_takes_one_term(kernels):
    problem = make_decode_problem(dtype=torch.float16, ridge=0.1)
    assert_close(kernels.decode(problem, precision="fast"), problem.reference(), 5e-3)


def test_decode_tensors_of_ridge_and_scale(kernels):
    ridge = torch.rand(3, 2, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    problem = make_decode_problem(dtype=torch.float16, ridge=ridge)
    scale = torch.tensor(0.3)
    out, *_ = kernels.info(problem, scale=scale)
    assert_close(out, problem.reference(0.3), LIMIT)


def test_decode_reports_the_solve(kernels):
    problem = make_decode_problem(dtype=torch.float16, lengths=[0, 40, 9], ridge=0.1)
    _, iterations, residual = kernels.info(problem)
    assert (iterations[0] == 0).all() and (residual[0] == 0).all()
    assert (iterations[1:] > 0).all() and (residual[1:] <= 10**-3.5).all()
    _, capped, unsolved = kernels.info(problem, cg_max_iters=1)
    assert (capped <= 1).all() and unsolved.max() > 10**-3.5


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_out_and_workspace(kernels, num_splits):
    problem = make_decode_problem(dtype=torch.float16, lengths=[1, 40, 17])
    executable = kernels.bind(problem, num_splits=num_splits)
    workspace = torch.full((executable.workspace_numel,), torch.nan)
    out = torch.full((3, 1, 2, 16), torch.nan, dtype=torch.float16).transpose(1, 2)
    results = executable(problem.inputs() | {"out": out, "workspace": workspace}, ("out", *INFO))
    assert results["out"] is out
    assert_close(out, problem.reference(), LIMIT)
