"""``attn_implementation="lla"``: any causal model of transformers that takes its attention from AttentionInterface."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lla_compile.integrations.transformers.attend import attend
from lla_compile.integrations.transformers.masks import lla_mask
from lla_compile.nn.operators import LLA

# Arguments that change what softmax attention computes and that LLA has no counterpart of.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")


def register_attention(name: str = "lla", ridge: float = 1.0, **options) -> None:
    """Make ``attn_implementation=name`` and ``model.set_attn_implementation(name)`` mean Local Linear Attention.

    Models are causal, with a dynamic or a static cache, a sliding window or none, batches padded on either side (with a
    cache on the left), and packed sequences: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, or ``position_ids`` that start
    again. A model that was trained with softmax attention gives something else with a small ridge, and about the same
    with a large one, see :func:`lla_compile.nn.from_softmax_attention`.

    Args:
        name: of the implementation.
        ridge: of all heads and tokens.
        options: ``precision``, ``cg_tol``, ``cg_max_iters`` and ``backend`` of :func:`lla_compile.lla_attention`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lla_compile.integrations.transformers import register_attention
        >>> register_attention(ridge=0.5)
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="lla")
    """
    AttentionInterface.register(name, partial(lla_attention_forward, ridge=ridge, **options))
    AttentionMaskInterface.register(name, lla_mask)


def lla_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    *,
    ridge: float = 1.0,
    precision: str = "accurate",
    cg_tol: float | None = None,
    cg_max_iters: int | None = None,
    backend: str | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Local Linear Attention as AttentionInterface calls it.

    Returns:
        Output (B, N, Hq, Dv), and None for the weights, which are never formed.

    Raises:
        NotImplementedError: the module is not causal, has dropout of the attention's weights in training, or gives one
            of softcap, s_aux, position_bias, head_mask and cache.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"lla attention is for causal models, {type(module).__name__} is not")
    if dropout:
        raise NotImplementedError(f"lla attention has no dropout, set attention_dropout=0; got {dropout}")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"lla attention has no {name}, which {type(module).__name__} gives")
    options = {
        "scale": scaling,
        "window_size": sliding_window,
        "precision": precision,
        "cg_tol": cg_tol,
        "cg_max_iters": cg_max_iters,
        "backend": backend,
    }
    queries = {"q": query, "ridge": ridge}
    return attend(LLA, queries, key, value, attention_mask, options, cu_seqlens_of(kwargs)), None


def cu_seqlens_of(kwargs: dict) -> tuple[Tensor, Tensor] | None:
    """Ends of packed queries and keys among the keyword arguments that a model hands to its attention, if there."""
    ends = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    return None if ends[0] is None or ends[1] is None else ends
