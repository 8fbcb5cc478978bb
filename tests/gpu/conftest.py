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
def clean(monkeypatch, tmp_path):
    """No tuned winners and no environment of the user's: plans are the heuristic default."""
    from lla_compile import clear_cache

    for name in ("BACKENDS", "STRICT", "DEBUG"):
        monkeypatch.delenv(f"LLA_COMPILE_{name}", raising=False)
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path))
    clear_cache()
    yield
    clear_cache()
