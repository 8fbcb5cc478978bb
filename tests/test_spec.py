"""LLASpec: what it refuses, what it derives."""

import dataclasses

import pytest

from lla_compile.spec import LLASpec, check_ridge

GOOD = dict(
    dtype="bfloat16", head_dim=64, head_dim_v=64, batch=2, num_heads=4, num_kv_heads=2, seqlen_q=10, seqlen_k=10
)


def spec(**fields) -> LLASpec:
    return LLASpec(**(GOOD | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(dtype="int8"), "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        (dict(precision="exact"), "precision must be one of fast, accurate, got 'exact'"),
        (dict(op="linear"), "op must be one of lla, parallax, softmax"),
        (dict(phase="generate"), "phase must be one of forward, backward, decode, got 'generate'"),
        (dict(head_dim=0), "head_dim must be an integer from 1 to 256, got 0"),
        (dict(head_dim=257), "head_dim must be an integer from 1 to 256, got 257"),
        (dict(head_dim_v=True), "head_dim_v must be an integer from 1 to 256, got True"),
        (dict(batch=-1), "batch must be an integer >= 0, got -1"),
        (dict(seqlen_q=1.5), "seqlen_q must be an integer >= 0, got 1.5"),
        (dict(seqlen_k=-3), "seqlen_k must be an integer >= 0, got -3"),
        (dict(num_heads=0), "num_heads must be an integer >= 1, got 0"),
        (dict(num_kv_heads=0), "num_kv_heads must be an integer >= 1, got 0"),
        (dict(num_heads=3), "got 3 query heads and 2 key heads"),
        (dict(window_size=0), "window_size must be an integer >= 1, got 0"),
        (dict(window_size=4, is_causal=False), "window_size needs is_causal=True"),
        (dict(num_sequences=-1), "num_sequences must be an integer >= 0, got -1"),
        (dict(num_sequences=3), "packed sequences have batch 1, got 2"),
        (dict(cg_max_iters=0), "cg_max_iters must be an integer >= 1, got 0"),
        (dict(cg_tol=1.0), "cg_tol must be a number with 0 <= cg_tol < 1, got 1.0"),
        (dict(cg_tol="loose"), "cg_tol must be a number"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError) as caught:
        spec(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_ridge_must_be_positive_and_finite(ridge):
    with pytest.raises(ValueError, match="ridge must be positive and finite"):
        check_ridge(ridge)


def test_specs_are_frozen_values():
    assert spec() == spec() and hash(spec()) == hash(spec())
    assert spec() != spec(seqlen_q=11)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().batch = 3


def test_default_tolerance_follows_type_and_precision():
    assert spec(precision="fast").cg_tol > spec(precision="accurate").cg_tol > spec(dtype="float32").cg_tol
    assert spec(dtype="float32").cg_tol > spec(dtype="float64").cg_tol
    assert spec(cg_tol=0).cg_tol == 0


def test_adjoint_solves_of_16_bit_types_go_further():
    for dtype in ("float16", "bfloat16"):
        assert spec(dtype=dtype, phase="backward").cg_tol == 10**-3.5 < spec(dtype=dtype).cg_tol
        assert spec(dtype=dtype, phase="backward", cg_tol=0.1).cg_tol == 0.1
    for fields in (dict(precision="fast"), dict(dtype="float32"), dict(dtype="float64")):
        assert spec(phase="backward", **fields).cg_tol == spec(**fields).cg_tol


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(), False),
        (dict(batch=0), True),
        (dict(seqlen_q=0), True),
        (dict(seqlen_k=0), True),
        (dict(batch=1, num_sequences=2), False),
        (dict(batch=1, num_sequences=0), True),
        (dict(batch=1, num_sequences=2, seqlen_k=0), True),
        (dict(seqlen_q=9, seqlen_k=1), False),
    ],
)
def test_is_empty(fields, expected):
    assert spec(**fields).is_empty is expected


def test_packed_sequences_count_as_equally_long():
    packed = spec(batch=1, num_sequences=3, seqlen_q=10, seqlen_k=12)
    assert packed.mean_seqlens == (4, 4) and packed.visible_seqlen == 4
    assert packed.batch_heads == 3 * 4
    apart = spec(batch=3, seqlen_q=4, seqlen_k=4)
    assert packed.visible_pairs == apart.visible_pairs
    assert spec(batch=1, num_sequences=3, seqlen_q=10, seqlen_k=12, window_size=2).visible_seqlen == 2
    assert spec().mean_seqlens == (10, 10)
    nothing = spec(batch=1, num_sequences=0, seqlen_q=0, seqlen_k=0)
    assert nothing.batch_heads == nothing.visible_pairs == 0 and nothing.mean_seqlens == (0, 0)


def test_derived_sizes():
    assert spec().group_size == 2
    assert spec().batch_heads == 8
    assert spec().visible_seqlen == 10
    assert spec(window_size=3).visible_seqlen == 3
    assert spec(window_size=30).visible_seqlen == 10


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (1, 1), (7, 7), (4, 9), (9, 4), (1, 6)])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_against_brute_force(n, m, window, causal):
    if window and not causal:
        window = None
    expected = 0
    for i in range(n):
        for j in range(m):
            last = i + m - n
            expected += not causal or (j <= last and (window is None or j > last - window))
    problem = spec(seqlen_q=n, seqlen_k=m, window_size=window, is_causal=causal)
    assert problem.visible_pairs == expected * problem.batch_heads


def test_description_names_what_matters():
    text = spec(window_size=5).describe()
    for part in ("lla forward", "bfloat16", "H 4/2", "window 5", "accurate"):
        assert part in text
    text = spec(batch=1, num_sequences=7, phase="backward").describe()
    assert "lla backward" in text and "7 packed" in text
