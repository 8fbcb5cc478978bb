"""A decoding plan of the `gram` schedule bound to its kernels: what they are compiled for and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping

import torch
import triton

from lla_compile.backends.gram_parts import HEADROOM, TWO_TERMS_UP_TO, VECTORS_AT, part_numel
from lla_compile.backends.triton import gram_kernels
from lla_compile.backends.triton.compiler import compile_kernel
from lla_compile.backends.triton.decode_launcher import DecodeLauncher, Launch, ordinary_absences
from lla_compile.backends.triton.resources import padded_width
from lla_compile.precision import split_terms

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_MERGE_BLOCK, _MERGE_WARPS = 512, 4
# By padded width: the covariances stay in registers.
_SOLVE_WARPS = {16: 1, 32: 1, 64: 4, 128: 8}

_STRIDES = {name: [(f"{name}_stride_{axis}", "i64") for axis in "bhn"] for name in ("q", "k", "v", "out", "ridge")}


@dataclass(frozen=True)
class _Kernel:
    """One of the kernels: its parameters with types as the compiler names them, and its constants."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int


def _kernels(spec: LLASpec, config: KernelConfig) -> list[_Kernel]:
    """The launches of a plan in order."""
    widths = {"BLOCK_D": padded_width(spec.head_dim), "BLOCK_DV": padded_width(spec.head_dim_v)}
    own_widths = {"HEAD_DIM": spec.head_dim, "HEAD_DIM_V": spec.head_dim_v}
    part = {"PART": part_numel(spec)}
    kernels = [
        _Kernel(
            "gram_pass",
            (
                *((f"{name}_ptr", "*in") for name in "qkv"),
                ("seqlens_ptr", "*i32"), ("block_table_ptr", "*i32"), ("scale_ptr", "*fp32"), ("state_ptr", "*fp32"),
                ("scale", "fp32"), *_STRIDES["q"], *_STRIDES["k"], *_STRIDES["v"],
                *((name, "i32") for name in (
                    "table_stride", "num_kv_heads", "group_size", "seqlen_q", "capacity", "window", "num_splits",
                )),
            ),
            {
                **own_widths, **widths, "BLOCK_R": min(config.block_d, widths["BLOCK_D"]), "BLOCK_K": config.block_k,
                "NUM_STAGES": config.num_stages, "PAGE_SIZE": spec.page_size or 0,
                "TERMS": split_terms(spec.dtype, spec.precision),
                "TWO_TERMS_UP_TO": TWO_TERMS_UP_TO, "HEADROOM": HEADROOM[spec.dtype], **part,
            },
            config.num_warps,
            config.num_stages,
        )
    ]  # fmt: skip
    if config.num_splits > 1:
        kernels.append(
            _Kernel(
                "gram_merge",
                (("state_ptr", "*fp32"), ("merged_ptr", "*fp32"), ("num_splits", "i32")),
                {
                    "SHIFT_STOP": VECTORS_AT + widths["BLOCK_D"], "BLOCK": _MERGE_BLOCK, **part,
                    "BLOCK_SPLITS": _block_splits(config.num_splits),
                },
                _MERGE_WARPS,
                1,
            )
        )  # fmt: skip
    kernels.append(
        _Kernel(
            "gram_solve",
            (
                ("q_ptr", "*in"), ("out_ptr", "*in"), ("iterations_ptr", "*i32"), ("final_residual_ptr", "*fp32"),
                ("ridge_ptr", "*fp32"), ("merged_ptr", "*fp32"), ("ridge", "fp32"), ("cg_tol", "fp32"),
                *_STRIDES["q"], *_STRIDES["out"], *_STRIDES["ridge"],
                *((name, "i32") for name in ("num_heads", "seqlen_q", "cg_max_iters")),
            ),
            {**own_widths, **widths, **part},
            _SOLVE_WARPS[max(widths.values())],
            1,
        )
    )  # fmt: skip
    return kernels


def _block_splits(num_splits: int) -> int:
    """Parts that a kernel looks at together: a power of two."""
    return 1 << (num_splits - 1).bit_length()


def compile_gram(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    *,
    absent: frozenset[str],
    aligned: bool = True,
) -> list[Callable]:
    """Compile the kernels of a plan, in launch order; ``absent`` names the pointers that are None."""
    return [
        compile_kernel(
            getattr(gram_kernels, kernel.name),
            kernel.parameters,
            dtype=spec.dtype,
            wide=False,
            constants=kernel.constants,
            absent=absent & {name for name, _ in kernel.parameters},
            aligned=aligned,
            compute_capability=device.compute_capability,
            num_warps=kernel.num_warps,
            num_stages=kernel.num_stages,
        )
        for kernel in _kernels(spec, config)
    ]


def precompile_gram(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
    """Compile what ordinary calls need."""
    for absent in ordinary_absences(spec.page_size is not None):
        compile_gram(spec, config, device, absent=absent)


class GramLauncher(DecodeLauncher):
    """One pass, a merge where there are several parts, and the solve."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        spec, config = plan.spec, plan.config
        self._queries = spec.batch * spec.num_heads * spec.seqlen_q
        self._parts = self._queries * config.num_splits
        self._merges = config.num_splits > 1
        self._part = part_numel(spec)

    @property
    def workspace_numel(self) -> int:
        """The parts of every query, and after them what they merge to."""
        return (self._parts + self._queries * self._merges) * self._part

    def _own_arguments(self, inputs):
        state = inputs.get("workspace")
        if state is None:
            state = inputs["q"].new_empty(self.workspace_numel, dtype=torch.float32)
        merged = state[self._parts * self._part :] if self._merges else state
        counts = {"num_splits": self._plan.config.num_splits, "cg_max_iters": self._plan.cg_max_iters}
        return {"state_ptr": state, "merged_ptr": merged, **counts}

    def _bind(self, absent, aligned):
        spec, config, device = self._plan.spec, self._plan.config, self._plan.device
        kernels = _kernels(spec, config)
        if triton.knobs.runtime.interpret:
            runners = [getattr(gram_kernels, kernel.name) for kernel in kernels]
        else:
            runners = compile_gram(spec, config, device, absent=absent, aligned=aligned)
        blocks = padded_width(spec.head_dim) // kernels[0].constants["BLOCK_R"]
        grids = {"gram_pass": (self._parts * blocks, 1, 1), "gram_solve": (self._queries, 1, 1)}
        if self._merges:
            grids["gram_merge"] = (self._queries, triton.cdiv(self._part, _MERGE_BLOCK), 1)
        return [
            Launch(runner[grids[kernel.name]], tuple(name for name, _ in kernel.parameters), tuple(kernel.constants.values()))
            for kernel, runner in zip(kernels, runners)
        ]
