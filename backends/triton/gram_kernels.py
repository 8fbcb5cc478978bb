"""The `gram` schedule of decoding in hand-written kernels: one pass over the keys, a merge of its parts, the solve.

A *part* is what one query sees of one of ``num_splits`` stretches of keys. It leaves, relative to
``exp2(reference)``, with x_j = round(w_j (k_j - shift)) and one shift for all parts of a query:

    reference, omega = sum_j w_j, and room up to VECTORS_AT numbers
    shift (BLOCK_D), sum_j x_j (BLOCK_D), sum_j w_j v_j (BLOCK_DV)
    sum_j x_j k_j^T (BLOCK_D, BLOCK_D), sum_j x_j v_j^T (BLOCK_D, BLOCK_DV)

one after another in float32, PART numbers in all.

The rounded x_j stand on the left of both sums, and the solve takes the transposed covariance: see
:mod:`lla_compile.gram` for why no rounding error then grows with the probe. A part without keys has omega 0 and
leaves nothing else. Parts of one reference merge by adding up what they left.
"""

import triton
import triton.language as tl

from lla_compile.backends.triton.cache_primitives import cached_length, cached_rows, load_cached
from lla_compile.backends.triton.primitives import low_term, rounded

# Columns of the narrow products that only sum over keys: the least that a matrix instruction takes.
NARROW = tl.constexpr(16)
# Where a part's vectors start: what follows its two numbers stays aligned.
VECTORS_AT = tl.constexpr(16)


@triton.jit
def two_columns(first, second, DTYPE: tl.constexpr):
    """A narrow operand of two columns and zeros."""
    column = tl.arange(0, NARROW)[None, :]
    rest = tl.where(column == 1, second.to(tl.float32)[:, None], 0.0)
    return tl.where(column == 0, first.to(tl.float32)[:, None], rest).to(DTYPE)


@triton.jit
def sum_part(
    part_start, part_stop, first_seen, query, shift, reference, k_base, v_base, table_ptr, first_row,
    k_stride_page, k_stride_n, v_stride_page, v_stride_n,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """The sums of one part over the keys [part_start, part_stop), rows first_row to first_row + BLOCK_R of them.

    Weights are relative to ``reference``, which stays: a maximum over the warps for every tile would hold all of them
    up. The largest score is returned, and the caller looks whether the reference was near enough.
    """
    DTYPE: tl.constexpr = k_base.dtype.element_ty
    RAGGED_K: tl.constexpr = HEAD_DIM != BLOCK_D
    RAGGED_V: tl.constexpr = HEAD_DIM_V != BLOCK_DV
    offs = tl.arange(0, BLOCK_K)
    scores = tl.full([BLOCK_K], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    keys = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    values = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_R, NARROW], tl.float32)
    value_sum = tl.zeros([BLOCK_DV, NARROW], tl.float32)
    ones = two_columns(tl.full([BLOCK_K], 1.0, tl.float32), tl.zeros([BLOCK_K], tl.float32), DTYPE)
    for start in tl.range(part_start, part_stop, BLOCK_K, num_stages=NUM_STAGES):
        n = start + offs
        seen = (n < part_stop) & (n >= first_seen)
        k_rows = cached_rows(table_ptr, n, part_stop, k_stride_page, k_stride_n, PAGE_SIZE)
        v_rows = cached_rows(table_ptr, n, part_stop, v_stride_page, v_stride_n, PAGE_SIZE)
        k = load_cached(k_base, k_rows, 0, seen, HEAD_DIM, BLOCK_D, RAGGED_K)
        v = load_cached(v_base, v_rows, 0, seen, HEAD_DIM_V, BLOCK_DV, RAGGED_V)
        held = k
        if BLOCK_R != BLOCK_D:
            held = load_cached(k_base, k_rows, first_row, seen, HEAD_DIM, BLOCK_R, RAGGED_K)
        score = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], axis=1), float("-inf"))
        scores = tl.maximum(scores, score)
        weight = tl.exp2(score - reference)
        weights += weight
        weight_high = rounded(weight, DTYPE)
        # Both terms of the weights stand in one narrow operand: the mean value is exact at no further cost.
        weight_terms = two_columns(weight_high, low_term(weight, weight_high, 2), DTYPE)
        weighted = (held.to(tl.float32) - shift[None, :]) * weight[:, None]
        high = rounded(weighted, DTYPE)
        keys = tl.dot(tl.trans(high), k, keys)
        values = tl.dot(tl.trans(high), v, values)
        row_sum = tl.dot(tl.trans(high), ones, row_sum)
        if TERMS == 2:
            low = low_term(weighted, high, TERMS)
            keys = tl.dot(tl.trans(low), k, keys)
            values = tl.dot(tl.trans(low), v, values)
            row_sum = tl.dot(tl.trans(low), ones, row_sum)
        value_sum = tl.dot(tl.trans(v), weight_terms, value_sum)
    return (
        tl.max(scores, axis=0),
        tl.sum(weights, axis=0),
        tl.sum(row_sum, axis=1),
        tl.sum(value_sum, axis=1),
        keys,
        values,
    )


@triton.jit
def gram_pass(
    q_ptr, k_ptr, v_ptr, seqlens_ptr, block_table_ptr, scale_ptr, state_ptr,
    scale, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    table_stride, num_kv_heads, group_size, seqlen_q, capacity, window, num_splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TERMS: tl.constexpr, TWO_TERMS_UP_TO: tl.constexpr, HEADROOM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part, BLOCK_R rows of it; the queries of a group run side by side and share the keys in the L2 cache."""
    BLOCKS: tl.constexpr = BLOCK_D // BLOCK_R
    pid = tl.program_id(0)
    block = pid % BLOCKS
    rest = pid // BLOCKS
    member = rest % (group_size * seqlen_q) // seqlen_q
    i = rest % seqlen_q
    rest = rest // (group_size * seqlen_q)
    split = rest % num_splits
    bh = rest // num_splits
    batch = (bh // num_kv_heads).to(tl.int64)
    kv_head = (bh % num_kv_heads).to(tl.int64)
    head = kv_head * group_size + member

    length = cached_length(seqlens_ptr, batch, capacity)
    stop = tl.maximum(length - (seqlen_q - 1 - i), 0)
    start = 0
    if window > 0:
        start = tl.maximum(stop - window, 0)
    first_tile = start // BLOCK_K
    part_tiles = tl.cdiv(tl.cdiv(stop, BLOCK_K) - first_tile, num_splits)
    part_start = (first_tile + split * part_tiles) * BLOCK_K
    part_stop = tl.minimum(part_start + part_tiles * BLOCK_K, stop)
    part = ((batch * num_kv_heads * group_size + head) * seqlen_q + i) * num_splits + split
    state = state_ptr + part * PART
    if part_start >= part_stop:
        if block == 0:
            tl.store(state, float("-inf"))
            tl.store(state + 1, 0.0)
        return

    scale_value = scale
    if scale_ptr is not None:
        scale_value = tl.load(scale_ptr)
    columns = tl.arange(0, BLOCK_D)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + i.to(tl.int64) * q_stride_n
    query = tl.load(q_base + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    query *= scale_value * 1.4426950408889634
    page_batch = batch
    table = block_table_ptr
    if PAGE_SIZE != 0:
        page_batch = batch * 0
        table = block_table_ptr + batch * table_stride
    k_base = k_ptr + page_batch * k_stride_b + kv_head * k_stride_h
    v_base = v_ptr + page_batch * v_stride_b + kv_head * v_stride_h
    first_row = block * BLOCK_R
    RAGGED: tl.constexpr = HEAD_DIM != BLOCK_D
    n = first_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    seen = (n < stop) & (n >= start)
    slots = cached_rows(table, n, stop, k_stride_b, k_stride_n, PAGE_SIZE)
    k = load_cached(k_base, slots, 0, seen, HEAD_DIM, BLOCK_D, RAGGED).to(tl.float32)
    score = tl.where(seen, tl.sum(k * query[None, :], axis=1), float("-inf"))
    # The query's first tile gives the reference, its largest score, and the mean that is taken off all keys before they
    # are weighted, so that an offset that keys share is not rounded.
    reference = tl.max(score, axis=0)
    held = load_cached(k_base, slots, first_row, seen, HEAD_DIM, BLOCK_R, RAGGED).to(tl.float32)
    shift = tl.sum(held, axis=0) / tl.sum(seen.to(tl.float32), axis=0)
    again = True
    while again:
        if TERMS == 2 and stop - start <= TWO_TERMS_UP_TO:
            largest, omega, row_sum, value_sum, keys, values = sum_part(
                part_start, part_stop, start, query, shift, reference, k_base, v_base, table, first_row,
                k_stride_b, k_stride_n, v_stride_b, v_stride_n, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_R,
                BLOCK_K, NUM_STAGES, PAGE_SIZE, 2,
            )  # fmt: skip
        else:
            largest, omega, row_sum, value_sum, keys, values = sum_part(
                part_start, part_stop, start, query, shift, reference, k_base, v_base, table, first_row,
                k_stride_b, k_stride_n, v_stride_b, v_stride_n, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_R,
                BLOCK_K, NUM_STAGES, PAGE_SIZE, 1,
            )  # fmt: skip
        again = largest > reference + HEADROOM
        rows = first_row + tl.arange(0, BLOCK_R)
        value_columns = tl.arange(0, BLOCK_DV)
        vectors = state + VECTORS_AT
        if block == 0:
            tl.store(state, reference)
            tl.store(state + 1, omega)
            tl.store(vectors + 2 * BLOCK_D + value_columns, value_sum)
        tl.store(vectors + rows, shift)
        tl.store(vectors + BLOCK_D + rows, row_sum)
        matrix = vectors + 2 * BLOCK_D + BLOCK_DV
        tl.store(matrix + rows[:, None] * BLOCK_D + columns[None, :], keys)
        tl.store(matrix + BLOCK_D * BLOCK_D + rows[:, None] * BLOCK_DV + value_columns[None, :], values)
        reference = tl.maximum(reference, largest)


@triton.jit
def gram_merge(
    state_ptr, merged_ptr, num_splits,
    SHIFT_STOP: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one query as a single part; BLOCK numbers of it."""
    query = tl.program_id(0).to(tl.int64)
    state = state_ptr + query * num_splits * PART
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < PART
    is_shift = (element >= VECTORS_AT) & (element < SHIFT_STOP)
    largest = float("-inf")
    for split in tl.static_range(BLOCK_SPLITS):
        largest = tl.maximum(largest, tl.load(state + split * PART, mask=split < num_splits, other=float("-inf")))
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(BLOCK_SPLITS):
        part = state + split * PART
        exists = split < num_splits
        omega = tl.load(part + 1, mask=exists, other=0.0)
        weight = tl.exp2(tl.load(part, mask=exists, other=float("-inf")) - reference)
        # Not masked by omega: a load that waits for another would take as long again. (Triton 3.9's interpreter refuses
        # masks that are `&` of a block and a scalar.)
        read = tl.where(exists, inside, False)
        left = tl.where(omega > 0, tl.load(part + element, mask=read, other=0.0), 0.0)
        total += tl.where(is_shift, 1.0 if split == 0 else 0.0, weight) * left
    tl.store(merged_ptr + query * PART + element, tl.where(element == 0, reference, total), mask=inside)


@triton.jit
def gram_solve(
    q_ptr, out_ptr, iterations_ptr, final_residual_ptr, ridge_ptr, merged_ptr,
    ridge, cg_tol, q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    ridge_stride_b, ridge_stride_h, ridge_stride_n, num_heads, seqlen_q, cg_max_iters,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """(C^T + ridge I) u = kbar - q by conjugate gradients, and o = vbar - G^T u, for one query.

    C is symmetric but for rounding, so that the recurrence is off by a little: when it ends, the residual is computed
    anew, and it goes on from there while that is not small enough.
    """
    query = tl.program_id(0)
    batch = (query // (num_heads * seqlen_q)).to(tl.int64)
    head = (query // seqlen_q % num_heads).to(tl.int64)
    i = (query % seqlen_q).to(tl.int64)
    state = merged_ptr + query.to(tl.int64) * PART
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + i * q_stride_n
    q = tl.load(q_base + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    ridge_value = ridge
    if ridge_ptr is not None:
        ridge_value = tl.load(ridge_ptr + batch * ridge_stride_b + head * ridge_stride_h + i * ridge_stride_n)

    vectors = state + VECTORS_AT
    matrix = vectors + 2 * BLOCK_D + BLOCK_DV
    rows = columns[:, None]
    omega = tl.load(state + 1)
    shift = tl.load(vectors + columns)
    row_sum = tl.load(vectors + BLOCK_D + columns)
    value_sum = tl.load(vectors + 2 * BLOCK_D + value_columns)
    covariance = tl.load(matrix + rows * BLOCK_D + columns[None, :])
    covariance_v = tl.load(matrix + BLOCK_D * BLOCK_D + rows * BLOCK_DV + value_columns[None, :])
    there = omega > 0
    inverse = 1.0 / tl.where(there, omega, 1.0)
    row_mean = tl.where(there, row_sum * inverse, 0.0)
    kbar = tl.where(there, shift + row_mean, 0.0)
    vbar = tl.where(there, value_sum * inverse, 0.0)
    covariance = tl.where(there, covariance * inverse - row_mean[:, None] * kbar[None, :], 0.0)
    covariance_v = tl.where(there, covariance_v * inverse - row_mean[:, None] * vbar[None, :], 0.0)

    right = tl.where(there, kbar - q, 0.0)
    right_norm2 = tl.sum(right * right, axis=0)
    enough = cg_tol * cg_tol * right_norm2
    solution = right * 0.0
    residual = right
    rho = right_norm2
    iterations = 0
    rounds = 0
    unsolved = rho > enough
    while unsolved:
        direction = residual
        going = unsolved
        while going:
            image = tl.sum(covariance * direction[:, None], axis=0) + ridge_value * direction
            curvature = tl.sum(direction * image, axis=0)
            sound = curvature > 0
            step = tl.where(sound, rho / tl.where(sound, curvature, 1.0), 0.0)
            solution += step * direction
            residual -= step * image
            previous = rho
            rho = tl.sum(residual * residual, axis=0)
            direction = residual + (rho / previous) * direction
            iterations += 1
            going = sound & (rho > enough) & (iterations < cg_max_iters)
        residual = right - tl.sum(covariance * solution[:, None], axis=0) - ridge_value * solution
        rho = tl.sum(residual * residual, axis=0)
        rounds += 1
        unsolved = (rho > enough) & (iterations < cg_max_iters) & (rounds < 3)

    out = vbar - tl.sum(covariance_v * solution[:, None], axis=0)
    out_base = out_ptr + batch * out_stride_b + head * out_stride_h + i * out_stride_n
    tl.store(out_base + value_columns, rounded(out, out_ptr.dtype.element_ty), mask=value_columns < HEAD_DIM_V)
    if iterations_ptr is not None:
        tl.store(iterations_ptr + query, iterations)
        relative = tl.sqrt(rho / tl.where(right_norm2 > 0, right_norm2, 1.0))
        tl.store(final_residual_ptr + query, relative)
