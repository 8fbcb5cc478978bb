"""The functions that a layer calls, one set for each operator."""

from __future__ import annotations

from typing import Callable, NamedTuple

from torch import Tensor

from lla_compile.attention import lla_attention, lla_attention_varlen
from lla_compile.decode import lla_decode
from lla_compile.parallax import parallax_attention, parallax_attention_varlen, parallax_decode


class Operator(NamedTuple):
    """An operator of the family. All three take the operands that belong to query rows by name, ``q`` among them.

    Attributes:
        attention: of a dense batch, with keys ``k`` and values ``v``.
        varlen: of packed sequences.
        decode: of new tokens over ``k_cache`` and ``v_cache``.
    """

    attention: Callable[..., Tensor]
    varlen: Callable[..., Tensor]
    decode: Callable[..., Tensor]


LLA = Operator(lla_attention, lla_attention_varlen, lla_decode)
PARALLAX = Operator(parallax_attention, parallax_attention_varlen, parallax_decode)
