"""The operators behind torch.library: what torch.compile, torch.export and fake tensors see.

``lla_compile::forward`` returns the output, ``forward_info`` also what the solver did, ``forward_train`` all that
``backward`` needs, to which it is bound by autograd. ``decode`` and ``decode_info`` are one step over a cache. Those of
operators that solve nothing carry their names: ``lla_compile::parallax_forward`` and so on, without the ``_info``.
"""

from __future__ import annotations

import torch

from lla_compile import arguments, autograd, decode_arguments, dispatch, storage
from lla_compile.autograd import Arguments
from lla_compile.lowering import INFO, lower
from lla_compile.spec import OPS, SOLVING_OPS

_SCHEMA = {
    **dict.fromkeys(("q", "r", "k", "v", "k_cache", "v_cache"), "Tensor"),
    "ridge": "float?",
    "ridge_rows": "Tensor?",
    "scale": "float?",
    "scale_value": "Tensor?",
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqlens", "block_table"), "Tensor?"),
    "is_causal": "bool",
    "window_size": "SymInt?",
    "precision": "str",
    "cg_tol": "float?",
    "cg_max_iters": "int?",
    "backend": "str?",
}
_ONLY_SOLVING = ("ridge", "ridge_rows", "cg_tol", "cg_max_iters")
_ONLY_DECODING = ("k_cache", "v_cache", "seqlens", "block_table")
_NOT_DECODING = ("k", "v", "cu_seqlens_q", "cu_seqlens_k", "is_causal")

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _argument_names(op: str, decoding: bool) -> tuple[str, ...]:
    left_out = {*(_NOT_DECODING if decoding else _ONLY_DECODING), *(() if op in SOLVING_OPS else _ONLY_SOLVING)}
    if op != "parallax":
        left_out.add("r")
    return tuple(name for name in _SCHEMA if name not in left_out)


# The flat arguments of each operator's registered functions, in order.
ARGUMENT_NAMES = {op: _argument_names(op, decoding=False) for op in OPS}
DECODE_ARGUMENT_NAMES = {op: _argument_names(op, decoding=True) for op in OPS}


def _function(op: str, name: str) -> str:
    return name if op == "lla" else f"{op}_{name}"


def _registered(op: str, name: str):
    return getattr(torch.ops.lla_compile, _function(op, name))


def is_traced(q) -> bool:
    """Whether a call has to go through the registered operators: in compiled code, or if ``q`` carries no data.

    The others are spared the overhead.
    """
    return torch.compiler.is_compiling() or (q.__class__ not in _PLAIN_TENSORS and isinstance(q, torch.Tensor))


def call(inputs: dispatch.Inputs, options: arguments.Options, return_info: bool, needs_grad: bool) -> tuple:
    """The output, and what the solver did if ``return_info``, through the registered operators; traceable."""
    op = options.op
    fields = Arguments.of(inputs, options)
    flat = [getattr(fields, name) for name in ARGUMENT_NAMES[op]]
    if needs_grad:
        results = _registered(op, "forward_train")(*flat)
        return (results[0], *results[-len(INFO) :]) if return_info else (results[0],)
    if return_info:
        return _registered(op, "forward_info")(*flat)
    return (_registered(op, "forward")(*flat),)


def call_decode(inputs: dispatch.DecodeInputs, options: arguments.Options, return_info: bool) -> tuple:
    """As :func:`call`, of a decoding step; ``out`` is written if given, ``workspace`` is not used."""
    op = options.op
    ridge, scale = autograd.number_or_tensor(inputs.ridge), autograd.number_or_tensor(inputs.scale)
    pairs = dict(zip(("ridge", "ridge_rows", "scale", "scale_value"), (*ridge, *scale)))
    fields = inputs._asdict() | options._asdict() | pairs
    flat = [fields[name] for name in DECODE_ARGUMENT_NAMES[op]]
    if return_info:
        out, *info = _registered(op, "decode_info")(*flat)
    else:
        out, info = _registered(op, "decode")(*flat), ()
    if inputs.out is not None:
        decode_arguments.check_out(inputs.out, inputs.q, inputs.v_cache.shape[3])
        out = inputs.out.copy_(out)
    return out, *info


def _flat_arguments(op: str, flat: tuple) -> Arguments:
    return Arguments(**dict(zip(ARGUMENT_NAMES[op], flat)), op=op)


def _allocated(phase: str, fields: Arguments, names: tuple[str, ...]) -> list[torch.Tensor]:
    arguments.check_tensors(fields.q, fields.k, fields.v)
    if fields.r is not None:
        arguments.check_probe(fields.r, fields.q)
    program, packed = lower(fields.op, phase), fields.cu_seqlens_q is not None
    return [
        storage.layout(program, name, fields.q, fields.k, fields.v, fields.precision, packed).empty(fields.q)
        for name in names
    ]


def _schema(names: tuple[str, ...]) -> str:
    return ", ".join(f"{_SCHEMA[name]} {name}" for name in names)


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _define(name: str, schema: str, run, fake) -> None:
    name = f"lla_compile::{name}"
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(name)(fake)


def _define_forward(op: str, function: str, names: tuple[str, ...]) -> None:
    def returned(tensors):
        return tensors[0] if len(names) == 1 else tuple(tensors)

    def run(*flat):
        fields = _flat_arguments(op, flat)
        results = dispatch.run("forward", fields.inputs, fields.options, names)
        return returned([results[name] for name in names])

    def fake(*flat):
        return returned(_allocated("forward", _flat_arguments(op, flat), names))

    _define(_function(op, function), f"({_schema(ARGUMENT_NAMES[op])}) -> {_returns(len(names))}", run, fake)


def _define_decode(op: str, function: str, names: tuple[str, ...]) -> None:
    flat_names = DECODE_ARGUMENT_NAMES[op]

    def returned(tensors):
        return tensors[0] if len(names) == 1 else tuple(tensors)

    def run(*flat):
        fields = dict(zip(flat_names, flat))
        inputs = dispatch.DecodeInputs(
            q=fields["q"],
            k_cache=fields["k_cache"],
            v_cache=fields["v_cache"],
            ridge=fields["ridge_rows"] if fields.get("ridge") is None and "ridge" in fields else fields.get("ridge"),
            scale=fields["scale_value"] if fields["scale"] is None else fields["scale"],
            seqlens=fields["seqlens"],
            block_table=fields["block_table"],
            r=fields.get("r"),
        )
        options = {name: x for name, x in fields.items() if name in arguments.Options._fields}
        results = dispatch.run_decode(inputs, arguments.Options(**options, op=op), names)
        return returned([results[name] for name in names])

    def fake(*flat):
        fields = dict(zip(flat_names, flat))
        q, k_cache, v_cache = fields["q"], fields["k_cache"], fields["v_cache"]
        decode_arguments.check_tensors(q, k_cache, v_cache, fields["block_table"])
        if "r" in fields:
            arguments.check_probe(fields["r"], q)
        if fields["seqlens"] is not None:
            decode_arguments.check_seqlens(fields["seqlens"], q)
        program, precision = lower(op, "decode"), fields["precision"]
        layouts = (storage.layout(program, name, q, k_cache, v_cache, precision, packed=False) for name in names)
        return returned([layout.empty(q) for layout in layouts])

    _define(_function(op, function), f"({_schema(flat_names)}) -> {_returns(len(names))}", run, fake)


def _define_backward(op: str) -> None:
    """``(arguments, grad_out, what the forward pass has left, names wanted)``: empty tensors for what is not wanted."""
    count, kept, gradients = len(ARGUMENT_NAMES[op]), autograd.kept(op), autograd.gradients(op)

    def split(flat: tuple) -> tuple[Arguments, torch.Tensor, dict, tuple[str, ...]]:
        rest = flat[count:]
        return _flat_arguments(op, flat[:count]), rest[0], dict(zip(kept, rest[1:])), tuple(rest[-1])

    def all_of(fields: Arguments, results: dict) -> tuple:
        return tuple(results.get(name, fields.q.new_empty(0)) for name in gradients)

    def run(*flat):
        fields, grad_out, saved, wanted = split(flat)
        return all_of(fields, autograd.run_backward(fields, grad_out, saved, wanted))

    def fake(*flat):
        fields, _, _, wanted = split(flat)
        return all_of(fields, dict(zip(wanted, _allocated("backward", fields, wanted))))

    tensors = ", ".join(f"Tensor {name}" for name in ("grad_out", *kept))
    schema = f"({_schema(ARGUMENT_NAMES[op])}, {tensors}, str[] wanted) -> {_returns(len(gradients))}"
    _define(_function(op, "backward"), schema, run, fake)


def _bind_autograd(op: str) -> None:
    names = ARGUMENT_NAMES[op]
    positions = {name: position for position, name in enumerate(names)}

    def setup(ctx, inputs, output):
        autograd.setup_context(ctx, _flat_arguments(op, inputs), positions, output)

    def run(fields: Arguments, grad_out: torch.Tensor, saved: dict, wanted: tuple[str, ...]) -> dict:
        flat = [getattr(fields, name) for name in names]
        tensors = _registered(op, "backward")(*flat, grad_out, *saved.values(), list(wanted))
        return dict(zip(autograd.gradients(op), tensors))

    torch.library.register_autograd(
        f"lla_compile::{_function(op, 'forward_train')}",
        lambda ctx, grad_out, *_: autograd.backward(ctx, grad_out, run),
        setup_context=setup,
    )


for _op in OPS:
    _define_forward(_op, "forward", ("out",))
    _define_forward(_op, "forward_train", autograd.trained(_op))
    _define_decode(_op, "decode", ("out",))
    if _op in SOLVING_OPS:
        _define_forward(_op, "forward_info", ("out", *INFO))
        _define_decode(_op, "decode_info", ("out", *INFO))
    _define_backward(_op)
    _bind_autograd(_op)
