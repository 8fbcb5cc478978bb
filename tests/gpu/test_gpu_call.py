"""The public call on a GPU: CUDA graphs, torch.compile, argument checks, memory and host time."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_gpu import bound, gpu_problem
from problems import assert_close

from lla_compile import backends, clear_cache, lla_attention, plan
from lla_compile.devices import identify

SCHEDULES = pytest.mark.parametrize("schedule", ["fused", "split"])


def test_the_device_is_identified():
    device = identify("cuda")
    assert device.vendor == "nvidia" and device == identify(f"cuda:{torch.cuda.current_device()}")
    major, minor = torch.cuda.get_device_capability()
    assert device.compute_capability == f"{major}.{minor}" and device.shared_memory_per_block > 48 * 1024


def test_the_planner_chooses_triton():
    p = gpu_problem(seqlen_q=256)
    chosen = plan(p.q, p.k, p.v)
    assert chosen.config.backend == "triton" and chosen.device == identify("cuda")
    assert_close(lla_attention(p.q, p.k, p.v), p.reference(), 2.5e-3)
    assert plan(p.q.double(), p.k.double(), p.v.double()).config.backend == "eager"


def test_heuristic_default_is_feasible():
    p = gpu_problem(seqlen_q=256)
    backend, device = backends.get("triton"), identify("cuda")
    for head_dim in (1, 64, 128, 256):
        spec = replace(p.spec(), head_dim=head_dim, head_dim_v=head_dim)
        assert backend.infeasible(spec, backend.default_config(spec, device), device) is None


@SCHEDULES
def test_cuda_graph(backend, schedule):
    p = gpu_problem(batch=2, heads=4, seqlen_q=300)
    launch = bound(backend, p, schedule=schedule)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    for seed in (1, 2):
        other = gpu_problem(batch=2, heads=4, seqlen_q=300, seed=seed)
        for name in ("q", "k", "v"):
            getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        assert_close(out, other.reference(), 2.5e-3)
        assert torch.equal(out, launch())


def test_cuda_graph_of_the_public_call(backend):
    p = gpu_problem(batch=2, heads=4, seqlen_q=300)
    lla_attention(p.q, p.k, p.v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lla_attention(p.q, p.k, p.v)
    p.q.copy_(gpu_problem(batch=2, heads=4, seqlen_q=300, seed=9).q)
    graph.replay()
    assert torch.equal(out, lla_attention(p.q, p.k, p.v))


def test_torch_compile(backend):
    p = gpu_problem(heads=4, kv_heads=2, seqlen_q=200)

    def layer(q, k, v):
        return lla_attention(q * 2, k, v, 0.5) + 1

    with torch.no_grad():
        expected = layer(p.q, p.k, p.v)
        compiled = torch.compile(layer, fullgraph=True)
        assert_close(compiled(p.q, p.k, p.v), expected.double(), 5e-3)


def test_streams(backend):
    """Kernels go to the current stream: behind what it already holds, not behind the default stream's work."""
    p = gpu_problem(heads=4, seqlen_q=200)
    expected = lla_attention(p.q, p.k, p.v)
    late = p.q.clone()
    stream = torch.cuda.Stream()
    late.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(p.q)
        out = lla_attention(late, p.k, p.v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_ridge_values_are_checked_in_debug_mode(monkeypatch):
    p = gpu_problem(seqlen_q=64)
    ridge = torch.ones(2, 64, device="cuda")
    ridge[1, 3] = -1
    monkeypatch.setenv("LLA_COMPILE_DEBUG", "1")
    clear_cache()
    with pytest.raises(ValueError, match="ridge must be positive and finite, got a tensor"):
        lla_attention(p.q, p.k, p.v, ridge)
    assert lla_attention(p.q, p.k, p.v, ridge.abs()).isfinite().all()


@pytest.mark.parametrize("argument", ["k", "ridge", "scale"])
def test_devices_must_agree(argument):
    p = gpu_problem(seqlen_q=64)
    arguments = dict(q=p.q, k=p.k, v=p.v, ridge=torch.ones(64, device="cuda"), scale=torch.tensor(0.1, device="cuda"))
    arguments[argument] = arguments[argument].cpu()
    with pytest.raises(ValueError, match=argument):
        lla_attention(**arguments)


@SCHEDULES
def test_extra_memory_is_linear_in_the_length(backend, schedule):
    """Peak memory beyond inputs and output; the window only keeps the longest run short."""
    extra = {}
    for seqlen in (1024, 4096, 16384, 65536):
        p = gpu_problem(seqlen_q=seqlen, window_size=128, ridge=4.0)
        launch = bound(backend, p, schedule=schedule)
        launch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = launch()
        torch.cuda.synchronize()
        extra[seqlen] = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        inputs = 4 * out.numel() * out.element_size()
        # Vectors of a fused kernel wait in memory only where CUDA's have no room in shared memory.
        few = schedule == "fused" and backend == "triton"
        assert extra[seqlen] <= (4096 if few else 4 * inputs), extra
    allocator_block = 2 << 20  # large requests are rounded up to it
    for seqlen, size in extra.items():
        assert size <= seqlen / 1024 * extra[1024] + allocator_block, extra


def test_host_overhead_over_a_bare_launch(backend):
    """The public call against its own executable; launches are few between synchronisations, so no queue fills up."""
    p = gpu_problem(batch=1, heads=2, seqlen_q=64)
    executable = backends.get(backend).bind(plan(p.q, p.k, p.v))
    inputs = p.inputs()

    def bare():
        executable(inputs, ("out",))

    def public():
        lla_attention(p.q, p.k, p.v, 1.0)

    def microseconds(call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        return (time.perf_counter() - start) * 1e5

    for call in (bare, public):
        microseconds(call)
    pairs = [(microseconds(bare), microseconds(public)) for _ in range(200)]
    overhead = statistics.median(b - a for a, b in pairs)
    assert overhead <= 25, f"{overhead:.1f} us over {statistics.median(a for a, _ in pairs):.1f} us"


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool, clean", [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "(0 errors, 0 warnings)")]
)
def test_sanitizer(tool, clean):
    """No access out of bounds, and no race for shared memory."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    # Without the caching allocator each tensor is an allocation of its own, with bounds that the tool can see.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).with_name("sanitizer_case.py")
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and clean in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
