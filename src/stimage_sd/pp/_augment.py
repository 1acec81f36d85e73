"""Augmentation of tiles, as `stimage_sd.pp.augment`; what it does is numerics alone, which training shares."""

from __future__ import annotations

from stimage_sd.nn.augmentation import augment

__all__ = ["augment"]
