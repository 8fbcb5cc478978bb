"""The printed Triton modules as text: no compiler and no GPU, but for the operator that the printer has never seen."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from lla_compile import backends
from lla_compile.backends import triton as triton_backend
from lla_compile.backends.triton import resources, source
from lla_compile.devices import resolve
from lla_compile.expr import dot, log2, rounded, row, tile, vector, where
from lla_compile.lowering import SAVED
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


# `gram`, decoding's other schedule, is written by hand.
MODULES = [*itertools.product(("forward", "backward"), SCHEDULES), ("decode", "fused")]
EVERY_MODULE = pytest.mark.parametrize("phase, schedule", MODULES)


def module(schedule: str, phase: str = "forward", **options) -> source.Module:
    return source.print_module("lla", phase, schedule, **options)


def functions(printed: source.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(printed.text).body if isinstance(node, ast.FunctionDef)}


def hashes() -> list[str]:
    triton_backend._hash_of_files.cache_clear()
    return [backends.get("triton").source_hash(SPEC, config) for config in CONFIGS.values()]


KERNELS = {
    ("forward", "fused"): ["fused"],
    ("forward", "split"): ["stats", "cg_step", "coarse_cg_step", "output"],
    ("backward", "fused"): ["fused", "grad_kv"],
    ("backward", "split"): ["adjoint_stats", "cg_step", "coarse_cg_step", "grad_q", "grad_kv"],
    ("decode", "fused"): ["fused"],
}


@EVERY_MODULE
def test_kernels_are_the_functions_of_the_module(phase, schedule):
    printed = module(schedule, phase)
    names = [f"lla_{phase}_{name}" for name in KERNELS[phase, schedule]]
    assert [kernel.name for kernel in printed.kernels] == list(functions(printed)) == names
    for kernel in printed.kernels:
        assert (kernel.loop is not None) == ("cg_step" in kernel.name)
        assert kernel.holds == ("keys" if kernel.name.endswith("grad_kv") else "rows")
        arguments = [argument.arg for argument in functions(printed)[kernel.name].args.args]
        assert arguments == [name for name, _ in printed.parameters] + list(printed.constexprs)


@EVERY_MODULE
def test_no_block_pointers(phase, schedule):
    """Triton is removing them."""
    assert "make_block_ptr" not in module(schedule, phase).text


def names_used(function: ast.FunctionDef) -> set[str]:
    return {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}


@EVERY_MODULE
def test_every_parameter_is_used(phase, schedule):
    """In some kernel: those of a module share one list of arguments, so that they launch alike."""
    printed = module(schedule, phase)
    used = set().union(*map(names_used, functions(printed).values()))
    unused = {name for name, _ in printed.parameters} - used
    only_for_keys = {"key_tiles_ptr", "key_heads_per_group"}
    assert unused == (only_for_keys if phase == "forward" else set())


@pytest.mark.parametrize("phases", [("forward", "backward"), ("decode",)], ids=str)
def test_every_import_is_used(phases):
    """By one module or another: those of prefill share one header."""
    imported, used = set(), set()
    for phase, schedule in (x for x in MODULES if x[0] in phases):
        nodes = list(ast.walk(ast.parse(module(schedule, phase).text)))
        imported |= {alias.asname or alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
        used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert imported and imported <= used


def test_only_what_is_asked_for_is_printed():
    printed = module("fused", "backward", wanted=("dv",))
    assert [kernel.name for kernel in printed.kernels] == ["lla_backward_grad_kv"]
    assert "unit_adjoint" not in printed.text and "dk_ptr" not in printed.text
    assert "iterations_ptr" not in module("fused", wanted=("out",)).text
    assert "lse_ptr" in module("fused", wanted=("out", *SAVED)).text


def test_wide_heads_have_a_kernel_for_each_sum():
    printed = module("fused", "backward", one_sum_a_sweep=True)
    names = [kernel.name.removeprefix("lla_backward_") for kernel in printed.kernels]
    assert names == ["fused", "grad_kv_dv", "grad_kv_dk"]
    for kernel in printed.kernels[1:]:
        result = kernel.name[-2:]
        assert f"store_tile({result}_ptr" in ast.unparse(functions(printed)[kernel.name])


@EVERY_MODULE
def test_no_name_of_a_sweep_hides_one_of_the_kernel(phase, schedule):
    """Names of the sweeps are printed as they are, beside those of the opening."""
    printed = module(schedule, phase)
    opening = {"batch", "head", "tile", "rank", "bh", "start", "stop", "first", "last", "segment", "first_row", "mask"}
    assert not opening & {*printed.program.kinds, *(s.name for sweep in printed.program.sweeps for s in sweep.scores)}


@EVERY_MODULE
def test_printing_is_deterministic(phase, schedule):
    first = module(schedule, phase)
    source.print_module.cache_clear()
    again = module(schedule, phase)
    assert again is not first and again.text == first.text and again.parameters == first.parameters


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
    changed = lambda *args: replace(real(*args), text=real(*args).text + "\n")  # noqa: E731
    monkeypatch.setattr(triton_backend, "print_module", changed)
    assert not set(hashes()) & set(before)
    monkeypatch.undo()
    assert hashes() == before


def test_hash_covers_the_hand_written_blocks(monkeypatch, tmp_path):
    before = hashes()
    folder = triton_backend.Path(triton_backend.__file__).parent
    for name in ("primitives.py", "packing.py"):
        (tmp_path / name).write_text((folder / name).read_text().replace("65504.0", "65503.0"))
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
        outputs={"out": "input"},
        ordinary=("out",),
        value_wide=frozenset({"v", "out"}),
    )


@pytest.fixture
def new_operator(monkeypatch):
    """``lower`` gives the new operator; whatever was remembered of LLA is put aside."""
    operator = squared_softmax()
    caches = [source.print_module]
    if importlib.util.find_spec("triton"):
        from lla_compile.backends.triton import compiler, launcher

        caches.append(compiler.load_functions)
        monkeypatch.setattr(launcher, "lower", lambda op, phase: operator)
    for user in (source, resources):
        monkeypatch.setattr(user, "lower", lambda op, phase: operator)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_new_operator_needs_no_printer_change(new_operator):
    fused, split = module("fused"), module("split")
    assert [kernel.name for kernel in fused.kernels] == ["squared_softmax_fused"]
    assert [kernel.name for kernel in split.kernels] == ["squared_softmax_mean", "squared_softmax_answer"]
    assert set(split.state) == {"lse", "square", "mean"} and split.program.rounded == {"mean"}
    assert "ridge" not in fused.text and "while" not in fused.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_operator_compiles(new_operator, schedule):
    from compiled import compile_cubins

    for kernel in compile_cubins(SPEC, CONFIGS[schedule], resolve("h200")):
        assert kernel.count("HGMMA") > 0
