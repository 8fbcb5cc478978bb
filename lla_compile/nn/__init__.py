"""Layers: attention modules for models, and conversion of those that a model has."""

from lla_compile.nn.convert import from_softmax_attention
from lla_compile.nn.lla import LocalLinearAttention
from lla_compile.nn.parallax import ParallaxAttention
from lla_compile.nn.ridge import FixedRidge, HeadRidge, TokenRidge
from lla_compile.nn.rotary import RotaryEmbedding, apply_rotary

__all__ = [
    "FixedRidge",
    "HeadRidge",
    "LocalLinearAttention",
    "ParallaxAttention",
    "RotaryEmbedding",
    "TokenRidge",
    "apply_rotary",
    "from_softmax_attention",
]
