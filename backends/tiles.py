"""Tiles as the matrix instructions of every NVIDIA GPU want them."""

from __future__ import annotations


def padded_width(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())
