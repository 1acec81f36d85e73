"""What was predicted, given back on the spots' own names, for scanpy and squidpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import dask.array as da
import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import shapely
import spatialdata
import squidpy
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import Affine, set_transformation

from stimage_sd import contract, pp
from stimage_sd.io import from_anndata, to_anndata

GENES = ["G0", "G1", "G2"]
#: pitch of the spots, px, and spots along each side
PITCH, SIDE = 60, 6


def analysis() -> AnnData:
    """A log-normalized analysis of spots on a lattice, in shuffled order, with clusters, graph and more."""
    generator = np.random.default_rng(0)
    points = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2) * PITCH + PITCH
    order = generator.permutation(len(points))
    adata = AnnData(
        sp.csr_matrix(generator.poisson(4.0, (len(points), 5)).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "cluster": pd.Categorical(generator.choice(["a", "b", "c"], len(points)), categories=["c", "b", "a"]),
                "in_tissue": generator.integers(0, 2, len(points)),
                "good": generator.random(len(points)) > 0.5,
                "share (%)": generator.random(len(points)).astype(np.float32),
                "region": "cortex",
                "note": [f"spot {number}" for number in order],
            },
            index=[f"AAAC{number:03d}-1" for number in order],
        ),
        var=pd.DataFrame(index=[f"G{number}" for number in range(5)]),
        obsm={"spatial": points[order].astype(float)},
        uns={"spatial": {"V1": {"images": {}, "scalefactors": {"spot_diameter_fullres": 30.0}}}},
    )
    adata.layers["counts"] = adata.X.copy()
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    squidpy.gr.spatial_neighbors(adata, coord_type="generic", delaunay=True)
    adata.uns["cluster_colors"] = ["#111111", "#222222", "#333333"]
    adata.obsm["X_umap"] = generator.normal(size=(adata.n_obs, 2))
    return adata


def image() -> np.ndarray:
    """Tissue, but for the first column of spots."""
    picture = np.full(((SIDE + 1) * PITCH, (SIDE + 1) * PITCH, 3), (200, 120, 180), np.uint8)
    picture[:, : PITCH + PITCH // 2] = 250
    return picture


def truth(names: pd.Index) -> np.ndarray:
    """What is predicted of a spot: a number of its name, by gene."""
    numbers = np.array([int(name[4:7]) for name in names], dtype=np.float32)
    return numbers[:, None] + np.array([0.0, 0.25, 0.5], dtype=np.float32)


def predict(sdata: SpatialData, *, lazy: bool = False, key: str = "predictions") -> None:
    """Write predictions as `tl.predict` does: of the tiles that are kept."""
    tiles = contract.tiles(sdata)
    kept = tiles[tiles.obs["keep"].to_numpy()]
    names = (
        pd.Index(kept.obs["spot_id"]) if "spot_id" in kept.obs else pd.Index([f"AAAC{n:03d}" for n in range(len(kept))])
    )
    mean = truth(names)
    table = AnnData(
        X=da.from_array(mean, chunks=(10, 3)) if lazy else mean,
        obs=kept.obs.drop(columns="region").copy(),
        var=pd.DataFrame({"pearson": [0.1, 0.2, 0.3]}, index=GENES),
        layers={"epistemic": mean * 2, "high": mean > 10},
        obsm={
            "spatial": contract.tile_geometry(sdata, kept).centers.copy(),
            "X_toy": np.repeat(mean[:, :1], 4, axis=1),
        },
    )
    table.obs["ood_score"] = mean[:, 0] / 100
    table.uns["prediction"] = {"coverage": 0.9}
    contract.write_predictions(sdata, table, key=key)


@pytest.fixture
def predicted() -> tuple[AnnData, SpatialData]:
    adata = analysis()
    with pytest.warns(UserWarning, match="SpatialData does not allow 1 of the names"):
        sdata = from_anndata(adata, image(), mpp=2.0)
    pp.tile(sdata)
    predict(sdata)
    return adata, sdata


def test_predictions_come_back_on_names_and_order(predicted: tuple[AnnData, SpatialData], tmp_path: Path) -> None:
    adata, sdata = predicted
    sdata.write(tmp_path / "section.zarr")
    for section in (sdata, spatialdata.read_zarr(tmp_path / "section.zarr")):
        result = to_anndata(section)
        assert result.obs_names.equals(adata.obs_names)
        assert result.var_names.tolist() == GENES
        assert result.var["pearson"].tolist() == [0.1, 0.2, 0.3]
        on_tissue = adata.obsm["spatial"][:, 0] > 1.5 * PITCH
        np.testing.assert_array_equal(result.obs["predicted"], on_tissue)
        np.testing.assert_array_equal(result.X[on_tissue], truth(adata.obs_names)[on_tissue])
        assert np.isnan(result.X[~on_tissue]).all()
        assert result.X.dtype == np.float32
        np.testing.assert_array_equal(result.layers["epistemic"], result.X * 2)
        assert np.isnan(result.layers["high"][~on_tissue]).all()
        np.testing.assert_array_equal(result.layers["high"][on_tissue], (result.X > 10)[on_tissue])
        np.testing.assert_allclose(result.obs["ood_score"], result.X[:, 0] / 100)
        np.testing.assert_array_equal(result.obsm["X_toy"][:, 0], result.X[:, 0])
        assert result.uns["prediction"] == {"coverage": 0.9}
        # and what the analysis had
        pd.testing.assert_frame_equal(result.obs[adata.obs.columns], adata.obs)
        np.testing.assert_array_equal(result.obsm["X_umap"], adata.obsm["X_umap"])
        np.testing.assert_array_equal(
            result.obsp["spatial_connectivities"].toarray(), adata.obsp["spatial_connectivities"].toarray()
        )
        assert list(result.uns["cluster_colors"]) == adata.uns["cluster_colors"]
        assert not {"log1p", "spatialdata_attrs"} & set(result.uns)
        assert not {"instance_id", "spot_id", "x", "keep", "region_original"} & set(result.obs)
        np.testing.assert_array_equal(result.obsm["spatial"], adata.obsm["spatial"])
        adata.obsm["predicted"] = result.to_df().loc[adata.obs_names]
        assert set(GENES) <= set(squidpy.pl.extract(adata, "predicted").obs)
        result.write_h5ad(tmp_path / "result.h5ad")
        back = anndata.read_h5ad(tmp_path / "result.h5ad")
        np.testing.assert_array_equal(back.X, result.X)


def test_a_copy(predicted: tuple[AnnData, SpatialData]) -> None:
    _, sdata = predicted
    result = to_anndata(sdata)
    result.X[:] = 0
    result.obsm["spatial"][:] = 0
    result.obs["cluster"] = "d"
    assert contract.predictions(sdata).X.max() > 0
    assert sdata.tables["counts"].obs["cluster"].nunique() == 3
    assert sdata.tables["counts"].obsm["spatial"].min() > 0


def test_it_goes_through_again(predicted: tuple[AnnData, SpatialData]) -> None:
    adata, sdata = predicted
    result = to_anndata(sdata)
    adata.obs = result.obs
    with pytest.warns(UserWarning, match="does not allow"):
        again = from_anndata(adata, image(), mpp=2.0)
    pp.tile(again)
    predict(again)
    pd.testing.assert_frame_equal(to_anndata(again).obs[result.obs.columns], result.obs)


def test_predictions_larger_than_memory_stay_lazy() -> None:
    adata = analysis()
    with pytest.warns(UserWarning, match="does not allow"):
        sdata = from_anndata(adata, image())
    pp.tile(sdata)
    predict(sdata, lazy=True)
    result = to_anndata(sdata)
    assert isinstance(result.X, da.Array)
    on_tissue = result.obs["predicted"].to_numpy()
    np.testing.assert_array_equal(result.X.compute()[on_tissue], truth(adata.obs_names)[on_tissue])
    assert np.isnan(result.X.compute()[~on_tissue]).all()


def test_squidpy_goes_on(predicted: tuple[AnnData, SpatialData]) -> None:
    adata, sdata = predicted
    result = to_anndata(sdata)
    ax = squidpy.pl.spatial_scatter(result, color="G1", return_ax=True)
    scale = result.uns["spatial"]["V1"]["scalefactors"]["tissue_hires_scalef"]
    boxes = [path.get_extents() for path in ax.collections[0].get_paths()]
    middles = np.array([(box.x0 + box.x1, box.y0 + box.y1) for box in boxes]) / 2
    np.testing.assert_allclose(middles, adata.obsm["spatial"] * scale, atol=1e-3)
    np.testing.assert_allclose(boxes[0].width, 30.0 * scale, rtol=1e-3)
    assert tuple(ax.images[0].get_array()[5, 5]) == (250, 250, 250)
    squidpy.pl.spatial_scatter(result, color="cluster")
    plt.close("all")
    there = result[result.obs["predicted"].to_numpy()].copy()
    squidpy.gr.spatial_neighbors(there, coord_type="generic", delaunay=True)
    squidpy.gr.spatial_autocorr(there, mode="moran", genes=GENES)
    assert there.uns["moranI"].shape[0] == 3


def test_positions_are_those_on_the_image_as_it_is_now(predicted: tuple[AnnData, SpatialData]) -> None:
    adata, sdata = predicted
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[100, 150], max_coordinate=[400, 410], target_coordinate_system="global"
    )
    result = to_anndata(crop)
    places = adata.obsm["spatial"]
    # SpatialData's crop keeps the spots that it cuts
    assert result.obs_names.isin(adata.obs_names).all()
    inside = pd.Index(adata.obs_names[((places > [100, 150]) & (places < [400, 410])).all(axis=1)])
    assert inside.isin(result.obs_names).all()
    expected = pd.DataFrame(places - [100, 150], index=adata.obs_names).loc[result.obs_names]
    np.testing.assert_allclose(result.obsm["spatial"], expected, atol=1e-9)
    on_tissue = result.obs["predicted"].to_numpy()
    np.testing.assert_array_equal(result.X[on_tissue], truth(result.obs_names)[on_tissue])
    np.testing.assert_array_equal(
        result.obsp["spatial_connectivities"].toarray(),
        adata[result.obs_names].obsp["spatial_connectivities"].toarray(),
    )
    # shapes in another unit, with a matrix that makes up for it
    half = Affine(np.diag([2.0, 2.0, 1.0]), input_axes=("x", "y"), output_axes=("x", "y"))
    shapes = sdata.shapes["spots"]
    moved = shapes.assign(
        radius=shapes["radius"] / 2, geometry=shapes.geometry.affine_transform([0.5, 0, 0, 0.5, 0, 0])
    )
    set_transformation(moved, {"global": half}, set_all=True)
    sdata.shapes["spots"] = moved
    sdata.tables["counts"].obsm["spatial"] = places / 2
    result = to_anndata(sdata)
    np.testing.assert_allclose(result.obsm["spatial"], places, atol=1e-9)
    assert result.uns["spatial"]["V1"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(30.0)


def test_tiles_of_a_grid(predicted: tuple[AnnData, SpatialData]) -> None:
    _, sdata = predicted
    with pytest.warns(UserWarning, match="new tiles"):
        pp.tile(sdata, layout="grid", size_um=100.0)
    predict(sdata)
    result, table = to_anndata(sdata), contract.predictions(sdata)
    assert result.obs_names.equals(table.obs_names)
    np.testing.assert_array_equal(result.X, table.X)
    np.testing.assert_array_equal(result.obsm["spatial"], table.obs[["x", "y"]])
    assert result.uns["spatial"]["V1"]["scalefactors"]["spot_diameter_fullres"] == 50.0
    assert not {"region", "instance_id"} & set(result.obs)


def test_a_slide_without_molecules(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(image(), mpp=1.0)
    pp.tile(sdata, size_um=50.0)
    predict(sdata)
    result = to_anndata(sdata)
    assert result.n_obs == contract.predictions(sdata).n_obs
    squidpy.pl.spatial_scatter(result, color="G0", shape="square")
    plt.close("all")


def test_cells(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(image(), mpp=0.5)
    places = np.array([[100.0, 50.0], [200.0, 90.0], [300.0, 260.0]])
    frame = gpd.GeoDataFrame(geometry=[shapely.Point(place).buffer(8.0) for place in places])
    table = AnnData(
        np.eye(3, dtype=np.float32)[:, :2],
        obs=pd.DataFrame({"cell_type": pd.Categorical(["tumor", "stroma", "tumor"])}, index=["n0", "n1", "n2"]),
        var=pd.DataFrame(index=["tumor", "stroma"]),
    )
    contract.write_cells(sdata, frame, table, name="nuclei")
    result = to_anndata(sdata, key="cell_types")
    assert result.obs_names.tolist() == ["n0", "n1", "n2"]
    np.testing.assert_allclose(result.obsm["spatial"], places, atol=1e-9)
    assert result.uns["spatial"]["slide"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(16.0, rel=0.01)
    squidpy.pl.spatial_scatter(result, color="cell_type")
    plt.close("all")


def test_other_results(predicted: tuple[AnnData, SpatialData]) -> None:
    adata, sdata = predicted
    tiles = contract.tiles(sdata)
    tiles.obsm["X_toy"] = truth(pd.Index(tiles.obs["spot_id"]))
    result = to_anndata(sdata, key="tiles")
    np.testing.assert_array_equal(result.obsm["X_toy"], truth(adata.obs_names))
    assert result.obs["predicted"].all()
    predict(sdata, key="by_another_model")
    np.testing.assert_array_equal(to_anndata(sdata, key="by_another_model").X, to_anndata(sdata).X)


@pytest.mark.parametrize("alike", [True, False])
def test_a_cohort(alike: bool) -> None:
    cohort, analyses = {}, {}
    for name in ("one", "two"):
        adata = analysis()
        del adata.obs["share (%)"]
        if not alike:
            adata.obs_names = [f"{barcode[:-2]}-{name}" for barcode in adata.obs_names]
        sdata = from_anndata(adata, image(), mpp=2.0, sample=f"slide_{name}")
        pp.tile(sdata)
        predict(sdata)
        cohort[name], analyses[name] = sdata, adata
    contract.predictions(cohort["two"]).var["pearson"] = 0.5
    contract.predictions(cohort["two"]).var["kept"] = contract.predictions(cohort["one"]).var["kept"] = 1
    result = to_anndata(cohort)
    assert result.obs["sample"].tolist() == ["one"] * 36 + ["two"] * 36
    assert list(result.var) == ["kept"]
    assert set(result.uns["spatial"]) == {"one", "two"}
    assert result.obs["cluster"].dtype == "category"
    for name, adata in analyses.items():
        names = adata.obs_names + f"-{name}" if alike else adata.obs_names
        part = result[names]
        np.testing.assert_array_equal(part.X, to_anndata(cohort[name]).X)
        np.testing.assert_array_equal(part.obsm["spatial"], adata.obsm["spatial"])
    squidpy.pl.spatial_scatter(result, color="G0", library_key="sample")
    plt.close("all")
    alone = to_anndata({"one": cohort["one"]})
    assert alone.obs_names.equals(analyses["one"].obs_names)
    assert alone.obs["sample"].unique().tolist() == ["one"]


def test_what_is_refused(predicted: tuple[AnnData, SpatialData]) -> None:
    _, sdata = predicted
    with pytest.raises(ValueError, match=r"'counts' of section 'V1' holds measured data.*sdata.tables\['counts'\]"):
        to_anndata(sdata, key="counts")
    with pytest.raises(KeyError, match="has no predicted cells"):
        to_anndata(sdata, key="cell_types")
    with pytest.raises(KeyError, match=r"has no predictions 'others'.*\['predictions'\]: name one with `key=`"):
        to_anndata(sdata, key="others")
    table = contract.predictions(sdata)
    table.obs["spot_id"] = "none"
    with pytest.raises(ValueError, match=r"Expected one row per spot in 'predictions' .*'none' more than once"):
        to_anndata(sdata)
    table.obs["spot_id"] = [f"none {number}" for number in range(table.n_obs)]
    with pytest.raises(KeyError, match=r"No row of 'predictions' sits on one of the 36 units of table 'counts'"):
        to_anndata(sdata)
    with pytest.raises(TypeError, match="Expected a SpatialData"):
        to_anndata(analysis())
