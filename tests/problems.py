"""Random attention problems, the error measure, and a short way to run one on a backend: shared by all tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lla_compile import backends
from lla_compile.devices import resolve
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import lla_reference
from lla_compile.spec import LLASpec

CPU = resolve("cpu")


@dataclass
class Problem:
    """Tensors of one attention problem, (B, H, length, width), with its mask and ridge."""

    q: Tensor
    k: Tensor
    v: Tensor
    ridge: float | Tensor = 1.0
    is_causal: bool = True
    window_size: int | None = None

    def spec(self, precision: str = "accurate", **fields) -> LLASpec:
        batch, heads, seqlen_q, head_dim = self.q.shape
        return LLASpec(
            dtype=str(self.q.dtype).removeprefix("torch."),
            head_dim=head_dim,
            head_dim_v=self.v.shape[-1],
            batch=batch,
            num_heads=heads,
            num_kv_heads=self.k.shape[1],
            seqlen_q=seqlen_q,
            seqlen_k=self.k.shape[2],
            is_causal=self.is_causal,
            window_size=self.window_size,
            precision=precision,
            **fields,
        )

    def reference(self) -> Tensor:
        """float64 output from the same rounded inputs."""
        return lla_reference(
            self.q, self.k, self.v, self.ridge, is_causal=self.is_causal, window_size=self.window_size
        )


def make_problem(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    seqlen_q: int = 64,
    seqlen_k: int | None = None,
    head_dim: int = 32,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    ridge: float | Tensor = 1.0,
    is_causal: bool = True,
    window_size: int | None = None,
    seed: int = 0,
) -> Problem:
    """Standard normal q, k and v, drawn on the CPU so that every device gets the same numbers."""
    kv_heads = heads if kv_heads is None else kv_heads
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    q = normal(batch, heads, seqlen_q, head_dim)
    k = normal(batch, kv_heads, seqlen_k, head_dim)
    v = normal(batch, kv_heads, seqlen_k, head_dim_v)
    return Problem(q, k, v, ridge, is_causal, window_size)


def make_plan(problem: Problem, backend: str = "eager", precision: str = "accurate", device=CPU, **knobs) -> Plan:
    """The backend's default plan; ``knobs`` override fields of its KernelConfig, or ``cg_tol`` of the spec."""
    tolerance = {"cg_tol": knobs.pop("cg_tol")} if "cg_tol" in knobs else {}
    spec = problem.spec(precision, **tolerance)
    default = backends.get(backend).default_config(spec, device)
    config = KernelConfig.from_dict(default.as_dict() | knobs)
    return Plan(spec, device, config, Source.REQUESTED, 0.0, "a test")


def run_info(problem: Problem, backend: str = "eager", precision: str = "accurate", device=CPU, scale=None, **knobs):
    """Output, iterations and residual of one call."""
    plan = make_plan(problem, backend, precision, device, **knobs)
    scale = problem.q.shape[-1] ** -0.5 if scale is None else scale
    return backends.get(backend).bind(plan)(problem.q, problem.k, problem.v, problem.ridge, scale, True)


def run(problem: Problem, backend: str = "eager", precision: str = "accurate", device=CPU, **knobs) -> Tensor:
    """Output of one call."""
    return run_info(problem, backend, precision, device, **knobs)[0]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; the absolute norm where ref is zero; NaN if out is not finite."""
    ref = ref.double()
    difference = (out.to(ref) - ref).norm()
    norm = ref.norm()
    return (difference / norm if norm > 0 else difference).item()


def assert_close(out: Tensor, ref: Tensor, limit: float, low_precision: Tensor | None = None) -> None:
    """Fail unless ``out`` is finite and ``relative_error(out, ref) <= limit``.

    With ``low_precision`` (a trusted result in the same precision) also element by element, against outliers:
    ``|out - ref| <= 2 |low_precision - ref| + limit * max|ref|``.
    """
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    assert out.isfinite().all(), f"{(~out.isfinite()).sum().item()} of {out.numel()} values are not finite"
    error = relative_error(out, ref)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"
    if low_precision is None or not ref.numel():
        return
    ref = ref.double()
    difference = (out.to(ref) - ref).abs()
    allowed = 2 * (low_precision.to(ref) - ref).abs() + limit * ref.abs().max()
    excess = (difference - allowed).max().item()
    assert excess <= 0, f"an element is off by {excess:.2e} more than allowed; largest |ref| {ref.abs().max():.2e}"
