"""Printing one sweep: its prologue, the stream over key tiles, and its epilogue, as lines of a Triton function."""

from __future__ import annotations

from lla_compile.expr import Expr, to_source
from lla_compile.sweeps import Assign, Sweep, SweepList

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


class SweepPrinter:
    """Prints the sweeps of one program into ``out``."""

    def __init__(self, out: Lines, program: SweepList):
        self.out = out
        self.program = program
        self._names = {name: f"{name}.to(tl.float32)" for name in program.row_inputs}
        self._names |= {name: f"{name}_rows" for name in program.row_scalars}

    def prologue(self, sweep: Sweep) -> None:
        for assign in sweep.prologue:
            self._assign(assign)

    def stream(self, sweep: Sweep, in_terms: frozenset[str] = frozenset()) -> None:
        """The loop over key tiles, between the accumulators' start and their final value.

        Rounded row operands are taken apart before the loop and put together again after it, both exact, so that
        only the terms live in registers meanwhile. Those ``in_terms`` already are apart.
        """
        out = self.out
        online = sweep.softmax == "online"
        rounded_rows = [score.row for score in sweep.scores if score.row not in self.program.row_inputs]
        for name in rounded_rows:
            if name not in in_terms:
                self._terms(name)
        if online:
            out.add('row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
            out.add("row_sum = tl.zeros([BLOCK_Q], tl.float32)")
        else:
            out.add("lse_shifted = lse - WEIGHT_SHIFT")
        for accumulator in sweep.accumulators:
            out.add(f"{accumulator.name} = tl.zeros([BLOCK_Q, {_width(accumulator.col)[1]}], tl.float32)")
        # Segment 0 ends where a window's edge does, 1 needs no mask, 2 holds the diagonal and the last keys.
        out.open("for segment in tl.static_range(0 if WINDOWED else 1, 3):")
        out.add("first_n = start if segment == 0 else (full_start if segment == 1 else full_stop)")
        out.add("last_n = full_start if segment == 0 else (full_stop if segment == 1 else stop)")
        out.open("for start_n in tl.range(first_n, last_n, BLOCK_K, num_stages=1 if segment != 1 else NUM_STAGES):")
        self._key_tile(sweep, online)
        out.close()
        out.close()
        for name in rounded_rows:
            out.add(f"{name} = joined({name}_high, {name}_low, TERMS)")
        if online:
            out.add("row_sum = tl.where(row_valid, row_sum, 0.0)")
            return
        for accumulator in sweep.accumulators:
            out.open("if WEIGHT_SHIFT != 0:")
            out.add(f"{accumulator.name} *= 1.0 / (1 << WEIGHT_SHIFT)")
            out.close()

    def epilogue(self, sweep: Sweep) -> None:
        for assign in sweep.epilogue:
            self._assign(assign)

    def _key_tile(self, sweep: Sweep, online: bool) -> None:
        out = self.out
        for column in dict.fromkeys([s.col for s in sweep.scores] + [a.col for a in sweep.accumulators]):
            width, block = _width(column)
            out.add(
                f"{column} = load_tile("
                f"{column}_base, start_n, seqlen_k, {column}_stride_n, {width}, BLOCK_K, {block}, segment != 1)"
            )
        for score in sweep.scores:
            operands = f"{score.row}, {score.row}, {score.col}, 1"
            if score.row not in self.program.row_inputs:
                operands = f"{score.row}_high, {score.row}_low, {score.col}, TERMS"
            value = f"row_product({operands}, INPUT_PRECISION, {'WIDE' if score.wide else 'False'})"
            if score.center:
                value += f" - {score.center}[:, None]"
            if score.wide:
                value = f"({value}).to(tl.float32)"
            if score is sweep.scores[0]:
                value = f"({value}) * scale_log2" if score.center else f"{value} * scale_log2"
            out.add(f"{score.name} = {value}")
            if score is sweep.scores[0]:
                self._weights(sweep, score.name, online)
        for accumulator in sweep.accumulators:
            weight = "p"
            if not online:
                weight = f"{accumulator.name}_weight"
                out.add(f"{weight} = {self._text(accumulator.weight)}")
                self._terms(weight)
            out.add(
                f"{accumulator.name} = accumulate("
                f"{accumulator.name}, {weight}_high, {weight}_low, {accumulator.col}, TERMS, INPUT_PRECISION)"
            )

    def _weights(self, sweep: Sweep, score: str, online: bool) -> None:
        out = self.out
        out.open("if segment != 1:")
        out.add("mask = visible(offs_m, start_n, seqlen_q, seqlen_k, window, BLOCK_K, CAUSAL, WINDOWED)")
        out.add(f'{score} = tl.where(mask, {score}, float("-inf"))')
        out.close()
        if not online:
            out.add(f"p = tl.exp2({score} - lse_shifted[:, None])")
            return
        out.add(f"new_max = tl.maximum(row_max, tl.max({score}, axis=1))")
        out.add("finite_max = new_max")
        out.open("if segment != 1:")
        out.add('finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)')
        out.close()
        out.add(f"p = tl.exp2({score} - finite_max[:, None])")
        self._terms("p")
        out.add("rescale = tl.exp2(row_max - finite_max)")
        # The weights as the product sees them: the mean of keys that share an offset then keeps that offset.
        out.add("row_sum = row_sum * rescale + tl.sum(p if TERMS == 2 else p_high.to(tl.float32), axis=1)")
        for accumulator in sweep.accumulators:
            out.add(f"{accumulator.name} *= rescale[:, None]")
        out.add("row_max = new_max")

    def _assign(self, assign: Assign) -> None:
        if assign.value.op == "rounded":
            value = f"representable({self._text(assign.value.args[0])}, k_ptr.dtype.element_ty, TERMS)"
        else:
            value = self._text(assign.value)
        self.out.add(f"{assign.name} = {value}")

    def _terms(self, name: str) -> None:
        self.out.add(f"{name}_high = rounded({name}, k_ptr.dtype.element_ty)")
        self.out.add(f"{name}_low = low_term({name}, {name}_high, TERMS)")

    def _text(self, expr: Expr) -> str:
        return to_source(expr, _TEMPLATES, names=self._names)


def _width(column: str) -> tuple[str, str]:
    """Constexpr names of a key-side operand's width and padded width."""
    return ("HEAD_DIM_V", "BLOCK_DV") if column == "v" else ("HEAD_DIM", "BLOCK_D")
