"""The CUDA kernels that decode Parallax and softmax attention, compiled for GPUs that are not here; their limits."""

import importlib.util
from dataclasses import replace

import pytest
from compiled import NEEDS_NVRTC, code_of, decode_spec

from lla_compile import backends
from lla_compile.backends.cuda import compiler, part_kernels
from lla_compile.devices import known_devices, resolve
from lla_compile.prediction.cubin import Cubin
from lla_compile.prediction.workload import workload

NEEDS_CUOBJDUMP = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton brings cuobjdump")
BACKEND = backends.get("cuda")
GPUS = [device for device in known_devices() if not device.is_cpu]
# Compute capabilities 8.0, 9.0, 10.0 and 12.0; rows of several warps and pages that are looked up row by row need most.
CASES = [
    ("a100", dict(head_dim=128)),
    ("h200", dict(head_dim=128, num_kv_heads=1, seqlen_q=4)),
    ("b200", dict(head_dim=128, page_size=1, dtype="float16")),
    ("rtx5090", dict(head_dim=40, head_dim_v=24, op="softmax")),
]


def spec_of(op="parallax", dtype="bfloat16", head_dim=64, **fields):
    return decode_spec(dtype, head_dim, **dict(op=op, seqlen_k=16384, batch=1) | fields)


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("gpu, fields", CASES, ids=str)
def test_defaults_keep_to_registers_and_never_wait_for_other_warps(gpu, fields, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_cache_folder", lambda: tmp_path)
    spec, device = spec_of(**fields), resolve(gpu)
    config = BACKEND.default_config(spec, device)
    kernels = part_kernels.kernels(spec, config, device)
    cubins = [Cubin(*binary) for binary in BACKEND.binaries(spec, config, device)]
    assert [cubin.name for cubin in cubins] == ["part_pass", "part_merge"]
    blocks = part_kernels.resident(spec, config, device), 1
    for kernel, cubin, together in zip(kernels, cubins, blocks, strict=True):
        assert cubin.stack == 0 and not cubin.count("STL") and not cubin.count("LDL")
        assert cubin.registers * kernel.threads * together <= device.registers_per_sm
        assert kernel.shared <= device.shared_memory_per_block
        assert (kernel.shared + 1024) * together <= device.shared_memory_per_sm
    [loop] = [loop for loop in cubins[0].loops if loop["HMMA"]]
    names = [name for name, _ in code_of(cubins[0], loop)]
    assert any(name.startswith("LDGSTS") for name in names)
    assert any(name.startswith("BAR") for name in names) == (config.block_q > part_kernels.WARP_ROWS)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("op", ["parallax", "softmax"])
def test_every_gpu_has_a_default_within_its_limits(device, op):
    for head_dim, head_dim_v in ((1, 1), (40, 128), (64, 64), (128, 5), (128, 128)):
        for fields in (dict(), dict(page_size=16), dict(page_size=1), dict(num_kv_heads=1, seqlen_q=16)):
            spec = spec_of(op, "float16", head_dim, head_dim_v=head_dim_v, **fields)
            config = BACKEND.default_config(spec, device)
            assert BACKEND.infeasible(spec, config, device) is None
            assert set(config.as_dict()) - {"backend"} <= set(BACKEND.search_space(spec, device))
            assert workload(spec, config).launches[0].passes[0].turns >= 1


def test_few_heads_are_cut_into_parts_for_every_multiprocessor():
    device = resolve("h200")
    for heads, blocks in ((8, 264), (256, 256)):
        spec = spec_of(head_dim=128, num_heads=heads, num_kv_heads=heads)
        config = BACKEND.default_config(spec, device)
        kernels = part_kernels.kernels(spec, config, device)
        assert kernels[0].grid == (blocks, 1) and len(kernels) == (2 if config.num_splits > 1 else 1)
        assert part_kernels.bytes_in_flight(spec, config, device) >= 64 * 1024


@pytest.mark.parametrize(
    "knobs, part",
    [
        (dict(num_stages=9), "shared memory"),
        (dict(num_stages=1), "num_stages must be at least 2"),
        (dict(num_warps=3), "num_warps must be 1, 2, 4, 8 for 8 rows"),
        (dict(block_q=64, num_warps=4), "num_warps must be 8 for 64 rows"),
        (dict(block_k=48), "block_k must be a multiple of 64"),
        (dict(block_k=128, num_warps=1), "registers"),
        (dict(block_q=24), "block_q must be one of 8, 16, 32, 64"),
        (dict(block_d=64), "without block_d"),
        (dict(num_splits=65), "num_splits"),
        (dict(schedule="gram"), "schedule fused"),
    ],
)
def test_infeasible_says_why(knobs, part):
    spec, device = spec_of(head_dim=128), resolve("h200")
    assert part in BACKEND.infeasible(spec, replace(BACKEND.default_config(spec, device), **knobs), device)


@pytest.mark.parametrize(
    "fields, part",
    [
        (dict(dtype="float32"), "decoding of parallax has no float32 kernel"),
        (dict(head_dim=129), "at most 128"),
        (dict(head_dim_v=256, op="softmax"), "decoding of softmax has heads of at most 128 dimensions, got 256"),
    ],
)
def test_unsupported_says_why(fields, part):
    assert part in BACKEND.unsupported_spec(spec_of(**fields), resolve("h200"))


def test_operators_and_sources_have_hashes_of_their_own():
    device = resolve("h200")
    hashes = set()
    for op in ("lla", "parallax", "softmax"):
        spec = spec_of(op)
        config = BACKEND.default_config(spec, device)
        hashes.add(BACKEND.source_hash(spec, config))
        hashes.add(BACKEND.source_hash(spec, replace(config, num_splits=1)))
    assert len(hashes) == 3


@NEEDS_NVRTC
def test_kernels_are_built_ahead_of_time(tmp_path):
    spec, device = spec_of(head_dim=16), resolve("a100")
    files = BACKEND.build(spec, BACKEND.default_config(spec, device), device, tmp_path)
    assert len(set(files)) == 4 and all(path.exists() for path in files)
