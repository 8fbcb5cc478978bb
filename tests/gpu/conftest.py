"""Tests that need a GPU: skipped, with the reason, where there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lla_compile import clear_cache


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes several seconds or tens of gigabytes of GPU memory")


def pytest_collection_modifyitems(items):
    reason = None
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, PyTorch sees none"
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    if reason is None:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def always_clean(clean):
    """Nothing here meets settings of the user's."""


@pytest.fixture(params=["triton", "cuda"])
def backend(request, always_clean, monkeypatch):
    """Every test that asks for it runs once for each; calls that name none run on it."""
    if request.param == "cuda":
        from lla_compile.backends.cuda import runtime

        if why := runtime.unavailable():
            pytest.skip(why)
    monkeypatch.setenv("LLA_COMPILE_BACKENDS", f"{request.param},eager")
    clear_cache()
    return request.param
