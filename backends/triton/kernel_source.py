"""Printing one kernel: its opening (which tile, whose inputs), its stages, and what it loads and stores around them."""

from __future__ import annotations

from lla_compile.backends.triton.sweep_source import SIDES, Lines, SweepPrinter
from lla_compile.expr import Kind
from lla_compile.sweeps import Loop, Stage, Sweep, SweepList, sweep_of

CONSTEXPRS = (
    "HEAD_DIM",
    "HEAD_DIM_V",
    "BLOCK_D",
    "BLOCK_DV",
    "BLOCK_Q",
    "BLOCK_K",
    "NUM_STAGES",
    "CAUSAL",
    "WINDOWED",
    "PACKED",
    "GROUPED",
    "TERMS",
    "INPUT_PRECISION",
    "WIDE",
    "WEIGHT_SHIFT",
    "RIDGE_TENSOR",
    "SCALE_TENSOR",
)


def constexprs(program: SweepList) -> tuple[str, ...]:
    """The compile-time constants of a program's kernels: RIDGE_TENSOR is for those with a ridge."""
    others = {"RIDGE_TENSOR"} - {f"{name.upper()}_TENSOR" for name in program.row_scalars}
    return tuple(name for name in CONSTEXPRS if name not in others)


def strided_outputs(program: SweepList) -> tuple[str, ...]:
    """The outputs whose layout is the caller's business; all other memory is dense, head by head."""
    return tuple(name for name, stored in program.outputs.items() if stored == "input")


class _KernelPrinter:
    """One kernel; ``in_memory`` names what has a pointer beside the inputs."""

    sweep_printer = SweepPrinter
    own_constexprs: tuple[str, ...] = ()

    def __init__(self, program: SweepList, in_memory: set[str]):
        self.program = program
        self.in_memory = in_memory
        self.out = Lines()
        self.sweeps = self.sweep_printer(self.out, program)
        self.constexprs = (*constexprs(program), *self.own_constexprs)

    def print(self, name: str, stages: tuple[Stage, ...], parameters: tuple[tuple[str, str], ...]) -> str:
        out = self.out
        out.add("@triton.jit")
        out.open(f"def {name}(")
        for parameter, _ in parameters:
            out.add(f"{parameter},")
        for constant in self.constexprs:
            out.add(f"{constant}: tl.constexpr,")
        out.close()
        out.open("):")
        self._opening()
        for stage in stages:
            out.add()
            out.add(f"# {sweep_of(stage).name}")
            self._stage(stage, stages)
        return "\n".join(out) + "\n"

    def _packed(self, side: str, rank: str) -> None:
        self.out.open("if PACKED:")
        self.out.add(
            f"tile, q_start, seqlen_q, k_start, seqlen_k = packed_tile({side}_tiles_ptr, cu_seqlens_q_ptr, "
            f"cu_seqlens_k_ptr, {rank})"
        )
        self.out.close()

    def _scale(self) -> None:
        self.out.add(
            """\
scale_value = scale
if SCALE_TENSOR:
    scale_value = tl.load(scale_ptr)
scale_log2 = scale_value * 1.4426950408889634"""
        )

    def _input_base(self, name: str, head: str, start: str) -> None:
        self.out.add(f"{name}_base = {name}_ptr + batch * {name}_stride_b + {head} * {name}_stride_h")
        self.out.add(f"{name}_base += {start} * {name}_stride_n")


class RowKernelPrinter(_KernelPrinter):
    """Programs hold query rows: any stages of that kind, one after another."""

    rows_stop = "seqlen_q"

    def __init__(self, program: SweepList, in_memory: set[str]):
        super().__init__(program, in_memory)
        self.at_hand: set[str] = set()

    def _opening(self) -> None:
        """Which head and query tile this program has, and its rows' inputs."""
        out, program = self.out, self.program
        out.add(
            """\
num_tiles = seqlen_q // BLOCK_Q + num_sequences if PACKED else tl.cdiv(seqlen_q, BLOCK_Q)
bh, rank = program_head(tl.program_id(0), num_tiles, batch_heads, row_heads_per_group)
batch = (bh // num_heads).to(tl.int64)
head = (bh % num_heads).to(tl.int64)
first_row = bh.to(tl.int64) * seqlen_q
tile = row_tile(rank, num_tiles, CAUSAL)
q_start = 0
k_start = 0"""
        )
        self._packed("row", "rank")
        out.add(
            """\
first_row += q_start
start_m = tile * BLOCK_Q
offs_m = start_m + tl.arange(0, BLOCK_Q)
row_valid = offs_m < seqlen_q
start, full_start, full_stop, stop = key_segments(
    start_m, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, CAUSAL, WINDOWED
)"""
        )
        self._scale()
        for name in program.row_scalars:
            out.add(f"{name}_rows = tl.full([BLOCK_Q], 1.0, tl.float32) * {name}")
            out.open(f"if {name.upper()}_TENSOR:")
            self._input_base(name, "head", "q_start")
            out.add(f"{name}_rows = tl.load({name}_base + offs_m * {name}_stride_n, mask=row_valid, other=1.0)")
            out.close()
        for name in program.row_inputs:
            self._input_base(name, "head", "q_start")
            width, block = self.sweeps.width(name)
            out.add(
                f"{name} = load_tile({name}_base, start_m, seqlen_q, {name}_stride_n, {width}, BLOCK_Q, {block}, True)"
            )
        for name in program.col_inputs:
            self._input_base(name, "(head // group_size)", "k_start")

    def _stage(self, stage: Stage, stages: tuple[Stage, ...]) -> None:
        """A stage between loading and storing what crosses launches."""
        if not isinstance(stage, Loop):
            self._sweep(stage)
        elif len(stages) == 1:
            self._one_turn(stage)
        else:
            self._loop(stage)
        last_writer = {name: s for s in stages for name in s.writes()}
        for name in stage.writes():
            if name in self.in_memory and last_writer[name] is stage:
                self._store(name)

    def _loop(self, loop: Loop) -> None:
        """A loop among other stages of one launch."""
        out = self.out
        only_with_terms = self.program.refines and not loop.coarse
        self._load(loop.reads())
        if only_with_terms:
            out.open("if TERMS == 2:")
        self._enter(loop)
        # A flag that is carried along: Triton 3.6's layout pass fails on two loops with a reduction as condition.
        out.add(f"going = tl.max({loop.active}, axis=0) > 0")
        out.open("while going:")
        self._sweep(loop.sweep)
        out.add(f"going = tl.max({loop.active}, axis=0) > 0")
        out.close()
        if only_with_terms:
            out.close()
        self.sweeps.term_count = "TERMS"

    def _one_turn(self, loop: Loop) -> None:
        """A launch that is one turn of a loop; what only the epilogue reads is loaded after the stream."""
        out = self.out
        self._load({loop.active})
        out.open(f"if tl.max({loop.active}, axis=0) == 0:")
        out.add("return")
        out.close()
        self._load(frozenset().union(*(assign.value.symbols() for assign in loop.entry)))
        self._enter(loop)
        self._sweep(loop.sweep)
        self.sweeps.term_count = "TERMS"

    def _enter(self, loop: Loop) -> None:
        self.sweeps.term_count = "1" if loop.coarse else "TERMS"
        self.sweeps.assign(loop.entry)
        self.at_hand |= {assign.name for assign in loop.entry}

    def _sweep(self, sweep: Sweep) -> None:
        self._load(sweep.stream_reads())
        self.sweeps.assign(sweep.prologue)
        if sweep.streams:
            self.sweeps.stream_keys(sweep)
        self._load(sweep.reads())
        self.sweeps.assign(sweep.epilogue)
        self.at_hand |= sweep.writes().keys()

    def _load(self, names: frozenset[str] | set[str]) -> None:
        """Bring what lies in memory and is not at hand into registers."""
        out, program = self.out, self.program
        for name in sorted(names & self.in_memory - self.at_hand):
            if program.kinds[name] is Kind.ROW:
                other = 'float("inf")' if name == "lse" else "0.0"
                out.add(f"{name} = load_rows({name}_ptr + first_row, start_m, seqlen_q, {other}, BLOCK_Q, True)")
                self.sweeps.narrow(name)
            elif name in program.rounded:
                self._load_tile(f"{name}_high", f"{name}_ptr + first_row * HEAD_DIM", name)
                out.add(f"{name}_low = {name}_high")
                out.open("if TERMS == 2:")
                self._load_tile(f"{name}_low", f"{name}_ptr + (state_rows + first_row) * HEAD_DIM", name)
                out.close()
                out.add(f"{name} = joined({name}_high, {name}_low, TERMS)")
                self.sweeps.in_terms.add(name)
            else:
                self._load_tile(name, f"{name}_ptr + first_row * {self.sweeps.width(name)[0]}", name)
            self.at_hand.add(name)

    def _load_tile(self, variable: str, base: str, name: str) -> None:
        width, block = self.sweeps.width(name)
        self.out.add(f"{variable} = load_tile({base}, start_m, seqlen_q, {width}, {width}, BLOCK_Q, {block}, True)")

    def _store(self, name: str) -> None:
        out, program = self.out, self.program
        if program.kinds[name] is Kind.ROW:
            out.add(f"store_rows({name}_ptr + first_row, {name}, start_m, {self.rows_stop}, BLOCK_Q)")
        elif name in program.rounded:
            self._store_tile(f"{name}_ptr + first_row * HEAD_DIM", name, name, "HEAD_DIM")
            out.open("if TERMS == 2:")
            low = f"{name} - {name}.to({name}_ptr.dtype.element_ty).to(tl.float32)"
            self._store_tile(f"{name}_ptr + (state_rows + first_row) * HEAD_DIM", low, name, "HEAD_DIM")
            out.close()
        elif name in strided_outputs(program):
            self._store_strided(name)
        else:
            width = self.sweeps.width(name)[0]
            self._store_tile(f"{name}_ptr + first_row * {width}", name, name, width)

    def _store_strided(self, name: str) -> None:
        base = f"{name}_ptr + batch * {name}_stride_b + head * {name}_stride_h + q_start * {name}_stride_n"
        self._store_tile(base, name, name, f"{name}_stride_n")

    def _store_tile(self, base: str, value: str, name: str, stride: str) -> None:
        width, block = self.sweeps.width(name)
        self.out.add(f"store_tile({base}, {value}, start_m, seqlen_q, {stride}, {width}, BLOCK_Q, {block})")


class KeyKernelPrinter(_KernelPrinter):
    """Programs hold keys: one sweep, past which the rows of every query head of the group are streamed."""

    def _opening(self) -> None:
        """Which head and key tile this program has, and its keys' inputs."""
        out, program = self.out, self.program
        out.add(
            """\
num_tiles = seqlen_k // BLOCK_K + num_sequences if PACKED else tl.cdiv(seqlen_k, BLOCK_K)
num_kv_heads = num_heads // group_size
bh, tile = program_head(tl.program_id(0), num_tiles, batch_heads // group_size, key_heads_per_group)
batch = (bh // num_kv_heads).to(tl.int64)
kv_head = (bh % num_kv_heads).to(tl.int64)
rows_per_head = tl.cast(seqlen_q, tl.int64)
q_start = 0
k_start = 0"""
        )
        self._packed("key", "tile")
        out.add(
            """\
start_n = tile * BLOCK_K
offs_n = start_n + tl.arange(0, BLOCK_K)
start, full_start, full_stop, stop = query_segments(
    start_n, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, CAUSAL, WINDOWED
)"""
        )
        self._scale()
        for name in program.col_inputs:
            self._input_base(name, "kv_head", "k_start")
            width, block = self.sweeps.width(name)
            out.add(
                f"{name} = load_tile({name}_base, start_n, seqlen_k, {name}_stride_n, {width}, BLOCK_K, {block}, True)"
            )

    def _stage(self, stage: Stage, stages: tuple[Stage, ...]) -> None:
        out, program, sweep = self.out, self.program, sweep_of(stage)
        self.sweeps.start_sums(sweep)
        out.open("for group_head in tl.range(0, group_size if GROUPED else 1):")
        out.add("head = kv_head * group_size + group_head")
        out.add("first_row = (batch * num_heads + head) * rows_per_head + q_start")
        for name in sorted(sweep.stream_reads() - {"scale"}):
            if name in program.row_inputs:
                self._input_base(name, "head", "q_start")
            elif program.kinds[name] is Kind.ROW:
                out.add(f"{name}_base = {name}_ptr + first_row")
            else:
                out.add(f"{name}_base = {name}_ptr + first_row * {self.sweeps.width(name)[0]}")
        self.sweeps.segments(sweep)
        out.close()
        self.sweeps.end_sums(sweep)
        for name in sweep.writes():
            width, block = self.sweeps.width(name)
            base = f"{name}_ptr + batch * {name}_stride_b + kv_head * {name}_stride_h + k_start * {name}_stride_n"
            tile = f"{width}, {SIDES['keys'].held_block}, {block}"
            out.add(f"store_tile({base}, {name}, start_n, seqlen_k, {name}_stride_n, {tile})")
