"""The model of times on kernels of the CUDA backend: their loops, the warps that take them, and what is launched."""

import math
from dataclasses import replace

import numpy as np
import pytest
from compiled import NEEDS_NVRTC
from prediction_cases import A100, FUSED, H200, kernel, loop, spec_of

from lla_compile import backends
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin
from lla_compile.prediction.efficiency import START
from lla_compile.prediction.features import KernelFeatures, LoopMix
from lla_compile.prediction.layouts import Part, Unpredictable, turns_of_passes
from lla_compile.prediction.library import compile_features
from lla_compile.prediction.model import predict, turn_clocks
from lla_compile.prediction.occupancy import makespan
from lla_compile.prediction.workload import workload
from lla_compile.spec import LLASpec

LISTING = """
        /*0100*/                   MOV R1, c[0x0][0x28] ;
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0120*/              @!P0 BRA 0x500 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0140*/              @!P1 BRA 0x180 ;
        /*0150*/                   FSEL R2, R2, -INF , P2 ;
        /*0160*/                   MUFU.EX2 R3, R3 ;
        /*0170*/                   BRA.DIV UR7, 0x520 ;
        /*0180*/                   MUFU.EX2 R4, R4 ;
        /*0190*/               @P3 BRA 0x1c0 ;
        /*01a0*/                   LDGSTS.E.BYPASS.128 [R6], [R8.64] ;
        /*01b0*/                   BRA 0x1d0 ;
        /*01c0*/                   IADD3 R8, R8, 0x10, RZ ;
        /*01d0*/               @P4 BRA 0x110 ;
        /*01e0*/                   EXIT ;
        /*0500*/                   NANOSLEEP 0x20 ;
        /*0510*/                   BRA 0x110 ;
"""


def cubin_of(listing: str, monkeypatch) -> Cubin:
    monkeypatch.setattr("lla_compile.prediction.cubin._cuobjdump", lambda option, binary: listing)
    return Cubin("k", 4, 0, b"")


def test_an_ordinary_turn_jumps_over_what_is_rare(monkeypatch):
    """It masks nothing, but multiplies, copies and waits; where a wait goes on is no part of it."""
    cubin = cubin_of(LISTING, monkeypatch)
    (loop,) = cubin.loops
    turn = cubin.ordinary_turn(loop)
    assert (loop.start, loop.stop) == (turn.start, turn.stop) == (0x110, 0x1D0) and sum(loop.counts.values()) == 13
    assert sum(turn.counts.values()) == 9 and turn["FSEL"] == turn["IADD3"] == 0
    assert (turn["HGMMA"], turn["MUFU"], turn["SYNCS"], turn["LDGSTS"], turn["BRA"]) == (1, 1, 1, 1, 5)


def test_what_is_around_inner_loops(monkeypatch):
    """The first jump of a body that holds two loops; neither belongs to it."""
    product = "HMMA.16816.F32 R4, R8, R12, R4"
    listing = "\n".join(
        f"/*{0x100 + 16 * place:04x}*/ {text} ;"
        for place, text in enumerate(
            ("LDGSTS [R6], [R8.64]", product, "@P0 BRA 0x110", product, "@P1 BRA 0x130", "@P2 BRA 0x100")
        )
    )
    cubin = cubin_of(listing, monkeypatch)
    ((around, inner),) = cubin.enclosing.items()
    assert len(inner) == 2 and +around.counts == {"LDGSTS": 1, "BRA": 1}
    monkeypatch.setattr(Cubin, "_resources", {"REG": 40, "STACK": 0, "LOCAL": 0})
    assert [(x.inner, x.matrix, x.copied_bytes) for x in KernelFeatures.of(cubin, by_hand=True).loops] == [
        (2, 0, 128), (0, 1, 0), (0, 1, 0)
    ]  # fmt: skip


def rows_loop(**fields) -> LoopMix:
    return loop(copied_bytes=0, signals=2, **fields)


def copying_loop(**fields) -> LoopMix:
    return replace(loop(issue=90, special=0, matrix=0, grouped=False, waits=0, signals=1), **fields)


def by_groups(*loops: LoopMix, num_warps=12) -> KernelFeatures:
    return replace(kernel(loops=0), num_warps=num_warps, loops=loops)


CUDA = KernelConfig("cuda", "fused", 128, 64, 32, 12, 4)


def test_a_turn_is_of_the_rows_and_of_what_copies_for_them():
    """Both loops of the solver stream what one loop copies; one that fetches the block's own rows is none of them."""
    _, *rest = (own := rows_loop(), rows_loop(issue=300), rows_loop(issue=250), rows_loop(issue=280))
    copies = copying_loop(), copying_loop(issue=95), copying_loop(issue=180)
    (launch,) = workload(spec_of(precision="accurate"), CUDA).launches
    found = turns_of_passes(by_groups(copying_loop(signals=0), own, *rest, *copies), launch.passes)
    assert [hot == masked for hot, masked in found] == 4 * [True]
    assert all((rows.warps, rows.groups, copying.warps) == (8, 2, 4) for (rows, copying), _ in found)
    issued = [(rows.mix.issue, copying.mix.issue) for (rows, copying), _ in found]
    assert issued == [(200, 90), (300, 95), (250, 95), (280, 180)]
    with pytest.raises(Unpredictable, match="k has 3 loops over tiles for 4 sweep"):
        turns_of_passes(by_groups(*rest, *copies), launch.passes)


DECODING = KernelConfig("cuda", "gram", 1, 64, 256, 12, 6, num_splits=4, block_d=64)


def decoding(seqlen: int, precision="accurate") -> LLASpec:
    return LLASpec.decoding("bfloat16", 64, seqlen, 8, 64, group_size=1, is_causal=True, precision=precision)


@pytest.mark.parametrize(
    "seqlen, precision, issue", [(2048, "accurate", 400), (4096, "accurate", 300), (2048, "fast", 300)]
)
def test_decoding_multiplies_two_tiles_a_turn_or_one_in_two_terms(seqlen, precision, issue):
    loops = rows_loop(issue=400, waits=1), rows_loop(issue=600, waits=2)
    weighing = copying_loop(special=1, barriers=1), copying_loop()
    gram_pass = by_groups(copying_loop(), *loops[precision == "fast" :], *weighing)
    first, merge, solve = workload(decoding(seqlen, precision), DECODING).launches
    ((rows, weights), _), = turns_of_passes(gram_pass, first.passes)  # fmt: skip
    assert rows.mix.issue == issue and rows.mix.waits == 1 and weights.mix.special == 1
    terms = 2 if issue == 400 else 1
    assert first.passes[0].flops == 2 * 64 * (terms * 64 * 128 + 64) and first.copies == 8 * 4
    assert merge.copies == 8 * math.ceil((16 + 3 * 64 + 64 * 128) / 256) and solve.copies == 8


def test_decoding_in_steps_of_sixteen_keys():
    """64 keys: four steps of the products, whose warps are halves; four of eight warps make the weights."""
    outer, weigh = replace(copying_loop(issue=100, signals=0), inner=3), loop(issue=80, copied_bytes=0, grouped=False)
    keys, values = (loop(issue=n, copied_bytes=0, grouped=False) for n in (300, 200))
    passes = workload(decoding(4096), replace(DECODING, num_warps=8)).launches[0].passes
    ((turn, _),) = turns_of_passes(by_groups(weigh, outer, weigh, keys, values, num_warps=8), passes)
    assert [(part.mix.issue, part.warps) for part in turn] == [(100 + 40 + 1200, 4), (100 + 40 + 800, 4)]


def test_groups_of_rows_fill_each_others_waits():
    """Two groups have twice the work of one and take less than twice the time; what copies adds to what is issued."""

    def clocks(groups: int, issue=90):
        copying = Part(copying_loop(issue=issue), 4)
        rows = Part(rows_loop(), 4 * groups, groups, ahead=True)
        return turn_clocks((rows, copying), 1, 1e6 * groups, H200, START)

    assert clocks(1) < clocks(2) < 1.9 * clocks(1) and clocks(1) < clocks(1, issue=400)


@pytest.mark.parametrize("stages, forward, decode", [(3, 1.0, 1.0), (4, 1 / 2, 1.0), (8, 1 / 6, 1 / 5)])
def test_a_short_ring_waits_for_its_copies(stages, forward, decode):
    """Two of its stages are in use in a sweep, three in decoding; the compiler's own loads wait in their loops."""
    copying = Part(copying_loop(), 4, latencies=forward)
    assert turn_clocks((copying,), 1, 0, H200, START) > turn_clocks((replace(copying, latencies=0),), 1, 0, H200, START)
    (launch,) = workload(spec_of(op="softmax", precision="accurate"), replace(CUDA, num_stages=stages)).launches
    (((_, copies), _),) = turns_of_passes(by_groups(rows_loop(), copying_loop()), launch.passes)
    assert copies.latencies == pytest.approx(forward)
    passes = workload(decoding(4096, "fast"), replace(DECODING, num_stages=stages)).launches[0].passes
    gram_pass = by_groups(rows_loop(waits=2), copying_loop(special=1, signals=2))
    (((_, copies), _),) = turns_of_passes(gram_pass, passes)
    assert copies.latencies == pytest.approx(decode)
    (launch,) = workload(spec_of(op="softmax", precision="accurate"), FUSED).launches
    (((own,), _),) = turns_of_passes(kernel(loops=2), launch.passes)
    assert own.latencies == 0


@pytest.mark.parametrize("pairs", [1, 2])
def test_warps_that_weigh_may_turn_once_in_two_tiles(pairs):
    """Told by what one of the four copies in a turn: a quarter of a tile of 64 keys and values of 64, or half."""
    passes = workload(decoding(4096, "fast"), DECODING).launches[0].passes
    weighing = copying_loop(special=4, signals=2, copied_bytes=4096 * pairs)
    (((_, copies), _),) = turns_of_passes(by_groups(rows_loop(waits=2), weighing), passes)
    assert (copies.warps, copies.groups) == (4, pairs)
    assert (copies.mix.issue, copies.mix.copied_bytes) == (weighing.issue / pairs, 4096)


def test_cuda_launches_a_turn_of_both_loops_and_a_table():
    stats, *turns, output = workload(spec_of(precision="accurate"), replace(CUDA, schedule="split")).launches
    assert sum(x.count for x in turns) == 32 and {x.kernel for x in turns} == {1} and output.kernel == 2
    assert all(len(x.passes) == 2 and (sum(p.updates for p in x.passes) <= 1 + 1e-9).all() for x in turns)
    fused = workload(spec_of(precision="accurate"), CUDA).launches[0].passes[1:3]
    for number, own in enumerate(fused):
        assert sum(x.passes[number].turns.sum() for x in turns) == pytest.approx(own.turns.sum())
    config = KernelConfig("cuda", "fused", 128, 64, None, None, 4, 64, 128, None, 4)
    table, rows, keys = workload(spec_of(phase="backward", op="parallax", seqlen=1024), config).launches
    assert not table.passes and table.copies == 2 * 1024 // 32 and (rows.kernel, keys.kernel) == (1, 2)
    assert rows.head_bytes == 1024 * 128 * 2 and keys.head_bytes == 1024 * 192 * 2


def test_heads_that_run_in_groups_leave_their_last_group_to_the_end():
    """Two groups of two heads: each has its long tiles first, so that the last ones run beside short ones of before."""
    durations = np.array([4.0, 1.0])
    assert makespan(durations, 4, 4) == 5.0
    assert makespan(np.tile(durations, 2), np.repeat([2, 2], 2), 4) == 5.0
    assert makespan(np.tile(durations, 2), np.repeat([3, 1], 2), 4) == 7.0


@NEEDS_NVRTC
@pytest.mark.parametrize(
    "device, spec",
    [
        (H200, spec_of(4096, 32)),
        (A100, spec_of(4096, 32)),
        (H200, spec_of(4096, 32, op="parallax", phase="backward", precision="accurate")),
        (H200, decoding(4096)),
        (A100, decoding(4096)),
    ],
    ids=lambda x: x.id if hasattr(x, "id") else f"{x.op}-{x.phase}",
)
def test_loops_of_compiled_kernels_are_those_of_their_sweeps(device, spec):
    """What the turns of the defaults' sweeps multiply is what the model counts for them."""
    config = backends.get("cuda").default_config(spec, device)
    kernels = compile_features(spec, config, device)
    prediction = predict(spec, config, device, kernels)
    assert prediction.limit is None and math.isfinite(prediction.milliseconds)
    for launch in (x for x in workload(spec, config).launches if x.passes):
        for (hot, _), own in zip(turns_of_passes(kernels[launch.kernel], launch.passes), launch.passes):
            multiplied = sum(part.mix.matrix_flops * part.warps for part in hot)
            # Sums of keys and of values, made by products besides, are up to a fifth at 64 columns.
            assert own.flops <= 1.02 * multiplied and multiplied <= 1.2 * own.flops
