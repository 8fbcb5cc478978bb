"""The eager backend: sweeps, or for decoding moments, block by block in PyTorch, on any device, for any float type."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Mapping

from lla_compile.lowering import lower
from lla_compile.plans import SCHEDULES, KernelConfig

if TYPE_CHECKING:
    from lla_compile.backends import Binary, Executable
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import Plan
    from lla_compile.spec import LLASpec

_BLOCKS = (32, 64, 128, 256, 512)
_CG_MAX_ITERS = (16, 24, 32, 48, 64)
# Iterations that reach the tolerance of (dtype, precision) at ridge 0.1 and head_dim 128; 32 for all others.
_DEFAULT_CG_MAX_ITERS = {("float32", "accurate"): 64, ("float64", "fast"): 64, ("float64", "accurate"): 256}

_DECODE_BLOCK_K = 128

_TILES_ALIVE = 4  # (rows, keys) matrices that exist at once: two scores, the weights and their rounding
_WORK_BYTES = 512 << 20
_CACHE_ELEMENTS = 1 << 20  # of one score tile over all heads: larger ones fall out of a CPU's cache


class EagerBackend:
    """See :class:`lla_compile.backends.Backend`."""

    name = "eager"

    def unsupported(self, spec: LLASpec, device: DeviceInfo) -> str | None:
        try:
            lower(spec.op, spec.phase)
        except NotImplementedError as error:
            return str(error)
        return None

    unsupported_spec = unsupported

    def default_config(self, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
        if spec.phase == "decode":
            cap = 1 if spec.solves else None
            config = KernelConfig(self.name, _decode_schedule(spec), 1, _DECODE_BLOCK_K, cap, num_splits=1)
            while self.infeasible(spec, config, device):
                config = replace(config, block_k=(config.block_k + 1) // 2)
            return config
        block_q, block_k = 128, 256
        while block_q * block_k * max(spec.batch * spec.num_heads, 1) > _CACHE_ELEMENTS and block_q * block_k > 64 * 64:
            block_q, block_k = block_k // 2, block_q  # 128 x 256, 128 x 128, 64 x 128, 64 x 64
        config = KernelConfig(self.name, "fused", block_q, block_k, _default_cg_max_iters(spec))
        while self.infeasible(spec, config, device):
            config = replace(config, block_q=(config.block_q + 1) // 2, block_k=(config.block_k + 1) // 2)
        return config

    def alternatives(self, spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
        return ()

    def search_space(self, spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
        default = self.default_config(spec, device)
        if spec.phase == "decode":
            return {
                "schedule": (default.schedule,),
                "block_q": (1,),
                "block_k": tuple(sorted({*_BLOCKS, default.block_k})),
                "cg_max_iters": (default.cg_max_iters,),
                "num_splits": (1,),
            }
        caps = tuple(sorted({*_CG_MAX_ITERS, default.cg_max_iters})) if spec.solves else (None,)
        return {
            # An operator of one sweep that holds rows runs alike under every schedule.
            "schedule": SCHEDULES if spec.solves else ("fused",),
            "block_q": tuple(sorted({*_BLOCKS, default.block_q})),
            "block_k": tuple(sorted({*_BLOCKS, default.block_k})),
            "cg_max_iters": caps,
        }

    def infeasible(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
        if spec.phase == "decode":
            return self._infeasible_decoding(spec, config)
        if config.schedule not in SCHEDULES:
            return f"schedule {config.schedule} is for decoding"
        item = 8 if spec.dtype == "float64" else 4
        rows, keys = min(config.block_q, spec.seqlen_q), min(config.block_k, spec.seqlen_k)
        heads = spec.batch * spec.num_heads
        needed = _TILES_ALIVE * heads * rows * keys * item
        queries, keys = heads * spec.seqlen_q, spec.batch * spec.num_kv_heads * spec.seqlen_k
        tensors = (queries + keys) * (spec.head_dim + spec.head_dim_v) * item
        allowed = max(_WORK_BYTES, tensors)
        if needed <= allowed:
            return None
        return f"tiles of all heads need {needed >> 20} MiB at once, allowed are {allowed >> 20} MiB"

    def _infeasible_decoding(self, spec: LLASpec, config: KernelConfig) -> str | None:
        if config.schedule != _decode_schedule(spec):
            return f"decoding has the schedule {_decode_schedule(spec)} only, not {config.schedule}"
        queries = spec.batch * spec.num_heads * spec.seqlen_q
        if not spec.solves:
            scores = 8 * _TILES_ALIVE * queries * min(config.block_k, spec.seqlen_k)
            allowed = max(_WORK_BYTES, scores * min(_BLOCKS[0], config.block_k) // config.block_k)
            return None if scores <= allowed else f"the scores of a block need {scores >> 20} MiB"
        weighted = 8 * queries * spec.head_dim * min(config.block_k, spec.seqlen_k)
        moments = 8 * queries * spec.head_dim * (spec.head_dim + spec.head_dim_v)
        allowed = max(_WORK_BYTES, moments)
        if weighted <= allowed:
            return None
        return f"the weighted keys of a block need {weighted >> 20} MiB, allowed are {allowed >> 20} MiB"

    def source_hash(self, spec: LLASpec, config: KernelConfig) -> str:
        return _source_hash()

    def precompile(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> None:
        """Nothing to compile."""

    def binaries(self, spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> list[Binary]:
        return []

    def bind(self, plan: Plan) -> Executable:
        if plan.spec.phase == "decode":
            from lla_compile.backends.eager import decode

            return (decode.GramExecutable if plan.config.schedule == "gram" else decode.MeanExecutable)(plan)
        from lla_compile.backends.eager.interpreter import EagerExecutable

        return EagerExecutable(plan)


def _decode_schedule(spec: LLASpec) -> str:
    return "gram" if spec.solves else "fused"


def _default_cg_max_iters(spec: LLASpec) -> int | None:
    if not spec.solves:
        return None
    cg_max_iters = _DEFAULT_CG_MAX_ITERS.get((spec.dtype, spec.precision), 32)
    return cg_max_iters + cg_max_iters // 2 if spec.head_dim > 128 else cg_max_iters


@lru_cache(maxsize=None)
def _source_hash() -> str:
    import lla_compile

    package = Path(lla_compile.__file__).parent
    files = [
        package / f"{name}.py"
        for name in ("expr", "gram", "lowering", "masks", "mean_lowering", "precision", "storage", "sweeps")
    ]
    files += sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


BACKEND = EagerBackend()
