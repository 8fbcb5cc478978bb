"""The time of a plan on a device: work of its loops against the rates of a multiprocessor, blocks against slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from lla_compile.devices import DeviceInfo
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.prediction.efficiency import Efficiency
from lla_compile.prediction.features import KernelFeatures, LoopMix
from lla_compile.prediction.occupancy import blocks_per_sm, makespan
from lla_compile.prediction.workload import Launch, Workload, workload
from lla_compile.spec import LLASpec

_LANES = 32
_SCHEDULERS = 4
_SHARED_BYTES_PER_CLOCK = 128

# The tuner's timer keeps the device busy for so long before the first launch (see tuner/timing.py): launches that a
# host enqueues in that time cost it nothing.
HEAD_START_MS = 0.4

# A plan whose loops execute a larger share of local-memory accesses keeps its accumulators there: it spills. Up to it,
# compilers park addresses and row state, or spill in a sweep that runs once a call beside many turns of CG. On an H200
# every plan above it took at least 1.2 times as long as the best, and plans with up to 2.4 % won.
_SPILLED_SHARE = 0.03


class Unpredictable(ValueError):
    """The model does not know the device or the kernel well enough; the message says what is missing."""


@dataclass(frozen=True)
class Prediction:
    """Times of a plan.

    Attributes:
        milliseconds: from the first launch to the end of the last, as the tuner's timer sees it; infinite if a kernel
            does not fit.
        limit: the limit of the device that the kernels break, so that they do not run or spill; None if they run.
    """

    milliseconds: float
    limit: str | None = None


def predict(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    kernels: Sequence[KernelFeatures],
    constants: Efficiency | None = None,
) -> Prediction:
    """The time of an ordinary call with standard normal inputs.

    Args:
        spec, config, device: the plan.
        kernels: what it compiles to, in launch order.
        constants: of the model; None takes those of the phase.

    Raises:
        Unpredictable: figures of the device are missing, or a kernel is not laid out as the workload says.
    """
    require_rates(device)
    constants = constants or efficiency.BY_PHASE[spec.phase]
    work = workload(spec, config)
    if len(kernels) < (expected := 1 + max((launch.kernel for launch in work.launches), default=-1)):
        raise Unpredictable(
            f"{config.backend} {config.schedule} has {len(kernels)} kernels, the model knows {expected}"
        )
    limit = next(filter(None, (broken_limit(kernels[n], device) for n in {x.kernel for x in work.launches})), None)
    if limit is None and (spilled := spilled_share(work, kernels)) > _SPILLED_SHARE:
        limit = f"it spills: {spilled:.1%} of what the loops execute are accesses of local memory"
    clocks = sum(launch.count * _clocks(launch, kernels[launch.kernel], device, constants) for launch in work.launches)
    bandwidth = constants.dram * device.bandwidth_gbs * 1e9
    seconds = max(clocks / (device.clock_ghz * 1e9), work.bytes / bandwidth)
    seconds += sum(launch.bytes for launch in work.launches) / bandwidth
    launches = sum(launch.count for launch in work.launches)
    device_ms = 1e3 * seconds + 1e-3 * constants.launch_us * launches
    return Prediction(max(device_ms, 1e-3 * constants.host_us * launches - HEAD_START_MS), limit)


def require_rates(device: DeviceInfo) -> None:
    """Refuse a device whose rates are not in devices.yaml.

    Raises:
        Unpredictable: the message names what is missing.
    """
    needed = ("sms", "clock_ghz", "bandwidth_gbs", "special_per_clock", "warps_per_sm", "blocks_per_sm")
    if missing := [name for name in needed if not getattr(device, name)]:
        raise Unpredictable(f"times on {device.id} cannot be predicted: {', '.join(missing)} not known")


def broken_limit(kernel: KernelFeatures, device: DeviceInfo) -> str | None:
    """Why a kernel does not run on a device, or None."""
    if not blocks_per_sm(kernel.registers, kernel.shared, kernel.num_warps, device):
        return (
            f"{kernel.name} needs {kernel.registers} registers a thread and {kernel.shared} B of shared memory for "
            f"{kernel.num_warps} warps, more than {device.id} has"
        )
    return None


def spilled_share(work: Workload, kernels: Sequence[KernelFeatures]) -> float:
    """Accesses of local memory among the instructions that the loops over tiles execute."""
    local = issue = 0.0
    for launch in work.launches:
        loops = loops_of_passes(kernels[launch.kernel], len(launch.passes)) if launch.passes else ()
        for own, pair in zip(launch.passes, loops):
            for loop, turns in zip(pair, (own.turns.sum(), own.masked.sum())):
                executed = turns * launch.count * launch.copies * kernels[launch.kernel].num_warps
                local += executed * loop.local
                issue += executed * loop.issue
    return float(local / issue) if issue else 0.0


def turn_clocks(
    loop: LoopMix, num_warps: int, resident: int, flops: float, device: DeviceInfo, constants: Efficiency
) -> float:
    """Clocks of one turn of a loop while ``resident`` blocks share the multiprocessor.

    Args:
        loop: one turn, for one warp.
        num_warps: of a block.
        resident: blocks on the multiprocessor.
        flops: tile products of one turn of a block.
    """
    peak = device.tensor_flops_per_clock * constants.tensor
    if not loop.grouped and device.compute_capability.startswith("9."):
        peak *= constants.legacy_tensor
    tensor = flops / peak
    issue = loop.issue * num_warps / _SCHEDULERS
    throughputs = (
        tensor,
        loop.special * num_warps * _LANES / device.special_per_clock,
        issue / constants.issue,
        (loop.shared_bytes + loop.copied_bytes) * num_warps / (_SHARED_BYTES_PER_CLOCK * constants.shared),
        (loop.copied_bytes + loop.loaded_bytes) * num_warps / constants.l2_bytes,
        loop.local * num_warps * constants.local,
    )
    alone = tensor + loop.issue * max(1.0, num_warps / _SCHEDULERS) * constants.cpi
    alone += loop.waits * constants.wait + loop.barriers * num_warps * constants.barrier
    alone += constants.load if loop.loaded_bytes else 0.0
    return _overlapped((*(resident * clocks for clocks in throughputs), alone), constants.overlap)


def loops_of_passes(kernel: KernelFeatures, passes: int) -> list[tuple[LoopMix, LoopMix]]:
    """The loop over unmasked tiles and one over masked tiles of each sweep of a kernel.

    Raises:
        Unpredictable: the kernel has other loops than one to three a sweep.
    """
    loading = [loop for loop in kernel.loops if loop.loads]
    each, rest = divmod(len(loading), passes)
    if rest or not 1 <= each <= 3:
        raise Unpredictable(f"{kernel.name} has {len(loading)} loops over tiles for {passes} sweep(s)")
    groups = [loading[i * each : (i + 1) * each] for i in range(passes)]
    return [(group[1] if each == 3 else group[0], group[-1]) for group in groups]


def _clocks(launch: Launch, kernel: KernelFeatures, device: DeviceInfo, constants: Efficiency) -> float:
    resident = blocks_per_sm(kernel.registers, kernel.shared, kernel.num_warps, device)
    if not resident:
        return float("inf")
    if not launch.passes:
        durations = np.full(1, constants.block + constants.straight * kernel.issue)
        return makespan(durations, launch.copies, resident * device.sms)
    blocks = len(launch.passes[0].turns) * launch.copies
    resident = max(1, min(resident, -(-blocks // device.sms)))
    durations = np.full(len(launch.passes[0].turns), constants.block)
    threads = _LANES * kernel.num_warps
    for work, (hot, masked) in zip(launch.passes, loops_of_passes(kernel, len(launch.passes))):
        arguments = (kernel.num_warps, resident, work.flops, device, constants)
        durations += work.turns * turn_clocks(hot, *arguments) + work.masked * turn_clocks(masked, *arguments)
        durations += work.updates * constants.update * work.rows * work.columns / threads
    return makespan(durations, launch.copies, resident * device.sms)


def _overlapped(clocks: Sequence[float], exponent: float) -> float:
    """Of things that overlap in part: their sum at exponent 1, the longest at infinity."""
    longest = max(clocks)
    return longest * sum((x / longest) ** exponent for x in clocks) ** (1 / exponent) if longest else 0.0
