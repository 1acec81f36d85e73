"""One tissue, as the objects that other tools make of it.

Every builder takes the folder in which the instruments' files are kept, writes those that it needs and that are not
there yet, and reads them with the tool's own reader. All show one tissue, `SIDE` x `SIDE` px at `MPP`, in one
painting, but for CODEX, whose outline is another one, and the second section of `cohort`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import cv2
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import shapely
import spatialdata
import spatialdata_io
import tifffile
import xarray as xr
import zarr
from anndata import AnnData
from packaging.version import Version
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import (
    Affine,
    Identity,
    Scale,
    get_transformation,
    set_transformation,
)
from spatialdata.transformations import (
    Sequence as Chain,
)

import stimage_sd as st
from stimage_sd.datasets import synthetic_codex, synthetic_visium, synthetic_visium_hd, synthetic_xenium

#: side of the H&E, px, and micrometers a pixel of it
SIDE, MPP = 1536, 0.5
#: the tissue, and that of a cohort's second section
SEED, OTHER_SEED = 11, 9
#: spots of the two, and genes
N_SPOTS, N_OTHER_SPOTS, N_GENES = 40, 30, 12
#: micrometers a pixel of the morphology images of Xenium, MERSCOPE and CosMx (coarser than real ones)
PIXEL_UM = 0.425
#: longest sides of Space Ranger's two small images, px: not a power of two below the full image
HIRES, LOWRES = 700, 300
#: where MERSCOPE's micrometers and CosMx's global pixels begin, as seen from the morphology image
MERSCOPE_ORIGIN_UM = (2310.5, -875.25)
COSMX_ORIGIN_PX = (51_200.0, -20_480.0)
XY = ("x", "y")


@dataclass(frozen=True)
class Peer:
    """An object that another tool made, and what is true of it."""

    #: what the tool returned
    data: Any
    #: ``(n, 2)`` x, y of each observation in pixels of `image` at its finest level, by the table's names
    pixels: pd.DataFrame
    #: the same in pixels of the H&E as it was painted
    painted: pd.DataFrame
    #: micrometers a pixel of `image`
    mpp: float
    #: reads the same files with the package's own reader
    own: Callable[[], SpatialData]
    #: elements of `data`, where it is a `SpatialData`
    image: str | None = None
    shapes: str | None = None
    table: str | None = None
    #: the coordinate system that these share
    coordinate_system: str | None = None
    #: what the image shows: 1 px of it is so many px of the painted H&E
    reduction: float = 1.0
    #: the H&E as an array ``(y, x, 3)``, where the object does not hold it
    array: np.ndarray | None = None
    #: the file of the H&E as it was painted
    source: Path | None = None
    #: the column of the table that names its shapes, where that is not the instance key
    key: str | None = None

    @property
    def counts(self) -> AnnData:
        """The table, or the `AnnData` itself."""
        return self.data if isinstance(self.data, AnnData) else self.data.tables[self.table]

    def picture(self) -> np.ndarray:
        """Return the H&E, ``uint8 (y, x, 3)``."""
        if self.array is not None:
            return self.array
        return finest(self.data.images[self.image]).to_numpy().transpose(1, 2, 0)

    def resolved(self) -> pd.DataFrame:
        """Return the observations' places in the H&E's pixels, through the transformations: those with a shape."""
        shapes, image = self.data.shapes[self.shapes], self.data.images[self.image]
        forth, back = (matrix(element, self.coordinate_system) for element in (shapes, image))
        places = _moved(_frame(_middles(shapes), shapes.index), np.linalg.inv(back) @ forth)
        table = self.counts[self.pixels.index]
        instances = table.obs[self.key or table.uns["spatialdata_attrs"]["instance_key"]]
        known = instances.isin(places.index).to_numpy()
        return _frame(places.loc[instances[known]].to_numpy(), table.obs_names[known])


# --------------------------------------------------------------------------------------------------
# elements


def finest(image: xr.DataArray | xr.DataTree) -> xr.DataArray:
    """Return an image's finest level."""
    return image["scale0"]["image"] if isinstance(image, xr.DataTree) else image


@functools.cache
def painted_image(bundles: Path, seed: int = SEED) -> np.ndarray:
    """Return the H&E as it was painted, ``uint8 (y, x, 3)``."""
    return tifffile.imread(visium_bundle(bundles, seed) / "image.tif")


def matrix(element: Any, coordinate_system: str | None) -> np.ndarray:
    """Return the ``(3, 3)`` matrix from an element's own coordinates to a coordinate system."""
    return get_transformation(element, coordinate_system).to_affine_matrix(XY, XY)


def _affine(values: np.ndarray) -> Affine:
    return Affine(values, input_axes=XY, output_axes=XY)


def _middles(shapes: gpd.GeoDataFrame) -> np.ndarray:
    return shapely.get_coordinates(shapes.geometry.centroid)


def _frame(points: np.ndarray, names: pd.Index) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(points, dtype=float), columns=list(XY), index=names.copy())


def _moved(points: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    return _frame(points.to_numpy() @ values[:2, :2].T + values[:2, 2], points.index)


@contextmanager
def _quietly() -> Iterator[None]:
    """Readers warn of what they do not find; that is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------------
# files


def _written(path: Path, write: Callable[[Path], Any]) -> Path:
    """Return a bundle's folder, which is written beside and then moved there."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        draft.rename(path)
    return path


def visium_bundle(bundles: Path, seed: int = SEED) -> Path:
    """Write Space Ranger's folder; its small images are reduced by no power of two, as real ones are."""

    def write(path: Path) -> None:
        n_spots = N_SPOTS if seed == SEED else N_OTHER_SPOTS
        synthetic_visium(path, n_spots=n_spots, n_genes=N_GENES, image_size=SIDE, seed=seed, sample="tissue")
        if seed == SEED:
            # The same tissue, but for its outline.
            shutil.copy(visium_hd_bundle(bundles) / "image.tif", path / "image.tif")
        whole = tifffile.imread(path / "image.tif")
        factors = json.loads((path / "spatial" / "scalefactors_json.json").read_text())
        for name, side in (("hires", HIRES), ("lowres", LOWRES)):
            small = cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(path / "spatial" / f"tissue_{name}_image.png"), small[..., ::-1])
            factors[f"tissue_{name}_scalef"] = side / SIDE
        (path / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))

    return _written(bundles / f"visium_{seed}", write)


def visium_hd_bundle(bundles: Path) -> Path:
    """Write Space Ranger's folder of Visium HD."""

    def write(path: Path) -> None:
        synthetic_visium_hd(path, size_um=SIDE * MPP, n_genes=N_GENES, seed=SEED, bins=(8, 16))

    return _written(bundles / "visium_hd", write)


def xenium_bundle(bundles: Path) -> Path:
    """Write the instrument's folder, with the masks that other readers want."""

    def write(path: Path) -> None:
        synthetic_xenium(path, size_um=SIDE * MPP, n_genes=N_GENES, seed=SEED, pixel_um=PIXEL_UM)
        side = tifffile.TiffFile(path / "morphology_focus" / "morphology_focus_0000.ome.tif").series[0].shape[-1]
        with zarr.storage.ZipStore(path / "cells.zarr.zip", mode="a") as store:
            group = zarr.open_group(store, mode="a", zarr_format=2)
            for number, name in enumerate(("nucleus", "cell")):
                outlines = pd.read_parquet(path / f"{name}_boundaries.parquet")
                labels = _draw(outlines, "label_id", ("vertex_x", "vertex_y"), 1.0 / PIXEL_UM, (side, side))
                group.create_array(f"masks/{number}", data=labels.astype(np.uint32), chunks=(1024, 1024))

    return _written(bundles / "xenium", write)


def codex_bundle(bundles: Path) -> Path:
    """Write the CODEX Processor's folder, the H&E beside it and a table of plain names."""

    def write(path: Path) -> None:
        synthetic_codex(path, n_spots=28, n_genes=N_GENES, n_proteins=6, seed=SEED)
        plain = pd.read_csv(path / "cells.csv")
        plain.columns = [
            name.replace(":", "_") if name.startswith("cyc") else name.partition(":")[0] for name in plain.columns
        ]
        plain["region"] = [f"reg{number:03d}" for number in plain["region"]]
        (path / "processed").mkdir()
        plain.to_csv(path / "processed" / "reg001_compensated.csv", index=False)
        tifffile.imwrite(path / "processed" / "reg001.tif", tifffile.imread(path / "multiplex.ome.tif"))

    return _written(bundles / "codex", write)


def merscope_bundle(bundles: Path) -> Path:
    """Write Vizgen's folder of one region, of what the Xenium bundle holds."""

    def write(path: Path) -> None:
        source = _morphology(xenium_bundle(bundles))
        region = path / "region_0"
        (region / "images").mkdir(parents=True)
        shift = np.array(MERSCOPE_ORIGIN_UM)
        to_mosaic = np.diag([1.0 / PIXEL_UM, 1.0 / PIXEL_UM, 1.0])
        to_mosaic[:2, 2] = -shift / PIXEL_UM
        np.savetxt(region / "images" / "micron_to_mosaic_pixel_transform.csv", to_mosaic, delimiter=" ")
        for stain, plane in (("DAPI", source.dapi), ("PolyT", cv2.blur(source.dapi, (9, 9)))):
            tifffile.imwrite(region / "images" / f"mosaic_{stain}_z3.tif", plane)
        ids = (1_000_000_000_000 + np.arange(len(source.centers))).astype(str)
        counts = source.frame().set_index(pd.Index(ids, name="cell"))
        counts["Blank-1"] = np.arange(len(counts)) % 2
        counts.to_csv(region / "cell_by_gene.csv")
        centers = source.centers + shift
        about = pd.DataFrame({"fov": 0, "volume": 500.0}, index=pd.Index(ids, name="EntityID"))
        about["center_x"], about["center_y"] = centers.T
        about.to_csv(region / "cell_metadata.csv")
        cells = [shapely.MultiPolygon([shapely.affinity.translate(cell, *shift)]) for cell in source.cells]
        planes = [
            gpd.GeoDataFrame(
                {"EntityID": ids.astype(np.int64), "ZIndex": plane, "Type": "cell", "Geometry": cells},
                geometry="Geometry",
            )
            for plane in (0, 3)
        ]
        pd.concat(planes).to_parquet(region / "cell_boundaries.parquet")
        found = source.transcripts
        pd.DataFrame(
            {
                "barcode_id": 0,
                "global_x": found["x_location"] + shift[0],
                "global_y": found["y_location"] + shift[1],
                "global_z": 3.0,
                "x": 0.0,
                "y": 0.0,
                "fov": 0,
                "gene": found["feature_name"],
            }
        ).to_csv(region / "detected_transcripts.csv")

    return _written(bundles / "202401011200_run", write)


def cosmx_bundle(bundles: Path) -> Path:
    """Write NanoString's folder of two fields of view, of what the Xenium bundle holds.

    Its y point up: pictures of the fields are stored as they are seen, places count from their lower edge.
    """

    def write(path: Path) -> None:
        source = _morphology(xenium_bundle(bundles))
        for folder in ("CellComposite", "CellLabels"):
            (path / folder).mkdir(parents=True)
        height, width = source.dapi.shape
        half = width // 2
        centers = source.centers / PIXEL_UM
        fields = (centers[:, 0] >= half).astype(int)
        numbers = np.empty(len(centers), dtype=int)
        for field in (0, 1):
            numbers[fields == field] = np.arange(1, (fields == field).sum() + 1)
        x, y = centers[:, 0] - half * fields, height - centers[:, 1]
        keys = {"fov": fields + 1, "cell_ID": numbers}
        pd.DataFrame(
            keys
            | {"Area": 400, "CenterX_local_px": x, "CenterY_local_px": y}
            | {"CenterX_global_px": centers[:, 0] + COSMX_ORIGIN_PX[0], "CenterY_global_px": y + COSMX_ORIGIN_PX[1]}
        ).to_csv(path / "run_metadata_file.csv", index=False)
        counts = source.frame()
        nowhere = pd.DataFrame({"fov": [1, 2], "cell_ID": 0, **dict.fromkeys(source.genes, 3)})
        pd.concat([nowhere, pd.concat([pd.DataFrame(keys), counts], axis=1)]).to_csv(
            path / "run_exprMat_file.csv", index=False
        )
        pd.DataFrame({"fov": [1, 2], "x_global_px": [0, half], "y_global_px": 0}).to_csv(
            path / "run_fov_positions_file.csv", index=False
        )
        gray = cv2.convertScaleAbs(source.dapi, alpha=255.0 / source.dapi.max())
        for field in (0, 1):
            columns = slice(half * field, half * (field + 1))
            name = f"F{field + 1:03d}"
            picture = np.ascontiguousarray(np.stack([gray[:, columns]] * 3, axis=-1))
            cv2.imwrite(str(path / "CellComposite" / f"CellComposite_{name}.jpg"), picture)
            labels = np.concatenate([[0], np.where(fields == field, numbers, 0)])[source.labels[:, columns]]
            tifffile.imwrite(path / "CellLabels" / f"CellLabels_{name}.tif", labels.astype(np.uint16))
        found = source.transcripts
        points = found[["x_location", "y_location"]].to_numpy() / PIXEL_UM
        inside = (points[:, 0] >= half).astype(int)
        pd.DataFrame(
            {
                "fov": inside + 1,
                "cell_ID": 0,
                "x_local_px": points[:, 0] - half * inside,
                "y_local_px": height - points[:, 1],
                "z": 0,
                "target": found["feature_name"].to_numpy(),
                "CellComp": "None",
            }
        ).to_csv(path / "run_tx_file.csv", index=False)

    return _written(bundles / "cosmx", write)


@functools.cache
def _morphology(bundle: Path) -> _Morphology:
    """Read a bundle once per process: nothing changes what is read."""
    return _Morphology(bundle)


class _Morphology:
    """What a Xenium bundle holds, in its micrometers, to be written as another instrument writes it."""

    def __init__(self, bundle: Path) -> None:
        self.dapi = tifffile.imread(bundle / "morphology_focus" / "morphology_focus_0000.ome.tif").squeeze()
        matrix = sc.read_10x_h5(bundle / "cell_feature_matrix.h5")
        self.genes, self.counts = list(matrix.var_names), sp.csr_matrix(matrix.X)
        self.centers = pd.read_parquet(bundle / "cells.parquet")[["x_centroid", "y_centroid"]].to_numpy()
        outlines = pd.read_parquet(bundle / "cell_boundaries.parquet")
        self.cells = [
            shapely.Polygon(rows[["vertex_x", "vertex_y"]].to_numpy()) for _, rows in outlines.groupby("label_id")
        ]
        self.labels = _draw(outlines, "label_id", ("vertex_x", "vertex_y"), 1.0 / PIXEL_UM, self.dapi.shape)
        found = pd.read_parquet(bundle / "transcripts.parquet")
        self.transcripts = found[found["feature_name"].isin(self.genes)].iloc[::20].reset_index(drop=True)
        self.to_morphology = np.loadtxt(bundle / "truth_alignment.csv", delimiter=",")

    def frame(self) -> pd.DataFrame:
        """Return the counts, one row per cell."""
        return pd.DataFrame(self.counts.toarray().astype(int), columns=self.genes)

    def painted(self, names: pd.Index) -> pd.DataFrame:
        """Return the cells' places in pixels of the H&E."""
        return _moved(_frame(self.centers / PIXEL_UM, names), np.linalg.inv(self.to_morphology))


def _draw(outlines: pd.DataFrame, key: str, columns: Sequence[str], scale: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draw outlines as labels."""
    labels = np.zeros(shape, dtype=np.int32)
    for number, rows in outlines.groupby(key):
        cv2.fillPoly(
            labels, [np.rint(rows[list(columns)].to_numpy() * scale * 16.0).astype(np.int32)], int(number), shift=4
        )
    return labels


# --------------------------------------------------------------------------------------------------
# Visium


def own_visium(bundles: Path, seed: int = SEED) -> Peer:
    """The package's own section of a Visium run."""
    bundle = visium_bundle(bundles, seed)
    section = st.io.visium(bundle, image=bundle / "image.tif")
    table = section.tables["counts"]
    places = _positions(bundle, table.obs_names)
    return Peer(section, places, places, MPP, lambda: section, "he", "spots", "counts", "global")


def io_visium(bundles: Path, *, full: bool = True, name: str = "tissue", seed: int = SEED) -> Peer:
    """spatialdata-io's Visium; without its full-resolution image, the H&E is the one of 700 px."""
    bundle = visium_bundle(bundles, seed)
    with _quietly():
        data = spatialdata_io.visium(bundle, dataset_id=name, fullres_image_file="image.tif" if full else None)
    painted = _positions(bundle, data.tables["table"].obs_names)
    own = lambda: st.io.visium(bundle, image=bundle / "image.tif")
    if full:
        return Peer(data, painted, painted, MPP, own, f"{name}_full_image", name, "table", name)
    pixels = painted * HIRES / SIDE
    reduction = SIDE / HIRES
    return Peer(
        data, pixels, painted, MPP * reduction, own, f"{name}_hires_image", name, "table", name, reduction=reduction
    )


def io_visium_hd(
    bundles: Path, *, name: str | None = "tissue", bin_um: int = 16, squares: bool = True, labels: bool = False
) -> Peer:
    """spatialdata-io's Visium HD; without a name it calls the coordinate system ``""``.

    With `labels`, the table describes a raster of labels and not the shapes, which are still there.
    """
    bundle = visium_hd_bundle(bundles)
    with _quietly():
        data = spatialdata_io.visium_hd(
            bundle,
            dataset_id=name,
            load_segmentations_only=False,
            bins_as_squares=squares,
            annotate_table_by_labels=labels,
            fullres_image_file=bundle / "image.tif",
        )
    prefix, table = name or "", f"square_{bin_um:03d}um"
    names = data.tables[table].obs_names
    places = pd.read_parquet(bundle / "binned_outputs" / table / "spatial" / "tissue_positions.parquet")
    places = places.set_index("barcode").loc[names, ["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    painted = _frame(places.to_numpy(), names)
    own = lambda: st.io.visium_hd(bundle, image=bundle / "image.tif", bin_um=bin_um)
    image, shapes = f"{prefix}_full_image", f"{prefix}_{table}"
    return Peer(data, painted, painted, MPP, own, image, shapes, table, prefix, key="location_id")


def _positions(bundle: Path, names: pd.Index) -> pd.DataFrame:
    places = pd.read_csv(bundle / "spatial" / "tissue_positions.csv", index_col=0).loc[names]
    return _frame(places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(), names)


# --------------------------------------------------------------------------------------------------
# AnnData


def squidpy_visium(bundles: Path, *, images: Sequence[str] = ("hires", "lowres"), floats: bool = False) -> Peer:
    """squidpy's Visium, ``uint8``, or scanpy's, ``float32`` from 0 to 1, with the full image beside it.

    Places are in pixels of the full image; `images` are those of them that ``uns`` keeps.
    """
    import squidpy as sq

    bundle = visium_bundle(bundles)
    with _quietly():
        adata = (
            sc.read_visium(bundle) if floats else sq.read.visium(bundle, counts_file="filtered_feature_bc_matrix.h5")
        )
    library = adata.uns["spatial"]["tissue"]
    library["images"] = {key: image for key, image in library["images"].items() if key in images}
    painted = _positions(bundle, adata.obs_names)
    own = lambda: st.io.visium(bundle, image=bundle / "image.tif")
    return Peer(adata, painted, painted, MPP, own, array=painted_image(bundles))


def hires_only(bundles: Path, *, floats: bool = False) -> Peer:
    """The same without any full image: the H&E is ``uns["spatial"]["tissue"]["images"]["hires"]``."""
    peer = squidpy_visium(bundles, images=("hires",), floats=floats)
    reduction = SIDE / HIRES
    picture = np.asarray(peer.data.uns["spatial"]["tissue"]["images"]["hires"])
    picture = np.rint(picture * 255.0).astype(np.uint8) if floats else picture
    return replace(peer, pixels=peer.painted / reduction, mpp=MPP * reduction, reduction=reduction, array=picture)


def stlearn_visium(bundles: Path, *, quality: Literal["fulres", "hires"] = "hires", nested: bool = False) -> Peer:
    """stLearn's Visium: places of the picture it works on in ``obs``, and which one that is in ``uns``.

    ``use_quality`` stands beside the libraries, where a list of these finds it, or in the library (`nested`).
    """
    full = squidpy_visium(bundles, floats=True)
    peer = full if quality == "fulres" else hires_only(bundles, floats=True)
    adata = full.data
    library = adata.uns["spatial"]["tissue"]
    if quality == "fulres":
        library["images"]["fulres"] = full.array
    adata.obs["sum_counts"] = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["imagecol"], adata.obs["imagerow"] = peer.pixels["x"], peer.pixels["y"]
    (library if nested else adata.uns["spatial"])["use_quality"] = quality
    return replace(peer, data=adata)


def image_container(bundles: Path, *, reduced: bool = False) -> tuple[Any, Peer]:
    """squidpy's `ImageContainer` of the H&E, or of the one of 700 px, and the `AnnData` that goes with it."""
    import squidpy as sq

    peer = hires_only(bundles) if reduced else squidpy_visium(bundles)
    with _quietly():
        container = sq.im.ImageContainer(peer.array, layer="image", library_id="tissue", scale=1.0 / peer.reduction)
    return container, peer


# --------------------------------------------------------------------------------------------------
# cells


def io_xenium(bundles: Path, *, circles: bool = False, labels: bool = True) -> Peer:
    """spatialdata-io's Xenium with the H&E of the bundle, turned and scaled to the morphology image.

    Its table describes labels, whether or not they are read, or circles; all of these are one cell a row of the
    outlines too.
    """
    bundle = xenium_bundle(bundles)
    with _quietly():
        data = spatialdata_io.xenium(bundle, cells_as_circles=circles, cells_labels=labels, nucleus_labels=labels)
    painted = _morphology(bundle).painted(data.tables["table"].obs_names)
    own = lambda: st.io.xenium(bundle)
    shapes = "cell_circles" if circles else "cell_boundaries"
    return Peer(data, painted, painted, MPP, own, "he_image", shapes, "table", "global", key="cell_id")


def _skip_where_readers_do_not_run() -> None:
    """spatialdata-io 0.7.1 gives `AnnData` a `dtype` for MERSCOPE and CosMx, which anndata 0.13 does not take."""
    if Version(version("anndata")) >= Version("0.13") and Version(version("spatialdata-io")) <= Version("0.7.1"):
        pytest.skip("spatialdata-io's reader does not run with this version of anndata")


def io_merscope(bundles: Path) -> Peer:
    """spatialdata-io's MERSCOPE, to which the H&E was added under ``he`` by its alignment to the mosaic."""
    _skip_where_readers_do_not_run()
    bundle = merscope_bundle(bundles) / "region_0"
    with _quietly():
        data = spatialdata_io.merscope(bundle, z_layers=3, backend="dask_image")
    source = _morphology(xenium_bundle(bundles))
    data.images["he"] = _aligned(bundles, source.to_morphology)
    painted = source.painted(data.tables["table"].obs_names)
    own = lambda: st.io.xenium(xenium_bundle(bundles))
    shapes = "202401011200_run_region_0_polygons"
    return Peer(data, painted, painted, MPP, own, "he", shapes, "table", "global")


def io_cosmx(bundles: Path) -> Peer:
    """spatialdata-io's CosMx of two fields, to which the H&E was added under ``he``, mirrored.

    There are no shapes: its table describes labels, one element a field, and ``obsm["spatial"]`` are places in the
    field; those in ``global`` are ``obsm["global"]``.
    """
    _skip_where_readers_do_not_run()
    bundle = cosmx_bundle(bundles)
    with _quietly():
        data = spatialdata_io.cosmx(bundle)
    source = _morphology(xenium_bundle(bundles))
    height, width = source.dapi.shape
    up = np.array([[1.0, 0.0, COSMX_ORIGIN_PX[0]], [0.0, -1.0, height + COSMX_ORIGIN_PX[1]], [0.0, 0.0, 1.0]])
    data.images["he"] = _aligned(bundles, up @ source.to_morphology)
    fields = (source.centers[:, 0] / PIXEL_UM >= width // 2).astype(int)
    numbers = pd.Series(fields).groupby(fields).cumcount() + 1
    names = pd.Index([f"{number}_{field + 1}" for number, field in zip(numbers, fields, strict=True)])
    painted = source.painted(names).loc[data.tables["table"].obs_names]
    own = lambda: st.io.xenium(xenium_bundle(bundles))
    return Peer(data, painted, painted, MPP, own, "he", None, "table", "global")


def io_codex(bundles: Path) -> Peer:
    """spatialdata-io's CODEX, intensities of proteins, to which the H&E was added under ``he``."""
    bundle = codex_bundle(bundles)
    # That reader looks for the table and the image where it was started.
    before = Path.cwd()
    os.chdir(bundle / "processed")
    try:
        with _quietly():
            data = spatialdata_io.codex(bundle / "processed", fcs=False)
            for level in data.images["images"].values():
                level["image"].data = level["image"].data.persist()
    finally:
        os.chdir(before)
    to_multiplex = np.loadtxt(bundle / "he_alignment.csv", delimiter=",")
    he = tifffile.imread(bundle / "he.tif")
    data.images["he"] = _parse(he, {"global": _affine(to_multiplex)})
    table = data.tables["table"]
    # The table's places are whole pixels of the multiplex image.
    painted = _moved(_frame(table.obsm["spatial"], table.obs_names), np.linalg.inv(to_multiplex))
    own = lambda: st.io.codex(bundle, he_image=bundle / "he.tif")
    return Peer(data, painted, painted, MPP, own, "he", "reg001", "table", "global", source=bundle / "he.tif")


def _aligned(bundles: Path, values: np.ndarray) -> xr.DataTree:
    return _parse(painted_image(bundles), {"global": _affine(values)})


def _parse(
    picture: np.ndarray, transformations: Mapping[str, Any], factors: Sequence[int] | None = (2, 2)
) -> xr.DataArray | xr.DataTree:
    return Image2DModel.parse(
        np.ascontiguousarray(picture.transpose(2, 0, 1)),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=factors,
        transformations=dict(transformations),
    )


def sopa_cells(bundles: Path, *, genes: bool = True) -> Peer:
    """A Xenium object after sopa's segmentation of the H&E, and its table, of genes or of colors.

    Outlines are in pixels of the image that was segmented and have its transformations, as sopa's are; so has
    ``obsm["spatial"]``.
    """
    peer = io_xenium(bundles, labels=False)
    with _quietly():
        outlines = spatialdata.transform(peer.data.shapes["cell_boundaries"], to_coordinate_system="global")
    he = peer.data.images["he_image"]
    back = np.linalg.inv(matrix(he, "global"))
    names = peer.counts.obs_names
    moved = outlines.geometry.affine_transform([*back[0, :2], *back[1, :2], *back[:2, 2]])
    cells = gpd.GeoDataFrame(geometry=moved.to_numpy(), index=names.to_list())
    counts = sp.csr_matrix(peer.counts[:, :].X)
    intensities = pd.DataFrame(_around(peer), columns=["r", "g", "b"], index=names)
    table = (
        AnnData(counts, var=peer.counts.var)
        if genes
        else AnnData(intensities.to_numpy(), var=pd.DataFrame(index=intensities.columns))
    )
    table.obs_names = names
    if genes:
        table.obsm["intensities"] = intensities
    table.obsm["spatial"] = _middles(cells)
    table.obs = table.obs.assign(region="cellpose_boundaries", slide="he_image", cell_id=names, area=cells.area)
    table.obs[["region", "slide"]] = table.obs[["region", "slide"]].astype("category")
    table.uns["sopa_attrs"] = {"transcripts": genes, "intensities": True}
    data = peer.data
    known = get_transformation(he, get_all=True)
    data.shapes["cellpose_boundaries"] = ShapesModel.parse(cells, transformations=dict(known))
    with _quietly():
        data.tables["table"] = TableModel.parse(
            table, region="cellpose_boundaries", region_key="region", instance_key="cell_id"
        )
    data.attrs |= {
        "cell_segmentation_image": "morphology_focus",
        "tissue_segmentation_image": "he_image",
        "transcripts_dataframe": "transcripts",
        "boundaries_shapes": "cellpose_boundaries",
    }
    return replace(peer, shapes="cellpose_boundaries", key=None)


def _around(peer: Peer) -> np.ndarray:
    """Return the color at each observation."""
    picture = peer.picture()
    x, y = np.clip(peer.pixels.to_numpy().astype(int), 0, SIDE - 1).T
    return picture[y, x].astype(float)


# --------------------------------------------------------------------------------------------------
# slides


def lazyslide_store(bundles: Path, path: Path, *, image: bool = True, mpp: float | None = MPP) -> Peer:
    """A store as LazySlide 0.13 writes it (wsidata 0.12) after tissues, tiles and features; `image` as it is asked to.

    Features are in the table, and no gene. Observations are tiles of 128 px at 1 µm a pixel, by their middle.
    """
    picture = painted_image(bundles)
    images: dict[str, Any] = {}
    if image:
        images["wsi"] = _parse(picture, {"global": Identity()}, (2, 2, 2))
        small = cv2.resize(picture, (1000, 1000), interpolation=cv2.INTER_AREA)
        scale = Scale([SIDE / 1000] * 2, axes=XY)
        images["wsi_thumbnail"] = Image2DModel.parse(
            small.transpose(2, 0, 1), dims=("c", "y", "x"), transformations={"global": scale}
        )
    down = 1.0 / mpp if mpp else 1.0
    side = int(128 * down)
    corners = [(x, y) for y in range(0, SIDE - side + 1, side) for x in range(0, SIDE - side + 1, side)]
    tissue = shapely.Point(SIDE / 2.0, SIDE / 2.0).buffer(0.4 * SIDE)
    corners = [(x, y) for x, y in corners if tissue.intersects(shapely.box(x, y, x + side, y + side))]
    number = np.arange(len(corners))
    squares = [shapely.box(x, y, x + side, y + side) for x, y in corners]
    shapes = {
        "tissues": ShapesModel.parse(gpd.GeoDataFrame({"tissue_id": [0], "geometry": [tissue]})),
        "tiles": ShapesModel.parse(gpd.GeoDataFrame({"tile_id": number, "tissue_id": 0, "geometry": squares})),
    }
    features = np.random.default_rng(0).normal(size=(len(number), 48)).astype(np.float32)
    obs = pd.DataFrame(
        {"tile_id": number, "library_id": pd.Categorical(["tiles"] * len(number))}, index=number.astype(str)
    )
    table = TableModel.parse(
        AnnData(features, obs=obs), region="tiles", region_key="library_id", instance_key="tile_id"
    )
    sides = [SIDE >> level for level in range(4)]
    attrs = {
        "slide_properties": {
            "shape": [SIDE, SIDE],
            "n_level": len(sides),
            "level_shape": [[level, level] for level in sides],
            "level_downsample": [SIDE / level for level in sides],
            "mpp": mpp,
            "magnification": 20.0,
            "bounds": [0, 0, SIDE, SIDE],
            "scene": 0,
            "n_scenes": 1,
            "scene_names": ["Image 0"],
            "raw": "{}",
        },
        "tile_spec": {
            "tiles": {
                "height": 128,
                "width": 128,
                "stride_height": 128,
                "stride_width": 128,
                "mpp": 1.0 if mpp else None,
                "ops_level": 0,
                "ops_downsample": down,
                "base_level": 0,
                "base_downsample": down,
                "tissue_name": "tissues",
            }
        },
    }
    store = path / "slide.zarr"
    with _quietly():
        SpatialData(images=images, shapes=shapes, tables={"tiny_tiles": table}, attrs=attrs).write(store)
        data = spatialdata.read_zarr(store)
    places = _frame(np.array(corners) + side / 2.0, table.obs_names)
    slide = visium_bundle(bundles) / "image.tif"
    name = "wsi" if image else None
    return Peer(data, places, places, MPP, lambda: st.io.slide(slide), name, "tiles", "tiny_tiles", "global")


# --------------------------------------------------------------------------------------------------
# cohorts


def cohort(
    bundles: Path,
    *,
    names: Literal["suffix", "own"] = "suffix",
    tables: bool = True,
    shared_coordinates: bool = False,
    full: bool = True,
) -> dict[str, Peer]:
    """Two sections in one object, as `spatialdata.concatenate` makes it; both peers hold that object.

    Names are told apart by the suffix that `concatenate` gives to those of a dictionary, or are the sections' own.
    With `tables`, there is one table of both; with `shared_coordinates`, they lie over each other in one
    coordinate system.
    """
    seeds = {"one": SEED, "two": OTHER_SEED}
    alone = {
        key: io_visium(bundles, name=key if names == "own" else "tissue", seed=seed, full=full)
        for key, seed in seeds.items()
    }
    sections: Any = {key: peer.data for key, peer in alone.items()}
    options = {"merge_coordinate_systems_on_name": shared_coordinates} if names == "suffix" else {}
    with _quietly():
        data = spatialdata.concatenate(
            sections if names == "suffix" else list(sections.values()), concatenate_tables=tables, **options
        )
    peers = {}
    for number, (key, peer) in enumerate(alone.items()):
        ending = f"-{key}" if names == "suffix" else ""
        table = "table" if tables else f"table{ending or f'_{number}'}"
        region = f"{peer.shapes}{ending}"
        found = data.tables[table].obs_names[data.tables[table].obs["region"] == region]
        peers[key] = replace(
            peer,
            data=data,
            image=f"{peer.image}{ending}",
            shapes=region,
            table=table,
            coordinate_system=f"{peer.coordinate_system}{'' if shared_coordinates else ending}",
            pixels=_frame(peer.pixels.to_numpy(), found),
            painted=_frame(peer.painted.to_numpy(), found),
        )
    return peers


# --------------------------------------------------------------------------------------------------
# what users do to an object


def crop_by_box(peer: Peer, low: Sequence[float], high: Sequence[float]) -> Peer:
    """Cut a box out of all elements; it is given in the coordinate system that they share."""
    with _quietly():
        data = peer.data.query.bounding_box(
            axes=XY,
            min_coordinate=list(low),
            max_coordinate=list(high),
            target_coordinate_system=peer.coordinate_system,
        )
    return _cut(peer, data)


def crop_by_polygon(peer: Peer, outline: Sequence[tuple[float, float]]) -> Peer:
    """Cut a polygon out of all elements; of images, its bounds."""
    with _quietly():
        data = peer.data.query.polygon(shapely.Polygon(outline), target_coordinate_system=peer.coordinate_system)
    return _cut(peer, data)


def _cut(peer: Peer, data: SpatialData) -> Peer:
    before, after = peer.picture(), finest(data.images[peer.image]).to_numpy().transpose(1, 2, 0)
    left, top = _offset(before, after, peer, data)
    kept = data.tables[peer.table].obs_names if peer.table in data.tables else peer.pixels.index[:0]
    kept = kept[kept.isin(peer.pixels.index)]
    return replace(peer, data=data, pixels=peer.pixels.loc[kept] - [left, top], painted=peer.painted.loc[kept])


def _offset(before: np.ndarray, after: np.ndarray, peer: Peer, data: SpatialData) -> tuple[int, int]:
    """Return which pixel is the first of a crop: found by looking, as what is stated may be one off."""
    change = np.linalg.inv(matrix(peer.data.images[peer.image], peer.coordinate_system)) @ matrix(
        data.images[peer.image], peer.coordinate_system
    )
    left, top = np.rint(change[:2, 2]).astype(int)
    height, width = after.shape[:2]
    for y in (top, top - 1, top + 1):
        for x in (left, left - 1, left + 1):
            if min(x, y) >= 0 and np.array_equal(before[y : y + height, x : x + width], after):
                return int(x), int(y)
    raise AssertionError(f"Expected the crop at {left}, {top} of the image or a pixel from there, found it elsewhere.")


def rotate_coordinates(
    peer: Peer, *, degrees: float = 30.0, mirror: bool = True, scale: float = 1.0, move: bool = True
) -> Peer:
    """Turn, and mirror, the coordinate system in which the elements lie; the image's array stays as it is.

    Shapes are moved, so that their own coordinates are those of the coordinate system and the image alone has a
    matrix; or (`move` off) they have one as well. ``obsm["spatial"]`` is left as it was.
    """
    angle = np.radians(degrees)
    turn = np.eye(3)
    turn[:2, :2] = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn[:2, 2] = (300.0, -120.0)
    if mirror:
        turn = turn @ np.diag([-1.0, 1.0, 1.0])
    data, target = _copied(peer.data), peer.coordinate_system
    with _quietly():
        for kind, name, element in list(data.gen_spatial_elements()):
            known = get_transformation(element, get_all=True)
            if target not in known:
                continue
            chain = Chain([known[target], _affine(turn)])
            set_transformation(element, {target: chain}, set_all=True)
            if kind == "shapes" and move:
                data.shapes[name] = spatialdata.transform(element, to_coordinate_system=target)
    return replace(peer, data=data)


def rotate_array(peer: Peer, *, quarters: int = 1, mirror: bool = False) -> Peer:
    """Turn the image's array by quarters, against the clock, and mirror it, with a matrix that makes up for it."""
    picture = peer.picture()
    height, width = picture.shape[:2]
    step = np.eye(3)
    for _ in range(quarters % 4):
        # x, y of the turned array from those of the array: the right edge comes to be the upper one.
        step = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, width], [0.0, 0.0, 1.0]]) @ step
        height, width = width, height
    turned = np.rot90(picture, quarters)
    if mirror:
        step = np.array([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ step
        turned = turned[:, ::-1]
    element = peer.data.images[peer.image]
    known = get_transformation(element, get_all=True)
    back = _affine(np.linalg.inv(step))
    data = _copied(peer.data)
    factors = [2] * (len(element) - 1) if isinstance(element, xr.DataTree) else None
    data.images[peer.image] = _parse(turned, {key: Chain([back, value]) for key, value in known.items()}, factors)
    return replace(peer, data=data, pixels=_moved(peer.pixels, step))


def write_and_read(peer: Peer, path: Path) -> Peer:
    """Write an object to a store and read it."""
    with _quietly():
        if isinstance(peer.data, AnnData):
            peer.data.write_h5ad(path / "object.h5ad")
            return replace(peer, data=sc.read_h5ad(path / "object.h5ad"))
        peer.data.write(path / "object.zarr")
        return replace(peer, data=spatialdata.read_zarr(path / "object.zarr"))


def lognormalize(peer: Peer, *, layer: str | None = "counts") -> Peer:
    """Normalize the table's ``X`` as scanpy's tutorials do, counts kept in a layer, or nowhere."""
    table = peer.counts.copy()
    if layer is not None:
        table.layers[layer] = table.X.copy()
    with _quietly():
        sc.pp.normalize_total(table, target_sum=1e4)
        sc.pp.log1p(table)
    if isinstance(peer.data, AnnData):
        return replace(peer, data=table)
    data = _copied(peer.data)
    data.tables[peer.table] = table
    return replace(peer, data=data)


def _copied(data: SpatialData) -> SpatialData:
    """Return an object whose elements, transformations and attributes are its own; nothing writes into pixels."""
    elements = {
        name: element.copy(deep=False) if kind in ("images", "labels") else element.copy()
        for kind, name, element in data.gen_elements()
    }
    copy = SpatialData.init_from_elements(elements)
    copy.attrs = deepcopy(data.attrs)
    return copy
