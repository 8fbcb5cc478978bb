"""The layers: one forward for training, packed sequences, prompts and decoding; state_dicts; gradients."""

import doctest
import importlib

import pytest
import torch
from torch.nn import functional as F

from lla_compile import lla_attention, parallax_attention
from lla_compile.nn import LocalLinearAttention, ParallaxAttention, RotaryEmbedding, apply_rotary
from lla_compile.nn.ridge import FixedRidge, HeadRidge, TokenRidge

LAYERS = [LocalLinearAttention, ParallaxAttention]
SIZES = {"embed_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.__name__)
def layer(request):
    layer = request.param(**SIZES, qk_norm=True, rotary=RotaryEmbedding(8), learn_scale=True)
    return randomised(layer)


def randomised(layer):
    """The layer away from its initialisation, so that nothing is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def close(actual, expected, limit=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("ridge", ["token", "head", 0.3])
def test_local_linear_attention_is_the_function_between_projections(ridge):
    layer = randomised(LocalLinearAttention(**SIZES, ridge=ridge, initial_ridge=0.2))
    x = torch.randn(2, 11, 24)
    q, k, v = (
        getattr(layer, f"{name}_proj")(x).unflatten(2, (heads, 8)).transpose(1, 2)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    )
    if ridge == "token":
        ridge = F.linear(x, layer.ridge.proj.weight, layer.ridge.proj.bias).sigmoid().mT
    elif ridge == "head":
        ridge = layer.ridge.log_ridge.exp()[:, None]
    o = lla_attention(q, k, v, ridge)
    close(layer(x), layer.o_proj(o.transpose(1, 2).flatten(2)), 1e-6)


def test_parallax_is_the_function_between_projections():
    layer = randomised(ParallaxAttention(**SIZES, bias=True, scale=0.5, rotary=RotaryEmbedding(8)))
    x = torch.randn(2, 11, 24)
    q, r, k, v = (
        getattr(layer, f"{name}_proj")(x).unflatten(2, (heads, 8))
        for name, heads in (("q", 4), ("r", 4), ("k", 2), ("v", 2))
    )
    angles = layer.rotary(torch.arange(11))
    q, r, k = (apply_rotary(y, *angles) for y in (q, r, k))
    o = parallax_attention(*(y.transpose(1, 2) for y in (q, r, k, v)), scale=0.5)
    close(layer(x), layer.o_proj(o.transpose(1, 2).flatten(2)), 1e-6)


def test_parallax_starts_as_softmax_attention():
    layer = ParallaxAttention(**SIZES, bias=True, is_causal=False)
    x = torch.randn(2, 11, 24)
    q, k, v = (getattr(layer, f"{name}_proj")(x).unflatten(2, (-1, 8)).transpose(1, 2) for name in ("q", "k", "v"))
    o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(layer(x), layer.o_proj(o.transpose(1, 2).flatten(2)), 1e-6)
    layer(x).square().mean().backward()
    assert layer.r_proj.weight.grad.norm() > 0  # and does not stay there


@pytest.mark.parametrize(
    "layer_class, options, names",
    [
        (LocalLinearAttention, {}, ["ridge.proj.bias", "ridge.proj.weight"]),
        (LocalLinearAttention, {"ridge": "head", "learn_scale": True}, ["log_scale", "ridge.log_ridge"]),
        (LocalLinearAttention, {"ridge": 2.0, "rotary": RotaryEmbedding(8)}, []),
        (ParallaxAttention, {"qk_norm": True}, ["k_norm.weight", "q_norm.weight", "r_proj.weight"]),
    ],
    ids=["token", "head", "number", "parallax"],
)
def test_state_dict(layer_class, options, names):
    layer = randomised(layer_class(**SIZES, **options))
    common = [f"{name}_proj.weight" for name in "qkvo"]
    assert sorted(layer.state_dict()) == sorted(common + names)
    again, x = layer_class(**SIZES, **options), torch.randn(1, 5, 24)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_packed_sequences_equal_each_alone(layer):
    parts = [torch.randn(length, 24) for length in (5, 1, 0, 9)]
    ends = torch.tensor([0, 5, 6, 6, 15], dtype=torch.int32)
    packed = layer(torch.cat(parts), cu_seqlens=ends)
    expected = torch.cat([layer(part[None])[0] for part in parts if len(part)])
    close(packed, expected, 1e-5)
    weight = layer.k_proj.weight
    (actual,) = torch.autograd.grad(packed.square().sum(), weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    close(actual, wanted)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("window_size", [None, 6])
@torch.no_grad()
def test_a_prompt_and_steps_equal_one_pass(layer, page_size, window_size):
    layer.window_size = window_size
    x = torch.randn(3, 60, 24)
    expected, cache = layer(x), layer.new_cache(3, 64, page_size=page_size)
    done = 0
    for count in (20, 1, 2, 16, 20, 1):  # 20 after the prompt is more than decoding takes at once
        close(layer(x[:, done : done + count], cache=cache), expected[:, done : done + count])
        done += count
    assert cache.seqlens.tolist() == [done] * 3
    cache.reset()
    close(layer(x[:, :20], cache=cache), expected[:, :20])


@torch.no_grad()
def test_prompts_of_different_lengths(layer):
    lengths, x = [7, 12, 1], torch.randn(3, 14, 24)
    cache = layer.new_cache(3, 32)
    prompt = layer(x[:, :12], cache=cache, lengths=torch.tensor(lengths))
    step = layer(x[:, 12:], cache=cache)
    for row, length in enumerate(lengths):
        alone = layer(torch.cat((x[row, :length], x[row, 12:]))[None])[0]
        close(torch.cat((prompt[row, :length], step[row])), alone)


def test_positions_are_counted_or_given(layer):
    x = torch.randn(2, 6, 24)
    close(layer(x, position_ids=torch.arange(6).expand(2, 6)), layer(x), 0)
    close(layer(x, position_ids=torch.arange(6) + 5), layer(x))  # only differences count
    assert (layer(x, position_ids=3 * torch.arange(6)) - layer(x)).norm() > 1e-2 * layer(x).norm()


def test_rotation_of_a_part_of_a_head():
    rotary, x = RotaryEmbedding(4, base=100.0), torch.randn(2, 5, 3, 8)
    cos, sin = rotary(torch.arange(5))
    rotated = apply_rotary(x, cos, sin)
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])
    z = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    close(rotated, torch.cat((z.real, z.imag, x[..., 4:]), dim=-1), 1e-6)


def test_frequencies_are_not_rounded(layer):
    expected = layer.rotary(torch.arange(5000))
    layer.to(torch.bfloat16)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    for x, y in zip(layer.rotary(torch.arange(5000)), expected):
        assert torch.equal(x, y)


def test_every_parameter_gets_a_gradient(layer):
    layer(torch.randn(2, 9, 24)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


@pytest.mark.parametrize("layer_class", LAYERS)
def test_gradients_in_float64(layer_class):
    layer = randomised(layer_class(8, 2, num_kv_heads=1, qk_norm=True, learn_scale=True, dtype=torch.float64))
    if layer_class is LocalLinearAttention:
        layer.cg_tol, layer.cg_max_iters = 1e-13, 100
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    named = dict(layer.named_parameters())
    # float32, whatever the other parameters are: differences of it would drown
    checked = {name: parameter for name, parameter in named.items() if parameter.dtype == torch.float64}

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(checked, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *checked.values()), atol=1e-5, rtol=1e-4)


def test_autocast_and_a_low_precision_cache(layer):
    x = torch.randn(2, 20, 24)
    expected, cache = layer(x).detach(), layer.new_cache(2, 32)
    cache = type(cache)(2, 2, 32, 8, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = torch.cat([layer(part, cache=cache) for part in x.split((17, 1, 2), dim=1)], dim=1)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_it_compiles_in_one_graph(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 24)
    close(compiled(x), layer(x), 1e-5)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    close(compiled(x[0], cu_seqlens=ends), layer(x[0], cu_seqlens=ends), 1e-5)
    compiled(x).sum().backward()
    assert layer.q_proj.weight.grad.norm() > 0


def test_ridges():
    x = torch.randn(3, 5, 8)
    assert FixedRidge(0.5)(x) == 0.5
    assert HeadRidge(4, 7.0)(x).shape == (3, 5, 4) and torch.allclose(HeadRidge(4, 7.0)(x), torch.tensor(7.0))
    ridge = TokenRidge(8, 4)
    torch.nn.init.constant_(ridge.proj.bias, -300.0)
    assert (ridge(x) > 0).all()  # a sigmoid would have underflowed
    with pytest.raises(ValueError, match="must be positive"):
        FixedRidge(0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": None, "embed_dim": 25}, "embed_dim must be a multiple of num_heads .* got 25 and 4"),
        ({"rotary": RotaryEmbedding(10)}, "at most the head_dim 8, got 10"),
        ({"is_causal": False, "window_size": 3}, "window_size needs is_causal=True"),
        ({"ridge": "tokens"}, 'ridge must be "token", "head" or a number, got \'tokens\''),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LocalLinearAttention(**(SIZES | options))


def test_wrong_arguments(layer):
    x, ends = torch.randn(2, 6, 24), torch.tensor([0, 6], dtype=torch.int32)
    cache = layer.new_cache(2, 32)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got int64"):
        layer(torch.ones(2, 6, 24, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x must be \(batch, tokens, 24\), got shape \(2, 6, 23\)"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"x must be \(total, 24\), got shape \(2, 6, 24\)"):
        layer(x, cu_seqlens=ends)
    with pytest.raises(ValueError, match="give a cache too"):
        layer(x, lengths=torch.tensor([6, 6]))
    with pytest.raises(ValueError, match="packed sequences .* cannot go into a cache"):
        layer(x[0], cu_seqlens=ends, cache=cache)
    with torch.no_grad():
        layer(x, cache=cache)
    with pytest.raises(ValueError, match="lengths is for prompts"):
        layer(x, cache=cache, lengths=torch.tensor([6, 6]))
    with pytest.raises(NotImplementedError, match="no gradient"):
        layer(x, cache=cache)
    layer.is_causal = False
    with pytest.raises(ValueError, match="a cache needs is_causal=True"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match="dim must be even and positive, got 3"):
        RotaryEmbedding(3)


def test_parallax_is_that_of_flash_linear_attention():
    fla = pytest.importorskip("fla.ops.parallax", reason="flash-linear-attention is missing: pip install fla-core")
    inputs = [torch.randn(2, 9, heads, 8, requires_grad=True) for heads in (4, 4, 2, 2)]
    expected = fla.naive_parallax(*inputs)
    actual = parallax_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    close(actual, expected, 1e-5)
    grad_out = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(out, inputs, grad_out) for out in (actual, expected)))
    for own, theirs in pairs:
        close(own, theirs, 1e-5)


@pytest.mark.parametrize("name", ["convert", "lla", "parallax", "rotary"])
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"lla_compile.nn.{name}"))
    assert results.attempted and not results.failed
