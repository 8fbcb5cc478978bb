import json
import subprocess
import sys
from pathlib import Path

# The target is 0.3 s; a busy machine gets more, and the best of three counts.
LIMIT_SECONDS = 0.6

SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import lla_compile
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def import_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=Path.home())
    return json.loads(done.stdout)


def test_import_is_light():
    results = []
    while len(results) < 3 and (not results or results[-1]["seconds"] >= LIMIT_SECONDS):
        results.append(import_in_a_fresh_process())
    packages = {name.partition(".")[0] for name in results[0]["modules"]}
    heavy = {"optuna", "cupy", "yaml", "triton", "jsonschema", "rich", "platformdirs", "filelock"}
    assert not packages & heavy
    assert not [name for name in results[0]["modules"] if name.startswith(("lla_compile.tun", "lla_compile.backends."))]
    seconds = min(result["seconds"] for result in results)
    print(f"import lla_compile: {seconds:.3f} s beyond torch")
    assert seconds < LIMIT_SECONDS
