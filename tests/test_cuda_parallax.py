"""The CUDA kernels of Parallax and softmax attention on the CPU, thread by thread."""

from dataclasses import replace

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from parallax_problems import (
    GRADIENTS,
    ParallaxProblem,
    bound,
    grown,
    make_packed_parallax_problem,
    make_parallax_problem,
    run_forward,
)
from problems import CPU, assert_close, assert_gradients_close

from lla_compile import backends
from lla_compile.autograd import trained
from lla_compile.backends.cuda import sweep_kernels
from lla_compile.devices import resolve

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
# With wgmma, both scores ahead in two groups of rows and in one, one score ahead in two and in three; with mma.sync.
TILES = {
    "two": ("h200", dict(block_q=128, block_k=64, num_warps=12, num_stages=4)),
    "one": ("h200", dict(block_q=64, block_k=32, num_warps=8, num_stages=3)),
    "wide": ("h200", dict(block_q=128, block_k=64, num_warps=12, num_stages=3)),
    "three": ("h200", dict(block_q=192, block_k=64, num_warps=16, num_stages=3)),
    "mma": ("a100", dict(block_q=64, block_k=64, num_warps=4, num_stages=2)),
    "mma-wide": ("a100", dict(block_q=128, block_k=32, num_warps=8, num_stages=3)),
}
LIMITS = {torch.bfloat16: 2.5e-3, torch.float16: 1e-3}
ROW_LIMITS = {"parallax": 1e-4, "softmax": 4e-3}  # softmax attention sums its weights as products see them
SHAPES = [
    dict(seqlen_q=200),
    dict(seqlen_q=45, seqlen_k=130),
    dict(seqlen_q=150, seqlen_k=9),
    dict(seqlen_q=3, seqlen_k=1),
    dict(batch=2, heads=4, kv_heads=2, seqlen_q=33),
    dict(seqlen_q=140, offset=30.0),
]
OTHERS = {
    "one": dict(seqlen_q=70, seqlen_k=99, head_dim=128, head_dim_v=40, is_causal=False, dtype=torch.float16),
    "wide": dict(seqlen_q=150, seqlen_k=170, head_dim=96, head_dim_v=127),
    "three": dict(seqlen_q=300, window_size=70),
    "mma-wide": dict(seqlen_q=150, head_dim=33, head_dim_v=5, window_size=40, dtype=torch.float16),
}


def problem(**fields):
    return make_parallax_problem(**dict(heads=1, head_dim=64, dtype=torch.bfloat16) | fields)


def run(p, tile, wanted=("out",), op="parallax", scale=None):
    gpu, knobs = TILES[tile]
    return run_forward(p, wanted, "cuda", resolve(gpu), op, scale, **knobs)


def assert_right(p, tile, op="parallax", scale=None):
    """Output and state against float64: of weights that are rounded for products, but not for the sums of rows."""
    wanted, limit = trained(op), LIMITS[p.tensors[0].dtype]
    double = replace(p, tensors=tuple(x.double() for x in p.tensors))
    got, expected = run(p, tile, wanted, op, scale), run_forward(double, wanted, "eager", CPU, op, scale)
    for name in wanted:
        if name in ("out", "value_mean"):
            assert_close(got[name], expected[name], limit)
        else:
            torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=ROW_LIMITS[op])


@pytest.mark.parametrize("tile", ["two", "mma"])
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_shapes(fields, tile):
    assert_right(problem(**fields), tile)


@pytest.mark.parametrize("tile", OTHERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_tiles(emulated, tile, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    assert_right(problem(**OTHERS[tile]), tile)


@pytest.mark.parametrize("tile", ["two", "mma"])
@pytest.mark.parametrize("growth", [1.0, 8.0, 30.0])
def test_maxima_that_grow_along_the_keys(growth, tile):
    """Tiles that rescale follow tiles that do not, and the other way round, in some rows of a group alone."""
    assert_right(grown(problem(seqlen_q=200, offset=2.0), growth), tile)


@pytest.mark.parametrize("tile", ["two", "mma"])
def test_means_that_wander_under_maxima_that_do_not(tile):
    """Second scores whose mean leaves the first tile's far behind, where no score outgrows the maximum."""
    q, r, k, v = (x.clone() for x in problem(seqlen_q=300).tensors)
    q[..., 0], r[..., 0], k[..., 0] = 0, 0.5, torch.linspace(0, 10, 300)
    assert_right(ParallaxProblem((q, r, k, v), None, {}), tile)


@pytest.mark.parametrize("tile", ["two", "mma"])
@pytest.mark.parametrize("scale", [-0.1, 0.0, torch.tensor(-0.1), torch.tensor(0.0)], ids=str)
def test_any_scale(scale, tile):
    assert_right(problem(seqlen_q=100), tile, scale=scale)


def test_softmax_attention():
    assert_right(problem(seqlen_q=130, seqlen_k=100, heads=2, kv_heads=1), "two", "softmax")


def test_packed_sequences():
    p = make_packed_parallax_problem((70, 0, 160), heads=2, kv_heads=1, head_dim=64, dtype=torch.bfloat16)
    assert_close(run(p, "two")["out"], p.reference(), LIMITS[torch.bfloat16])


def test_another_backend_goes_backward_from_what_is_saved():
    p = problem(seqlen_q=130)
    saved = run(p, "two", trained("parallax"))
    got = bound(p, "eager", CPU, phase="backward")(p.inputs() | saved | {"grad_out": p.grad_out}, GRADIENTS)
    expected = p.reference_gradients()
    assert_gradients_close(got, {name: expected[name] for name in GRADIENTS}, 5e-3)


def test_python_and_cuda_agree_on_sizes():
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    p = problem(seqlen_q=3)
    for gpu, knobs in TILES["two"], TILES["mma"]:
        launcher = bound(p, "cuda", resolve(gpu), **knobs)
        launcher(p.inputs(), ("out",))
        [[kernel]] = launcher._bound.values()
        assert kernel.library.shared_size() == kernel.kernel.shared
        assert kernel.library.arguments_size() == launcher._arguments.size


def test_both_scores_are_ahead_where_registers_allow():
    ahead = {}
    for tile, head_dim in (("two", 64), ("one", 128), ("wide", 128), ("three", 64), ("mma", 64)):
        gpu, knobs = TILES[tile]
        plan = bound(problem(seqlen_q=3, head_dim=head_dim), "cuda", resolve(gpu), **knobs)._plan
        assert backends.get("cuda").infeasible(plan.spec, plan.config, plan.device) is None
        ahead[tile] = sweep_kernels.scores_ahead(plan.spec, plan.config, plan.device)
    assert ahead == {"two": 2, "one": 2, "wide": 1, "three": 1, "mma": 1}
