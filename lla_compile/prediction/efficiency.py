"""The model's constants that no data sheet has: fitted to measured trials by ``python -m benchmarks.prediction``."""

from __future__ import annotations

from dataclasses import dataclass

# Predictions of different versions are not comparable; entries carry the one that made them.
VERSION = 1


@dataclass(frozen=True)
class Efficiency:
    """What of the peaks is attained, and what waiting costs.

    Attributes:
        tensor: share of the tensor cores' peak.
        legacy_tensor: factor on it where an architecture with wider products (HGMMA) issues the older ones (HMMA).
        issue: share of an instruction a clock that each of the four schedulers issues.
        shared: share of 128 bytes a clock from and to shared memory.
        l2_bytes: bytes a clock that a multiprocessor gets from the second-level cache.
        dram: share of the peak bandwidth.
        cpi: clocks from one instruction of a warp to its next, where nothing else runs.
        wait: clocks until a tile product that is waited for has ended.
        barrier: clocks until the warps of a block have met, for each warp.
        load: clocks that a loop waits for what it loads into registers.
        local: clocks of an access of local memory by a warp.
        overlap: exponent p in (sum of t_i^p)^(1/p) over what may overlap: 1 adds up, infinity is the maximum.
        update: clocks of a sweep's prologue and epilogue for each element of the row state that a thread has.
        block: clocks that a block takes beside its loops.
        straight: clocks of an instruction in kernels without tile products, loops over vectors included.
        launch_us: of the device for each launch.
        host_us: of the host for each launch.
    """

    tensor: float = 0.6
    legacy_tensor: float = 0.6
    issue: float = 0.7
    shared: float = 0.8
    l2_bytes: float = 32.0
    dram: float = 0.8
    cpi: float = 2.0
    wait: float = 60.0
    barrier: float = 10.0
    load: float = 600.0
    local: float = 4.0
    overlap: float = 2.5
    update: float = 20.0
    block: float = 3000.0
    straight: float = 10.0
    launch_us: float = 3.0
    host_us: float = 22.0


# Where a fit begins: what profiles of single kernels suggest.
START = Efficiency()

# As in benchmarks/results/nvidia-h200/prediction.json.
BY_PHASE = {
    "forward": Efficiency(
        tensor=1.0, legacy_tensor=0.9436, issue=0.4544, shared=0.3678, l2_bytes=18.41, dram=1.0, cpi=1.219, wait=29.11,
        barrier=3.213, load=1019.0, local=15.9, overlap=3.443, update=20.9, block=3680.0, straight=9.74,
        launch_us=6.44, host_us=19.36,
    ),
    "backward": Efficiency(
        tensor=0.9278, legacy_tensor=0.8931, issue=0.4529, shared=0.9537, l2_bytes=170.8, dram=0.4446, cpi=0.9743,
        wait=29.06, barrier=4.041, load=422.2, local=2.47, overlap=2.299, update=16.28, block=3046.0, straight=6.132,
        launch_us=2.391, host_us=30.74,
    ),
    "decode": Efficiency(
        tensor=0.9686, legacy_tensor=0.5833, issue=1.0, shared=0.9859, l2_bytes=56.0, dram=1.0, cpi=2.092, wait=57.15,
        barrier=2.262, load=170.9, local=2.974, overlap=4.863, update=10.1, block=1929.0, straight=9.294,
        launch_us=3.42, host_us=27.19,
    ),
}  # fmt: skip
