"""The CUDA kernels of the backward pass of Parallax and softmax attention on the CPU, thread by thread."""

from dataclasses import replace

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from parallax_problems import ParallaxProblem, make_parallax_problem
from problems import assert_gradients_close

from lla_compile import LLASpec, backends
from lla_compile.arguments import dtype_name
from lla_compile.backends.cuda import backward_kernels
from lla_compile.backends.cuda.backward_source import print_backward
from lla_compile.devices import resolve
from lla_compile.lowering import lower
from lla_compile.plans import Plan, Source
from lla_compile.precision import error_limit

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
H200 = resolve("h200")
SHAPES = [
    dict(seqlen_q=130, heads=1),
    dict(seqlen_q=33, seqlen_k=150, window_size=70),
    dict(seqlen_q=100, seqlen_k=33),
    dict(batch=2, heads=4, kv_heads=2, seqlen_q=70, head_dim=40, head_dim_v=5),
    dict(seqlen_q=40, seqlen_k=161, is_causal=False, heads=1, head_dim=128, head_dim_v=24),
    dict(seqlen_q=1, seqlen_k=45, heads=1, head_dim=1, head_dim_v=128),
    dict(seqlen_q=200, heads=1, window_size=50, dtype=torch.float16),
]
# Rows and keys of a block, of a streamed tile, and stages.
TILES = [(64, 32, 2), (128, 64, 4), (192, 32, 3)]


def problem(**fields) -> ParallaxProblem:
    return make_parallax_problem(**dict(head_dim=64, dtype=torch.bfloat16) | fields)


def backward(p: ParallaxProblem, op="parallax", tile=None, wanted=None, scale=None):
    """Gradients of a forward pass in the eager backend, and those of float64 by name."""
    q, r, k, v = p.tensors
    spec = LLASpec(
        dtype_name(q), q.shape[3], v.shape[3], q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], op=op,
        is_causal=p.options.get("is_causal", True), window_size=p.options.get("window_size"),
    )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v, "scale": q.shape[3] ** -0.5 if scale is None else scale}
    inputs |= {"r": r} if op == "parallax" else {}
    eager, cuda, program = (backends.get("eager"), backends.get("cuda"), lower(op, "backward"))
    cpu = resolve("cpu")
    forward = eager.bind(Plan(spec, cpu, eager.default_config(spec, cpu), Source.REQUESTED, 0.0, ""))
    saved = forward(inputs, ("out", *program.given))
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
    return run(inputs | dict(saved) | {"grad_out": p.grad_out}, wanted or tuple(program.outputs))
