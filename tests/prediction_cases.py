"""Specs and made-up kernels for tests of the model of times."""

from dataclasses import replace

from lla_compile.devices import resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.features import KernelFeatures, LoopMix
from lla_compile.spec import LLASpec

H200, A100, L4 = (resolve(name) for name in ("h200", "a100", "l4"))
FUSED = KernelConfig("triton", "fused", 64, 64, 32, 4, 3)


def spec_of(seqlen=256, heads=2, phase="forward", precision="fast", causal=True, **fields) -> LLASpec:
    return LLASpec.self_attention(
        "bfloat16", 64, seqlen, heads, None, phase=phase, precision=precision, is_causal=causal, **fields
    )


def loop(**fields) -> LoopMix:
    mix = LoopMix(
        issue=200, special=32, matrix=12, matrix_flops=0, grouped=True, waits=2, barriers=2, shared_bytes=0,
        copied_bytes=2048, loaded_bytes=0, local=0,
    )  # fmt: skip
    return replace(mix, **fields)


def kernel(loops=6, registers=255, shared=50_000, **fields) -> KernelFeatures:
    mixes = tuple(loop(copied_bytes=2048 * (i % 2 == 0), loaded_bytes=2048 * (i % 2)) for i in range(loops))
    return replace(KernelFeatures("k", 4, registers, shared, 0, 5000, mixes), **fields)
