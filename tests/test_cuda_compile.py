"""The CUDA kernels of decoding compiled for GPUs that are not here: what the machine code tells, and the disk cache."""

import importlib.util
from dataclasses import dataclass, replace

import pytest
from compiled import NEEDS_NVRTC, DecodeCase, decode_spec, shared_cubins

from lla_compile import backends
from lla_compile.backends.cuda import compiler, gram_kernels, nvrtc
from lla_compile.devices import known_devices, resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin


NEEDS_CUOBJDUMP = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton brings cuobjdump")
BACKEND = backends.get("cuda")
GPUS = [device for device in known_devices() if not device.is_cpu]


@dataclass(frozen=True)
class Case(DecodeCase):
    """The heuristic default of a device, or the pass with so many warps."""

    num_warps: int | None = None

    def __str__(self) -> str:
        return super().__str__() + (f"-{self.num_warps}" if self.num_warps else "")

    @property
    def config(self) -> KernelConfig:
        default = BACKEND.default_config(self.spec, self.device)
        config = replace(default, num_warps=self.num_warps, num_stages=3) if self.num_warps else default
        assert BACKEND.infeasible(self.spec, config, self.device) is None
        return config

    @property
    def uses_wgmma(self) -> bool:
        return gram_kernels.uses_wgmma(self.spec, self.config)


CASES = [
    Case("a100", 128),
    Case("a100", 64, "float16", page_size=16),
    Case("a100", 16),
    Case("l4", 128, page_size=16),
    Case("h200", 128),
    Case("h200", 128, page_size=16),
    Case("h200", 128, "float16"),
    Case("h200", 128, "float16", page_size=16),
    Case("h200", 64),
    Case("h200", 64, "float16", page_size=16),
    Case("h200", 32),
    Case("h200", 128, num_warps=8),
    Case("b200", 128, page_size=16),
    Case("rtx5090", 128),
]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def compiled():
    """A function from case to cubins."""
    known = {}

    def compile_case(case: Case) -> list[Cubin]:
        if case not in known:
            known[case] = [
                Cubin(
                    kernel.name, kernel.threads // 32, kernel.shared,
                    compile_kernel(kernel, case.device.compute_capability),
                )  # fmt: skip
                for kernel in gram_kernels.kernels(case.spec, case.config, case.device)
            ]
        return known[case]

    with shared_cubins():
        yield compile_case


def compile_kernel(kernel: gram_kernels.Kernel, compute_capability: str) -> bytes:
    return compiler.compile_kernel(kernel.source, kernel.defines | {"ALIGNED": "1"}, compute_capability)


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@EVERY_CASE
def test_registers_and_spills(case, compiled):
    """The block fits on a multiprocessor, and nothing lives in local memory."""
    kernels = gram_kernels.kernels(case.spec, case.config, case.device)
    for kernel, cubin in zip(kernels, compiled(case), strict=True):
        assert cubin.stack == 0
        assert cubin.registers * kernel.threads <= case.device.registers_per_sm
        assert kernel.shared <= case.device.shared_memory_per_block


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@EVERY_CASE
def test_the_pass_uses_the_tensor_cores(case, compiled):
    """In one loop with two terms and in one with one; tiles are copied asynchronously."""
    gram_pass = compiled(case)[0]
    assert gram_pass.count("LDGSTS") and gram_pass.count("HMMA")
    assert bool(gram_pass.count("HGMMA")) == case.uses_wgmma
    if case.uses_wgmma:
        loops = [loop for loop in gram_pass.loops if loop["HGMMA"]]
        assert len(loops) == 2
        # A wait for all products of each of two tiles, and of each step of a tile in two terms; where registers are
        # short there is one after every product.
        waits = sum(name.startswith("WARPGROUP.DEPBAR") for _, name, _ in gram_pass.instructions)
        assert waits == 2 + case.config.block_k // 16


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [1, 16, 32, 40, 64, 96, 128])
def test_heuristic_default_is_feasible(device, dtype, head_dim):
    for head_dim_v in (head_dim, 5, 128):
        for fields in (dict(), dict(page_size=16), dict(precision="fast"), dict(num_kv_heads=4, seqlen_q=16)):
            spec = decode_spec(dtype, head_dim, head_dim_v, **fields)
            assert BACKEND.infeasible(spec, BACKEND.default_config(spec, device), device) is None


@pytest.mark.parametrize(
    "knobs, part",
    [
        (dict(num_stages=20), "shared memory"),
        (dict(num_stages=3), "num_stages must be at least 4"),
        (dict(num_warps=4), "num_warps must be one of 12, 8"),
        (dict(block_k=48), "block_k must be a multiple of 32"),
        (dict(block_d=64), "all 128 rows"),
        (dict(num_splits=65), "num_splits"),
        (dict(schedule="fused"), "schedule gram"),
    ],
)
def test_infeasible_says_why(knobs, part):
    case = Case("h200", 128)
    assert part in BACKEND.infeasible(case.spec, replace(case.config, **knobs), case.device)


@pytest.mark.parametrize("fields, part", [
    (dict(phase="backward"), "not of lla"),
    (dict(dtype="float32"), "no float32 kernel"),
    (dict(head_dim=129), "at most 128"),
])  # fmt: skip
def test_unsupported_says_why(fields, part):
    spec = replace(decode_spec("bfloat16", 64), **fields)
    assert part in BACKEND.unsupported(spec, resolve("h200"))


def test_other_devices_are_refused():
    spec = decode_spec("bfloat16", 64)
    assert "not an NVIDIA GPU" in BACKEND.unsupported(spec, resolve("cpu"))
    old = replace(resolve("a100"), compute_capability="7.5")
    assert "7.5 < 8.0" in BACKEND.unsupported(spec, old)


@NEEDS_NVRTC
def test_a_compile_error_is_one_line():
    kernel = gram_kernels.kernels(*described(Case("h200", 64)))[-1]
    with pytest.raises(backends.CompileError) as error:
        compiler.compile_kernel(kernel.source, {"ALIGNED": "1"}, "9.0")
    assert "\n" not in str(error.value) and "gram_solve.cu did not compile" in str(error.value)


@NEEDS_NVRTC
def test_the_cache_on_disk(tmp_path, monkeypatch):
    """Compiled once; again only if the file is not what was written, or something else is asked for."""
    monkeypatch.setattr(compiler, "_cache_folder", lambda: tmp_path / "cubin")
    compiled = []
    real = nvrtc.Nvrtc.compile
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *a: compiled.append(a) or real(*a))
    kernel = gram_kernels.kernels(*described(Case("a100", 16)))[-1]
    first = compile_kernel(kernel, "8.0")
    assert compile_kernel(kernel, "8.0") == first and len(compiled) == 1
    [file] = (tmp_path / "cubin").iterdir()
    for damage in (b"", file.read_bytes()[:-1], b"x" * 4000):
        file.write_bytes(damage)
        assert compile_kernel(kernel, "8.0") == first
    assert len(compiled) == 4
    assert compile_kernel(kernel, "9.0") != first and len(compiled) == 5


@NEEDS_NVRTC
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr(compiler, "_cache_folder", lambda: blocked / "cubin")
    kernel = gram_kernels.kernels(*described(Case("a100", 16)))[-1]
    assert compile_kernel(kernel, "8.0").startswith(b"\x7fELF")


def described(case: Case):
    return case.spec, case.config, case.device
