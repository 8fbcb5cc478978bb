"""Problems of decoding Parallax and softmax attention over caches whose unused slots are poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from parallax_problems import make_parallax_problem
from problems import assert_close

from lla_compile import LLASpec, backends
from lla_compile.arguments import dtype_name
from lla_compile.decode_arguments import heads_first
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import parallax_reference

# Fields of make_parallax_decode_problem that every backend has to get right, small enough for an interpreter.
CASES = [
    dict(),
    dict(queries=3, op="softmax"),
    dict(queries=2, window_size=9),
    dict(page_size=5),
    dict(queries=3, op="softmax", page_size=5),
    dict(queries=2, window_size=9, page_size=5),
]


@dataclass(frozen=True)
class ParallaxDecodeProblem:
    """What an executable takes, and the float64 output from the same rounded inputs."""

    spec: LLASpec
    inputs: dict
    expected: torch.Tensor

    def plan(self, backend: str, device, **knobs) -> Plan:
        """The backend's default plan; ``knobs`` override fields of its KernelConfig."""
        config = backends.get(backend).default_config(self.spec, device).as_dict() | knobs
        return Plan(self.spec, device, KernelConfig.from_dict(config), Source.REQUESTED, 0.0, "a test")

    def assert_decoded(self, backend: str, device, limit: float, **knobs) -> None:
        """One call into a poisoned output, with a poisoned workspace."""
        run = backends.get(backend).bind(self.plan(backend, device, **knobs))
        workspace = self.expected.new_full((run.workspace_numel,), torch.nan, dtype=torch.float32)
        out = torch.full_like(self.expected, torch.nan, dtype=self.inputs["q"].dtype)
        assert run(self.inputs | {"out": out, "workspace": workspace}, ("out",))["out"] is out
        assert_close(out, self.expected, limit)


def make_parallax_decode_problem(
    lengths: Sequence[int] | None = (70, 33, 0),
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 1,
    capacity: int = 70,
    head_dim: int = 24,
    head_dim_v: int | None = 16,
    window_size: int | None = None,
    page_size: int | None = None,
    op: str = "parallax",
    scale: float | torch.Tensor | None = None,
    growth: float = 0.0,
    **fields,
) -> ParallaxDecodeProblem:
    """Queries, probes and a cache with NaN in the slots past ``lengths`` (None: three full ones) or before the window,
    and numbers of no page where there are none; ``growth`` lets keys grow along the sequence, ``fields`` are those of
    :func:`make_parallax_problem`."""
    ends = [capacity] * 3 if lengths is None else list(lengths)
    p = make_parallax_problem(
        queries, capacity, batch=len(ends), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v or head_dim, **fields,
    )  # fmt: skip
    q, r, k, v = (x.clone() for x in p.tensors)
    k *= 1 + growth * torch.linspace(0, 1, capacity, device=k.device)[:, None].to(k.dtype)
    expected = torch.cat([
        parallax_reference(
            q[i : i + 1], r[i : i + 1] if op == "parallax" else None, k[i : i + 1, :, :n], v[i : i + 1, :, :n],
            window_size=window_size, scale=scale if scale is None else float(scale),
        )
        for i, n in enumerate(ends)
    ])  # fmt: skip
    for i, n in enumerate(ends):
        first = 0 if window_size is None else max(n - queries + 1 - window_size, 0)
        for x in (k, v):
            x[i, :, n:] = x[i, :, :first] = torch.nan
    inputs = {"q": q, "scale": head_dim**-0.5 if scale is None else scale, "seqlens": None}
    if lengths is not None:
        inputs["seqlens"] = torch.tensor(ends, dtype=torch.int32, device=q.device)
    if op == "parallax":
        inputs["r"] = r
    if page_size:
        k, v, inputs["block_table"] = _in_pages(k, v, page_size)
    spec = LLASpec(
        dtype_name(q), head_dim, head_dim_v or head_dim, len(ends), heads, kv_heads, queries, capacity,
        window_size=window_size, page_size=page_size, op=op, phase="decode",
    )  # fmt: skip
    return ParallaxDecodeProblem(spec, inputs | {"k": k, "v": v}, expected)


def _in_pages(k: torch.Tensor, v: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values in shuffled pages, and the table of them; pages that hold no key are nowhere."""
    batch, heads, capacity, _ = k.shape
    count = capacity // page_size
    pages = torch.randperm(batch * count, generator=torch.Generator().manual_seed(3)).to(k.device)

    def paged(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(batch, heads, count, page_size, -1).permute(0, 2, 3, 1, 4)
        made = torch.empty_like(rows.reshape(batch * count, page_size, heads, -1))
        made[pages] = rows.reshape(made.shape)
        return heads_first(made, True)

    empty = k.isnan().all(-1).all(1).reshape(batch, count, page_size).all(-1)
    table = torch.where(empty, torch.full_like(pages, 2**30).view(batch, count), pages.view(batch, count))
    return paged(k), paged(v), table.int()
