import builtins
import logging
import os
import statistics
import threading
import time

import pytest
import torch
from fakes import FakeBackend, entry_of, lookup_in

from lla_compile import clear_cache, dispatch, lla_attention
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
    got_q, got_k, got_v, *_ = eager.calls[0]
    assert got_q is q
    assert got_k.stride(3) == 1 and got_k.equal(k)
    assert got_v.stride(3) == 1 and got_v.equal(v)


def test_ridge_and_scale_reach_the_backend(eager):
    q, k, v = tensors(batch=2, heads=3)
    lla_attention(q, k, v)
    assert eager.calls[-1][3:] == (1.0, 0.5, False)
    lla_attention(q, k, v, 2, scale=1)
    assert eager.calls[-1][3:5] == (2.0, 1.0) and isinstance(eager.calls[-1][3], float)
    ridge, scale = torch.rand(3, 1) + 0.1, torch.tensor(0.3)
    lla_attention(q, k, v, ridge, scale=scale)
    got_ridge, got_scale = eager.calls[-1][3:5]
    assert got_ridge.shape == (2, 3, 8) and got_ridge.equal(ridge.expand(2, 3, 8)) and got_scale is scale


@pytest.mark.parametrize("needs", ["q", "k", "v", "ridge", "scale"])
def test_gradients_are_refused_where_there_is_no_backward(eager, needs):
    q, k, v = tensors()
    arguments = dict(q=q, k=k, v=v, ridge=torch.tensor(1.0), scale=torch.tensor(1.0))
    arguments[needs].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{needs} requires a gradient.*no_grad.*backend='eager'"):
        lla_attention(**arguments, backend="triton")
    with torch.no_grad():
        lla_attention(**arguments, backend="triton")
    lla_attention(**arguments, backend="eager")


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

    def microseconds(call, repeats=300):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats * 1e6

    both = [
        (microseconds(lambda: lla_attention(q, k, v)), microseconds(lambda: executable(q, k, v, 1.0, 0.5, False)))
        for _ in range(15)
    ]
    overhead = statistics.median(a - b for a, b in both)
    record_property("overhead_us", overhead)
    print(f"dispatch overhead: {overhead:.1f} us")
    assert overhead < OVERHEAD_LIMIT_US
