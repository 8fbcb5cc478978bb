"""Softmax attention turned into the layers: outputs stay, weights come along, what cannot be turned is refused."""

import pytest
import torch

from lla_compile.nn import LocalLinearAttention, ParallaxAttention, from_softmax_attention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def difference(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layer, limit", [(LocalLinearAttention, 1e-5), (ParallaxAttention, 1e-6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_multihead_attention(layer, limit, bias, is_causal):
    attention = torch.nn.MultiheadAttention(64, 2, bias=bias, batch_first=True).eval()
    for parameter in attention.parameters():
        parameter.mul_(1.5) if parameter.dim() > 1 else parameter.normal_()
    x = torch.randn(2, 50, 64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(50) if is_causal else None
    expected, _ = attention(x, x, x, attn_mask=mask)
    converted = from_softmax_attention(attention, layer, is_causal=is_causal)
    assert type(converted) is layer and not converted.training
    assert difference(converted(x), expected) < limit


@torch.no_grad()
def test_what_a_ridge_leaves():
    """The figures of the docstring: 5 / ridge for standard normal heads of 64."""
    attention = torch.nn.MultiheadAttention(64, 1, bias=False, batch_first=True).eval()
    for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        weight.copy_(torch.linalg.qr(torch.randn(64, 64)).Q)  # standard normal heads from standard normal tokens
    x = torch.randn(4, 256, 64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(256)
    expected, _ = attention(x, x, x, attn_mask=mask)
    left = {}
    for ridge in (1e2, 1e4, 1e6):
        layer = from_softmax_attention(attention, initial_ridge=ridge, is_causal=True)
        left[ridge] = difference(layer(x), expected)
    print({f"{ridge:g}": f"{x:.1e}" for ridge, x in left.items()})
    assert all(3 / ridge < x < 8 / ridge for ridge, x in left.items())


def test_it_trains_away_from_softmax_attention():
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x, target = torch.randn(4, 20, 16), torch.randn(4, 20, 16)
    for layer, name in ((LocalLinearAttention, "ridge.log_ridge"), (ParallaxAttention, "r_proj.weight")):
        converted = from_softmax_attention(attention, layer, is_causal=True)
        before, loss = converted.state_dict()[name].clone(), []
        optimizer = torch.optim.Adam(converted.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss.append((converted(x) - target).square().mean())
            loss[-1].backward()
            optimizer.step()
        assert loss[-1] < loss[0]
        assert (converted.state_dict()[name] - before).abs().max() > 1e-2


def test_weights_are_copies_in_the_same_dtype():
    attention = torch.nn.MultiheadAttention(16, 2, dtype=torch.float64)
    converted = from_softmax_attention(attention)
    assert converted.q_proj.weight.dtype == torch.float64 and converted.training
    torch.nn.init.zeros_(attention.in_proj_weight)
    assert converted.q_proj.weight.norm() > 0


def test_options_go_to_the_layer():
    attention = torch.nn.MultiheadAttention(16, 2)
    converted = from_softmax_attention(attention, ridge=0.5, learn_scale=True, is_causal=True, window_size=4)
    assert converted.ridge.value == 0.5 and converted.log_scale.requires_grad and converted.window_size == 4


def test_what_is_refused():
    with pytest.raises(TypeError, match="must be a torch.nn.MultiheadAttention or have .* got Linear"):
        from_softmax_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kdim and vdim must be embed_dim 16, got 8 and 16"):
        from_softmax_attention(torch.nn.MultiheadAttention(16, 2, kdim=8))
    with pytest.raises(ValueError, match="add_bias_kv or add_zero_attn"):
        from_softmax_attention(torch.nn.MultiheadAttention(16, 2, add_zero_attn=True))
    with pytest.raises(ValueError, match=r"do not have the same \['k_norm.weight', 'q_norm.weight'\]"):
        from_softmax_attention(torch.nn.MultiheadAttention(16, 2), qk_norm=True)
