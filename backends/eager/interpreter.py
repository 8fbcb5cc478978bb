"""Runs a sweep list on tensors: all batches and heads of one query tile at once, one key tile after another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Iterator, Mapping

import torch
from torch import Tensor

from lla_compile import masks, precision, storage
from lla_compile.backends.eager.evaluate import Value, evaluate
from lla_compile.expr import Kind
from lla_compile.lowering import lower
from lla_compile.sweeps import Loop, Sweep, SweepList

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

    Leaving the CG loop early reads a flag back from the device, and packed sequences their lengths, so that a call on
    a GPU waits for it.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Value], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        spec = self.plan.spec
        program = lower(spec.op, spec.phase).wanting(wanted)
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        packed = spec.num_sequences is not None
        results = {name: storage.layout(program, name, q, k, v, spec.precision, packed).empty(q) for name in wanted}
        with torch.autocast(q.device.type, enabled=False):
            for part_spec, rows, keys in self._parts(inputs):
                run = _Run(replace(self.plan, spec=part_spec), program, _slice(program, inputs, rows, keys))
                for name, value in run.results().items():
                    _place(program, name, results[name], rows, keys).copy_(value)
        return results

    def _parts(self, inputs: Mapping[str, Value]):
        """(spec, rows, keys) of every independent problem: the whole, or one for each packed sequence."""
        spec = self.plan.spec
        if spec.num_sequences is None:
            yield spec, slice(0, spec.seqlen_q), slice(0, spec.seqlen_k)
            return
        ends_q, ends_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
        for start_q, stop_q, start_k, stop_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
            part = replace(spec, num_sequences=None, seqlen_q=stop_q - start_q, seqlen_k=stop_k - start_k)
            yield part, slice(start_q, stop_q), slice(start_k, stop_k)


def _slice(program: SweepList, inputs: Mapping[str, Value], rows: slice, keys: slice) -> dict[str, Value]:
    """The inputs of one part; the axis of the length is the third, after that of the terms if there is one."""
    sliced = dict(inputs)
    for name in (*program.row_inputs, *program.row_scalars, *program.given):
        if isinstance(inputs[name], Tensor):
            sliced[name] = _place(program, name, inputs[name], rows, keys)
    for name in program.col_inputs:
        sliced[name] = inputs[name][:, :, keys]
    return sliced


def _place(program: SweepList, name: str, x: Tensor, rows: slice, keys: slice) -> Tensor:
    part = keys if name in program.key_outputs else rows
    return x[:, :, :, part] if name in program.rounded else x[:, :, part]


class _Run:
    """One problem of equal lengths: a plan and its inputs."""

    def __init__(self, plan: Plan, program: SweepList, inputs: dict[str, Value]):
        self.plan = plan
        self.spec = plan.spec
        self.program = program
        self.inputs = inputs
        self.terms = self.spec.terms
        self.wide = precision.is_wide(self.spec.dtype, self.spec.precision)
        self.shift = precision.weight_shift(self.spec.dtype)
        self.dtype = storage.state_dtype(inputs["q"].dtype)
        self.columns = {name: self._columns(inputs[name]) for name in program.col_inputs}
        crossing = program.crossing((stage,) for stage in program.stages)
        self.kept = {*crossing, *program.outputs, *program.given}
        self.kept |= {*program.row_inputs, *program.row_scalars, *program.scalars, "scale"}

    def results(self) -> dict[str, Tensor]:
        """Every output, in the shape it is stored in."""
        by_row = [stage for stage in self.program.stages if isinstance(stage, Loop) or stage.holds == "rows"]
        by_key = [stage for stage in self.program.stages if stage not in by_row]
        if self.plan.config.schedule == "split" or by_key:
            tiles = list(self._tiles())
            self._run(tiles, by_row)
            finished = [self._unfold(tile) for tile in tiles]
            sums = self._by_key(by_key, tiles)
        else:
            finished, sums = [], {}
            for tile in self._tiles():
                self._run([tile], by_row)
                finished.append(self._unfold(tile))
        row_outputs = [name for name in self.program.outputs if name not in self.program.key_outputs]
        return {name: self._join(finished, name) for name in row_outputs} | sums

    def _run(self, tiles: list[_Tile], stages: list) -> None:
        """All stages, each over all the tiles; with one tile that is the fused schedule."""
        for stage in stages:
            for tile in tiles:
                if isinstance(stage, Loop):
                    self._loop(stage, tile)
                else:
                    self._sweep(stage, tile)

    def _loop(self, loop: Loop, tile: _Tile) -> None:
        if self.terms == 1 and self.program.refines and not loop.coarse:
            return
        terms, self.terms = self.terms, 1 if loop.coarse else self.terms
        self._assign(loop.entry, tile.values)
        while tile.is_active(loop.active):
            self._sweep(loop.sweep, tile)
        self.terms = terms

    def _sweep(self, sweep: Sweep, tile: _Tile) -> None:
        """Stream the visible keys past one tile and update its state."""
        values = dict(tile.values)
        self._assign(sweep.prologue, values)
        if sweep.streams:
            self._stream(sweep, tile, values)
        self._assign(sweep.epilogue, values)
        tile.values = {name: x for name, x in values.items() if name in self.kept}

    def _stream(self, sweep: Sweep, tile: _Tile, values: dict[str, Value]) -> None:
        operands = self._row_operands(sweep, values)
        sums: dict[str, Value] = {}
        row_max, row_sum = None, 0
        means: dict[str, Value] = {}
        for start, stop, needs_mask in self._keys(tile).tiles(self.plan.config.block_k):
            scores = self._scores(operands, tile, start, stop, needs_mask)
            s = scores[sweep.scores[0].name]
            if sweep.softmax == "online":
                row_max, anchor, decay = _next_max(row_max, s)
                # Rounded before both sums, so that key_sum / row_sum stays a mean: keys that share an offset need it.
                scores["p"] = self._round((s - anchor).exp2())
                row_sum = row_sum * decay + scores["p"].sum(-1, keepdim=True)
                sums = {name: x * decay for name, x in sums.items()}
                self._move_means(sweep, scores, row_sum, means, sums)
            for accumulator, weight in self._weights(sweep, {**values, **scores}):
                column = self.columns[accumulator.operand][:, start:stop]
                previous = sums.get(accumulator.name)
                total = weight @ column if previous is None else previous.baddbmm(weight, column)
                sums[accumulator.name] = total
                if accumulator.row_sum:
                    sums[accumulator.row_sum] = sums.get(accumulator.row_sum, 0) + weight.sum(-1, keepdim=True)
        values |= self._unshifted(sweep, sums)
        values |= {"row_max": row_max, "row_sum": row_sum} | means

    def _move_means(self, sweep: Sweep, scores: dict, row_sum: Tensor, means: dict, sums: dict) -> None:
        """Take a tile into the running means of its scores, make the scores relative to them, and move the sums along.

        ``row_sum`` has the tile's weights already.
        """
        for score in sweep.scores:
            if not score.mean:
                continue
            previous = means.get(score.mean, 0)
            scores[score.name] = scores[score.name] - previous
            total = (scores["p"] * scores[score.name]).sum(-1, keepdim=True)
            moved = torch.where(row_sum > 0, total / row_sum, 0)
            scores[score.name] = scores[score.name] - moved
            means[score.mean] = previous + moved
            for accumulator in sweep.accumulators:
                if accumulator.name in sums and accumulator.about and score.name in accumulator.weight.symbols():
                    sums[accumulator.name] = sums[accumulator.name] - moved * sums[accumulator.about]

    def _by_key(self, sweeps: list[Sweep], tiles: list[_Tile]) -> dict[str, Tensor]:
        """Sweeps that hold keys: for each key tile, all query tiles that see some of it."""
        results = {}
        spec, block = self.spec, self.plan.config.block_k
        for sweep in sweeps:
            operands = [self._row_operands(sweep, tile.values) for tile in tiles]
            pieces: dict[str, list[Tensor]] = {a.name: [] for a in sweep.accumulators}
            for start in range(0, spec.seqlen_k, block):
                stop = min(start + block, spec.seqlen_k)
                sums: dict[str, Value] = {name: 0 for name in pieces}
                for tile, operand in zip(tiles, operands):
                    keys = self._keys(tile)
                    if stop <= keys.start or start >= keys.stop:
                        continue
                    needs_mask = start < keys.full_start or stop > keys.full_stop
                    scores = self._scores(operand, tile, start, stop, needs_mask)
                    for accumulator, weight in self._weights(sweep, {**tile.values, **scores}):
                        sums[accumulator.name] = sums[accumulator.name] + weight.mT @ tile.values[accumulator.operand]
                for name, value in self._unshifted(sweep, sums).items():
                    pieces[name].append(self._key_piece(name, value, stop - start))
            results |= {name: torch.cat(x, 2) if x else self._key_piece(name, 0, 0) for name, x in pieces.items()}
        return {name: x for name, x in results.items() if name in self.program.outputs}

    def _key_piece(self, name: str, value: Value, rows: int) -> Tensor:
        spec = self.spec
        width = spec.head_dim_v if name in self.program.value_wide else spec.head_dim
        shape = (spec.batch, spec.num_kv_heads, rows, width)
        if isinstance(value, Tensor):
            return value.reshape(shape)
        return torch.zeros(shape, dtype=self.dtype, device=self.inputs["k"].device)

    def _assign(self, assigns: tuple, values: dict[str, Value]) -> None:
        for assign in assigns:
            values[assign.name] = evaluate(assign.value, values, self._round, self.wide)

    def _scores(self, operands: dict[str, tuple], tile: _Tile, start: int, stop: int, needs_mask: bool) -> dict:
        """The scores of a pair of tiles, the attention score (the first) masked."""
        scores = {
            name: _product(row, self.columns[col][:, start:stop], center).to(self.dtype)
            for name, (row, col, center) in operands.items()
        }
        if needs_mask:
            attention = next(iter(operands))
            s = scores[attention]
            scores[attention] = s.masked_fill(~self._visible(tile, start, stop, s.device), -torch.inf)
        return scores

    def _weights(self, sweep: Sweep, values: dict[str, Value]) -> Iterator[tuple]:
        """(accumulator, rounded weight) of a pair of tiles."""
        shift = 0
        if sweep.softmax == "saved":
            values["p"] = (values[sweep.scores[0].name] - values["lse"]).exp2()
            shift = self.shift
        self._assign(sweep.weights, values)
        for accumulator in sweep.accumulators:
            weight = evaluate(accumulator.weight, values, self._round, self.wide)
            yield accumulator, self._round(weight * 2**shift if shift else weight)

    def _unshifted(self, sweep: Sweep, sums: dict[str, Value]) -> dict[str, Value]:
        if sweep.softmax == "online" or not self.shift:
            return sums
        return {name: x * 2**-self.shift for name, x in sums.items()}

    def _row_operands(self, sweep: Sweep, values: dict[str, Value]) -> dict[str, tuple]:
        """(row, column name, center) of every score."""
        operands = {}
        for score in sweep.scores:
            row = values[score.row]
            if score.wide and self.wide:
                row = row.double()
            operands[score.name] = (row, score.col, score.center and values[score.center])
        attention = sweep.scores[0].name
        row, col, center = operands[attention]
        operands[attention] = (row * (values["scale"] * _LOG2_E), col, center)  # scores to base 2, for exp2
        return operands

    def _round(self, x: Tensor) -> Tensor:
        return precision.round_operand(x, self.spec.dtype, self.terms)

    def _keys(self, tile: _Tile) -> masks.KeyRange:
        spec = self.spec
        return masks.key_range(tile.start, tile.stop, spec.seqlen_q, spec.seqlen_k, spec.is_causal, spec.window_size)

    def _visible(self, tile: _Tile, start: int, stop: int, device: torch.device) -> Tensor:
        """Mask of a tile, (group*rows, keys)."""
        spec = self.spec
        i = torch.arange(tile.start, tile.stop, device=device).repeat(spec.group_size)[:, None]
        j = torch.arange(start, stop, device=device)
        return masks.is_visible(i, j, spec.seqlen_q, spec.seqlen_k, spec.window_size)

    def _columns(self, x: Tensor) -> Tensor:
        """Keys or values as (B*Hkv, M, width) in the accumulation type."""
        return x.to(self.dtype).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def _tiles(self) -> Iterator[_Tile]:
        """Yield the query tiles; rows that see no key are left out."""
        spec, block, program = self.spec, self.plan.config.block_q, self.program
        constants = {name: getattr(self.plan, name) for name in program.scalars} | {"scale": self.inputs["scale"]}
        rows = {name: self.inputs[name] for name in program.row_inputs}
        for name, kind in program.given.items():
            x = self.inputs[name]
            x = x.to(self.dtype).sum(0) if name in program.rounded else x
            rows[name] = x.unsqueeze(-1) if kind is Kind.ROW else x
        for name in program.row_scalars:
            value = self.inputs[name]
            if isinstance(value, Tensor):
                rows[name] = value.expand(spec.batch, spec.num_heads, spec.seqlen_q).unsqueeze(-1)
            else:
                constants[name] = value
        first = masks.first_row_with_keys(spec.seqlen_q, spec.seqlen_k, spec.is_causal)
        for start in range(first if spec.batch else spec.seqlen_q, spec.seqlen_q, block):
            stop = min(start + block, spec.seqlen_q)
            yield _Tile(start, stop, constants | {name: self._fold(name, x[:, :, start:stop]) for name, x in rows.items()})

    def _fold(self, name: str, x: Tensor) -> Tensor:
        """(B, Hq, rows, width) to (B*Hkv, group*rows, width): the queries of a group share their keys in one product."""
        spec = self.spec
        if not (self.wide and name in self.program.wide):
            x = x.to(self.dtype)
        return x.reshape(spec.batch * spec.num_kv_heads, -1, x.shape[-1])

    def _unfold(self, tile: _Tile) -> dict[str, Tensor]:
        """The row outputs of a tile, (B, Hq, rows, width)."""
        spec, program = self.spec, self.program
        names = program.outputs.keys() - program.key_outputs
        shape = (spec.batch, spec.num_heads, tile.stop - tile.start, -1)
        return {name: tile.values[name].reshape(shape) for name in names}

    def _join(self, tiles: list[dict], name: str) -> Tensor:
        """Tiles of one output along the rows, after zeros for the rows that see no key."""
        spec, program = self.spec, self.program
        width = spec.head_dim_v if name in program.value_wide else spec.head_dim
        if program.kinds[name] is Kind.ROW:
            width = 1
        pieces = [tile[name] for tile in tiles]
        missing = spec.seqlen_q - sum(x.shape[2] for x in pieces)
        zeros = torch.zeros(
            spec.batch, spec.num_heads, missing, width, dtype=self.dtype, device=self.inputs["q"].device
        )
        if name == "lse":
            zeros = zeros + torch.inf
        joined = torch.cat([zeros, *pieces], dim=2)
        if name in program.rounded:
            return torch.stack(precision.terms_of(joined, self.spec.dtype, self.terms))
        return joined.squeeze(-1) if program.kinds[name] is Kind.ROW else joined


def _product(row: Tensor, column: Tensor, center: Tensor | None) -> Tensor:
    """row . column - center over a tile, (heads, rows, keys), in the type of ``row``."""
    column = column.to(row.dtype)
    return row @ column.mT if center is None else torch.baddbmm(center.to(row.dtype), row, column.mT, beta=-1)


def _next_max(row_max: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor, Value]:
    """Row maximum after tile ``s``, what to subtract from the scores, and the factor for the sums so far.

    A row that has seen no key yet has maximum -inf, which must not be subtracted.
    """
    new_max = s.amax(-1, keepdim=True)
    if row_max is not None:
        new_max = torch.maximum(row_max, new_max)
    anchor = torch.where(new_max == -torch.inf, 0, new_max)
    return new_max, anchor, 1 if row_max is None else (row_max - anchor).exp2()
