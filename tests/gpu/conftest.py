"""Tests that need a GPU: skipped, with the reason, where there is none."""

import importlib.util
from pathlib import Path

import pytest
import torch


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
