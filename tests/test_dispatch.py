import builtins
import logging
import os
import statistics
import threading
import time
from dataclasses import replace

import pytest
import torch
from fakes import FakeBackend, entry_of, lookup_in
from problems import CPU

from lla_compile import clear_cache, devices, dispatch, lla_attention, lla_attention_varlen
from lla_compile.lowering import INFO, SAVED
from lla_compile.planner import TuningMiss

# Microseconds for checks and look-up of a repeated call: several times what a busy machine takes.
OVERHEAD_LIMIT_US = 60.0


@pytest.fixture
def eager(monkeypatch):
    """A fake in place of the eager backend, beside a fake "triton"; an empty database and a clean environment."""
    fakes = {"triton": FakeBackend("triton"), "eager": FakeBackend("eager")}
    for name in ("BACKENDS", "STRICT", "DEBUG"):
        monkeypatch.delenv(f"LLA_COMPILE_{name}", raising=False)
    monkeypatch.setattr(dispatch, "BACKENDS", fakes)
    monkeypatch.setattr(dispatch, "lookup", lookup_in())
    clear_cache()
    yield fakes["eager"]
    clear_cache()


def tensors(batch=1, heads=2, seqlen=8, head_dim=4, **options):
    return [torch.randn(batch, heads, seqlen, head_dim, **options) for _ in range(3)]


def test_second_call_neither_plans_nor_binds(eager):
    q, k, v = tensors()
    lla_attention(q, k, v)
    lla_attention(k.clone(), v, q, ridge=3.0, scale=0.1)
    assert len(eager.bound) == 1 and len(dispatch.lookup.queries) == 1 and len(eager.calls) == 2


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=False),
        dict(window_size=3),
        dict(precision="fast"),
        dict(cg_tol=0.1),
        dict(cg_max_iters=3),
        dict(backend="eager"),
    ],
)
def test_options_that_decide_the_plan_are_part_of_the_memo(eager, options):
    q, k, v = tensors()
    lla_attention(q, k, v)
    lla_attention(q, k, v, **options)
    assert len(eager.bound) == 2


def test_shapes_and_dtypes_are_part_of_the_memo(eager):
    lla_attention(*tensors())
    lla_attention(*tensors(seqlen=9))
    lla_attention(*tensors(dtype=torch.float16))
    q, k, v = tensors()
    lla_attention(q, k, v[..., :2])
    assert [plan.spec.seqlen_q for plan in eager.bound] == [8, 9, 8, 8]
    assert [plan.spec.dtype for plan in eager.bound] == ["float32", "float32", "float16", "float32"]
    assert eager.bound[3].spec.head_dim_v == 2


def test_second_call_touches_no_file(eager, monkeypatch):
    q, k, v = tensors()
    lla_attention(q, k, v)

    def refuse(*args, **kwargs):
        raise AssertionError("a file was touched")

    for module, name in ((builtins, "open"), (os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, refuse)
    lla_attention(q, k, v)
    monkeypatch.undo()


def test_environment_is_read_once_until_cleared(eager, monkeypatch):
    q, k, v = tensors()
    lla_attention(q, k, v)
    monkeypatch.setenv("LLA_COMPILE_STRICT", "1")
    lla_attention(*tensors(seqlen=9))
    clear_cache()
    with pytest.raises(TuningMiss, match="python -m lla_compile.tune --gpu cpu .*--seqlen 8 --batch-heads 2"):
        lla_attention(q, k, v)
    monkeypatch.setattr(dispatch, "lookup", lookup_in(entry_of("eager")))
    lla_attention(q, k, v)
    assert eager.bound[-1].config.block_q == 128


def test_allowed_backends_come_from_the_environment(eager, monkeypatch):
    monkeypatch.setenv("LLA_COMPILE_BACKENDS", "triton, ")
    with pytest.raises(NotImplementedError, match="LLA_COMPILE_BACKENDS=triton leaves it out"):
        lla_attention(*tensors())
    clear_cache()
    monkeypatch.setenv("LLA_COMPILE_BACKENDS", "triton,eager")
    lla_attention(*tensors())
    assert len(eager.bound) == 1


def test_a_failed_call_is_not_remembered(eager, monkeypatch):
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(ValueError, match="precision"):
            lla_attention(q, k, v, precision="exact")
    with pytest.raises(ValueError, match="backend must name"):
        lla_attention(q, k, v, backend=["eager"])
    assert not eager.bound


def test_a_miss_is_logged_once(eager, caplog):
    caplog.set_level(logging.INFO, "lla_compile")
    for seqlen in (8, 9, 100):
        lla_attention(*tensors(seqlen=seqlen))
    assert len(caplog.records) == 1 and "python -m lla_compile.tune" in caplog.text


def test_memo_is_bounded(eager, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_CALLS", 3)
    for seqlen in (1, 2, 3, 4):
        lla_attention(*tensors(seqlen=seqlen))
    lla_attention(*tensors(seqlen=4))
    assert len(eager.bound) == 4 and len(dispatch._calls) == 3
    lla_attention(*tensors(seqlen=1))
    assert len(eager.bound) == 5


def test_threads_bind_once(eager):
    q, k, v = tensors()
    bind, barrier, failures = eager.bind, threading.Barrier(6), []

    def slow_bind(plan):
        time.sleep(0.05)
        return bind(plan)

    eager.bind = slow_bind

    def work():
        try:
            barrier.wait()
            lla_attention(q, k, v)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(eager.bound) == 1 and len(eager.calls) == 6


def test_only_a_last_stride_other_than_one_is_copied(eager):
    q, k, v = tensors(seqlen=4)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    v = v[..., :1].expand(-1, -1, -1, 4)
    lla_attention(q, k, v)
    got, _ = eager.calls[0]
    assert got["q"] is q
    assert got["k"].stride(3) == 1 and got["k"].equal(k)
    assert got["v"].stride(3) == 1 and got["v"].equal(v)


def test_ridge_and_scale_reach_the_backend(eager):
    q, k, v = tensors(batch=2, heads=3)
    lla_attention(q, k, v)
    inputs, wanted = eager.calls[-1]
    assert (inputs["ridge"], inputs["scale"], wanted) == (1.0, 0.5, ("out",))
    lla_attention(q, k, v, 2, scale=1)
    inputs, _ = eager.calls[-1]
    assert (inputs["ridge"], inputs["scale"]) == (2.0, 1.0) and isinstance(inputs["ridge"], float)
    ridge, scale = torch.rand(3, 1) + 0.1, torch.tensor(0.3)
    lla_attention(q, k, v, ridge, scale=scale)
    inputs, _ = eager.calls[-1]
    assert inputs["ridge"].shape == (2, 3, 8) and inputs["ridge"].equal(ridge.expand(2, 3, 8))
    assert inputs["scale"] is scale


def test_only_what_is_wanted_is_asked_of_the_backend(eager):
    q, k, v = tensors()
    lla_attention(q, k, v, return_info=True)
    assert eager.calls[-1][1] == ("out", *INFO)
    out = lla_attention(q, k, v.requires_grad_())
    assert set(eager.calls[-1][1]) == {"out", *SAVED, *INFO}
    out.sum().backward()
    inputs, wanted = eager.calls[-1]
    assert wanted == ("dv",) and {"grad_out", *SAVED} <= inputs.keys()
    with torch.no_grad():
        lla_attention(q, k, v)
    assert eager.calls[-1][1] == ("out",)


def test_the_backward_pass_has_a_plan_of_its_own(eager):
    q, k, v = tensors()
    for _ in range(2):
        lla_attention(q.requires_grad_(), k, v, cg_max_iters=5).sum().backward()
    assert [plan.spec.phase for plan in eager.bound] == ["forward", "backward"]
    assert eager.bound[1].spec.cg_max_iters == 5 and len(eager.calls) == 4


def test_packed_sequences_reach_the_backend(eager):
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    ends = torch.tensor([0, 4, 4, 9, 0, 0], dtype=torch.int32)[:4]
    lla_attention_varlen(q, k, v, ends, ends)
    other = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    lla_attention_varlen(q, k, v, other, ends)
    assert len(eager.bound) == 1 and eager.bound[0].spec.num_sequences == 3
    inputs, _ = eager.calls[-1]
    assert inputs["cu_seqlens_q"].equal(other) and inputs["cu_seqlens_k"].equal(ends)
    assert inputs["q"].shape == (1, 2, 9, 4) and inputs["q"].data_ptr() == q.data_ptr()
    lla_attention_varlen(q, k, v, ends[[0, 3]], ends[[0, 3]])
    lla_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    assert [plan.spec.num_sequences for plan in eager.bound] == [3, 1, None]


def no_backward(spec):
    return "it has no backward pass" if spec.phase == "backward" else None


@pytest.mark.parametrize("needs", ["q", "k", "v", "ridge", "scale"])
def test_a_named_backend_without_a_backward_pass_leaves_it_to_another(eager, needs):
    dispatch.BACKENDS["triton"].refuses = no_backward
    q, k, v = tensors()
    arguments = dict(q=q, k=k, v=v, ridge=torch.tensor(1.0), scale=torch.tensor(1.0))
    arguments[needs].requires_grad_()
    lla_attention(**arguments, backend="triton").sum().backward()
    assert arguments[needs].grad.eq(0).all()
    (bound,) = eager.bound
    assert bound.spec.phase == "backward" and "triton is not used: it has no backward pass" in str(bound)


def test_passes_may_run_on_different_backends(eager, monkeypatch):
    """The layout of what is saved is the same for all of them."""
    dispatch.BACKENDS["triton"].refuses = no_backward
    monkeypatch.setattr(devices, "identify", lambda device: replace(CPU, vendor="nvidia", compute_capability="9.0"))
    lla_attention(*(x.requires_grad_() for x in tensors())).sum().backward()
    assert [plan.spec.phase for plan in dispatch.BACKENDS["triton"].bound] == ["forward"]
    assert [plan.spec.phase for plan in eager.bound] == ["backward"]


def test_a_device_that_is_not_current_is_made_current(eager, monkeypatch):
    q, k, v = tensors()
    lla_attention(q, k, v)
    (key, call), current = next(iter(dispatch._calls.items())), []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    dispatch._calls[key] = call._replace(device_index=0)
    lla_attention(q, k, v)
    assert current == []
    dispatch._calls[key] = call._replace(device_index=1)
    lla_attention(q, k, v)
    assert current == [1, "left"]


def test_host_overhead_of_a_repeated_call(eager, record_property):
    q, k, v = tensors()
    lla_attention(q, k, v)
    executable = next(iter(dispatch._calls.values())).executable
    inputs, _ = eager.calls[-1]

    def microseconds(call, repeats=300):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats * 1e6

    both = [
        (microseconds(lambda: lla_attention(q, k, v)), microseconds(lambda: executable(inputs, ("out",))))
        for _ in range(15)
    ]
    overhead = statistics.median(a - b for a, b in both)
    record_property("overhead_us", overhead)
    print(f"dispatch overhead: {overhead:.1f} us")
    assert overhead < OVERHEAD_LIMIT_US
