"""Decoding's streaming kernel compiled for GPUs that are not here, and what the machine code tells."""

import importlib.util
from dataclasses import replace

import pytest
from compiled import cubin_of

from lla_compile import backends
from lla_compile.devices import known_devices, resolve
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BACKEND = backends.get("triton")
GPUS = [device for device in known_devices() if not device.is_cpu]
UNUSED = {"scale_ptr", "ridge_ptr", "iterations_ptr", "final_residual_ptr"}


def make_spec(dtype: str, head_dim: int, group: int = 1, **fields) -> LLASpec:
    sizes = dict(batch=2, num_heads=8 * group, num_kv_heads=8, seqlen_q=1, seqlen_k=4096, phase="decode")
    return LLASpec(dtype, head_dim, head_dim, **sizes | fields)


def stream_config(spec: LLASpec, device) -> KernelConfig:
    from lla_compile.backends.triton import stream_config

    return stream_config.default_config(spec, device)


@pytest.fixture(
    scope="module",
    params=[
        ("h200", make_spec("bfloat16", 128, 8, page_size=16)),
        ("h200", make_spec("bfloat16", 256)),
        ("a100", make_spec("float16", 64, 4)),
        ("l4", make_spec("float32", 64)),
        ("b200", make_spec("bfloat16", 128, 8)),
    ],
    ids=lambda case: f"{case[0]}-{case[1].dtype}-{case[1].head_dim}",
)
def compiled(request):
    """Device, spec, configuration and the kernel as the launcher compiles it for calls with lengths."""
    from lla_compile.backends.triton.stream_launcher import compile_stream

    gpu, spec = request.param
    device = resolve(gpu)
    config = stream_config(spec, device)
    if (why := BACKEND.infeasible(spec, config, device)) and why.startswith("Triton"):
        pytest.skip(why)
    absent = UNUSED | (set() if spec.page_size else {"block_table_ptr"})
    kernel = compile_stream(spec, config, device, absent=frozenset(absent))
    return device, spec, config, cubin_of(kernel)


def test_loops_over_keys_keep_to_registers_and_use_the_tensor_cores(compiled):
    _, spec, _, kernel = compiled
    loops = [loop for loop in kernel.loops if loop["HMMA"] + loop["UTCHMMA"]]
    assert len(loops) >= 6 and not any(loop["LDL"] + loop["STL"] for loop in loops)
    if spec.dtype != "float32":
        assert sum(loop["LDGSTS"] > 0 for loop in loops) >= len(loops) // 2


def test_shared_memory(compiled):
    """Within the device's limit, and never more than the model of the configuration says."""
    device, spec, config, kernel = compiled
    assert kernel.shared <= device.shared_memory_per_block
    less = replace(device, shared_memory_per_block=kernel.shared - 1)
    assert "shared memory" in (BACKEND.infeasible(spec, config, less) or "")


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("dtype, head_dim", [("float32", 64), ("float32", 128), ("bfloat16", 192), ("float16", 256)])
def test_what_gram_cannot_hold_is_streamed(device, dtype, head_dim):
    for group in (1, 8):
        spec = make_spec(dtype, head_dim, group, precision="fast")
        config = BACKEND.default_config(spec, device)
        assert config.schedule == "fused" and config.num_splits is None
        reason = BACKEND.infeasible(spec, config, device)
        assert reason is None or reason.startswith("Triton before")


def test_each_schedule_refuses_the_knobs_of_the_other():
    spec, device = make_spec("bfloat16", 64), resolve("h200")
    gram, stream = BACKEND.default_config(spec, device), stream_config(spec, device)
    assert (gram.schedule, stream.schedule) == ("gram", "fused")
    assert "block_q 1" in BACKEND.infeasible(spec, replace(gram, block_q=16), device)
    assert "num_splits" in BACKEND.infeasible(spec, replace(stream, num_splits=1), device)
    assert "gram and fused" in BACKEND.infeasible(spec, replace(stream, schedule="split"), device)
    assert BACKEND.alternatives(spec, device) == (stream,)
    assert BACKEND.alternatives(make_spec("float32", 64), device) == ()
    assert {None} < set(BACKEND.search_space(spec, device)["num_splits"])
