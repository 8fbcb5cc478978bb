"""Kernels of Parallax compiled for GPUs that are not here, and what the machine code tells."""

import importlib.util
from dataclasses import replace

import pytest

from lla_compile import backends
from lla_compile.devices import known_devices, resolve
from lla_compile.prediction.library import compile_features
from lla_compile.prediction.model import broken_limit, spilled_share
from lla_compile.prediction.workload import workload
from lla_compile.spec import LLASpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BACKEND = backends.get("triton")
GPUS = [device for device in known_devices() if not device.is_cpu]
CASES = [
    ("h200", "forward", 64),
    ("h200", "forward", 128),
    ("h200", "backward", 64),
    ("h200", "decode", 128),
    ("a100", "forward", 64),
    ("a100", "decode", 128),
    ("b200", "forward", 128),
]


def make_spec(phase: str, head_dim: int, op: str = "parallax", dtype: str = "bfloat16") -> LLASpec:
    if phase == "decode":
        return LLASpec.decoding(dtype, head_dim, 16384, 8, op=op)
    return LLASpec.self_attention(dtype, head_dim, 4096, 32, op=op, phase=phase)


@pytest.mark.parametrize("gpu, phase, head_dim", CASES)
def test_defaults_keep_to_registers_and_use_the_tensor_cores(gpu, phase, head_dim):
    device, spec = resolve(gpu), make_spec(phase, head_dim)
    config = BACKEND.default_config(spec, device)
    if (why := BACKEND.infeasible(spec, config, device)) and why.startswith("Triton"):
        pytest.skip(why)
    kernels = compile_features(spec, config, device)
    assert len(kernels) == {"forward": 1, "backward": 2, "decode": 2}[phase]
    assert not [why for kernel in kernels if (why := broken_limit(kernel, device))]
    assert spilled_share(workload(spec, config), kernels) < 0.03
    assert any(loop.matrix for loop in kernels[0].loops)


@pytest.mark.parametrize("gpu, phase", [("h200", "forward"), ("a100", "backward")])
def test_float32_defaults_fit_in_shared_memory(gpu, phase):
    device, spec = resolve(gpu), make_spec(phase, 64, dtype="float32")
    kernels = BACKEND.binaries(spec, BACKEND.default_config(spec, device), device)
    assert max(kernel.shared for kernel in kernels) <= device.shared_memory_per_block


@pytest.mark.parametrize("op", ["parallax", "softmax"])
@pytest.mark.parametrize("phase", ["forward", "backward", "decode"])
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("bfloat16", 256), ("float32", 128), ("float32", 256)])
def test_every_gpu_has_a_default_within_its_limits(op, phase, dtype, head_dim):
    spec = make_spec(phase, head_dim, op, dtype)
    for device in GPUS:
        config = BACKEND.default_config(spec, device)
        why = BACKEND.infeasible(spec, config, device)
        if (dtype, head_dim, phase) == ("float32", 256, "backward") and device.shared_memory_per_block < 128 * 1024:
            assert "shared memory" in why  # the second terms of tf32x3 products leave it to the eager backend
            continue
        assert why is None or why.startswith("Triton"), f"{device.id}: {config.describe()}: {why}"
        assert config.cg_max_iters is None
        space = BACKEND.search_space(spec, device)
        assert set(config.as_dict()) - {"backend"} <= set(space), device.id


def test_parts_and_one_part_are_other_kernels():
    spec, device = make_spec("decode", 64), resolve("h200")
    config = BACKEND.default_config(spec, device)
    hashes = {BACKEND.source_hash(spec, replace(config, num_splits=splits)) for splits in (1, 2, 3)}
    assert len(hashes) == 2


@pytest.mark.parametrize("op", ["parallax", "softmax"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_decoding_with_covariances_is_not_offered(name, op):
    backend, spec, device = backends.get(name), make_spec("decode", 64, op), resolve("h200")
    config = replace(backend.default_config(spec, device), schedule="gram")
    assert "schedule fused" in backend.infeasible(spec, config, device)
