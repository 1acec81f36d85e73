"""Wide fields pooled from one map: positions in closed form, the same network on the whole map, refusals."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract, models, pp
from stimage_sd.models import get_extractor
from stimage_sd.nn.layers import means_of_cells
from stimage_sd.pp._wide_fields import WideMap, is_pooled, wide_maps

EXTRACTOR = "efficientnet_lite0_stages"
KEY = f"X_{EXTRACTOR}"


@pytest.fixture
def section(make_slide: Callable[..., SpatialData], picture: Callable) -> SpatialData:
    sdata = make_slide(picture(1400, 1500, seed=3, grain=9), mpp=0.5)
    pp.tile(sdata, size_um=64.0, target_px=128, min_tissue=0)
    return sdata


def cells_of(one: WideMap, value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Give each cell of the blocks the value of a function of its center."""
    x, y = ((one.blocks()[:, axis, None] + (np.arange(8) + 0.5) / 8) * one.step for axis in (0, 1))
    return value(x[:, None, None, :], y[:, None, :, None])[..., None].astype(np.float32)


@given(
    centers=st.lists(st.tuples(st.floats(-500, 9e4), st.floats(-500, 9e4)), min_size=1, max_size=5),
    fields=st.lists(st.floats(1.1, 8), min_size=1, max_size=3, unique=True),
    side=st.floats(60, 900),
)
def test_a_linear_map_gives_the_value_at_the_center(
    centers: list[tuple[float, float]], fields: list[float], side: float
) -> None:
    places = np.array(centers)
    maps = wide_maps([1.0, *fields], places, side=side, target=224)
    assert list(maps) == list(range(1, len(fields) + 1))
    for one in maps.values():
        np.testing.assert_allclose(one.pool(cells_of(one, lambda x, y: 0 * (x + y) + 3))[:, 0], 3, rtol=1e-5)
        pooled = one.pool(cells_of(one, lambda x, y: (x + 2 * y) / 1e5))[:, 0]
        # a cell that is partly inside counts by its own center, at most half a cell away
        np.testing.assert_allclose(pooled, places @ [1, 2] / 1e5, atol=3 * 16 * one.scale / 1e5 + 1e-5)


def test_fields_are_means_of_the_network_on_the_map(make_slide: Callable[..., SpatialData], picture: Callable) -> None:
    section = make_slide(picture(2304, 2304, seed=3, grain=40), mpp=0.5)
    pp.tile(section, size_um=64.0, target_px=128, min_tissue=0)
    pp.embed(section, EXTRACTOR, fields_of_view=(1.0, 4.0), context_rings=0)
    values = contract.embeddings(section, EXTRACTOR)[:, 176:]
    # tiles of 128 px at four times their side: the map is four times as coarse, and its first block has 256 px
    coarse = next(np.asarray(one.data) for one in contract.levels(section, "he") if one.sizes["x"] == 576)
    block = np.pad(np.moveaxis(coarse, 0, -1)[:288, :288], ((32, 0), (32, 0), (0, 0)), mode="reflect")
    extractor = get_extractor(EXTRACTOR)
    with means_of_cells(10):
        cells = np.asarray(jax.jit(extractor.module())(extractor.normalize(block[None])))[0, 1:-1, 1:-1]
    features = cells.repeat(32, axis=0).repeat(32, axis=1)
    centers = np.asarray(contract.tiles(section).obsm["spatial"])
    inside = np.flatnonzero(((centers >= 256) & (centers <= 4 * 256 - 256)).all(axis=1))
    assert len(inside) > 10
    for row in inside[::3]:
        left, top = (centers[row] / 4 - 64).astype(int)
        expected = features[top : top + 128, left : left + 128].mean(axis=(0, 1))
        np.testing.assert_allclose(values[row], expected, rtol=1e-2, atol=1e-3)


def test_embeddings_do_not_depend_on_the_other_tiles(section: SpatialData) -> None:
    pp.embed(section, EXTRACTOR, context_rings=0)
    every = contract.embeddings(section, EXTRACTOR).copy()
    half = contract.tiles(section)[::3].copy()
    section.tables["tiles"] = half
    pp.embed(section, EXTRACTOR, context_rings=0, n_jobs=1)
    np.testing.assert_allclose(contract.embeddings(section, EXTRACTOR), every[::3], rtol=1e-5, atol=1e-6)


def test_jax_and_onnx_give_the_same_cells(monkeypatch: pytest.MonkeyPatch, picture: Callable) -> None:
    extractor = get_extractor(EXTRACTOR)
    images = picture(192, 192, seed=1)[None]
    onnx = extractor.cell_means(192, 3)(images)
    with means_of_cells(3):
        in_jax = np.asarray(jax.jit(extractor.module())(extractor.normalize(images)))
    np.testing.assert_allclose(onnx, in_jax, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(onnx.mean(axis=(1, 2)), extractor(images), rtol=1e-3, atol=1e-4)


def test_what_is_pooled() -> None:
    extractor = get_extractor(EXTRACTOR)
    assert is_pooled(extractor, [1.0, 2.0], 224)
    assert not is_pooled(extractor, [0.5, 1.0], 224)
    assert not is_pooled(extractor, [1.0, 2.0, 4.0], 80)
    models.register_extractor("means", lambda tiles: tiles.mean(axis=(1, 2)), input_size=224, embedding_size=3)
    assert not is_pooled(get_extractor("means"), [1.0, 2.0], 224)
    maps = wide_maps([1.0, 2.0, 4.0], np.zeros((1, 2)), side=224, target=224)
    # halfway between the resolution of a field and that of the widest one, on a log scale
    assert {place: (one.side, round(one.scale, 3)) for place, one in maps.items()} == {
        1: (448.0, 2.828),
        2: (896.0, 4.0),
    }


def test_models_state_how_wide_fields_were_embedded(section: SpatialData) -> None:
    from stimage_sd.models._specification import check_specification, specification

    pp.embed(section, EXTRACTOR)
    pooled = specification(section, EXTRACTOR)
    pp.embed(section, EXTRACTOR, wide_fields="separate")
    separate = specification(section, EXTRACTOR)
    assert (pooled.wide_fields, separate.wide_fields) == ("pooled", "separate")
    with pytest.raises(ValueError, match=r"pooled from one map, expected embedded one by one.*wide_fields='separate'"):
        check_specification(pooled, separate, section="s")
    del contract.tiles(section).uns["embeddings"][EXTRACTOR]["wide_fields"]  # as 0.1.0 wrote it
    check_specification(specification(section, EXTRACTOR), separate, section="s")


def test_an_unknown_way_is_refused(section: SpatialData) -> None:
    with pytest.raises(ValueError, match='"pooled" or "separate"'):
        pp.embed(section, EXTRACTOR, wide_fields="shared")
