"""The operators behind torch.library: what torch.compile, torch.export and fake tensors see.

``lla_compile::forward`` returns the output, ``forward_info`` also what the solver did, ``forward_train`` all that
``backward`` needs, to which it is bound by autograd. ``decode`` and ``decode_info`` are one step over a cache.
"""

from __future__ import annotations

import torch

from lla_compile import arguments, autograd, decode_arguments, dispatch, storage
from lla_compile.autograd import GRADIENTS, TRAINED, Arguments
from lla_compile.lowering import INFO, SAVED, lower

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, float? ridge, Tensor? ridge_rows, float? scale, Tensor? scale_value, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = "bool is_causal, SymInt? window_size, str precision, float? cg_tol, int? cg_max_iters, str? backend"
_SAVED_INPUTS = ", ".join(f"Tensor {name}" for name in ("grad_out", *SAVED))

# The outputs of each operator that runs the forward pass.
_FORWARD = {"forward": ("out",), "forward_info": ("out", *INFO), "forward_train": TRAINED}


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

# The numbers and tensors of the flat arguments of decoding, before the options.
_DECODE_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor v_cache, float? ridge, Tensor? ridge_rows, float? scale, Tensor? scale_value, "
    "Tensor? seqlens, Tensor? block_table"
)
_DECODE_OPTIONS = _OPTIONS.removeprefix("bool is_causal, ")
_DECODE = {"decode": ("out",), "decode_info": ("out", *INFO)}


def is_traced(q) -> bool:
    """Whether a call has to go through the registered operators: in compiled code, or if ``q`` carries no data.

    The others are spared the overhead.
    """
    return torch.compiler.is_compiling() or (q.__class__ not in _PLAIN_TENSORS and isinstance(q, torch.Tensor))


def call(inputs: dispatch.Inputs, options: arguments.Options, return_info: bool, needs_grad: bool) -> tuple:
    """The output, and what the solver did if ``return_info``, through the registered operators; traceable."""
    fields = Arguments.of(inputs, options)
    if needs_grad:
        results = torch.ops.lla_compile.forward_train(*fields)
        return results[0], *results[-len(INFO) :]
    if return_info:
        return torch.ops.lla_compile.forward_info(*fields)
    return (torch.ops.lla_compile.forward(*fields),)


def call_decode(inputs: dispatch.DecodeInputs, options: arguments.Options, return_info: bool) -> tuple:
    """As :func:`call`, of a decoding step; ``out`` is written if given, ``workspace`` is not used."""
    ridge, scale = autograd.number_or_tensor(inputs.ridge), autograd.number_or_tensor(inputs.scale)
    fields = (*inputs[:3], *ridge, *scale, inputs.seqlens, inputs.block_table, *options[1:])
    if return_info:
        out, *info = torch.ops.lla_compile.decode_info(*fields)
    else:
        out, info = torch.ops.lla_compile.decode(*fields), ()
    if inputs.out is not None:
        decode_arguments.check_out(inputs.out, inputs.q, inputs.v_cache.shape[3])
        out = inputs.out.copy_(out)
    return out, *info


def _allocated(phase: str, fields: Arguments, names: tuple[str, ...]) -> list[torch.Tensor]:
    arguments.check_tensors(fields.q, fields.k, fields.v)
    program, packed = lower("lla", phase), fields.cu_seqlens_q is not None
    return [
        storage.layout(program, name, fields.q, fields.k, fields.v, fields.precision, packed).empty(fields.q)
        for name in names
    ]


def _define(name: str, schema: str, run, fake) -> None:
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(name)(fake)


def _define_forward(op: str, names: tuple[str, ...]) -> None:
    def returned(tensors):
        return tensors[0] if len(names) == 1 else tuple(tensors)

    def run(*args):
        fields = Arguments(*args)
        results = dispatch.run("forward", fields.inputs, fields.options, names)
        return returned([results[name] for name in names])

    def fake(*args):
        return returned(_allocated("forward", Arguments(*args), names))

    returns = "Tensor" if len(names) == 1 else f"({', '.join(['Tensor'] * len(names))})"
    _define(f"lla_compile::{op}", f"({_INPUTS}, {_OPTIONS}) -> {returns}", run, fake)


def _define_decode(op: str, names: tuple[str, ...]) -> None:
    def returned(tensors):
        return tensors[0] if len(names) == 1 else tuple(tensors)

    def run(q, k_cache, v_cache, ridge, ridge_rows, scale, scale_value, seqlens, block_table, *options):
        ridge, scale = ridge_rows if ridge is None else ridge, scale_value if scale is None else scale
        inputs = dispatch.DecodeInputs(q, k_cache, v_cache, ridge, scale, seqlens, block_table)
        results = dispatch.run_decode(inputs, arguments.Options(True, *options), names)
        return returned([results[name] for name in names])

    def fake(q, k_cache, v_cache, *rest):
        seqlens, block_table, _, precision = rest[4:8]
        decode_arguments.check_tensors(q, k_cache, v_cache, block_table)
        if seqlens is not None:
            decode_arguments.check_seqlens(seqlens, q)
        program = lower("lla", "decode")
        layouts = (storage.layout(program, name, q, k_cache, v_cache, precision, packed=False) for name in names)
        return returned([layout.empty(q) for layout in layouts])

    returns = "Tensor" if len(names) == 1 else f"({', '.join(['Tensor'] * len(names))})"
    _define(f"lla_compile::{op}", f"({_DECODE_INPUTS}, {_DECODE_OPTIONS}) -> {returns}", run, fake)


def _split_backward(args: tuple) -> tuple[Arguments, torch.Tensor, dict, list[str]]:
    """(arguments, grad_out, saved, wanted) of the flat arguments of ``lla_compile::backward``."""
    fields, rest = len(Arguments._fields), args[len(Arguments._fields) :]
    return Arguments(*args[:fields]), rest[0], dict(zip(SAVED, rest[1:])), rest[-1]


def _backward(*args):
    fields, grad_out, saved, wanted = _split_backward(args)
    results = autograd.run_backward(fields, grad_out, saved, tuple(wanted))
    return tuple(results.get(name, fields.q.new_empty(0)) for name in GRADIENTS)


def _backward_fake(*args):
    fields, _, _, wanted = _split_backward(args)
    allocated = dict(zip(wanted, _allocated("backward", fields, tuple(wanted))))
    return tuple(allocated.get(name, fields.q.new_empty(0)) for name in GRADIENTS)


def _run_backward(fields: Arguments, grad_out: torch.Tensor, saved: dict, wanted: tuple[str, ...]) -> dict:
    tensors = torch.ops.lla_compile.backward(*fields, grad_out, *saved.values(), list(wanted))
    return dict(zip(GRADIENTS, tensors))


for _op, _names in _FORWARD.items():
    _define_forward(_op, _names)
for _op, _names in _DECODE.items():
    _define_decode(_op, _names)
_define(
    "lla_compile::backward",
    f"({_INPUTS}, {_OPTIONS}, {_SAVED_INPUTS}, str[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd(
    "lla_compile::forward_train",
    lambda ctx, grad_out, *_: autograd.backward(ctx, grad_out, _run_backward),
    setup_context=lambda ctx, inputs, output: autograd.setup_context(ctx, inputs, output),
)
