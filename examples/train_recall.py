"""Train a two-layer transformer on multi-query associative recall, with Local Linear Attention beside softmax.

A sequence lists key-value pairs, then asks for the value of every key, at random places:

    k3 v7 k1 v2 k9 v4 _ k9 _ _ k3 k1 _      the model answers v4 at k9, v7 at k3 and v2 at k1

Both models are the same but for the attention function and its ridge, which LLA learns: one for each head and query,
the sigmoid of a linear map of the query's token. Both see the same batches. Every batch is new, so that the training
accuracy is the accuracy on unseen data. Writes recall.json and recall.png to --out; Ctrl-C saves what there is.

    python examples/train_recall.py                        # a toy, minutes on a CPU
    python examples/train_recall.py --device cuda          # up to 64 pairs, a wider model
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Callable, Sequence

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from lla_compile import lla_attention

ATTENTIONS = ("lla", "softmax")
UNASKED = -100  # target of a position that is no query
# (CPU, GPU) defaults.
SIZES = {"steps": (400, 3000), "pairs": (16, 64), "dim": (32, 64), "heads": (2, 2), "seqlen": (64, 256)}
QUICK = {"steps": 40, "pairs": 4, "dim": 16, "heads": 1, "seqlen": 16}
VOCAB_OVER_PAIRS = 4  # different keys, and as many values, for each pair of a sequence


class Attention(nn.Module):
    """Causal attention over x (B, N, dim), behind a short causal convolution that lets a value see its key."""

    def __init__(self, dim: int, heads: int, kind: str):
        super().__init__()
        self.heads, self.kind = heads, kind
        self.conv = nn.Conv1d(dim, dim, kernel_size=3, groups=dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        if kind == "lla":
            with torch.random.fork_rng():  # the other weights start alike in both models
                self.ridge = nn.Linear(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(F.pad(x.mT, (2, 0))).mT
        q, k, v = self.qkv(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "lla":
            ridge = self.ridge(x).float().sigmoid().mT  # (B, heads, N)
            self.mean_ridge = ridge.detach().mean()
            o = lla_attention(q, k, v, ridge)
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, dim: int, heads: int, kind: str):
        super().__init__()
        self.attention = nn.Sequential(nn.RMSNorm(dim), Attention(dim, heads, kind))
        self.mlp = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Recall(nn.Module):
    """Tokens (B, N), 0 to 2 vocab, to logits of the values (B, N, vocab)."""

    def __init__(self, options: argparse.Namespace, kind: str):
        super().__init__()
        dim = options.dim
        self.tokens = nn.Embedding(1 + 2 * options.vocab, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(options.seqlen, dim))
        self.blocks = nn.Sequential(*(Block(dim, options.heads, kind) for _ in range(2)))
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, options.vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions))


def make_batch(pairs: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, N): ``pairs`` different keys with values, then each key once in the rest.

    Token 0 fills the gaps, 1 to vocab are the keys, the others the values; targets count the values from 0.
    """
    batch, seqlen, vocab, generator = options.batch, options.seqlen, options.vocab, options.generator
    keys = 1 + torch.rand(batch, vocab, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(vocab, (batch, pairs), generator=generator)
    tokens, targets = torch.zeros(batch, seqlen, dtype=torch.long), torch.full((batch, seqlen), UNASKED)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, 1 + vocab + values
    places = 2 * pairs + torch.rand(batch, seqlen - 2 * pairs, generator=generator).argsort(-1)[:, :pairs]
    return tokens.scatter(1, places, keys), targets.scatter(1, places, values)


def difficulties(pairs: int) -> list[int]:
    """Numbers of pairs to train and test on: ``pairs`` and its halves, rounded down, to two or three."""
    return [pairs >> shift for shift in reversed(range(pairs.bit_length() - 1))]


def evaluate(model: nn.Module, pairs: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, right answers and questions of one new batch."""
    device = torch.device(options.device)
    tokens, targets = (x.to(device) for x in make_batch(pairs, options))
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNASKED)
    return loss, (logits.argmax(-1) == targets).sum(), (targets != UNASKED).sum()


def train(
    kind: str,
    options: argparse.Namespace,
    advance: Callable[[str], None],
    make_model: Callable[[argparse.Namespace, str], nn.Module] = Recall,
) -> dict:
    """Train one model.

    Args:
        kind: its attention.
        options: of the command line.
        advance: called after every step with what the progress bar says.
        make_model: makes it of ``options`` and ``kind``.

    Returns:
        What was recorded: ``step``, ``loss`` and ``accuracy`` over the steps since the last record, ``seconds``,
        ``accuracy_by_pairs`` and, for LLA, ``ridges``, the mean of each layer. An interrupt ends it early, with
        ``interrupted`` set.
    """
    options.generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model = make_model(options, kind).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    warm_up = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / options.steps))
    )
    levels = difficulties(options.pairs)
    every = len(levels) * max(1, options.steps // (40 * len(levels)))  # each record has all levels alike
    curve: dict = {"step": [], "loss": [], "accuracy": [], "interrupted": False}
    losses, right, asked = [], 0, 0
    start = time.perf_counter()
    try:
        for step in range(1, options.steps + 1):
            loss, hits, questions = evaluate(model, levels[step % len(levels)], options)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            right, asked = right + hits, asked + questions
            if step % every == 0:
                curve["step"].append(step)
                curve["loss"].append(torch.stack(losses).mean().item())
                curve["accuracy"].append((right / asked).item())
                losses, right, asked = [], 0, 0
            said = f"accuracy {curve['accuracy'][-1]:.0%}" if curve["accuracy"] else ""
            advance(said)
        curve["seconds"] = time.perf_counter() - start
        curve["accuracy_by_pairs"] = {pairs: test(model, pairs, options) for pairs in levels}
        if kind == "lla":
            curve["ridges"] = [block.attention[1].mean_ridge.item() for block in model.blocks]
    except KeyboardInterrupt:
        curve["interrupted"] = True
    return curve


@torch.no_grad()
def test(model: nn.Module, pairs: int, options: argparse.Namespace, batches: int = 8) -> float:
    """Share of right answers to new questions among ``pairs`` pairs."""
    _, right, asked = zip(*(evaluate(model, pairs, options) for _ in range(batches)))
    return (sum(right) / sum(asked)).item()


def save(curves: dict[str, dict], options: argparse.Namespace) -> None:
    """Write recall.json, and recall.png of the accuracy over the steps."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in (*SIZES, "batch", "vocab", "lr", "seed", "device")}
    document = {"settings": settings | {"torch": torch.__version__}, "curves": curves}
    (options.out / "recall.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install -e '.[examples]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind, curve in curves.items():
        axes.plot(curve["step"], curve["accuracy"], label={"lla": "LLA"}.get(kind, kind))
    axes.axhline(1 / options.vocab, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title=f"Recall of up to {options.pairs} pairs")
    axes.legend()
    figure.savefig(options.out / "recall.png", dpi=150)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, (cpu, gpu) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {cpu} on a CPU, {gpu} on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("recall"), help="directory of the results (default: recall)")
    parser.add_argument("--attention", choices=("both", *ATTENTIONS), default="both")
    parser.add_argument("--quick", action="store_true", help="seconds: too short to learn the task")
    options = parser.parse_args(argv)
    for name, sizes in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, QUICK[name] if options.quick else sizes[options.device.startswith("cuda")])
    if options.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {options.pairs}")
    options.vocab = VOCAB_OVER_PAIRS * options.pairs
    if options.seqlen < 3 * options.pairs:
        parser.error(f"--seqlen must be at least 3 times --pairs ({options.pairs}), got {options.seqlen}")
    if options.dim % options.heads:
        parser.error(f"--dim must be a multiple of --heads ({options.heads}), got {options.dim}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, print; returns 130 after an interrupt, else 0."""
    options = parse(argv)
    torch.set_num_threads(1)  # tensors of this size are slower on several, much slower where others use the cores
    curves: dict[str, dict] = {}
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}")) as progress:
        for kind in ATTENTIONS if options.attention == "both" else (options.attention,):
            task = progress.add_task(kind, total=options.steps, said="")
            curves[kind] = train(kind, options, lambda said: progress.update(task, advance=1, said=said))
            if curves[kind]["interrupted"]:
                break
    save(curves, options)
    for kind, curve in curves.items():
        shown = [f"{pairs} pairs {accuracy:.1%}" for pairs, accuracy in curve.get("accuracy_by_pairs", {}).items()]
        print(f"{kind:8} {', '.join(shown) or 'interrupted'}" + (f" ({curve['seconds']:.0f} s)" if shown else ""))
        if "ridges" in curve:
            print(f"{'':8} learned ridges, by layer: {', '.join(f'{ridge:.2g}' for ridge in curve['ridges'])}")
    print(f"chance {1 / options.vocab:.1%}; {options.out}")
    return 130 if any(curve["interrupted"] for curve in curves.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
