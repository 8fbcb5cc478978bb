"""Hand-written Triton building blocks of the operators that solve nothing."""

import triton
import triton.language as tl


@triton.jit
def seeded_product(seed, held, streamed, INPUT_PRECISION: tl.constexpr):
    """held . streamed^T - seed in float32; ``seed`` broadcasts to the tile.

    The sum starts at -seed: nothing is left to subtract, and no register holds the seed meanwhile.
    """
    start = tl.broadcast_to(-seed, [held.shape[0], streamed.shape[0]])
    return tl.dot(held, tl.trans(streamed), start, input_precision=INPUT_PRECISION)
