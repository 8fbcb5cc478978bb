"""Which slots of the keys hold tokens: what the operators need of transformers' masks, linear in the length."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function
from transformers.utils import is_tracing


def lla_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **_,
) -> Tensor | None:
    """What a causal attention has to know beside its window, for ``AttentionMaskInterface``.

    The arguments are those that transformers calls a mask function with. A window is no part of the result: the model
    gives it to the attention.

    Returns:
        - None: every slot holds a token, one sequence in each row.
        - bool (1, 1, 1, kv_length): the slots that hold tokens, the same in each row (a static cache).
        - bool (B, kv_length): the slots that hold tokens, one run in each row (padding).
        - int64 (B, 1, 1, kv_length): the number of each token's sequence (packed sequences).

    Raises:
        NotImplementedError: a mask that is not causal, or one of the model's own.
        ValueError: an attention mask with holes.
    """
    if use_vmap:
        raise NotImplementedError("lla attention takes causal masks with padding or packing, and none of a model's own")
    slots = torch.arange(kv_length, device=device) + kv_offset
    if attention_mask is None and not allow_is_causal_skip and isinstance(q_offset, int) and q_length == kv_length > 1:
        return _sequence_numbers(batch_size, slots, mask_function)
    filled = slots < q_offset + q_length
    all_filled = isinstance(q_offset, int) and q_offset + q_length >= kv_offset + kv_length
    common = None if all_filled else filled[None, None, None]
    if attention_mask is None:
        return common
    missing = kv_offset + kv_length - attention_mask.shape[1]
    mask = torch.nn.functional.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length] & filled
    if is_tracing(mask):
        return mask
    if (mask == filled).all():
        return common
    if (mask.int().diff(dim=1, prepend=torch.zeros_like(mask[:, :1]).int()) == 1).sum(1).max() > 1:
        raise ValueError("lla attention takes an attention_mask with one run of ones in each row, got one with holes")
    if q_length < kv_length and not (mask & (slots == q_offset + q_length - 1)).any():
        raise ValueError("with a cache, pad on the left: the last token of the prompt must be a token in some row")
    return mask


def _sequence_numbers(batch_size: int, slots: Tensor, mask_function: Callable) -> Tensor | None:
    """Numbers of the sequences that tokens are of, (B, 1, 1, N), by whether each sees the token before it."""
    rows, first = torch.arange(batch_size, device=slots.device)[:, None], slots.new_zeros(())
    before, after = slots[None, :-1], slots[None, 1:]
    if mask_function(rows, first, before, after).any():
        raise NotImplementedError("lla attention takes causal masks only, here a token sees a later one")
    starts = ~mask_function(rows, first, after, before).expand(batch_size, -1)
    if not starts.any():
        return None
    return torch.nn.functional.pad(starts, (1, 0)).long().cumsum(1)[:, None, None]
