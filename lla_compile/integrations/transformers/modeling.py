"""Llama with layers of this package in place of softmax attention, for AutoModel, ``generate`` and the Trainer."""

from __future__ import annotations

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from lla_compile.integrations.transformers.attend import attend
from lla_compile.integrations.transformers.interface import cu_seqlens_of, register_attention
from lla_compile.nn import HeadRidge, LocalLinearAttention, ParallaxAttention
from lla_compile.nn.layer import AttentionLayer, heads_first
from lla_compile.nn.parallax import ProbeLinear

# The masks that the layers take are made for the attention of this name, whatever it is that they call.
_MASKS = "lla_compile"


@strict
class LocalLinearConfig(LlamaConfig):
    """A LlamaConfig with the attention's kind and options, see :class:`lla_compile.nn.LocalLinearAttention`.

    Args:
        attention_layer: "lla" or "parallax".
        ridge, initial_ridge: of "lla".
        cg_tol, cg_max_iters: of "lla".
        qk_norm, learn_scale, precision: of either.
    """

    model_type = "local_linear"

    attention_layer: str = "lla"
    ridge: str | float = "token"
    initial_ridge: float = 1.0
    cg_tol: float | None = None
    cg_max_iters: int | None = None
    qk_norm: bool = False
    learn_scale: bool = False
    precision: str = "accurate"

    def __post_init__(self, **kwargs):
        kwargs["attn_implementation"] = _MASKS
        super().__post_init__(**kwargs)


class _LlamaInterface(AttentionLayer):
    """A layer with the forward of LlamaAttention: angles, mask and cache come from the model."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        queries, k, v = self.project(hidden_states, position_embeddings)
        queries, k, v = heads_first(queries), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out = attend(self.operator, queries, k, v, attention_mask, self.options(), cu_seqlens_of(kwargs))
        return self.o_proj(out.flatten(2)), None


class LlamaLocalLinearAttention(_LlamaInterface, LocalLinearAttention):
    """Local Linear Attention in the place of LlamaAttention."""


class LlamaParallaxAttention(_LlamaInterface, ParallaxAttention):
    """Parallax in the place of LlamaAttention."""


# The layers by the configuration's names, and the options of the configuration that each takes beside the common ones.
_LAYERS: dict[str, tuple[type[AttentionLayer], tuple[str, ...]]] = {
    "lla": (LlamaLocalLinearAttention, ("ridge", "initial_ridge", "cg_tol", "cg_max_iters")),
    "parallax": (LlamaParallaxAttention, ()),
}


def _make_layer(config: LocalLinearConfig, layer_idx: int) -> AttentionLayer:
    if config.attention_layer not in _LAYERS:
        raise ValueError(f"attention_layer must be one of {', '.join(_LAYERS)}, got {config.attention_layer!r}")
    layer_class, own = _LAYERS[config.attention_layer]
    layer = layer_class(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
        **{name: getattr(config, name) for name in ("qk_norm", "learn_scale", "precision", *own)},
    )
    layer.layer_idx = layer_idx
    return layer


class _Pretrained:
    """What both models add to Llama's."""

    config_class = LocalLinearConfig
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = False
    _can_record_outputs: ClassVar[dict] = {"hidden_states": LlamaModel._can_record_outputs["hidden_states"]}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProbeLinear):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, HeadRidge):
            init.constant_(module.log_ridge, math.log(module.initial))
        else:
            super()._init_weights(module)


class LocalLinearModel(_Pretrained, LlamaModel):
    """LlamaModel with layers of this package."""

    def __init__(self, config: LocalLinearConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = _make_layer(config, layer_idx)
        self.post_init()


class LocalLinearForCausalLM(_Pretrained, LlamaForCausalLM):
    """LlamaForCausalLM with layers of this package.

    Its parameters have the names of Llama's, so that ``from_pretrained`` takes a checkpoint of Llama and initialises
    what is new. With ``attention_layer="parallax"``, or ``ridge="head"`` and a large ``initial_ridge``, it then
    computes what the checkpoint did.

    Example:
        >>> import torch
        >>> from lla_compile.integrations.transformers import LocalLinearConfig, LocalLinearForCausalLM
        >>> config = LocalLinearConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                            num_attention_heads=4, num_key_value_heads=2)
        >>> model = LocalLinearForCausalLM(config)
        >>> model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    def __init__(self, config: LocalLinearConfig):
        super().__init__(config)
        self.model = LocalLinearModel(config)
        self.post_init()


register_attention(_MASKS)
AutoConfig.register(LocalLinearConfig.model_type, LocalLinearConfig, exist_ok=True)
AutoModel.register(LocalLinearConfig, LocalLinearModel, exist_ok=True)
AutoModelForCausalLM.register(LocalLinearConfig, LocalLinearForCausalLM, exist_ok=True)
