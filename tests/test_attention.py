import doctest
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from problems import assert_close, make_problem

import lla_compile
from lla_compile import LLASpec, SolveInfo, attention, lla_attention, plan
from lla_compile.reference import lla_reference


pytestmark = pytest.mark.usefixtures("clean")


def attend(problem, **options):
    return lla_attention(
        problem.q,
        problem.k,
        problem.v,
        problem.ridge,
        is_causal=problem.is_causal,
        window_size=problem.window_size,
        **options,
    )


@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(is_causal=False, head_dim_v=5),
        dict(batch=2, heads=6, kv_heads=2, head_dim=7),
        dict(seqlen_q=5, seqlen_k=40),
        dict(seqlen_q=40, seqlen_k=5),
        dict(window_size=6),
        dict(dtype=torch.float64, head_dim=1),
    ],
    ids=str,
)
def test_against_the_reference(shape):
    problem = make_problem(**{"seqlen_q": 33, "head_dim": 16, "ridge": 0.5} | shape)
    out = attend(problem)
    assert out.dtype == problem.q.dtype and out.is_contiguous()
    assert_close(out, problem.reference(), 1e-5)


def test_bfloat16():
    problem = make_problem(dtype=torch.bfloat16, head_dim=64)
    out = attend(problem)
    assert out.dtype == torch.bfloat16
    assert_close(out, problem.reference(), 2.5e-3)


def test_rows_without_a_visible_key_are_zero():
    problem = make_problem(seqlen_q=8, seqlen_k=3)
    out, info = attend(problem, return_info=True)
    assert (out[:, :, :5] == 0).all() and (out[:, :, 5:] != 0).any(-1).all()
    assert (info.iterations[:, :, :5] == 0).all() and (info.residual[:, :, :5] == 0).all()


def test_any_strides():
    problem = make_problem(seqlen_q=20, head_dim=8)
    expected = attend(problem)
    q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    k = problem.k.transpose(2, 3).contiguous().transpose(2, 3)
    v = torch.stack([problem.v, problem.v], -1)[..., 0]
    torch.testing.assert_close(lla_attention(q, k, v), expected)


@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 1), (2, 1, 20), (2, 3, 20)], ids=str)
def test_ridge_per_row(shape):
    problem = make_problem(batch=2, heads=3, seqlen_q=20, head_dim=8)
    ridge = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.2
    out = lla_attention(problem.q, problem.k, problem.v, ridge)
    problem.ridge = ridge.expand(2, 3, 20)
    assert_close(out, problem.reference(), 1e-5)


def test_scale():
    problem = make_problem(head_dim=8, seqlen_q=20)
    expected = lla_reference(problem.q, problem.k, problem.v, scale=0.2)
    for scale in (0.2, torch.tensor(0.2)):
        assert_close(lla_attention(problem.q, problem.k, problem.v, scale=scale), expected, 1e-5)


def test_info():
    out, info = attend(make_problem(seqlen_q=32, heads=3), cg_max_iters=4, return_info=True)
    assert isinstance(info, SolveInfo)
    assert info.iterations.shape == info.residual.shape == out.shape[:3] == (1, 3, 32)
    assert info.iterations.dtype == torch.int32 and info.residual.dtype == torch.float32
    assert info.iterations.max() == 4 and info.residual.max() > 1e-3
    loose = attend(make_problem(seqlen_q=32, heads=3), cg_tol=0.5, return_info=True)[1]
    assert loose.residual.max() <= 0.5 and loose.iterations.max() < 4


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_nothing_to_compute(batch, seqlen_q, seqlen_k):
    q = torch.randn(batch, 3, seqlen_q, 8, requires_grad=True)
    k = torch.randn(batch, 3, seqlen_k, 8, requires_grad=True)
    v = torch.randn(batch, 3, seqlen_k, 5, requires_grad=True)
    out, info = lla_attention(q, k, v, torch.rand(3, seqlen_q) + 1, return_info=True)
    assert out.shape == (batch, 3, seqlen_q, 5) and (out == 0).all()
    assert info.iterations.shape == info.residual.shape == (batch, 3, seqlen_q)
    out.sum().backward()


def test_meta_tensors_give_shapes():
    q, k, v = torch.empty(2, 4, 8, 16, device="meta"), *torch.empty(2, 2, 2, 8, 16, device="meta")
    out = lla_attention(q, k, v)
    assert out.shape == (2, 4, 8, 16) and out.is_meta


Q = torch.randn(2, 4, 6, 8)
ONE_NEGATIVE = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
K = torch.randn(2, 2, 6, 8)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "q must be a torch.Tensor, got list", dict(q=[1.0])),
        (TypeError, "v must be a torch.Tensor, got NoneType", dict(v=None)),
        (TypeError, "q must be a torch.Tensor, got ndarray", dict(q=Q.numpy())),
        (ValueError, r"k must be 4-D \(batch, heads, seqlen, head_dim\), got shape \(2, 6, 8\)", dict(k=K[:, 0])),
        (TypeError, "q must have dtype float16, bfloat16, float32, float64, got int64", dict(q=Q.long())),
        (TypeError, "q must have dtype .*, got complex64", dict(q=Q.to(torch.complex64))),
        (TypeError, "one dtype, got q float32 and k float16", dict(k=K.half())),
        (ValueError, "one device, got q on cpu and v on meta", dict(v=K.to("meta"))),
        (ValueError, "one batch size, got q 2 and k 1", dict(k=K[:1])),
        (ValueError, "q must have at least one head, got 0", dict(q=Q[:, :0])),
        (ValueError, "k must have at least one head", dict(k=K[:, :0])),
        (ValueError, "q must have a head_dim from 1 to 256, got 0", dict(q=Q[..., :0])),
        (ValueError, "v must have a head_dim from 1 to 256, got 264", dict(v=K.repeat(1, 1, 1, 33))),
        (ValueError, "q and k must have one head_dim, got q 8 and k 7", dict(k=K[..., :7])),
        (ValueError, "k and v must have the same heads, got k 2 and v 1", dict(v=K[:, :1])),
        (ValueError, "k and v must have the same seqlen, got k 6 and v 5", dict(v=K[:, :, :5])),
        (ValueError, "multiple of the heads of k .* got q 3 and k 2", dict(q=Q[:, :3])),
        (NotImplementedError, "q must be a dense tensor, got layout torch.sparse_coo", dict(q=Q.to_sparse())),
        (ValueError, "ridge must be positive and finite, got 0.0", dict(ridge=0)),
        (ValueError, "ridge must be positive and finite, got -1.0", dict(ridge=-1.0)),
        (ValueError, "ridge must be positive and finite, got nan", dict(ridge=float("nan"))),
        (ValueError, "ridge must be positive and finite, got inf", dict(ridge=float("inf"))),
        (ValueError, "ridge must be positive and finite, got a tensor .* -1 to 1", dict(ridge=ONE_NEGATIVE)),
        (ValueError, "ridge must be positive and finite", dict(ridge=torch.tensor(float("nan")))),
        (TypeError, "ridge must be a number or a tensor, got str", dict(ridge="1")),
        (TypeError, "ridge must be a number or a floating-point tensor, got dtype int64", dict(ridge=torch.tensor(1))),
        (ValueError, r"ridge must broadcast to .* = \(2, 4, 6\), got shape \(5,\)", dict(ridge=torch.ones(5))),
        (ValueError, r"ridge must broadcast to .* got shape \(1, 2, 4, 6\)", dict(ridge=torch.ones(1, 2, 4, 6))),
        (ValueError, "ridge must be on the device of q", dict(ridge=torch.ones(6, device="meta"))),
        (TypeError, "scale must be None, a number or a 0-dim tensor, got str", dict(scale="1")),
        (ValueError, "scale must be finite, got nan", dict(scale=float("nan"))),
        (ValueError, r"scale must be a 0-dim tensor, got shape \(1,\)", dict(scale=torch.ones(1))),
        (ValueError, "scale must be on the device of q", dict(scale=torch.ones((), device="meta"))),
        (TypeError, "scale must be .* floating-point tensor, got dtype int64", dict(scale=torch.tensor(1))),
        (TypeError, "is_causal must be True or False, got None", dict(is_causal=None)),
        (ValueError, "window_size must be an integer >= 1, got 0", dict(window_size=0)),
        (ValueError, "window_size must be an integer >= 1, got 2.5", dict(window_size=2.5)),
        (ValueError, "window_size needs is_causal=True", dict(window_size=2, is_causal=False)),
        (ValueError, "precision must be one of fast, accurate, got 'exact'", dict(precision="exact")),
        (ValueError, "cg_tol must be a number with 0 <= cg_tol < 1, got 2", dict(cg_tol=2)),
        (ValueError, "cg_max_iters must be an integer >= 1, got 0", dict(cg_max_iters=0)),
        (ValueError, "backend must name triton, cuda, eager, got 'cudnn'", dict(backend="cudnn")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(error, message, changes):
    good = dict(q=Q, k=K, v=K)
    lla_attention(**good)  # a remembered call must not let a wrong argument through
    with pytest.raises(error, match=message):
        lla_attention(**good | changes)


def test_plan_of_a_call():
    given = plan(Q, K, K, 0.1, scale=0.5, precision="fast", cg_max_iters=9, return_info=True)
    assert given.spec == LLASpec("float32", 8, 8, 2, 4, 2, 6, 6, precision="fast", cg_max_iters=9)
    assert given.device.id == "cpu" and given.config.backend == "eager" and given.cg_max_iters == 9


def test_plan_of_the_backward_pass():
    given = plan(Q, K, K, phase="backward", cg_max_iters=9)
    assert given.spec == LLASpec("float32", 8, 8, 2, 4, 2, 6, 6, cg_max_iters=9, phase="backward")
    assert "lla backward" in str(given) and "grad_kv 8" in str(given)
    with pytest.raises(ValueError, match="phase must be one of forward, backward, decode, got 'both'"):
        plan(Q, K, K, phase="both")


def test_plan_for_hardware_that_is_not_there():
    spec = LLASpec("bfloat16", 128, 128, 4, 8, 8, 4096, 4096)
    for device in ("h200", "nvidia-h200", plan(spec, device="h200", backend="eager").device):
        given = plan(spec, device=device, backend="eager")
        assert given.device.id == "nvidia-h200" and given.device.compute_capability == "9.0"
        assert "NVIDIA H200" in str(given) and "at the cap" in str(given)
    assert plan(Q, K, K, device="h200", backend="eager").device.id == "nvidia-h200"


def test_plan_refuses():
    spec = LLASpec("float32", 8, 8, 1, 1, 1, 4, 4)
    with pytest.raises(TypeError, match="either a spec or tensors"):
        plan(spec, is_causal=False)
    with pytest.raises(TypeError, match="unknown option causal; known: cg_max_iters, cg_tol, is_causal"):
        plan(Q, K, K, causal=True)
    with pytest.raises(ValueError, match="unknown device 'h20'; nearest known: .*h200"):
        plan(spec, device="h20")


def test_examples_in_docstrings():
    torch.manual_seed(0)
    results = doctest.testmod(attention)
    assert results.attempted >= 12 and results.failed == 0


def test_public_names():
    assert set(lla_compile.__all__) == {
        "AdjointInfo",
        "GramState",
        "KVCache",
        "LLASpec",
        "Plan",
        "SolveInfo",
        "clear_cache",
        "lla_attention",
        "lla_attention_varlen",
        "lla_decode",
        "lla_decode_workspace", "parallax_attention", "parallax_attention_varlen", "parallax_decode",
        "parallax_decode_workspace",
        "plan",
    }
    assert lla_compile.plan is plan and lla_compile.__version__


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="triton: .*TRITON_INTERPRET=1"):
        lla_attention(Q, K, K, backend="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_through_the_interpreter():
    script = """
import torch
from lla_compile import lla_attention, plan
q, k, v = torch.randn(3, 1, 2, 20, 16).unbind()
assert plan(q, k, v).config.backend == "eager"
torch.testing.assert_close(lla_attention(q, k, v, backend="triton"), lla_attention(q, k, v), atol=1e-4, rtol=1e-4)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("LLA_COMPILE_BACKENDS", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
