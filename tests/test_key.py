"""Keys and buckets, against brute force."""

import math

import pytest

from lla_compile.key import Bucket, bucket_of, bucket_of_spec, key_of
from lla_compile.spec import LLASpec


def nearest_power(size: int) -> int:
    """The power of two with the smallest distance, the larger of two at the same distance."""
    return min((2**e for e in range(20)), key=lambda power: (abs(power - max(size, 1)), -power))


def test_bucket_is_the_nearest_power_of_two():
    for size in [*range(0, 1200), 3071, 3072, 6143, 6144, 100_000]:
        bucket = bucket_of(size, size)
        assert bucket.seqlen == bucket.batch_heads == nearest_power(size), size


def test_seqlen_range_lists_exactly_the_sizes_of_a_bucket():
    for exponent in range(11):
        power = 2**exponent
        members = [size for size in range(1, 4 * power + 2) if bucket_of(size, 1).seqlen == power]
        assert Bucket(power, 1).seqlen_range() == (members[0], members[-1])
        assert len(members) == members[-1] - members[0] + 1


def test_distance_is_in_octaves():
    assert Bucket(1024, 32).distance(Bucket(1024, 32)) == 0
    assert Bucket(1024, 32).distance(Bucket(4096, 16)) == pytest.approx(2 + 1)
    assert Bucket(4096, 16).distance(Bucket(1024, 32)) == pytest.approx(math.log2(4) + math.log2(2))


def spec(**fields) -> LLASpec:
    defaults = dict(
        dtype="float16", head_dim=64, head_dim_v=32, batch=2, num_heads=8, num_kv_heads=8, seqlen_q=1000, seqlen_k=1000
    )
    return LLASpec(**(defaults | fields))


def test_key_ignores_sizes_and_keeps_the_rest():
    key = key_of(spec())
    assert key == key_of(spec(batch=7, seqlen_q=5, seqlen_k=90, cg_max_iters=3))
    for changed in (dict(dtype="bfloat16"), dict(head_dim=32), dict(head_dim_v=64), dict(precision="fast")):
        assert key != key_of(spec(**changed))
    assert key != key_of(spec(is_causal=False))
    assert key.as_dict() == {
        "op": "lla",
        "phase": "forward",
        "dtype": "float16",
        "head_dim": 64,
        "head_dim_v": 32,
        "precision": "accurate",
        "causal": True,
    }


def test_bucket_of_a_window_is_that_of_its_length():
    assert bucket_of_spec(spec()) == Bucket(1024, 16)
    assert bucket_of_spec(spec(window_size=100)) == Bucket(128, 16)


def test_queries_of_a_head_count_as_heads_in_decoding():
    """Four queries of 16 heads, or one of 64 in groups of 4: the same tensor work over the same bytes."""
    several = LLASpec("bfloat16", 64, 64, 1, 16, 16, seqlen_q=4, seqlen_k=4096, phase="decode")
    grouped = LLASpec.decoding("bfloat16", 64, 4096, 64, group_size=4)
    assert key_of(several) == key_of(grouped) and bucket_of_spec(several) == bucket_of_spec(grouped)
    assert bucket_of_spec(several).batch_heads == 64
