"""Device identity and limits: which GPU (or CPU) a plan is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceInfo:
    """One product, as listed in ``tuning_db/devices.yaml`` or described by the driver.

    Attributes:
        id: canonical identity, e.g. "nvidia-h200"; the stem of its database file.
        name: what people call it.
        vendor: "nvidia", "cpu", ...
        compute_capability: "9.0"; "" for a CPU.
        sms: streaming multiprocessors, or CPU cores (0 where unknown).
        memory_gib: device memory.
        shared_memory_per_block: largest dynamic shared memory of one block, bytes.
        shared_memory_per_sm: shared memory of one multiprocessor, bytes.
        registers_per_sm: 32-bit registers of one multiprocessor.
        l2_bytes: second-level cache.
        bandwidth_gbs: peak device memory bandwidth, 1e9 bytes/s.
        tensor_tflops: peak dense bf16 rate with float32 accumulation, 1e12 flop/s.
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

    @property
    def is_cpu(self) -> bool:
        return self.vendor == "cpu"
