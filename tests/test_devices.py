"""Device identity: what counts as a listed product, and what only looks like one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lla_compile import devices
from lla_compile.devices import identify, identify_properties, known_devices, resolve

KIB = 1024


@pytest.mark.parametrize(
    "name, capability, sms, expected",
    [
        ("NVIDIA A100-SXM4-40GB", "8.0", 108, "nvidia-a100-40gb"),
        ("A100-PCIE-40GB", "8.0", 108, "nvidia-a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 108, "nvidia-a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "8.0", 108, "nvidia-a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "9.0", 132, "nvidia-h100-sxm"),
        ("NVIDIA H100 PCIe", "9.0", 114, "nvidia-h100-pcie"),
        ("NVIDIA H200", "9.0", 132, "nvidia-h200"),
        ("NVIDIA H200 NVL", "9.0", 132, "nvidia-h200-nvl"),
        ("NVIDIA L4", "8.9", 58, "nvidia-l4"),
        ("NVIDIA L40S", "8.9", 142, "nvidia-l40s"),
        ("NVIDIA A10", "8.6", 72, "nvidia-a10"),
        ("NVIDIA GeForce RTX 3090", "8.6", 82, "nvidia-rtx3090"),
        ("NVIDIA GeForce RTX 4090", "8.9", 128, "nvidia-rtx4090"),
        ("NVIDIA B200", "10.0", 148, "nvidia-b200"),
        ("NVIDIA GeForce RTX 5090", "12.0", 170, "nvidia-rtx5090"),
    ],
)
def test_driver_names_of_listed_products(name, capability, sms, expected):
    assert identify_properties(name, capability, sms) is resolve(expected)


@pytest.mark.parametrize(
    "name, capability, sms, expected",
    [
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "8.0", 42, "nvidia-a100-sxm4-80gb-mig-3g-40gb-42sm"),
        ("NVIDIA H200 MIG 7g.141gb", "9.0", 132, "nvidia-h200-mig-7g-141gb-132sm"),
        ("NVIDIA H200", "9.0", 16, "nvidia-h200-16sm"),
        ("NVIDIA H100 80GB HBM3", "9.0", 114, "nvidia-h100-80gb-hbm3-114sm"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", 76, "nvidia-geforce-rtx-4090-laptop-gpu-76sm"),
        ("NVIDIA GeForce RTX 4090 D", "8.9", 114, "nvidia-geforce-rtx-4090-d-114sm"),
        ("NVIDIA GeForce RTX 3090 Ti", "8.6", 84, "nvidia-geforce-rtx-3090-ti-84sm"),
        ("NVIDIA A10G", "8.6", 80, "nvidia-a10g-80sm"),
        ("NVIDIA L40", "8.9", 142, "nvidia-l40-142sm"),
        ("Orin", "8.7", 16, "nvidia-orin-16sm"),
        # An unlisted name that slugs to a listed id must not become it.
        ("NVIDIA H100 SXM", "9.0", 132, "nvidia-h100-sxm-132sm"),
    ],
)
def test_lookalikes_are_other_devices(name, capability, sms, expected):
    device = identify_properties(name, capability, sms)
    assert device.id == expected
    assert device.id not in {d.id for d in known_devices()}
    assert (device.compute_capability, device.sms, device.vendor) == (capability, sms, "nvidia")


def test_other_vendor_is_no_listed_product():
    assert identify_properties("NVIDIA H200", "9.0", 132, vendor="amd").id == "amd-nvidia-h200-132sm"


def test_unknown_gpu_takes_the_drivers_limits_else_those_of_its_architecture():
    told = identify_properties(
        "NVIDIA GH200 480GB", "9.0", 132, 94.5, shared_memory_per_block=200 * KIB, shared_memory_per_sm=210 * KIB,
        registers_per_sm=1 << 15, l2_bytes=1 << 20, bandwidth_gbs=4000.0,
    )  # fmt: skip
    assert (told.shared_memory_per_block, told.shared_memory_per_sm) == (200 * KIB, 210 * KIB)
    assert (told.registers_per_sm, told.l2_bytes) == (1 << 15, 1 << 20)
    assert (told.bandwidth_gbs, told.memory_gib) == (4000.0, 94.5)
    untold = identify_properties("NVIDIA GH200 480GB", "9.0", 132)
    assert (untold.shared_memory_per_block, untold.shared_memory_per_sm) == (227 * KIB, 228 * KIB)
    assert identify_properties("NVIDIA Tesla T4", "7.5", 40).shared_memory_per_block == 48 * KIB


@pytest.mark.parametrize(
    "capability, per_block, per_sm, warps, blocks",
    [
        ("8.0", 163, 164, 64, 32),
        ("8.6", 99, 100, 48, 16),
        ("8.9", 99, 100, 48, 24),
        ("9.0", 227, 228, 64, 32),
        ("10.0", 227, 228, 64, 32),
        ("12.0", 99, 100, 48, 24),
    ],
)
def test_limits_by_compute_capability(capability, per_block, per_sm, warps, blocks):
    """Of the CUDA C++ Programming Guide's technical specifications per compute capability."""
    listed = [d for d in known_devices() if d.compute_capability == capability]
    assert listed
    for device in listed:
        assert device.shared_memory_per_block == per_block * KIB
        assert device.shared_memory_per_sm == per_sm * KIB
        assert device.registers_per_sm == 65536
        assert (device.warps_per_sm, device.blocks_per_sm) == (warps, blocks)


@pytest.mark.parametrize(
    "name, boost_ghz",
    [("a100-40gb", 1.41), ("a100-80gb", 1.41), ("a10", 1.695), ("rtx3090", 1.695), ("rtx4090", 2.52), ("l4", 2.04)],
)
def test_peaks_are_quoted_at_the_boost_clock(name, boost_ghz):
    """What the tensor peak says about the clock is what the vendor publishes, where it quotes the peak at that clock."""
    assert resolve(name).clock_ghz == pytest.approx(boost_ghz, rel=0.005)


def test_catalogue_is_consistent():
    products, _ = devices._catalogue()
    ids = [product.info.id for product in products]
    assert len(set(ids)) == len(ids)
    for product in products:
        assert not set(product.aliases) & set(ids)
        assert all(resolve(name, [product.info]) is product.info for name in (product.info.id, *product.aliases))
        if not product.info.is_cpu:
            assert product.info.tensor_tflops > 0 and product.info.bandwidth_gbs > 0 and product.info.l2_bytes > 0


@pytest.mark.parametrize("name", ["h100", "H100", " h100 ", "H100_SXM", "nvidia-h100-sxm", "NVIDIA H100 80GB HBM3"])
def test_resolve_is_lenient_about_spelling(name):
    assert resolve(name).id == "nvidia-h100-sxm"


@pytest.mark.parametrize("alias, first, other", [("a100", "40gb", "80gb"), ("h100", "sxm", "pcie")])
def test_an_alias_of_several_products_means_the_one_that_is_there(alias, first, other):
    there = resolve(f"{alias}-{other}")
    assert resolve(alias).id == f"nvidia-{alias}-{first}"
    assert resolve(alias, [resolve("cpu"), there]) is there
    assert resolve(f"{alias}-{first}", [there]).id == f"nvidia-{alias}-{first}"


def test_a_typo_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown device 'h20'.*h200"):
        resolve("h20")
    with pytest.raises(ValueError, match=r"unknown device 'rtx409'.*rtx4090"):
        resolve("rtx409")


def test_a_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match="known: nvidia-a100-40gb, .*, cpu"):
        resolve("quantum")


def test_identify_host_devices():
    assert identify("cpu") is identify(torch.device("cpu")) is resolve("cpu")
    assert identify("cpu").is_cpu
    assert identify("meta").id == "meta" and not identify("meta").is_cpu


def test_identify_refuses_nonsense():
    with pytest.raises(ValueError, match="device must be a PyTorch device"):
        identify("gpu0")


@pytest.fixture
def fake_cuda(monkeypatch):
    """A machine with one GPU, as far as PyTorch's Python functions tell; returns its properties and the calls made."""
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150 * 10**9,
        shared_memory_per_block_optin=227 * KIB, shared_memory_per_multiprocessor=228 * KIB,
        regs_per_multiprocessor=65536, L2_cache_size=60 << 20, memory_clock_rate=3_201_000, memory_bus_width=6144,
    )  # fmt: skip
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: calls.append(index) or properties)
    devices._identify_cuda.cache_clear()
    yield properties, calls
    devices._identify_cuda.cache_clear()


def test_identify_asks_the_driver_once(fake_cuda):
    _, calls = fake_cuda
    assert identify("cuda").id == identify("cuda:0").id == identify(torch.device("cuda", 0)).id == "nvidia-h200"
    assert calls == [0]


def test_identify_unlisted_gpu_reads_the_driver(fake_cuda):
    properties, _ = fake_cuda
    properties.name = "NVIDIA H20"
    device = identify("cuda")
    assert device.id == "nvidia-h20-132sm"
    assert device.l2_bytes == 60 << 20
    assert device.bandwidth_gbs == pytest.approx(4917, rel=1e-3)


def test_identify_missing_gpu(fake_cuda, monkeypatch):
    with pytest.raises(ValueError, match="cuda:3: PyTorch sees 1 CUDA device"):
        identify("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:5"):
        with pytest.raises(ValueError, match="no CUDA device"):
            identify(name)


def test_import_reads_nothing():
    """A process that imports the database has neither the YAML reader nor the writers' packages."""
    code = (
        "import sys, lla_compile.devices, lla_compile.tuning_db.lookup\n"
        "print([m for m in ('yaml', 'jsonschema', 'filelock', 'platformdirs', 'optuna', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
