"""Printing decoding that cuts the keys of a query into parts: a pass over each, and the merge of what they leave.

A part leaves what one "online" sweep has summed over its keys, that is its row maximum and row sum, the means of its
scores, and its accumulators: those of the softmax over these keys alone, which merge exactly. In memory they are
vectors of padded width and after them numbers, in the order of (sequence and key head, row, part).
"""

from __future__ import annotations

from lla_compile.backends.part_layout import part_numbers
from lla_compile.backends.triton.cache_source import CachedRowKernelPrinter
from lla_compile.sweeps import Stage, Sweep, sweep_of

PART_PARAMETERS = (("parts_ptr", "*fp32"), ("num_splits", "i32"))
PART_IMPORT = "from lla_compile.backends.triton.mean_primitives import load_parts, part_segments, store_part\n"


class _PartPrinter(CachedRowKernelPrinter):
    own_constexprs = (*CachedRowKernelPrinter.own_constexprs, "PART", "BLOCK_SPLITS")

    def _vectors(self, sweep: Sweep) -> dict[str, tuple[str, str]]:
        """Where each accumulator of a part starts, and its padded width."""
        places, start = {}, "0"
        for accumulator in sweep.accumulators:
            block = self.sweeps.width(accumulator.name)[1]
            places[accumulator.name] = start, block
            start = f"{start} + {block}"
        return places

    def _numbers_at(self, sweep: Sweep) -> str:
        return " + ".join(block for _, block in self._vectors(sweep).values())


class PartKernelPrinter(_PartPrinter):
    """The pass: programs hold rows of a group and one part of their keys."""

    def _opening(self) -> None:
        super()._opening()
        self.out.add(
            """\
split = tl.program_id(1)
start, full_start, full_stop, stop = part_segments(
    start, full_start, full_stop, stop, split, num_splits, BLOCK_K
)"""
        )

    def _stage(self, stage: Stage, stages: tuple[Stage, ...]) -> None:
        out, sweep = self.out, sweep_of(stage)
        self.sweeps.assign(sweep.prologue)
        self.sweeps.stream_keys(sweep)
        out.add("part = ((first_row + rows).to(tl.int64) * num_splits + split) * PART")
        for name, (start, block) in self._vectors(sweep).items():
            out.add(f"store_part(parts_ptr + {start}, part, {name}, row_valid, {block})")
        for place, name in enumerate(part_numbers(sweep)):
            out.add(f"tl.store(parts_ptr + {self._numbers_at(sweep)} + {place} + part, {name}, mask=row_valid)")


class MergeKernelPrinter(_PartPrinter):
    """The merge and the sweep's epilogue: programs hold one row and what all its parts have left."""

    def _opening(self) -> None:
        self.out.add(
            """\
num_rows = group_size * seqlen_q
bh = tl.program_id(0) // num_rows
batch = (bh // num_kv_heads).to(tl.int64)
kv_head = (bh % num_kv_heads).to(tl.int64)
rows = tl.program_id(0) % num_rows + tl.arange(0, 1)
row_valid = rows < num_rows
splits = tl.arange(0, BLOCK_SPLITS)
exists = splits < num_splits
parts = (tl.program_id(0).to(tl.int64) * num_splits + splits) * PART"""
        )

    def _stage(self, stage: Stage, stages: tuple[Stage, ...]) -> None:
        out, sweep = self.out, sweep_of(stage)
        for place, name in enumerate(part_numbers(sweep)):
            other = 'float("-inf")' if name == "row_max" else "0.0"
            out.add(
                f"part_{name} = load_parts(parts_ptr + {self._numbers_at(sweep)} + {place}, parts, exists, {other}, 1)"
            )
        out.add(
            """\
row_max = tl.max(part_row_max, axis=0)
share = tl.exp2(part_row_max - tl.where(row_max == float("-inf"), 0.0, row_max)[None, :])
part_row_sum *= share
row_sum = tl.sum(part_row_sum, axis=0)"""
        )
        for name in sorted(sweep.means()):
            out.add(f"{name} = tl.sum(part_row_sum * part_{name}, axis=0) / tl.maximum(row_sum, 1e-30)")
        for name, (start, block) in self._vectors(sweep).items():
            out.add(f"part_{name} = share * load_parts(parts_ptr + {start}, parts, exists, 0.0, {block})")
        for accumulator in sweep.accumulators:
            value = f"part_{accumulator.name}"
            for score in sweep.scores:
                if accumulator.about and score.name in accumulator.weight.symbols():
                    value += f" - ({score.mean}[None, :] - part_{score.mean}) * part_{accumulator.about}"
            out.add(f"{accumulator.name} = tl.sum({value}, axis=0)[None, :]")
        self.sweeps.assign(sweep.epilogue)
        for name in self.program.outputs:
            self._store(name)
