"""Saliency: a linear model's closed form, sums over nuclei, and how scores lie beside LIME's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import geopandas
import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
import spatialdata
from flax import nnx
from spatialdata import SpatialData

from stimage_sd import contract, models, pl, pp, tl
from stimage_sd.nn.parts import Part
from stimage_sd.tl._score.cross_validate import shallow_copy

EXTRACTOR = "means_of_color"


class MeansOfColor(nnx.Module):
    """Mean of each color, and of its square: gradients are known."""

    def __init__(self) -> None:
        self.scale = nnx.Param(np.ones((1,), np.float32))

    def parts(self) -> list[Part]:
        return [
            Part((self.scale,), lambda tiles: tiles * self.scale[...]),
            Part((), lambda value: jax.numpy.concatenate([value.mean((1, 2)), (value**2).mean((1, 2))], axis=1)),
        ]

    def __call__(self, tiles: jax.Array) -> jax.Array:
        first, second = self.parts()
        return second.run(first.run(tiles))


@pytest.fixture(scope="module")
def fitted(make_slide: Callable, make_spots: Callable, picture: Callable) -> tuple[SpatialData, models.NBModel]:
    """A section of random colors, whose counts follow red, and a model of it."""
    models.register_extractor(
        EXTRACTOR, MeansOfColor(), input_size=None, embedding_size=6, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    random = np.random.default_rng(0)
    sdata = make_spots(n_side=8, mpp=None, tiled=False)
    image = make_slide(picture(400, 400, seed=3, grain=20))
    sdata.images["he"] = image.images["he"]
    pp.tile(sdata, target_px=20, min_tissue=0)
    pp.embed(sdata, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=0)
    red = contract.embeddings(sdata, EXTRACTOR)[:, 0]
    table = sdata.tables["counts"]
    table.X = random.poisson(np.exp(2 + red)[:, None] * np.ones(table.n_vars)).astype(np.float32)
    model = tl.fit_nb(sdata, genes=list(table.var_names[:2]), extractor=EXTRACTOR, n_members=2, max_epochs=10)
    tl.predict(sdata, model)
    centers = np.asarray(sdata.tables["tiles"].obsm["spatial"])
    discs = shapely.buffer(shapely.points(np.concatenate([centers - 4, centers + np.array([3, -5])])), 3)
    sdata.shapes["nuclei"] = contract.build_shapes(geopandas.GeoDataFrame(geometry=discs), mpp=None)
    return sdata, model


def test_scores_lie_beside_limes_and_maps_add_up(fitted: tuple) -> None:
    sdata, model = fitted
    gene = model.genes[0]
    tl.explain(sdata, model, gene, tiles=[9, 27], n_samples=20)
    lime = sdata.shapes["nuclei_explained"].copy()
    maps = tl.saliency(sdata, model, gene, tiles=[27, 30], n_steps=32)["made"]
    assert {tile: one.shape for tile, one in maps.items()} == {27: (1, 20, 20), 30: (1, 20, 20)}
    frame = sdata.shapes["nuclei_explained"]
    together = frame[frame[f"lime_{gene}"].notna()]
    np.testing.assert_array_equal(together[f"lime_{gene}"], lime[f"lime_{gene}"])
    assert frame["tile"].isin([9, 27, 30]).all()
    assert frame.query("tile == 9")[f"saliency_{gene}"].isna().all()
    assert frame.query("tile != 9")[f"saliency_{gene}"].notna().all()
    assert frame.query("tile == 30")[f"lime_{gene}"].isna().all()


def test_integrated_gradients_of_everything_is_what_the_tile_adds(fitted: tuple) -> None:
    """One nucleus that covers a wide field of view carries all of the difference to a white tile."""
    sdata, model = fitted
    gene = model.genes[0]
    x, y = sdata.tables["tiles"].obsm["spatial"][27]
    sdata.shapes["whole"] = contract.build_shapes(
        geopandas.GeoDataFrame(geometry=[shapely.box(x - 50, y - 50, x + 50, y + 50)]), mpp=None
    )
    if "nuclei_explained" in sdata.shapes:  # of another test, where one ran before
        del sdata.shapes["nuclei_explained"]
    tl.saliency(sdata, model, gene, tiles=[27], n_steps=64, shapes_key="whole")
    found = sdata.shapes["nuclei_explained"][f"saliency_{gene}"].iloc[0]
    stand_ins = model.stand_ins(sdata, section="made")
    row = int(np.flatnonzero(sdata.tables["tiles"].obs.query("keep")["instance_id"] == 27)[0])
    white = models.get_extractor(EXTRACTOR)(np.full((1, 20, 20, 3), 255, np.uint8))
    values = [
        stand_ins.outputs(row, [own], np.array([0]))["mean"][0, 0]
        for own in (stand_ins.embedded[0].own[row : row + 1], np.tile(white, 2))
    ]
    assert found == pytest.approx(values[0] - values[1], rel=1e-3)


def test_grad_cam_is_not_negative_and_refusals(fitted: tuple) -> None:
    sdata, model = fitted
    maps = tl.saliency(sdata, model, list(model.genes), tiles=[27], method="grad_cam")["made"][27]
    assert maps.shape == (2, 20, 20)
    assert maps.min() >= 0 < maps.max()
    with pytest.raises(ValueError, match='"grad_cam", found'):
        tl.saliency(sdata, model, model.genes[0], tiles=[27], method="occlusion")
    models.register_extractor("plain", lambda tiles: tiles.mean(axis=(1, 2)), input_size=None, embedding_size=3)
    pp.embed(sdata, "plain", fields_of_view=(1.0,), context_rings=0)
    other = tl.fit_nb(sdata, genes=list(model.genes), extractor="plain", n_members=1, max_epochs=1)
    with pytest.raises(TypeError, match="not a Flax module"):
        tl.saliency(sdata, other, model.genes[0], tiles=[27])


@pytest.fixture(scope="module")
def mapped(fitted: tuple) -> tuple:
    """The section, the model, and the maps of two genes on two tiles."""
    sdata, model = fitted
    return sdata, model, tl.saliency(sdata, model, model.genes, tiles=[27, 30], n_steps=2)["made"]


def test_maps_are_images_placed_on_their_tiles(mapped: tuple, tmp_path: Path) -> None:
    sdata, model, maps = mapped
    assert contract.tile_map_names(sdata) == ["saliency_27", "saliency_30"]
    squares = contract.tile_squares(sdata)
    sdata.write(tmp_path / "section.zarr")
    for section in (sdata, spatialdata.read_zarr(tmp_path / "section.zarr")):
        for tile, one in contract.tile_maps(section).items():
            np.testing.assert_array_equal(one.values, maps[tile])
            assert one.genes == tuple(model.genes)
            left, top, right, bottom = squares[tile]
            np.testing.assert_allclose(one.extent, (left, right, bottom, top), atol=1e-6)
        # spatialdata's own transformation
        extent = spatialdata.get_extent(section.images["saliency_27"])
        np.testing.assert_allclose([*extent["x"], *extent["y"]], squares[27][[0, 2, 1, 3]], atol=1e-6)
    # later maps replace them, and new tiles remove them; they are no H&E
    copy = shallow_copy(sdata)
    contract.write_tile_maps(copy, {9: contract.tile_maps(sdata)[27]})
    assert contract.tile_map_names(copy) == ["saliency_9"]
    assert contract.rgb_images(copy) == ["he"]
    with pytest.warns(UserWarning, match=r"earlier tiles are removed: .*saliency_9"):
        pp.tile(copy, target_px=20, min_tissue=0)
    assert contract.tile_map_names(copy) == []


def test_the_picture_of_maps(mapped: tuple) -> None:
    sdata, model, maps = mapped
    grid = pl.saliency(sdata, model.genes, smooth=0)
    assert grid.shape == (2, 2)
    for row, gene in enumerate(model.genes):
        limits = {panel.images[1].get_clim() for panel in grid[row]}
        assert len(limits) == 1
        assert -min(limits)[0] == min(limits)[1] > 0
        for panel, tile in zip(grid[row], (27, 30), strict=True):
            drawn = panel.images[1]
            np.testing.assert_array_equal(drawn.get_array(), maps[tile][row])
            np.testing.assert_allclose(drawn.get_extent(), contract.tile_maps(sdata, [tile])[tile].extent)
            assert f"{gene}, tile {tile}" in panel.get_title()
            # nothing is drawn where the map is zero, most where it is largest
            strongest = np.argmax(np.abs(maps[tile][row]))
            assert np.asarray(drawn.get_alpha()).ravel()[strongest] == np.asarray(drawn.get_alpha()).max() > 0
    with pytest.raises(KeyError, match=r"Found of tiles \[27, 30\], none of \[3\]"):
        pl.saliency(sdata, model.genes[0], tiles=[3])
    with pytest.raises(KeyError, match="Found no map of 'NONE' on tile 27"):
        pl.saliency(sdata, "NONE")
    with pytest.raises(ValueError, match="`smooth` of 0 or more, found -1"):
        pl.saliency(sdata, model.genes[0], smooth=-1)
    plt.close("all")
