"""How a spec will run: a kernel configuration, where it came from, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

from lla_compile import precision
from lla_compile.lowering import lower
from lla_compile.spec import LLASpec
from lla_compile.sweeps import Loop, sweep_of

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo

SCHEDULES = ("fused", "split")
DECODE_SCHEDULES = ("gram", "fused")
STREAMING_SCHEDULES = SCHEDULES  # they read the keys once an iteration
_TILE_KNOBS = ("block_q", "block_k", "num_warps", "num_stages")
_GRAM_KNOBS = ("num_splits", "block_d")
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class KernelConfig:
    """The tunable knobs: an entry's ``plan`` in the database.

    Args:
        backend: name of a backend, e.g. "triton" or "eager".
        schedule: "fused" (one launch runs all sweeps of a query tile), "split" (one launch a sweep), or in phase
            "decode" "gram" (one pass over the keys forms the covariances, see :mod:`lla_compile.gram`) or "fused".
        block_q: query rows of a tile, B_r.
        block_k: keys of a tile, B_c.
        cg_max_iters: cap on the CG iterations unless the caller gives one; None for operators that solve nothing.
        num_warps: warps of a program; None where the backend has no such knob.
        num_stages: depth of the software pipeline over key tiles; None likewise.
        kv_block_q, kv_block_k, kv_num_warps, kv_num_stages: the same for the sweep that holds keys; None where the
            phase has none, or where it takes the tile of the others.
        num_splits: parts that the keys of a query are cut into, of about the same length whatever that is; "gram", and
            "fused" in phase "decode" of operators that read the keys once.
        block_d: rows of the covariances that a program holds; "gram" only.
    """

    backend: str
    schedule: str
    block_q: int
    block_k: int
    cg_max_iters: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    kv_block_q: int | None = None
    kv_block_k: int | None = None
    kv_num_warps: int | None = None
    kv_num_stages: int | None = None
    num_splits: int | None = None
    block_d: int | None = None

    @property
    def holding_keys(self) -> KernelConfig:
        """The configuration as the sweep that holds keys sees it: its own knobs in place of the common ones."""
        own = {name: getattr(self, f"kv_{name}") for name in _TILE_KNOBS}
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    def as_dict(self) -> dict:
        """The knobs that are set, in the order of the database."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, knobs: dict) -> KernelConfig:
        """Inverse of :meth:`as_dict`; raises ValueError on a missing or unknown knob."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(knobs) - known):
            raise ValueError(f"unknown plan knob {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            return cls(**knobs)
        except TypeError as error:
            raise ValueError(f"incomplete plan: {error}") from None

    def describe(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.as_dict().items())


class Source(Enum):
    """Where a configuration came from, best first."""

    EXACT = "tuned for this device and bucket"
    NEAREST = "tuned for this device, another bucket"
    SAME_ARCH = "tuned for another device of this compute capability"
    HEURISTIC = "heuristic default"
    REQUESTED = "given by the caller"


@dataclass(frozen=True)
class Plan:
    """The decision for one spec on one device; ``print(plan)`` explains it.

    Attributes:
        spec: what is computed.
        device: where.
        config: the kernel configuration.
        source: how well the configuration fits.
        distance: octaves between the bucket that was tuned and the one that is asked for; 0 when exact or heuristic.
        reason: one sentence on how the configuration was found.
        notes: what else is worth knowing, a sentence each.
    """

    spec: LLASpec
    device: DeviceInfo
    config: KernelConfig
    source: Source
    distance: float
    reason: str
    notes: tuple[str, ...] = field(default=())

    @property
    def cg_max_iters(self) -> int | None:
        """The cap in force: the caller's, else the configuration's; None where nothing is solved."""
        return self.spec.cg_max_iters or self.config.cg_max_iters

    @property
    def cg_tol(self) -> float | None:
        """Relative residual at which a row is solved; None where nothing is."""
        return self.spec.cg_tol

    @property
    def split_tol(self) -> float:
        """Relative residual of a tile's rows under which CG no longer splits operands; 0 where it never does."""
        return precision.split_tol(self.spec.dtype, self.spec.precision)

    @property
    def flops(self) -> tuple[float, float]:
        """Flops (two a multiply-add) outside the CG loop, and of one CG iteration, over the visible pairs.

        Counted as the equations have them: splitting operands in `accurate` and masked-out parts of tiles come on top.
        With `gram` an iteration multiplies the covariance of each query, whatever the number of keys.
        """
        spec = self.spec
        if self.config.schedule == "gram":
            queries = spec.batch_heads * spec.seqlen_q
            return 2.0 * spec.visible_pairs * self._gram_products, 2.0 * queries * spec.head_dim**2
        outside, iteration = 0.0, 0.0
        program = lower(self.spec.op, self.spec.phase)
        for stage in program.stages:
            operands = sweep_of(stage).products_operands
            columns = sum(self.spec.head_dim_v if x in program.value_wide else self.spec.head_dim for x in operands)
            flops = 2.0 * columns * self.spec.visible_pairs
            if isinstance(stage, Loop):
                iteration = max(iteration, flops)
            else:
                outside += flops
        return outside, iteration

    @property
    def _gram_products(self) -> int:
        """Multiply-adds of a visible pair: its score and its part in the two covariances."""
        return self.spec.head_dim * (1 + self.spec.head_dim + self.spec.head_dim_v)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that one pass of phase "decode" reads, every sequence being full."""
        spec = self.spec
        keys = spec.seqlen_k if spec.window_size is None else min(spec.seqlen_k, spec.window_size + spec.seqlen_q - 1)
        numbers = spec.batch * spec.num_kv_heads * keys * (spec.head_dim + spec.head_dim_v)
        return numbers * _ITEM_BYTES[spec.dtype]

    def __str__(self) -> str:
        spec, config, device = self.spec, self.config, self.device
        knobs = [f"{name} {value}" for name, value in config.as_dict().items() if name in _TILE_KNOBS]
        knobs += [f"{name} {value}" for name, value in config.as_dict().items() if name.startswith("kv_")]
        knobs += [f"{name} {value}" for name, value in config.as_dict().items() if name in _GRAM_KNOBS]
        outside, iteration = self.flops
        source = self.source.value + (f", {self.distance:.1f} octaves away" if self.distance else "")
        work = f"{_flop(outside)} + {_flop(iteration)} a CG iteration" if spec.solves else _flop(outside)
        lines = [
            ("spec", spec.describe()),
            ("device", f"{device.name} ({device.id})"),
            ("backend", f"{config.backend}, schedule {config.schedule}"),
            ("tile", ", ".join(knobs)),
            *([self._solver_line()] if spec.solves else []),
            ("source", source),
            ("reason", self.reason),
            self._sweeps_line(),
            ("work", f"{_count(spec.visible_pairs)} visible pairs, {work}"),
        ]
        if device.tensor_tflops:
            peak = device.tensor_tflops * 1e12
            floor = _seconds(outside / peak)
            if spec.solves:
                total = outside + self.cg_max_iters * iteration
                floor += f" + {_seconds(iteration / peak)} a CG iteration, {_seconds(total / peak)} at the cap"
            lines.append(("floor", f"{floor} ({device.tensor_tflops:g} TFLOP/s bf16 peak)"))
        if spec.phase == "decode":
            passes = "read in every sweep" if spec.solves and config.schedule != "gram" else "read once"
            seconds = self.cache_bytes / (device.bandwidth_gbs * 1e9) if device.bandwidth_gbs else 0.0
            rate = f", {_seconds(seconds)} at {device.bandwidth_gbs:g} GB/s peak" if seconds else ""
            lines.append(("cache", f"{_bytes(self.cache_bytes)} of keys and values, {passes}{rate}"))
        lines += [("note", note) for note in self.notes]
        return "\n".join(f"{label:<8} {text}" for label, text in lines)

    def _solver_line(self) -> tuple[str, str]:
        gram = self.config.schedule == "gram"
        split = f", operands split until {self.split_tol:g} ||r_0||" if self.split_tol and not gram else ""
        return "CG", (
            f"until ||r|| <= {self.spec.cg_tol:.2g} ||r_0||, at most {self.cg_max_iters} iterations{split}"
        )

    def _sweeps_line(self) -> tuple[str, str]:
        spec = self.spec
        if self.config.schedule == "gram":
            d, dv = spec.head_dim, spec.head_dim_v
            terms = f"score {d}, key covariance {d} x {d}, key-value covariance {d} x {dv}"
            return "pass", f"one, of {terms}: multiply-adds per visible pair; then a solve of {d} x {d} for each query"
        stages = [
            (sweep_of(stage), " (each CG iteration)" if isinstance(stage, Loop) else "")
            for stage in lower(spec.op, spec.phase).stages
            if not (isinstance(stage, Loop) and stage.coarse)
        ]
        sweeps = ", ".join(f"{sweep.name} {sweep.products}{when}" for sweep, when in stages)
        return "sweeps", f"{sweeps}: tile products per visible pair"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """``value`` in the first unit that it fills, or the last."""
    size, unit = next((u for u in units if value >= u[0]), units[-1])
    return f"{value / size:.3g} {unit}"


def _count(count: float) -> str:
    return _scaled(count, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))).strip()


def _flop(count: float) -> str:
    return _scaled(count, ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")))


def _bytes(count: float) -> str:
    return _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def _seconds(seconds: float) -> str:
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")))
