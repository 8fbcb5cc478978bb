"""The run-time path of one call: arguments -> spec -> plan -> bound executable, remembered by a cheap key."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from lla_compile import arguments, backends, planner
from lla_compile.plans import Plan
from lla_compile.spec import LLASpec, check_ridge

# Enough for every layer and length of a long-running server, small enough that lengths which never come back go.
MAX_CALLS = 4096
_DIFFERENTIABLE = ("eager",)


class Call(NamedTuple):
    """What a second call with the same shapes, types and options needs.

    Attributes:
        plan: what runs.
        executable: the bound plan.
        scale: the default scale.
        device_index: the CUDA device to make current, or None where there is no choice.
    """

    plan: Plan
    executable: backends.Executable
    scale: float
    device_index: int | None


class Settings(NamedTuple):
    """The environment, as read at first use."""

    allowed: tuple[str, ...] | None
    strict: bool
    debug: bool


_calls: dict[tuple, Call] = {}
_lock = threading.RLock()


@lru_cache(maxsize=None)
def settings() -> Settings:
    """LLA_COMPILE_BACKENDS, LLA_COMPILE_STRICT and LLA_COMPILE_DEBUG, read once until :func:`clear_cache`."""
    names = [name.strip() for name in os.environ.get("LLA_COMPILE_BACKENDS", "").split(",")]
    return Settings(
        allowed=tuple(name for name in names if name) or None,
        strict=_flag("LLA_COMPILE_STRICT"),
        debug=_flag("LLA_COMPILE_DEBUG"),
    )


def forward(
    q, k, v, ridge, scale, is_causal, window_size, precision, cg_tol, cg_max_iters, backend, return_info
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run ``lla_attention`` (see there for arguments and errors) on concrete tensors.

    Returns:
        Output (B, Hq, N, Dv), iterations (B, Hq, N) int32 and residual (B, Hq, N) float32; None for the last two
        unless ``return_info``.
    """
    call = None
    try:
        # Everything that decides the plan or that the checks look at, but for values of ridge and scale.
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, is_causal, window_size, precision, cg_tol, cg_max_iters, backend,
        )  # fmt: skip
        call = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensor, unhashable, nested: the checks name it
        key = None
    if call is None:
        spec = arguments.spec_of(q, k, v, is_causal, window_size, precision, cg_tol, cg_max_iters)
        call = _prepare(key, spec, q.device, backend)

    if ridge.__class__ is float:
        check_ridge(ridge)
    elif isinstance(ridge, torch.Tensor):
        ridge = arguments.ridge_rows(ridge, q, settings().debug)
    else:
        ridge = arguments.ridge_number(ridge)
    if scale is None:
        scale = call.scale
    elif isinstance(scale, torch.Tensor):
        arguments.check_scale_tensor(scale, q)
    else:
        scale = arguments.scale_number(scale)
    if torch.is_grad_enabled():
        _check_gradients(call.plan.config.backend, q, k, v, ridge, scale)

    # A size-1 axis passes for contiguous whatever its stride, and then only its element 0 is read.
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    if v.stride(3) != 1:
        v = v.contiguous()
    if call.device_index is None or call.device_index == torch.cuda.current_device():
        return call.executable(q, k, v, ridge, scale, return_info)
    with torch.cuda.device(call.device_index):
        return call.executable(q, k, v, ridge, scale, return_info)


def make_plan(spec: LLASpec, device, backend: str | None = None) -> Plan:
    """Plan ``spec`` for a ``DeviceInfo`` with the installed backends, the tuning database and the environment.

    Raises: as :func:`lla_compile.planner.make_plan`.
    """
    env = settings()
    return planner.make_plan(spec, device, BACKENDS, lookup, backend=backend, allowed=env.allowed, strict=env.strict)


def lookup(*args, **kwargs):
    """``tuning_db.lookup``, imported late: it brings a YAML reader, which ``import lla_compile`` must not."""
    from lla_compile.tuning_db import lookup as find

    return find(*args, **kwargs)


def clear_cache() -> None:
    """Forget every plan, executable and database file and the LLA_COMPILE_* environment: the next call starts afresh.

    Needed after a change of the environment or of the tuning database in a running process.
    """
    from lla_compile import tuning_db

    with _lock:
        _calls.clear()
        settings.cache_clear()
        planner.forget_reports()
        tuning_db.clear_cache()


def _prepare(key, spec: LLASpec, device: torch.device, backend: str | None) -> Call:
    """Plan and bind a call, and remember it. One thread at a time, so that nothing is compiled twice."""
    from lla_compile import devices

    with _lock:
        if key in _calls:
            return _calls[key]
        plan = make_plan(spec, devices.identify(device), backend)
        planner.report_miss(plan)
        empty = spec.visible_pairs == 0 or device.type == "meta"
        choice = device.type == "cuda" and torch.cuda.device_count() > 1
        call = Call(
            plan=plan,
            executable=_zeros if empty else BACKENDS[plan.config.backend].bind(plan),
            scale=spec.head_dim**-0.5,
            device_index=device.index if choice else None,
        )
        while len(_calls) >= MAX_CALLS:
            _calls.pop(next(iter(_calls)))
        if key is not None:
            _calls[key] = call
        return call


def _zeros(q, k, v, ridge, scale, return_info):
    """The executable where there is nothing to compute: no queries, no keys, or no data at all (meta tensors)."""
    batch, heads, seqlen, _ = q.shape
    # The sum over an empty tensor is 0; it keeps the output in the autograd graph.
    out = q.new_zeros(batch, heads, seqlen, v.shape[3]) + (q if q.numel() == 0 else k).sum()
    if not return_info:
        return out, None, None
    rows = (batch, heads, seqlen)
    return out, q.new_zeros(rows, dtype=torch.int32), q.new_zeros(rows, dtype=torch.float32)


def _check_gradients(backend: str, q, k, v, ridge, scale) -> None:
    if backend in _DIFFERENTIABLE:
        return
    for name, x in (("q", q), ("k", k), ("v", v), ("ridge", ridge), ("scale", scale)):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise NotImplementedError(
                f"{name} requires a gradient, and backend {backend!r} has no backward pass yet: "
                f"call under torch.no_grad(), or pass backend='eager'"
            )


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


class _Installed(Mapping):
    """The backends of this installation; one is imported when it is first asked for."""

    def __getitem__(self, name: str) -> backends.Backend:
        if name not in backends.NAMES:
            raise KeyError(name)
        return backends.get(name)

    def __iter__(self):
        return iter(backends.NAMES)

    def __len__(self) -> int:
        return len(backends.NAMES)

    def __contains__(self, name) -> bool:  # Mapping's own would import the backend to see
        return name in backends.NAMES


BACKENDS = _Installed()
