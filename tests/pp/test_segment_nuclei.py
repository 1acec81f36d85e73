"""Nuclei of a section: found where they were painted, counted once, whatever the blocks; the call's errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract, pp
from stimage_sd._cache import cache_dir
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint, scatter_nuclei
from stimage_sd.image.instance_scores import instance_scores
from stimage_sd.stream.nuclei_blocks import Nuclei, PackedNuclei, _polygons, lay_blocks, stitch

INK, PAPER = (90, 60, 150), (220, 140, 200)
SIZE = 1600


@pytest.fixture(scope="module")
def picture_of_tissue() -> np.ndarray:
    """A painted tissue of 0.5 µm a pixel, ``uint8 (SIZE, SIZE, 3)``."""
    strips = paint(Tissue(SIZE, 0.5, 3), reach=0.9, stain=make_stain(None), strip=400)
    return np.concatenate(list(strips))


@pytest.fixture
def tissue(picture_of_tissue: np.ndarray, make_slide: Callable[..., SpatialData]) -> SpatialData:
    return make_slide(picture_of_tissue, mpp=0.5)


@pytest.fixture
def dots(make_slide: Callable[..., SpatialData]) -> SpatialData:
    """Three nuclei of 50 µm² on tissue without other things."""
    return make_slide(dotted([(60, 150), (150, 150), (240, 150)]), mpp=0.5)


@pytest.fixture(autouse=True)
def _no_stores_are_left(_own_cache: None) -> Iterator[None]:
    folder = cache_dir() / "stream"
    yield
    assert not folder.is_dir() or not list(folder.iterdir())


def dotted(places: list[tuple[int, int]], side: int = 300, radius: int = 8) -> np.ndarray:
    image = np.full((side, side, 3), PAPER, np.uint8)
    for place in places:
        cv2.circle(image, place, radius, INK, -1)
    return image


def centers(sdata: SpatialData, key: str = "nuclei") -> np.ndarray:
    points = sdata.shapes[key].geometry.centroid
    return np.stack([points.x, points.y], axis=1)


def dark(images: np.ndarray) -> np.ndarray:
    """A method of one's own: connected dark pixels."""
    return np.stack([ndimage.label(image[..., 0] < 150)[0] for image in images]).astype(np.int32)


# --------------------------------------------------------------------------------------------------
# what is found


def test_three_dots(dots: SpatialData) -> None:
    pp.segment_nuclei(dots)
    nuclei = dots.shapes["nuclei"]
    np.testing.assert_allclose(centers(dots), [[60.5, 150.5], [150.5, 150.5], [240.5, 150.5]], atol=0.3)
    np.testing.assert_allclose(nuclei["area"], np.pi * 64 * 0.25, rtol=0.06)
    np.testing.assert_allclose(nuclei["area"], nuclei.geometry.area * 0.25)
    assert (nuclei["eccentricity"] < 0.25).all()
    # the mean over the nucleus of the ink's own hematoxylin
    ink = np.full((1, 1, 3), INK, np.uint8)
    from stimage_sd.image.nuclear_contrast import hematoxylin

    np.testing.assert_allclose(nuclei["hematoxylin"], hematoxylin(np.moveaxis(ink, -1, 0)).item(), rtol=0.06)
    assert nuclei.index.tolist() == [0, 1, 2]
    assert list(nuclei.columns) == ["area", "eccentricity", "hematoxylin", "geometry"]
    assert contract.info(dots)["history"][-1]["step"] == "pp.segment_nuclei"
    assert contract.info(dots)["history"][-1]["parameters"]["n_nuclei"] == 3


def test_painted_nuclei_are_found(tissue: SpatialData) -> None:
    pp.segment_nuclei(tissue)
    truth = scatter_nuclei(Tissue(SIZE, 0.5, 3), 0.9)
    found = tissue.shapes["nuclei"]
    # painted nuclei may lie on top of each other
    crowd = cKDTree(truth[:, :2]).query(truth[:, :2], k=2)[0][:, 1]
    alone = truth[crowd > 1.5 * truth[:, 2]]
    distance, nearest = cKDTree(centers(tissue)).query(alone[:, :2])
    assert len(alone) > 300
    assert (distance < 3).mean() > 0.9
    hits = distance < 3
    painted = np.pi * (alone[hits, 2] + 0.5) * (alone[hits, 3] + 0.5) * 0.25  # with the line around it
    assert np.median(found["area"].to_numpy()[nearest[hits]] / painted) == pytest.approx(1, abs=0.2)
    assert len(found) == pytest.approx(len(truth), rel=0.2)
    assert found.geometry.is_valid.all()
    assert set(found.geom_type) == {"Polygon"}
    assert found.index.is_unique
    assert (shapely.get_num_interior_rings(found.geometry) == 0).all()


@pytest.mark.parametrize("block_size", [200, 333, 5000])
def test_the_blocks_do_not_matter(tissue: SpatialData, block_size: int) -> None:
    pp.segment_nuclei(tissue)
    pp.segment_nuclei(tissue, block_size=block_size, key_added="other")
    one, other = tissue.shapes["nuclei"], tissue.shapes["other"]
    assert len(other) == pytest.approx(len(one), rel=0.005)
    distance = cKDTree(centers(tissue)).query(centers(tissue, "other"))[0]
    assert (distance < 0.5).mean() > 0.995
    # nothing is doubled: no two have more than a border in common
    first, second = shapely.STRtree(other.geometry).query(other.geometry, predicate="intersects")
    pairs = first < second
    shared = shapely.area(
        shapely.intersection(other.geometry.values[first[pairs]], other.geometry.values[second[pairs]])
    )
    assert (shared < 0.3 * other.geometry.area.min()).all()


def test_a_shifted_slide_has_as_many(picture_of_tissue: np.ndarray, make_slide: Callable[..., SpatialData]) -> None:
    glass = np.full((SIZE + 256, SIZE + 256, 3), 244, np.uint8)
    counts = []
    for shift in (0, 128):
        moved = glass.copy()
        moved[shift : shift + SIZE, shift : shift + SIZE] = picture_of_tissue
        sdata = make_slide(moved, mpp=0.5)
        pp.segment_nuclei(sdata, block_size=256)
        counts.append(len(sdata.shapes["nuclei"]))
    assert counts[1] == pytest.approx(counts[0], rel=0.005)


def test_nuclei_that_touch_at_a_seam_are_counted_once(make_slide: Callable[..., SpatialData]) -> None:
    # blocks of 100 px: the core of the first ends at 100 + margin
    blocks = lay_blocks(400, 400, downsample=1, core=100, margin=64)
    seam = int(blocks.cores[0, 2])
    places = [(seam + offset, y) for offset, y in zip(range(-8, 9, 2), range(30, 400, 40), strict=False)]
    places += [(x, seam) for x in (230, 247)]  # two that touch each other on a seam
    sdata = make_slide(dotted(places, side=400), mpp=0.5)
    pp.segment_nuclei(sdata, block_size=100)
    found = centers(sdata)
    assert len(found) == len(places)
    assert cKDTree(found).query(np.array(places) + 0.5)[0].max() < 1.5


def test_working_resolution(picture_of_tissue: np.ndarray, make_slide: Callable[..., SpatialData]) -> None:
    """A slide of half the micrometers a pixel has the same nuclei, at the same places."""
    part = picture_of_tissue[500:1000, 500:1000]
    coarse = make_slide(part, mpp=0.5)
    fine = make_slide(cv2.resize(part, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST), mpp=0.25)
    for sdata in (coarse, fine):
        pp.segment_nuclei(sdata)
    np.testing.assert_allclose(centers(fine) / 2, centers(coarse), atol=1e-3)
    np.testing.assert_allclose(fine.shapes["nuclei"]["area"], coarse.shapes["nuclei"]["area"])
    assert contract.info(fine)["history"][-1]["parameters"]["downsample"] == 2


def test_without_a_resolution_areas_are_pixels(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(dotted([(60, 150), (200, 100)]))
    pp.segment_nuclei(sdata, nucleus_px=16)
    np.testing.assert_allclose(sdata.shapes["nuclei"]["area"], np.pi * 64, rtol=0.06)
    pp.segment_nuclei(sdata, key_added="default")
    assert len(sdata.shapes["default"]) == 2


@pytest.mark.parametrize("size", [(40, 60), (130, 50), (33, 500)])
def test_small_and_narrow_images(size: tuple[int, int], make_slide: Callable[..., SpatialData]) -> None:
    image = np.full((*size, 3), PAPER, np.uint8)
    cv2.circle(image, (20, 20), 8, INK, -1)
    cv2.circle(image, (size[1] - 1, size[0] - 14), 7, INK, -1)  # cut by the border
    sdata = make_slide(image, mpp=0.5)
    pp.segment_nuclei(sdata)
    left, top, right, bottom = sdata.shapes["nuclei"].total_bounds
    assert len(sdata.shapes["nuclei"]) == 2
    assert (left, top) >= (0, 0)
    assert right <= size[1]
    assert bottom <= size[0]


def test_real_patch_through_the_section(data_dir: Path, make_slide: Callable[..., SpatialData]) -> None:
    patches = np.load(data_dir / "nuclei" / "patches.npz")
    image, truth = patches["images"][3], patches["instances"][3]
    sdata = make_slide(image, mpp=0.25)
    pp.segment_nuclei(sdata, downsample=1)
    labels = np.zeros(truth.shape, np.int32)
    for number, outline in enumerate(sdata.shapes["nuclei"].geometry, 1):
        cv2.fillPoly(labels, [np.floor(np.array(outline.exterior.coords)).astype(np.int32)], number)
    assert instance_scores(truth, labels).f1 > 0.55


# --------------------------------------------------------------------------------------------------
# where it looks


def test_tiles_hold_what_the_whole_section_has_there(tissue: SpatialData) -> None:
    pp.tile(tissue, layout="grid", size_um=100)
    table = contract.tiles(tissue)
    inner = table.obs_names[table.obs["tissue_fraction"] == 1][[3, 4, 11]]
    pp.segment_nuclei(tissue)
    pp.segment_nuclei(tissue, list(inner), key_added="by_name", block_size=300)
    numbers = table.obs.loc[inner, "instance_id"].tolist()
    pp.segment_nuclei(tissue, numbers, key_added="by_number", block_size=300)
    squares = contract.tile_squares(tissue, list(inner))
    inside = np.zeros(len(tissue.shapes["nuclei"]), bool)
    for left, top, right, bottom in squares:
        x, y = centers(tissue).T
        inside |= (x > left) & (x < right) & (y > top) & (y < bottom)
    assert len(tissue.shapes["by_name"]) == pytest.approx(inside.sum(), abs=3)
    distance = cKDTree(centers(tissue)).query(centers(tissue, "by_name"))[0]
    assert distance.max() < 0.5
    assert tissue.shapes["by_number"].equals(tissue.shapes["by_name"])


def test_only_tissue_is_looked_at(counted_image: Callable, make_slide: Callable[..., SpatialData]) -> None:
    image = np.full((1024, 1024, 3), 250, np.uint8)
    image[:300, :300] = dotted([(100, 100), (200, 150)])
    counted = counted_image(1024, 1024, image=image, n_levels=1)
    sdata = make_slide(counted.levels, mpp=0.5)
    pp.tissue_mask(sdata)
    counted.reads.clear()
    pp.segment_nuclei(sdata, block_size=128)
    assert len(sdata.shapes["nuclei"]) == 2
    # once for what each of two runs is recognized by: the sample's, and that over the blocks
    assert max(times for chunk, times in counted.reads.items() if max(chunk[1:]) > 4) <= 2


def test_off_tissue_nothing_counts_and_tiles_do_without(dots: SpatialData) -> None:
    pp.tile(dots, layout="grid", size_um=50)
    table = contract.tiles(dots)
    tiles_left = list(table.obs_names[table.obs["x"] < 100])
    del dots.labels["tissue"]
    pp.segment_nuclei(dots, tiles_left)
    np.testing.assert_allclose(centers(dots), [[60.5, 150.5]], atol=0.3)
    assert "tissue" not in dots.labels
    left = np.zeros((300, 300), bool)
    left[:, :100] = True
    contract.write_tissue(dots, left, downsample=(1.0, 1.0))
    pp.segment_nuclei(dots, key_added="left")
    assert len(dots.shapes["left"]) == 1


# --------------------------------------------------------------------------------------------------
# methods


def test_a_function_of_ones_own(dots: SpatialData) -> None:
    pp.segment_nuclei(dots, method=dark)
    np.testing.assert_allclose(centers(dots), [[60.5, 150.5], [150.5, 150.5], [240.5, 150.5]], atol=0.3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda images: images[..., 0].astype(float), "integer labels of shape .* found float64"),
        (lambda images: np.zeros((1, 3, 3), int), r"found int64 of shape \(1, 3, 3\)"),
        (lambda images: np.full(images.shape[:3], -1), "labels of at least 0, found -1"),
        (lambda images: np.arange(images[..., 0].size).reshape(images.shape[:3]) + 1, "more than there is room for"),
    ],
)
def test_functions_that_give_no_label_maps(
    dots: SpatialData, labels: Callable, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        pp.segment_nuclei(dots, method=labels)
    assert "nuclei" not in dots.shapes
    assert not list((tmp_path / "stream").glob("*/*.zst"))  # nothing that a later run would go on from
    monkeypatch.undo()


def test_a_given_threshold(dots: SpatialData) -> None:
    pp.segment_nuclei(dots, threshold=0.9)
    assert contract.info(dots)["history"][-1]["parameters"]["threshold"] == 0.9
    with pytest.raises(ValueError, match=r"Found no nuclei on 'he'.*'threshold': 9.0"):
        pp.segment_nuclei(dots, threshold=9.0, key_added="none")
    assert "none" not in dots.shapes


def test_an_interrupted_run_goes_on(tissue: SpatialData) -> None:
    calls = {"n": 0, "stop": 5}

    def stopping(images: np.ndarray) -> np.ndarray:
        calls["n"] += 1
        if calls["n"] > calls["stop"]:
            raise RuntimeError("stopped")
        return dark(images)

    stopping.key = "dark"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="stopped"):
        pp.segment_nuclei(tissue, method=stopping, block_size=300, n_jobs=1)
    assert "nuclei" not in tissue.shapes
    calls.update(n=0, stop=10**6)
    pp.segment_nuclei(tissue, method=stopping, block_size=300, n_jobs=1)
    resumed = calls["n"]
    calls["n"] = 0
    pp.segment_nuclei(tissue, method=stopping, block_size=300, n_jobs=2, key_added="anew")
    assert resumed == calls["n"] - 5
    assert tissue.shapes["nuclei"].equals(tissue.shapes["anew"])


# --------------------------------------------------------------------------------------------------
# in the section


def test_it_survives_a_store(dots: SpatialData, tmp_path: Path) -> None:
    pp.segment_nuclei(dots)
    dots.write(tmp_path / "section.zarr")
    again = sd.read_zarr(tmp_path / "section.zarr")
    assert again.shapes["nuclei"].equals(dots.shapes["nuclei"])
    matrix = get_transformation(again.shapes["nuclei"], "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(np.diag(matrix)[:2], 0.5)


def test_errors(dots: SpatialData) -> None:
    with pytest.raises(ValueError, match='`method` to be "watershed", "cellpose" or a function, found \'hovernet\''):
        pp.segment_nuclei(dots, method="hovernet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='Pass it with `method="cellpose"`'):
        pp.segment_nuclei(dots, model="nuclei")
    with pytest.raises(ValueError, match='Pass it with `method="watershed"`'):
        pp.segment_nuclei(dots, method=dark, threshold=1.0)
    with pytest.raises(ValueError, match="`threshold` as a positive optical density, found -1"):
        pp.segment_nuclei(dots, threshold=-1)
    with pytest.raises(ValueError, match=r"`nucleus_px` to be a positive number of pixels, found 0.0"):
        pp.segment_nuclei(dots, nucleus_px=0)
    with pytest.raises(ValueError, match="`downsample` of at least 1, found 0"):
        pp.segment_nuclei(dots, downsample=0)
    with pytest.raises(ValueError, match=r"nuclei of at least 4 px to be looked for, found 16.0 px at full"):
        pp.segment_nuclei(dots, downsample=8)
    with pytest.raises(ValueError, match=r"`block_size` of at least 4 diameters of a nucleus \(64 px\), found 20"):
        pp.segment_nuclei(dots, block_size=20)
    with pytest.raises(KeyError, match=r"Run `stimage_sd.pp.tile\(sdata\)` first"):
        pp.segment_nuclei(dots, ["tile_0"])
    pp.tile(dots, layout="grid", size_um=50)
    with pytest.raises(KeyError, match="names of tiles of section 'slide', such as 'tile_0'; found \\['nowhere'\\]"):
        pp.segment_nuclei(dots, ["tile_0", "nowhere"])
    with pytest.raises(KeyError, match="found none"):
        pp.segment_nuclei(dots, [])
    assert list(dots.shapes) == ["tile_squares"]


def test_nuclei_that_are_there_are_kept(dots: SpatialData) -> None:
    pp.segment_nuclei(dots)
    before = dots.shapes["nuclei"]
    with pytest.raises(ValueError, match=r"segment_nuclei\(sdata, key_added='nuclei_2'\)`, or .*`del sdata.shapes"):
        pp.segment_nuclei(dots, method=dark)
    assert dots.shapes["nuclei"] is before
    pp.segment_nuclei(dots, key_added="nuclei_2")
    assert len(dots.shapes["nuclei_2"]) == 3


# --------------------------------------------------------------------------------------------------
# blocks


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    downsample=st.integers(1, 3),
    core=st.integers(8, 200),
    margin=st.integers(0, 60),
)
def test_cores_cover_the_image_once(width: int, height: int, downsample: int, core: int, margin: int) -> None:
    blocks = lay_blocks(width, height, downsample=downsample, core=core, margin=margin)
    cover = np.zeros((height, width), int)
    for left, top, right, bottom in blocks.cores.astype(int):
        cover[top:bottom, left:right] += 1
    assert (cover == 1).all()
    side = blocks.side * downsample
    if min(width, height) >= downsample:
        assert (blocks.corners >= 0).all()
        assert (blocks.corners + side <= [width, height]).all()
    inner = min(margin, blocks.side // 4) * downsample
    for (x, y), (left, top, right, bottom) in zip(blocks.corners, blocks.cores, strict=True):
        # the margin is seen on every side that is not the image's border
        assert x == 0 or left - x >= inner
        assert y == 0 or top - y >= inner
        assert right == width or x + side - right >= inner
        assert bottom == height or y + side - bottom >= inner


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_polygons_of_any_labels_are_valid(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = ndimage.label(random.random((20, 20)) < 0.5, np.ones((3, 3)))[0]
    packed = PackedNuclei(lambda images: labels[None], 4000)(np.zeros((1, 20, 20, 3), np.uint8))[0]
    assert packed[0] == labels.max()
    n_points = packed[1 : 1 + 5 * labels.max()].reshape(-1, 5)[:, 0].astype(int)
    start = 1 + 5 * labels.max()
    points = packed[start : start + 2 * n_points.sum()].reshape(-1, 2)
    polygons = _polygons(points + 0.5, n_points)
    assert shapely.is_valid(polygons).all()
    assert (shapely.get_type_id(polygons) == 3).all()
    assert (shapely.area(polygons) >= 0.99).all()


def test_stitch_keeps_the_larger_and_lets_neighbors_be() -> None:
    def part(*boxes: tuple[float, float, float, float]) -> Nuclei:
        outlines = np.array([shapely.box(*box) for box in boxes], dtype=object)
        middle = np.array([[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in boxes]).reshape(-1, 2)
        return Nuclei(outlines, middle, np.zeros(len(boxes)), np.arange(float(len(boxes))), np.empty((len(boxes), 0)))

    merged = stitch([part((0, 0, 10, 10), (40, 0, 50, 10)), part((2, 0, 14, 10), (49, 0, 60, 10)), part()])
    assert shapely.bounds(merged.outlines).tolist() == [[2, 0, 14, 10], [40, 0, 50, 10], [49, 0, 60, 10]]
    assert len(stitch([part(), part()]).centers) == 0


def test_what_is_packed_travels() -> None:
    packed = PackedNuclei(dark, 1000)
    image = dotted([(30, 30)], side=60)[None]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed))(image), packed(image))
