"""The time of a plan on a device: work of its loops against the rates of a multiprocessor, blocks against slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from lla_compile.backends.head_groups import heads_per_group
from lla_compile.devices import DeviceInfo
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.prediction.efficiency import Efficiency
from lla_compile.prediction.features import KernelFeatures
from lla_compile.prediction.layouts import Part, Turn, Unpredictable, turns_of_passes
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
        constants: of the model; None takes those of the backend and the phase.

    Raises:
        Unpredictable: figures of the device are missing, or a kernel is not laid out as the workload says.
    """
    require_rates(device)
    constants = constants or efficiency.BY_BACKEND[config.backend][spec.phase]
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
        pairs = turns_of_passes(kernels[launch.kernel], launch.passes) if launch.passes else ()
        for own, pair in zip(launch.passes, pairs):
            for turn, count in zip(pair, (own.turns.sum(), own.masked.sum())):
                for part in turn:
                    executed = count * launch.count * launch.copies * part.warps
                    local += executed * part.mix.local
                    issue += executed * part.mix.issue
    return float(local / issue) if issue else 0.0


def turn_clocks(turn: Turn, resident: int, flops: float, device: DeviceInfo, constants: Efficiency) -> float:
    """Clocks of one turn of a loop while ``resident`` blocks share the multiprocessor.

    Args:
        turn: what the warps of a block execute.
        resident: blocks on the multiprocessor.
        flops: tile products of one turn of a block.
    """
    peak = device.tensor_flops_per_clock * constants.tensor
    if device.compute_capability.startswith("9."):
        grouped = any(part.mix.grouped for part in turn)
        peak *= constants.hopper_tensor * (1.0 if grouped else constants.legacy_tensor)
    tensor = flops / peak

    def of_all(rate):
        return sum(rate(part.mix) * part.warps for part in turn)

    throughputs = (
        tensor,
        of_all(lambda mix: mix.special) * _LANES / device.special_per_clock,
        of_all(lambda mix: mix.issue) / _SCHEDULERS / constants.issue,
        of_all(lambda mix: mix.shared_bytes + mix.copied_bytes) / (_SHARED_BYTES_PER_CLOCK * constants.shared),
        of_all(lambda mix: mix.copied_bytes + mix.loaded_bytes) / constants.l2_bytes,
        of_all(lambda mix: mix.local) * constants.local,
    )
    alone = max(_alone_clocks(part, tensor, constants) for part in turn)
    copied = max(part.latencies for part in turn) * constants.load
    return _overlapped((*(resident * clocks for clocks in throughputs), alone, copied), constants.overlap)


def _alone_clocks(part: Part, tensor: float, constants: Efficiency) -> float:
    """Of a turn of one group of these warps where nothing else runs; ``tensor`` are those of the block's products."""
    warps = part.warps / part.groups
    products = tensor / part.groups if part.mix.matrix else 0.0
    clocks = part.mix.issue * max(1.0, warps / _SCHEDULERS) * constants.cpi
    clocks = _overlapped((products, clocks), constants.overlap if part.ahead else 1.0)
    clocks += part.mix.waits * constants.wait + part.mix.barriers * warps * constants.barrier
    return clocks + (constants.load if part.mix.loaded_bytes else 0.0)


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
    for work, (hot, masked) in zip(launch.passes, turns_of_passes(kernel, launch.passes)):
        arguments = (resident, work.flops, device, constants)
        durations += work.turns * turn_clocks(hot, *arguments) + work.masked * turn_clocks(masked, *arguments)
        threads = _LANES * sum(part.warps for part in hot if part.mix.matrix)
        durations += work.updates * constants.update * work.rows * work.columns / threads
    copies = launch.copies
    if launch.head_bytes:
        together = heads_per_group(copies, launch.head_bytes, launch.sharing, device)
        groups = [min(together, copies - first) for first in range(0, copies, together)]
        durations, copies = np.tile(durations, len(groups)), np.repeat(groups, len(durations))
    return makespan(durations, copies, resident * device.sms)


def _overlapped(clocks: Sequence[float], exponent: float) -> float:
    """Of things that overlap in part: their sum at exponent 1, the longest at infinity."""
    longest = max(clocks)
    return longest * sum((x / longest) ** exponent for x in clocks) ** (1 / exponent) if longest else 0.0
