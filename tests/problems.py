"""Random attention problems, assertions on errors, and a short way to run one on a backend: shared by all tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lla_compile import backends
from lla_compile.autograd import GRADIENTS
from lla_compile.devices import resolve
from lla_compile.lowering import INFO, SAVED
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import lla_reference, lla_reference_backward
from lla_compile.spec import LLASpec
from lla_compile.tuner.errors import relative_error, relative_errors

CPU = resolve("cpu")


@dataclass
class Problem:
    """Tensors of one attention problem, (B, H, length, width), with its mask, its ridge and, if packed, its ends."""

    q: Tensor
    k: Tensor
    v: Tensor
    ridge: float | Tensor = 1.0
    is_causal: bool = True
    window_size: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

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
            num_sequences=None if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1,
            **fields,
        )

    def inputs(self, scale: float | Tensor | None = None) -> dict[str, Tensor | float]:
        """What an executable of the forward pass takes."""
        ridge = self.ridge.expand(self.q.shape[:3]) if isinstance(self.ridge, Tensor) else self.ridge
        scale = self.q.shape[-1] ** -0.5 if scale is None else scale
        named = {"q": self.q, "k": self.k, "v": self.v, "ridge": ridge, "scale": scale}
        if self.cu_seqlens_q is not None:
            named |= {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}
        return named

    def sequences(self) -> Iterator[tuple[Problem, slice, slice]]:
        """Every packed sequence as a problem of its own, with the slices that its queries and keys are."""
        if self.cu_seqlens_q is None:
            yield self, slice(None), slice(None)
            return
        ends_q, ends_k = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        for rows, keys in zip(map(slice, ends_q, ends_q[1:]), map(slice, ends_k, ends_k[1:])):
            ridge = self.ridge.expand(self.q.shape[:3])[:, :, rows] if isinstance(self.ridge, Tensor) else self.ridge
            q, k, v = self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys]
            yield replace(self, q=q, k=k, v=v, ridge=ridge, cu_seqlens_q=None, cu_seqlens_k=None), rows, keys

    def reference(self, scale: float | Tensor | None = None) -> Tensor:
        """float64 output from the same rounded inputs."""
        outs = [
            lla_reference(p.q, p.k, p.v, p.ridge, scale=scale, is_causal=p.is_causal, window_size=p.window_size)
            for p, _, _ in self.sequences()
        ]
        return torch.cat(outs, dim=2)

    def reference_gradients(self, grad_out: Tensor, scale: float | Tensor | None = None) -> dict[str, Tensor]:
        """float64 gradients by name from the same rounded inputs: ``dridge`` by row, ``dscale`` 0-dim."""
        parts = [
            lla_reference_backward(
                grad_out[:, :, rows],
                p.q,
                p.k,
                p.v,
                p.ridge,
                scale=scale,
                is_causal=p.is_causal,
                window_size=p.window_size,
            )
            for p, rows, _ in self.sequences()
        ]
        *by_position, dscale = zip(*parts)
        return dict(zip(GRADIENTS, [*(torch.cat(x, dim=2) for x in by_position), sum(dscale)]))


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


def make_packed_problem(lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None, **fields) -> Problem:
    """Sequences of these lengths one after another in a batch of 1; ``fields`` as :func:`make_problem` has them."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    p = make_problem(seqlen_q=sum(lengths_q), seqlen_k=sum(lengths_k), **fields)
    ends = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=p.q.device) for x in (lengths_q, lengths_k)]
    return replace(p, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])


def make_grad_out(problem: Problem, seed: int = 7) -> Tensor:
    """A standard normal gradient of the output, in its type."""
    shape = (*problem.q.shape[:3], problem.v.shape[-1])
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return grad_out.to(problem.q.dtype).to(problem.q.device)


def make_plan(
    problem: Problem,
    backend: str = "eager",
    precision: str = "accurate",
    device=CPU,
    phase: str = "forward",
    **knobs,
) -> Plan:
    """The backend's default plan; ``knobs`` override fields of its KernelConfig, or ``cg_tol`` of the spec."""
    tolerance = {"cg_tol": knobs.pop("cg_tol")} if "cg_tol" in knobs else {}
    spec = problem.spec(precision, phase=phase, **tolerance)
    default = backends.get(backend).default_config(spec, device)
    config = KernelConfig.from_dict(default.as_dict() | knobs)
    return Plan(spec, device, config, Source.REQUESTED, 0.0, "a test")


def run_forward(
    problem: Problem,
    wanted: Sequence[str],
    backend: str = "eager",
    precision: str = "accurate",
    device=CPU,
    scale=None,
    **knobs,
) -> dict[str, Tensor]:
    """Outputs of the forward pass by name."""
    plan = make_plan(problem, backend, precision, device, **knobs)
    return backends.get(backend).bind(plan)(problem.inputs(scale), tuple(wanted))


def run_info(problem: Problem, backend: str = "eager", precision: str = "accurate", device=CPU, scale=None, **knobs):
    """Output, iterations and residual of one call."""
    results = run_forward(problem, ("out", *INFO), backend, precision, device, scale, **knobs)
    return results["out"], results["iterations"], results["final_residual"]


def run(problem: Problem, backend: str = "eager", precision: str = "accurate", device=CPU, **knobs) -> Tensor:
    """Output of one call."""
    return run_forward(problem, ("out",), backend, precision, device, **knobs)["out"]


def run_backward(
    problem: Problem,
    grad_out: Tensor,
    backend: str = "eager",
    precision: str = "accurate",
    device=CPU,
    scale=None,
    wanted: Sequence[str] = GRADIENTS,
    **knobs,
) -> dict[str, Tensor]:
    """Outputs of the backward pass by name, after a forward pass with the same ``knobs`` (but for those of keys)."""
    common = {name: value for name, value in knobs.items() if not name.startswith("kv_")}
    forward = run_forward(problem, ("out", *SAVED), backend, precision, device, scale, **common)
    given = {"grad_out": grad_out} | {name: forward[name] for name in SAVED}
    plan = make_plan(problem, backend, precision, device, phase="backward", **knobs)
    return backends.get(backend).bind(plan)(problem.inputs(scale) | given, tuple(wanted))


def assert_gradients_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """Fail unless every gradient in ``got`` is finite and has an error of at most ``limit``."""
    for name, error in relative_errors(got, expected).items():
        assert name == "dscale" or got[name].shape == expected[name].shape, name
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.2e}"


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
