"""The problems that are measured: shapes, inputs, errors against float64 and the work that a call really did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from lla_compile.autograd import GRADIENTS
from lla_compile.plans import Plan
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec
from lla_compile.tuner.errors import relative_error
from lla_compile.tuner.problem import normal_tensors

# Rows of one head that are held against the reference, the last ones: it costs rows * N * D^2 in float64.
REFERENCE_ROWS = 1024


@dataclass(frozen=True)
class Shape:
    """Causal self-attention of ``batch_heads`` heads."""

    seqlen: int
    head_dim: int
    batch_heads: int

    def spec(self, dtype: str, precision: str = "accurate", **fields) -> LLASpec:
        return LLASpec.self_attention(
            dtype, self.head_dim, self.seqlen, self.batch_heads, precision=precision, **fields
        )

    def inputs(self, dtype: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Standard normal query, key and value (1, B*H, N, D), the same in every run."""
        return tuple(normal_tensors(self.spec(dtype), device, "benchmark").values())

    def training_inputs(self, dtype: str, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Standard normal query, key, value and gradient of the output (1, B*H, N, D), the same in every run."""
        return tuple(normal_tensors(self.spec(dtype, phase="backward"), device, "benchmark").values())

    def as_row(self) -> dict[str, object]:
        return {"seqlen": self.seqlen, "head_dim": self.head_dim, "batch_heads": self.batch_heads}


def last_rows_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ridge: float) -> torch.Tensor:
    """float64 output of the first head's last rows; causal masks align at the end, so a slice of q is enough."""
    rows = slice(-REFERENCE_ROWS, None)
    return lla_reference(q[:1, :1, rows], k[:1, :1], v[:1, :1], ridge)


def last_rows_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """:func:`relative_error` over the rows of the reference."""
    return relative_error(out[:1, :1, -reference.shape[2] :], reference)


def gradient_errors(gradients: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, float]:
    """``error_<name>`` is the relative error of each gradient, for as many as are given in the order of GRADIENTS.

    If dscale is given by row, ``error_dscale`` is that of the sum, and ``error_dscale_rows`` that of its terms: what
    rounding of every row would leave.
    """
    errors: dict[str, float] = {}
    for name, gradient, exact in zip(GRADIENTS, gradients, reference):
        errors[f"error_{name}"] = relative_error(gradient.double().sum_to_size(exact.shape), exact)
        if gradient.dim() > exact.dim():
            errors[f"error_{name}_rows"] = relative_error(gradient, exact)
    return errors


def executed_flops(plan: Plan, iterations: torch.Tensor) -> float:
    """Flops of the sweeps that ran: a tile turns its CG loop until its slowest row is done.

    Counted as the equations have them, over the visible pairs of causal self-attention: the second products of
    `accurate` and the masked parts of tiles are not counted.

    Args:
        plan: what ran.
        iterations: of every row, (B, H, N).
    """
    outside, one = plan.flops
    seqlen, block = plan.spec.seqlen_q, plan.config.block_q
    rows = iterations.reshape(-1, seqlen).double().cpu()
    if plan.config.backend == "eager":  # its tiles span all heads
        rows = rows.amax(0, keepdim=True)
    tiles = -(-seqlen // block)
    turns = torch.nn.functional.pad(rows, (0, tiles * block - seqlen)).reshape(-1, tiles, block).amax(-1)
    keys = torch.nn.functional.pad(torch.arange(1.0, seqlen + 1, dtype=torch.float64), (0, tiles * block - seqlen))
    share = keys.reshape(tiles, block).sum(-1) / keys.sum()
    return outside + one * (turns * share).sum(-1).mean().item()
