"""Printing one sweep: its prologue, the stream over tiles of the other side, and its epilogue, as lines of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

from lla_compile.expr import Expr, to_source
from lla_compile.sweeps import Accumulator, Assign, P, Score, Sweep, SweepList

_TEMPLATES = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "gt": "({0} > {1})",
    "lt": "({0} < {1})",
    "and": "({0} & {1})",
    "sqrt": "tl.sqrt({0})",
    "log2": "tl.log2({0})",
    "where": "tl.where({0}, {1}, {2})",
    "dot": "tl.sum({0} * {1}, axis=1)",
    "wide_dot": "wide_dot({0}, {1}, WIDE)",
}


class Lines(list):
    """Source lines at a growing and shrinking indentation."""

    def __init__(self):
        super().__init__()
        self.depth = 0

    def add(self, text: str = "") -> None:
        self.extend(("    " * self.depth + line).rstrip() for line in text.splitlines() or [""])

    def open(self, text: str) -> None:
        self.add(text)
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1


@dataclass(frozen=True)
class Side:
    """How the tile of one side is called when the other side is held.

    Attributes:
        start: variable that holds where the streamed tile starts.
        stop: the length of the streamed side.
        block: constexpr rows of the streamed tile.
        held_block: constexpr rows of the held tile.
        mask: arguments of ``visible`` that number queries and keys.
        row: how a value per query row is made to broadcast against a tile of pairs.
        first_segment: constexpr expression: the first segment that can be there.
    """

    start: str
    stop: str
    block: str
    held_block: str
    mask: str
    row: str
    first_segment: str


# Segments of the stream: 0 is cut by the mask before the full tiles, 1 needs no mask, 2 is cut after them.
SIDES = {
    "rows": Side(
        start="start_n",
        stop="seqlen_k",
        block="BLOCK_K",
        held_block="BLOCK_Q",
        mask="offs_m[:, None], (start_n + tl.arange(0, BLOCK_K))[None, :]",
        row="{}[:, None]",
        first_segment="0 if WINDOWED else 1",
    ),
    "keys": Side(
        start="start_m",
        stop="seqlen_q",
        block="BLOCK_Q",
        held_block="BLOCK_K",
        mask="(start_m + tl.arange(0, BLOCK_Q))[None, :], offs_n[:, None]",
        row="{}[None, :]",
        first_segment="0 if CAUSAL else 1",
    ),
}


class SweepPrinter:
    """Prints the sweeps of one program into ``out``.

    Attributes:
        in_terms: rounded vectors whose terms, ``<name>_high`` and ``<name>_low``, are at hand.
        term_count: how many terms a computed operand has where the printer stands: TERMS, or 1 in a coarse loop.
    """

    def __init__(self, out: Lines, program: SweepList):
        self.out = out
        self.program = program
        self.in_terms: set[str] = set()
        self.term_count = "TERMS"
        self._names = {name: f"{name}.to(tl.float32)" for name in program.row_inputs}
        self._names |= {name: f"{name}_rows" for name in program.row_scalars}
        self._names["scale"] = "scale_value"

    def width(self, name: str) -> tuple[str, str]:
        """Constexpr names of a vector's width and padded width."""
        return ("HEAD_DIM_V", "BLOCK_DV") if name in self.program.value_wide else ("HEAD_DIM", "BLOCK_D")

    def assign(self, assigns: tuple[Assign, ...]) -> None:
        """Row-wise assignments."""
        for assign in assigns:
            self._assign(assign)

    def start_sums(self, sweep: Sweep) -> None:
        """Zero the accumulators."""
        out, side = self.out, SIDES[sweep.holds]
        if sweep.softmax == "online":
            out.add('row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
            out.add("row_sum = tl.zeros([BLOCK_Q], tl.float32)")
        for name in dict.fromkeys(a.name for a in sweep.accumulators):
            out.add(f"{name} = tl.zeros([{side.held_block}, {self.width(name)[1]}], tl.float32)")
        means = [name for s in sweep.scores if s.mean for name in (s.mean, f"{s.mean}_moment")]
        for name in filter(None, (*(a.row_sum for a in sweep.accumulators), *means)):
            out.add(f"{name} = tl.zeros([{side.held_block}], tl.float32)")

    def stream_keys(self, sweep: Sweep) -> None:
        """The loop over key tiles past held rows, between the accumulators' start and their final value.

        Rounded row operands are taken apart before the loop and put together again after it, both exact, so that
        only the terms live in registers meanwhile.
        """
        out = self.out
        rounded_rows = [score.row for score in sweep.scores if score.row not in self.program.row_inputs]
        for name in rounded_rows:
            if name not in self.in_terms:
                self.terms(name)
        if sweep.softmax == "saved":
            out.add("lse_shifted = lse - WEIGHT_SHIFT")
        if sweep.means():
            # A number is positive (see the launcher): the maximum is taken of bare scores, and the exponent is one FMA.
            out.add("factor = 1.0 if SCALE_TENSOR else scale_log2")
            # Weights stay below 2 ** SLACK: float16 products with them must not overflow.
            out.add("SLACK: tl.constexpr = 4.0 if k_ptr.dtype.element_ty == tl.float16 else 8.0")
        self.start_sums(sweep)
        self.segments(sweep)
        for name in rounded_rows:
            out.add(f"{name} = joined({name}_high, {name}_low, {self.term_count})")
        self.end_sums(sweep)

    def segments(self, sweep: Sweep) -> None:
        """The stream in its segments."""
        out, side = self.out, SIDES[sweep.holds]
        out.open(f"for segment in tl.static_range({side.first_segment}, 3):")
        out.add("first = start if segment == 0 else (full_start if segment == 1 else full_stop)")
        out.add("last = full_start if segment == 0 else (full_stop if segment == 1 else stop)")
        stages = "1 if segment != 1 else NUM_STAGES"
        out.open(f"for {side.start} in tl.range(first, last, {side.block}, num_stages={stages}):")
        self._tile(sweep, side)
        out.close()
        out.close()

    def end_sums(self, sweep: Sweep) -> None:
        """The accumulators' final value."""
        out = self.out
        if sweep.softmax == "online":
            for score in filter(lambda score: score.mean, sweep.scores):
                self._move_mean(sweep, score, f"{score.mean}_moment", "row_sum")
            out.add("row_sum = tl.where(row_valid, row_sum, 0.0)")
            return
        out.open("if WEIGHT_SHIFT != 0:")
        for name in dict.fromkeys(x for a in sweep.accumulators for x in (a.name, a.row_sum) if x):
            out.add(f"{name} *= 1.0 / (1 << WEIGHT_SHIFT)")
        out.close()

    def terms(self, name: str) -> None:
        """Take a computed operand apart."""
        self.out.add(f"{name}_high = rounded({name}, k_ptr.dtype.element_ty)")
        self.out.add(f"{name}_low = low_term({name}, {name}_high, {self.term_count})")

    def load_streamed_rows(self, sweep: Sweep) -> None:
        """What the query tile that passes the held keys brings along: operands, and numbers per row."""
        out, program = self.out, self.program
        operands = dict.fromkeys([s.row for s in sweep.scores] + [a.operand for a in sweep.accumulators])
        for name in operands:
            width, block = self.width(name)
            rest = f"start_m, seqlen_q, {{}}, {width}, BLOCK_Q, {block}, segment != 1)"
            if name in program.row_inputs:
                out.add(f"{name} = load_tile({name}_base, {rest.format(f'{name}_stride_n')}")
                continue
            out.add(f"{name}_high = load_tile({name}_base, {rest.format(width)}")
            out.add(f"{name}_low = {name}_high")
            out.open("if TERMS == 2:")
            out.add(f"{name}_low = load_tile({name}_base + state_rows * {width}, {rest.format(width)}")
            out.close()
        for name in sorted(sweep.stream_reads() - operands.keys() - {"scale"}):
            other = 'float("inf")' if name == "lse" else "0.0"
            out.add(f"{name} = load_rows({name}_base, start_m, seqlen_q, {other}, BLOCK_Q, segment != 1)")
            self.narrow(name)
        out.add("lse_shifted = lse - WEIGHT_SHIFT")

    def load_streamed_columns(self, names: Iterable[str]) -> None:
        """The key tile that passes the held rows."""
        for name in names:
            width, block = self.width(name)
            self.out.add(
                f"{name} = load_tile("
                f"{name}_base, start_n, seqlen_k, {name}_stride_n, {width}, BLOCK_K, {block}, segment != 1)"
            )

    def narrow(self, name: str) -> None:
        """A wide number that was loaded, in float32 where the device takes no wide products."""
        if name in self.program.wide:
            self.out.open("if not WIDE:")
            self.out.add(f"{name} = {name}.to(tl.float32)")
            self.out.close()

    def _tile(self, sweep: Sweep, side: Side) -> None:
        out = self.out
        online = sweep.softmax == "online"
        if sweep.holds == "keys":
            self.load_streamed_rows(sweep)
        else:
            columns = [score.col for score in sweep.scores] + [a.operand for a in sweep.accumulators]
            self.load_streamed_columns(dict.fromkeys(columns))
        if sweep.means():
            self._mean_tile(sweep, side)
            return
        for score in sweep.scores:
            out.add(f"{score.name} = {self._score(score, sweep, side)}")
            if score is sweep.scores[0]:
                self._softmax_weights(sweep, side, score.name, online)
        for assign in sweep.weights:
            out.add(f"{assign.name} = {self._text(assign.value, side.row)}")
        for number, accumulator in enumerate(sweep.accumulators):
            weight = "p"
            if not online:
                weight = f"weight_{number}"
                out.add(f"{weight} = {self._text(accumulator.weight, side.row)}")
                self.terms(weight)
            self._accumulate(accumulator, weight)
            if accumulator.row_sum:
                as_multiplied = f"{weight} if {self.term_count} == 2 else {weight}_high.to(tl.float32)"
                out.add(f"{accumulator.row_sum} += tl.sum({as_multiplied}, axis=1)")

    def _mean_tile(self, sweep: Sweep, side: Side) -> None:
        """A tile of an "online" sweep whose scores are relative to running means.

        All scores come first, so that their products run while the weights are formed, and all accumulators last.
        """
        out, attention = self.out, sweep.scores[0].name
        for score in sweep.scores:
            out.add(f"{score.name} = {self._score(score, sweep, side)}")
        out.open("if SCALE_TENSOR:")
        out.add(f"{attention} *= scale_log2")
        out.close()
        self._mask(side, attention)
        out.add(f"tile_max = tl.max({attention}, axis=1) * factor")
        # One branch for the whole block, which most tiles do not take: they leave the accumulators as they are.
        out.open("if tl.max((tile_max > row_max + SLACK).to(tl.int32), axis=0) > 0:")
        self._rescale(sweep, attention)
        out.close()
        self._finite_max("row_max")
        out.add(f"p = tl.exp2({attention} * factor - finite_max[:, None])")
        out.add("row_sum += tl.sum(p, axis=1)")
        for score in filter(lambda score: score.mean, sweep.scores):
            out.add(f"{score.name} -= {score.mean}[:, None]")
            out.add(f"{score.mean}_moment += tl.sum(p * {score.name}, axis=1)")
        weights = []
        for number, accumulator in enumerate(sweep.accumulators):
            weights.append("p" if accumulator.weight == P else f"weight_{number}")
            if accumulator.weight != P:
                out.add(f"{weights[-1]} = {self._text(accumulator.weight, side.row)}")
            self.terms(weights[-1])
        for accumulator, weight in zip(sweep.accumulators, weights):
            self._accumulate(accumulator, weight)

    def _rescale(self, sweep: Sweep, attention: str) -> None:
        """Make the sums so far relative to the maximum with this tile, and scores to a mean of those so far.

        Which mean only matters for how small scores are. The tile's own count by weights that fall linearly with the
        attention score, which cost fewer registers than its softmax weights; ``end_sums`` makes the means exact.
        """
        out = self.out
        out.add("new_max = tl.maximum(row_max, tile_max)")
        self._finite_max("new_max")
        out.add("rescale = tl.exp2(row_max - finite_max)")
        out.add("row_max = new_max")
        out.add("row_sum *= rescale")
        for accumulator in sweep.accumulators:
            out.add(f"{accumulator.name} *= rescale[:, None]")
        out.add(f"near = tl.maximum({attention} * (factor / SLACK) + (1.0 - finite_max / SLACK)[:, None], 0.0)")
        out.add("near_sum = tl.sum(near, axis=1)")
        for score in filter(lambda score: score.mean, sweep.scores):
            out.add(f"{score.mean}_moment *= rescale")
            out.add(f"near_moment = tl.sum(near * {score.name}, axis=1) - near_sum * {score.mean}")
            self._move_mean(sweep, score, f"({score.mean}_moment + near_moment)", "(row_sum + near_sum)")

    def _move_mean(self, sweep: Sweep, score: Score, moment: str, weight_sum: str) -> None:
        """Move what a score is relative to by ``moment / weight_sum``, 0 for a row without keys, and its sums along."""
        out = self.out
        out.add(f"moved = {moment} / tl.maximum({weight_sum}, 1e-30)")
        out.add(f"{score.mean} += moved")
        out.add(f"{score.mean}_moment -= moved * row_sum")
        for accumulator in sweep.accumulators:
            if accumulator.about and score.name in accumulator.weight.symbols():
                out.add(f"{accumulator.name} -= moved[:, None] * {accumulator.about}")

    def _accumulate(self, accumulator: Accumulator, weight: str) -> None:
        operand = self._operand(accumulator.operand)
        self.out.add(
            f"{accumulator.name} = accumulate({accumulator.name}, {weight}_high, {weight}_low, "
            f"{operand[0]}, {operand[1]}, {self.term_count}, {operand[2]}, INPUT_PRECISION)"
        )

    def _operand(self, name: str) -> tuple[str, str, str]:
        """(high term, low term, number of terms) of a tile product's operand."""
        if name in self.program.rounded:
            return f"{name}_high", f"{name}_low", self.term_count
        return name, name, "1"

    def _score(self, score: Score, sweep: Sweep, side: Side) -> str:
        row, col = self._operand(score.row), self._operand(score.col)
        held, streamed = (row, col) if sweep.holds == "rows" else (col, row)
        if score.seeded:
            return f"seeded_product({side.row.format(score.center)}, {held[0]}, {streamed[0]}, INPUT_PRECISION)"
        operands = ", ".join((*held[:2], *streamed[:2], held[2], streamed[2]))
        value = f"score_product({operands}, INPUT_PRECISION, {'WIDE' if score.wide else 'False'})"
        if score.center:
            value += f" - {side.row.format(score.center)}"
        if score.wide:
            value = f"({value}).to(tl.float32)"
        if score is sweep.scores[0] and not sweep.means():
            value = f"({value}) * scale_log2" if score.center else f"{value} * scale_log2"
        return value

    def _softmax_weights(self, sweep: Sweep, side: Side, score: str, online: bool) -> None:
        out = self.out
        if not online:
            self._mask(side, score)
            out.add(f"p = tl.exp2({score} - {side.row.format('lse_shifted')})")
            return
        self._online_max(side, score)
        # The weights as the product sees them: the mean of keys that share an offset then keeps that offset.
        out.add("row_sum = row_sum * rescale + tl.sum(p if TERMS == 2 else p_high.to(tl.float32), axis=1)")
        for accumulator in sweep.accumulators:
            out.add(f"{accumulator.name} *= rescale[:, None]")
        out.add("row_max = new_max")

    def _mask(self, side: Side, score: str) -> None:
        out = self.out
        out.open("if segment != 1:")
        out.add(f"mask = visible({side.mask}, seqlen_q, seqlen_k, window, CAUSAL, WINDOWED)")
        out.add(f'{score} = tl.where(mask, {score}, float("-inf"))')
        out.close()

    def _online_max(self, side: Side, score: str) -> None:
        """The running maximum with this tile, the weights relative to it, and what that makes of earlier sums."""
        out = self.out
        self._mask(side, score)
        out.add(f"new_max = tl.maximum(row_max, tl.max({score}, axis=1))")
        self._finite_max("new_max")
        out.add(f"p = tl.exp2({score} - finite_max[:, None])")
        self.terms("p")
        out.add("rescale = tl.exp2(row_max - finite_max)")

    def _finite_max(self, maximum: str) -> None:
        """What to subtract from the scores: not the maximum of a row that has seen no key."""
        out = self.out
        out.add(f"finite_max = {maximum}")
        out.open("if segment != 1:")
        out.add(f'finite_max = tl.where({maximum} == float("-inf"), 0.0, {maximum})')
        out.close()

    def _assign(self, assign: Assign) -> None:
        if assign.value.op == "rounded":
            value = f"representable({self._text(assign.value.args[0])}, k_ptr.dtype.element_ty, {self.term_count})"
        else:
            value = self._text(assign.value)
        self.out.add(f"{assign.name} = {value}")
        self.in_terms.discard(assign.name)

    def _text(self, expr: Expr, broadcast: str = SIDES["rows"].row) -> str:
        return to_source(expr, _TEMPLATES, broadcast, self._names)
