"""Expose tile augmentation as `stimage_sd.pp.augment`. Training shares the numerical code."""

from __future__ import annotations

from stimage_sd.image.augmentation import augment

__all__ = ["augment"]
