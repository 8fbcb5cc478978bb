"""Decoding over a cache: results, masks, pages, what unused slots hold, wrong arguments, compiled code."""

import doctest
import shutil
from dataclasses import replace

import pytest
import torch
from decode_problems import CASES, decode, decode_info, decode_plan, make_decode_problem
from fakes import FakeBackend, lookup_in
from problems import CPU, assert_close, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from lla_compile import (
    LLASpec,
    SolveInfo,
    backends,
    clear_cache,
    dispatch,
    lla_attention,
    lla_decode,
    lla_decode_workspace,
    plan,
)
from lla_compile import decode as decode_module
from lla_compile.devices import resolve
from lla_compile.plans import KernelConfig
from lla_compile.precision import error_limit

pytestmark = pytest.mark.usefixtures("clean")
BACKENDS = ["eager"]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILERS = ["aot_eager"] + (["inductor"] if shutil.which("g++") or shutil.which("clang++") else [])


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@EACH_BACKEND
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_against_the_reference(fields, backend):
    """Whatever no query looks at is NaN."""
    p = make_decode_problem(**fields)
    out = decode(p, backend)
    assert_close(out, p.reference(), 1e-5)
    torch.testing.assert_close(lla_decode(**p.arguments(), backend=backend), out)


@EACH_BACKEND
@pytest.mark.parametrize("head_dim, head_dim_v", [(256, 200), (200, 256), (96, 96), (40, 1)])
def test_any_width(head_dim, head_dim_v, backend):
    p = make_decode_problem(head_dim=head_dim, head_dim_v=head_dim_v, batch=2, heads=1, kv_heads=1, ridge=0.1)
    assert_close(decode(p, backend), p.reference(), 1e-5)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("ridge", [1.0, 0.1, 0.01])
def test_error_limits(dtype, precision, ridge, backend):
    """Among the sequences are some with fewer keys than dimensions."""
    p = make_decode_problem(dtype=dtype, ridge=ridge, head_dim=64, capacity=200, lengths=[200, 3, 40], queries=2)
    out = decode(p, backend, precision)
    assert out.dtype == dtype and out.isfinite().all()
    assert relative_error(out, p.reference()) <= error_limit(name_of(dtype), precision, ridge, "decode")


@EACH_BACKEND
@pytest.mark.parametrize("knobs", [dict(num_splits=3), dict(num_splits=50), dict(block_k=16), dict(block_k=1)], ids=str)
@pytest.mark.parametrize("fields", [dict(), dict(lengths=[1, 17, 0]), dict(window_size=12), dict(page_size=8)], ids=str)
def test_splits_and_blocks_change_only_rounding(knobs, fields, backend):
    p = make_decode_problem(**fields)
    if backend != "eager" and "block_k" in knobs:
        knobs = dict(block_k=max(knobs["block_k"], 16))
    assert relative_error(decode(p, backend, **knobs), decode(p, backend)) < 1e-6


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(), (2, 1), (3, 1, 1), (1, 2, 4)], ids=str)
def test_ridge_and_scale_tensors(shape, backend):
    p = make_decode_problem(queries=4)
    p.ridge = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    for scale in (0.6, torch.tensor(0.6), torch.tensor(0.6, dtype=torch.float64)):
        out = lla_decode(**p.arguments(), scale=scale, backend=backend)
        assert_close(out, p.reference(scale=0.6), 1e-5)


@EACH_BACKEND
def test_any_strides(backend):
    p = make_decode_problem(queries=3, head_dim=10)
    expected = decode(p, backend)
    q = p.q.transpose(1, 3).contiguous().transpose(1, 3)
    k = torch.nn.functional.pad(p.k_cache, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]
    v = p.v_cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    seqlens = torch.stack([p.seqlens, p.seqlens], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (q, k, v, seqlens))
    arguments = p.arguments() | dict(q=q, k_cache=k, v_cache=v, seqlens=seqlens, backend=backend)
    assert torch.equal(lla_decode(**arguments), expected)
    arguments["out"] = torch.full((3, 3, 2, 10), torch.nan).transpose(1, 2)
    assert lla_decode(**arguments) is arguments["out"] and torch.equal(arguments["out"], expected)


@EACH_BACKEND
def test_pages_that_lie_heads_first_or_in_a_larger_tensor(backend):
    p = make_decode_problem(page_size=8)
    expected = decode(p, backend)
    heads_first = p.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.stack([p.k_cache, p.v_cache], 1)
    table = torch.nn.functional.pad(p.block_table, (0, 3))[:, :-3]
    changed = dict(k_cache=heads_first, v_cache=both[:, 1], block_table=table, backend=backend)
    assert not table.is_contiguous()
    assert torch.equal(lla_decode(**p.arguments() | changed), expected)


@EACH_BACKEND
def test_keys_far_from_the_origin(backend):
    p = make_decode_problem(capacity=100, lengths=[100, 30, 3], ridge=0.1)
    p = replace(p, k=p.k + 30, k_cache=p.k_cache + 30, v=p.v + 30, v_cache=p.v_cache + 30)
    assert relative_error(decode(p, backend), p.reference()) < 1e-5


@EACH_BACKEND
@pytest.mark.parametrize("window_size", [None, 5])
def test_steps_are_rows_of_attention(window_size, backend):
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0)).unbind()
    k, v = k[:, :2], v[:, :2]
    expected = lla_attention(q, k, v, 0.5, window_size=window_size, cg_tol=1e-7, cg_max_iters=200)
    for first, last in [(0, 1), (1, 2), (2, 9), (9, 25), (29, 30)]:
        seqlens = torch.full((2,), last, dtype=torch.int32)
        out = lla_decode(q[:, :, first:last], k, v, 0.5, seqlens=seqlens, window_size=window_size, backend=backend)
        assert_close(out, expected[:, :, first:last], 1e-5)


@EACH_BACKEND
def test_queries_without_keys_give_zeros(backend):
    p = make_decode_problem(queries=4, lengths=[0, 2, 4])
    out, iterations, residual = decode_info(p, backend)
    nothing = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)[:, None].expand(3, 2, 4)
    assert out[nothing].eq(0).all() and out[~nothing].ne(0).any(-1).all()
    assert iterations[nothing].eq(0).all() and residual[nothing].eq(0).all() and residual.isfinite().all()
    assert iterations[2, :, 1:].gt(0).all()


@EACH_BACKEND
def test_lengths_are_cut_to_the_cache(backend):
    """What the host does not check must not be read out of bounds."""
    p = make_decode_problem(lengths=[40, 0, 40])
    expected = decode(p, backend)
    p.seqlens = torch.tensor([45, -3, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(decode(p, backend), expected)


@EACH_BACKEND
def test_info(backend):
    p = make_decode_problem(queries=3, lengths=[40, 7, 23])
    out, info = lla_decode(**p.arguments(), return_info=True, backend=backend)
    assert isinstance(info, SolveInfo) and info.adjoint is None
    assert info.iterations.dtype == torch.int32 and info.residual.dtype == torch.float32
    assert info.iterations.shape == info.residual.shape == (3, 2, 3)
    assert torch.equal(out, lla_decode(**p.arguments(), backend=backend))
    assert info.residual.max() <= 1e-5 and info.iterations.min() >= 1


@EACH_BACKEND
@pytest.mark.parametrize("page_size", [None, 8])
def test_out_and_workspace(page_size, backend):
    p = make_decode_problem(page_size=page_size, queries=2, dtype=torch.float16)
    arguments = p.arguments() | dict(backend=backend)
    workspace = lla_decode_workspace(
        p.q, p.k_cache, p.v_cache, block_table=p.block_table, window_size=None, backend=backend
    )
    assert workspace.dtype == torch.float32 and workspace.dim() == 1 and workspace.is_contiguous()
    expected = lla_decode(**arguments)
    for fill in (torch.nan, 1e4, -1.0):
        out = torch.full_like(p.q, fill)
        given = dict(out=out, workspace=workspace.fill_(fill))
        assert lla_decode(**arguments, **given) is out and torch.equal(out, expected)
        result, info = lla_decode(**arguments, **given, return_info=True)
        assert result is out and info.residual.isfinite().all()


@pytest.mark.parametrize("batch, capacity, pages", [(0, 8, None), (2, 0, None), (2, 0, 0), (0, 16, 2)], ids=str)
@pytest.mark.parametrize("give_out", [False, True])
def test_nothing_to_compute(batch, capacity, pages, give_out):
    q = torch.randn(batch, 4, 2, 8)
    shape = (batch, 2, capacity) if pages is None else (3, 8, 2)
    k, v = torch.randn(*shape, 8), torch.randn(*shape, 5)
    table = None if pages is None else torch.zeros(batch, pages, dtype=torch.int32)
    out = torch.full((batch, 4, 2, 5), torch.nan) if give_out else None
    seqlens = torch.zeros(batch, dtype=torch.int32)
    result, info = lla_decode(q, k, v, seqlens=seqlens, block_table=table, out=out, return_info=True)
    assert result.shape == (batch, 4, 2, 5) and result.eq(0).all() and info.iterations.shape == (batch, 4, 2)
    assert out is None or result is out
    assert lla_decode_workspace(q, k, v, block_table=table).shape == (0,)


def ints(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int32} | options)


Q, K, PAGES = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 12, 8), torch.randn(6, 4, 2, 8)
TABLE = ints([0, 1, 2], [3, 4, 5])
PAGED = dict(k_cache=PAGES, v_cache=PAGES, block_table=TABLE)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "q must be a torch.Tensor, got list", dict(q=[1.0])),
        (TypeError, "k_cache must be a torch.Tensor, got NoneType", dict(k_cache=None)),
        (NotImplementedError, "v_cache must be a dense tensor", dict(v_cache=K.to_sparse())),
        (TypeError, "q must have dtype float16, .*, got int32", dict(q=Q.int())),
        (TypeError, "q, k_cache and v_cache must have one dtype, got q float32 and v_cache f", dict(v_cache=K.half())),
        (ValueError, "one device, got q on cpu and k_cache on meta", dict(k_cache=K.to("meta"))),
        (ValueError, r"q must be 4-D \(batch, heads, new tokens, head_dim\), got shape \(4, 1, 8\)", dict(q=Q[0])),
        (ValueError, r"k_cache must be 4-D \(batch, heads, slots, head_dim\)", dict(k_cache=K[0])),
        (ValueError, r"v_cache must be 4-D \(pages, page_size, heads, head_dim\)", PAGED | dict(v_cache=PAGES[0])),
        (ValueError, "q must have 1 to 16 new tokens, got 17", dict(q=Q.expand(2, 4, 17, 8))),
        (ValueError, "q must have 1 to 16 new tokens, got 0", dict(q=Q[:, :, :0])),
        (ValueError, "q and k_cache must have one head_dim, got q 8 and k_cache 7", dict(k_cache=K[..., :7])),
        (ValueError, "k_cache and v_cache must have the same heads", dict(v_cache=K[:, :1])),
        (ValueError, "k_cache and v_cache must have the same slots, got 12 and 11", dict(v_cache=K[:, :, :11])),
        (ValueError, "k_cache and v_cache must have the same batch size, got 2 and 1", dict(v_cache=K[:1])),
        (ValueError, "q and k_cache must have one batch size, got 1 and 2", dict(q=Q[:1])),
        (ValueError, "multiple of the heads of k_cache .* got q 3 and k_cache 2", dict(q=Q[:, :3])),
        (ValueError, "k_cache and v_cache must have the same pages, got 6 and 5", PAGED | dict(v_cache=PAGES[:5])),
        (ValueError, "must have the same page_size, got 4 and 3", PAGED | dict(v_cache=PAGES[:, :3])),
        (ValueError, "at least one page", PAGED | dict(k_cache=PAGES[:0], v_cache=PAGES[:0])),
        (ValueError, "q must have a head_dim from 1 to 256, got 257", dict(q=torch.ones(2, 4, 1, 257))),
        (ValueError, "k_cache must have a last stride of 1, got", dict(k_cache=K.mT.contiguous().mT)),
        (ValueError, "v_cache must have a last stride of 1, got", PAGED | dict(v_cache=PAGES.mT.contiguous().mT)),
        (TypeError, "block_table must be an int32 tensor, got int64", PAGED | dict(block_table=TABLE.long())),
        (TypeError, "block_table must be an int32 tensor, got list", PAGED | dict(block_table=[[0]])),
        (ValueError, r"block_table must be .* batch 2, got shape \(1, 3\)", PAGED | dict(block_table=TABLE[:1])),
        (ValueError, r"block_table must be \(batch, .* got shape \(3,\)", PAGED | dict(block_table=TABLE[0])),
        (ValueError, "block_table must be on the device of q", PAGED | dict(block_table=TABLE.to("meta"))),
        (ValueError, "block_table must name pages from 0 to 5 .* got 6 for page 1 of sequence 0",
         PAGED | dict(block_table=ints([0, 6, 2], [3, 4, 5]))),
        (ValueError, "got -1 for page 0 of sequence 1",
         PAGED | dict(block_table=ints([0, -9, 9], [-1, 4, 5]), seqlens=ints(4, 12))),
        (TypeError, "seqlens must be an int32 tensor, got int64", dict(seqlens=torch.tensor([1, 2]))),
        (TypeError, "seqlens must be an int32 tensor, got list", dict(seqlens=[1, 2])),
        (ValueError, r"seqlens must have shape \(batch,\) = \(2,\), got \(3,\)", dict(seqlens=ints(1, 2, 3))),
        (ValueError, r"seqlens must have shape .*, got \(2, 1\)", dict(seqlens=ints([1], [2]))),
        (ValueError, "seqlens must be on the device of q", dict(seqlens=ints(1, 2, device="meta"))),
        (ValueError, r"seqlens must lie between 0 and the 12 slots .*, got \[1, 13\]", dict(seqlens=ints(1, 13))),
        (ValueError, r"seqlens must lie between 0 .*, got \[-1, 2\]", PAGED | dict(seqlens=ints(-1, 2))),
        (TypeError, "out must be a torch.Tensor, got bool", dict(out=True)),
        (ValueError, r"out must have shape \(2, 4, 1, 8\), got \(2, 4, 8\)", dict(out=torch.empty(2, 4, 8))),
        (TypeError, "out must have the dtype of q, float32, got float16", dict(out=torch.empty_like(Q).half())),
        (ValueError, "out must be on the device of q, got meta", dict(out=torch.empty_like(Q, device="meta"))),
        (ValueError, "out must have a last stride of 1", dict(out=torch.empty(2, 4, 8, 2)[..., :1].mT)),
        (TypeError, "workspace must be a float32 tensor, got float16", dict(workspace=torch.empty(9).half())),
        (TypeError, "workspace must be a float32 tensor, got int", dict(workspace=100)),
        (ValueError, "workspace must be on the device of q", dict(workspace=torch.empty(9, device="meta"))),
        (ValueError, "workspace must be 1-D and contiguous, got shape", dict(workspace=torch.empty(3, 3))),
        (ValueError, "workspace must be 1-D and contiguous, .* strides", dict(workspace=torch.empty(99)[::2])),
        (TypeError, "ridge must be a number or a tensor, got str", dict(ridge="1")),
        (ValueError, "ridge must be positive and finite, got 0.0", dict(ridge=0)),
        (ValueError, "ridge must be positive and finite", dict(ridge=torch.tensor(-1.0))),
        (ValueError, r"ridge must broadcast to .* got shape \(3,\)", dict(ridge=torch.ones(3))),
        (ValueError, r"scale must be a 0-dim tensor, got shape \(4,\)", dict(scale=torch.ones(4))),
        (ValueError, "window_size must be an integer >= 1, got 0", dict(window_size=0)),
        (ValueError, "precision must be one of fast, accurate, got 'exact'", dict(precision="exact")),
        (ValueError, "backend must name triton, cuda, eager, got 'cudnn'", dict(backend="cudnn")),
        (NotImplementedError, "lla_decode has no gradient, but q requires one: .*no_grad",
         dict(q=Q.clone().requires_grad_())),
        (NotImplementedError, "but v_cache requires one", dict(v_cache=K.clone().requires_grad_())),
        (NotImplementedError, "but ridge requires one", dict(ridge=torch.tensor(1.0, requires_grad=True))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_wrong_arguments(error, message, changes):
    good = dict(q=Q, k_cache=K, v_cache=K)
    lla_decode(**good)  # a remembered call must not let a wrong argument through
    lla_decode(**good | PAGED)
    for _ in range(2):
        with pytest.raises(error, match=message):
            lla_decode(**good | changes)


def test_a_workspace_that_is_too_small_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", {"eager": FakeBackend("eager")})
    assert lla_decode_workspace(Q, K, K).shape == (12,)
    lla_decode(Q, K, K, workspace=torch.empty(13))
    with pytest.raises(ValueError, match="at least 12 elements for this call, got 11; lla_decode_workspace or parallax_decode_workspace makes one"):
        lla_decode(Q, K, K, workspace=torch.empty(11))


def test_no_gradient_is_needed_under_no_grad():
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        assert not lla_decode(q, K, K).requires_grad
    with torch.inference_mode():
        lla_decode(q, K, K)


def test_autocast_changes_nothing():
    expected = lla_decode(Q, K, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lla_decode(Q, K, K), expected)


def test_a_step_is_planned_once_whatever_the_lengths(monkeypatch):
    fake, lookup = FakeBackend("eager"), lookup_in()
    monkeypatch.setattr(dispatch, "BACKENDS", {"eager": fake})
    monkeypatch.setattr(dispatch, "lookup", lookup)
    clear_cache()
    lla_decode_workspace(Q, K, K)
    for length in (1, 5, 12):
        lla_decode(Q, K, K, ridge=0.1 * length, seqlens=ints(length, length), out=torch.empty_like(Q))
    lla_decode(Q, K, K)
    assert len(fake.bound) == len(lookup.queries) == 1
    lla_decode(Q, K, K, window_size=3)
    lla_decode(Q, **PAGED)
    lla_decode(Q, **PAGED | dict(block_table=TABLE[:, :2]))
    lla_attention(Q, K[:, :, :1], K[:, :, :1])
    assert [p.spec.seqlen_k for p in fake.bound] == [12, 12, 12, 8, 1]
    assert [p.spec.page_size for p in fake.bound] == [None, None, 4, 4, None]
    inputs, wanted = fake.calls[-2]
    assert wanted == ("out",) and inputs["seqlens"] is None and inputs["k"].shape == (6, 2, 4, 8)
    assert inputs["k"].data_ptr() == PAGES.data_ptr() and inputs["block_table"].shape == (2, 2)


def test_plan_explains_a_step():
    text = str(plan(Q, K, K, seqlens=ints(1, 2), phase="decode", window_size=5))
    assert "eager, schedule gram" in text and "num_splits 1" in text and "window 5" in text
    spec = LLASpec.decoding("bfloat16", 128, 16384, 256, 64)
    assert plan(Q, PAGES, PAGES, block_table=TABLE, phase="decode").spec.page_size == 4
    given = plan(spec, device="cpu")
    config = KernelConfig("triton", "gram", 1, 64, 32, 4, 2, num_splits=8, block_d=64)
    given = replace(given, device=resolve("h200"), config=config)
    lines = dict(line.split(maxsplit=1) for line in str(given).splitlines())
    assert "num_splits 8, block_d 64" in lines["tile"] and "128 x 128" in lines["pass"] and "128 x 64" in lines["pass"]
    pairs, cache = 256 * 16384, 256 * 16384 * (128 + 64) * 2
    assert given.flops == (2 * pairs * 128 * (1 + 128 + 64), 2 * 256 * 128 * 128)
    assert given.cache_bytes == cache and f"{cache / 1e9:.3g} GB" in lines["cache"]
    assert f"{cache / given.device.bandwidth_gbs / 1e3:.3g} us at" in lines["cache"]
    assert len(lines) <= 12


@pytest.mark.parametrize("fields", [dict(), dict(lengths=None), dict(page_size=8, window_size=5, queries=3)], ids=str)
def test_eager_reads_nothing_back(fields):
    """Tensors without data stand for those of a device: to look at a value is an error."""
    p = make_decode_problem(**fields)
    executable = backends.get("eager").bind(decode_plan(p, num_splits=2, block_k=8))
    inputs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in p.inputs().items()}
    assert executable._compute(inputs)["out"].shape == p.q.shape
    with pytest.raises(RuntimeError):
        bool(inputs["q"].sum() > 0)


def test_eager_limits():
    spec = make_decode_problem(head_dim=256, capacity=4096, batch=3).spec()
    backend = backends.get("eager")
    config = backend.default_config(spec, CPU)
    assert backend.infeasible(spec, config, CPU) is None
    assert "the schedule gram only" in backend.infeasible(spec, replace(config, schedule="fused"), CPU)
    large = LLASpec.decoding("bfloat16", 16, 65536, 65536)
    default = backend.default_config(large, CPU)
    assert default.block_k < config.block_k and backend.infeasible(large, default, CPU) is None
    assert "the weighted keys of a block need" in backend.infeasible(large, replace(default, block_k=4096), CPU)
    forward = LLASpec.self_attention("float32", 16, 32, 2)
    assert "is for decoding" in backend.infeasible(forward, config, CPU)
    assert backend.search_space(spec, CPU).keys() >= {"schedule", "block_k", "num_splits"}
    assert decode_plan(make_decode_problem()).config.schedule == "gram"


OPTIONS = (None, "accurate", None, None, None)


@pytest.mark.parametrize("name", ["decode", "decode_info"])
@pytest.mark.parametrize("fields", [dict(), dict(lengths=None), dict(page_size=8, queries=3, head_dim_v=5)], ids=str)
@pytest.mark.parametrize("tensors", [False, True])
def test_opcheck(name, fields, tensors):
    p = make_decode_problem(**fields)
    rest = (None, torch.full((2, 1), 0.5), None, torch.tensor(0.3)) if tensors else (0.5, None, None, None)
    args = (p.q, p.k_cache, p.v_cache, *rest, p.seqlens, p.block_table, *OPTIONS)
    torch.library.opcheck(getattr(torch.ops.lla_compile, name).default, args)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("page_size", [None, 8])
def test_compiles_without_a_graph_break(compiler, page_size):
    p = make_decode_problem(page_size=page_size, queries=2)

    def step(q, k_cache, v_cache, ridge, seqlens, out):
        result, info = lla_decode(
            q * 2, k_cache, v_cache, ridge, seqlens=seqlens, block_table=p.block_table, return_info=True, out=out
        )
        return result + 1, info.iterations

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for out, other in ((None, None), (torch.empty_like(p.q), torch.empty_like(p.q))):
            args = p.q, p.k_cache, p.v_cache, torch.full((2, 1), 0.5), p.seqlens
            expected, got = step(*args, out), compiled(*args, other)
            torch.testing.assert_close(got, expected)
            assert out is None or torch.equal(out, other)


@pytest.mark.usefixtures("fresh_compiler")
def test_wrong_shapes_are_refused_while_compiling():
    step = torch.compile(lambda q, k, out: lla_decode(q, k, k, out=out), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with pytest.raises(Exception, match="q and k_cache must have one head_dim, got q 8 and k_cache 7"):
            step(Q, K[..., :7], None)
        with pytest.raises(Exception, match="out must have shape"):
            step(Q, K, torch.empty(1, 2, 4, 1, 8))


def test_fake_tensors_give_shapes():
    with FakeTensorMode(), torch.no_grad():
        q, pages = torch.empty(2, 6, 3, 16, dtype=torch.bfloat16), torch.empty(9, 16, 2, 16, dtype=torch.bfloat16)
        table = torch.empty(2, 4, dtype=torch.int32)
        out, info = lla_decode(q, pages, pages[..., :5], block_table=table, return_info=True)
    assert out.shape == (2, 6, 3, 5) and out.dtype == torch.bfloat16
    assert info.iterations.shape == info.residual.shape == (2, 6, 3)


def test_examples_in_docstrings():
    torch.manual_seed(0)
    results = doctest.testmod(decode_module)
    assert results.attempted >= 8 and results.failed == 0
