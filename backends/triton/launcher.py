"""A plan bound to its kernels: what runs when the op is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch
import triton

from lla_compile.backends.triton.compiler import compile_kernel, load_functions
from lla_compile.backends.triton.resources import padded_width
from lla_compile.backends.triton.source import CONSTEXPRS, Module, print_module
from lla_compile.expr import Kind
from lla_compile.precision import is_wide, split_terms, weight_shift

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec

_INPUT_PRECISION = {"fast": "tf32", "accurate": "tf32x3"}  # of float32 tile products; 16-bit ones ignore it
_NO_FLOAT64_PRODUCTS = 10.0  # compute capability from which Triton 3.6 does not compile them
# Heads run in groups whose keys and values take at most this share of the L2. On an H200 groups of 4 to 32 MB were
# within 8 % of the fastest at every size tried; all heads at once cost up to 15 % at N = 16384.
_L2_SHARE = 0.2


def constants(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    *,
    ridge_tensor: bool = False,
    scale_tensor: bool = False,
    return_info: bool = False,
) -> dict[str, object]:
    """Compile-time values that the spec, the configuration, the device and the kinds of the arguments decide."""
    return {
        "HEAD_DIM": spec.head_dim,
        "HEAD_DIM_V": spec.head_dim_v,
        "BLOCK_D": padded_width(spec.head_dim),
        "BLOCK_DV": padded_width(spec.head_dim_v),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "NUM_STAGES": config.num_stages,
        "CAUSAL": spec.is_causal,
        "WINDOWED": spec.window_size is not None,
        "TERMS": split_terms(spec.dtype, spec.precision),
        "INPUT_PRECISION": _INPUT_PRECISION[spec.precision],
        "WIDE": is_wide(spec.dtype, spec.precision) and float(device.compute_capability or 0) < _NO_FLOAT64_PRODUCTS,
        "WEIGHT_SHIFT": weight_shift(spec.dtype),
        "RIDGE_TENSOR": ridge_tensor,
        "SCALE_TENSOR": scale_tensor,
        "RETURN_INFO": return_info,
    }


def compile_variant(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    *,
    aligned: bool = True,
    **kinds: bool,
) -> list:
    """Compile every kernel of a plan for one combination of argument kinds (see :func:`constants`), in launch order."""
    module = print_module(spec.op, spec.phase, config.schedule)
    functions = load_functions(spec.op, spec.phase, config.schedule)
    values = constants(spec, config, device, **kinds)
    absent = _absent(module, values)
    return [
        compile_kernel(
            functions[kernel.name],
            kernel,
            dtype=spec.dtype,
            constants=values,
            absent=absent,
            aligned=aligned,
            compute_capability=device.compute_capability,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        for kernel in module.kernels
    ]


def _absent(module: Module, values: dict[str, object]) -> frozenset[str]:
    """Pointer parameters that are None under these constants."""
    names = [] if values["RIDGE_TENSOR"] else ["ridge_ptr"]
    names += [] if values["SCALE_TENSOR"] else ["scale_ptr"]
    names += [] if values["RETURN_INFO"] else ["iterations_ptr", "final_residual_ptr"]
    names += [] if values["TERMS"] == 2 else [f"{name}_low_state" for name in module.rounded_state]
    return frozenset(names)


class Launcher:
    """Executable of the Triton backend; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        spec, config, device = plan.spec, plan.config, plan.device
        self._plan = plan
        self._spec = spec
        self._dtype = getattr(torch, spec.dtype)
        self._module = print_module(spec.op, spec.phase, config.schedule)
        self._grid = (triton.cdiv(spec.seqlen_q, config.block_q) * spec.batch_heads, 1, 1)
        self._stride_elements = 16 // self._dtype.itemsize
        self._counts = (
            plan.cg_max_iters,
            spec.batch_heads,
            spec.num_heads,
            spec.group_size,
            _heads_per_group(spec, device, self._dtype.itemsize),
            spec.seqlen_q,
            spec.seqlen_k,
            spec.window_size or 0,
        )
        rows = spec.batch_heads * spec.seqlen_q
        # Chunks are padded so that each starts aligned to 16 bytes.
        widths = {Kind.VECTOR: spec.head_dim, Kind.ROW: 1}
        self._state_sizes = [_padded(rows * widths[kind]) for _, kind in self._module.state]
        self._rounded_size = _padded(rows * spec.head_dim)
        self._launches: dict[tuple, list[Callable]] = {}

    def __call__(self, q, k, v, ridge, scale, return_info):
        spec = self._spec
        out = torch.empty((spec.batch, spec.num_heads, spec.seqlen_q, spec.head_dim_v), dtype=q.dtype, device=q.device)
        iterations = residual = None
        if return_info:
            iterations = torch.zeros(out.shape[:3], dtype=torch.int32, device=q.device)
            residual = torch.zeros(out.shape[:3], dtype=torch.float32, device=q.device)
        if out.numel() == 0:
            return out, iterations, residual

        ridge_ptr, ridge_value, ridge_strides = None, ridge, (0, 0, 0)
        if isinstance(ridge, torch.Tensor):
            ridge_ptr = ridge.to(torch.float32).expand(out.shape[:3])
            ridge_value, ridge_strides = 1.0, ridge_ptr.stride()
        scale_ptr, scale_value = None, scale
        if isinstance(scale, torch.Tensor):
            scale_ptr, scale_value = scale.to(torch.float32), 1.0

        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        aligned = not (q.data_ptr() % 16 or k.data_ptr() % 16 or v.data_ptr() % 16)
        for stride in strides:
            aligned = aligned and stride % self._stride_elements == 0
        variant = (ridge_ptr is not None, scale_ptr is not None, return_info, aligned)
        launches = self._launches.get(variant)
        if launches is None:
            launches = self._launches[variant] = self._bind(*variant)

        state = ()
        if self._module.state:
            state = self._allocate_state(q)
        args = (
            *(q, k, v, out, iterations, residual, *state),
            *(scale_ptr, scale_value, ridge_ptr, ridge_value, *ridge_strides, *strides, spec.cg_tol, *self._counts),
        )
        for launch in launches:
            launch(*args)
        return out, iterations, residual

    def _allocate_state(self, q: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What crosses the launches of a split schedule: Theta(n d), in two allocations."""
        state = torch.empty(sum(self._state_sizes), dtype=torch.float32, device=q.device).split(self._state_sizes)
        names, terms = self._module.rounded_state, split_terms(self._spec.dtype, self._spec.precision)
        rounded = torch.empty(len(names) * terms * self._rounded_size, dtype=q.dtype, device=q.device)
        chunks = iter(rounded.split(self._rounded_size))
        return (*state, *(next(chunks) if term < terms else None for _ in names for term in range(2)))

    def _bind(self, ridge_tensor: bool, scale_tensor: bool, return_info: bool, aligned: bool) -> list[Callable]:
        """One callable per launch; the repeated kernel stands in the list once per CG iteration."""
        spec, config, device = self._plan.spec, self._plan.config, self._plan.device
        kinds = dict(ridge_tensor=ridge_tensor, scale_tensor=scale_tensor, return_info=return_info)
        values = constants(spec, config, device, **kinds)
        fixed = [values[name] for name in CONSTEXPRS]
        if triton.knobs.runtime.interpret:
            functions = load_functions(spec.op, spec.phase, config.schedule)
            runners = [functions[kernel.name][self._grid] for kernel in self._module.kernels]
        else:
            compiled = compile_variant(spec, config, device, aligned=aligned, **kinds)
            runners = [kernel[self._grid] for kernel in compiled]
        launches: list[Callable] = []
        for kernel, runner in zip(self._module.kernels, runners):
            launch = _with_constants(runner, fixed)
            launches += [launch] * (self._plan.cg_max_iters if kernel.repeated else 1)
        return launches


def _heads_per_group(spec: LLASpec, device: DeviceInfo, item_bytes: int) -> int:
    """Query heads that run together, in groups of about equal size."""
    bytes_per_head = max(1, spec.seqlen_k * (spec.head_dim + spec.head_dim_v) * item_bytes)
    kv_heads = max(2, int(device.l2_bytes * _L2_SHARE) // bytes_per_head)
    groups = max(1, -(-spec.batch_heads // (kv_heads * spec.group_size)))
    return max(1, -(-spec.batch_heads // groups))


def _padded(elements: int) -> int:
    return -(-elements // 8) * 8


def _with_constants(runner: Callable, fixed: list) -> Callable:
    def launch(*args):
        runner(*args, *fixed)

    return launch
