"""10x Visium sections, from the output of any Space Ranger version."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._damaged_files import reading
from stimage_sd.io._section import assemble, check_mpp, check_unique
from stimage_sd.io._space_ranger import (
    HIRES,
    PIXEL_COLUMNS,
    POSITION_COLUMNS,
    SCALEFACTORS,
    TOLERANCE,
    find_entry,
    open_he,
    read_scalefactors,
    sample_name,
)
from stimage_sd.io._tenx import Matrix, other_types, read_matrix, tables_of
from stimage_sd.io._text import open_text
from stimage_sd.stats.lattice import VISIUM_STEPS, pitch_px

MATRIX, RAW = "filtered_feature_bc_matrix", "raw_feature_bc_matrix"
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
#: names of Visium HD bins; `visium_hd` reads these
BIN = re.compile(r"s_\d{3}um_")
HD = "Read it with `stimage_sd.io.visium_hd`, and pass the run's `outs` folder."


def visium(
    path: str | Path,
    *,
    image: str | Path | None = None,
    mpp: float | None = None,
    sample: str | None = None,
    patient: str | None = None,
) -> SpatialData:
    """Read a Visium section from the output folder of Space Ranger.

    The section holds the spots in tissue that have counts, in the order of the matrix.

    Parameters
    ----------
    path
        Folder of the run or its ``outs``. It holds ``filtered_feature_bc_matrix.h5`` or a folder of that name, else
        ``raw_feature_bc_matrix`` in either form. Its folder ``spatial`` holds ``tissue_positions`` (``.parquet``,
        ``.csv``, or ``_list.csv`` without a header), ``scalefactors_json.json`` and ``tissue_hires_image.png``. File
        names may have a prefix. Files in the folder of the matrix may be gzipped. Positions may be quoted and
        separated by commas, semicolons or tabs, in UTF-8, UTF-16 or Windows-1252.
    image
        The full-resolution image that was the input of Space Ranger. Without it, ``tissue_hires_image.png`` is the H&E
        of the section, and positions and resolution refer to its pixels.
    mpp
        Micrometers per pixel of the full-resolution image. By default estimated as 100 µm over the median distance of
        neighboring spots in pixels. Without neighboring spots, the estimate is 65 µm over ``spot_diameter_fullres``.
    sample
        Sample id. By default the name of the folder of the run.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).

    Returns
    -------
    A section with the image ``he``, the shapes ``spots`` (circles of 55 µm) and the table ``counts``. ``X`` is CSR of
    int32. ``obs`` has ``in_tissue``, ``array_row`` and ``array_col``. ``obsm["spatial"]`` is float64 (x, y) in H&E
    pixels. Antibody counts are the table ``proteins`` of the same spots, with ``X`` in float32. If the matrix has
    several genomes, ``var["genome"]`` holds the genome of each gene. Gene names in several genomes get the genome as
    prefix.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If matrix and positions share no barcode, a barcode is repeated, a table is not in the format of Space Ranger,
        the run is Visium HD, most spots lie outside the image, or the image is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If barcodes of matrix and positions differ, spots outside the image are left out, no full-resolution image is
        given, the image does not have the size implied by the scale factors, pitch and spot diameter give different
        resolutions, gene names are repeated, or features are neither genes nor antibodies.

    Notes
    -----
    According to the page of 10x Genomics on spatial outputs, ``spot_diameter_fullres`` is the diameter of a
    theoretical spot of 65 µm. The pitch is measured on the positions and does not need this convention.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_visium(Path(tempfile.mkdtemp()) / "run", n_spots=20, n_genes=9)
    >>> sdata = sti.io.visium(run, image=run / "image.tif")
    >>> sdata.tables["counts"].shape, round(sdata.attrs["stimage_sd"]["mpp"], 3)
    ((20, 9), 0.5)
    """
    check_mpp(mpp)
    files = find_files(Path(path).expanduser())
    with reading(files.scalefactors, what="the scale factors of Space Ranger"):
        scalefactors = _read_scalefactors(files.scalefactors)
    with reading(files.positions, what="the positions of the spots"):
        positions = _read_positions(files.positions)
    with reading(files.matrix, what="a matrix of counts of Space Ranger"):
        matrix = read_matrix(files.matrix)
    rows, kept = _match(matrix, positions, files)
    tables = tables_of(matrix, None if len(rows) == len(matrix.barcodes) else rows, where=str(files.matrix))
    table = tables[contract.COUNTS]
    if others := other_types(matrix):
        warnings.warn(f"Features of the types {others} in {files.matrix} are left out.", UserWarning, stacklevel=2)
    full_mpp, mpp_source = _resolution(mpp, positions, scalefactors, source=files.positions)

    levels, scale, _ = open_he(
        image,
        hires=files.hires,
        hires_scale=float(scalefactors["tissue_hires_scalef"]),
        beside=files.positions,
        sample=files.sample,
        stacklevel=2,
    )
    for name in POSITION_COLUMNS[1:4]:
        table.obs[name] = kept[name].to_numpy(dtype=int)
    table.obsm["spatial"] = kept[PIXEL_COLUMNS].to_numpy(dtype=np.float64) * scale
    sdata = assemble(
        levels,
        table,
        diameter_px=contract.SPOT_UM / full_mpp * scale,
        sample=sample if sample is not None else files.sample,
        platform="visium",
        mpp=full_mpp / scale,
        proteins=tables.get(contract.PROTEINS),
    )
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.visium",
        path=path,
        image=image if image is not None else files.hires,
        image_scale=scale,
        mpp=full_mpp / scale,
        mpp_source=mpp_source,
        matrix=files.matrix,
        n_spots=sdata.tables[contract.COUNTS].n_obs,
        n_counted=len(matrix.barcodes),
        n_in_tissue=int((positions["in_tissue"] == 1).sum()),
    )
    return sdata


@dataclass(frozen=True)
class Files:
    """Paths of the files of a run."""

    sample: str
    matrix: Path
    positions: Path
    scalefactors: Path
    hires: Path | None

    @property
    def is_raw(self) -> bool:
        """Return whether the matrix has all barcodes of the slide."""
        return RAW in self.matrix.name


def find_files(path: Path) -> Files:
    if not path.is_dir():
        raise FileNotFoundError(
            f"Expected the folder of a Space Ranger run at {path}, found no folder. Check the path."
        )
    outs = path / "outs" if (path / "outs").is_dir() else path
    if (outs / "binned_outputs").is_dir():
        raise ValueError(f"Expected a Visium run with spots, found the bins of a Visium HD run in {outs}. {HD}")
    if outs.name == "segmented_outputs" or (outs / "segmented_outputs").is_dir():
        raise ValueError(f"Expected a Visium run with spots, found cells of a Visium HD run in {outs}. {HD}")
    spatial = outs / "spatial" if (outs / "spatial").is_dir() else outs
    places = (find_entry(outs, f"{name}{ending}") for name in (MATRIX, RAW) for ending in (".h5", ""))
    matrix = next((candidate for candidate in places if candidate is not None), None)
    positions = next((candidate for name in POSITIONS if (candidate := find_entry(spatial, name))), None)
    scalefactors = find_entry(spatial, SCALEFACTORS)
    if matrix is None or positions is None or scalefactors is None:
        wanted = {f"{MATRIX}.h5 or {MATRIX}/": matrix, " or ".join(POSITIONS): positions, SCALEFACTORS: scalefactors}
        missing = [f"{outs.name if index == 0 else spatial.name}/{name}" for index, name in enumerate(wanted)]
        missing = [name for name, candidate in zip(missing, wanted.values(), strict=True) if candidate is None]
        here = sorted(entry.relative_to(outs).as_posix() for folder in {outs, spatial} for entry in folder.iterdir())
        raise FileNotFoundError(
            f"Expected a Space Ranger output in {outs}, did not find {'; '.join(missing)}. It holds: {here[:20]}. "
            "Pass the run's `outs` folder."
        )
    return Files(sample_name(outs), matrix, positions, scalefactors, find_entry(spatial, HIRES))


def _read_scalefactors(path: Path) -> dict[str, float]:
    scalefactors = read_scalefactors(path, ["spot_diameter_fullres", "tissue_hires_scalef"])
    if "bin_size_um" in scalefactors:
        raise ValueError(
            f"Expected a Visium run with spots, found bins of {scalefactors['bin_size_um']} µm of a Visium HD run in "
            f"{path}. {HD}"
        )
    return scalefactors


def _read_positions(path: Path) -> pd.DataFrame:
    """Read positions, indexed by barcode. Files of Space Ranger 1 have no header."""
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else _read_text_positions(path)
    missing = [name for name in POSITION_COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(
            f"Expected the columns {POSITION_COLUMNS} in {path}, found {list(frame.columns)}. Use the file as written "
            "by Space Ranger."
        )
    kinds = {name: frame[name].dtype for name in POSITION_COLUMNS[1:]}
    wrong = [name for name, kind in kinds.items() if not pd.api.types.is_numeric_dtype(kind)]
    if wrong or frame[POSITION_COLUMNS].isna().any(axis=None):
        raise ValueError(
            f"Expected a barcode and numbers in every row of {path}, found {wrong or 'some that are missing'}. Use "
            "the file as written by Space Ranger."
        )
    frame["barcode"] = frame["barcode"].astype(str)
    check_unique(pd.Index(frame["barcode"]), what="barcode", where=str(path))
    return frame.set_index("barcode")


def _read_text_positions(path: Path) -> pd.DataFrame:
    with open_text(path) as lines:
        first = lines.readline()
        lines.seek(0)
        separator = max(",;\t", key=first.count)
        headed = first.replace('"', "").strip().startswith("barcode")
        frame = pd.read_csv(lines, sep=separator, header=0 if headed else None)
    if not headed and frame.shape[1] == len(POSITION_COLUMNS):
        frame.columns = pd.Index(POSITION_COLUMNS)
    return frame.rename(columns=lambda name: str(name).strip())


def _match(matrix: Matrix, positions: pd.DataFrame, files: Files) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the rows of the matrix in tissue, and their positions. Warn about lost barcodes."""
    if BIN.match(str(matrix.barcodes[0])):
        raise ValueError(
            f"Expected a Visium run with spots, found bins of a Visium HD run in {files.matrix}, such as "
            f"{matrix.barcodes[0]!r}. {HD}"
        )
    in_tissue = positions.index[positions["in_tissue"] == 1]
    rows = np.flatnonzero(matrix.barcodes.isin(in_tissue))
    if not len(rows):
        example = in_tissue[0] if len(in_tissue) else "none"
        raise ValueError(
            f"Counts and spots share no barcode. {files.matrix} has barcodes such as {matrix.barcodes[0]!r}. The spots "
            f"in tissue of {files.positions} have names such as {example!r}. Pass the folder of one run."
        )
    without_place = 0 if files.is_raw else len(matrix.barcodes) - len(rows)
    without_counts = len(in_tissue) - len(rows)
    if without_place or without_counts:
        warnings.warn(
            f"Barcodes of {files.matrix.name} and {files.positions.name} of {files.sample!r} differ: "
            f"{without_place} of {len(matrix.barcodes)} with counts are not in tissue, {without_counts} of "
            f"{len(in_tissue)} in tissue have no counts; {len(rows)} are kept. All Visium slides share their barcodes: "
            "check that both files are of one section.",
            UserWarning,
            stacklevel=3,
        )
    kept = matrix.barcodes[rows]
    return rows, positions.loc[kept]


def _resolution(
    mpp: float | None, positions: pd.DataFrame, scalefactors: dict[str, float], *, source: Path
) -> tuple[float, str]:
    """Return the micrometers per pixel at full resolution, and their source."""
    if mpp is not None:
        return mpp, "given"
    centers = positions[PIXEL_COLUMNS].to_numpy(dtype=np.float64)
    pitch = pitch_px(centers, positions[["array_row", "array_col"]].to_numpy(), VISIUM_STEPS)
    by_diameter = contract.NOMINAL_SPOT_UM / scalefactors["spot_diameter_fullres"]
    if not pitch:
        return by_diameter, "spot diameter"
    by_pitch = contract.PITCH_UM / pitch
    if abs(by_pitch / by_diameter - 1.0) > TOLERANCE:
        warnings.warn(
            f"The spots of {source} are {pitch:.1f} px apart, which gives {by_pitch:.4f} µm per pixel and is used; its "
            f"`spot_diameter_fullres` gives {by_diameter:.4f}. Pass `mpp=` if you know the resolution.",
            UserWarning,
            stacklevel=3,
        )
    return by_pitch, "array pitch"
