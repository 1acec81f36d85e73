"""Objects of every origin, in every state: the same tissue gives the same tiles and the same predictions.

Rows are origins, columns what users do to an object before they come here. What is true is painted, not read: positions
of the units in the pixels of the image as it is, and the image itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import peers
import pytest
from anndata import AnnData
from peers import Peer
from spatialdata import SpatialData

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd.models import NBModel
from stimage_sd.stream.driver import run_over_tiles

EXTRACTOR, SIZE_UM = "tissue_statistics", 55.0


def from_anndata(bundles: Path, *, hires: bool) -> Peer:
    """What `io.from_anndata` makes of squidpy's analysis, with the full image, or the one that is inside."""
    peer = peers.hires_only(bundles) if hires else peers.squidpy_visium(bundles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the resolution of the image inside
        section = sti.io.from_anndata(peer.data, None if hires else peer.array)
    return replace(
        peer, data=section, image="he", shapes="spots", table="counts", coordinate_system="global", array=None
    )


#: by origin: how the object is made, and what has to be named to adopt it
ORIGINS: dict[str, tuple[Callable[[Path], Peer], dict]] = {
    "io.visium": (peers.own_visium, {}),
    "spatialdata_io.visium": (peers.io_visium, {}),
    "spatialdata_io.visium, hires": (lambda bundles: peers.io_visium(bundles, full=False), {}),
    "spatialdata_io.visium_hd": (peers.io_visium_hd, {"table": "square_016um"}),
    "spatialdata_io.visium_hd, no name": (
        lambda bundles: peers.io_visium_hd(bundles, name=None, squares=False),
        {"table": "square_016um"},
    ),
    "spatialdata_io.xenium": (peers.io_xenium, {}),
    "spatialdata_io.xenium, circles": (lambda bundles: peers.io_xenium(bundles, circles=True), {}),
    "spatialdata_io.codex": (peers.io_codex, {"mpp": peers.MPP}),
    "spatialdata_io.merscope": (peers.io_merscope, {}),
    "spatialdata_io.cosmx": (peers.io_cosmx, {"image": "he", "mpp": peers.MPP}),
    "sopa": (peers.sopa_cells, {}),
    "io.from_anndata": (lambda bundles: from_anndata(bundles, hires=False), {}),
    "io.from_anndata, hires": (lambda bundles: from_anndata(bundles, hires=True), {}),
    "concatenated": (lambda bundles: peers.cohort(bundles)["two"], {}),
    "concatenated, one system": (lambda bundles: peers.cohort(bundles, shared_coordinates=True)["two"], {}),
}


def box(peer: Peer) -> tuple[np.ndarray, np.ndarray]:
    """Low and high corner of a box around half of the tissue, whole numbers, in the shared coordinate system."""
    places = peers._moved(peer.pixels, peers.matrix(peer.data.images[peer.image], peer.coordinate_system)).to_numpy()
    low, high = places.min(axis=0), places.max(axis=0)
    return np.floor(low + 0.13 * (high - low)), np.ceil(low + 0.87 * (high - low))


def polygon(peer: Peer) -> list[tuple[float, float]]:
    (left, top), (right, bottom) = (corner.tolist() for corner in box(peer))
    return [(left, top), (right, top), (right, (top + bottom) / 2), ((left + right) / 2, bottom), (left, bottom)]


STATES: dict[str, Callable[[Peer, Path], Peer]] = {
    "as read": lambda peer, path: peer,
    "cropped by box": lambda peer, path: peers.crop_by_box(peer, *box(peer)),
    "cropped by polygon": lambda peer, path: peers.crop_by_polygon(peer, polygon(peer)),
    "coordinates turned": lambda peer, path: peers.rotate_coordinates(peer),
    "array turned": lambda peer, path: peers.rotate_array(peer, quarters=1, mirror=True),
    "written and read": lambda peer, path: peers.write_and_read(peer, path / "object.zarr"),
    "log-normalized": lambda peer, path: peers.lognormalize(peer),
}
#: spatialdata-io's CODEX table cannot be written, and holds intensities, which have no counts in a layer
LEFT_OUT = {("spatialdata_io.codex", "written and read"), ("spatialdata_io.codex", "log-normalized")}


def adopted(peer: Peer, options: dict) -> SpatialData:
    """The section of a peer, out of several where there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sti.io.from_spatialdata(peer.data, **options)
    if isinstance(found, SpatialData):
        return found
    holding = [view for view in found.values() if peer.pixels.index.isin(contract.find_units(view).names).any()]
    return holding[-1]


def tiled(section: SpatialData) -> SpatialData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spots outside of a crop
        sti.pp.tissue_mask(section, method="otsu")  # all tiles are kept, and this is quick
        sti.pp.tile(section, layout="spots", size_um=SIZE_UM, min_tissue=0.0)
    return section


def pixels(section: SpatialData, centers: np.ndarray, side: int) -> np.ndarray:
    """Tiles at full resolution, as every step cuts them, ``uint8 (n, side, side, 3)``."""
    cut = run_over_tiles(
        contract.levels(section, contract.image_name(section)), centers, np.asarray, sides=[side], target=side,
        key="pixels", shape=(side, side, 3),
    )  # fmt: skip
    return cut[:, 0].astype(np.uint8)


#: the newest versions of the tools are tried on the objects as they are read
CELLS = [
    pytest.param(*cell, marks=[] if cell[1] == "as read" else pytest.mark.slow)
    for cell in product(ORIGINS, STATES)
    if cell not in LEFT_OUT
]


def quick(states: list[str]) -> list[Any]:
    """States as parameters; the newest versions of the tools are tried on objects as they are read, and on the disk."""
    return [
        pytest.param(state, marks=[] if state in ("as read", "written and read") else pytest.mark.slow)
        for state in states
    ]


@pytest.mark.parametrize(("origin", "state"), CELLS)
def test_tiles_show_what_is_painted_there(origin: str, state: str, bundles: Path, tmp_path: Path) -> None:
    make, options = ORIGINS[origin]
    peer = STATES[state](make(bundles), tmp_path)
    section = tiled(adopted(peer, options))
    table = contract.tiles(section)
    spots = table.obs["spot_id"].to_numpy().astype(str)
    centers, side = contract.tile_geometry(section)
    assert len(spots) >= min(8, len(peer.pixels) // 3)
    assert side * peer.mpp == pytest.approx(SIZE_UM, rel=0.005)
    apart = centers - peer.pixels.loc[spots].to_numpy()
    # the one pixel by which SpatialData misplaces a crop that does not begin on a whole pixel of the image
    shift = np.round(np.median(apart, axis=0)) if "crop" in state else np.zeros(2)
    if "cosmx" in origin:  # its fields cut cells, and its place of a field is an estimate
        assert np.quantile(np.abs(apart - shift).max(axis=1), 0.9) < 3.0
        return
    assert np.abs(shift).max() <= (0 if "visium" in origin and "hires" not in origin else 1)
    np.testing.assert_allclose(apart - np.broadcast_to(shift, apart.shape), 0, atol=1e-3)
    some = np.random.default_rng(0).permutation(len(spots))[:50]
    found, size = pixels(section, centers[some], round(side)), round(side)
    padded = np.pad(peer.picture(), ((size, size), (size, size), (0, 0)), mode="reflect")
    corners = np.floor(peer.pixels.loc[spots[some]].to_numpy() + shift - size / 2 + 0.5 + 1e-6).astype(int) + size
    expected = np.stack([padded[y : y + size, x : x + size] for x, y in corners])
    same = (found == expected).reshape(len(found), -1).all(axis=1)
    assert same.mean() > 0.98  # a center between two pixels may be rounded to either


def fitted(bundles: Path) -> tuple[SpatialData, NBModel]:
    """The package's own reader's section, and a model of it."""
    section = tiled(peers.own_visium(bundles).data)
    sti.pp.embed(section, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
    genes = list(section.tables["counts"].var_names[:4])
    model = sti.tl.fit_nb(section, genes=genes, extractor=EXTRACTOR, n_members=2, max_epochs=20, n_components=8)
    sti.tl.predict(section, model)
    return section, model


@pytest.fixture(scope="module")
def model(bundles: Path, _session_cache: None) -> NBModel:
    return fitted(bundles)[1]


def predicted(section: SpatialData, model: NBModel) -> AnnData:
    sti.pp.embed(section, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
    sti.tl.predict(section, model)
    return section.tables["predictions"]


@pytest.mark.parametrize("state", quick([state for state in STATES if "crop" not in state]))
@pytest.mark.parametrize("origin", ["spatialdata_io.visium", "concatenated"])
def test_predictions_are_those_of_the_own_reader(
    origin: str, state: str, bundles: Path, model: NBModel, tmp_path: Path
) -> None:
    """Embeddings are standardized by section, so that crops are compared by their tiles' pixels."""
    make, options = ORIGINS[origin]
    peer = make(bundles)
    own = predicted(tiled(peer.own()), model)
    theirs = predicted(tiled(adopted(STATES[state](peer, tmp_path), options)), model)
    names = theirs.obs["spot_id"].astype(str).str.removesuffix("-two").to_numpy()
    rows = own.obs["spot_id"].astype(str).to_numpy()
    assert set(names) == set(rows)
    expected = own[np.argsort(rows)].X
    found = theirs[np.argsort(names)].X
    for gene in range(expected.shape[1]):
        assert np.corrcoef(expected[:, gene], found[:, gene])[0, 1] >= 0.99


@pytest.mark.parametrize("state", quick([state for state in STATES if state != "log-normalized"]))
def test_tiles_of_lazyslide_lie_where_they_were_cut(state: str, bundles: Path, tmp_path: Path) -> None:
    """A store states the size of its slide, so that a crop is refused, with the call that mends it."""
    peer = STATES[state](peers.lazyslide_store(bundles, tmp_path), tmp_path)
    if "crop" in state:
        with pytest.raises(ValueError, match=r"The store is of a slide of 1536 x 1536 px.*Pass the original slide"):
            sti.io.from_spatialdata(peer.data)
        section = sti.io.from_spatialdata(peer.data, slide=peers.visium_bundle(bundles) / "image.tif")
        peer = replace(peer, pixels=peer.painted, array=peers.painted_image(bundles))
    else:
        section = sti.io.from_spatialdata(peer.data)
    centers, side = contract.tile_geometry(section)
    # a crop may have its shapes in another order than its table
    true = peer.pixels.loc[peer.data.shapes["tiles"]["tile_id"].astype(str)].to_numpy()
    np.testing.assert_allclose(centers, true, atol=1e-6)
    found = pixels(section, centers[:20], round(side))
    corners = np.round(true[:20] - side / 2).astype(int)
    size = round(side)
    expected = np.stack([peer.picture()[y : y + size, x : x + size] for x, y in corners])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("state", quick(["as read", "cropped by box", "coordinates turned"]))
@pytest.mark.parametrize(
    "origin", ["spatialdata_io.visium, hires", "spatialdata_io.visium_hd", "spatialdata_io.xenium", "io.from_anndata"]
)
def test_peers_draw_predictions_on_the_tissue(
    origin: str, state: str, bundles: Path, model: NBModel, tmp_path: Path
) -> None:
    import squidpy as sq

    pytest.importorskip("spatialdata_plot")  # gives objects their `.pl`
    make, options = ORIGINS[origin]
    peer = STATES[state](make(bundles), tmp_path)
    section = tiled(adopted(peer, options))
    tiles = section.tables["tiles"]
    section.tables["tiles"] = tiles[:: max(1, tiles.n_obs // 30)].copy()
    # newer versions of spatialdata-plot also draw squares without a prediction
    section.shapes["tile_squares"] = section.shapes["tile_squares"].loc[section.tables["tiles"].obs["instance_id"]]
    table = predicted(section, model)
    image, system = str(peer.image), str(peer.coordinate_system)
    matrix = peers.matrix(section.images[image], system)
    reach = np.abs(matrix[:2, :2]).sum(axis=1).max() * contract.tile_geometry(section)[1]

    shown = section.pl.render_images(image).pl.render_shapes(
        "tile_squares", color=model.genes[0], table_name="predictions"
    )
    ax = shown.pl.show(coordinate_systems=system, return_ax=True)
    (squares,) = ax.collections
    middles = np.array([path.vertices[:4].mean(axis=0) for path in squares.get_paths()])
    painted = peer.pixels.loc[table.obs["spot_id"].astype(str)].to_numpy()
    np.testing.assert_allclose(middles, painted @ matrix[:2, :2].T + matrix[:2, 2], atol=0.05 * reach)
    (picture,) = ax.get_images()
    left, right, bottom, top = picture.get_extent()
    ends = (picture.get_transform() - ax.transData).transform([[left, top], [right, bottom]])
    # units at the rim of a crop are kept whole
    assert ((middles >= ends.min(axis=0) - reach / 2) & (middles <= ends.max(axis=0) + reach / 2)).all()

    ax = sq.pl.spatial_scatter(table, color=model.genes[0], return_ax=True)
    (points,) = (each for each in ax.collections if len(each.get_paths()) == table.n_obs)
    shown_at = [(path.vertices.min(axis=0) + path.vertices.max(axis=0)) / 2 for path in points.get_paths()]
    scale = next(iter(table.uns["spatial"].values()))["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_allclose(shown_at, contract.tile_geometry(section)[0] * scale, atol=1)
    height, width = ax.get_images()[0].get_array().shape[:2]
    full = contract.levels(section, contract.image_name(section))[0].sizes
    np.testing.assert_allclose([height, width], [full["y"] * scale, full["x"] * scale], atol=1)
    plt.close("all")
