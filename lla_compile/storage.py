"""How results and the state that crosses the two passes lie in memory: one layout for every backend and for fakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lla_compile.expr import Kind
from lla_compile.precision import is_wide, split_terms

if TYPE_CHECKING:
    from lla_compile.sweeps import SweepList


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of state: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate(
    program: SweepList, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, precision: str, packed: bool
) -> torch.Tensor:
    """An uninitialised tensor for one output or state of ``program``, on the device of the query.

    A ROW is (B, Hq, N), a VECTOR (B, Hq, N, width); what is stored per key has the heads and the length of the key.
    ``rounded`` vectors lie as terms, (terms, B, Hq, N, D), in the input type. Results in the input type of packed
    sequences are (1, H, total, width) views of (total, H, width).

    Args:
        program: the sweeps that write or read it.
        name: which output, or which given or crossing state.
        q, k, v: the inputs, (B, H, length, width); only shapes, dtype and device are used.
        precision: the tier: how many terms there are and what is wide.
        packed: whether the inputs are packed sequences.
    """
    dtype_name = str(q.dtype).removeprefix("torch.")
    batch, heads, length = (k if name in program.key_outputs else q).shape[:3]
    width = v.shape[3] if name in program.value_wide else q.shape[3]
    stored = program.outputs.get(name, "float32")
    if program.kinds[name] is Kind.ROW:
        if stored == "int32":
            return q.new_empty((batch, heads, length), dtype=torch.int32)
        wide = name in program.wide and is_wide(dtype_name, precision)
        return q.new_empty((batch, heads, length), dtype=torch.float64 if wide else state_dtype(q.dtype))
    if name in program.rounded:
        return q.new_empty((split_terms(dtype_name, precision), batch, heads, length, width))
    if stored == "input":
        if packed:
            return q.new_empty((length, heads, width)).transpose(0, 1).unsqueeze(0)
        return q.new_empty((batch, heads, length, width))
    return q.new_empty((batch, heads, length, width), dtype=state_dtype(q.dtype))
