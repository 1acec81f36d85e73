"""Stain transfer: the tables against the closed form, and against squidpy's own."""

from __future__ import annotations

import numpy as np
import pytest
import squidpy as sq
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

from stimage_sd.image import stain

HEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])


def stain_matrix(*, turned: float = 0.0) -> np.ndarray:
    """Unit columns: hematoxylin, eosin and what is perpendicular to both."""
    hematoxylin = HEMATOXYLIN + turned * np.array([1.0, 0.0, -0.5])
    eosin = EOSIN + turned * np.array([0.0, -0.5, 1.0])
    residual = np.cross(hematoxylin, eosin)
    columns = np.stack([hematoxylin, eosin, residual], axis=1)
    return columns / np.linalg.norm(columns, axis=0)


def stained(
    height: int = 40, width: int = 50, *, seed: int = 0, turned: float = 0.0, white: float = 255.0
) -> np.ndarray:
    """An image of two stains, ``uint8 (3, y, x)``, with a strip of bare glass at the left."""
    random = np.random.default_rng(seed)
    amounts = random.gamma(2.0, 0.25, (height, width, 2)) * [0.8, 1.0]
    amounts[:, :8] = 0
    density = amounts @ stain_matrix(turned=turned)[:, :2].T
    rgb = (white + 1) * np.exp(-density) - 1
    return np.moveaxis(np.clip(np.round(rgb), 0, 255).astype(np.uint8), -1, 0)


def closed_form(
    image: np.ndarray, matrix: np.ndarray, source_white: np.ndarray, target_white: np.ndarray
) -> np.ndarray:
    """The transfer written out: logarithm, matrix product, exponential, in double precision."""
    density = -np.log((image.astype(np.float64) + 1) / (np.asarray(source_white)[:, None, None] + 1))
    moved = np.einsum("oi,iyx->oyx", matrix, density)
    return (np.asarray(target_white)[:, None, None] + 1) * np.exp(-moved) - 1


@given(
    entries=st.lists(st.floats(-0.6, 1.4), min_size=9, max_size=9),
    source_white=st.lists(st.floats(120, 255), min_size=3, max_size=3),
    target_white=st.lists(st.floats(120, 255), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_tables_are_the_closed_form(entries: list, source_white: list, target_white: list, seed: int) -> None:
    matrix = np.array(entries).reshape(3, 3)
    image = np.random.default_rng(seed).integers(0, 256, (3, 9, 11), dtype=np.uint8)
    tables = stain.transfer_tables(matrix, np.array(source_white), np.array(target_white))
    exact = np.clip(closed_form(image, matrix, source_white, target_white), 0, 255)
    ours = stain.apply_tables(image, tables)
    # rounding to whole levels, and float32 where a value lies between two
    assert np.abs(ours - exact).max() <= 0.5 + 1e-3


def test_identity_leaves_an_image_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    for white in (np.full(3, 255.0), np.array([231.0, 228.0, 240.0])):
        np.testing.assert_array_equal(stain.apply_tables(image, stain.transfer_tables(np.eye(3), white, white)), image)


def test_transfer_from_a_matrix_to_itself_is_the_identity() -> None:
    matrix = stain_matrix()
    np.testing.assert_allclose(stain.transfer_matrix(matrix, matrix, np.ones(2)), np.eye(3), atol=1e-12)


def test_transfer_matrix_carries_stains_onto_stains() -> None:
    source, target = stain_matrix(), stain_matrix(turned=0.1)
    carried = stain.transfer_matrix(source, target, np.array([1.5, 0.5])) @ source
    np.testing.assert_allclose(carried, target * [1.5, 0.5, 1.0], atol=1e-12)


@pytest.mark.parametrize(("own", "theirs"), [((255, 255, 255), (255, 255, 255)), ((230, 220, 235), (250, 248, 251))])
def test_white_becomes_the_targets_white(own: tuple, theirs: tuple) -> None:
    matrix = stain.transfer_matrix(stain_matrix(), stain_matrix(turned=0.1), np.array([1.2, 0.9]))
    tables = stain.transfer_tables(matrix, np.array(own), np.array(theirs))
    glass = np.broadcast_to(np.array(own, np.uint8)[:, None, None], (3, 5, 5))
    np.testing.assert_array_equal(stain.apply_tables(glass, tables)[:, 0, 0], theirs)


def test_a_dim_scan_is_carried_onto_the_bright_one() -> None:
    bright, dim = stained(white=250.0), stained(white=200.0)
    tables = stain.transfer_tables(np.eye(3), np.full(3, 200.0), np.full(3, 250.0))
    assert np.abs(stain.apply_tables(dim, tables).astype(int) - bright).max() <= 2


def test_views_and_odd_strides_are_taken() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 30, 40), dtype=np.uint8)
    tables = stain.transfer_tables(stain_matrix(), np.full(3, 255.0), np.full(3, 255.0))
    np.testing.assert_array_equal(
        stain.apply_tables(image[:, ::2, ::-3], tables), stain.apply_tables(image, tables)[:, ::2, ::-3]
    )


# --------------------------------------------------------------------------------------------------
# against squidpy


def as_section(image: np.ndarray) -> SpatialData:
    mask = np.zeros(image.shape[1:], np.uint8)
    mask[:, 8:] = 1
    return SpatialData(
        images={"he": Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        labels={"he_tissue": Labels2DModel.parse(mask, dims=("y", "x"))},
    )


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_transfer_equals_squidpys(method: str) -> None:
    source, target = stained(120, 150, seed=1), stained(120, 150, seed=2, turned=0.12)
    white = np.full(3, 255.0)
    references = [
        sq.experimental.im.fit_stain_reference(as_section(image), "he", method=method, white_point=white)
        for image in (source, target)
    ]
    theirs = sq.experimental.im.normalize_stains(
        as_section(source), "he", references[1], inplace=False, preserve_background=False
    )
    matrices = [np.asarray(reference.stain_matrix) for reference in references]
    matrix = stain.transfer_matrix(matrices[0], matrices[1], np.ones(2))
    ours = stain.apply_tables(source, stain.transfer_tables(matrix, white, white))
    difference = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.1
    # and it did something
    assert np.abs(ours.astype(int) - source).mean() > 3


def test_reinhard_equals_squidpys() -> None:
    source, target = stained(120, 150, seed=1), stained(120, 150, seed=2, turned=0.12)
    reference = sq.experimental.im.fit_stain_reference(as_section(target), "he", method="reinhard")
    theirs = np.asarray(
        sq.experimental.im.normalize_stains(
            as_section(source), "he", reference, inplace=False, preserve_background=False
        )
    )
    statistics = {}
    for name, image in (("source", source), ("target", target)):
        lab = stain.tissue_lab(np.moveaxis(image[:, :, 8:], 0, -1).reshape(-1, 3))
        statistics |= {f"{name}_mean": lab.mean(axis=0), f"{name}_deviation": lab.std(axis=0)}
    ours = stain.reinhard_transfer(source, **statistics)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_reinhard_onto_itself_leaves_an_image_as_it_is() -> None:
    image = stained(60, 60)
    lab = stain.tissue_lab(np.moveaxis(image, 0, -1).reshape(-1, 3))
    mean, deviation = lab.mean(axis=0), lab.std(axis=0)
    same = stain.reinhard_transfer(
        image, source_mean=mean, source_deviation=deviation, target_mean=mean, target_deviation=deviation
    )
    assert np.abs(same.astype(int) - image).max() <= 1


def test_reinhard_matches_the_targets_statistics() -> None:
    source, target = stained(80, 80, seed=1), stained(80, 80, seed=2, turned=0.1)
    labs = [stain.tissue_lab(np.moveaxis(image, 0, -1).reshape(-1, 3)) for image in (source, target)]
    moved = stain.reinhard_transfer(
        source,
        source_mean=labs[0].mean(axis=0),
        source_deviation=labs[0].std(axis=0),
        target_mean=labs[1].mean(axis=0),
        target_deviation=labs[1].std(axis=0),
    )
    lab = stain.tissue_lab(np.moveaxis(moved, 0, -1).reshape(-1, 3))
    np.testing.assert_allclose(lab.mean(axis=0), labs[1].mean(axis=0), atol=0.02)
    np.testing.assert_allclose(lab.std(axis=0), labs[1].std(axis=0), rtol=0.05)
