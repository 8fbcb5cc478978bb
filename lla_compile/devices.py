"""Device identity and limits: which GPU (or CPU) a plan is for."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Collection

if TYPE_CHECKING:
    import torch

# Shared memory of a block and registers of a multiprocessor that every CUDA device since 5.0 has.
_LEAST_SHARED_MEMORY = 48 * 1024
_LEAST_REGISTERS = 65536
# What the prediction of times needs beside limits and peaks, by architecture unless a product has its own.
_RATES = ("warps_per_sm", "blocks_per_sm", "special_per_clock", "tensor_flops_per_clock")


@dataclass(frozen=True)
class DeviceInfo:
    """One product, as listed in ``tuning_db/devices.yaml`` or described by the driver; 0 is a figure nobody knows.

    Attributes:
        id: canonical identity, e.g. "nvidia-h200"; the stem of its database file.
        name: what people call it.
        vendor: "nvidia", "cpu", ...
        compute_capability: "9.0"; "" for a CPU.
        sms: streaming multiprocessors; 0 for a CPU.
        memory_gib: device memory.
        shared_memory_per_block: largest dynamic shared memory of one block, bytes.
        shared_memory_per_sm: shared memory of one multiprocessor, bytes.
        registers_per_sm: 32-bit registers of one multiprocessor.
        l2_bytes: second-level cache.
        bandwidth_gbs: peak device memory bandwidth, 1e9 bytes/s.
        tensor_tflops: peak dense bf16 rate with float32 accumulation, 1e12 flop/s.
        tensor_flops_per_clock: the same of one multiprocessor in one clock.
        special_per_clock: special functions of one multiprocessor in one clock.
        warps_per_sm, blocks_per_sm: most that are resident on one multiprocessor.
    """

    id: str
    name: str
    vendor: str
    compute_capability: str
    sms: int
    memory_gib: float
    shared_memory_per_block: int
    shared_memory_per_sm: int
    registers_per_sm: int
    l2_bytes: int
    bandwidth_gbs: float
    tensor_tflops: float
    tensor_flops_per_clock: int = 0
    special_per_clock: int = 0
    warps_per_sm: int = 0
    blocks_per_sm: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.vendor == "cpu"

    @property
    def clock_ghz(self) -> float:
        """The clock at which the data sheet quotes the tensor cores' peak; 0 where that is not known."""
        per_clock = self.sms * self.tensor_flops_per_clock
        return 1e3 * self.tensor_tflops / per_clock if per_clock else 0.0


@dataclass(frozen=True)
class _Product:
    """A listed device with the names it goes by."""

    info: DeviceInfo
    aliases: tuple[str, ...]
    driver_names: tuple[re.Pattern, ...]


def known_devices() -> tuple[DeviceInfo, ...]:
    """The devices listed in ``tuning_db/devices.yaml``, in that order."""
    return tuple(product.info for product in _catalogue()[0])


def identify(device: torch.device | str) -> DeviceInfo:
    """Which product ``device`` is; asks the driver once per device and process.

    Args:
        device: e.g. "cuda", "cuda:1" or "cpu"; "cuda" is the current CUDA device.

    Returns:
        The listed entry if the GPU is exactly that product, else a description made from the driver's properties.

    Raises:
        ValueError: the name is no PyTorch device, or a CUDA device that is not there.
    """
    import torch

    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a PyTorch device such as cuda:0 or cpu, got {device!r} ({error})") from None
    if device.type != "cuda":
        return _identify_host(device.type)
    if device.index is not None:
        return _identify_cuda(device.index)
    _require_cuda()
    return _identify_cuda(torch.cuda.current_device())


def identify_properties(
    name: str,
    compute_capability: str,
    sms: int,
    memory_gib: float = 0.0,
    *,
    vendor: str = "nvidia",
    shared_memory_per_block: int = 0,
    shared_memory_per_sm: int = 0,
    registers_per_sm: int = 0,
    l2_bytes: int = 0,
    bandwidth_gbs: float = 0.0,
) -> DeviceInfo:
    """Which product has these properties: the part of :func:`identify` that needs no device.

    A listed product must agree in vendor, name, compute capability and SM count. Anything else gets an id made of its
    name and SM count, the limits given here, and where they are 0 those of its compute capability.

    Args:
        name: the driver's name, e.g. "NVIDIA H100 80GB HBM3".
        compute_capability: e.g. "9.0".
        sms: streaming multiprocessors.
        memory_gib, shared_memory_per_block, shared_memory_per_sm, registers_per_sm, l2_bytes, bandwidth_gbs:
            as in :class:`DeviceInfo`; 0 where unknown.
        vendor: "nvidia", "amd", ...
    """
    products, architectures = _catalogue()
    for product in products:
        info = product.info
        if (info.vendor, info.compute_capability, info.sms) == (vendor, compute_capability, sms):
            if any(pattern.fullmatch(name.strip()) for pattern in product.driver_names):
                return info
    limits = architectures.get(compute_capability, {}) if vendor == "nvidia" else {}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug.startswith(vendor):
        slug = f"{vendor}-{slug}"
    per_block = shared_memory_per_block or limits.get("shared_memory_per_block", _LEAST_SHARED_MEMORY)
    return DeviceInfo(
        id=f"{slug}-{sms}sm",
        name=name,
        vendor=vendor,
        compute_capability=compute_capability,
        sms=sms,
        memory_gib=memory_gib,
        shared_memory_per_block=per_block,
        shared_memory_per_sm=shared_memory_per_sm or limits.get("shared_memory_per_sm", per_block),
        registers_per_sm=registers_per_sm or limits.get("registers_per_sm", _LEAST_REGISTERS),
        l2_bytes=l2_bytes,
        bandwidth_gbs=bandwidth_gbs,
        tensor_tflops=0.0,
    )


def resolve(name_or_alias: str, present: Collection[DeviceInfo] = ()) -> DeviceInfo:
    """The listed device that a user means by an id ("nvidia-h100-sxm"), an alias ("h100") or a driver's name.

    Case, spaces and underscores do not matter. An alias of several products ("a100") means the one that is in
    ``present``, the devices of a machine, else the first listed.

    Raises:
        ValueError: nothing is called that; the message names the nearest known ids and aliases.
    """
    products, _ = _catalogue()
    wanted = re.sub(r"[\s_]+", "-", name_or_alias.strip().lower())
    known: dict[str, list[DeviceInfo]] = {}
    for product in products:
        for name in (product.info.id, *product.aliases):
            known.setdefault(name, []).append(product.info)
    if wanted in known:
        return next((info for info in known[wanted] if info in present), known[wanted][0])
    for product in products:
        if any(pattern.fullmatch(name_or_alias.strip()) for pattern in product.driver_names):
            return product.info
    if near := difflib.get_close_matches(wanted, known, n=4, cutoff=0.5):
        raise ValueError(f"unknown device {name_or_alias!r}; nearest known: {', '.join(near)}")
    raise ValueError(f"unknown device {name_or_alias!r}; known: {', '.join(p.info.id for p in products)}")


@lru_cache(maxsize=None)
def _identify_host(kind: str) -> DeviceInfo:
    if kind == "cpu":
        return resolve("cpu")
    return _without_limits(kind, kind)


@lru_cache(maxsize=None)
def _identify_cuda(index: int) -> DeviceInfo:
    import torch

    _require_cuda()
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device cuda:{index}: PyTorch sees {count} CUDA device(s), cuda:0 to cuda:{count - 1}")
    driver = torch.cuda.get_device_properties(index)
    # Some properties are not there in every PyTorch build.
    clock_khz, bus_bits = getattr(driver, "memory_clock_rate", 0), getattr(driver, "memory_bus_width", 0)
    return identify_properties(
        driver.name,
        f"{driver.major}.{driver.minor}",
        driver.multi_processor_count,
        round(driver.total_memory / 2**30, 1),
        vendor="amd" if torch.version.hip else "nvidia",
        shared_memory_per_block=getattr(driver, "shared_memory_per_block_optin", 0),
        shared_memory_per_sm=getattr(driver, "shared_memory_per_multiprocessor", 0),
        registers_per_sm=getattr(driver, "regs_per_multiprocessor", 0),
        l2_bytes=getattr(driver, "L2_cache_size", 0),
        bandwidth_gbs=2 * clock_khz * 1e3 * bus_bits / 8 / 1e9,
    )


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device: use cpu, or check the driver with nvidia-smi")


@lru_cache(maxsize=None)
def _catalogue() -> tuple[tuple[_Product, ...], dict[str, dict[str, int]]]:
    """The products of devices.yaml, and the limits of each compute capability."""
    from importlib.resources import files

    import yaml

    listed = yaml.safe_load(files("lla_compile.tuning_db").joinpath("devices.yaml").read_text(encoding="utf-8"))
    architectures = {
        capability: {
            "shared_memory_per_block": limits["shared_memory_per_block_kib"] * 1024,
            "shared_memory_per_sm": limits["shared_memory_per_sm_kib"] * 1024,
            **{name: limits[name] for name in ("registers_per_sm", *_RATES)},
        }
        for capability, limits in listed["architectures"].items()
    }
    return tuple(_product(entry, architectures) for entry in listed["devices"]), architectures


def _product(entry: dict, architectures: dict[str, dict[str, int]]) -> _Product:
    if entry["id"] == "cpu":
        info = _without_limits("cpu", entry["name"])
    else:
        info = DeviceInfo(
            id=entry["id"],
            name=entry["name"],
            vendor=entry["id"].partition("-")[0],
            compute_capability=entry["compute_capability"],
            sms=entry["sms"],
            memory_gib=float(entry["memory_gib"]),
            l2_bytes=int(entry["l2_mib"] * 2**20),
            bandwidth_gbs=float(entry["bandwidth_gbs"]),
            tensor_tflops=float(entry["tensor_tflops"]),
            **architectures[entry["compute_capability"]] | {name: entry[name] for name in _RATES if name in entry},
        )
    patterns = tuple(re.compile(pattern, re.IGNORECASE) for pattern in entry["driver_names"])
    return _Product(info, tuple(entry["aliases"]), patterns)


def _without_limits(kind: str, name: str) -> DeviceInfo:
    """A device that has no figures worth listing: a CPU, or a kind that only the eager backend serves."""
    return DeviceInfo(kind, name, kind, "", 0, 0.0, 0, 0, 0, 0, 0.0, 0.0)
