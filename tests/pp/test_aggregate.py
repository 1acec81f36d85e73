"""Pseudo-spots: counts and means against brute force, where spots lie, what is replaced and what is refused."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dask.array as da
import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import spatialdata
from anndata import AnnData
from dask.delayed import delayed
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation

from stimage_sd import contract, pp
from stimage_sd.pp._aggregate_transcripts import CONTROLS
from stimage_sd.pp._spot_layout import lay_lattice
from stimage_sd.stats.lattice import find_lattice

GENES = ["ACTA2", "CD3E", "ERBB2", "KRT8", "SOX10"]
FEATURES = [*GENES, "NegControlProbe_00042", "antisense_ACTA2", "UnassignedCodeword_0101", "Intergenic_Region_7"]
#: micrometers to pixels: turned by 30 degrees, four pixels a micrometer
TURNED = np.array([[3.4641, -2.0, 2100.0], [2.0, 3.4641, 100.0], [0.0, 0.0, 1.0]])
MPP = 0.25


def draw(n: int, *, extent: float = 1000.0, seed: int = 0) -> pd.DataFrame:
    """Transcripts in micrometers, some of low quality, some controls."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "x": random.uniform(0, extent, n).astype(np.float32),
            "y": random.uniform(0, extent, n).astype(np.float32),
            "z": random.uniform(0, 10, n),
            "feature_name": pd.Categorical.from_codes(random.integers(0, len(FEATURES), n), FEATURES),
            "qv": random.uniform(5, 40, n).astype(np.float32),
        }
    )


def section_of(
    frame: pd.DataFrame | dd.DataFrame,
    *,
    matrix: np.ndarray = TURNED,
    mpp: float | None = MPP,
    parts: int = 3,
    feature_key: str | None = "feature_name",
) -> SpatialData:
    """A section of transcripts alone, as an instrument measured them, placed."""
    lazy = dd.from_pandas(frame, npartitions=parts, sort=False) if isinstance(frame, pd.DataFrame) else frame
    points = PointsModel.parse(
        lazy,
        feature_key=feature_key,
        transformations={contract.INSTRUMENT: Identity()},
        coordinates={"x": "x", "y": "y"},
    )
    sdata = SpatialData(points={contract.TRANSCRIPTS: points})
    contract.register(sdata, sample="made", platform="xenium", image=None, mpp=mpp)
    contract.place_instrument(sdata, matrix)
    return sdata


def brute_force(
    frame: pd.DataFrame, sdata: SpatialData, genes: list[str], *, matrix: np.ndarray = TURNED
) -> np.ndarray:
    """Count by a tree of all transcripts, spot by spot."""
    tree = cKDTree(frame[["x", "y"]].to_numpy(np.float64) @ matrix[:2, :2].T + matrix[:2, 2])
    codes = pd.Index(genes).get_indexer(frame["feature_name"].astype(str))
    spots = sdata.shapes[contract.SPOTS]
    centers, radii = shapely.get_coordinates(spots.geometry.to_numpy()), spots["radius"].to_numpy()
    held = [codes[inside] for inside in tree.query_ball_point(centers, radii)]
    return np.stack([np.bincount(inside[inside >= 0], minlength=len(genes)) for inside in held])


# --------------------------------------------------------------------------------------------------
# transcripts


@pytest.mark.parametrize("onto", ["hex", "grid"])
def test_transcripts_are_counted_as_brute_force_counts_them(onto):
    frame = draw(40_000)
    sdata = section_of(frame)
    pp.aggregate(sdata, onto=onto)
    table = sdata.tables[contract.SPOT_COUNTS]
    assert table.var_names.tolist() == GENES
    assert table.n_obs > 50
    assert sp.isspmatrix_csr(table.X)
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), brute_force(frame[frame["qv"] >= 20], sdata, GENES))
    np.testing.assert_array_equal(table.obs["n_transcripts"], table.X.toarray().sum(axis=1))


def test_the_threshold_and_the_controls_are_the_users():
    frame = draw(20_000)
    sdata = section_of(frame)
    pp.aggregate(sdata, min_quality=None, controls=("antisense_",))
    table = sdata.tables[contract.SPOT_COUNTS]
    genes = sorted(set(FEATURES) - {"antisense_ACTA2"})
    assert table.var_names.tolist() == genes
    np.testing.assert_array_equal(table.X.toarray(), brute_force(frame, sdata, genes))


def test_without_qualities_there_is_no_threshold_and_it_is_said():
    frame = draw(20_000).drop(columns="qv")
    sdata = section_of(frame)
    pp.aggregate(sdata)
    np.testing.assert_array_equal(sdata.tables["spot_counts"].X.toarray(), brute_force(frame, sdata, GENES))
    last = contract.info(sdata)["history"][-1]
    assert last["step"] == "pp.aggregate"
    assert last["parameters"]["min_quality"] is None
    assert last["parameters"]["transcripts_read"] == 20_000


def test_what_is_left_out_is_noted():
    frame = draw(5_000)
    sdata = section_of(frame)
    pp.aggregate(sdata)
    notes = sdata.tables["spot_counts"].uns["aggregation"]
    good = frame[frame["qv"] >= 20]
    controls = good["feature_name"].astype(str).str.startswith(CONTROLS).sum()
    assert (notes["of_low_quality"], notes["of_controls"]) == (len(frame) - len(good), controls)


def test_genes_are_those_of_the_table_of_cells_in_its_order():
    frame = draw(20_000)
    sdata = section_of(frame)
    panel = ["SOX10", "ABSENT", "NegControlProbe_00042", "CD3E"]
    var = pd.DataFrame({"gene_ids": ["E1", "E2", "E3", "E4"]}, index=panel)
    sdata.tables["counts"] = AnnData(sp.csr_matrix((2, 4), dtype=np.int32), var=var)
    pp.aggregate(sdata)
    table = sdata.tables["spot_counts"]
    assert table.var["gene_ids"].to_dict() == {"SOX10": "E1", "ABSENT": "E2", "CD3E": "E4"}
    expected = brute_force(frame[frame["qv"] >= 20], sdata, ["SOX10", "CD3E"])
    np.testing.assert_array_equal(table[:, ["SOX10", "CD3E"]].X.toarray(), expected)
    assert table[:, "ABSENT"].X.nnz == 0
    assert "counts" in sdata.tables


@pytest.mark.slow
@given(cuts=st.lists(st.integers(0, 3_000), max_size=8), n_jobs=st.integers(1, 3), seed=st.integers(0, 5))
def test_partitions_and_workers_do_not_matter(cuts, n_jobs, seed):
    frame = draw(3_000)
    expected = section_of(frame, parts=1)
    pp.aggregate(expected, n_jobs=1)
    order = np.random.default_rng(seed).permutation(len(frame))
    bounds = sorted([0, 3_000, *cuts])
    pieces = [frame.iloc[order[first:last]] for first, last in itertools.pairwise(bounds)]
    # partitions that know other categories than each other, as those of a parquet file may
    pieces = [piece.assign(feature_name=piece["feature_name"].cat.remove_unused_categories()) for piece in pieces]
    lazy = dd.from_delayed([delayed(piece) for piece in pieces], meta=frame.iloc[:0], verify_meta=False)
    sdata = section_of(lazy)
    pp.aggregate(sdata, n_jobs=n_jobs)
    one, other = expected.tables["spot_counts"], sdata.tables["spot_counts"]
    assert one.var_names.tolist() == other.var_names.tolist()
    pd.testing.assert_frame_equal(one.obs, other.obs)
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())


@pytest.mark.parametrize("kind", ["text", "bytes", "some without a name"])
def test_names_may_be_text_or_bytes(kind):
    frame = draw(3_000)
    expected = section_of(frame)
    pp.aggregate(expected)
    names = frame["feature_name"].astype(object)
    if kind == "bytes":
        names = names.map(str.encode)
    if kind == "some without a name":
        more = draw(500, seed=1)
        frame, names = pd.concat([frame, more]), pd.concat([names, pd.Series([None] * 500, dtype=object)])
    frame = frame.assign(feature_name=names)
    meta = frame.iloc[:0].assign(feature_name=frame["feature_name"].iloc[:0].astype(object))
    lazy = dd.from_delayed([delayed(frame)], meta=meta, verify_meta=False)
    sdata = section_of(lazy, feature_key=None)
    sdata.shapes["spots"] = expected.shapes["spots"]
    pp.aggregate(sdata, onto="spots")
    np.testing.assert_array_equal(sdata.tables["spot_counts"].X.toarray(), expected.tables["spot_counts"].X.toarray())


class CountedParts:
    """Partitions that are drawn when they are read, and know how often and for which columns that was."""

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()
        self.columns: set[tuple[str, ...]] = set()
        self.lock = threading.Lock()

    def __dask_tokenize__(self) -> int:
        return id(self)

    def __call__(self, number: int, columns: list[str] | None = None) -> pd.DataFrame:
        with self.lock:
            self.reads[number] += 1
            self.columns.add(tuple(columns or ()))
        frame = draw(500, seed=number)
        return frame if columns is None else frame[columns]


def test_partitions_are_read_once_and_only_in_the_columns_that_count():
    parts = CountedParts()
    sdata = section_of(dd.from_map(parts, range(40), meta=draw(500).iloc[:0], enforce_metadata=False))
    centers = np.array([[2100.0, 2100.0], [2300.0, 2500.0]])
    sdata.shapes["spots"] = contract.build_shapes(
        gpd.GeoDataFrame({"radius": [110.0, 110.0]}, geometry=shapely.points(centers)), mpp=MPP
    )
    parts.reads.clear()
    parts.columns.clear()
    pp.aggregate(sdata, onto="spots", n_jobs=2)
    assert parts.reads == dict.fromkeys(range(40), 1)
    assert {frozenset(columns) for columns in parts.columns} == {frozenset(("x", "y", "feature_name", "qv"))}
    whole = pd.concat([draw(500, seed=number) for number in range(40)])
    expected = brute_force(whole[whole["qv"] >= 20], sdata, GENES)
    np.testing.assert_array_equal(sdata.tables["spot_counts"].X.toarray(), expected)


# --------------------------------------------------------------------------------------------------
# where spots lie


def test_a_hexagonal_lattice_is_as_visiums():
    sdata = section_of(draw(40_000), matrix=np.diag([4.0, 4.0, 1.0]))
    pp.aggregate(sdata, spot_um=55, pitch_um=100)
    table = sdata.tables["spot_counts"]
    found = find_lattice(table.obsm["spatial"])
    assert found.kind == "hexagonal"
    assert found.pitch == pytest.approx(400.0)
    row, column = table.obs["array_row"].to_numpy(), table.obs["array_col"].to_numpy()
    assert ((row + column) % 2 == 0).all()
    np.testing.assert_array_equal(found.row - found.row[0], row - row[0])
    np.testing.assert_array_equal(found.column - found.column[0], column - column[0])
    assert sdata.shapes["spots"]["radius"].tolist() == [110.0] * table.n_obs
    np.testing.assert_array_equal(shapely.get_coordinates(sdata.shapes["spots"].geometry), table.obsm["spatial"])


def test_a_grid_is_square():
    sdata = section_of(draw(40_000), matrix=np.diag([4.0, 4.0, 1.0]))
    pp.aggregate(sdata, onto="grid", spot_um=50, pitch_um=50)
    found = find_lattice(sdata.tables["spot_counts"].obsm["spatial"])
    assert (found.kind, found.pitch) == ("square", pytest.approx(200.0))
    assert sdata.tables["spot_counts"].n_obs == 19 * 19  # the outermost transcripts are less than 1000 µm apart


@given(
    corners=st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500)), min_size=4, max_size=8),
    pitch=st.floats(5, 60),
    part=st.floats(0.2, 1.0),
    onto=st.sampled_from(["hex", "grid"]),
    shift=st.tuples(st.integers(-300, 300), st.integers(-300, 300)),
)
def test_circles_lie_within_the_field_and_leave_no_place_free(corners, pitch, part, onto, shift):
    field = shapely.MultiPoint(corners).convex_hull
    if not isinstance(field, shapely.Polygon) or field.buffer(-pitch).area < 4 * pitch**2:
        return
    diameter = part * pitch
    spots = lay_lattice(field, onto=onto, pitch=pitch, diameter=diameter)
    centers = shapely.get_coordinates(spots.shapes.geometry)
    assert (shapely.distance(field.exterior, shapely.points(centers)) >= diameter / 2 * (1 - 1e-5)).all()
    assert shapely.contains_xy(field, centers).all()
    assert len(set(spots.obs.index)) == len(centers)
    apart = cKDTree(centers).query(centers, k=2)[0][:, 1] if len(centers) > 1 else np.array([pitch])
    np.testing.assert_allclose(apart.min(), pitch, rtol=1e-6)
    # wherever a disc fits with room to spare, a spot is near
    room = field.buffer(-pitch)
    samples = np.random.default_rng(0).uniform(*np.array(room.bounds).reshape(2, 2), (200, 2))
    samples = samples[shapely.contains_xy(room, samples)]
    if len(samples):
        assert cKDTree(centers).query(samples)[0].max() <= pitch * (np.sqrt(0.5) if onto == "grid" else 3**-0.5) + 1e-6
    moved = lay_lattice(shapely.affinity.translate(field, *shift), onto=onto, pitch=pitch, diameter=diameter)
    if len(moved.obs) == len(centers):  # a circle that touches the border may fall on either side
        np.testing.assert_allclose(shapely.get_coordinates(moved.shapes.geometry), centers + shift, atol=1e-6)


def test_spots_lie_within_what_was_measured_also_where_it_is_turned():
    sdata = section_of(draw(40_000))
    pp.aggregate(sdata)
    centers = sdata.tables["spot_counts"].obsm["spatial"]
    back = np.linalg.inv(TURNED)
    own = centers @ back[:2, :2].T + back[:2, 2]
    assert own.min() >= 27.5 - 0.1
    assert own.max() <= 1000 - 27.5 + 0.1
    assert len(centers) == pytest.approx(1000**2 / (100 * 86.6), rel=0.15)


def test_spots_lie_on_the_he(make_slide):
    image = np.full((1200, 1600, 3), 200, np.uint8)
    sdata = make_slide(image, mpp=0.5)
    sdata.points["transcripts"] = section_of(draw(30_000)).points["transcripts"]
    contract.place_instrument(sdata, np.array([[2.0, 0.0, -300.0], [0.0, 2.0, 100.0], [0.0, 0.0, 1.0]]))
    pp.aggregate(sdata)
    table = sdata.tables["spot_counts"]
    assert table.obsm["spatial"].min() >= 55
    assert (table.obsm["spatial"].max(axis=0) <= np.array([1600, 1200]) - 55).all()
    drawn = table.uns["spatial"]["slide"]
    assert drawn["scalefactors"]["spot_diameter_fullres"] == pytest.approx(110.0)
    assert set(get_transformation(sdata.shapes["spots"], get_all=True)) == {"global", "microns"}


def test_without_an_he_there_is_no_picture():
    sdata = section_of(draw(20_000))
    pp.aggregate(sdata)
    assert "spatial" not in sdata.tables["spot_counts"].uns


def test_spots_with_few_transcripts_are_left_out():
    frame = draw(4_000)
    frame = frame[(frame["x"] > 400) | (frame["y"] > 400) | (frame.index < 2)]
    sdata, all_of_it = section_of(frame), section_of(frame)
    pp.aggregate(sdata, min_units=3)
    pp.aggregate(all_of_it, min_units=0)
    few = all_of_it.tables["spot_counts"]
    kept = few[(few.obs["n_transcripts"] >= 3).to_numpy()]
    assert 0 < kept.n_obs < few.n_obs
    assert sdata.tables["spot_counts"].obs_names.tolist() == kept.obs_names.tolist()
    assert len(sdata.shapes["spots"]) == kept.n_obs
    assert sdata.tables["spot_counts"].obs["instance_id"].tolist() == sdata.shapes["spots"].index.tolist()


# --------------------------------------------------------------------------------------------------
# onto spots that are there


def test_spots_of_a_visium_table_keep_their_names(make_spots):
    sdata = make_spots(n_side=5, pitch=40.0, mpp=1.0, tiled=True)
    frame = draw(3_000, extent=240)
    here = {contract.INSTRUMENT: Identity()}
    sdata.points["transcripts"] = PointsModel.parse(frame, feature_key="feature_name", transformations=here)
    contract.place_instrument(sdata, np.eye(3))
    spots = sdata.shapes["spots"]
    # the genes of the Visium table are others, so a panel of its own is named
    sdata.tables["panel"] = AnnData(sp.csr_matrix((1, 5), dtype=np.int32), var=pd.DataFrame(index=GENES))
    pp.aggregate(sdata, onto="spots", table_key="panel", min_units=0)
    table = sdata.tables["spot_counts"]
    assert table.obs_names.tolist() == sdata.tables["counts"].obs_names.tolist()
    assert sdata.shapes["spots"] is spots
    expected = brute_force(frame[frame["qv"] >= 20], sdata, GENES, matrix=np.eye(3))
    np.testing.assert_array_equal(table.X.toarray(), expected)
    assert contract.counts_name(sdata) == "spot_counts"
    rows, matched = contract.align_to_spots(sdata, contract.tiles(sdata))
    assert matched.obs_names.tolist() == contract.tiles(sdata).obs["spot_id"].iloc[rows].tolist()


def test_polygons_in_their_own_coordinates():
    frame = draw(20_000)
    sdata = section_of(frame)
    random = np.random.default_rng(0)
    polygons = [shapely.Point(*random.uniform(100, 900, 2)).buffer(random.uniform(10, 80)) for _ in range(20)]
    polygons.append(polygons[0].union(polygons[1]).difference(shapely.Point(500, 500).buffer(30)))
    index = [f"region-{number}" for number in range(21)]
    placed = {"global": Affine(TURNED, input_axes=("x", "y"), output_axes=("x", "y"))}
    sdata.shapes["regions"] = ShapesModel.parse(
        gpd.GeoDataFrame(geometry=polygons, index=index), transformations=placed
    )
    pp.aggregate(sdata, onto="spots", shapes_key="regions", min_units=0)
    table = sdata.tables["spot_counts"]
    good = frame[frame["qv"] >= 20]
    xy = good[["x", "y"]].to_numpy(np.float64)
    expected = [
        [(shapely.contains_xy(polygon, xy) & (good["feature_name"] == gene).to_numpy()).sum() for gene in GENES]
        for polygon in polygons
    ]
    np.testing.assert_array_equal(table.X.toarray(), expected)
    assert table.obs_names.tolist() == index
    assert table.obs["instance_id"].tolist() == index


def test_circles_that_a_transformation_scales():
    frame = draw(20_000)
    sdata = section_of(frame)
    circles = gpd.GeoDataFrame({"radius": [60.0, 90.0]}, geometry=[shapely.Point(300, 300), shapely.Point(500, 700)])
    placed = {"global": Affine(TURNED, input_axes=("x", "y"), output_axes=("x", "y"))}
    sdata.shapes["wells"] = ShapesModel.parse(circles, transformations=placed)
    pp.aggregate(sdata, onto="spots", shapes_key="wells")
    good = frame[(frame["qv"] >= 20) & ~frame["feature_name"].astype(str).str.startswith(CONTROLS)]
    tree = cKDTree(good[["x", "y"]].to_numpy(np.float64))
    expected = [len(tree.query_ball_point(xy, radius)) for xy, radius in (((300, 300), 60), ((500, 700), 90))]
    assert sdata.tables["spot_counts"].obs["n_transcripts"].tolist() == expected


# --------------------------------------------------------------------------------------------------
# cells


def section_of_cells(
    values: np.ndarray | sp.spmatrix, *, name: str, n: int = 600, seed: int = 0
) -> tuple[SpatialData, np.ndarray]:
    """A section of cells in micrometers, placed; and their positions in pixels."""
    random = np.random.default_rng(seed)
    positions = random.uniform(0, 1000, (n, 2))
    cells = gpd.GeoDataFrame({"radius": np.full(n, 5.0)}, geometry=shapely.points(positions))
    sdata = SpatialData(shapes={"cells": ShapesModel.parse(cells, transformations={contract.INSTRUMENT: Identity()})})
    contract.register(sdata, sample="cells", platform="made", image=None, mpp=MPP)
    var = pd.DataFrame(index=[f"V{number}" for number in range(values.shape[1])])
    table = AnnData(values, var=var, obsm={contract.SPATIAL_UM: positions})
    sdata.tables[name] = contract.annotate(table, region="cells")
    contract.place_instrument(sdata, TURNED)
    return sdata, positions @ TURNED[:2, :2].T + TURNED[:2, 2]


@pytest.mark.parametrize("kind", [sp.csr_matrix, np.asarray, lambda x: sp.csc_matrix(x.astype(np.float32))])
def test_counts_of_cells_add_up(kind):
    counts = np.random.default_rng(1).poisson(1.0, (600, 7))
    sdata, there = section_of_cells(kind(counts), name="counts")
    pp.aggregate(sdata, "cells")
    table = sdata.tables["spot_counts"]
    inside = np.linalg.norm(there[None] - table.obsm["spatial"][:, None], axis=2) <= 110
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), inside.astype(int) @ counts)
    np.testing.assert_array_equal(table.obs["n_cells"], inside.sum(axis=1))
    assert (table.obs["n_cells"] > 0).all()
    assert contract.counts(sdata).n_obs == table.n_obs


def test_proteins_of_cells_are_averaged():
    values = np.random.default_rng(1).gamma(2.0, 50.0, (600, 4)).astype(np.float32)
    sdata, there = section_of_cells(values, name="proteins")
    pp.aggregate(sdata, "cells")
    table = sdata.tables["spot_proteins"]
    inside = np.linalg.norm(there[None] - table.obsm["spatial"][:, None], axis=2) <= 110
    expected = (inside @ values.astype(np.float64)) / inside.sum(axis=1)[:, None]
    assert table.X.dtype == np.float32
    np.testing.assert_allclose(table.X, expected, rtol=1e-6)
    assert contract.proteins_name(sdata) == "spot_proteins"
    assert contract.proteins(sdata).var_names.tolist() == ["V0", "V1", "V2", "V3"]


def test_cells_are_aggregated_again_not_the_spots_made_of_them():
    counts = np.random.default_rng(1).poisson(1.0, (600, 3))
    sdata, _ = section_of_cells(counts, name="counts")
    pp.aggregate(sdata, "cells")
    first = sdata.tables["spot_counts"]
    pp.aggregate(sdata, "cells")
    np.testing.assert_array_equal(sdata.tables["spot_counts"].X.toarray(), first.X.toarray())
    pp.aggregate(sdata, "cells", spot_um=100)
    assert sdata.tables["spot_counts"].X.sum() > first.X.sum()


@given(seed=st.integers(0, 1_000))
def test_squares_side_by_side_hold_every_cell_once(seed):
    counts = np.random.default_rng(seed).poisson(1.0, (200, 3))
    sdata, there = section_of_cells(counts, name="counts", n=200, seed=seed)
    low, side = there.min(axis=0) - 1, (np.ptp(there, axis=0).max() + 2) / 6
    squares = [
        shapely.box(*(low + side * np.array([i, j])), *(low + side * np.array([i + 1, j + 1])))
        for i in range(6)
        for j in range(6)
    ]
    sdata.shapes["squares"] = contract.build_shapes(gpd.GeoDataFrame(geometry=squares), mpp=MPP)
    pp.aggregate(sdata, "cells", onto="spots", shapes_key="squares", min_units=0)
    np.testing.assert_array_equal(np.asarray(sdata.tables["spot_counts"].X.sum(axis=0)).ravel(), counts.sum(axis=0))


# --------------------------------------------------------------------------------------------------
# an image


def section_of_image(levels: list[da.Array], *, pixel_um: float = 0.5) -> SpatialData:
    channels = [f"channel {number}" for number in range(levels[0].shape[0])]
    sdata = SpatialData(images={"multiplex": contract.build_multichannel(levels, channels=channels, pixel_um=pixel_um)})
    contract.register(sdata, sample="image", platform="codex", image=None, mpp=pixel_um)
    contract.place_instrument(sdata, np.diag([1 / pixel_um, 1 / pixel_um, 1.0]))
    return sdata


def disc_means(image: np.ndarray, centers: np.ndarray, radius: float, factor: float) -> np.ndarray:
    rows, columns = (np.indices(image.shape[1:]) + 0.5) * factor
    masks = [(columns - x) ** 2 + (rows - y) ** 2 <= radius**2 for x, y in centers]
    return np.stack([image[:, mask].mean(axis=1, dtype=np.float64) for mask in masks])


@pytest.mark.parametrize("chunks", [(1, 64, 64), (5, 100, 37), (2, 500, 600)])
def test_an_image_is_averaged_as_masks_average_it(chunks):
    image = np.random.default_rng(0).integers(0, 60_000, (5, 500, 600)).astype(np.uint16)
    sdata = section_of_image([da.from_array(image, chunks=chunks)])
    pp.aggregate(sdata, "image", spot_um=20, pitch_um=40)
    table = sdata.tables["spot_proteins"]
    assert table.var_names.tolist() == [f"channel {number}" for number in range(5)]
    expected = disc_means(image, table.obsm["spatial"], 20.0, 1.0)
    np.testing.assert_array_equal(table.X, expected.astype(np.float32))
    assert table.obs["n_pixels"].between(1200, 1300).all()


def test_the_level_that_is_read_is_fine_enough_and_no_finer():
    fine = np.random.default_rng(0).integers(0, 250, (2, 800, 800)).astype(np.uint8)
    levels = [fine, fine[:, ::2, ::2], fine[:, ::4, ::4], fine[:, ::8, ::8]]
    sdata = section_of_image([da.from_array(level, chunks=(2, 128, 128)) for level in levels], pixel_um=0.5)
    pp.aggregate(sdata, "image", spot_um=45, pitch_um=60)  # 22.5 pixels of the third level across
    table = sdata.tables["spot_proteins"]
    assert table.uns["aggregation"]["level"] == 2
    expected = disc_means(levels[2], table.obsm["spatial"], 45.0, 4.0)
    np.testing.assert_array_equal(table.X, expected.astype(np.float32))


def test_chunks_without_spots_are_not_read(counted_image):
    counted = counted_image(1024, 1024, chunk=128)
    sdata = section_of_image(counted.levels, pixel_um=1.0)
    circles = gpd.GeoDataFrame({"radius": [20.0, 20.0]}, geometry=[shapely.Point(200, 200), shapely.Point(640, 600)])
    sdata.shapes["spots"] = contract.build_shapes(circles, mpp=1.0)
    counted.reads.clear()
    pp.aggregate(sdata, "image", onto="spots")
    # the second disc lies across a border between chunks
    assert counted.reads == {(0, 1, 1): 1, (0, 4, 4): 1, (0, 4, 5): 1}
    expected = disc_means(counted.arrays[0], np.array([[200, 200], [640, 600]]), 20.0, 1.0)
    np.testing.assert_array_equal(sdata.tables["spot_proteins"].X, expected.astype(np.float32))


# --------------------------------------------------------------------------------------------------
# replacing, refusing


def test_a_second_call_replaces_the_first():
    sdata = section_of(draw(20_000))
    pp.aggregate(sdata)
    first = sdata.tables["spot_counts"].n_obs
    pp.aggregate(sdata, onto="grid", pitch_um=55)
    assert sdata.tables["spot_counts"].n_obs > 2 * first
    assert len(sdata.shapes["spots"]) == sdata.tables["spot_counts"].n_obs
    assert sorted(sdata.tables) == ["spot_counts"]


def test_two_sources_on_the_same_spots():
    values = np.random.default_rng(1).gamma(2.0, 50.0, (600, 4)).astype(np.float32)
    sdata, _ = section_of_cells(values, name="proteins")
    sdata.points["transcripts"] = section_of(draw(20_000)).points["transcripts"]
    pp.aggregate(sdata)
    pp.aggregate(sdata, "cells", onto="spots")
    counts, proteins = sdata.tables["spot_counts"], sdata.tables["spot_proteins"]
    assert set(proteins.obs_names) <= set(counts.obs_names)
    assert {"array_row", "array_col"} <= set(proteins.obs)
    assert contract.measured(sdata, "counts") is counts
    assert contract.measured(sdata, "proteins") is proteins
    with pytest.warns(UserWarning, match="'spot_proteins' was dropped with the spots it was made for"):
        pp.aggregate(sdata, spot_um=70)
    assert "spot_proteins" not in sdata.tables
    assert contract.proteins_name(sdata) == "proteins"


def test_spots_of_visium_are_never_replaced(make_spots):
    sdata = make_spots(n_side=5, pitch=40.0, mpp=1.0)
    before = sdata.shapes["spots"]
    with pytest.raises(ValueError, match=r"not made by `aggregate` \(tables on them: \['counts'\]\).*onto=\"spots\""):
        pp.aggregate(sdata, "cells")
    assert sdata.shapes["spots"] is before
    pp.aggregate(sdata, "cells", shapes_key="pseudo_spots", spot_um=60, pitch_um=60)
    assert sdata.shapes["spots"] is before
    assert contract.units_name(sdata) == "pseudo_spots"


def test_a_failed_call_leaves_the_section_as_it_was():
    sdata = section_of(draw(20_000))
    pp.aggregate(sdata)
    table, shapes, history = sdata.tables["spot_counts"], sdata.shapes["spots"], len(contract.info(sdata)["history"])
    with pytest.raises(ValueError, match="holds 1000000 of its transcripts"):
        pp.aggregate(sdata, spot_um=80, min_units=1_000_000)
    assert sdata.tables["spot_counts"] is table
    assert sdata.shapes["spots"] is shapes
    assert len(contract.info(sdata)["history"]) == history


def test_a_section_without_the_source_is_told_which_it_has(make_slide):
    sdata, _ = section_of_cells(np.ones((600, 2), int), name="counts")
    with pytest.raises(KeyError, match=r'has no transcripts to aggregate\. It has source="cells"'):
        pp.aggregate(sdata)
    with pytest.raises(KeyError, match="It has none of the other sources"):
        pp.aggregate(make_slide(np.zeros((50, 50, 3), np.uint8), mpp=1.0), "image")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "pixels"}, ValueError, r"one of \['cells', 'image', 'transcripts'\], found 'pixels'"),
        ({"onto": "triangles"}, ValueError, '"hex", "grid" or "spots", found \'triangles\''),
        ({"spot_um": 0}, ValueError, "positive `spot_um` and `pitch_um`, found 0"),
        ({"points_key": "dots"}, KeyError, r"No points 'dots'; this section's points: \['transcripts'\]"),
        ({"table_key": "cells"}, KeyError, "No table 'cells'"),
        ({"source": "image", "image_key": "picture"}, KeyError, "No image 'picture'"),
        ({"onto": "spots"}, KeyError, "No shapes .*spots.* to aggregate onto"),
        ({"shapes_key": "transcripts"}, ValueError, "'transcripts' is the name of another element"),
        ({"min_quality": 50}, ValueError, "No transcript counts: .*'of_low_quality': 500"),
        ({"spot_um": 1200}, ValueError, "No spot of 4800.0 px fits into the measured area"),
        ({"pitch_um": 0.4}, ValueError, "two pixels of the H&E at least, found 1.60 px"),
    ],
)
def test_mistakes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pp.aggregate(section_of(draw(500)), **options)


def test_what_is_not_placed_yet_is_refused():
    sdata = section_of(draw(500))
    sdata.points["transcripts"] = PointsModel.parse(
        draw(500), feature_key="feature_name", transformations={contract.INSTRUMENT: Identity()}
    )
    with pytest.raises(ValueError, match=r"'transcripts' of section 'made' is not placed.*pp\.register"):
        pp.aggregate(sdata)


def test_an_unknown_resolution_is_no_guess():
    points = PointsModel.parse(draw(500), feature_key="feature_name")
    with pytest.raises(ValueError, match="no known resolution, which `spot_um=` needs"):
        pp.aggregate(SpatialData(points={"transcripts": points}))


def test_transcripts_beside_the_he_are_refused(make_slide):
    sdata = make_slide(np.full((300, 300, 3), 200, np.uint8), mpp=0.5)
    sdata.points["transcripts"] = section_of(draw(500)).points["transcripts"]
    contract.place_instrument(sdata, np.array([[2.0, 0.0, 5000.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(ValueError, match="do not lie on its H&E of 300 x 300 px"):
        pp.aggregate(sdata)


def test_points_without_names_are_refused():
    sdata = section_of(draw(500))
    sdata.points["transcripts"] = PointsModel.parse(draw(500).drop(columns="feature_name"))
    with pytest.raises(ValueError, match=r"a column 'feature_name' of the points 'transcripts'"):
        pp.aggregate(sdata)


def test_genes_of_another_panel_are_refused():
    sdata = section_of(draw(500))
    sdata.tables["counts"] = AnnData(sp.csr_matrix((1, 1), dtype=np.int32), var=pd.DataFrame(index=["ENSG0001"]))
    with pytest.raises(ValueError, match=r"No transcript counts.*table whose genes are named as the column"):
        pp.aggregate(sdata)


def test_circles_that_become_ellipses_are_refused():
    sdata = section_of(draw(500))
    circles = gpd.GeoDataFrame({"radius": [60.0]}, geometry=[shapely.Point(300, 300)])
    sdata.shapes["wells"] = ShapesModel.parse(
        circles,
        transformations={"global": Affine(np.diag([2.0, 1.0, 1.0]), input_axes=("x", "y"), output_axes=("x", "y"))},
    )
    with pytest.raises(ValueError, match="makes its circles ellipses"):
        pp.aggregate(sdata, onto="spots", shapes_key="wells")


# --------------------------------------------------------------------------------------------------
# with the rest


def test_a_cohort_is_aggregated_section_by_section():
    cohort = {"a": section_of(draw(5_000)), "b": section_of(draw(5_000, seed=1))}
    pp.aggregate(cohort)
    assert all("spot_counts" in sdata.tables for sdata in cohort.values())


def test_pseudo_spots_survive_the_store(tmp_path: Path):
    sdata = section_of(draw(20_000))
    pp.aggregate(sdata)
    sdata.write(tmp_path / "section.zarr")
    again = spatialdata.read_zarr(tmp_path / "section.zarr")
    np.testing.assert_array_equal(contract.counts(again).X.toarray(), sdata.tables["spot_counts"].X.toarray())
    pp.aggregate(again)
    np.testing.assert_array_equal(contract.counts(again).X.toarray(), sdata.tables["spot_counts"].X.toarray())


def test_tiles_are_laid_on_pseudo_spots(make_slide: Callable[..., SpatialData]):
    sdata = make_slide(np.full((1200, 1600, 3), (200, 120, 180), np.uint8), mpp=1.0)
    sdata.points["transcripts"] = section_of(draw(30_000)).points["transcripts"]
    contract.place_instrument(sdata, np.array([[1.0, 0.0, 100.0], [0.0, 1.0, 100.0], [0.0, 0.0, 1.0]]))
    pp.aggregate(sdata)
    pp.tile(sdata)
    tiles = contract.tiles(sdata)
    assert tiles.obs["spot_id"].tolist() == sdata.tables["spot_counts"].obs_names.tolist()
    assert contract.tiling(sdata)["side_px"] == pytest.approx(55.0)
    # other spots have other names: tiles of the first are not taken for those of the second
    pp.aggregate(sdata, pitch_um=70)
    with pytest.raises(KeyError, match="Tile again"):
        contract.align_to_spots(sdata, tiles[:1])


# --------------------------------------------------------------------------------------------------
# real data


@pytest.mark.filterwarnings("ignore:SpatialData is not stored in the most current format", "ignore:Object at zmetadata")
def test_transcripts_of_a_xenium_section(data_dir: Path):
    sdata = spatialdata.read_zarr(data_dir / "xenium_points.spatialdata.zarr")
    # its "global" is pixels of 0.2125 µm
    contract.register(sdata, sample="breast", platform="xenium", image=None, mpp=0.2125)
    pp.aggregate(sdata)
    table = sdata.tables["spot_counts"]
    frame = sdata.points["transcripts"].compute()
    assert len(frame) == 213_191
    scale = np.diag([1 / 0.2125, 1 / 0.2125, 1.0])
    genes = table.var_names.tolist()
    assert not any(gene.startswith(CONTROLS) for gene in genes)
    np.testing.assert_array_equal(table.X.toarray(), brute_force(frame, sdata, genes, matrix=scale))
    assert {"ERBB2", "KRT8"} <= set(genes)


def test_transcripts_of_a_small_xenium_bundle(data_dir: Path):
    frame = pd.read_parquet(data_dir / "xenium_tiny" / "transcripts.parquet")
    frame = frame.rename(columns={"x_location": "x", "y_location": "y"})
    lazy = dd.from_pandas(frame[["x", "y", "feature_name", "qv"]], npartitions=4)
    sdata = section_of(lazy, matrix=np.diag([4.0, 4.0, 1.0]))
    pp.aggregate(sdata, onto="grid", pitch_um=55)
    table = sdata.tables["spot_counts"]
    good = frame[frame["qv"] >= 20]
    expected = brute_force(good, sdata, table.var_names.tolist(), matrix=np.diag([4.0, 4.0, 1.0]))
    np.testing.assert_array_equal(table.X.toarray(), expected)
    assert table.n_obs > 10
