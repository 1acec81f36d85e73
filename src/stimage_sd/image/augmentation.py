"""Augmentation of tiles by flips, right-angle rotations and stain jitter in optical density."""

from __future__ import annotations

import numpy as np


def augment(
    tiles: np.ndarray, *, seed: int, flip: float = 0.5, rotate: bool = True, stain_jitter: float = 0.05
) -> np.ndarray:
    """Return one random variant of every tile.

    Parameters
    ----------
    tiles
        ``uint8 (n_tiles, side, side, 3)``.
    seed
        Random seed. The same seed gives the same variants. The variant of a tile depends on its position in the batch.
    flip
        Probability of a mirror image.
    rotate
        Rotate by 0, 90, 180 or 270 degrees with equal probability.
    stain_jitter
        Standard deviation of a random factor (mean 1) on the optical density of each channel. A random shift (mean 0)
        has a tenth of this deviation. Both change stain strength and hue.

    Returns
    -------
    ``uint8``, of the same shape.

    Raises
    ------
    ValueError
        If `tiles` is not such an array, or an option is out of range.

    Examples
    --------
    >>> tiles = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    >>> same = augment(tiles, seed=0, flip=0.0, rotate=False, stain_jitter=0.0)
    >>> bool((same == tiles).all())
    True
    """
    tiles = np.asarray(tiles)
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.shape[1] != tiles.shape[2] or tiles.dtype != np.uint8:
        raise ValueError(f"Expected uint8 (n_tiles, side, side, 3), found {tiles.dtype} {tiles.shape}.")
    if not 0 <= flip <= 1:
        raise ValueError(f"Expected `flip` as a probability, found {flip}.")
    if not stain_jitter >= 0:
        raise ValueError(f"Expected `stain_jitter` of at least 0, found {stain_jitter}.")
    random = np.random.default_rng(seed)
    mirrored = random.random(len(tiles)) < flip
    turns = random.integers(0, 4, len(tiles)) if rotate else np.zeros(len(tiles), dtype=int)
    gains = random.normal(1.0, stain_jitter, (len(tiles), 3))
    shifts = random.normal(0.0, stain_jitter / 10, (len(tiles), 3))
    out = np.empty_like(tiles)
    for index, tile in enumerate(tiles):
        turned = np.rot90(tile[:, ::-1] if mirrored[index] else tile, turns[index])
        out[index] = _jitter(turned, gains[index], shifts[index]) if stain_jitter else turned
    return out


def _jitter(tile: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Scale and shift the optical density of each channel, by a table of 256 values per channel."""
    density = -np.log((np.arange(256)[:, None] + 1) / 256)
    values = 256 * np.exp(-(density * gain + shift * (density > 0))) - 1
    table = np.clip(np.round(values), 0, 255).astype(np.uint8)
    return np.stack([table[tile[..., channel], channel] for channel in range(3)], axis=-1)
