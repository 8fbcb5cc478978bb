"""Where results and saved state lie: shapes, types and strides, the same for every backend."""

import pytest
import torch
from problems import make_grad_out, make_packed_problem, make_problem, run_backward, run_forward

from lla_compile.lowering import INFO, SAVED, lower
from lla_compile.storage import layout, state_dtype

SHAPE = dict(heads=4, kv_heads=2, head_dim=8, head_dim_v=5)
F32, F64, I32 = torch.float32, torch.float64, torch.int32


def layouts(p, phase, precision, packed=False):
    program = lower("lla", phase)
    names = [*program.outputs, *program.given]
    return {name: layout(program, name, p.q, p.k, p.v, precision, packed) for name in names}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_shapes_and_types(dtype, precision):
    p = make_problem(batch=3, seqlen_q=7, seqlen_k=9, dtype=dtype, **SHAPE)
    state = F64 if dtype is F64 else F32
    wide = F64 if precision == "accurate" and dtype is F32 else state
    terms = 2 if precision == "accurate" and dtype.itemsize == 2 else 1
    rows = (3, 4, 7)
    saved = {
        "lse": (rows, state),
        "kbar": ((*rows, 8), state),
        "unit_probe": ((terms, *rows, 8), dtype),
        "probe_norm": (rows, state),
        "probe_mean": (rows, wide),
    }
    info = {"iterations": (rows, I32), "final_residual": (rows, state)}
    gradients = {
        "dq": ((*rows, 8), dtype),
        "dk": ((3, 2, 9, 8), dtype),
        "dv": ((3, 2, 9, 5), dtype),
        "dridge": (rows, state),
        "dscale": (rows, state),
    }
    assert saved.keys() == SAVED.keys() and info.keys() == INFO.keys()
    expected = {
        "forward": {"out": ((*rows, 5), dtype)} | saved | info,
        "backward": gradients | saved | info,
    }
    for phase, by_name in expected.items():
        found = layouts(p, phase, precision)
        assert {name: (x.shape, x.dtype) for name, x in found.items()} == by_name
        for name, x in found.items():
            made = x.empty(p.q)
            assert (made.shape, made.dtype) == by_name[name] and made.is_contiguous()


def test_packed_results_lie_as_their_caller_has_them():
    """(1, H, total, width) is how kernels see (total, H, width): giving it back costs no copy."""
    p = make_packed_problem([3, 0, 4], [5, 2, 1], dtype=torch.bfloat16, **SHAPE)
    for phase, names in (("forward", ["out"]), ("backward", ["dq", "dk", "dv"])):
        apart, packed = layouts(p, phase, "accurate"), layouts(p, phase, "accurate", packed=True)
        for name in apart.keys() - names:
            assert packed[name] == apart[name]
        for name in names:
            made = packed[name].empty(p.q)
            assert made.shape == apart[name].empty(p.q).shape
            assert made[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_eager_backend_keeps_to_it(packed, dtype, precision):
    fields = dict(dtype=dtype, **SHAPE)
    p = make_packed_problem([3, 0, 4], **fields) if packed else make_problem(batch=2, seqlen_q=7, **fields)
    for phase, results in (
        ("forward", run_forward(p, ("out", *SAVED, *INFO), precision=precision)),
        ("backward", run_backward(p, make_grad_out(p), precision=precision)),
    ):
        expected = layouts(p, phase, precision, packed)
        for name, x in results.items():
            like = expected[name].empty(p.q)
            assert (x.shape, x.dtype, x.stride()) == (like.shape, like.dtype, like.stride()), name


def test_state_is_kept_in_float32_at_least():
    assert state_dtype(torch.float16) is state_dtype(torch.bfloat16) is state_dtype(F32) is F32
    assert state_dtype(F64) is F64
