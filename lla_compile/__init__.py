"""Local Linear Attention, compiled: a planner, backends, a tuner and a database of tuned plans."""

from lla_compile.attention import SolveInfo, lla_attention, lla_attention_varlen, plan
from lla_compile.autograd import AdjointInfo
from lla_compile.decode import lla_decode, lla_decode_workspace
from lla_compile.dispatch import clear_cache
from lla_compile.gram import GramState
from lla_compile.kv_cache import KVCache
from lla_compile.parallax import (
    parallax_attention,
    parallax_attention_varlen,
    parallax_decode,
    parallax_decode_workspace,
)
from lla_compile.plans import Plan
from lla_compile.spec import LLASpec

__version__ = "0.1.0"
__all__ = [
    "AdjointInfo",
    "GramState",
    "KVCache",
    "LLASpec",
    "Plan",
    "SolveInfo",
    "clear_cache",
    "lla_attention",
    "lla_attention_varlen",
    "lla_decode",
    "lla_decode_workspace",
    "parallax_attention",
    "parallax_attention_varlen",
    "parallax_decode",
    "parallax_decode_workspace",
    "plan",
]
