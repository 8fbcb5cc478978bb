"""The CUDA kernels that decode Parallax and softmax attention on the CPU, thread by thread."""

from dataclasses import replace

import pytest
import torch
from cuda_emulation import COMPILER, emulated  # noqa: F401
from parallax_decode_problems import CASES, make_parallax_decode_problem

from lla_compile import backends
from lla_compile.devices import resolve

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
DEVICE = resolve("a100")
LIMITS = {torch.bfloat16: 2.5e-3, torch.float16: 1e-3}
# Most cases share these sizes, and so their compiled kernels; lengths leave warps, stages and parts without keys.
SMALL = dict(dtype=torch.bfloat16, capacity=77, lengths=(77, 40, 0, 33), head_dim=40, head_dim_v=24)
TILES = dict(block_q=8, block_k=32, num_warps=2, num_stages=2)
WIDE = dict(block_q=64, block_k=16, num_warps=8, num_stages=2)


def check(splits=(1, 3), tiles=TILES, **fields):
    fields = SMALL | fields
    p = make_parallax_decode_problem(**fields)
    for num_splits in splits:
        p.assert_decoded("cuda", DEVICE, LIMITS[fields["dtype"]], num_splits=num_splits, **tiles)
    return p


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_decoding(fields):
    check(splits=(1, 2, 40), **dict(capacity=70, lengths=(70, 33, 0)) | fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(lengths=None),
        dict(lengths=(1, 0, 2)),
        dict(queries=3, heads=8, window_size=19),
        dict(queries=16, heads=2, lengths=(77, 16, 3)),
        dict(growth=30.0),
        dict(growth=8.0, offset=2.0),
        dict(offset=20.0),
        dict(scale=-0.4),
        dict(scale=0.0),
        dict(scale=torch.tensor(0.3)),
    ],
    ids=str,
)
def test_rows_keys_and_scores(fields):
    check(**fields)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "tiles, fields",
    [
        (
            dict(block_q=8, block_k=128, num_warps=4, num_stages=3),
            dict(page_size=16, capacity=800, lengths=(800, 129), growth=8.0),
        ),
        (dict(block_q=16, block_k=32, num_warps=4, num_stages=2), dict(heads=8, queries=3, head_dim=128)),
        (
            dict(block_q=32, block_k=32, num_warps=8, num_stages=3),
            dict(
                heads=16,
                queries=3,
                head_dim=33,
                head_dim_v=5,
                dtype=torch.float16,
                page_size=32,
                capacity=96,
                lengths=None,
                window_size=19,
            ),
        ),
        (WIDE, dict(heads=12, kv_heads=1, queries=7, op="softmax")),
    ],
    ids=lambda x: " ".join(str(value) for value in x.values()) if "block_q" in x else "",
)
def test_tiles(emulated, tiles, fields, backwards):  # noqa: F811
    """One and several warps of the same rows and of the same keys, tiles that stages hold several times over."""
    emulated["backwards"] = backwards
    check(tiles=tiles, **fields)


def test_unaligned_tensors():
    p = make_parallax_decode_problem(**SMALL)
    inputs = dict(p.inputs)
    for name, before in (("q", 1), ("r", 2), ("k", 3), ("v", 5)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (before, 2), value=torch.nan)[..., before:-2]
    replace(p, inputs=inputs).assert_decoded("cuda", DEVICE, LIMITS[torch.bfloat16], num_splits=1, **TILES)


def test_an_offset_costs_no_digits_whatever_part_it_begins_in():
    """Means of parts are apart by more than anything within a part."""
    p = make_parallax_decode_problem(**SMALL | dict(lengths=None, probe=2.0))
    k, r = p.inputs["k"], p.inputs["r"]
    assert (r.double() @ k[:, :1].double().mT).abs().max() > 2
    check(splits=(1, 2, 5), lengths=None, probe=2.0, offset=5.0)


def test_python_and_cuda_agree_on_sizes():
    """Of the arguments and of shared memory, which the launcher and the resource model count by themselves."""
    for op, tiles in (("parallax", TILES), ("softmax", WIDE)):  # of which tiles, and what warps have summed, is larger
        p = make_parallax_decode_problem(**SMALL | dict(op=op))
        launcher = backends.get("cuda").bind(p.plan("cuda", DEVICE, num_splits=3, **tiles))
        launcher(p.inputs, ("out",))
        [kernels] = launcher._bound.values()
        assert len(kernels) == 2
        for kernel in kernels:
            assert kernel.library.shared_size() == kernel.kernel.shared
            assert kernel.library.arguments_size() == launcher._arguments.size
