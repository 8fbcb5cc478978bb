"""The CUDA kernels of decoding on the CPU, thread by thread: the cases of every backend, and those of their own."""

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from decode_problems import CASES, make_decode_problem
from interpreted_decode_cases import (  # noqa: F401
    Kernels,
    test_decode_equal_keys,
    test_decode_fast_takes_one_term,
    test_decode_keys_with_an_offset,
    test_decode_out_and_workspace,
    test_decode_reports_the_solve,
    test_decode_scores_that_grow,
    test_decode_splits,
    test_decode_tensors_of_ridge_and_scale,
)
from problems import assert_close

from lla_compile.backends.cuda import gram_kernels, gram_launcher
from lla_compile.devices import resolve

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
LIMIT = 2.5e-3
ORDERS = pytest.mark.parametrize("backwards", [False, True])
AMPERE, HOPPER = resolve("a100"), resolve("h200")


@pytest.fixture
def kernels():
    return Kernels("cuda", dict(block_k=16, num_stages=3), AMPERE)


@pytest.fixture
def wgmma():
    """Four warps that multiply together; only heads of 64 dimensions or more have them."""
    return Kernels("cuda", dict(block_k=32, num_stages=4), HOPPER)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decode_cases(kernels, fields):
    problem = make_decode_problem(dtype=torch.bfloat16, **fields)
    assert_close(kernels.decode(problem), problem.reference(), LIMIT)


@pytest.mark.parametrize("fields", [fields for fields in CASES if not {"head_dim", "page_size"} & set(fields)], ids=str)
def test_decode_cases_with_wgmma(wgmma, fields):
    problem = make_decode_problem(dtype=torch.bfloat16, head_dim=64, **fields)
    assert_close(wgmma.decode(problem), problem.reference(), LIMIT)


@pytest.mark.parametrize(
    "fields",
    [
        dict(head_dim=100, head_dim_v=40, dtype=torch.float16, lengths=[200, 3, 41]),
        dict(head_dim=64, page_size=5, queries=3, heads=4, lengths=[200, 11, 2]),
        dict(head_dim=128, head_dim_v=64, capacity=100, lengths=[100, 33, 7]),
    ],
    ids=str,
)
def test_wide_heads_with_wgmma(wgmma, fields):
    problem = make_decode_problem(**dict(dtype=torch.bfloat16, capacity=200, ridge=0.1) | fields)
    assert_close(wgmma.decode(problem, num_splits=2), problem.reference(), LIMIT)


@ORDERS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_wide_heads(kernels, emulated, head_dim, backwards):
    emulated["backwards"] = backwards
    problem = make_decode_problem(
        dtype=torch.bfloat16, head_dim=head_dim, batch=2, capacity=200, lengths=[200, 70], ridge=0.1
    )
    assert_close(kernels.decode(problem, block_k=64), problem.reference(), LIMIT)


@ORDERS
@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_many_tiles_with_wgmma(wgmma, emulated, precision, backwards):
    """Every stage is used several times, by an odd and by an even number of tiles."""
    emulated["backwards"] = backwards
    problem = make_decode_problem(dtype=torch.bfloat16, head_dim=64, batch=2, heads=1, capacity=544, lengths=[544, 512])
    limit = LIMIT if precision == "accurate" else 2 * LIMIT
    assert_close(wgmma.decode(problem, precision=precision, num_splits=1), problem.reference(), limit)


@ORDERS
@pytest.mark.parametrize("head_dim, block_k, num_stages", [(128, 64, 6), (64, 128, 5)])
def test_groups_and_pairs_of_warps_take_turns(wgmma, emulated, head_dim, block_k, num_stages, backwards):
    """Two groups of rows, and two pairs of warps that weigh, by nine and by five tiles."""
    emulated["backwards"] = backwards
    problem = make_decode_problem(dtype=torch.float16, head_dim=head_dim, batch=1, heads=1, capacity=540, lengths=[540])
    knobs = dict(block_k=block_k, num_stages=num_stages, num_splits=1)
    assert_close(wgmma.decode(problem, precision="fast", **knobs), problem.reference(), LIMIT)


@pytest.mark.parametrize("head_dim, capacity", [(16, 192), (64, 192), (64, 160), (128, 160)])
def test_another_pass_where_scores_grow(kernels, wgmma, head_dim, capacity):
    """By an even and by an odd number of tiles, after which the pairs of warps that weigh swap."""
    problem = make_decode_problem(
        dtype=torch.float16, head_dim=head_dim, batch=1, heads=1, kv_heads=1, capacity=capacity, lengths=None
    )
    steps = torch.linspace(0, 4, capacity)[:, None].half()
    problem.k[:] = problem.k.sign() * steps * problem.q.sign() * (16 / head_dim) ** 0.5
    problem.k_cache = problem.k
    chosen = kernels if head_dim == 16 else wgmma
    assert_close(chosen.decode(problem, num_splits=1), problem.reference(), 3e-3)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_unaligned_caches(kernels, wgmma, head_dim):
    problem = make_decode_problem(dtype=torch.bfloat16, head_dim=head_dim)
    for name, before in (("q", 1), ("k_cache", 3), ("v_cache", 5)):
        wide = torch.nn.functional.pad(getattr(problem, name), (before, 2), value=torch.nan)
        setattr(problem, name, wide[..., before:-2])
    assert_close((wgmma if head_dim == 64 else kernels).decode(problem), problem.reference(), LIMIT)


def test_ill_conditioned_systems_are_eliminated(kernels):
    """About as many keys as dimensions, for which conjugate gradients alone would take a hundred iterations."""
    problem = make_decode_problem(
        dtype=torch.float16, head_dim=128, batch=1, heads=4, capacity=160, lengths=[160], ridge=0.01
    )
    out, iterations, residual = kernels.info(problem)
    assert (iterations == gram_kernels.DIRECT_AFTER + 1).any()
    assert (iterations <= gram_kernels.DIRECT_AFTER + 20).all() and (residual <= 10**-3.5).all()
    assert_close(out, problem.reference(), LIMIT)


@pytest.mark.parametrize("head_dim, head_dim_v", [(16, 16), (64, 5), (128, 64)])
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=lambda device: device.id)
def test_python_and_cuda_agree_on_sizes(kernels, device, head_dim, head_dim_v):
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    problem = make_decode_problem(dtype=torch.bfloat16, head_dim=head_dim, head_dim_v=head_dim_v)
    executable = Kernels("cuda", dict(num_splits=3), device).bind(problem)
    executable(problem.inputs(), ("out",))
    for emulated_kernel in next(iter(executable._bound.values())):
        assert emulated_kernel.library.shared_size() == emulated_kernel.kernel.shared
        assert emulated_kernel.library.arguments_size() == gram_launcher.ARGUMENTS.size
