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
        hopper_tensor: factor on it for compute capability 9.0.
        legacy_tensor: further factor there on products of single warps (HMMA), which do not reach that peak.
        issue: share of an instruction a clock that each of the four schedulers issues.
        shared: share of 128 bytes a clock from and to shared memory.
        l2_bytes: bytes a clock that a multiprocessor gets from the second-level cache.
        dram: share of the peak bandwidth.
        cpi: clocks from one instruction of a warp to its next, where nothing else runs.
        wait: clocks until a tile product that is waited for has ended.
        barrier: clocks until the warps of a block have met, for each warp.
        load: clocks that a loop waits for what it loads into registers, or a stage of a ring for what is copied to it.
        local: clocks of an access of local memory by a warp.
        overlap: exponent p in (sum of t_i^p)^(1/p) over what may overlap: 1 adds up, infinity is the maximum.
        update: clocks of a sweep's prologue and epilogue for each element of the row state that a thread has.
        block: clocks that a block takes beside its loops.
        straight: clocks of an instruction in kernels without tile products, loops over vectors included.
        launch_us: of the device for each launch.
        host_us: of the host for each launch.
    """

    tensor: float = 0.6
    hopper_tensor: float = 1.0
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

# As in benchmarks/results/nvidia-h200/prediction.json, by backend and phase.
BY_BACKEND = {
    "triton": {
        "forward": Efficiency(
            tensor=1.0, hopper_tensor=0.9436, legacy_tensor=1.0, issue=0.4544, shared=0.3678, l2_bytes=18.41, dram=1.0,
            cpi=1.219, wait=29.11, barrier=3.213, load=1019.0, local=15.9, overlap=3.443, update=20.9, block=3680.0,
            straight=9.74, launch_us=6.44, host_us=19.36,
        ),
        "backward": Efficiency(
            tensor=0.9278, hopper_tensor=0.8931, legacy_tensor=1.0, issue=0.4529, shared=0.9537, l2_bytes=170.8,
            dram=0.4446, cpi=0.9743, wait=29.06, barrier=4.041, load=422.2, local=2.47, overlap=2.299, update=16.28,
            block=3046.0, straight=6.132, launch_us=2.391, host_us=30.74,
        ),
        "decode": Efficiency(
            tensor=0.9686, hopper_tensor=0.5833, legacy_tensor=1.0, issue=1.0, shared=0.9859, l2_bytes=56.0, dram=1.0,
            cpi=2.092, wait=57.15, barrier=2.262, load=170.9, local=2.974, overlap=4.863, update=10.1, block=1929.0,
            straight=9.294, launch_us=3.42, host_us=27.19,
        ),
    },
    "cuda": {
        "forward": Efficiency(
            tensor=0.7989, hopper_tensor=1.0, legacy_tensor=0.4643, issue=0.7325, shared=0.9883, l2_bytes=31.62,
            dram=0.845, cpi=2.259, wait=54.37, barrier=7.764, load=1067.0, local=4.423, overlap=2.946, update=143.4,
            block=5500.0, straight=13.79, launch_us=4.705, host_us=17.76,
        ),
        "backward": Efficiency(
            tensor=0.7871, hopper_tensor=1.0, legacy_tensor=0.501, issue=0.9176, shared=0.6881, l2_bytes=25.19,
            dram=1.0, cpi=2.942, wait=64.01, barrier=9.497, load=505.8, local=3.683, overlap=3.406, update=18.77,
            block=4368.0, straight=12.34, launch_us=5.802, host_us=31.18,
        ),
        "decode": Efficiency(
            tensor=1.0, hopper_tensor=1.0, legacy_tensor=1.0, issue=0.8712, shared=1.0, l2_bytes=60.32, dram=0.6835,
            cpi=2.281, wait=70.53, barrier=12.09, load=598.6, local=1.622, overlap=2.574, update=20.27, block=1588.0,
            straight=4.243, launch_us=2.449, host_us=21.75,
        ),
    },
}  # fmt: skip
