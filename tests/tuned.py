"""Database entries for tests: one plausible entry, with whatever a test wants different."""

from lla_compile.key import Bucket, TuningKey
from lla_compile.plans import KernelConfig
from lla_compile.tuning_db import Entry

TOOLCHAIN = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580.159.03"}
KEY = TuningKey("lla", "forward", "bfloat16", 128, 128, "accurate", True)


def make_entry(
    seqlen=4096,
    batch_heads=32,
    key=KEY,
    valid=((3072, 6144), (8, 512)),
    provenance="measured",
    median_ms=1.5,
    date="2026-03-01T10:00:00Z",
    kernel_hash="0123abcd",
    toolchain=TOOLCHAIN,
    **knobs,
) -> Entry:
    plan = dict(backend="triton", schedule="fused", block_q=64, block_k=64, cg_max_iters=32, num_warps=4, num_stages=2)
    return Entry(
        key=key,
        valid=dict(zip(("seqlen", "batch_heads"), valid)),
        tuned=Bucket(seqlen, batch_heads),
        config=KernelConfig(**(plan | knobs)),
        provenance=provenance,
        result=dict(median_ms=median_ms, spread=0.01, default_ms=2.0, error=1.7e-3, error_limit=2.5e-3),
        search=dict(trials=30, failed=dict(compile=1, timeout=0), seed=0, date=date, kernel_hash=kernel_hash),
        toolchain=toolchain,
    )
