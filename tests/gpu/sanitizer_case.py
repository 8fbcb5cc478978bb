"""Small problems of odd sizes, for ``compute-sanitizer --tool memcheck python tests/gpu/sanitizer_case.py``."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from decode_problems import STREAM  # noqa: E402
from on_gpu import forward, gpu_decode, gpu_decode_problem, gpu_packed, gpu_problem, gradients  # noqa: E402
from parallax_decode_problems import make_parallax_decode_problem  # noqa: E402
from parallax_problems import (  # noqa: E402
    bound_backward,
    make_packed_parallax_problem,
    make_parallax_problem,
    run_forward,
)
from problems import assert_close, make_grad_out  # noqa: E402

from lla_compile import backends  # noqa: E402
from lla_compile.autograd import trained  # noqa: E402
from lla_compile.backends.cuda import runtime  # noqa: E402
from lla_compile.devices import identify  # noqa: E402

CASES = [
    dict(heads=3, kv_heads=1, seqlen_q=65, head_dim=40, head_dim_v=24),
    dict(heads=8, seqlen_q=1, seqlen_k=67, head_dim=40, head_dim_v=24),  # one row a head: several, for the mean error
    dict(seqlen_q=70, seqlen_k=33, head_dim=40, head_dim_v=24),
    dict(seqlen_q=129, head_dim=40, head_dim_v=24, window_size=19),
]
DECODE_CASES = [
    dict(heads=3, kv_heads=1, capacity=77, lengths=[77, 1, 33]),
    dict(heads=4, kv_heads=2, queries=3, capacity=70, lengths=None, window_size=19),
    dict(page_size=5, capacity=75, lengths=[75, 11, 64]),
    dict(page_size=16, capacity=80, lengths=None, queries=2),
    dict(capacity=77, lengths=[77, 1, 33], head_dim_v=24),
    dict(capacity=700, lengths=[700, 1, 133], head_dim=72, head_dim_v=72),  # stages are used again
    dict(page_size=16, capacity=640, lengths=None),
]
PARALLAX_DECODE_CASES = [
    dict(capacity=77, lengths=(77, 1, 0)),
    dict(capacity=77, lengths=(77, 1, 0), op="softmax", heads=8, queries=3, window_size=19),
    dict(capacity=75, lengths=(75, 11, 64), page_size=5),
    dict(capacity=80, lengths=None, page_size=16, heads=8, queries=3),
]

BACKENDS = ("triton",) if runtime.unavailable() else ("triton", "cuda")

for fields in CASES:
    for schedule in ("fused", "split"):
        p = gpu_problem(**fields, ridge=4.0)
        assert_close(forward("triton", p, schedule=schedule, cg_max_iters=8), p.reference(), 2.5e-3)
        found = gradients(p, make_grad_out(p), schedule=schedule, cg_max_iters=8)
        assert all(x.isfinite().all() for x in found.values())
        if "cuda" in BACKENDS:
            for precision, limit in (("fast", 8e-3), ("accurate", 2.5e-3)):
                out = forward("cuda", p, precision, schedule=schedule, cg_max_iters=8)
                assert_close(out, p.reference(), limit)
p = gpu_packed((70, 0, 33), head_dim=40, head_dim_v=24, heads=2, kv_heads=1, ridge=4.0)
assert all(x.isfinite().all() for x in gradients(p, make_grad_out(p), cg_max_iters=8).values())
for backend in BACKENDS:
    for schedule in ("fused", "split"):
        assert_close(forward(backend, p, schedule=schedule, cg_max_iters=8), p.reference(), 2.5e-3)
PARALLAX = dict(dtype=torch.bfloat16, device="cuda")
packed = dict(lengths_q=(70, 0, 33), heads=2, kv_heads=1, head_dim=40, head_dim_v=24)
parallax_problems = [make_parallax_problem(**fields, **PARALLAX) for fields in CASES]
for p in (*parallax_problems, make_packed_parallax_problem(**packed, **PARALLAX)):
    for backend in BACKENDS:
        got = run_forward(p, trained("parallax"), backend, identify("cuda"))
        assert_close(got["out"], p.reference(), 2.5e-3)
        if not backends.get(backend).unsupported(p.spec("parallax", "backward"), identify("cuda")):
            found = bound_backward(p, backend, identify("cuda"), backend)("dq", "dr", "dk", "dv", "dscale")
            assert all(x.isfinite().all() for x in found.values())
for fields in DECODE_CASES:
    p = gpu_decode_problem(**(dict(head_dim=40, head_dim_v=40) | fields))
    for backend in BACKENDS:
        for num_splits in (1, 3):
            assert_close(gpu_decode(backend, p, num_splits=num_splits), p.reference(), 2.5e-3)
    assert_close(gpu_decode("triton", p, **STREAM), p.reference(), 2.5e-3)
for fields in PARALLAX_DECODE_CASES:
    p = make_parallax_decode_problem(**fields, head_dim=40, head_dim_v=24, dtype=torch.bfloat16, device="cuda")
    for backend in BACKENDS:
        for num_splits in (1, 3):
            p.assert_decoded(backend, identify("cuda"), 2.5e-3, num_splits=num_splits)
print("done")
