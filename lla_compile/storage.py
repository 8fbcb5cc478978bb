"""How results and the state that crosses the two passes lie in memory: one layout for every backend and for fakes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lla_compile.expr import Kind
from lla_compile.precision import is_wide, split_terms

if TYPE_CHECKING:
    from lla_compile.sweeps import SweepList


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of state: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layout(NamedTuple):
    """Shape and type of one tensor; ``heads_first`` asks for a (1, H, total, width) view of (total, H, width)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    heads_first: bool = False

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor on the device of ``like``, or a fake one if that is fake."""
        made = like.new_empty(self.shape, dtype=self.dtype)
        return made.transpose(0, 1).unsqueeze(0) if self.heads_first else made


def layout(
    program: SweepList, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, precision: str, packed: bool
) -> Layout:
    """How one output or state of ``program`` lies in memory.

    A ROW is (B, Hq, N), a VECTOR (B, Hq, N, width); what is stored per key has the heads and the length of the key.
    ``rounded`` vectors lie as terms, (terms, B, Hq, N, D), in the input type. Results in the input type of packed
    sequences are (1, H, total, width) views of (total, H, width).

    Args:
        program: the sweeps that write or read it.
        name: which output, or which given or crossing state.
        q, k, v: the inputs, (B, H, length, width); only shapes and the dtype are used.
        precision: the tier: how many terms there are and what is wide.
        packed: whether the inputs are packed sequences.
    """
    dtype_name = str(q.dtype).removeprefix("torch.")
    batch, heads, length = (k if name in program.key_outputs else q).shape[:3]
    width = v.shape[3] if name in program.value_wide else q.shape[3]
    stored = program.outputs.get(name, "float32")
    if program.kinds[name] is Kind.ROW:
        if stored == "int32":
            return Layout((batch, heads, length), torch.int32)
        wide = name in program.wide and is_wide(dtype_name, precision)
        return Layout((batch, heads, length), torch.float64 if wide else state_dtype(q.dtype))
    if name in program.rounded:
        return Layout((split_terms(dtype_name, precision), batch, heads, length, width), q.dtype)
    if stored == "input":
        if packed:
            return Layout((length, heads, width), q.dtype, heads_first=True)
        return Layout((batch, heads, length, width), q.dtype)
    return Layout((batch, heads, length, width), state_dtype(q.dtype))
