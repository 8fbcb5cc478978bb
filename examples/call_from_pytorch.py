"""Call the operator from PyTorch: what it returns, what the solver did, and what a small ridge asks for."""

import torch

from lla_compile import lla_attention


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 4, 256, 32, device=device, dtype=dtype)

    out = lla_attention(q, k, v, ridge=1.0)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    print(f"output {tuple(out.shape)}, {(out - softmax).norm() / softmax.norm():.0%} away from softmax attention")

    # Where values are an affine function of the keys, a small ridge reproduces that function at the query.
    affine = 2 * k + 1
    for ridge in (1.0, 0.1, 0.01):
        out, info = lla_attention(q, k, affine, ridge, cg_max_iters=128, return_info=True)
        late = slice(128, None)  # queries with more keys than dimensions
        error = ((out - (2 * q + 1)).norm(dim=-1) / (2 * q + 1).norm(dim=-1))[..., late].median()
        iterations = info.iterations.float()
        print(
            f"ridge {ridge:<5g} median error {error:.3f}, CG iterations {iterations.mean():.0f} on average, "
            f"{iterations.max():.0f} at most"
        )


if __name__ == "__main__":
    main()
