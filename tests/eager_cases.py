"""Problems for the eager backend's tests: shapes, packed lengths and types."""

import torch
from problems import make_packed_problem, make_problem

BLOCKS = dict(block_q=32, block_k=24)
SHAPES = [
    dict(seqlen_q=77),
    dict(seqlen_q=50, seqlen_k=83, is_causal=False, head_dim=20, head_dim_v=7),
    dict(batch=2, heads=6, kv_heads=2, seqlen_q=41),
    dict(seqlen_q=30, seqlen_k=75),
    dict(seqlen_q=75, seqlen_k=30),
    dict(seqlen_q=80, window_size=19),
    dict(seqlen_q=64, seqlen_k=40, window_size=70, heads=2, kv_heads=1),
    dict(seqlen_q=1, seqlen_k=90),
    dict(seqlen_q=20, head_dim=1, head_dim_v=3),
]
PACKED = [
    dict(lengths_q=[20, 0, 33, 7], lengths_k=[20, 5, 40, 0], heads=4, kv_heads=2),
    dict(lengths_q=[45, 9], window_size=11, head_dim_v=7),
    dict(lengths_q=[13, 30], lengths_k=[21, 4], is_causal=False),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def any_problem(fields, **more):
    """A packed problem if the fields have lengths, else one of equal lengths."""
    return make_packed_problem(**fields, **more) if "lengths_q" in fields else make_problem(**fields, **more)
