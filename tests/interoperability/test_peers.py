"""The objects of other tools are what `peers` says of them: truth and texture, not this package, decide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peers
import pytest
import tifffile
from peers import MPP, SIDE, Peer

#: the builders are checked once, on the oldest Python; what is built is used on every version
pytestmark = pytest.mark.slow

BUILDERS = {
    "own_visium": peers.own_visium,
    "io_visium": peers.io_visium,
    "io_visium_hires": lambda bundles: peers.io_visium(bundles, full=False),
    "io_visium_hd": peers.io_visium_hd,
    "io_visium_hd_nameless": lambda bundles: peers.io_visium_hd(bundles, name=None, bin_um=8),
    "io_visium_hd_circles": lambda bundles: peers.io_visium_hd(bundles, squares=False),
    "io_visium_hd_labels": lambda bundles: peers.io_visium_hd(bundles, labels=True),
    "io_xenium": peers.io_xenium,
    "io_xenium_circles": lambda bundles: peers.io_xenium(bundles, circles=True),
    "io_xenium_no_labels": lambda bundles: peers.io_xenium(bundles, labels=False),
    "io_merscope": peers.io_merscope,
    "io_codex": peers.io_codex,
    "sopa_cells": peers.sopa_cells,
    "sopa_colors": lambda bundles: peers.sopa_cells(bundles, genes=False),
}


@pytest.fixture(scope="session")
def made(bundles: Path) -> Callable[[str], Peer]:
    """Objects are read once: nothing that is done to one changes it."""
    return functools.cache(lambda name: BUILDERS[name](bundles))


def check(peer: Peer, bundles: Path, seed: int = peers.SEED, tolerance: float = 0.02) -> None:
    """The transformations lead to the true places, and there the image shows what was painted."""
    if peer.shapes is not None:
        found = peer.resolved()
        # A crop keeps rows of labels whose outlines it drops: of a polygon, all within its bounds.
        assert len(found) > (0.5 if peer.key == "cell_id" else 0.99) * len(peer.pixels)
        np.testing.assert_allclose(found, peer.pixels.loc[found.index], atol=tolerance)
    check_texture(peer, bundles, seed)


def check_texture(peer: Peer, bundles: Path, seed: int = peers.SEED) -> None:
    picture, painted = peer.picture().astype(float), peers.painted_image(bundles, seed).astype(float)
    painted = painted if peer.source is None else tifffile.imread(peer.source).astype(float)
    height, width = picture.shape[:2]
    assert picture.shape[2] == 3
    reach = 2
    inner = peer.pixels[
        (peer.pixels.min(axis=1) > reach + 1) & (peer.pixels["x"] < width - 4) & (peer.pixels["y"] < height - 4)
    ]
    assert len(inner)
    inner = inner.iloc[:: max(1, len(inner) // 200)]
    seen = _means(picture, inner.to_numpy(), reach)
    truth = _means(painted, peer.painted.loc[inner.index].to_numpy(), round(reach * peer.reduction))
    assert np.corrcoef(seen.ravel(), truth.ravel())[0, 1] > 0.97
    assert np.median(np.abs(seen - truth)) < 6.0


def _means(picture: np.ndarray, places: np.ndarray, reach: int) -> np.ndarray:
    corners = np.floor(places).astype(int)
    return np.stack(
        [picture[y - reach : y + reach + 1, x - reach : x + reach + 1].mean(axis=(0, 1)) for x, y in corners]
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_places_and_texture_of_every_peer(name: str, made: Callable[[str], Peer], bundles: Path) -> None:
    peer = made(name)
    check(peer, bundles)
    assert peer.mpp == pytest.approx(MPP * peer.reduction)
    assert peer.data.tables[peer.table].n_obs == len(peer.pixels)


def test_cosmx_has_no_shapes_and_is_mirrored(bundles: Path) -> None:
    peer = peers.io_cosmx(bundles)
    assert not peer.data.shapes
    table = peer.counts
    back = np.linalg.inv(peers.matrix(peer.data.images["he"], "global"))
    assert np.linalg.det(back[:2, :2]) < 0.0
    found = table.obsm["global"] @ back[:2, :2].T + back[:2, 2]
    np.testing.assert_allclose(found, peer.pixels.loc[table.obs_names], atol=0.01)
    check_texture(peer, bundles)


@pytest.mark.parametrize("floats", [False, True])
def test_anndata(floats: bool, bundles: Path) -> None:
    full, reduced = peers.squidpy_visium(bundles, floats=floats), peers.hires_only(bundles, floats=floats)
    np.testing.assert_array_equal(full.data.obsm["spatial"], full.pixels)
    assert full.data.uns["spatial"]["tissue"]["images"]["hires"].dtype == (np.float32 if floats else np.uint8)
    assert list(reduced.data.uns["spatial"]["tissue"]["images"]) == ["hires"]
    for peer in (full, reduced):
        check_texture(peer, bundles)
    scale = reduced.data.uns["spatial"]["tissue"]["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_allclose(reduced.data.obsm["spatial"] * scale, reduced.pixels)


@pytest.mark.parametrize("quality", ["fulres", "hires"])
@pytest.mark.parametrize("nested", [False, True])
def test_stlearn(quality: str, nested: bool, bundles: Path) -> None:
    peer = peers.stlearn_visium(bundles, quality=quality, nested=nested)
    np.testing.assert_allclose(peer.data.obs[["imagecol", "imagerow"]], peer.pixels)
    check_texture(peer, bundles)


@pytest.mark.parametrize("reduced", [False, True])
def test_image_container(reduced: bool, bundles: Path) -> None:
    container, peer = peers.image_container(bundles, reduced=reduced)
    assert container["image"].dims == ("y", "x", "z", "channels")
    np.testing.assert_allclose(peer.data.obsm["spatial"] * container.data.attrs["scale"], peer.pixels)


@pytest.mark.parametrize("image", [False, True])
def test_lazyslide_store(image: bool, bundles: Path, tmp_path: Path) -> None:
    peer = peers.lazyslide_store(bundles, tmp_path, image=image)
    assert list(peer.data.images) == (["wsi", "wsi_thumbnail"] if image else [])
    assert peer.data.attrs["slide_properties"]["mpp"] == MPP
    if image:
        check(peer, bundles)


@pytest.mark.parametrize("options", [{}, {"tables": False}, {"names": "own"}, {"shared_coordinates": True}])
def test_cohort(options: dict, bundles: Path) -> None:
    pair = peers.cohort(bundles, **options)
    assert pair["one"].data is pair["two"].data
    assert not pair["one"].data.attrs
    for peer, seed in zip(pair.values(), (peers.SEED, peers.OTHER_SEED), strict=True):
        check(peer, bundles, seed)


# --------------------------------------------------------------------------------------------------
# what users do

SPATIAL = ["own_visium", "io_visium", "io_visium_hires", "io_visium_hd", "io_xenium", "io_merscope"]


def _box(peer: Peer) -> tuple[np.ndarray, np.ndarray]:
    """A box about the middle half of the image, in the coordinate system, off every grid."""
    forth = peers.matrix(peer.data.images[peer.image], peer.coordinate_system)
    side = peer.picture().shape[0]
    corners = np.array([[x, y] for x in (0.27, 0.81) for y in (0.23, 0.77)]) * side
    placed = corners @ forth[:2, :2].T + forth[:2, 2]
    return np.floor(placed.min(axis=0)) + 1.0, np.floor(placed.max(axis=0))


@pytest.mark.parametrize("name", SPATIAL)
def test_crops(name: str, made: Callable[[str], Peer], bundles: Path, tmp_path: Path) -> None:
    peer = made(name)
    low, high = _box(peer)
    middle = (low + high) / 2.0
    outline = [(low[0], low[1]), (high[0], low[1]), (high[0], middle[1]), (middle[0], high[1])]
    for number, cut in enumerate((peers.crop_by_box(peer, low, high), peers.crop_by_polygon(peer, outline))):
        (tmp_path / str(number)).mkdir()
        assert 0 < len(cut.pixels) < len(peer.pixels)
        assert cut.picture().shape[0] < peer.picture().shape[0]
        # What is stated of an image that is turned or scaled may be a pixel of it off.
        tolerance = 0.02 if name in ("own_visium", "io_visium", "io_visium_hd") else 1.02
        check(cut, bundles, tolerance=tolerance)
        check(peers.write_and_read(cut, tmp_path / str(number)), bundles, tolerance=tolerance)


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("options", [{}, {"mirror": False, "move": False}, {"degrees": 90.0, "scale": 2.0}])
def test_rotated_coordinates(name: str, options: dict, made: Callable[[str], Peer], bundles: Path) -> None:
    peer = made(name)
    turned = peers.rotate_coordinates(peer, **options)
    assert np.array_equal(turned.picture(), peer.picture())
    check(turned, bundles)
    check(peer, bundles)


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize(("quarters", "mirror"), [(1, False), (2, True), (3, False)])
def test_rotated_array(name: str, quarters: int, mirror: bool, made: Callable[[str], Peer], bundles: Path) -> None:
    peer = made(name)
    check(peers.rotate_array(peer, quarters=quarters, mirror=mirror), bundles)


#: of each kind of units one; the table of objects writes and reads all of them
WRITTEN = ["io_visium", "io_visium_hd_labels", "io_xenium_no_labels", "io_merscope", "io_cosmx"]


@pytest.mark.parametrize("name", WRITTEN)
def test_written_and_read(name: str, made: Callable[[str], Peer], bundles: Path, tmp_path: Path) -> None:
    # That of CODEX cannot be written: its region key is no string.
    peer = peers.io_cosmx(bundles) if name == "io_cosmx" else made(name)
    read = peers.write_and_read(peer, tmp_path)
    check(read, bundles)
    assert read.counts.obs_names.equals(peer.counts.obs_names)


def test_lognormalize(bundles: Path) -> None:
    for peer in (peers.io_visium(bundles), peers.squidpy_visium(bundles)):
        changed = peers.lognormalize(peer)
        assert (changed.counts.layers["counts"] != peer.counts.X).nnz == 0
        assert changed.counts.X.max() < 10.0 < peer.counts.X.max()


def test_all_show_the_same_tissue(made: Callable[[str], Peer], bundles: Path) -> None:
    painted = peers.painted_image(bundles).astype(int)
    assert painted.shape == (SIDE, SIDE, 3)
    for name in ("io_visium", "io_visium_hd", "io_xenium", "io_merscope"):
        difference = np.abs(made(name).picture().astype(int) - painted)
        assert np.percentile(difference, 99.9) <= 30
