"""The model of times: occupancy, makespans, trip counts and terms against figures worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from prediction_cases import A100, FUSED, H200, L4, kernel, loop, spec_of

from lla_compile.devices import identify_properties, known_devices, resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.efficiency import START
from lla_compile.prediction.features import KernelFeatures
from lla_compile.prediction.layouts import Part, Unpredictable, turns_of_passes
from lla_compile.prediction.model import predict, turn_clocks
from lla_compile.prediction.occupancy import blocks_per_sm, makespan
from lla_compile.prediction.workload import iterations, workload
from lla_compile.spec import LLASpec

def test_every_gpu_has_the_rates_and_its_clock_is_the_data_sheets():
    for device in known_devices():
        if not device.is_cpu:
            assert device.special_per_clock and device.warps_per_sm and device.blocks_per_sm and device.l2_bytes
    boost_ghz = {"a100": 1.41, "l4": 2.04, "a10": 1.695, "rtx3090": 1.695, "rtx4090": 2.52, "rtx5090": 2.407}
    for name, clock in boost_ghz.items():
        assert resolve(name).clock_ghz == pytest.approx(clock, rel=0.01)


@pytest.mark.parametrize(
    "registers, shared, warps, device, expected",
    [
        (255, 57344, 4, H200, 2),  # 128 threads x 256 registers are half of 65536
        (128, 60000, 4, H200, 3),  # 233472 / (60000 + 1024) is 3.8; registers would do for 4
        (168, 0, 4, H200, 3),  # 168 x 32 = 5376 registers of a warp, 21504 of a block
        (32, 0, 1, L4, 24),  # blocks
        (32, 0, 8, L4, 6),  # 48 warps
        (255, 90_000, 4, A100, 1),
        (255, 170_000, 4, A100, 0),  # more than a block may have
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, device, expected):
    assert blocks_per_sm(registers, shared, warps, device) == expected


@pytest.mark.parametrize(
    "durations, copies, slots, expected",
    [
        ([3.0], 4, 4, 3.0),  # a wave
        ([3.0], 5, 4, 6.0),  # and a block
        ([4.0, 3.0, 2.0, 1.0], 1, 2, 5.0),  # 4 + 1, 3 + 2
        ([5.0, 1.0], 2, 3, 5.0),  # 5, 5, and 1 after 1 beside them
    ],
)
def test_blocks_run_as_slots_become_free(durations, copies, slots, expected):
    assert makespan(np.array(durations), copies, slots) == expected


def test_many_blocks_are_balanced():
    assert makespan(np.full(1000, 2.0), 1, 10) == pytest.approx(201.0)


def test_trip_counts_of_causal_tiles():
    """Four query tiles of 64 rows: the first, then the longest. Each has one masked tile, on the diagonal."""
    (launch,) = workload(spec_of(), FUSED).launches
    stats, cg, output = launch.passes
    assert launch.copies == 2 and stats.turns.tolist() == [0, 3, 2, 1] == output.turns.tolist()
    assert stats.masked.tolist() == [1, 1, 1, 1]
    assert cg.turns == pytest.approx(stats.turns * cg.updates)
    # q.k and p.k, of 64 x 64 pairs and 64 columns.
    assert stats.flops == 2 * 64 * 64 * (64 + 64) and output.flops == 2 * 64 * 64 * 3 * 64
    wide = replace(FUSED, block_k=128)
    (launch,) = workload(spec_of(), wide).launches
    assert launch.passes[0].turns.tolist() == [0, 1, 1, 0] and launch.passes[0].masked.tolist() == [1, 1, 1, 1]


def test_trip_counts_without_a_mask_and_with_a_window():
    (launch,) = workload(spec_of(causal=False), FUSED).launches
    assert launch.passes[0].turns.tolist() == [4, 4, 4, 4] and launch.passes[0].masked.tolist() == [0, 0, 0, 0]
    (launch,) = workload(spec_of(window_size=64), FUSED).launches
    # A tile's last row sees the 64 keys up to its own, its first those before: two tiles, none in full.
    assert launch.passes[0].turns.tolist() == [0, 0, 0, 0] and launch.passes[0].masked.tolist() == [1, 2, 2, 2]


def test_the_sweep_that_holds_keys_streams_queries():
    config = replace(FUSED, kv_block_q=32, kv_block_k=64, kv_num_warps=4, kv_num_stages=2)
    rows, keys = workload(spec_of(phase="backward"), config).launches
    (sums,) = keys.passes
    assert keys.kernel == 1 and sums.rows == 64
    # Key tile i is seen by the query tiles of 32 rows from 2i on, of which two need the mask.
    assert sums.turns.tolist() == [6, 4, 2, 0] and sums.masked.tolist() == [2, 2, 2, 2]
    assert sums.flops == 2 * 32 * 64 * 8 * 64


def test_iterations_are_those_that_were_measured():
    """Row means at ridge 1 are 5.3 (513 to 1024 keys) and 6.2 (257 to 512), a tile takes one more; at 0.1, 8 and 11."""
    assert iterations(768, 64, 1.0, 1e-3) == pytest.approx(6.2, abs=0.5)
    assert iterations(384, 64, 1.0, 1e-3) == pytest.approx(7.2, abs=0.5)
    assert iterations(768, 64, 0.1, 1e-3) == pytest.approx(9.0, abs=1.0)
    assert iterations(10, 64, 1.0, 1e-3) == iterations(64, 64, 1.0, 1e-3) < 12


def test_a_split_schedule_launches_up_to_the_cap():
    launches = workload(spec_of(), replace(FUSED, schedule="split")).launches
    assert sum(x.count for x in launches) == 1 + 32 + 1
    active = [x.passes[0].updates.sum() for x in launches[1:-1]]
    assert active == sorted(active, reverse=True) and active[0] == 4 and active[-1] == 0
    fused = workload(spec_of(), FUSED).launches[0].passes[1]
    assert sum(x.passes[0].turns.sum() for x in launches[1:-1]) == pytest.approx(fused.turns.sum())


def test_operands_that_are_split_cost_more_until_the_coarse_loop():
    fast, accurate = (workload(spec_of(precision=p), FUSED).launches[0].passes for p in ("fast", "accurate"))
    assert len(fast) == 3 and len(accurate) == 4  # one loop, two loops
    _, fine, coarse, output = accurate
    assert fine.flops == 2 * 64 * 64 * (1 + 2 + 2) * 64 == output.flops and coarse.flops == fast[1].flops
    assert (fine.updates < coarse.updates).all()


def test_a_part_of_a_cache_is_a_block():
    spec = LLASpec.decoding("bfloat16", 64, 4096, 8, 64, group_size=1, is_causal=True, precision="fast")
    config = KernelConfig("triton", "gram", 1, 64, 256, 4, 3, num_splits=16, block_d=64)
    gram, merge, solve = workload(spec, config).launches
    part = 16 + 3 * 64 + 64 * 128
    assert merge.copies == 8 * math.ceil(part / 512) and solve.copies == 8 and merge.bytes == 17 * 8 * 4 * part
    assert gram.copies == 8 * 16 and gram.passes[0].turns.tolist() == [4] and not merge.passes and not solve.passes
    assert workload(spec, config).bytes == 8 * 4096 * 128 * 2


def test_each_term_makes_a_turn_longer():
    def clocks(resident=1, device=H200, **fields):
        return turn_clocks((Part(loop(**fields), 4),), resident, 1e6, device, START)

    base = clocks()
    for term in ({"issue": 400}, {"special": 300}, {"waits": 12}, {"barriers": 20}, {"shared_bytes": 60_000},
                 {"copied_bytes": 60_000}, {"loaded_bytes": 64}, {"local": 100}):  # fmt: skip
        assert clocks(**term) > base, term
    assert base < clocks(resident=2) < 2 * base  # two blocks hide each other's waiting
    assert clocks(grouped=False) > base  # Hopper's older products are slower


def test_more_multiprocessors_more_work_and_spills():
    spec = spec_of(4096, 32)
    one = predict(spec, FUSED, H200, [kernel()])
    assert one.limit is None and 0.1 < one.milliseconds < 100
    assert predict(spec, FUSED, resolve("h100-pcie"), [kernel()]).milliseconds > one.milliseconds
    twice = predict(spec_of(4096, 64), FUSED, H200, [kernel()]).milliseconds
    assert twice == pytest.approx(2 * one.milliseconds, rel=0.05)
    spilling = replace(kernel(), loops=tuple(loop(local=40) for _ in range(6)))
    assert "it spills: 20.0% of what the loops execute" in predict(spec, FUSED, H200, [spilling]).limit
    # The sweeps after CG spill, which turns about five times as often: a sixth of the stream.
    late = [loop(local=8 * (i > 3), copied_bytes=2048 * (i % 2 == 0), loaded_bytes=2048 * (i % 2)) for i in range(6)]
    assert predict(spec, FUSED, H200, [replace(kernel(), loops=tuple(late))]).limit is None
    large = predict(spec, FUSED, L4, [kernel(shared=150_000)])
    assert math.isinf(large.milliseconds) and "more than nvidia-l4 has" in large.limit


def test_what_is_not_known_is_refused():
    unlisted = identify_properties("NVIDIA Nothing 1", "9.0", 7)
    with pytest.raises(Unpredictable, match="nvidia-nothing-1-7sm cannot be predicted: .*bandwidth_gbs"):
        predict(spec_of(), FUSED, unlisted, [kernel()])
    with pytest.raises(Unpredictable, match="7 loops over tiles for 3 sweep"):
        turns_of_passes(kernel(loops=7), workload(spec_of(), FUSED).launches[0].passes)
    with pytest.raises(Unpredictable, match="cuda split has 2 kernels, the model knows 3"):
        predict(spec_of(), replace(FUSED, backend="cuda", schedule="split"), H200, 2 * [kernel()])
    with pytest.raises(NotImplementedError, match="packed"):
        workload(spec_of(num_sequences=3), FUSED)


def test_features_cross_json():
    assert KernelFeatures.from_dict(kernel().as_dict()) == kernel()
