"""Prefill with lla_attention, then decode token by token with lla_decode, over a dense and over a paged cache.

The three prompts have different lengths. Each decoded token is compared with its row of lla_attention over the whole
sequence.

    python examples/decode.py
"""

import torch
from rich.progress import track

from lla_compile import KVCache, lla_attention, lla_decode, lla_decode_workspace

PROMPTS, STEPS = (40, 96, 7), 32
HEADS, KV_HEADS, HEAD_DIM, RIDGE = 8, 2, 64, 0.5
PAGE_SIZE = 16
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of a row: both sides are rounded to the type


def largest_difference(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest norm of a difference of two rows, over the norm of the row."""
    return ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, longest = len(PROMPTS), max(PROMPTS)
    total = longest + STEPS
    q = torch.randn(batch, HEADS, total, HEAD_DIM, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, KV_HEADS, total, HEAD_DIM, device=device, dtype=dtype)

    # Prefill: padded at the end, which no earlier row sees.
    prompts = torch.tensor(PROMPTS)
    outputs = lla_attention(q[:, :, :longest], k[:, :, :longest], v[:, :, :longest], RIDGE)
    expected = lla_attention(q, k, v, RIDGE)
    print(f"prefill: prompts of {', '.join(map(str, PROMPTS))} tokens, output {tuple(outputs.shape)}")

    for name, page_size in (("dense", None), ("paged", PAGE_SIZE)):
        cache = KVCache(batch, KV_HEADS, total, HEAD_DIM, page_size=page_size, dtype=dtype, device=device)
        cache.append(k[:, :, :longest], v[:, :, :longest], lengths=prompts)
        rows, positions = torch.arange(batch), prompts.clone()
        out = torch.empty(batch, HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
        workspace = lla_decode_workspace(out, cache.k, cache.v, block_table=cache.block_table)
        worst = 0.0
        for _ in track(range(STEPS), description=f"{name} cache"):
            token_q, token_k, token_v = (x[rows, :, positions].unsqueeze(2) for x in (q, k, v))
            cache.append(token_k, token_v)
            lla_decode(
                token_q,
                cache.k,
                cache.v,
                RIDGE,
                seqlens=cache.seqlens,
                block_table=cache.block_table,
                out=out,
                workspace=workspace,
            )
            worst = max(worst, largest_difference(out.squeeze(2).float(), expected[rows, :, positions].float()))
            positions += 1
        if not worst <= LIMITS[dtype]:
            raise SystemExit(f"{name} cache: a row differs by {worst:.1e} from lla_attention's")
        print(f"{name} cache: {STEPS} steps, largest relative difference from lla_attention {worst:.1e}")


if __name__ == "__main__":
    main()
