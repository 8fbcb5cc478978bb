"""Softmax attention that a model has, turned into a layer with its weights and, at first, its outputs."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from lla_compile.nn.layer import AttentionLayer
from lla_compile.nn.lla import LocalLinearAttention
from lla_compile.nn.rotary import RotaryEmbedding

_LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Parameters of a layer that softmax attention does not have.
_STARTS_AS_MADE = ("ridge.", "r_proj.", "log_scale")
# Parts of Llama-style attentions that change what they compute and that the layers have no counterpart of.
_UNSUPPORTED = ("sinks", "attn_logit_softcapping", "logit_softcapping", "qk_layernorm", "gate_proj")


def from_softmax_attention(
    module: nn.Module,
    layer: type[AttentionLayer] = LocalLinearAttention,
    *,
    initial_ridge: float = 1e6,
    **options,
) -> AttentionLayer:
    r"""A layer that computes what a trained softmax attention does, and that can be trained on from there.

    A :class:`ParallaxAttention` starts with r = 0, which is softmax attention exactly. A
    :class:`LocalLinearAttention` starts with one learned ridge a head, ``exp(log_ridge) = initial_ridge``. Its outputs
    differ from softmax attention's by

    .. math:: o - \bar v = -\sum_j p_j \bigl((k_j - \bar k) \cdot u\bigr) v_j, \qquad |u| \le |\bar k - q| / \lambda

    so in proportion to 1 / ridge and to the squared norm of keys and queries. For standard normal queries, keys and
    values of 64 dimensions the relative difference is 5 / ridge: 5e-6 with the default, 5e-4, less than bfloat16 rounds
    by, with 1e4. The smaller it starts, the sooner training moves away from softmax attention.

    Dropout of attention weights is left out: the operators have none. Weights are copied.

    Args:
        module: a :class:`torch.nn.MultiheadAttention`, or an attention with ``q_proj``, ``k_proj``, ``v_proj``,
            ``o_proj`` and ``head_dim`` like transformers' ``LlamaAttention``. The angles of its rotary embedding are
            read from its ``config``, norms of queries and keys (Qwen3) and a ``sliding_window`` are taken over.
        layer: :class:`LocalLinearAttention` or :class:`ParallaxAttention`.
        initial_ridge: of every head, for LocalLinearAttention.
        options: of the layer, in place of what is read from the module: ``is_causal``, ``rotary``, ``precision``,
            ``backend``, ``learn_scale``, ... A MultiheadAttention is taken for not causal unless ``is_causal=True`` is
            given.

    Returns:
        The layer, in the dtype, on the device and in the mode (training or not) of the module. Its input and output
        are (B, N, E), whatever the module's ``batch_first``; it returns a tensor alone.

    Raises:
        TypeError: not such a module.
        ValueError: the module has a part that the layer has no counterpart of; the message names it.

    Example:
        >>> import torch
        >>> from lla_compile.nn import from_softmax_attention
        >>> attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        >>> layer, x = from_softmax_attention(attention), torch.randn(2, 9, 32)
        >>> torch.allclose(layer(x), attention(x, x, x)[0], atol=1e-5)
        True
    """
    if isinstance(module, nn.MultiheadAttention):
        read, weights = _of_multihead(module)
    elif all(isinstance(getattr(module, name, None), nn.Linear) for name in _LLAMA_PROJECTIONS):
        read, weights = _of_llama(module)
    else:
        raise TypeError(
            "module must be a torch.nn.MultiheadAttention or have linear maps "
            f"{', '.join(_LLAMA_PROJECTIONS)}, got {type(module).__name__}"
        )
    weight = weights["q_proj.weight"]
    if issubclass(layer, LocalLinearAttention):
        read |= {"ridge": "head", "initial_ridge": initial_ridge}
    converted = layer(**read | {"device": weight.device, "dtype": weight.dtype} | options)
    new = [name for name in converted.state_dict() if name.startswith(_STARTS_AS_MADE)]
    missing, unexpected = converted.load_state_dict(weights, strict=False)
    if different := sorted({*missing, *unexpected}.difference(new)):
        raise ValueError(f"{type(module).__name__} and the options of the layer do not have the same {different}")
    return converted.train(module.training)


def _of_multihead(module: nn.MultiheadAttention) -> tuple[dict, dict[str, Tensor]]:
    """Arguments and weights of a layer like ``module``."""
    if not module._qkv_same_embed_dim:
        raise ValueError(f"kdim and vdim must be embed_dim {module.embed_dim}, got {module.kdim} and {module.vdim}")
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("MultiheadAttention with add_bias_kv or add_zero_attn sees keys that the layers do not have")
    weights = {"o_proj.weight": module.out_proj.weight}
    for name, weight in zip("qkv", module.in_proj_weight.chunk(3)):
        weights[f"{name}_proj.weight"] = weight
    if module.in_proj_bias is not None:
        weights["o_proj.bias"] = module.out_proj.bias
        for name, bias in zip("qkv", module.in_proj_bias.chunk(3)):
            weights[f"{name}_proj.bias"] = bias
    read = {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "bias": module.in_proj_bias is not None,
        "is_causal": False,
    }
    return read, weights


def _of_llama(module: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """Arguments and weights of a layer like ``module``."""
    for name in _UNSUPPORTED:
        if getattr(module, name, None) is not None:
            raise ValueError(f"{type(module).__name__} has {name}, which the layers have no counterpart of")
    head_dim, config = module.head_dim, getattr(module, "config", None)
    heads, kv_heads = (getattr(module, name).out_features // head_dim for name in ("q_proj", "k_proj"))
    read = {
        "embed_dim": module.q_proj.in_features,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "bias": module.q_proj.bias is not None,
        "out_bias": module.o_proj.bias is not None,
        "scale": getattr(module, "scaling", None),
        "is_causal": getattr(module, "is_causal", True),
        "window_size": getattr(module, "sliding_window", getattr(config, "sliding_window", None)),
        "rotary": _rotary(module),
    }
    names = [f"{name}.{part}" for name in _LLAMA_PROJECTIONS for part in ("weight", "bias")]
    if getattr(module, "q_norm", None) is not None:
        read |= {"qk_norm": True, "norm_eps": _norm_eps(module.q_norm, head_dim)}
        _norm_eps(module.k_norm, head_dim)
        names += ["q_norm.weight", "k_norm.weight"]
    weights = module.state_dict()
    return read, {name: weights[name] for name in names if name in weights}


def _norm_eps(norm: nn.Module, head_dim: int) -> float:
    """The eps of a norm, which has to be a RMSNorm of one head."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if eps is not None and weight is not None and weight.shape == (head_dim,):
        x = torch.linspace(-1, 2, head_dim, dtype=weight.dtype, device=weight.device)
        if torch.allclose(norm(x), nn.functional.rms_norm(x, (head_dim,), weight, eps), rtol=1e-2):
            return eps
    raise ValueError(f"norms of queries and keys must be a RMSNorm of the head_dim {head_dim}, got {norm}")


def _rotary(module: nn.Module) -> RotaryEmbedding | None:
    """The rotary embedding that the model of ``module`` rotates its queries and keys by, from its configuration."""
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or not getattr(module, "use_rope", True):
        return None
    _check_halves(module)
    layer_type = getattr(module, "layer_type", None)
    parameters = parameters.get(layer_type, parameters)
    kind, device = parameters.get("rope_type", "default"), module.q_proj.weight.device
    if kind == "default":
        dim = int(module.head_dim * parameters.get("partial_rotary_factor", 1.0))
        return RotaryEmbedding(dim, parameters["rope_theta"], device=device)
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"frequencies of the kind {kind!r} depend on the length: give rotary=RotaryEmbedding(...)")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, device)
    return RotaryEmbedding(2 * len(inv_freq), parameters["rope_theta"], inv_freq=inv_freq, attention_scaling=factor)


def _check_halves(module: nn.Module) -> None:
    """Raise ValueError if the model's file rotates pairs that are not half the rotated width apart."""
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    x = torch.arange(8.0)
    if rotate is not None and not rotate(x).equal(torch.cat((-x[4:], x[:4]))):
        raise ValueError(f"{type(module).__name__} rotates neighbouring numbers, RotaryEmbedding halves of a head")
