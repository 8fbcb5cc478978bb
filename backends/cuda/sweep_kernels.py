"""The kernels of sweeps that hold query rows: which source a plan compiles, with which constants, and what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lla_compile.backends.cuda.gram_kernels import Kernel
from lla_compile.backends.cuda.sweep_source import print_sweeps
from lla_compile.backends.tiles import padded_width
from lla_compile.precision import split_terms, weight_shift

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

GROUP_ROWS, GROUP_WARPS = 64, 4  # of wgmma: what four warps hold together
_FLOAT_BYTES, _INPUT_BYTES, _BARRIER_BYTES = 4, 2, 8
_OTHER_REGISTERS = 32  # numbers of rows, addresses
_TILE_BYTES = 72  # of struct QueryTile
_RESERVED_SHARED_MEMORY = 1024  # of a multiprocessor, for each block
_ALIGNMENT = 8  # of the structure that shared memory is


def with_warps(config: KernelConfig) -> KernelConfig:
    """The configuration with the warps that its rows take: a group for every 64, and one that copies."""
    return replace(config, num_warps=GROUP_WARPS * (config.block_q // GROUP_ROWS + 1))


def row_registers(config: KernelConfig) -> int:
    """Of a thread that holds rows; those that copy leave them to it, see stream_wgmma.cuh."""
    return {64: 216, 128: 232, 192: 160}[config.block_q]


def registers(spec: LLASpec, config: KernelConfig) -> int:
    """What the fullest loop takes of a thread: sums, the scores of two products, weights, and the rounded vector."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    terms = split_terms(spec.dtype, spec.precision)
    scores, weights = 2 * config.block_k // 2, terms * config.block_k // 4
    rounded = width // 4 if terms == 1 else 0
    return max(width, width_v) // 2 + scores + weights + rounded + _OTHER_REGISTERS


def blocks_per_sm(config: KernelConfig) -> int:
    """Blocks that a multiprocessor is to hold at once: what registers are shared by."""
    return 2 if config.block_q == GROUP_ROWS else 1


def parked_vectors(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """How many of the vectors that wait between sweeps find room in shared memory; the others wait in the L2 cache."""
    waiting = len(print_sweeps(spec.op, spec.phase).waiting)
    limit = shared_memory_limit(config, device)
    return next((n for n in range(waiting, 0, -1) if shared_memory(spec, config, n) <= limit), 0)


def shared_memory_limit(config: KernelConfig, device: DeviceInfo) -> int:
    """Bytes that a block may have so that as many as are meant to find room."""
    share = device.shared_memory_per_sm // blocks_per_sm(config) - _RESERVED_SHARED_MEMORY
    return min(device.shared_memory_per_block, share)


def shared_memory(spec: LLASpec, config: KernelConfig, parked: int) -> int:
    """Bytes of struct Shared in stream_wgmma.cuh."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    warps = config.block_q // GROUP_ROWS * GROUP_WARPS
    terms = split_terms(spec.dtype, spec.precision)
    stages = config.num_stages * (config.block_k * max(width, width_v) * _INPUT_BYTES + 2 * _BARRIER_BYTES)
    rows = config.block_q * width * ((1 if terms == 1 else 1 + terms) * _INPUT_BYTES + parked * _FLOAT_BYTES)
    return -(-(stages + rows + 2 * 4 * warps + _TILE_BYTES) // _ALIGNMENT) * _ALIGNMENT


def kernel(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> Kernel:
    """The launch of a plan."""
    parked = parked_vectors(spec, config, device)
    defines = {
        "HEAD_DIM": spec.head_dim, "HEAD_DIM_V": spec.head_dim_v, "BLOCK_D": padded_width(spec.head_dim),
        "BLOCK_DV": padded_width(spec.head_dim_v), "BFLOAT16": int(spec.dtype == "bfloat16"),
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "STAGES": config.num_stages, "PAGE_SIZE": 0,
        "CAUSAL": int(spec.is_causal), "WINDOWED": int(spec.window_size is not None),
        "TERMS": split_terms(spec.dtype, spec.precision), "WEIGHT_SHIFT": weight_shift(spec.dtype),
        "PARKED": parked, "BLOCKS": blocks_per_sm(config),
    }  # fmt: skip
    tiles = -(-spec.seqlen_q // config.block_q)
    return Kernel(
        "sweeps_wgmma", "sweeps_wgmma.cu", (tiles * spec.batch * spec.num_heads, 1), 32 * config.num_warps,
        shared_memory(spec, config, parked), {name: str(value) for name, value in defines.items()},
        print_sweeps(spec.op, spec.phase).headers,
    )  # fmt: skip
