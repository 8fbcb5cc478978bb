"""What the driver is told to start a kernel before the one in front of it ends; GPU tests do start them."""

import ctypes

import pytest

from lla_compile import backends
from lla_compile.backends.cuda import dependent_launch, gram_kernels
from lla_compile.backends.cuda.dependent_launch import DependentLaunch
from lla_compile.devices import resolve
from lla_compile.spec import LLASpec

ATTRIBUTE_BYTES, CONFIG_BYTES = 72, 56  # of CUlaunchAttribute and CUlaunchConfig in cuda.h


@pytest.fixture
def launches(monkeypatch):
    """What cuLaunchKernelEx is called with, as the driver reads it, and what it returns."""
    seen = {"calls": [], "status": 0}

    def launch(config, function, parameters, extra):
        words = (ctypes.c_uint * 7).from_buffer_copy(config)
        attributes, count = ctypes.c_void_p.from_buffer(config, 40).value, ctypes.c_uint.from_buffer(config, 48).value
        attribute = (ctypes.c_int * (ATTRIBUTE_BYTES // 4)).from_address(attributes)
        stream = ctypes.c_void_p.from_buffer(config, 32).value
        seen["calls"].append((tuple(words), stream, count, attribute[0], attribute[2], function, parameters, extra))
        return seen["status"]

    monkeypatch.setattr(dependent_launch, "_launch", lambda: launch)
    return seen


def test_the_structures_are_those_of_the_driver():
    assert ctypes.sizeof(dependent_launch._Attribute) == ATTRIBUTE_BYTES
    assert ctypes.sizeof(dependent_launch._Config) == CONFIG_BYTES


def test_the_driver_is_told_grid_stream_and_attribute(launches):
    start = DependentLaunch(1234, "kernel", (5, 3), 256, 4096)
    start(0, 77)
    start(99, 78)
    sizes = (5, 3, 1, 256, 1, 1, 4096)
    programmatic_stream_serialization = (1, 6, 1)  # one attribute, its number, allowed
    assert launches["calls"] == [
        (sizes, None, *programmatic_stream_serialization, 1234, 77, None),
        (sizes, 99, *programmatic_stream_serialization, 1234, 78, None),
    ]


def test_a_launch_that_fails_says_which(launches):
    launches["status"] = 701
    with pytest.raises(RuntimeError, match="gram_solve: cuLaunchKernelEx returned 701"):
        DependentLaunch(1, "gram_solve", (1, 1), 32, 0)(0, 0)


@pytest.mark.parametrize("gpu, early", [("h200", True), ("b200", True), ("a100", False), ("rtx4090", False)])
def test_merge_and_solve_start_early_where_the_device_can(gpu, early):
    device = resolve(gpu)
    spec = LLASpec.decoding("bfloat16", 64, 4096, 8, group_size=1, precision="fast")
    config = backends.get("cuda").default_config(spec, device)
    overlaps = [kernel.overlaps for kernel in gram_kernels.kernels(spec, config, device)]
    assert overlaps == [False, early, early]
