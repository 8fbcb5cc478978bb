"""The CUDA kernels of the backward pass of Parallax and softmax attention on the CPU, thread by thread."""

from dataclasses import dataclass, replace

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from parallax_problems import GRADIENTS, ParallaxProblem, make_parallax_problem
from problems import assert_gradients_close

from lla_compile import LLASpec, backends
from lla_compile.arguments import dtype_name
from lla_compile.backends.cuda.backward_launcher import BackwardLauncher
from lla_compile.devices import resolve
from lla_compile.lowering import lower
from lla_compile.plans import Plan, Source
from lla_compile.precision import error_limit
from lla_compile.reference import parallax_reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
CPU, H200 = resolve("cpu"), resolve("h200")
WINDOWED = dict(head_dim=40, head_dim_v=72, window_size=70, dtype=torch.float16)
NOT_CAUSAL = dict(head_dim=100, head_dim_v=24, is_causal=False)
SHAPES = [
    dict(seqlen_q=150, heads=1),
    dict(seqlen_q=33, seqlen_k=150),
    dict(seqlen_q=150, seqlen_k=33, heads=1),
    dict(batch=2, heads=4, kv_heads=2, seqlen_q=70),
    dict(seqlen_q=210, heads=1, **WINDOWED),
    dict(seqlen_q=33, seqlen_k=150, heads=3, kv_heads=1, **WINDOWED),
    dict(seqlen_q=40, seqlen_k=161, heads=2, kv_heads=1, **NOT_CAUSAL),
    dict(seqlen_q=130, seqlen_k=1, heads=1, **NOT_CAUSAL),
]
# What a block holds, a streamed tile, and stages: one group, which takes no turns, and three.
ONE_GROUP, THREE_GROUPS = (64, 32, 2), (192, 32, 3)


def problem(**fields) -> ParallaxProblem:
    return make_parallax_problem(**dict(head_dim=64, dtype=torch.bfloat16) | fields)


@dataclass(frozen=True)
class Bound:
    """An executable with its inputs: a function of the wanted outputs."""

    launcher: BackwardLauncher
    inputs: dict

    def __call__(self, wanted: tuple[str, ...]):
        return self.launcher(self.inputs, wanted)


def bound(p: ParallaxProblem, op="parallax", tile=None, scale=None):
    """The backward pass, after a forward pass of the eager backend."""
    q, r, k, v = p.tensors
    spec = LLASpec(
        dtype_name(q), q.shape[3], v.shape[3], q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], op=op,
        **p.options,
    )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v, "scale": q.shape[3] ** -0.5 if scale is None else scale}
    inputs |= {"r": r} if op == "parallax" else {}
    eager, cuda = backends.get("eager"), backends.get("cuda")
    forward = eager.bind(Plan(spec, CPU, eager.default_config(spec, CPU), Source.REQUESTED, 0.0, ""))
    given = forward(inputs, ("out", *lower(op, "backward").given))
    spec = replace(spec, phase="backward")
    config = cuda.default_config(spec, H200)
    if tile:
        held, streamed, stages = tile
        config = replace(
            config, block_q=held, block_k=streamed, num_stages=stages, kv_block_q=streamed, kv_block_k=held,
            kv_num_stages=stages,
        )  # fmt: skip
    assert cuda.infeasible(spec, config, H200) is None
    run = cuda.bind(Plan(spec, H200, config, Source.REQUESTED, 0.0, ""))
    return Bound(run, inputs | dict(given) | {"grad_out": p.grad_out})


def assert_close(got, p: ParallaxProblem, expected=None):
    expected = expected or p.reference_gradients()
    expected = {name: expected[name] for name in got}
    assert_gradients_close(got, expected, error_limit(dtype_name(p.grad_out), "accurate", None, "backward"))


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_shapes(fields):
    p = problem(**fields)
    assert_close(bound(p)(GRADIENTS), p)


@pytest.mark.parametrize("backwards", [False, True])
def test_groups_that_take_turns(emulated, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    p = problem(seqlen_q=230, heads=1)
    assert_close(bound(p, tile=THREE_GROUPS)(GRADIENTS), p)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scale", [None, torch.tensor(-0.3), torch.tensor(0.0)], ids=str)
def test_softmax_attention(emulated, scale, backwards):  # noqa: F811
    emulated["backwards"] = backwards
    p = problem(seqlen_q=100, heads=2, kv_heads=1)
    q, _, k, v = (x.double().requires_grad_() for x in p.tensors)
    number = 0.125 if scale is None else float(scale)
    out = parallax_reference(q, None, k, v, scale=number)
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), p.grad_out.double())))
    got = bound(p, "softmax", ONE_GROUP, scale)(("dq", "dk", "dv"))
    if number == 0:
        assert (got.pop("dq") == 0).all() and (got.pop("dk") == 0).all()
    assert_close(got, p, expected)


def test_each_gradient_is_computed_by_itself():
    p = problem(seqlen_q=70, heads=1)
    run = bound(p)
    together = run(GRADIENTS)
    for wanted in (("dv",), ("dr", "dscale")):
        alone = run(wanted)
        assert tuple(alone) == wanted
        assert all(torch.equal(alone[name], together[name]) for name in wanted if name in together)
    # Row by row: dq = scale sum_j ds_j k_j, and dscale is q times that sum.
    dscale = (p.tensors[0].double() * p.reference_gradients()["dq"]).sum(-1) * 64**0.5
    assert_close({"dscale": alone["dscale"]}, p, {"dscale": dscale})


def test_rows_without_keys_and_keys_without_rows():
    p = problem(seqlen_q=150, seqlen_k=20, heads=1)
    got = bound(p)(GRADIENTS)
    assert (got["dq"][:, :, :130] == 0).all() and (got["dr"][:, :, :130] == 0).all()
    assert (got["dq"][:, :, 131:] != 0).any(-1).all()
    q, r, k, v = p.tensors
    got = bound(replace(p, tensors=(q[:, :, :0], r[:, :, :0], k, v), grad_out=p.grad_out[:, :, :0]))(GRADIENTS)
    assert (got["dk"] == 0).all() and (got["dv"] == 0).all()


def test_any_strides():
    p = problem(seqlen_q=70, heads=2, batch=2)
    expected = bound(p)(GRADIENTS)
    q, r, k, v = p.tensors
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    got = bound(replace(p, tensors=(q, r, k, v)))(GRADIENTS)
    assert all(torch.equal(got[name], expected[name]) for name in GRADIENTS)


@pytest.mark.parametrize("fields", [dict(), NOT_CAUSAL], ids=str)
def test_python_and_cuda_agree_on_sizes(fields):
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    p = problem(seqlen_q=3, heads=1, **fields)
    run = bound(p)
    run(GRADIENTS)
    [kernels] = run.launcher._bound.values()
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.library.arguments_size() == run.launcher._arguments.size
    for kernel in kernels[1:]:
        assert kernel.library.shared_size() == kernel.kernel.shared
