"""Which backend and configuration run a spec on a device, and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Callable, Mapping

from lla_compile.key import bucket_of_spec, key_of, sizes_of
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.spec import LLASpec

if TYPE_CHECKING:
    from lla_compile.backends import Backend
    from lla_compile.devices import DeviceInfo

logger = logging.getLogger("lla_compile")


class TuningMiss(RuntimeError):
    """Nothing tuned fits and LLA_COMPILE_STRICT=1 forbids the heuristic default."""


def make_plan(
    spec: LLASpec,
    device: DeviceInfo,
    backends: Mapping[str, Backend],
    lookup: Callable,
    *,
    backend: str | None = None,
    allowed: tuple[str, ...] | None = None,
    strict: bool = False,
) -> Plan:
    """Choose how ``spec`` runs on ``device``. Neither has to be present in this machine.

    The backend is ``backend`` if given, else the one of the best database entry, else the first of ``backends``
    that supports the spec; a CPU takes "eager" unless another one is named. A ``backend`` that cannot do the backward
    pass leaves it to the others: what a forward pass saves is the same for all.

    Args:
        spec: what is computed.
        device: where.
        backends: what can be chosen, in order of preference; asking for one may raise ImportError.
        lookup: ``tuning_db.lookup`` or a stand-in.
        backend: the only backend to consider.
        allowed: names of the backends to consider when ``backend`` is None; None allows all.
        strict: raise instead of taking a heuristic default.

    Raises:
        ValueError: ``backend`` or a name in ``allowed`` is not in ``backends``.
        NotImplementedError: no backend that may be used supports the spec on the device.
        TuningMiss: ``strict``, and nothing tuned fits.
    """
    usable, refused = _usable(spec, device, backends, backend, allowed)
    if not usable and backend is not None and spec.phase == "backward":
        usable, others = _usable(spec, device, backends, None, allowed)
        refused |= others
    if not usable:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise NotImplementedError(f"no backend can run {spec.describe()} on {device.name} ({reasons})")

    def reject(config: KernelConfig, entry) -> str | None:
        return _misfit(config, entry.search.get("kernel_hash"), spec, device, usable, refused)

    bucket = bucket_of_spec(spec)
    match = lookup(key_of(spec), bucket, *sizes_of(spec), device, reject, spec.cg_max_iters)
    notes = tuple(f"backend {name} is not used: {why}" for name, why in refused.items())
    if match.entry is not None:
        config, reason = _at_size(match.entry, spec, device), match.reason
        if config != match.entry.config:
            reason += f"; {config.num_splits} parts a query for {match.entry.config.num_splits}, to have as many in all"
        return Plan(spec, device, config, match.source, match.distance, reason, notes)
    if strict and spec.visible_pairs:
        raise TuningMiss(
            f"LLA_COMPILE_STRICT=1 and nothing is tuned for {key_of(spec).describe()} at seqlen {bucket.seqlen}, "
            f"batch_heads {bucket.batch_heads} on {device.id} ({match.reason}); tune it: {tune_command(spec, device)}"
        )
    config = next(iter(usable.values())).default_config(spec, device)
    return Plan(spec, device, config, Source.HEURISTIC, 0.0, match.reason, notes)


def _at_size(entry, spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """The entry's configuration, with a cache cut so that as many parts run side by side as where it was tuned."""
    config, heads = entry.config, max(sizes_of(spec)[1], 1)
    if config.num_splits is None or device.is_cpu or heads == entry.tuned.batch_heads:
        return config
    from lla_compile.backends.gram_limits import MAX_SPLITS, splits_that_fill

    limit = max(config.num_splits, splits_that_fill(spec, MAX_SPLITS))
    splits = config.num_splits * entry.tuned.batch_heads // heads
    return replace(config, num_splits=max(min(splits, limit), 1))


def refusal(entry, device: DeviceInfo, backends: Mapping[str, Backend]) -> str | None:
    """Why :func:`make_plan` would refuse a database entry on ``device`` at the sizes of its bucket, or None."""
    try:
        spec = entry.spec()
    except ValueError as error:
        return str(error)
    usable, refused = usable_backends(spec, device, backends)
    return _misfit(entry.config, entry.search.get("kernel_hash"), spec, device, usable, refused)


def usable_backends(
    spec: LLASpec, device: DeviceInfo, backends: Mapping[str, Backend]
) -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that :func:`make_plan` chooses from, and why it does not consider the others that it knows of."""
    return _usable(spec, device, backends, None, None)


def _usable(spec, device, backends, backend, allowed) -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that may run the spec, in order of preference, and why the others may not."""
    for name in [backend] if backend is not None else allowed or ():
        if name not in tuple(backends):
            origin = "backend" if backend is not None else "LLA_COMPILE_BACKENDS"
            raise ValueError(f"{origin} must name {', '.join(backends)}, got {name!r}")
    if backend is not None:
        names = [backend]
    else:
        # On a CPU the other backends only run in an interpreter, which is for whoever asks for it by name.
        names = ["eager"] if device.is_cpu else list(backends)
        names = [name for name in names if allowed is None or name in allowed]
    usable, refused = {}, {}
    for name in names:
        try:
            candidate = backends[name]
        except ImportError as error:
            refused[name] = f"it does not import: {error}"
            continue
        if why := candidate.unsupported(spec, device):
            refused[name] = why
        else:
            usable[name] = candidate
    if not names:
        refused["eager"] = f"LLA_COMPILE_BACKENDS={','.join(allowed)} leaves it out"
    return usable, refused


def _misfit(config: KernelConfig, kernel_hash, spec, device, usable, refused) -> str | None:
    """Why the configuration of a database entry cannot be used for the spec, or None if it can."""
    if config.backend not in usable:
        return f"its backend {config.backend}: {refused.get(config.backend, 'not among those allowed')}"
    backend = usable[config.backend]
    if why := backend.infeasible(spec, config, device):
        return why
    if kernel_hash != backend.source_hash(spec, config):
        return "it was measured with other kernel sources"
    return None


def tune_command(spec: LLASpec, device: DeviceInfo) -> str:
    """The command line that tunes what ``spec`` needs on ``device``."""
    bucket, group = bucket_of_spec(spec), key_of(spec).group
    heads = max(bucket.batch_heads, group or 1)  # rounding may leave fewer heads than a group has
    parts = [
        f"python -m lla_compile.tune --gpu {device.id}",
        f"--op {spec.op}" if spec.op != "lla" else "",
        f"--phase {spec.phase} --dtype {spec.dtype} --head-dim {spec.head_dim}",
        f"--head-dim-v {spec.head_dim_v}" if spec.head_dim_v != spec.head_dim else "",
        f"--seqlen {bucket.seqlen} --batch-heads {heads} --precision {spec.precision}",
        f"--group {group}" if group is not None else "",
        "" if spec.is_causal else "--no-causal",
    ]
    return " ".join(part for part in parts if part)


_reported: set[tuple] = set()


def report_miss(plan: Plan) -> None:
    """Log once per device and tuning key that a plan is not tuned for its bucket, and the command that tunes it.

    The level rises with the distance: INFO for another bucket, WARNING for another device or nothing at all. Where
    the eager backend runs by default there is little to gain, so that stays at INFO.
    """
    if plan.source in (Source.EXACT, Source.REQUESTED) or not plan.spec.visible_pairs:
        return
    what = (plan.device.id, key_of(plan.spec), plan.config.backend, plan.source)
    if what in _reported:
        return
    _reported.add(what)
    near = plan.source is Source.NEAREST or plan.config.backend == "eager"
    logger.log(
        logging.INFO if near else logging.WARNING,
        "%s on %s: %s (%s). Tune it: %s",
        plan.spec.describe(),
        plan.device.id,
        plan.source.value,
        plan.reason,
        tune_command(plan.spec, plan.device),
    )


def forget_reports() -> None:
    """Let :func:`report_miss` speak again about what it has reported."""
    _reported.clear()
