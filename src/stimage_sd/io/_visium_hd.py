"""10x Visium HD sections: bins or cells from the output of Space Ranger, with the H&E."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import geopandas
import numpy as np
import shapely
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import attach_spatial
from stimage_sd.io._section import on_image
from stimage_sd.io._space_ranger import HE, HIRES, SCALEFACTORS, TOLERANCE, find_entry, open_he, sample_name
from stimage_sd.io._tenx import Matrix, read_matrix, tables_of
from stimage_sd.io._visium_hd_parts import (
    Positions,
    Scale,
    read_cells,
    read_positions,
    read_scale,
    read_slide_transform,
    warn_if_newer,
)

#: largest median distance of the positions from a lattice, µm; perspective gives less, shuffled rows much more
STRAY_UM = 20.0
#: pitch of the barcode squares on the slide, µm; all bins are made of these squares
SLIDE_UM = 2.0
#: squares built per block
PART = 100_000
#: largest distance of a bin from its position by the slide transformation, in bins
MISPLACED = 2.0

BINNED, SEGMENTED = "binned_outputs", "segmented_outputs"
SLICE = "feature_slice.h5"
MATRICES = ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
CELL_MATRICES = ("filtered_feature_cell_matrix.h5", "raw_feature_cell_matrix.h5")
#: outlines of cells and of nuclei; the second file of each also holds clusters
CELLS = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
NUCLEI = ("nucleus_segmentations.geojson", "graphclust_annotated_nucleus_segmentations.geojson")
POSITIONS = "tissue_positions.parquet"

Measured = Literal["bins", "cells"]


def visium_hd(
    path: str | Path,
    *,
    bin_um: int = 8,
    image: str | Path | None = None,
    sample: str | None = None,
    patient: str | None = None,
    units: Measured | None = None,
) -> SpatialData:
    """Read bins of one size, or cells, of a Visium HD section from the output folder of Space Ranger.

    The section holds the bins in tissue, or the cells with an outline, in the order of the filtered matrix.

    Parameters
    ----------
    path
        Folder of the run or its ``outs``, with ``feature_slice.h5`` (with or without a prefix) and ``binned_outputs``.
        Each folder ``square_008um`` and so on in ``binned_outputs`` holds ``filtered_feature_bc_matrix.h5`` and
        ``spatial`` with ``tissue_positions.parquet``, ``scalefactors_json.json`` and ``tissue_hires_image.png``. If
        the filtered matrix is missing, ``raw_feature_bc_matrix.h5`` is read. A copy of the folder ``binned_outputs``
        alone is also read.

        Cells are segmented by Space Ranger 4 and later. They are in ``segmented_outputs``, with
        ``filtered_feature_cell_matrix.h5``, ``cell_segmentations.geojson``, ``nucleus_segmentations.geojson`` and
        ``spatial``.
    bin_um
        Side of the bins, µm: 2, 8, 16, or a custom size of the run.
    image
        The full-resolution image that was the input of Space Ranger. Without it, ``tissue_hires_image.png`` is the H&E
        of the section, and positions and resolution refer to its pixels.
    sample
        Sample id. By default the name of the folder of the run.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).
    units
        ``"bins"`` or ``"cells"``. By default bins, or cells if there are no bins.

    Returns
    -------
    A section with the image ``he``, the shapes ``bins`` and the table ``counts``. The bins are squares, rotated like
    the slide under the microscope. ``X`` is CSR of int32, bins × genes. ``obs`` has ``in_tissue``, ``array_row`` and
    ``array_col``. ``obsm["spatial"]`` is float64 (x, y) of the bin centers in H&E pixels. The resolution is the
    ``microns_per_pixel`` of Space Ranger. Antibody counts are the table ``proteins``.

    For cells, the section has the shapes ``cells``, the table ``counts`` of the cells, and the shapes ``nuclei`` with
    the column ``cell_id`` if the run has nuclei.

    Raises
    ------
    FileNotFoundError
        If a file is missing, or there are no bins of this size. The error lists the sizes.
    ValueError
        If a file is truncated, empty, or from another run than the other files. Also if most bins lie outside the
        image, if the distance of the bins does not match their size, or if the image is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If no full-resolution image is given, the image does not have the stated resolution or the size implied by the
        scale factors, Space Ranger is newer than version 4, gene names are repeated, or units are left out. Left out
        are bins of the filtered matrix outside tissue, cells without an outline, and units outside the image.

    Notes
    -----
    The reader of spatialdata-io is not used for two reasons. Its squares are always parallel to the sides of the
    image, and its full-resolution image is one chunk. The low-resolution image is not read. Positions are compared with
    the slide transformation in ``feature_slice.h5``, which maps the 2 µm squares to pixels.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_visium_hd(Path(tempfile.mkdtemp()) / "run", size_um=250.0, n_genes=9)
    >>> sdata = sti.io.visium_hd(run, bin_um=16, image=run / "image.tif")
    >>> sdata.tables["counts"].n_vars, sdata.shapes["bins"].geom_type.unique().tolist()
    (9, ['Polygon'])
    """
    if not isinstance(bin_um, int) or bin_um < 1:
        raise ValueError(f"Expected `bin_um` to be a whole number of micrometers, such as 8, found {bin_um!r}.")
    files = _Files.find(Path(path).expanduser(), bin_um, units)
    scale = read_scale(files.scalefactors, None if files.has_cells else bin_um)
    # The matrix comes first, as all other files have to match it.
    matrix = read_matrix(files.matrix)
    warn_if_newer(matrix, files.matrix)
    sample = sample if sample is not None else files.sample
    if files.has_cells:
        sdata, reduction = _read_cells(files, matrix, scale, image, sample)
    else:
        sdata, reduction = _read_bins(files, matrix, scale, bin_um, image, sample)
    attach_spatial(sdata)
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.visium_hd",
        path=path,
        bin_um=None if files.has_cells else bin_um,
        units="cells" if files.has_cells else "bins",
        image=image if image is not None else files.hires,
        image_scale=reduction,
        mpp=contract.info(sdata)["mpp"],
        version=matrix.version,
        matrix=files.matrix,
        n_units=sdata.tables[contract.COUNTS].n_obs,
        n_counted=len(matrix.barcodes),
    )
    return sdata


def _read_bins(
    files: _Files, matrix: Matrix, scale: Scale, bin_um: int, image: str | Path | None, sample: str
) -> tuple[SpatialData, float]:
    """Return the section of bins, and its pixels per full-resolution pixel."""
    positions = read_positions(files.positions, matrix, files.matrix)
    edges = _fit_lattice(positions, scale, bin_um, files)
    if files.feature_slice is not None:
        _check_slide(positions, edges, bin_um, files)
    levels, reduction, _ = _open_image(image, files, scale)
    source = files.hires if image is None else image
    inside = on_image(
        positions.centers * reduction, levels[0].shape[1:], what="bins", where=str(files.positions), image=str(source)
    )
    positions = positions.taken(inside)
    centers, edges = positions.centers * reduction, edges * reduction
    whole = len(positions.rows) == len(matrix.barcodes)
    tables = tables_of(matrix, None if whole else positions.rows, where=str(files.matrix))
    for table in tables.values():
        table.obs["in_tissue"] = np.ones(table.n_obs, dtype=int)
        table.obs["array_row"], table.obs["array_col"] = positions.lattice.T
    shapes = {contract.BINS: geopandas.GeoDataFrame(geometry=_squares(centers, edges))}
    return _assemble(levels, shapes, tables, centers, sample=sample, mpp=scale.mpp / reduction), reduction


def _read_cells(
    files: _Files, matrix: Matrix, scale: Scale, image: str | Path | None, sample: str
) -> tuple[SpatialData, float]:
    """Return the section of cells, and its pixels per full-resolution pixel."""
    levels, reduction, _ = _open_image(image, files, scale)
    rows, cells, nuclei = read_cells(files.positions, files.nuclei, matrix, files.matrix, reduction)
    centers = shapely.get_coordinates(cells.centroid)
    source = files.hires if image is None else image
    inside = on_image(centers, levels[0].shape[1:], what="cells", where=str(files.positions), image=str(source))
    tables = tables_of(matrix, rows[inside], where=str(files.matrix))
    for table in tables.values():
        table.obs[contract.INSTANCE_KEY] = table.obs_names
    shapes = {contract.CELLS: cells[inside]} | ({} if nuclei is None else {contract.NUCLEI: nuclei})
    return _assemble(levels, shapes, tables, centers[inside], sample=sample, mpp=scale.mpp / reduction), reduction


def _open_image(image: str | Path | None, files: _Files, scale: Scale) -> HE:
    """Open the H&E, and warn if it states another resolution than the scale factors."""
    he = open_he(
        image, hires=files.hires, hires_scale=scale.hires, beside=files.positions, sample=files.sample, stacklevel=4
    )
    if he.mpp is not None and abs(he.mpp / scale.mpp - 1.0) > TOLERANCE:
        warnings.warn(
            f"{image} states {he.mpp:.4f} µm per pixel, {files.scalefactors} {scale.mpp:.4f}, which is used. Pass the "
            "input image of Space Ranger as `image=` unless this is right.",
            UserWarning,
            stacklevel=4,
        )
    return he


def _assemble(
    levels: list[da.Array],
    shapes: dict[str, geopandas.GeoDataFrame],
    tables: dict[str, AnnData],
    centers: np.ndarray,
    *,
    sample: str,
    mpp: float,
) -> SpatialData:
    """Build the section. The tables annotate the first shapes."""
    sdata = SpatialData(
        images={contract.IMAGE: contract.build_image(levels)},
        shapes={name: contract.build_shapes(frame, mpp=None) for name, frame in shapes.items()},
    )
    contract.register(sdata, sample=sample, platform="visium_hd", image=contract.IMAGE, mpp=mpp)
    for name, table in tables.items():
        table.obsm["spatial"] = centers.copy()
        sdata.tables[name] = contract.annotate(table, region=next(iter(shapes)))
    return sdata


# --------------------------------------------------------------------------------------------------
# the run


@dataclass(frozen=True)
class _Files:
    """Paths of the files of a run. With `has_cells`, `positions` is the file of cell outlines."""

    sample: str
    matrix: Path
    positions: Path
    scalefactors: Path
    hires: Path | None
    feature_slice: Path | None = None
    nuclei: Path | None = None
    has_cells: bool = False

    @classmethod
    def find(cls, path: Path, bin_um: int, units: Measured | None) -> _Files:
        if not path.is_dir():
            raise FileNotFoundError(
                f"Expected the folder of a Space Ranger run at {path}, found no folder. Check the path, and unpack an "
                "archive first."
            )
        if units not in (None, "bins", "cells"):
            raise ValueError(f"Expected `units` to be 'bins' or 'cells', found {units!r}.")
        outs = path / "outs" if (path / "outs").is_dir() else path
        if re.fullmatch(r"square_\d{3}um", outs.name):
            raise ValueError(
                f"Expected the folder of a Visium HD run, found the folder of one bin size, {outs}. Pass the folder "
                f"{outs.parent}, and `bin_um={int(outs.name[7:10])}`."
            )
        cells = outs if outs.name == SEGMENTED else outs / SEGMENTED
        bins = outs if outs.name == BINNED else outs / BINNED
        if units == "cells" or (units is None and cells.is_dir() and not bins.is_dir()):
            return cls.of_cells(outs, cells)
        if not bins.is_dir():
            raise FileNotFoundError(
                f"Expected the folder {BINNED} of a Visium HD run in {outs}, found none. It holds: "
                f"{_entries(outs)}. Pass the run's `outs` folder; a run with spots is read by `stimage_sd.io.visium`."
            )
        return cls.of_bins(outs, bins, bin_um)

    @classmethod
    def of_bins(cls, outs: Path, bins: Path, bin_um: int) -> _Files:
        alone = outs == bins
        folder = bins / f"square_{bin_um:03d}um"
        if not folder.is_dir():
            sizes = [int(entry.name[7:-2]) for entry in sorted(bins.glob("square_*um")) if entry.name[7:-2].isdigit()]
            raise FileNotFoundError(
                f"Expected bins of {bin_um} µm in {folder}, found bins of {sizes} µm in {bins}. Pass one of these as "
                "`bin_um=`."
            )
        feature_slice = None if alone else find_entry(outs, SLICE, separator="_")
        if feature_slice is None and not alone:
            raise FileNotFoundError(
                f"Expected {SLICE} in {outs}, found none. It holds: {_entries(outs)}. Copy the run complete, or pass "
                f"its folder {BINNED} to read the bins without it."
            )
        spatial = folder / "spatial"
        parts = {"matrix": _first(folder, MATRICES), "positions": spatial / POSITIONS}
        return cls(**_complete(bins, parts | {"scalefactors": spatial / SCALEFACTORS}), feature_slice=feature_slice)

    @classmethod
    def of_cells(cls, outs: Path, cells: Path) -> _Files:
        if not cells.is_dir():
            raise FileNotFoundError(
                f"Expected the folder {SEGMENTED} of a Visium HD run in {outs}, found none. It holds: {_entries(outs)}."
                " Space Ranger segments cells from version 4 on; pass `units='bins'` to read bins."
            )
        parts = {"matrix": _first(cells, CELL_MATRICES), "positions": _first(cells, CELLS)}
        parts["scalefactors"] = cells / "spatial" / SCALEFACTORS
        nuclei = _first(cells, NUCLEI)
        return cls(**_complete(cells, parts), nuclei=nuclei if nuclei.is_file() else None, has_cells=True)


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first existing file of the given names, else the path of the first name."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _complete(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    """Check that the files of a run exist, and add its image and sample name."""
    missing = [str(part.relative_to(folder)) for part in parts.values() if not part.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected the files of a Visium HD run in {folder}, did not find {' and '.join(missing)}. Copy the run "
            "again, complete."
        )
    # All bin sizes share one image. A partial copy may have the image only in the top folder.
    pictures = [place / HIRES for place in (parts["scalefactors"].parent, folder.parent / "spatial")]
    return {
        **parts,
        "hires": next((picture for picture in pictures if picture.is_file()), None),
        "sample": sample_name(folder.resolve().parent),
    }


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())[:20]


# --------------------------------------------------------------------------------------------------
# the lattice


def _fit_lattice(positions: Positions, scale: Scale, bin_um: int, files: _Files) -> np.ndarray:
    """Return the ``(2, 2)`` steps (x, y) to the next column and to the next row, full-resolution px.

    The slide is rotated under the microscope, so bins are not parallel to the image. The steps come from a
    least-squares affine fit of columns and rows to pixels.
    """
    lattice = positions.lattice[:, ::-1].astype(np.float64)
    lattice -= lattice.mean(axis=0)
    centers = positions.centers - positions.centers.mean(axis=0)
    gram = lattice.T @ lattice
    if np.linalg.matrix_rank(gram) < 2:
        raise ValueError(
            f"Expected bins in several rows and columns in {files.positions}, found {len(lattice)} bin(s) in a line. "
            "Copy the run again, complete."
        )
    edges = np.linalg.solve(gram, lattice.T @ centers)
    pitch = np.linalg.norm(edges, axis=1) * scale.mpp
    stray = np.median(np.linalg.norm(centers - lattice @ edges, axis=1)) * scale.mpp
    if (np.abs(pitch / bin_um - 1.0) > TOLERANCE).any() or stray > STRAY_UM:
        raise ValueError(
            f"Expected bins of {bin_um} µm on a lattice in {files.positions}, found steps of {pitch[0]:.2f} µm to the "
            f"next column and {pitch[1]:.2f} µm to the next row at {scale.mpp:.4f} µm per pixel "
            f"({files.scalefactors}), and bins {stray:.1f} µm away from the lattice. Take both files of one run."
        )
    return edges


def _check_slide(positions: Positions, edges: np.ndarray, bin_um: int, files: _Files) -> None:
    """Raise `ValueError` if the positions of the bins do not match the slide transformation."""
    assert files.feature_slice is not None
    transform = read_slide_transform(files.feature_slice, SLIDE_UM)
    if transform is None:
        return
    # Bin centers in numbers of 2 µm squares. Whole numbers are the centers of the squares.
    spots = (positions.lattice[:, ::-1] + 0.5) * bin_um / SLIDE_UM - 0.5
    mapped = np.column_stack([spots, np.ones(len(spots))]) @ transform.T
    away = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - positions.centers, axis=1).max()
    limit = MISPLACED * np.linalg.norm(edges, axis=1).max()
    if not away <= limit:
        raise ValueError(
            f"{files.positions} and {files.feature_slice} are of different runs: bins lie up to {away:.1f} px (at most "
            f"{limit:.1f}) away from where the slide's transformation has them. Take both files of one run."
        )


def _squares(centers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return one square per center, ``(n, 2)``, with the two lattice steps as sides."""
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]]) @ edges
    squares = np.empty(len(centers), dtype=object)
    # Built in blocks, as the rings of the squares need as much memory as the squares.
    for start in range(0, len(centers), PART):
        squares[start : start + PART] = shapely.polygons(centers[start : start + PART, None, :] + corners)
    return squares
