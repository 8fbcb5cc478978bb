"""Decoding's schedules together: operators that solve have two, of which the heuristic default prefers one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.triton import gram_config, part_config, stream_config

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

_SCHEDULES = {"gram": gram_config, "fused": stream_config}


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """`gram`, which reads the cache once, wherever a kernel of it fits."""
    if not spec.solves:
        return part_config.default_config(spec, device)
    if gram_config.unsupported(spec) is None:
        config = gram_config.default_config(spec, device)
        if infeasible(spec, config, device) is None:
            return config
    return stream_config.default_config(spec, device)


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """The streaming default where it is not the default."""
    if not spec.solves:
        return ()
    config = stream_config.default_config(spec, device)
    is_other = config != default_config(spec, device) and infeasible(spec, config, device) is None
    return (config,) if is_other else ()


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying; None stands for a knob that a schedule does not have."""
    if not spec.solves:
        return part_config.search_space(spec, device)
    spaces = [stream_config.search_space(spec, device)]
    if gram_config.unsupported(spec) is None:
        spaces.insert(0, gram_config.search_space(spec, device))
    knobs = dict.fromkeys(knob for space in spaces for knob in space)
    return {
        knob: tuple(dict.fromkeys(value for space in spaces for value in space.get(knob, (None,)))) for knob in knobs
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if not spec.solves:
        return part_config.infeasible(spec, config, device)
    if config.schedule not in _SCHEDULES:
        return f"decoding has schedules {' and '.join(_SCHEDULES)}, got {config.schedule}"
    return _SCHEDULES[config.schedule].infeasible(spec, config, device)
