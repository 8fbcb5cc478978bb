"""The `gram` schedule of decoding in hand-written kernels: one pass over the keys, a merge of its parts, the solve.

A *part* is what one query sees of one of ``num_splits`` stretches of keys. It leaves, relative to
``exp2(reference)``, with x_j = round(w_j (k_j - shift)):

    reference, omega = sum_j w_j, and room up to VECTORS_AT numbers
    shift (BLOCK_D), sum_j x_j (BLOCK_D), sum_j w_j v_j (BLOCK_DV)
    sum_j x_j k_j^T (BLOCK_D, BLOCK_D), sum_j x_j v_j^T (BLOCK_D, BLOCK_DV)

one after another in float32, PART numbers in all.

The rounded x_j stand on the left of both sums, and the solve takes the transposed covariance: see
:mod:`lla_compile.gram` for why no rounding error then grows with the probe. A part without keys has omega 0 and
leaves nothing else.
"""

import triton
import triton.language as tl

from lla_compile.backends.triton.primitives import low_term, rounded

# Columns of the narrow products that only sum over keys: the least that a matrix instruction takes.
NARROW = tl.constexpr(16)
# Where a part's vectors start: what follows its two numbers stays aligned.
VECTORS_AT = tl.constexpr(16)


@triton.jit
def cached_rows(table_ptr, n, stop, stride_page, stride_n, PAGE_SIZE: tl.constexpr):
    """Offsets of the cache slots ``n``, through the table of pages if there is one."""
    if PAGE_SIZE == 0:
        return n.to(tl.int64) * stride_n
    else:
        page = tl.load(table_ptr + n // PAGE_SIZE, mask=n < stop, other=0).to(tl.int64)
        return page * stride_page + (n % PAGE_SIZE).to(tl.int64) * stride_n


@triton.jit
def load_cached(base, rows, first_column, seen, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """Columns of cache slots, zero where a slot is not seen or a column is beyond WIDTH."""
    columns = first_column + tl.arange(0, BLOCK_WIDTH)
    mask = seen[:, None]
    if RAGGED:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def two_columns(first, second, DTYPE: tl.constexpr):
    """A narrow operand of two columns and zeros."""
    column = tl.arange(0, NARROW)[None, :]
    rest = tl.where(column == 1, second.to(tl.float32)[:, None], 0.0)
    return tl.where(column == 0, first.to(tl.float32)[:, None], rest).to(DTYPE)


@triton.jit
def sum_part(
    part_start, part_stop, first_seen, query, k_base, v_base, table_ptr, first_row,
    k_stride_page, k_stride_n, v_stride_page, v_stride_n,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TERMS: tl.constexpr, HEADROOM: tl.constexpr, WEIGHT_SHIFT: tl.constexpr,
):  # fmt: skip
    """The sums of one part over the keys [part_start, part_stop), rows first_row to first_row + BLOCK_R of them.

    Weights are relative to the largest score so far, or to one that is at most HEADROOM smaller: then what has been
    summed up stays as it is.
    """
    DTYPE: tl.constexpr = k_base.dtype.element_ty
    RAGGED_K: tl.constexpr = HEAD_DIM != BLOCK_D
    RAGGED_V: tl.constexpr = HEAD_DIM_V != BLOCK_DV
    offs = tl.arange(0, BLOCK_K)
    n = part_start + offs
    seen = (n < part_stop) & (n >= first_seen)
    rows = cached_rows(table_ptr, n, part_stop, k_stride_page, k_stride_n, PAGE_SIZE)
    near = load_cached(k_base, rows, first_row, seen, HEAD_DIM, BLOCK_R, RAGGED_K).to(tl.float32)
    shift = tl.sum(near, axis=0) / tl.maximum(tl.sum(seen.to(tl.float32), axis=0), 1.0)

    reference = float("-inf")
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
        largest = tl.max(score, axis=0)
        if largest > reference + HEADROOM:
            factor = tl.exp2(reference - largest)
            weights *= factor
            keys *= factor
            values *= factor
            row_sum *= factor
            value_sum *= factor
            reference = largest
        weight = tl.exp2(score - (reference - WEIGHT_SHIFT))
        weights += weight
        weight_high = rounded(weight, DTYPE)
        # Both terms of the weights stand in one narrow operand: the means are exact at no further cost.
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
        reference - WEIGHT_SHIFT,
        tl.sum(weights, axis=0),
        shift,
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
    TERMS: tl.constexpr, TWO_TERMS_UP_TO: tl.constexpr, HEADROOM: tl.constexpr, WEIGHT_SHIFT: tl.constexpr,
    PART: tl.constexpr,
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

    length = capacity
    if seqlens_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + batch), 0), capacity)
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
    if TERMS == 2 and stop - start <= TWO_TERMS_UP_TO:
        reference, omega, shift, row_sum, value_sum, keys, values = sum_part(
            part_start, part_stop, start, query, k_base, v_base, table, first_row,
            k_stride_b, k_stride_n, v_stride_b, v_stride_n, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_K,
            NUM_STAGES, PAGE_SIZE, 2, HEADROOM, WEIGHT_SHIFT,
        )  # fmt: skip
    else:
        reference, omega, shift, row_sum, value_sum, keys, values = sum_part(
            part_start, part_stop, start, query, k_base, v_base, table, first_row,
            k_stride_b, k_stride_n, v_stride_b, v_stride_n, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_K,
            NUM_STAGES, PAGE_SIZE, 1, HEADROOM, WEIGHT_SHIFT,
        )  # fmt: skip
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


@triton.jit
def part_weights(state, num_splits, PART: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """(reference of all parts of a query, each part's weight relative to it, each part's omega)."""
    splits = tl.arange(0, BLOCK_SPLITS)
    there = splits < num_splits
    references = tl.load(state + splits * PART, mask=there, other=float("-inf"))
    omegas = tl.load(state + splits * PART + 1, mask=there, other=0.0)
    largest = tl.max(references, axis=0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    return reference, tl.exp2(references - reference), omegas


@triton.jit
def mean_keys(
    state, weights, omegas, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Columns first to first + BLOCK of a query's mean key, of all its parts."""
    splits = tl.arange(0, BLOCK_SPLITS)
    there = (omegas > 0)[:, None]
    base = state + VECTORS_AT + (splits * PART)[:, None] + first + tl.arange(0, BLOCK)[None, :]
    shifts = tl.load(base, mask=there, other=0.0)
    sums = tl.load(base + BLOCK_D, mask=there, other=0.0)
    total = tl.maximum(tl.sum(weights * omegas, axis=0), 1e-37)
    return tl.sum(weights[:, None] * (shifts * omegas[:, None] + sums), axis=0) / total


@triton.jit
def mean_values(
    state, weights, omegas, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PART: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """A query's mean value, of all its parts."""
    splits = tl.arange(0, BLOCK_SPLITS)
    base = state + VECTORS_AT + (splits * PART)[:, None] + 2 * BLOCK_D
    sums = tl.load(base + tl.arange(0, BLOCK_DV)[None, :], mask=(omegas > 0)[:, None], other=0.0)
    return tl.sum(weights[:, None] * sums, axis=0) / tl.maximum(tl.sum(weights * omegas, axis=0), 1e-37)


@triton.jit
def merged_rows(
    state, num_splits, reference, row_mean, column_mean, first_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PART: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Rows of omega times a covariance of all parts: that of the keys, or that of keys and values.

    sum_s w_s [S_s - (sum x_j) mean^T + omega_s (shift_s - kbar) (mean_s - mean)^T], where mean is that of the columns.
    """
    WIDTH: tl.constexpr = BLOCK_D if OF_KEYS else BLOCK_DV
    MATRIX_AT: tl.constexpr = 2 * BLOCK_D + BLOCK_DV + (0 if OF_KEYS else BLOCK_D * BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for split in range(num_splits):
        omega = tl.load(state + split * PART + 1)
        there = omega > 0
        weight = tl.exp2(tl.load(state + split * PART) - reference)
        vectors = state + split * PART + VECTORS_AT
        row_shift = tl.load(vectors + rows, mask=there, other=0.0)
        row_sum = tl.load(vectors + BLOCK_D + rows, mask=there, other=0.0)
        inverse = 1.0 / tl.where(there, omega, 1.0)
        if OF_KEYS:
            mean = tl.load(vectors + columns, mask=there, other=0.0)
            mean += tl.load(vectors + BLOCK_D + columns, mask=there, other=0.0) * inverse
        else:
            mean = tl.load(vectors + 2 * BLOCK_D + columns, mask=there, other=0.0) * inverse
        block = tl.load(vectors + MATRIX_AT + rows[:, None] * WIDTH + columns[None, :], mask=there, other=0.0)
        offset = ((row_shift - row_mean) * omega)[:, None] * (mean - column_mean)[None, :]
        total += weight * (block - row_sum[:, None] * column_mean[None, :] + offset)
    return total


@triton.jit
def gram_merge(
    state_ptr, merged_ptr, num_splits,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one query as a single part, whose shift is the mean key; BLOCK rows of it."""
    query = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * BLOCK
    state = state_ptr + query * num_splits * PART
    reference, weights, omegas = part_weights(state, num_splits, PART, BLOCK_SPLITS)
    kbar = mean_keys(state, weights, omegas, 0, BLOCK_D, BLOCK_D, PART, BLOCK_SPLITS)
    row_kbar = mean_keys(state, weights, omegas, first_row, BLOCK, BLOCK_D, PART, BLOCK_SPLITS)
    vbar = mean_values(state, weights, omegas, BLOCK_D, BLOCK_DV, PART, BLOCK_SPLITS)
    omega = tl.sum(weights * omegas, axis=0)
    rows = first_row + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    merged = merged_ptr + query * PART
    vectors = merged + VECTORS_AT
    if first_row == 0:
        tl.store(merged, reference)
        tl.store(merged + 1, omega)
        tl.store(vectors + 2 * BLOCK_D + value_columns, vbar * omega)
    tl.store(vectors + rows, row_kbar)
    tl.store(vectors + BLOCK_D + rows, tl.zeros([BLOCK], tl.float32))
    matrix = vectors + 2 * BLOCK_D + BLOCK_DV
    covariance = merged_rows(
        state, num_splits, reference, row_kbar, kbar, first_row, BLOCK, BLOCK_D, BLOCK_DV, PART, True
    )
    tl.store(matrix + rows[:, None] * BLOCK_D + columns[None, :], covariance)
    covariance = merged_rows(
        state, num_splits, reference, row_kbar, vbar, first_row, BLOCK, BLOCK_D, BLOCK_DV, PART, False
    )
    tl.store(matrix + BLOCK_D * BLOCK_D + rows[:, None] * BLOCK_DV + value_columns[None, :], covariance)


@triton.jit
def gram_solve(
    q_ptr, out_ptr, iterations_ptr, final_residual_ptr, ridge_ptr, state_ptr,
    ridge, cg_tol, q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
    ridge_stride_b, ridge_stride_h, ridge_stride_n, num_heads, seqlen_q, num_splits, cg_max_iters,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PART: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """(C^T + ridge I) u = kbar - q by conjugate gradients, and o = vbar - G^T u, for one query.

    C is symmetric but for rounding, so that the recurrence is off by a little: when it ends, the residual is computed
    anew, and it goes on from there while that is not small enough.
    """
    query = tl.program_id(0)
    batch = (query // (num_heads * seqlen_q)).to(tl.int64)
    head = (query // seqlen_q % num_heads).to(tl.int64)
    i = (query % seqlen_q).to(tl.int64)
    state = state_ptr + query.to(tl.int64) * num_splits * PART
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + i * q_stride_n
    q = tl.load(q_base + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    ridge_value = ridge
    if ridge_ptr is not None:
        ridge_value = tl.load(ridge_ptr + batch * ridge_stride_b + head * ridge_stride_h + i * ridge_stride_n)

    reference, weights, omegas = part_weights(state, num_splits, PART, BLOCK_SPLITS)
    kbar = mean_keys(state, weights, omegas, 0, BLOCK_D, BLOCK_D, PART, BLOCK_SPLITS)
    vbar = mean_values(state, weights, omegas, BLOCK_D, BLOCK_DV, PART, BLOCK_SPLITS)
    omega = tl.sum(weights * omegas, axis=0)
    inverse = 1.0 / tl.where(omega > 0, omega, 1.0)
    covariance = inverse * merged_rows(
        state, num_splits, reference, kbar, kbar, 0, BLOCK_D, BLOCK_D, BLOCK_DV, PART, True
    )

    right = tl.where(omega > 0, kbar - q, 0.0)
    right_norm2 = tl.sum(right * right, axis=0)
    enough = cg_tol * cg_tol * right_norm2
    solution = right * 0.0
    residual = right
    rho = right_norm2
    iterations = 0
    for _ in range(3):
        direction = residual
        going = (rho > enough) & (iterations < cg_max_iters)
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

    covariance_v = inverse * merged_rows(
        state, num_splits, reference, kbar, vbar, 0, BLOCK_D, BLOCK_D, BLOCK_DV, PART, False
    )
    out = vbar - tl.sum(covariance_v * solution[:, None], axis=0)
    out_base = out_ptr + batch * out_stride_b + head * out_stride_h + i * out_stride_n
    tl.store(out_base + value_columns, rounded(out, out_ptr.dtype.element_ty), mask=value_columns < HEAD_DIM_V)
    if iterations_ptr is not None:
        tl.store(iterations_ptr + query, iterations)
        relative = tl.sqrt(rho / tl.where(right_norm2 > 0, right_norm2, 1.0))
        tl.store(final_residual_ptr + query, relative)
