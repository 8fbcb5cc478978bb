"""Puts this folder on the path, so that every test, those in sub-folders too, can import the shared helpers."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before PyTorch is imported, here and in what the tests start: tensors are small, and threads of several processes
# would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    """Processes that run tests beside each other share the kernels that they compile."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="lla_compile_tests")
        os.environ.setdefault("LLA_COMPILE_EMULATION", os.path.join(folder, "emulation"))
        os.environ["LLA_COMPILE_TEST_CUBINS"] = os.path.join(folder, "cubins")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No overlay and no environment of the user's, and nothing remembered of them."""
    from lla_compile import clear_cache

    for name in ("BACKENDS", "STRICT", "DEBUG"):
        monkeypatch.delenv(f"LLA_COMPILE_{name}", raising=False)
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path))
    clear_cache()
    yield
    clear_cache()
