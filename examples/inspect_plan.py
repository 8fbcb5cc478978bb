"""What would run on a GPU that is not in this machine, and why."""

from lla_compile import LLASpec, plan


def main() -> None:
    spec = LLASpec(
        dtype="bfloat16",
        head_dim=128,
        head_dim_v=128,
        batch=2,
        num_heads=32,
        num_kv_heads=8,
        seqlen_q=4096,
        seqlen_k=4096,
    )
    for device in ("h200", "a100"):
        print(plan(spec, device=device), end="\n\n")


if __name__ == "__main__":
    main()
