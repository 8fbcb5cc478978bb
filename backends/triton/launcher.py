"""A plan bound to its kernels: what runs when the op is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

import torch
import triton

from lla_compile.backends.head_groups import heads_per_group
from lla_compile.backends.scalars import scalars_of
from lla_compile.backends.triton.compiler import compile_kernel, load_functions
from lla_compile.backends.triton.kernel_source import strided_outputs
from lla_compile.backends.triton.packing import max_tiles, tile_table
from lla_compile.backends.triton.resources import one_sum_a_sweep, padded_width
from lla_compile.backends.triton.source import Kernel, Module, print_module
from lla_compile.lowering import lower
from lla_compile.precision import is_wide, weight_shift
from lla_compile.storage import Layout, layout

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig, Plan
    from lla_compile.spec import LLASpec
    from lla_compile.sweeps import SweepList

_INPUT_PRECISION = {"fast": "tf32", "accurate": "tf32x3"}  # of float32 tile products; 16-bit ones ignore it
_NO_FLOAT64_PRODUCTS = 10.0  # compute capability from which Triton 3.6 does not compile them


def constants(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    *,
    ridge_tensor: bool = False,
    scale_tensor: bool = False,
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
        "PACKED": spec.num_sequences is not None,
        "GROUPED": spec.group_size > 1,
        "TERMS": spec.terms,
        "INPUT_PRECISION": _INPUT_PRECISION[spec.precision],
        "WIDE": is_wide(spec.dtype, spec.precision) and float(device.compute_capability or 0) < _NO_FLOAT64_PRODUCTS,
        "WEIGHT_SHIFT": weight_shift(spec.dtype),
        "RIDGE_TENSOR": ridge_tensor,
        "SCALE_TENSOR": scale_tensor,
    }


def compile_variant(
    spec: LLASpec,
    config: KernelConfig,
    device: DeviceInfo,
    *,
    wanted: tuple[str, ...] | None = None,
    aligned: bool = True,
    ridge_tensor: bool = False,
    scale_tensor: bool = False,
) -> list:
    """Compile every kernel of a plan for one combination of outputs and argument kinds, in launch order.

    ``wanted`` None stands for the outputs of an ordinary call.
    """
    wanted = lower(spec.op, spec.phase).ordinary if wanted is None else wanted
    module = module_of(spec, config, wanted)
    functions = load_functions(module)
    compiled = []
    for kernel in module.kernels:
        own = config_of(kernel, config)
        values = constants(spec, own, device, ridge_tensor=ridge_tensor, scale_tensor=scale_tensor)
        compiled.append(
            compile_kernel(
                functions[kernel.name],
                module.parameters,
                dtype=spec.dtype,
                wide=is_wide(spec.dtype, spec.precision),
                constants={name: values[name] for name in module.constexprs},
                absent=_absent(values),
                aligned=aligned,
                compute_capability=device.compute_capability,
                num_warps=own.num_warps,
                num_stages=own.num_stages,
            )
        )
    return compiled


def module_of(spec: LLASpec, config: KernelConfig, wanted: tuple[str, ...] | None) -> Module:
    """What is printed for a plan; ``wanted`` None prints every output."""
    return print_module(spec.op, spec.phase, config.schedule, one_sum_a_sweep(spec, config), wanted)


def config_of(kernel: Kernel, config: KernelConfig) -> KernelConfig:
    """The tile of one kernel."""
    return config.holding_keys if kernel.holds == "keys" else config


def _absent(values: dict[str, object]) -> frozenset[str]:
    """Pointer parameters that are None under these constants."""
    names = [] if values["RIDGE_TENSOR"] else ["ridge_ptr"]
    names += [] if values["SCALE_TENSOR"] else ["scale_ptr"]
    if not values["PACKED"]:
        names += ["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "row_tiles_ptr", "key_tiles_ptr"]
    return frozenset(names)


class _Bound(NamedTuple):
    """What calls for the same outputs with the same kinds of arguments share.

    Attributes:
        launches: one callable per launch; a loop's kernel stands in the list once per turn.
        outputs: name and layout of each output, in the order they were asked for.
        state: the same of what crosses launches.
        pointers: names of inputs, given, outputs and state in the kernels' order.
        strided: names of the inputs whose strides are passed.
        tail: the arguments after the strides of inputs.
        holds: "rows", "keys": the sides whose tiles need a table when sequences are packed.
    """

    launches: list[Callable]
    outputs: tuple[tuple[str, Layout], ...]
    state: tuple[tuple[str, Layout], ...]
    pointers: tuple[str, ...]
    strided: tuple[str, ...]
    tail: tuple
    holds: frozenset[str]


class Launcher:
    """Executable of the Triton backend; see :class:`lla_compile.backends.Executable`."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._spec = plan.spec
        self._stride_elements = 16 // getattr(torch, plan.spec.dtype).itemsize
        self._bound: dict[tuple, _Bound] = {}

    def __call__(self, inputs, wanted):
        spec = self._spec
        q = inputs["q"]
        ridge_ptr, ridge, ridge_strides, scale_ptr, scale = scalars_of(inputs)
        program_inputs = lower(spec.op, spec.phase)
        strides, aligned = [], True
        for name in (*program_inputs.row_inputs, *program_inputs.col_inputs):
            x = inputs[name]
            strides += x.stride()[:3]
            aligned = aligned and x.data_ptr() % 16 == 0
        for stride in strides:
            aligned = aligned and stride % self._stride_elements == 0
        variant = (wanted, ridge_ptr is not None, scale_ptr is not None, aligned)
        bound = self._bound.get(variant)
        if bound is None:
            bound = self._bound[variant] = self._bind(inputs, *variant)

        results = {name: place.empty(q) for name, place in bound.outputs}
        tensors = {**inputs, **results} if not bound.state else {
            **inputs, **results, **{name: place.empty(q) for name, place in bound.state}
        }  # fmt: skip
        numbers = (scale_ptr, scale, ridge_ptr, ridge, *ridge_strides) if spec.solves else (scale_ptr, scale)
        args = (
            *[tensors[name] for name in bound.pointers],
            *self._tables(inputs, bound),
            *(*numbers, *strides, *bound.tail),
        )
        for launch in bound.launches:
            launch(*args)
        return results

    def _tables(self, inputs, bound: _Bound) -> tuple[torch.Tensor | None, ...]:
        """Arguments of packed sequences: where they end, and which tile runs when."""
        spec = self._spec
        if spec.num_sequences is None:
            return None, None, None, None
        ends_q, ends_k = inputs["cu_seqlens_q"], inputs["cu_seqlens_k"]
        config, keys_config = self._plan.config, self._plan.config.holding_keys
        rows = keys = None
        if "rows" in bound.holds:
            rows = tile_table(ends_q, ends_k, spec.seqlen_q, config.block_q, spec.is_causal, "rows")
        if "keys" in bound.holds:
            keys = tile_table(ends_k, ends_q, spec.seqlen_k, keys_config.block_k, spec.is_causal, "keys")
        return ends_q, ends_k, rows, keys

    def _bind(self, inputs, wanted: tuple[str, ...], ridge_tensor: bool, scale_tensor: bool, aligned: bool) -> _Bound:
        spec, config = self._spec, self._plan.config
        module = module_of(spec, config, wanted)
        program = module.program
        packed = spec.num_sequences is not None
        q, k, v = inputs["q"], inputs["k"], inputs["v"]

        def places(names) -> tuple[tuple[str, Layout], ...]:
            return tuple((name, layout(program, name, q, k, v, spec.precision, packed)) for name in names)

        outputs = places(wanted)
        shapes = {name: place.empty(q.new_empty(0, device="meta")) for name, place in outputs}
        strides = [stride for name in strided_outputs(program) for stride in shapes[name].stride()[:3]]
        return _Bound(
            launches=self._launches(module, wanted, ridge_tensor, scale_tensor, aligned),
            outputs=outputs,
            state=places(module.state),
            pointers=(
                *program.row_inputs, *program.col_inputs, *program.given, *program.outputs, *module.state,
            ),
            strided=(*program.row_inputs, *program.col_inputs),
            tail=(*strides, *self._numbers(program)),
            holds=frozenset(kernel.holds for kernel in module.kernels),
        )  # fmt: skip

    def _numbers(self, program: SweepList) -> tuple:
        """The arguments that the spec decides, in the kernels' order."""
        spec, device = self._spec, self._plan.device
        item = getattr(torch, spec.dtype).itemsize
        heads = spec.batch * spec.num_heads
        columns = spec.mean_seqlens[1] * (spec.head_dim + spec.head_dim_v) * item
        rows = spec.mean_seqlens[0] * (3 * spec.head_dim + spec.head_dim_v) * item * spec.group_size
        return (
            *(float(getattr(self._plan, name)) for name in program.scalars),
            heads * spec.seqlen_q,
            heads,
            spec.num_heads,
            spec.group_size,
            heads_per_group(heads, columns, spec.group_size, device),
            heads_per_group(heads // spec.group_size, rows, 1, device),
            spec.seqlen_q,
            spec.seqlen_k,
            spec.window_size or 0,
            spec.num_sequences or 0,
        )

    def _launches(
        self, module: Module, wanted: tuple[str, ...], ridge_tensor: bool, scale_tensor: bool, aligned: bool
    ) -> list[Callable]:
        spec, config, device = self._spec, self._plan.config, self._plan.device
        kinds = dict(ridge_tensor=ridge_tensor, scale_tensor=scale_tensor)
        if triton.knobs.runtime.interpret:
            functions = load_functions(module)
            kernels = [functions[kernel.name] for kernel in module.kernels]
        else:
            kernels = compile_variant(spec, config, device, wanted=wanted, aligned=aligned, **kinds)
        launches: list[Callable] = []
        for kernel, runner in zip(module.kernels, kernels):
            own = config_of(kernel, config)
            values = constants(spec, own, device, **kinds)
            launch = _with_constants(runner[self._grid(kernel, own)], [values[name] for name in module.constexprs])
            launches += [launch] * self._turns(kernel, module.program.refines, values["TERMS"])
        return launches

    def _turns(self, kernel: Kernel, refines: bool, terms: int) -> int:
        """How often a kernel is launched: a loop as often as it can turn, and not at all if the coarse one does it all."""
        if kernel.loop is None:
            return 1
        left_out = refines and terms == 1 and not kernel.loop.coarse
        return 0 if left_out else self._plan.cg_max_iters

    def _grid(self, kernel: Kernel, config: KernelConfig) -> tuple[int, int, int]:
        spec = self._spec
        if kernel.holds == "rows":
            length, block, heads = spec.seqlen_q, config.block_q, spec.num_heads
        else:
            length, block, heads = spec.seqlen_k, config.block_k, spec.num_kv_heads
        if spec.num_sequences is None:
            tiles = triton.cdiv(length, block)
        else:
            tiles = max_tiles(length, spec.num_sequences, block)
        return (tiles * spec.batch * heads, 1, 1)


def _with_constants(runner: Callable, fixed: list) -> Callable:
    def launch(*args):
        runner(*args, *fixed)

    return launch
