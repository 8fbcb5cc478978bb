"""Runs a sweep list on tensors: all batches and heads of one query tile at once, one key tile after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator

import torch
from torch import Tensor

from lla_compile import masks, precision
from lla_compile.backends.eager.evaluate import Value, evaluate
from lla_compile.sweeps import Loop, Sweep, lower

if TYPE_CHECKING:
    from lla_compile.plans import Plan

_LOG2_E = math.log2(math.e)


@dataclass
class _Tile:
    """Query rows [start, stop) of every head: inputs and state by name, VECTORs as (B*Hkv, group*rows, D)."""

    start: int
    stop: int
    values: dict[str, Value]

    def is_active(self, name: str) -> bool:
        return bool((self.values[name] > 0).any())


class EagerExecutable:
    """A plan of the eager backend; see :class:`lla_compile.backends.Executable`.

    Differentiable through autograd (which then keeps every tile's weights, memory proportional to N*M). Leaving the CG
    loop early reads a flag back from the device, so that a call on a GPU waits for it.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.spec = plan.spec
        self.sweeps = lower(self.spec.op, self.spec.phase)
        self.terms = precision.split_terms(self.spec.dtype, self.spec.precision)
        self.wide = precision.is_wide(self.spec.dtype, self.spec.precision)
        self.shift = precision.weight_shift(self.spec.dtype)
        self.dtype = torch.float64 if self.spec.dtype == "float64" else torch.float32
        self.kept = {*self.sweeps.state(), *self.sweeps.outputs, *self.sweeps.info}
        self.kept |= {*self.sweeps.row_inputs, *self.sweeps.row_scalars, *self.sweeps.scalars}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ridge: Value, scale: Value, return_info: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = {"q": q, "k": k, "v": v, "ridge": ridge}
        columns = {name: self._columns(inputs[name]) for name in self.sweeps.col_inputs}
        tiles = self._tiles(inputs)
        if self.plan.config.schedule == "split":
            tiles = list(tiles)
            self._run(tiles, columns, scale)
        finished = []
        for tile in tiles:
            if self.plan.config.schedule == "fused":
                self._run([tile], columns, scale)
            finished.append({name: self._unfold(tile, name) for name in (*self.sweeps.outputs, *self.sweeps.info)})
        (output,) = self.sweeps.outputs
        out = self._join(finished, output, q.dtype, self.spec.head_dim_v, q.device)
        if not (return_info and self.sweeps.info):
            return out, None, None
        iterations, residual = self.sweeps.info
        return (
            out,
            self._join(finished, iterations, torch.int32, 1, q.device).squeeze(-1),
            self._join(finished, residual, torch.float32, 1, q.device).squeeze(-1),
        )

    def _run(self, tiles: list[_Tile], columns: dict[str, Tensor], scale: Value) -> None:
        """All stages, each over all the tiles; with one tile that is the fused schedule."""
        for stage in self.sweeps.stages:
            if not isinstance(stage, Loop):
                for tile in tiles:
                    self._sweep(stage, tile, columns, scale)
                continue
            running = tiles
            for _ in range(self.plan.cg_max_iters):
                running = [tile for tile in running if tile.is_active(stage.active)]
                for tile in running:
                    self._sweep(stage.sweep, tile, columns, scale)

    def _sweep(self, sweep: Sweep, tile: _Tile, columns: dict[str, Tensor], scale: Value) -> None:
        """Stream the visible keys past one tile and update its state."""
        values = dict(tile.values)
        for assign in sweep.prologue:
            values[assign.name] = evaluate(assign.value, values, self._round, self.wide)
        operands = self._row_operands(sweep, values, scale)
        sums: dict[str, Tensor] = {}
        row_max, row_sum = None, 0
        spec = self.spec
        keys = masks.key_range(tile.start, tile.stop, spec.seqlen_q, spec.seqlen_k, spec.is_causal, spec.window_size)
        shift = self.shift if sweep.softmax == "saved" else 0
        for start, stop, needs_mask in keys.tiles(self.plan.config.block_k):
            tile_columns = {name: x[:, start:stop] for name, x in columns.items()}
            scores = {
                name: _product(row, tile_columns[col], center).to(self.dtype)
                for name, (row, col, center) in operands.items()
            }
            s = scores[sweep.scores[0].name]
            if needs_mask:
                s = s.masked_fill(~self._visible(tile, start, stop, s.device), -torch.inf)
            if sweep.softmax == "online":
                row_max, anchor, decay = _next_max(row_max, s)
                # Rounded before both sums, so that key_sum / row_sum stays a mean: keys that share an offset need it.
                p = self._round((s - anchor).exp2())
                row_sum = row_sum * decay + p.sum(-1, keepdim=True)
                sums = {name: x * decay for name, x in sums.items()}
            else:
                p = (s - values["lse"]).exp2()
            tile_values = {**values, **scores, "p": p}
            for accumulator in sweep.accumulators:
                weight = evaluate(accumulator.weight, tile_values, self._round, self.wide)
                weight = self._round(weight * 2**shift if shift else weight)
                column = tile_columns[accumulator.col]
                previous = sums.get(accumulator.name)
                sums[accumulator.name] = weight @ column if previous is None else previous.baddbmm(weight, column)
        values |= {name: x * 2**-shift if shift else x for name, x in sums.items()}
        values |= {"row_max": row_max, "row_sum": row_sum}
        for assign in sweep.epilogue:
            values[assign.name] = evaluate(assign.value, values, self._round, self.wide)
        tile.values = {name: x for name, x in values.items() if name in self.kept}

    def _row_operands(self, sweep: Sweep, values: dict[str, Value], scale: Value) -> dict[str, tuple]:
        """(row, column name, center) of every score."""
        operands = {}
        for score in sweep.scores:
            row = values[score.row]
            if score.wide and self.wide:
                row = row.double()
            operands[score.name] = (row, score.col, score.center and values[score.center])
        attention = sweep.scores[0].name
        row, col, center = operands[attention]
        operands[attention] = (row * (scale * _LOG2_E), col, center)  # scores to base 2, for exp2
        return operands

    def _round(self, x: Tensor) -> Tensor:
        return precision.round_operand(x, self.spec.dtype, self.terms)

    def _visible(self, tile: _Tile, start: int, stop: int, device: torch.device) -> Tensor:
        """Mask of a tile, (group*rows, keys)."""
        spec = self.spec
        i = torch.arange(tile.start, tile.stop, device=device).repeat(spec.group_size)[:, None]
        j = torch.arange(start, stop, device=device)
        return masks.is_visible(i, j, spec.seqlen_q, spec.seqlen_k, spec.window_size)

    def _columns(self, x: Tensor) -> Tensor:
        """Keys or values as (B*Hkv, M, width) in the accumulation type."""
        return x.to(self.dtype).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def _tiles(self, inputs: dict[str, Value]) -> Iterator[_Tile]:
        """Yield the query tiles; rows that see no key are left out."""
        spec, block = self.spec, self.plan.config.block_q
        constants = {name: getattr(spec, name) for name in self.sweeps.scalars}
        row_inputs = {name: inputs[name] for name in self.sweeps.row_inputs}
        for name in self.sweeps.row_scalars:
            value = inputs[name]
            if isinstance(value, Tensor):
                row_inputs[name] = value.expand(spec.batch, spec.num_heads, spec.seqlen_q).unsqueeze(-1)
            else:
                constants[name] = value
        first = masks.first_row_with_keys(spec.seqlen_q, spec.seqlen_k, spec.is_causal)
        for start in range(first if spec.batch else spec.seqlen_q, spec.seqlen_q, block):
            stop = min(start + block, spec.seqlen_q)
            values = {name: self._fold(x[:, :, start:stop]) for name, x in row_inputs.items()}
            yield _Tile(start, stop, {**constants, **values})

    def _fold(self, x: Tensor) -> Tensor:
        """(B, Hq, rows, width) to (B*Hkv, group*rows, width): the queries of a group share their keys in one product."""
        spec = self.spec
        return x.to(self.dtype).reshape(spec.batch * spec.num_kv_heads, -1, x.shape[-1])

    def _unfold(self, tile: _Tile, name: str) -> Tensor:
        x = tile.values[name]
        return x.reshape(self.spec.batch, self.spec.num_heads, tile.stop - tile.start, x.shape[-1])

    def _join(self, tiles: list[dict], name: str, dtype: torch.dtype, width: int, device: torch.device) -> Tensor:
        """Tiles of one output along the rows, after zeros for the rows that see no key."""
        spec = self.spec
        pieces = [tile[name].to(dtype) for tile in tiles]
        missing = spec.seqlen_q - sum(x.shape[2] for x in pieces)
        zeros = torch.zeros(spec.batch, spec.num_heads, missing, width, dtype=dtype, device=device)
        return torch.cat([zeros, *pieces], dim=2)


def _product(row: Tensor, column: Tensor, center: Tensor | None) -> Tensor:
    """row . column - center over a tile, (heads, rows, keys), in the type of ``row``."""
    column = column.to(row.dtype)
    return row @ column.mT if center is None else torch.baddbmm(center.to(row.dtype), row, column.mT, beta=-1)


def _next_max(row_max: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor, Value]:
    """Row maximum after tile ``s``, what to subtract from the scores, and the factor for the sums so far.

    All constants to autograd: the maximum cancels in whatever depends on it. A row that has seen no key yet has
    maximum -inf, which must not be subtracted.
    """
    new_max = s.detach().amax(-1, keepdim=True)
    if row_max is not None:
        new_max = torch.maximum(row_max, new_max)
    anchor = torch.where(new_max == -torch.inf, 0, new_max)
    return new_max, anchor, 1 if row_max is None else (row_max - anchor).exp2()
