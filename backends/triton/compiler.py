"""From printed source to a compiled kernel, for the device at hand or for one that is not in the machine."""

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from typing import Mapping, Sequence

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from lla_compile.backends import CompileError
from lla_compile.backends.triton.source import Module

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@lru_cache(maxsize=None)
def load_functions(module: Module) -> Mapping[str, object]:
    """Execute a printed module: its ``@triton.jit`` functions by name."""
    # Triton reads a function's source back through inspect, which finds it here.
    digest = hashlib.sha256(module.text.encode()).hexdigest()[:16]
    filename = f"<{module.program.name} {digest}>"
    linecache.cache[filename] = (len(module.text), None, module.text.splitlines(keepends=True), filename)
    namespace = {"__name__": f"lla_compile.backends.triton.generated.{module.program.name}_{digest}"}
    exec(compile(module.text, filename, "exec"), namespace)
    return namespace


def compile_kernel(
    function,
    parameters: Sequence[tuple[str, str]],
    *,
    dtype: str,
    wide: bool,
    constants: Mapping[str, object],
    absent: frozenset[str],
    aligned: bool,
    compute_capability: str,
    num_warps: int,
    num_stages: int,
) -> CompiledKernel:
    """Compile one kernel; nothing but Triton's own cache on disk is touched, and no GPU is needed.

    Args:
        function: the ``@triton.jit`` function.
        parameters: its arguments before the constants, with types as :class:`Module` names them.
        dtype: type of q, k, v and the output.
        wide: whether the tier stores wide numbers in float64.
        constants: the values of its ``constexpr`` arguments, in order.
        absent: pointer parameters that are None in this variant.
        aligned: whether every pointer is 16-byte aligned and every stride a multiple of 16 bytes.
        compute_capability: "9.0".
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.

    Raises:
        CompileError: the compiler refused; the message is its last line.
    """
    kinds = {"*in": f"*{_TYPES[dtype]}", "*wide": "*fp64" if wide else "*fp32"}
    signature, attributes = {}, {}
    fixed = {(len(parameters) + i,): value for i, value in enumerate(constants.values())}
    elements = 16 // (4 if dtype == "float32" else 2)
    for position, (name, kind) in enumerate(parameters):
        if name in absent:
            signature[name] = "constexpr"
            fixed[position,] = None
            continue
        signature[name] = kinds.get(kind, kind)
        if aligned and kind.startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
        elif aligned and kind == "i64" and "_stride_" in name and not name.startswith("ridge"):
            attributes[position,] = [["tt.divisibility", elements]]
    signature |= dict.fromkeys(constants, "constexpr")
    major, minor = compute_capability.split(".")
    # The products of a score and its centre must contract to one FMA; Triton changed the default of this option.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    try:
        return triton.compile(source, target=GPUTarget("cuda", 10 * int(major) + int(minor), 32), options=options)
    except Exception as error:  # the compiler raises from every layer: Python, MLIR (RuntimeError), ptxas
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"{function.__name__} did not compile for sm_{major}{minor}: {lines[-1]}") from error
