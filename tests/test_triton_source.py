"""The printed Triton modules as text: no compiler and no GPU, but for the operator that the printer has never seen."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from lla_compile import backends
from lla_compile.backends import triton as triton_backend
from lla_compile.backends.triton import source
from lla_compile.devices import resolve
from lla_compile.expr import dot, log2, rounded, row, tile, vector, where
from lla_compile.plans import SCHEDULES, KernelConfig
from lla_compile.spec import LLASpec
from lla_compile.sweeps import P, Accumulator, Assign, Score, Sweep, SweepList

SPEC = LLASpec("bfloat16", 64, 64, 1, 8, 8, 1024, 1024)
CONFIGS = {name: KernelConfig("triton", name, 64, 64, 32, 4, 2) for name in SCHEDULES}
HASHES = """
from lla_compile import LLASpec, backends
from lla_compile.plans import SCHEDULES, KernelConfig
spec = LLASpec("bfloat16", 64, 64, 1, 8, 8, 1024, 1024)
print(*(backends.get("triton").source_hash(spec, KernelConfig("triton", s, 64, 64, 32, 4, 2)) for s in SCHEDULES))
"""


def module(schedule: str) -> source.Module:
    return source.print_module("lla", "forward", schedule)


def functions(schedule: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(module(schedule).text).body if isinstance(node, ast.FunctionDef)}


def hashes() -> list[str]:
    triton_backend._source_hash.cache_clear()
    return [backends.get("triton").source_hash(SPEC, config) for config in CONFIGS.values()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kernels_are_the_functions_of_the_module(schedule):
    kernels = module(schedule).kernels
    assert [kernel.name for kernel in kernels] == list(functions(schedule))
    assert len(kernels) == (1 if schedule == "fused" else 3)
    assert [kernel.repeated for kernel in kernels] == ([False] if schedule == "fused" else [False, True, False])
    for kernel in kernels:
        names = [argument.arg for argument in functions(schedule)[kernel.name].args.args]
        assert names == [name for name, _ in kernel.parameters] + list(source.CONSTEXPRS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_block_pointers(schedule):
    """Triton is removing them."""
    assert "make_block_ptr" not in module(schedule).text


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_parameter_is_used(schedule):
    """In some kernel: those of a split schedule share one list of arguments, so that they launch alike."""
    unused = None
    for function in functions(schedule).values():
        used = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        names = {argument.arg for argument in function.args.args}
        unused = names - used if unused is None else unused & (names - used)
    # The host counts the launches of a split schedule.
    assert unused == (set() if schedule == "fused" else {"cg_max_iters"})


def test_every_import_is_used():
    """By one schedule or the other: they share one header."""
    imported, used = set(), set()
    for schedule in SCHEDULES:
        nodes = list(ast.walk(ast.parse(module(schedule).text)))
        imported |= {alias.asname or alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
        used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert imported and imported <= used


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_printing_is_deterministic(schedule):
    first = module(schedule)
    source.print_module.cache_clear()
    assert module(schedule) is not first and module(schedule) == first


def test_hash_is_that_of_another_process():
    """Sets of names are iterated in an order that changes with the process: none may reach the text."""
    outputs = set()
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", HASHES]
        outputs.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert outputs == {" ".join(hashes()) + "\n"}


def test_hash_covers_the_printed_text(monkeypatch):
    before = hashes()
    assert len(set(before)) == len(before) and all(re.fullmatch("[0-9a-f]{16}", h) for h in before)
    assert hashes() == before
    real = source.print_module
    changed = lambda *args: source.Module(real(*args).text + "\n", real(*args).kernels)  # noqa: E731
    monkeypatch.setattr(triton_backend, "print_module", changed)
    assert not set(hashes()) & set(before)
    monkeypatch.undo()
    assert hashes() == before


def test_hash_covers_the_hand_written_blocks(monkeypatch, tmp_path):
    before = hashes()
    folder = triton_backend.Path(triton_backend.__file__).parent
    (tmp_path / "primitives.py").write_text((folder / "primitives.py").read_text().replace("65504.0", "65503.0"))
    monkeypatch.setattr(triton_backend, "__file__", str(tmp_path / "__init__.py"))
    changed = hashes()
    monkeypatch.undo()
    assert not set(changed) & set(before) and hashes() == before


def test_hash_ignores_what_is_not_source():
    backend = backends.get("triton")
    other = LLASpec("float16", 128, 64, 1, 8, 2, 77, 99, precision="fast")
    config = KernelConfig("triton", "fused", 128, 32, 7, 8, 1)
    assert backend.source_hash(other, config) == backend.source_hash(SPEC, CONFIGS["fused"])


def squared_softmax() -> SweepList:
    """An operator that no backend has seen: sum_j p_j (k_j.m) v_j with m = sum_j p_j k_j, over two sweeps."""
    has_keys = row("row_sum") > 0
    mean = Sweep(
        name="mean",
        softmax="online",
        scores=(Score("s", "q", "k"),),
        accumulators=(Accumulator("total", P, "k"),),
        epilogue=(
            Assign("mean", rounded(vector("total") * where(has_keys, 1 / row("row_sum"), 0))),
            Assign("lse", where(has_keys, row("row_max") + log2(row("row_sum")), 1e30)),
            Assign("square", dot(vector("mean"), vector("mean"))),
        ),
    )
    answer = Sweep(
        name="answer",
        softmax="saved",
        scores=(Score("s", "q", "k"), Score("a", "mean", "k", center="square")),
        accumulators=(Accumulator("out", P * tile("a"), "v"),),
    )
    return SweepList(
        name="squared_softmax",
        stages=(mean, answer),
        row_inputs=("q",),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs=("out",),
        info=(),
    )


@pytest.fixture
def new_operator(monkeypatch):
    """``lower`` gives the new operator; whatever was remembered of LLA is put aside."""
    caches = [source.print_module]
    if importlib.util.find_spec("triton"):
        from lla_compile.backends.triton import compiler

        caches.append(compiler.load_functions)
    monkeypatch.setattr(source, "lower", lambda op, phase: squared_softmax())
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_new_operator_needs_no_printer_change(new_operator):
    fused, split = module("fused"), module("split")
    assert [kernel.name for kernel in fused.kernels] == ["squared_softmax_fused"]
    assert [kernel.name for kernel in split.kernels] == ["squared_softmax_mean", "squared_softmax_answer"]
    assert [name for name, _ in split.state] == ["lse", "square"] and split.rounded_state == ("mean",)
    assert "ridge" not in fused.text and "while" not in fused.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_operator_compiles(new_operator, schedule):
    from cubin import compile_cubins

    for kernel in compile_cubins(SPEC, CONFIGS[schedule], resolve("h200")):
        assert kernel.count("HGMMA") > 0
