"""10x Visium HD: the square bins that Space Ranger wrote, and the H&E of the section."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import dask.array as da
import geopandas
import numpy as np
import shapely
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns
from stimage_sd.io._raster import open_raster, raster_size
from stimage_sd.io._section import as_counts, unique_genes
from stimage_sd.io._visium_hd_parts import (
    Matrix,
    Positions,
    Scale,
    find_entry,
    read_matrix,
    read_positions,
    read_scale,
    read_slide_transform,
)

#: two ways to the same length or resolution may differ by this much
TOLERANCE = 0.05
#: positions are this far, µm, from a lattice at most; perspective makes less of it, shuffled rows much more
STRAY_UM = 20.0
#: pitch of the slide's own squares, of which all bins are made, µm
SLIDE_UM = 2.0
#: squares made at a time
PART = 100_000
#: the bins' positions may be so many bins from where the slide's transformation has them
MISPLACED = 2.0

BINNED = "binned_outputs"
SLICE = "feature_slice.h5"
MATRIX = "filtered_feature_bc_matrix.h5"
POSITIONS = "tissue_positions.parquet"
SCALEFACTORS = "scalefactors_json.json"
HIRES = "tissue_hires_image.png"


def visium_hd(
    path: str | Path, *, bin_um: int = 8, image: str | Path | None = None, sample: str | None = None
) -> SpatialData:
    """Read the bins of one size of a Visium HD section from the folder that Space Ranger wrote.

    Kept are the bins in tissue that the filtered matrix has, in its order.

    Parameters
    ----------
    path
        The run's folder or its ``outs``: ``feature_slice.h5`` (with or without a prefix) and ``binned_outputs``, of
        which ``square_008um`` and the like are read: ``filtered_feature_bc_matrix.h5`` and ``spatial`` with
        ``tissue_positions.parquet``, ``scalefactors_json.json`` and ``tissue_hires_image.png``. Or the folder
        ``binned_outputs`` alone, where it was copied without the rest.
    bin_um
        Side of the bins, µm: 2, 8, 16, or whatever Space Ranger was told.
    image
        The full-resolution image that Space Ranger was given. Without it ``tissue_hires_image.png`` is the section's
        H&E: positions and resolution are then those of its pixels.
    sample
        Sample id; the name of the run's folder unless given.

    Returns
    -------
    A section with the image ``he``, the shapes ``bins`` (squares, turned as the slide lay under the microscope) and
    the table ``counts``: ``X`` CSR of int32, bins × genes, ``obs`` with ``in_tissue``, ``array_row`` and
    ``array_col``, ``obsm["spatial"]`` float64 (x, y) of the bins' centres in H&E pixels. Its resolution is the
    ``microns_per_pixel`` of Space Ranger.

    Raises
    ------
    FileNotFoundError
        If a file is missing, or there are no bins of that size; the error lists the sizes.
    ValueError
        If a file is truncated, empty, or not of the same run as the others, if the bins lie outside the image or are
        not as far apart as their size says, or if the image is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If no full-resolution image is given, the image states another resolution or has not the size that the scale
        factors imply, Space Ranger is newer than version 4, or gene names are repeated.

    Notes
    -----
    spatialdata-io's reader of the same format is not used: its squares are parallel to the image's sides however the
    slide lay, and the full-resolution image is one chunk. Not read are the raw matrix and the low-resolution image.
    Positions are compared with the slide's transformation in ``feature_slice.h5``, which maps
    the numbers of its 2 µm squares to pixels.

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
        raise ValueError(f"Expected `bin_um` to be a whole number of micrometres, such as 8, found {bin_um!r}.")
    files = _Files.find(Path(path).expanduser(), bin_um)
    # First what everything else has to agree with.
    scale = read_scale(files.scalefactors, bin_um)
    matrix = read_matrix(files.matrix)
    positions = read_positions(files.positions, matrix, files.matrix)
    edges = _fit_lattice(positions, scale, bin_um, files)
    if files.feature_slice is not None:
        _check_slide(positions, edges, bin_um, files)

    levels, reduction = _open_image(image, files, scale)
    _check_inside(positions, levels[0], reduction, source=files.hires if image is None else image, files=files)
    centres, edges = positions.centres * reduction, edges * reduction
    table = _build_table(matrix, positions, centres, where=str(files.matrix))
    squares = geopandas.GeoDataFrame(geometry=_squares(centres, edges))
    sdata = SpatialData(
        images={contract.IMAGE: contract.build_image(levels)},
        shapes={contract.BINS: contract.build_shapes(squares, mpp=None)},
    )
    name = sample if sample is not None else files.sample
    mpp = scale.mpp / reduction
    contract.register(sdata, sample=name, platform="visium_hd", image=contract.IMAGE, mpp=mpp)
    table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=bin_um / mpp)
    sdata.tables[contract.COUNTS] = contract.annotate(table, region=contract.BINS)
    contract.record(
        sdata,
        "io.visium_hd",
        path=path,
        bin_um=bin_um,
        image=image if image is not None else files.hires,
        image_scale=reduction,
        mpp=mpp,
        version=matrix.version,
        n_bins=table.n_obs,
        n_counted=len(matrix.barcodes),
        n_in_tissue=positions.n_in_tissue,
    )
    return sdata


# --------------------------------------------------------------------------------------------------
# the run


@dataclass(frozen=True)
class _Files:
    """Where the parts of a run lie."""

    sample: str
    matrix: Path
    positions: Path
    scalefactors: Path
    hires: Path | None
    feature_slice: Path | None

    @classmethod
    def find(cls, path: Path, bin_um: int) -> _Files:
        if not path.is_dir():
            raise FileNotFoundError(
                f"Expected the folder of a Space Ranger run at {path}, found no folder. Check the path, and unpack an "
                "archive first."
            )
        outs = path / "outs" if (path / "outs").is_dir() else path
        alone = outs.name == BINNED
        bins = outs if alone else outs / BINNED
        if not bins.is_dir():
            raise FileNotFoundError(
                f"Expected the folder {BINNED} of a Visium HD run in {outs}, found none. It holds: "
                f"{_entries(outs)}. Pass the run's `outs` folder; a run with spots is read by `stimage_sd.io.visium`."
            )
        folder = bins / f"square_{bin_um:03d}um"
        if not folder.is_dir():
            sizes = [int(entry.name[7:-2]) for entry in sorted(bins.glob("square_*um")) if entry.name[7:-2].isdigit()]
            raise FileNotFoundError(
                f"Expected bins of {bin_um} µm in {folder}, found bins of {sizes} µm in {bins}. Pass one of these as "
                "`bin_um=`."
            )
        feature_slice = None if alone else find_entry(outs, SLICE)
        if feature_slice is None and not alone:
            raise FileNotFoundError(
                f"Expected {SLICE} in {outs}, found none. It holds: {_entries(outs)}. Copy the run complete, or pass "
                f"its folder {BINNED} to read the bins without it."
            )
        spatial = folder / "spatial"
        matrix, positions, scalefactors = folder / MATRIX, spatial / POSITIONS, spatial / SCALEFACTORS
        parts = (matrix, positions, scalefactors)
        missing = [str(part.relative_to(bins)) for part in parts if not part.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Expected the files of a Visium HD run in {bins}, did not find {' and '.join(missing)}. Copy the run "
                "again, complete."
            )
        # All sizes have the same image; a copy of one of them may have it only at the top.
        pictures = [place / HIRES for place in (spatial, bins.parent / "spatial")]
        hires = next((picture for picture in pictures if picture.is_file()), None)
        run = bins.resolve().parent
        sample = run.parent.name if run.name == "outs" else run.name
        return cls(sample, matrix, positions, scalefactors, hires, feature_slice)


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())[:20]


# --------------------------------------------------------------------------------------------------
# the lattice


def _fit_lattice(positions: Positions, scale: Scale, bin_um: int, files: _Files) -> np.ndarray:
    """Return the ``(2, 2)`` steps (x, y) to the next column and to the next row, full-resolution px.

    The slide lies turned under the microscope, so that a square's sides are not the image's. They are those of the
    best affine map from columns and rows to pixels.
    """
    lattice = positions.lattice[:, ::-1].astype(np.float64)
    lattice -= lattice.mean(axis=0)
    centres = positions.centres - positions.centres.mean(axis=0)
    gram = lattice.T @ lattice
    if np.linalg.matrix_rank(gram) < 2:
        raise ValueError(
            f"Expected bins in several rows and columns in {files.positions}, found {len(lattice)} bin(s) in a line. "
            "Copy the run again, complete."
        )
    edges = np.linalg.solve(gram, lattice.T @ centres)
    pitch = np.linalg.norm(edges, axis=1) * scale.mpp
    stray = np.median(np.linalg.norm(centres - lattice @ edges, axis=1)) * scale.mpp
    if (np.abs(pitch / bin_um - 1.0) > TOLERANCE).any() or stray > STRAY_UM:
        raise ValueError(
            f"Expected bins of {bin_um} µm on a lattice in {files.positions}, found steps of {pitch[0]:.2f} µm to the "
            f"next column and {pitch[1]:.2f} µm to the next row at {scale.mpp:.4f} µm a pixel ({files.scalefactors}), "
            f"and bins {stray:.1f} µm away from it. Take both files of one run."
        )
    return edges


def _check_slide(positions: Positions, edges: np.ndarray, bin_um: int, files: _Files) -> None:
    """Raise `ValueError` where the bins do not lie where the slide's transformation has them."""
    assert files.feature_slice is not None
    transform = read_slide_transform(files.feature_slice, SLIDE_UM)
    if transform is None:
        return
    # A bin's centre among the slide's squares, whose numbers count their centres.
    spots = (positions.lattice[:, ::-1] + 0.5) * bin_um / SLIDE_UM - 0.5
    mapped = np.column_stack([spots, np.ones(len(spots))]) @ transform.T
    away = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - positions.centres, axis=1).max()
    limit = MISPLACED * np.linalg.norm(edges, axis=1).max()
    if not away <= limit:
        raise ValueError(
            f"{files.positions} and {files.feature_slice} are of different runs: bins lie up to {away:.1f} px (at most "
            f"{limit:.1f}) away from where the slide's transformation has them. Take both files of one run."
        )


def _squares(centres: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the square around each of ``(n, 2)`` centres whose sides are two steps of the lattice."""
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]]) @ edges
    squares = np.empty(len(centres), dtype=object)
    # A part at a time: the rings that squares are made of take as much memory as these.
    for start in range(0, len(centres), PART):
        squares[start : start + PART] = shapely.polygons(centres[start : start + PART, None, :] + corners)
    return squares


# --------------------------------------------------------------------------------------------------
# image and table


def _open_image(image: str | Path | None, files: _Files, scale: Scale) -> tuple[list[da.Array], float]:
    """Return the H&E's levels and its pixels a full-resolution pixel."""
    if image is None:
        if files.hires is None:
            raise FileNotFoundError(
                f"Expected {HIRES} beside {files.positions}, found none. Pass the full-resolution image as `image=`."
            )
        warnings.warn(
            f"No full-resolution image given: {files.hires.name} is the H&E of {files.sample!r}, and its tiles will be "
            f"coarse ({1.0 / scale.hires:.1f} times). Pass the image that Space Ranger was given as `image=`.",
            UserWarning,
            stacklevel=3,
        )
        return open_raster(files.hires)[0], scale.hires
    levels, stated = open_raster(image)
    if stated is not None and abs(stated / scale.mpp - 1.0) > TOLERANCE:
        warnings.warn(
            f"{image} states {stated:.4f} µm a pixel, {files.scalefactors} {scale.mpp:.4f}, which is used. Pass the "
            "image that Space Ranger was given as `image=` unless this is right.",
            UserWarning,
            stacklevel=3,
        )
    implied = [] if files.hires is None else [size / scale.hires for size in raster_size(files.hires)]
    sizes = levels[0].shape[1:]
    if any(abs(size / expected - 1.0) > TOLERANCE for size, expected in zip(sizes, implied, strict=False)):
        warnings.warn(
            f"{image} has {sizes[1]} x {sizes[0]} px; by its scale factors the image that Space Ranger was given had "
            f"about {implied[1]:.0f} x {implied[0]:.0f}. Pass that one as `image=` unless this is right.",
            UserWarning,
            stacklevel=3,
        )
    return levels, 1.0


def _check_inside(
    positions: Positions, finest: da.Array, reduction: float, *, source: str | Path | None, files: _Files
) -> None:
    height, width = finest.shape[1:]
    centres = positions.centres * reduction
    outside = ((centres < 0) | (centres >= (width, height))).any(axis=1)
    if outside.any():
        low, high = centres.min(axis=0), centres.max(axis=0)
        raise ValueError(
            f"Expected the bins of {files.positions} inside {source} of {width} x {height} px (x, y), found "
            f"{int(outside.sum())} of {len(centres)} outside; they span x {low[0]:.0f} to {high[0]:.0f}, y "
            f"{low[1]:.0f} to {high[1]:.0f}. Pass the image that Space Ranger was given, at full resolution."
        )


def _build_table(matrix: Matrix, positions: Positions, centres: np.ndarray, *, where: str) -> AnnData:
    genes = (matrix.features["feature_types"] == "Gene Expression").to_numpy()
    if not genes.any():
        kinds = sorted(set(matrix.features["feature_types"]))
        raise ValueError(f"Expected features of the type 'Gene Expression' in {where}, found {kinds}.")
    # Choosing copies, and all is what there is to choose as a rule.
    values = matrix.values if len(positions.rows) == len(matrix.barcodes) else matrix.values[positions.rows]
    values = as_counts(values if genes.all() else values[:, np.flatnonzero(genes)], where=where)
    variables = matrix.features[genes]
    table = AnnData(X=values, var=variables.set_axis(unique_genes(variables.index, where=where), axis=0))
    table.obs_names = matrix.barcodes[positions.rows]
    table.obs["in_tissue"] = np.ones(table.n_obs, dtype=int)
    table.obs["array_row"], table.obs["array_col"] = positions.lattice.T
    table.obsm["spatial"] = centres
    return table
