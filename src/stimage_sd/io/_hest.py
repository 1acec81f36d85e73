"""Read samples of HEST-1k."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._damaged_files import reading
from stimage_sd.io._anndata import from_anndata
from stimage_sd.io._geojson import CELL_TYPE, read_geojson
from stimage_sd.io._geojson_features import CLASSIFICATION, frame_of, parts_of, read_features, repair, rows_of
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import check_mpp, require_file

#: metadata entries of the resolution; the first with a number is used. HEST itself uses its estimate from the spots
RESOLUTIONS = ("pixel_size_um_estimated", "pixel_size_um_embedded")
#: metadata entries of the slide's width and height
SIZE = ("fullres_px_width", "fullres_px_height")
#: file formats of nuclei, fastest first
NUCLEI_SUFFIXES = (".parquet", ".geojson", ".geojson.zip")
#: name of the tissue shapes
TISSUE_CONTOURS = "tissue_contours"


def hest(
    folder: str | Path, sample: str, *, mpp: float | None = None, nuclei: bool = True, tissue: bool = True
) -> SpatialData:
    """Read a sample of HEST-1k.

    Parameters
    ----------
    folder
        Folder of the data set, with ``st/<sample>.h5ad``, ``wsis/<sample>.tif`` and ``metadata/<sample>.json``.
    sample
        Sample id, such as ``"TENX99"``.
    mpp
        Micrometers per pixel of the slide. By default HEST's estimate from the spots, or else the value embedded in the
        slide.
    nuclei
        Whether to read ``cellvit_seg/<sample>_cellvit_seg.parquet``, ``.geojson`` or ``.geojson.zip``, if the file
        exists.
    tissue
        Whether to read ``tissue_seg/<sample>_contours.geojson``, if the file exists.

    Returns
    -------
    A section as from `stimage_sd.io.from_anndata`, with the platform ``"hest"``. ``attrs["stimage_sd"]["metadata"]``
    has the sample's metadata from the JSON (technology, organ, species, ...). The patient is taken from there.
    ``shapes["nuclei"]`` has the CellViT nuclei with ``cell_type``. ``shapes["tissue_contours"]`` has the tissue.

    Raises
    ------
    FileNotFoundError
        If a file of the sample is missing.
    ValueError
        If the JSON or the h5ad is damaged, the slide size differs from the JSON, or `from_anndata` refuses the sample.

    Warns
    -----
    UserWarning
        If spots outside the slide are left out. Some samples of HEST have such spots.

    Notes
    -----
    Positions are read from ``obsm["spatial"]``, which HEST fills with ``pxl_col_in_fullres`` and
    ``pxl_row_in_fullres``: x and y in pixels of the slide. HEST-1k has pseudo-spots for Xenium and Visium HD.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("st", "wsis", "metadata"):
    ...     (folder / name).mkdir()
    >>> adata = ad.AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> adata.uns["spatial"] = {"ST": {"scalefactors": {"spot_diameter_fullres": 55.0}}}
    >>> adata.write_h5ad(folder / "st" / "TENX99.h5ad")
    >>> tifffile.imwrite(folder / "wsis" / "TENX99.tif", np.full((256, 256, 3), 230, np.uint8), tile=(64, 64))
    >>> _ = (folder / "metadata" / "TENX99.json").write_text('{"pixel_size_um_estimated": 1.0, "organ": "Breast"}')
    >>> section = hest(folder, "TENX99")
    >>> section.attrs["stimage_sd"]["mpp"], section.attrs["stimage_sd"]["metadata"]["organ"]
    (1.0, 'Breast')
    """
    check_mpp(mpp)
    folder = Path(folder).expanduser()
    files = {
        name: _require(folder, sample, name, suffix)
        for name, suffix in (("st", "h5ad"), ("wsis", "tif"), ("metadata", "json"))
    }
    metadata = _metadata(files["metadata"])
    mpp = mpp if mpp is not None else _resolution(metadata)
    height, width = _check_size(files["wsis"], metadata)
    adata = _on_slide(_read_counts(files["st"]), width, height, sample)
    sdata = from_anndata(
        adata, files["wsis"], sample=sample, mpp=mpp, spot_diameter_px=_diameter(adata, metadata, mpp),
        library_id="ST" if "ST" in adata.uns.get("spatial", {}) else None,
    )  # fmt: skip
    patient = metadata.get("patient")
    named = isinstance(patient, str) and patient.strip() not in ("", "nan", "None")
    contract.remember(sdata, platform="hest", metadata=metadata, patient=patient if named else None)
    if nuclei:
        _read_nuclei(sdata, folder / "cellvit_seg", sample)
    contours = folder / "tissue_seg" / f"{sample}_contours.geojson"
    if tissue and contours.is_file():
        read_geojson(sdata, contours, key_added=TISSUE_CONTOURS)
    contract.record(sdata, "io.hest", folder=folder, sample=sample, mpp=contract.mpp(sdata), n_spots=adata.n_obs)
    return sdata


def _require(folder: Path, sample: str, name: str, suffix: str) -> Path:
    path = folder / name / f"{sample}.{suffix}"
    if not path.is_file() and (folder / name).is_dir():
        known = sorted(file.stem for file in (folder / name).glob(f"*.{suffix}"))
        raise FileNotFoundError(f"No sample {sample!r} in {folder / name}; it has {known[:10]} ({len(known)} in all).")
    return require_file(path, what=f"the file of sample {sample!r}")


def _read_counts(path: Path) -> ad.AnnData:
    with reading(path, what="an AnnData object (h5ad)"):
        return ad.read_h5ad(path)


def _metadata(path: Path) -> dict[str, Any]:
    """Read the JSON with NaN as `None`, since zarr attributes cannot hold NaN."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, found a file that cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected an object of JSON in {path}, found {type(content).__name__}.")
    return content


def _resolution(metadata: dict[str, Any]) -> float | None:
    for name in RESOLUTIONS:
        value = metadata.get(name)
        if isinstance(value, int | float) and np.isfinite(value) and value > 0:
            return float(value)
    return None


def _check_size(path: Path, metadata: dict[str, Any]) -> tuple[int, int]:
    levels, _ = open_raster(path)
    height, width = levels[0].shape[1:]
    stated = tuple(metadata.get(name) for name in SIZE)
    if None not in stated and stated != (width, height):
        raise ValueError(
            f"Expected a slide of {stated[0]} x {stated[1]} px at {path}, as the sample's JSON states, found {width} x "
            f"{height} px. Download it again."
        )
    return height, width


def _on_slide(adata: ad.AnnData, width: int, height: int, sample: str) -> ad.AnnData:
    """Drop spots outside the slide, with a warning."""
    centers = np.asarray(adata.obsm["spatial"], dtype=np.float64)[:, :2] if "spatial" in adata.obsm else None
    if centers is None:
        return adata
    outside = ((centers < 0) | (centers >= (width, height))).any(axis=1)
    if not outside.any() or outside.all():
        return adata
    warnings.warn(
        f"{int(outside.sum())} of {len(centers)} spots of sample {sample!r} lie outside its slide of {width} x "
        f"{height} px. They are left out.",
        UserWarning,
        stacklevel=3,
    )
    return adata[~outside].copy()


def _diameter(adata: ad.AnnData, metadata: dict[str, Any], mpp: float | None) -> float | None:
    """Return the spot diameter in pixels, from HEST's scale factors or else from the JSON."""
    for library in adata.uns.get("spatial", {}).values():
        stated = library.get("scalefactors", {}).get("spot_diameter_fullres")
        if stated is not None:
            return float(stated)
    diameter = metadata.get("spot_diameter")
    return float(diameter) / mpp if isinstance(diameter, int | float) and mpp is not None else None


def _read_nuclei(sdata: SpatialData, folder: Path, sample: str) -> None:
    """Read the CellViT nuclei. Parquet has one row per nucleus, GeoJSON one MultiPolygon per type."""
    stem = folder / f"{sample}_cellvit_seg"
    path = next((Path(f"{stem}{suffix}") for suffix in NUCLEI_SUFFIXES if Path(f"{stem}{suffix}").is_file()), None)
    if path is None:
        return
    if path.suffix == ".parquet":
        with reading(path, what="nuclei of CellViT"):
            frame = gpd.read_parquet(path)
            types, geometry = frame["class"], frame.geometry
    else:
        frame = parts_of(repair(frame_of(rows_of(read_features(path))))[0])
        types, geometry = frame[CLASSIFICATION], frame.geometry
    columns = {CELL_TYPE: types.astype("category").to_numpy()}
    contract.write_shapes(sdata, gpd.GeoDataFrame(columns, geometry=geometry.to_numpy()), name=contract.NUCLEI)
