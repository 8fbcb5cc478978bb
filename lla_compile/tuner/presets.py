"""What is tuned, and with how much effort, unless the command line says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lla_compile.spec import LLASpec


@dataclass(frozen=True)
class Preset:
    """A grid of keys and the effort spent on each.

    Attributes:
        dtypes: element types of the grid.
        head_dims: widths of query and key; the value's width follows unless given.
        seqlens: sequence lengths tuned at.
        batch_heads: batch times query heads tuned at.
        decode_seqlens, decode_batch_heads: the same for phase "decode".
        groups: queries that share a key in phase "decode".
        precisions: precision tiers of the grid.
        trials: configurations evaluated for a key; infeasible and repeated ones are free.
        timeout_s: wall-clock budget of a key.
        compile_timeout_s: time after which a compilation is given up.
        run_timeout_s: a launch that takes longer is not timed any further.
        timing_ms: time spent on the repeats of one configuration.
        repeats: fewest and most repeats of one configuration.
        finalists: best configurations that are timed again, beside the default, at the end.
        final_ms: time spent on each of them then.
        warm_up_ms: launches before the first timing of a key.
        error_seqlen: longest sequence of the held-out inputs.
        error_heads: heads of the held-out inputs.
        error_ridges: ridges at which the error is held against its limit.
        decode_error_ridges: the same for phase "decode".
        lookahead: proposals that compile while one is timed.
    """

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    batch_heads: tuple[int, ...]
    decode_seqlens: tuple[int, ...]
    decode_batch_heads: tuple[int, ...]
    groups: tuple[int, ...]
    precisions: tuple[str, ...]
    trials: int
    timeout_s: float
    compile_timeout_s: float = 180.0
    run_timeout_s: float = 20.0
    timing_ms: float = 100.0
    repeats: tuple[int, int] = (5, 50)
    finalists: int = 3
    final_ms: float = 400.0
    warm_up_ms: float = 300.0
    error_seqlen: int = 1024
    error_heads: int = 4
    error_ridges: tuple[float, ...] = (1.0, 0.1)
    decode_error_ridges: tuple[float, ...] = (1.0, 0.1, 0.01)
    lookahead: int = 8

    def error_ridges_of(self, spec: LLASpec) -> tuple[float | None, ...]:
        """The ridges of a spec's checks; (None,) where it has no ridge."""
        if not spec.solves:
            return (None,)
        return self.decode_error_ridges if spec.phase == "decode" else self.error_ridges


_GPU_FULL = Preset(
    dtypes=("bfloat16",),
    head_dims=(64, 128),
    seqlens=(1024, 4096, 16384),
    batch_heads=(32,),
    decode_seqlens=(1024, 4096, 16384, 65536),
    decode_batch_heads=(8, 32, 128, 512),
    groups=(1, 4, 8),
    precisions=("accurate", "fast"),
    trials=60,
    timeout_s=600,
)
_GPU_QUICK = Preset(
    dtypes=("bfloat16",),
    head_dims=(128,),
    seqlens=(4096,),
    batch_heads=(32,),
    decode_seqlens=(16384,),
    decode_batch_heads=(32,),
    groups=(1,),
    precisions=("accurate",),
    trials=16,
    timeout_s=120,
)
# A few repeats: a host clock on an idle machine is steady, and one launch is already milliseconds long.
_CPU_FULL = Preset(
    dtypes=("float32",),
    head_dims=(64,),
    seqlens=(256, 1024),
    batch_heads=(4,),
    decode_seqlens=(1024, 4096),
    decode_batch_heads=(4,),
    groups=(1, 4),
    precisions=("accurate",),
    trials=20,
    timeout_s=60,
    repeats=(3, 10),
    final_ms=300.0,
    warm_up_ms=0.0,
    error_seqlen=256,
    error_heads=2,
)
_CPU_QUICK = Preset(
    dtypes=("float32",),
    head_dims=(32,),
    seqlens=(256,),
    batch_heads=(2,),
    decode_seqlens=(256,),
    decode_batch_heads=(2,),
    groups=(1,),
    precisions=("accurate",),
    trials=8,
    timeout_s=30,
    timing_ms=50.0,
    repeats=(3, 5),
    final_ms=100.0,
    warm_up_ms=0.0,
    error_seqlen=128,
    error_heads=2,
)

# Nothing is timed: a trial is a compilation of ten seconds or more, and few in flight let each learn from the others.
_PREDICTION_FULL = replace(_GPU_FULL, trials=40, timeout_s=1800, lookahead=4)
_PREDICTION_QUICK = replace(_GPU_QUICK, timeout_s=90, lookahead=3)

PRESETS = {
    ("full", "prediction"): _PREDICTION_FULL,
    ("quick", "prediction"): _PREDICTION_QUICK,
    ("full", "gpu"): _GPU_FULL,
    ("quick", "gpu"): _GPU_QUICK,
    ("full", "cpu"): _CPU_FULL,
    ("quick", "cpu"): _CPU_QUICK,
}
