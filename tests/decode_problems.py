"""Random decoding problems over caches whose unused slots and pages are poisoned: shared by all tests of decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

import torch
from problems import CPU
from torch import Tensor

from lla_compile import backends
from lla_compile.lowering import INFO
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec

# Fields of make_decode_problem that every backend has to get right, small enough for an interpreter.
CASES = [
    dict(),
    dict(lengths=[1, 2, 33]),
    dict(lengths=None, capacity=29),
    dict(lengths=[0, 40, 0]),
    dict(queries=5, lengths=[5, 17, 3]),
    dict(queries=16, capacity=64, lengths=[16, 64, 40], batch=3, heads=1, kv_heads=1),
    dict(heads=4, kv_heads=1),
    dict(heads=6, kv_heads=2, queries=3),
    dict(window_size=1),
    dict(window_size=9, lengths=[4, 30, 40]),
    dict(window_size=70, queries=2),
    dict(head_dim=24, head_dim_v=5),
    dict(head_dim=16, head_dim_v=40),
    dict(head_dim=1, head_dim_v=1),
    dict(page_size=16, capacity=48),
    dict(page_size=16, capacity=48, lengths=None),
    dict(page_size=5, capacity=40, queries=4, lengths=[40, 11, 2], heads=4),
    dict(page_size=1, capacity=12),
    dict(page_size=16, capacity=64, window_size=18, queries=3, lengths=[64, 20, 47]),
    dict(batch=1, heads=1, kv_heads=1, capacity=1),
]

# What only the streaming schedule takes, heads wider than a covariance that fits among it.
STREAM_CASES = [
    dict(head_dim=130, head_dim_v=7, capacity=20, lengths=[20, 3, 1]),
    dict(heads=6, kv_heads=1, queries=5, lengths=[40, 7, 5]),
]
# Knobs that turn a backend's default into the other schedule's smallest tile.
STREAM = dict(schedule="fused", block_q=16, block_k=16, num_warps=4, num_stages=2, num_splits=None, block_d=None)


@dataclass
class DecodeProblem:
    """Arguments of lla_decode, with the dense keys and values (B, Hkv, M, width) that caches were made of.

    ``k_cache`` and ``v_cache`` hold NaN, and ``block_table`` numbers of no page, wherever no query looks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: list[int]
    seqlens: Tensor | None
    block_table: Tensor | None
    ridge: float | Tensor = 1.0
    window_size: int | None = None

    @property
    def page_size(self) -> int | None:
        return None if self.block_table is None else self.k_cache.shape[1]

    def arguments(self) -> dict:
        """Of lla_decode, by name."""
        names = ("q", "k_cache", "v_cache", "ridge", "seqlens", "block_table", "window_size")
        return {name: getattr(self, name) for name in names}

    def spec(self, precision: str = "accurate", **fields) -> LLASpec:
        batch, heads, queries, head_dim = self.q.shape
        return LLASpec(
            dtype=str(self.q.dtype).removeprefix("torch."),
            head_dim=head_dim,
            head_dim_v=self.v.shape[3],
            batch=batch,
            num_heads=heads,
            num_kv_heads=self.k.shape[1],
            seqlen_q=queries,
            seqlen_k=self.k.shape[2],
            window_size=self.window_size,
            precision=precision,
            page_size=self.page_size,
            phase="decode",
            **fields,
        )

    def inputs(self, scale: float | Tensor | None = None) -> dict:
        """What an executable takes."""
        paged = self.block_table is not None
        named = {
            "q": self.q,
            "k": self.k_cache.transpose(1, 2) if paged else self.k_cache,
            "v": self.v_cache.transpose(1, 2) if paged else self.v_cache,
            "seqlens": self.seqlens,
            "ridge": self.ridge.expand(self.q.shape[:3]) if isinstance(self.ridge, Tensor) else self.ridge,
            "scale": self.q.shape[3] ** -0.5 if scale is None else scale,
        }
        return named | ({"block_table": self.block_table} if paged else {})

    def reference(self, scale: float | Tensor | None = None) -> Tensor:
        """float64 output from the same rounded inputs, sequence by sequence."""
        ridge = self.ridge.expand(self.q.shape[:3]) if isinstance(self.ridge, Tensor) else None
        outs = []
        for b, length in enumerate(self.lengths):
            q, k, v = self.q[b : b + 1], self.k[b : b + 1, :, :length], self.v[b : b + 1, :, :length]
            own = self.ridge if ridge is None else ridge[b : b + 1]
            outs.append(lla_reference(q, k, v, own, scale=scale, window_size=self.window_size))
        return torch.cat(outs)


def make_decode_problem(
    batch: int = 3,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int = 1,
    capacity: int = 40,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    lengths: Sequence[int] | None = (40, 7, 23),
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    ridge: float | Tensor = 0.5,
    window_size: int | None = None,
    seed: int = 0,
) -> DecodeProblem:
    """Standard normal tensors; ``lengths`` are cut to ``capacity`` and ``batch``, None fills every slot."""
    kv_heads = kv_heads or (1 if heads == 1 else heads // 2)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    q = normal(batch, heads, queries, head_dim)
    k, v = normal(batch, kv_heads, capacity, head_dim), normal(batch, kv_heads, capacity, head_dim_v)
    filled = [capacity] * batch if lengths is None else [min(x, capacity) for x in lengths][:batch]
    seqlens = None if lengths is None else torch.tensor(filled, dtype=torch.int32, device=device)
    ends = torch.tensor(filled, device=device)[:, None]
    slots = torch.arange(capacity, device=device)
    used = slots < ends
    if window_size is not None:
        used &= slots > ends - queries - window_size
    k_cache, v_cache = (torch.where(used[:, None, :, None], x, torch.nan) for x in (k, v))
    p = DecodeProblem(q, k, v, k_cache, v_cache, filled, seqlens, None, ridge, window_size)
    return p if page_size is None else _paged(p, used, page_size, generator)


def _paged(p: DecodeProblem, used: Tensor, page_size: int, generator: torch.Generator) -> DecodeProblem:
    """The problem with its caches in shuffled pages, among which some belong to nobody."""
    batch, per_sequence = len(p.lengths), p.k.shape[2] // page_size
    count = batch * per_sequence + 3
    table = torch.randperm(count, generator=generator)[: batch * per_sequence].view(batch, -1).to(p.q.device)

    def pages_of(x: Tensor) -> Tensor:
        pages = x.new_full((count, page_size, *x.shape[1::2]), torch.nan)
        pages[table] = x.transpose(1, 2).unflatten(1, (per_sequence, page_size))
        return pages

    needed = used.unflatten(1, (per_sequence, page_size)).any(2)
    nowhere = torch.where(torch.arange(per_sequence, device=p.q.device) % 2 == 0, -1, 2**30)
    block_table = torch.where(needed, table, nowhere).int()
    return replace(p, k_cache=pages_of(p.k_cache), v_cache=pages_of(p.v_cache), block_table=block_table)


def decode_plan(p: DecodeProblem, backend: str = "eager", precision: str = "accurate", device=CPU, **knobs) -> Plan:
    """The backend's default plan; ``knobs`` override fields of its KernelConfig, or ``cg_tol`` of the spec."""
    tolerance = {"cg_tol": knobs.pop("cg_tol")} if "cg_tol" in knobs else {}
    spec = p.spec(precision, **tolerance)
    default = backends.get(backend).default_config(spec, device)
    config = KernelConfig.from_dict(default.as_dict() | knobs)
    return Plan(spec, device, config, Source.REQUESTED, 0.0, "a test")


def decode_info(
    p: DecodeProblem, backend: str = "eager", precision: str = "accurate", device=CPU, scale=None, given=(), **knobs
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, iterations and residual of one call; ``given`` may have an ``out`` and a ``workspace``."""
    plan = decode_plan(p, backend, precision, device, **knobs)
    results = backends.get(backend).bind(plan)(p.inputs(scale) | dict(given), ("out", *INFO))
    return results["out"], results["iterations"], results["final_residual"]


def decode(p: DecodeProblem, backend: str = "eager", precision: str = "accurate", device=CPU, **knobs) -> Tensor:
    """Output of one call."""
    return decode_info(p, backend, precision, device, **knobs)[0]
