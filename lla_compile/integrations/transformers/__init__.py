"""Local Linear Attention in Hugging Face transformers: a registered attention, and Llama with layers of its own.

Needs ``pip install 'lla-compile[transformers]'``.
"""

from lla_compile.integrations.transformers.interface import lla_attention_forward, register_attention
from lla_compile.integrations.transformers.masks import lla_mask
from lla_compile.integrations.transformers.modeling import (
    LocalLinearConfig,
    LocalLinearForCausalLM,
    LocalLinearModel,
)

__all__ = [
    "LocalLinearConfig",
    "LocalLinearForCausalLM",
    "LocalLinearModel",
    "lla_attention_forward",
    "lla_mask",
    "register_attention",
]
