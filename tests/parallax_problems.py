"""Inputs and float64 references for tests of Parallax and softmax attention."""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Iterator, Mapping, Sequence

import torch

from lla_compile import backends
from lla_compile.arguments import dtype_name
from lla_compile.backends import Executable
from lla_compile.devices import resolve
from lla_compile.lowering import lower
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.reference import parallax_reference, parallax_reference_backward
from lla_compile.spec import LLASpec

GRADIENTS = ("dq", "dr", "dk", "dv")
SHAPES = [
    dict(seqlen_q=70),
    dict(seqlen_q=33, seqlen_k=50, window_size=7),
    dict(seqlen_q=50, seqlen_k=33),
    dict(batch=2, heads=4, kv_heads=2, seqlen_q=20, head_dim=24, head_dim_v=16),
    dict(seqlen_q=40, seqlen_k=61, is_causal=False),
    dict(seqlen_q=1, seqlen_k=45),
]


@dataclass(frozen=True)
class ParallaxProblem:
    """Tensors of a call in the order of parallax_attention, its mask, and where packed queries and keys end."""

    tensors: tuple[torch.Tensor, ...]
    grad_out: torch.Tensor
    options: dict
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None

    def sequences(self) -> Iterator[tuple["ParallaxProblem", slice, slice]]:
        """Every packed sequence as a problem of its own, with the slices that its queries and keys are."""
        if self.cu_seqlens is None:
            yield self, slice(None), slice(None)
            return
        q, r, k, v = self.tensors
        ends_q, ends_k = (ends.tolist() for ends in self.cu_seqlens)
        for rows, keys in zip(map(slice, ends_q, ends_q[1:]), map(slice, ends_k, ends_k[1:])):
            tensors = q[:, :, rows], r[:, :, rows], k[:, :, keys], v[:, :, keys]
            yield ParallaxProblem(tensors, self.grad_out[:, :, rows], self.options), rows, keys

    def reference(self, scale=None) -> torch.Tensor:
        outs = [parallax_reference(*p.tensors, scale=scale, **p.options) for p, _, _ in self.sequences()]
        return torch.cat(outs, dim=2)

    def reference_gradients(self) -> dict[str, torch.Tensor]:
        found = [parallax_reference_backward(p.grad_out, *p.tensors, **p.options) for p, _, _ in self.sequences()]
        parts = {name: [gradients[name] for gradients in found] for name in found[0]}
        return {name: sum(x) if name == "dscale" else torch.cat(x, dim=2) for name, x in parts.items()}

    def reference_row_dscale(self) -> torch.Tensor:
        """Of every row: dq = scale sum_j ds_j k_j, and dscale is q times that sum."""
        q = self.tensors[0].double()
        return (q * self.reference_gradients()["dq"]).sum(-1) * q.shape[3] ** 0.5

    def spec(self, op: str = "parallax", phase: str = "forward") -> LLASpec:
        q, _, _, v = self.tensors
        (batch, heads, seqlen_q, head_dim), (_, kv_heads, seqlen_k, head_dim_v) = q.shape, v.shape
        return LLASpec(
            dtype_name(q), head_dim, head_dim_v, batch, heads, kv_heads, seqlen_q, seqlen_k, op=op, phase=phase,
            num_sequences=None if self.cu_seqlens is None else len(self.cu_seqlens[0]) - 1, **self.options,
        )  # fmt: skip

    def inputs(self, op: str = "parallax", scale=None) -> dict:
        """What an executable takes."""
        named = dict(zip("qrkv", self.tensors))
        if op == "softmax":
            del named["r"]
        if self.cu_seqlens is not None:
            named |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), self.cu_seqlens))
        return named | {"scale": named["q"].shape[3] ** -0.5 if scale is None else scale}

    def leaves(self) -> list[torch.Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.tensors]


def make_parallax_problem(
    seqlen_q, seqlen_k=None, batch=1, heads=2, kv_heads=None, head_dim=16, head_dim_v=None, dtype=torch.float32,
    device="cpu", probe=0.5, offset=0.0, **options,
) -> ParallaxProblem:  # fmt: skip
    """Standard normal, with products r.k of size ``probe`` beside what an ``offset`` that all keys share adds."""
    generator = torch.Generator(device).manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    seqlen_k, kv_heads, head_dim_v = seqlen_k or seqlen_q, kv_heads or heads, head_dim_v or head_dim
    q, r = normal(batch, heads, seqlen_q, head_dim), normal(batch, heads, seqlen_q, head_dim)
    k = normal(batch, kv_heads, seqlen_k, head_dim) + offset * normal(batch, kv_heads, 1, head_dim)
    v = normal(batch, kv_heads, seqlen_k, head_dim_v)
    grad_out = normal(batch, heads, seqlen_q, head_dim_v)
    tensors = tuple(x.to(dtype) for x in (q, r * probe / head_dim**0.5, k, v))
    return ParallaxProblem(tensors, grad_out.to(dtype), options)


def make_packed_parallax_problem(
    lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None, **fields
) -> ParallaxProblem:
    """Sequences of these lengths one after another, as calls have them: all heads of a position lie side by side."""
    lengths_k = lengths_k or lengths_q
    p = make_parallax_problem(seqlen_q=sum(lengths_q), seqlen_k=sum(lengths_k), **fields)
    ends = (
        torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=p.grad_out.device) for x in (lengths_q, lengths_k)
    )
    *tensors, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*p.tensors, p.grad_out))
    return replace(p, tensors=tuple(tensors), grad_out=grad_out, cu_seqlens=tuple(ends))


def gradients(problem: ParallaxProblem, attend) -> dict[str, torch.Tensor]:
    """Of ``attend(q, r, k, v, **mask)``."""
    leaves = problem.leaves()
    out = attend(*leaves, **problem.options)
    return dict(zip(GRADIENTS, torch.autograd.grad(out, leaves, problem.grad_out)))


def grown(problem: ParallaxProblem, growth: float) -> ParallaxProblem:
    """The same with keys that grow to ``1 + growth`` times their size along the sequence."""
    q, r, k, v = problem.tensors
    factors = 1 + growth * torch.linspace(0, 1, k.shape[2], device=k.device)[:, None]
    return replace(problem, tensors=(q, r, k * factors.to(k.dtype), v))


def bound(problem: ParallaxProblem, backend: str, device, op: str = "parallax", phase: str = "forward", **knobs):
    """The executable of a problem's plan; ``knobs`` override fields of the backend's default KernelConfig."""
    spec = problem.spec(op, phase)
    config = backends.get(backend).default_config(spec, device).as_dict() | knobs
    plan = Plan(spec, device, KernelConfig.from_dict(config), Source.REQUESTED, 0.0, "a test")
    return backends.get(backend).bind(plan)


def run_forward(
    problem: ParallaxProblem, wanted: Sequence[str], backend: str, device, op: str = "parallax", scale=None, **knobs
) -> dict[str, torch.Tensor]:
    """Outputs of the forward pass by name."""
    return bound(problem, backend, device, op, **knobs)(problem.inputs(op, scale), tuple(wanted))


@dataclass(frozen=True)
class BoundBackward:
    """A backward pass with its inputs: a function of the wanted outputs."""

    executable: Executable
    inputs: Mapping[str, torch.Tensor | float]

    def __call__(self, *wanted: str) -> dict[str, torch.Tensor]:
        return dict(self.executable(self.inputs, wanted))


def bound_backward(
    problem: ParallaxProblem, backend: str, device, forward: str = "eager", op: str = "parallax", scale=None, **knobs
) -> BoundBackward:
    """The backward pass of one backend after the forward pass of another, with ``knobs`` of the backward pass."""
    saved = ("out", *lower(op, "backward").given)
    given = run_forward(problem, saved, forward, resolve("cpu") if forward == "eager" else device, op, scale)
    inputs = problem.inputs(op, scale) | {name: given[name] for name in saved} | {"grad_out": problem.grad_out}
    return BoundBackward(bound(problem, backend, device, op, "backward", **knobs), inputs)
