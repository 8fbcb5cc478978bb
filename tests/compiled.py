"""Kernels compiled for tests of their machine code."""

from lla_compile.prediction.cubin import Cubin


def cubin_of(kernel) -> Cubin:
    """What Triton has compiled, in a form that crosses processes."""
    return Cubin(kernel.name, kernel.metadata.num_warps, kernel.metadata.shared, kernel.asm["cubin"])


def compile_cubins(spec, config, device, **variant) -> list[Cubin]:
    """``compile_variant`` in that form."""
    from lla_compile.backends.triton.launcher import compile_variant

    return [cubin_of(kernel) for kernel in compile_variant(spec, config, device, **variant)]
