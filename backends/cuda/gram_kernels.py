"""The kernels of decoding: which sources a plan compiles, with which constants, and what they take of a multiprocessor.

The pass over the keys exists twice: for the matrix instructions of one warp (mma.sync) and of four (wgmma). See the
``.cu`` files for what the kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.gram_limits import MAX_SPLITS
from lla_compile.backends.gram_parts import HEADROOM, TWO_TERMS_UP_TO, part_numel
from lla_compile.backends.tiles import padded_width
from lla_compile.precision import split_terms

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

# Conjugate gradients that take as long as an elimination.
DIRECT_AFTER = 24

_GROUP_ROWS = 64
_MERGE_THREADS = 256  # the kernels' constant of the same name, as are the numbers below
_SOLVE_THREADS, _SOLVE_WARPS = 256, 8
# Solves on a multiprocessor at once, each with its matrix in registers; from 10.0 on two of them spill.
_SOLVE_BLOCKS, _SOLVE_BLOCKS_UP_TO = 2, 9.0
_OVERLAPS_FROM = 9.0  # kernels that start before the one in front of them ends
_PART_BYTES = 112
_NARROW_ROW_BYTES = 32  # of an operand with few columns


@dataclass(frozen=True)
class Kernel:
    """One launch of a plan.

    Attributes:
        name: of the function.
        source: its file.
        defines: its constants but ALIGNED, which depends on the tensors of a call.
        grid: blocks in x and y.
        threads: of a block.
        shared: bytes of shared memory of a block, all dynamic.
        printed: headers beside those in the folder, by name.
        overlaps: whether it may start before the kernel in front of it ends, for which it waits by itself.
    """

    name: str
    source: str
    grid: tuple[int, int]
    threads: int
    shared: int
    defines: Mapping[str, str] = field(hash=False)
    printed: Mapping[str, str] = field(default_factory=dict, hash=False)
    overlaps: bool = False


def warp_counts(spec: LLASpec, device: DeviceInfo) -> tuple[int, ...]:
    """Warps of a block of the pass, one number for each kernel that the device has for the spec, best first."""
    of_groups, of_single_warps = group_warps(spec), 2 * max(padded_width(spec.head_dim) // 32, 1)
    return (of_groups, of_single_warps) if of_groups and device.compute_capability == "9.0" else (of_single_warps,)


def uses_wgmma(spec: LLASpec, config: KernelConfig) -> bool:
    """Whether groups of four warps multiply: it is the number of warps that tells."""
    return config.num_warps == group_warps(spec)


def group_warps(spec: LLASpec) -> int | None:
    """A group for every 64 rows and one that copies; None where rows or columns are fewer, or too many for registers."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    return 4 * (width // _GROUP_ROWS + 1) if width >= width_v >= _GROUP_ROWS else None


def kernels(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> tuple[Kernel, ...]:
    """The launches of a plan in order."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    queries = spec.batch * spec.num_heads * spec.seqlen_q
    common = {
        "HEAD_DIM": spec.head_dim, "HEAD_DIM_V": spec.head_dim_v, "BLOCK_D": width, "BLOCK_DV": width_v,
        "BFLOAT16": int(spec.dtype == "bfloat16"),
    }  # fmt: skip
    passed = {
        "BLOCK_K": config.block_k, "STAGES": config.num_stages, "PAGE_SIZE": spec.page_size or 0,
        "TERMS": split_terms(spec.dtype, spec.precision), "TWO_TERMS_UP_TO": TWO_TERMS_UP_TO,
        "HEADROOM": f"{HEADROOM[spec.dtype]}f",
    }  # fmt: skip
    source, pass_shared = "gram_pass_mma.cu", _mma_shared
    if uses_wgmma(spec, config):
        source, pass_shared = "gram_pass_wgmma.cu", _wgmma_shared
        passed["LEAVES_PARTS"] = int(config.num_splits > 1)
    launches = [
        Kernel(
            "gram_pass", source, (queries * config.num_splits, 1), 32 * config.num_warps,
            pass_shared(config, width, width_v), _text(common | passed),
        )
    ]  # fmt: skip
    overlaps = float(device.compute_capability) >= _OVERLAPS_FROM
    if config.num_splits > 1:
        grid = queries, -(-part_numel(spec) // (4 * _MERGE_THREADS))  # four numbers a thread
        merge = Kernel("gram_merge", "gram_merge.cu", grid, _MERGE_THREADS, 4 * MAX_SPLITS, _text(common))
        launches.append(replace(merge, overlaps=overlaps))
    # Sums of values are fetched ahead where that costs no query its place on a multiprocessor.
    ahead = queries <= device.sms and _solve_shared(width, width_v, True) <= device.shared_memory_per_block
    shared = _solve_shared(width, width_v, ahead)
    several = float(device.compute_capability) <= _SOLVE_BLOCKS_UP_TO
    blocks = min(max(device.shared_memory_per_sm // shared, 1), _SOLVE_BLOCKS if several else 1)
    solved = common | {"DIRECT_AFTER": DIRECT_AFTER, "SOLVE_BLOCKS": blocks, "VALUES_AHEAD": int(ahead)}
    solve = Kernel("gram_solve", "gram_solve.cu", (queries, 1), _SOLVE_THREADS, shared, _text(solved))
    launches.append(replace(solve, overlaps=overlaps))
    return tuple(launches)


def _mma_shared(config: KernelConfig, width: int, width_v: int) -> int:
    """Of struct Shared in gram_pass_mma.cu, as the functions below are of their sources."""
    tiles = 2 * config.num_stages * config.block_k * (width + width_v)
    return _aligned(tiles + 4 * 2 * config.block_k + _scratch(width)) + _PART_BYTES


def _wgmma_shared(config: KernelConfig, width: int, width_v: int) -> int:
    tiles = 2 * config.num_stages * config.block_k * (width + width_v)
    narrow = _NARROW_ROW_BYTES * (16 + config.num_stages * config.block_k)
    barriers = 8 * (2 * config.num_stages + 1)
    weights_and_pages = 4 * (config.num_stages + 2) * config.block_k
    return _aligned(tiles + narrow + barriers + _PART_BYTES + weights_and_pages + _scratch(width))


def _solve_shared(width: int, width_v: int, values_ahead: bool) -> int:
    system = width * (width + 2) + 3 * _SOLVE_WARPS * width + 2 * (width + 1) + 2 * width
    numbers = system + 2 * width + (1 + _SOLVE_WARPS) * width_v
    return _aligned(4 * numbers, 16) + 4 * width * width_v if values_ahead else 4 * numbers


def _scratch(width: int) -> int:
    return 6 * width + 4 * 34


def _aligned(size: int, unit: int = 8) -> int:
    return -(-size // unit) * unit


def _text(constants: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in constants.items()}
