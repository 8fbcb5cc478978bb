"""A cache of keys and values for decoding, dense or in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from lla_compile.arguments import dtype_name


class KVCache:
    """Keys and values of ``batch`` sequences of different lengths, as :func:`lla_compile.lla_decode` reads them.

    Nothing waits for the device, and no tensor moves: an append and the decoding after it can be captured in a CUDA
    graph.

    Args:
        batch: sequences B.
        num_kv_heads: key and value heads Hkv.
        capacity: slots M of a sequence; with pages, a multiple of ``page_size``.
        head_dim: width D of a key.
        head_dim_v: width Dv of a value, D by default.
        page_size: slots of a page, or None for a dense cache. Every sequence has pages enough for ``capacity``; to
            share or to allocate them otherwise, write ``block_table``.
        dtype: of keys and values.
        device: of all tensors.

    Attributes:
        k, v: (B, Hkv, M, D) and (B, Hkv, M, Dv), or (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv).
        seqlens: keys of each sequence, int32 (B,).
        block_table: the pages of each sequence, int32 (B, pages of a sequence); None if the cache is dense.
        is_empty: whether nothing was appended since it was made or reset.

    Raises:
        ValueError: ``capacity`` is not a multiple of ``page_size``.

    Example:
        >>> import torch
        >>> from lla_compile import KVCache, lla_decode
        >>> cache = KVCache(2, 1, capacity=64, head_dim=8, page_size=16, dtype=torch.float32)
        >>> prompt = torch.randn(2, 1, 20, 8)  # the second sequence is shorter than the first
        >>> cache.append(prompt, prompt, lengths=torch.tensor([20, 13]))
        >>> token = torch.randn(2, 1, 1, 8)
        >>> cache.append(token, token)
        >>> cache.seqlens.tolist()
        [21, 14]
        >>> lla_decode(token, cache.k, cache.v, seqlens=cache.seqlens, block_table=cache.block_table).shape
        torch.Size([2, 1, 1, 8])
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        page_size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
    ):
        if page_size is not None and (page_size < 1 or capacity % page_size):
            raise ValueError(f"capacity must be a multiple of page_size, got {capacity} and {page_size}")
        self.capacity, self.page_size = capacity, page_size
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.block_table = None
        # One slot or page more than is used: there go tokens that have no slot.
        if page_size is None:
            shape = batch, num_kv_heads, capacity + 1
        else:
            pages = torch.arange(batch * (capacity // page_size), dtype=torch.int32, device=device)
            self.block_table = pages.view(batch, -1)
            shape = pages.numel() + 1, page_size, num_kv_heads
        widths = head_dim, head_dim if head_dim_v is None else head_dim_v
        self._stores = [torch.zeros(*shape, width, dtype=dtype, device=device) for width in widths]
        self.k, self.v = (x[:, :, :capacity] if page_size is None else x for x in self._stores)
        self._least_lengths = torch.zeros(batch, dtype=torch.int64)  # what the host knows of seqlens
        self.is_empty = True

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Append new keys and values to every sequence, each at its own end.

        Args:
            k: new keys (B, Hkv, N, D), in the dtype and on the device of the cache.
            v: new values (B, Hkv, N, Dv).
            lengths: how many of the N belong to each sequence, the first ones, an integer tensor (B,) with values from
                0 to N; None appends all. One on the CPU is checked and counted by the host, and is not for the
                capture of a CUDA graph; one on a device is taken as it is.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes or devices do not fit, lengths out of range, or the cache is full, as far as the host can
                tell. What does not fit otherwise is dropped, and ``seqlens`` counts on.
        """
        for name, x, store in (("k", k, self.k), ("v", v, self.v)):
            self._check(name, x, store)
        count = k.shape[2]
        if v.shape[2] != count:
            raise ValueError(f"k and v must have the same number of tokens, got {count} and {v.shape[2]}")
        self._count(count, lengths)
        self.is_empty = False
        steps = torch.arange(count, device=self.seqlens.device)
        slots = self.seqlens.long()[:, None] + steps
        fits = slots < self.capacity
        if lengths is None:
            self.seqlens += count
        else:
            lengths = lengths.to(self.seqlens.device, non_blocking=True)
            fits &= steps < lengths[:, None]
            self.seqlens += lengths
        for x, store in ((k, self._stores[0]), (v, self._stores[1])):
            self._write(x, store, slots, fits)

    def reset(self) -> None:
        """Forget all keys and values."""
        self.seqlens.zero_()
        self._least_lengths.zero_()
        self.is_empty = True

    def _write(self, x: Tensor, store: Tensor, slots: Tensor, fits: Tensor) -> None:
        if self.page_size is None:
            sequences = torch.arange(len(slots), device=slots.device)[:, None]
            store[sequences, :, torch.where(fits, slots, self.capacity)] = x.transpose(1, 2)
            return
        slots = torch.where(fits, slots, 0)
        pages = self.block_table.long().gather(1, slots // self.page_size)
        store[torch.where(fits, pages, len(store) - 1), slots % self.page_size] = x.transpose(1, 2)

    def _check(self, name: str, x: Tensor, store: Tensor) -> None:
        if x.dtype != store.dtype:
            raise TypeError(f"{name} must have the dtype of the cache, {dtype_name(store)}, got {dtype_name(x)}")
        if x.device != store.device:
            raise ValueError(f"{name} must be on the device of the cache, {store.device}, got {x.device}")
        heads = store.shape[1 if self.page_size is None else 2]
        expected = len(self.seqlens), heads, store.shape[3]
        if x.dim() != 4 or (*x.shape[:2], x.shape[3]) != expected:
            batch, heads, width = expected
            raise ValueError(f"{name} must be ({batch}, {heads}, tokens, {width}), got shape {tuple(x.shape)}")

    def _count(self, count: int, lengths: Tensor | None) -> None:
        """Refuse lengths that are out of range and tokens that the host knows not to fit."""
        known = count
        if lengths is not None:
            if lengths.shape != self.seqlens.shape or lengths.dtype.is_floating_point:
                raise ValueError(
                    f"lengths must be integers of shape {tuple(self.seqlens.shape)}, "
                    f"got {dtype_name(lengths)} {tuple(lengths.shape)}"
                )
            known = 0
            if lengths.device.type == "cpu":
                if not ((lengths >= 0) & (lengths <= count)).all():
                    raise ValueError(f"lengths must lie between 0 and the {count} tokens, got {lengths.tolist()}")
                known = lengths
        total = self._least_lengths + known
        if len(total) and (longest := int(total.max())) > self.capacity:
            raise ValueError(
                f"the cache is full: a sequence would have {longest} keys, its capacity is {self.capacity}"
            )
        self._least_lengths = total
