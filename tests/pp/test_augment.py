"""Augmentation: the eight orientations, the jitter's bounds, the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stimage_sd import pp


def orientations(tile: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(mirrored, turns) for mirrored in (tile, tile[:, ::-1]) for turns in range(4)]


def which(tile: np.ndarray, variant: np.ndarray) -> int:
    found = [number for number, other in enumerate(orientations(tile)) if np.array_equal(other, variant)]
    assert len(found) == 1, "the variant is none of the eight orientations"
    return found[0]


def random_tiles(n_tiles: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_tiles, side, side, 3), dtype=np.uint8)


@given(n_tiles=st.integers(1, 6), side=st.integers(3, 9), seed=st.integers(0, 999))
def test_without_jitter_every_variant_is_an_orientation(n_tiles: int, side: int, seed: int) -> None:
    tiles = random_tiles(n_tiles, side)
    before = tiles.copy()
    variants = pp.augment(tiles, seed=seed, stain_jitter=0.0)
    for tile, variant in zip(tiles, variants, strict=True):
        which(tile, variant)
    np.testing.assert_array_equal(tiles, before)


def test_all_eight_are_as_likely() -> None:
    tiles = np.repeat(random_tiles(1, 5), 1600, axis=0)
    variants = pp.augment(tiles, seed=1, stain_jitter=0.0)
    seen = np.bincount([which(tiles[0], variant) for variant in variants], minlength=8)
    assert seen.min() > 150
    assert seen.max() < 250


def test_flip_and_rotate_alone() -> None:
    tiles = np.repeat(random_tiles(1, 5), 60, axis=0)
    turned = pp.augment(tiles, seed=1, flip=0.0, stain_jitter=0.0)
    assert {which(tiles[0], variant) for variant in turned} == {0, 1, 2, 3}
    mirrored = pp.augment(tiles, seed=1, flip=1.0, rotate=False, stain_jitter=0.0)
    assert {which(tiles[0], variant) for variant in mirrored} == {4}


def test_a_seed_gives_the_same_and_another_gives_others() -> None:
    tiles = random_tiles(20, 8)
    np.testing.assert_array_equal(pp.augment(tiles, seed=3), pp.augment(tiles, seed=3))
    assert (pp.augment(tiles, seed=3) != pp.augment(tiles, seed=4)).any()


def test_jitter_scales_optical_density_and_leaves_glass() -> None:
    levels = np.arange(256, dtype=np.uint8)
    tile = np.repeat(np.tile(levels, 256).reshape(256, 256)[..., None], 3, axis=-1)
    tiles = np.repeat(tile[None], 200, axis=0)
    variants = pp.augment(tiles, seed=0, flip=0.0, rotate=False, stain_jitter=0.05)
    assert (variants[:, :, 255] == 255).all()
    density = -np.log((levels.astype(float) + 1) / 256)
    found = -np.log((variants[:, 0].astype(float) + 1) / 256)
    # the gain is the slope of the new density over the old one
    middle = slice(40, 200)
    slopes = np.stack(
        [
            [np.polyfit(density[middle], found[tile, middle, channel], 1)[0] for channel in range(3)]
            for tile in range(200)
        ]
    )
    assert slopes.mean() == pytest.approx(1.0, abs=0.01)
    assert slopes.std() == pytest.approx(0.05, abs=0.006)
    # channels differ, so that hue changes; tiles differ
    assert np.abs(np.corrcoef(slopes.T)[0, 1]) < 0.25
    # brighter stays brighter
    assert (np.diff(variants[:, 0].astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((2, 4, 5, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3)),
        np.zeros((1, 4, 4, 4), "u1"),
    ],
)
def test_what_are_no_tiles_is_refused(tiles: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(n_tiles, side, side, 3\), found"):
        pp.augment(tiles, seed=0)


def test_options_out_of_range_are_refused() -> None:
    for match, options in (
        ("`flip` .* found 1.5", {"flip": 1.5}),
        ("`stain_jitter` .* found -1", {"stain_jitter": -1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            pp.augment(random_tiles(1, 4), seed=0, **options)
