"""Time and memory against the length: Local Linear Attention, Parallax and softmax attention, forward and backward.

Times are medians of ``--repeats`` runs, forward alone and with backward, in milliseconds. Memory is what is kept for
the backward pass beyond inputs and output, and on a GPU also the peak during both passes, in MiB. Causal, standard
normal inputs: bfloat16 on a GPU, float32 on a CPU, where the eager backend runs. Ridge 1.

Writes memory_latency.json and .png to --out.

    python examples/memory_latency.py            # up to 512 positions on a CPU, one thread, 65536 on a GPU
    python examples/memory_latency.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Sequence

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from lla_compile import lla_attention, parallax_attention

LENGTHS = {"quick": (32, 64), "cpu": (128, 256, 512), "cuda": (1024, 4096, 16384, 65536)}
MIB = 2**20


def lla(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lla_attention(q, k, v, 1.0)


def softmax(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {"LLA": lla, "Parallax": parallax_attention, "softmax (SDPA)": softmax}


def kept_bytes(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass beyond its inputs and its output."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    known = {x.untyped_storage().data_ptr() for x in (*inputs, out)}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def median_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median time after one run that is not timed."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(function: Callable[..., Tensor], length: int, options: argparse.Namespace) -> dict:
    """Times and memory of one function at one length."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    shape = 1, options.heads, length, options.dim
    q, r, k, v = (torch.randn(shape, device=options.device, dtype=dtype, requires_grad=True) for _ in range(4))
    grad_out = torch.randn(shape, device=options.device, dtype=dtype)
    inputs = q, r, k, v
    used = inputs if function is parallax_attention else (q, k, v)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), used, grad_out)

    result = {
        "forward_ms": median_ms(forward, options.repeats, options.device),
        "forward_backward_ms": median_ms(both, options.repeats, options.device),
        "kept_mib": kept_bytes(function, inputs) / MIB,
    }
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
    return result


def save(results: dict[str, dict[int, dict]], options: argparse.Namespace) -> None:
    """Write memory_latency.json and .png."""
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    settings = {"device": name, "heads": options.heads, "dim": options.dim, "repeats": options.repeats}
    document = {"settings": settings | {"torch": torch.__version__}, "results": results}
    (options.out / "memory_latency.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install -e '.[examples]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    memory = "peak_mib" if options.device == "cuda" else "kept_mib"
    titles = {"forward_ms": "forward, ms", "forward_backward_ms": "forward and backward, ms", memory: "memory, MiB"}
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for axes, (quantity, title) in zip(panels, titles.items()):
        for label, by_length in results.items():
            axes.loglog(list(by_length), [max(x[quantity], 1e-3) for x in by_length.values()], "o-", label=label)
        axes.set(title=title, xlabel="length")
    panels[0].legend()
    figure.suptitle(f"{name}, {options.heads} heads of {options.dim}")
    figure.savefig(options.out / "memory_latency.png", dpi=80, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--heads", type=int, help="default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="default: 3 on a CPU, 10 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("memory_latency"), help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    options = parser.parse_args(argv)
    options.lengths = options.lengths or LENGTHS["quick" if options.quick else options.device]
    options.heads = options.heads or (16 if options.device == "cuda" else 4)
    options.repeats = options.repeats or (10 if options.device == "cuda" else 3)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, print."""
    options = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a CPU; several wait for each other where others use the cores
    results: dict[str, dict[int, dict]] = {name: {} for name in FUNCTIONS}
    todo = [(name, length) for length in options.lengths for name in FUNCTIONS]
    for name, length in track(todo, description="measuring"):
        results[name][length] = measure(FUNCTIONS[name], length, options)
    save(results, options)
    print(f"{'':14} {'length':>7} {'forward ms':>11} {'both ms':>9} {'kept MiB':>9}")
    for name, by_length in results.items():
        for length, x in by_length.items():
            times = f"{x['forward_ms']:11.2f} {x['forward_backward_ms']:9.2f}"
            print(f"{name:14} {length:7} {times} {x['kept_mib']:9.2f}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
