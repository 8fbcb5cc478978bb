"""Decoding plans bound to their kernels: what the schedules share, from the arguments of a call to the launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple

import torch

from lla_compile.backends.scalars import scalars_of
from lla_compile.lowering import lower
from lla_compile.storage import layout

if TYPE_CHECKING:
    from lla_compile.plans import Plan

# Pointers that a call may go without; kernels are compiled for those that are there.
OPTIONAL_POINTERS = ("seqlens_ptr", "block_table_ptr", "scale_ptr", "ridge_ptr", "iterations_ptr", "final_residual_ptr")


class Launch(NamedTuple):
    """A kernel on its grid, and the names of its arguments in order; ``constants`` follow them."""

    runner: Callable
    parameters: tuple[str, ...]
    constants: tuple


def ordinary_absences(paged: bool) -> list[frozenset[str]]:
    """The pointers that are None in ordinary calls: with lengths and, unless the cache is paged, without."""
    unused = frozenset(OPTIONAL_POINTERS) - {"seqlens_ptr", *(("block_table_ptr",) if paged else ())}
    return [unused, unused | {"seqlens_ptr"}]


class DecodeLauncher:
    """Executable of one schedule; see :class:`lla_compile.backends.Executable`."""

    workspace_numel = 0

    def __init__(self, plan: Plan):
        self._plan = plan
        self._stride_elements = 16 // getattr(torch, plan.spec.dtype).itemsize
        self._bound: dict[tuple, list[Launch]] = {}

    def __call__(self, inputs, wanted):
        plan, spec = self._plan, self._plan.spec
        q, k, v = (inputs[name] for name in "qkv")
        ridge_ptr, ridge, ridge_strides, scale_ptr, scale = scalars_of(inputs)
        program = lower(spec.op, spec.phase)
        results = {
            name: inputs[name]
            if name in inputs
            else layout(program, name, q, k, v, spec.precision, packed=False).empty(q)
            for name in wanted
        }
        table, own = inputs.get("block_table"), self._own_arguments(inputs)
        arguments = {
            "seqlens_ptr": inputs["seqlens"],
            "block_table_ptr": table,
            "scale_ptr": scale_ptr,
            "ridge_ptr": ridge_ptr,
            "iterations_ptr": results.get("iterations"),
            "final_residual_ptr": results.get("final_residual"),
            "scale": scale,
            "ridge": ridge,
            "table_stride": 0 if table is None else table.stride(0),
            "num_heads": spec.num_heads,
            "num_kv_heads": spec.num_kv_heads,
            "group_size": spec.group_size,
            "seqlen_q": spec.seqlen_q,
            "capacity": spec.seqlen_k,
            "window": spec.window_size or 0,
            **{name: float(getattr(plan, name)) for name in program.scalars},
            **own,
        }
        aligned = all(x.data_ptr() % 16 == 0 for x in own.values() if isinstance(x, torch.Tensor))
        tensors = {name: inputs[name] for name in (*program.row_inputs, *program.col_inputs)} | {"out": results["out"]}
        for name, x in tensors.items():
            arguments[f"{name}_ptr"] = x
            strides = x.stride()[:3]
            aligned = aligned and x.data_ptr() % 16 == 0 and all(s % self._stride_elements == 0 for s in strides)
            arguments |= zip((f"{name}_stride_b", f"{name}_stride_h", f"{name}_stride_n"), strides)
        arguments |= zip(("ridge_stride_b", "ridge_stride_h", "ridge_stride_n"), ridge_strides)
        absent = frozenset(name for name in OPTIONAL_POINTERS if arguments[name] is None)
        launches = self._bound.get((absent, aligned))
        if launches is None:
            launches = self._bound[absent, aligned] = self._bind(absent, aligned)
        for runner, parameters, constants in launches:
            runner(*[arguments[name] for name in parameters], *constants)
        return results

    def _own_arguments(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """What only the kernels of this schedule take."""
        return {}

    def _bind(self, absent: frozenset[str], aligned: bool) -> list[Launch]:
        """The kernels, compiled for calls without the pointers ``absent``, in order."""
        raise NotImplementedError
