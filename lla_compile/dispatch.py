"""The run-time path of one call: arguments -> spec -> plan -> bound executable, remembered by a cheap key."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from lla_compile import arguments, backends, decode_arguments, planner, storage
from lla_compile.arguments import Options
from lla_compile.lowering import lower
from lla_compile.plans import Plan
from lla_compile.spec import LLASpec, check_ridge

# Enough for every layer and length of a long-running server, small enough that lengths which never come back go.
MAX_CALLS = 4096


class Inputs(NamedTuple):
    """The tensors of a call that both passes see.

    Attributes:
        q, k, v: (B, H, length, width); packed sequences as (1, H, total, width).
        ridge: a number, or a tensor that broadcasts to (B, Hq, N); None unless the operator solves.
        scale: None, a number or a 0-dim tensor.
        cu_seqlens_q, cu_seqlens_k: None, or where packed sequences start and end, int32.
        r: the given probe of op "parallax", in the shape of q; None for the others.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ridge: float | torch.Tensor | None
    scale: float | torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    r: torch.Tensor | None = None


class DecodeInputs(NamedTuple):
    """The tensors of a decoding step, as :func:`lla_compile.lla_decode` takes them; ``ridge`` and ``r`` as in Inputs."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    ridge: float | torch.Tensor | None
    scale: float | torch.Tensor | None
    seqlens: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    out: torch.Tensor | None = None
    workspace: torch.Tensor | None = None
    r: torch.Tensor | None = None


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


def run(
    phase: str,
    inputs: Inputs,
    options: Options,
    wanted: tuple[str, ...],
    given: Mapping[str, torch.Tensor] | None = None,
) -> Mapping[str, torch.Tensor]:
    """Run one phase of the operator on concrete tensors.

    Args:
        phase: "forward" or "backward".
        inputs, options: see :func:`lla_compile.lla_attention` for meaning and errors.
        wanted: outputs of the phase's sweeps.
        given: what else the phase reads: ``grad_out`` and what the forward pass has left for it.

    Returns:
        The wanted outputs by name.
    """
    q, k, v, ridge, scale, cu_seqlens_q, cu_seqlens_k, r = inputs
    num_sequences = None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    call = None
    try:
        # Everything that decides the plan or that the checks look at, but for values of ridge and scale.
        key = (
            phase, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, options, num_sequences, _probe_key(r),
        )  # fmt: skip
        call = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensor, unhashable, nested: the checks name it
        key = None
    if call is None:
        spec = arguments.spec_of(q, k, v, options, num_sequences, phase, r)
        call = _prepare(key, spec, q.device, options.backend)

    # A size-1 axis passes for contiguous whatever its stride, and then only its element 0 is read.
    named = {
        "q": q if q.stride(3) == 1 else q.contiguous(),
        "k": k if k.stride(3) == 1 else k.contiguous(),
        "v": v if v.stride(3) == 1 else v.contiguous(),
        "scale": call.scale if scale is None else _scale(scale, q),
        **_own_inputs(call.plan.spec, ridge, r, q),
    }
    if num_sequences is not None:
        named |= _ends(cu_seqlens_q, cu_seqlens_k, q, k)
    if given is not None:
        named |= given
    return _launch(call, named, wanted)


def run_decode(inputs: DecodeInputs, options: Options, wanted: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
    """Run one decoding step on concrete tensors; arguments as :func:`run` has them, ``out`` is written if given."""
    q, k_cache, v_cache, ridge, scale, seqlens, block_table, out, workspace, r = inputs
    call = _decode_call(q, k_cache, v_cache, block_table, options, r)
    spec = call.plan.spec
    decode_arguments.check_strides(k_cache, v_cache)
    named = {
        "q": q if q.stride(3) == 1 else q.contiguous(),
        "k": k_cache,
        "v": v_cache,
        "seqlens": seqlens,
        "scale": call.scale if scale is None else _scale(scale, q),
        **_own_inputs(spec, ridge, r, q),
    }
    if block_table is not None:
        named |= {
            "k": decode_arguments.heads_first(k_cache, True),
            "v": decode_arguments.heads_first(v_cache, True),
            "block_table": block_table.contiguous(),
        }
    if seqlens is not None:
        decode_arguments.check_seqlens(seqlens, q)
        named["seqlens"] = seqlens.contiguous()
    if out is not None:
        decode_arguments.check_out(out, q, spec.head_dim_v)
        named["out"] = out
    if workspace is not None:
        decode_arguments.check_workspace(workspace, q, call.executable.workspace_numel)
        named["workspace"] = workspace
    if settings().debug or q.device.type == "cpu":
        decode_arguments.check_values(seqlens, block_table, k_cache.shape[0], spec)
    return _launch(call, named, wanted)


def decode_workspace_numel(q, k_cache, v_cache, block_table, options: Options) -> int:
    """How many float32 numbers a decoding step wants as a workspace."""
    return _decode_call(q, k_cache, v_cache, block_table, options).executable.workspace_numel


def _decode_call(q, k_cache, v_cache, block_table, options: Options, r=None) -> Call:
    call = None
    try:
        table = None if block_table is None else (block_table.shape, block_table.dtype, block_table.device)
        key = (
            "decode", q.shape, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype,
            q.device, k_cache.device, v_cache.device, q.layout, k_cache.layout, v_cache.layout, table, options, _probe_key(r),
        )  # fmt: skip
        call = _calls.get(key)
    except (AttributeError, TypeError, RuntimeError):  # as in run
        key = None
    if call is None:
        spec = decode_arguments.spec_of(q, k_cache, v_cache, block_table, options, r)
        call = _prepare(key, spec, q.device, options.backend)
    return call


def _probe_key(r) -> tuple | None:
    """What the checks look at of a given probe."""
    return None if r is None else (r.shape, r.dtype, r.device, r.layout)


def _own_inputs(spec: LLASpec, ridge, r, q: torch.Tensor) -> dict[str, float | torch.Tensor]:
    """The inputs that not every operator has, checked."""
    if spec.solves:
        return {"ridge": _ridge(ridge, q)}
    return {} if r is None else {"r": r if r.stride(3) == 1 else r.contiguous()}


def _ridge(ridge, q: torch.Tensor) -> float | torch.Tensor:
    """A checked ridge: a number, or a (B, Hq, N) view."""
    if ridge.__class__ is float:
        check_ridge(ridge)
        return ridge
    if isinstance(ridge, torch.Tensor):
        return arguments.ridge_rows(ridge, q, settings().debug)
    return arguments.ridge_number(ridge)


def _scale(scale, q: torch.Tensor) -> float | torch.Tensor:
    if isinstance(scale, torch.Tensor):
        arguments.check_scale_tensor(scale, q)
        return scale
    return arguments.scale_number(scale)


def _launch(call: Call, named: dict, wanted: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
    if call.device_index is None or call.device_index == torch.cuda.current_device():
        return call.executable(named, wanted)
    with torch.cuda.device(call.device_index):
        return call.executable(named, wanted)


def _ends(cu_seqlens_q, cu_seqlens_k, q, k) -> dict[str, torch.Tensor]:
    """Where packed sequences end; values are looked at where that is free, or asked for."""
    if settings().debug or q.device.type == "cpu":
        arguments.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[2])
        arguments.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[2])
    return {"cu_seqlens_q": cu_seqlens_q.contiguous(), "cu_seqlens_k": cu_seqlens_k.contiguous()}


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
        empty = spec.is_empty or device.type == "meta"
        choice = device.type == "cuda" and torch.cuda.device_count() > 1
        call = Call(
            plan=plan,
            executable=_Zeros(spec) if empty else BACKENDS[plan.config.backend].bind(plan),
            scale=spec.head_dim**-0.5,
            device_index=device.index if choice else None,
        )
        while len(_calls) >= MAX_CALLS:
            _calls.pop(next(iter(_calls)))
        if key is not None:
            _calls[key] = call
        return call


class _Zeros:
    """The executable where there is nothing to compute: no queries, no keys, or no data at all (meta tensors)."""

    workspace_numel = 0

    def __init__(self, spec: LLASpec):
        self._spec = spec

    def __call__(self, inputs, wanted):
        spec = self._spec
        program = lower(spec.op, spec.phase)
        tensors = inputs["q"], inputs["k"], inputs["v"]
        packed = spec.num_sequences is not None
        layouts = {name: storage.layout(program, name, *tensors, spec.precision, packed) for name in wanted}
        # Only "out" can be among the inputs: the caller's own.
        made = ((name, inputs[name] if name in inputs else layouts[name].empty(inputs["q"])) for name in wanted)
        return {name: x.zero_() for name, x in made}


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
