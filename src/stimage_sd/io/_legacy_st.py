"""Read legacy Spatial Transcriptomics from a table of counts, an H&E image and a table of spots."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._damaged_files import reading
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import as_counts, assemble, check_mpp, check_unique, require_file, unique_genes
from stimage_sd.io._text import open_text
from stimage_sd.stats.lattice import pitch_px

SPOT_COLUMNS = ["x", "y", "pixel_x", "pixel_y", "selected"]
#: steps to the neighbors one pitch away on the square array
STEPS = [(1, 0), (0, 1)]


def legacy_st(
    counts: str | Path,
    image: str | Path,
    spots: str | Path,
    *,
    sample: str | None = None,
    patient: str | None = None,
    mpp: float | None = None,
    spot_um: float = 100.0,
    pitch_um: float = 200.0,
) -> SpatialData:
    r"""Read a section of legacy Spatial Transcriptomics, such as her2st.

    Selected spots with counts are kept, in the order of the counts.

    Parameters
    ----------
    counts
        Tab-separated table of raw counts, spots × genes, plain or gzipped. Rows are named ``XxY`` by their
        position on the array.
    image
        H&E image at full resolution.
    spots
        Tab-separated table with ``x``, ``y`` (position on the array), ``pixel_x``, ``pixel_y`` (pixels of the
        image) and ``selected`` (1 for spots under tissue).
    sample
        Sample id. Default: the file name of the counts up to its first dot.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).
    mpp
        Micrometers per pixel of the image. By default estimated as `pitch_um` divided by the median distance of
        neighboring spots in pixels.
    spot_um
        Spot diameter in µm.
    pitch_um
        Distance between the centers of neighboring spots in µm.

    Returns
    -------
    A section with the image ``he``, the shapes ``spots`` and the table ``counts``. The table has ``X``, CSR of int32,
    ``obs`` with ``array_row`` and ``array_col``, and ``obsm["spatial"]``, float64 (x, y) in H&E pixels.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the tables share no barcode, lack a column, hold values other than raw counts or place most spots off the
        image, if no two spots are neighbors and `mpp` is not given, or if the image is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If spots with counts are left out because they are not selected or lie off the image, or if gene names are
        repeated.

    Notes
    -----
    Arrays with spots of 100 µm at a pitch of 200 µm are from Ståhl et al. 2016. her2st (Andersson et al. 2021) used
    these arrays.

    Examples
    --------
    >>> import tempfile
    >>> import cv2, numpy as np
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = cv2.imwrite(str(folder / "he.png"), np.full((600, 600, 3), 230, np.uint8))
    >>> spot_rows = "1\t1\t150\t200\t1\n2\t1\t350\t200\t1\n"
    >>> _ = (folder / "spots.tsv").write_text("x\ty\tpixel_x\tpixel_y\tselected\n" + spot_rows)
    >>> _ = (folder / "tiny.tsv").write_text("\tERBB2\tACTB\n1x1\t4\t0\n2x1\t0\t9\n")
    >>> sdata = legacy_st(folder / "tiny.tsv", folder / "he.png", folder / "spots.tsv")
    >>> sdata.tables["counts"].shape, sdata.attrs["stimage_sd"]["mpp"]
    ((2, 2), 1.0)
    """
    counts_path = require_file(counts, what="a table of counts")
    spots_path = require_file(spots, what="a table of spots")
    image_path = require_file(image, what="an H&E image")
    check_mpp(mpp)
    if not (spot_um > 0 and pitch_um > 0):
        raise ValueError(f"Expected positive `spot_um` and `pitch_um` (µm), found {spot_um!r} and {pitch_um!r}.")

    with reading(spots_path, what="a table of spots"):
        positions = _read_spots(spots_path)
    with reading(counts_path, what="a table of counts"):
        table = _read_counts(counts_path)
    n_counted, n_selected = table.n_obs, len(positions)
    shared = table.obs_names[table.obs_names.isin(positions.index)]
    if shared.empty:
        raise ValueError(
            f"Counts and spots share no barcode: {counts_path} has spots such as {table.obs_names[0]!r}, and "
            f"{spots_path} has selected spots such as {positions.index[0]!r}. Pass the two tables of one section."
        )
    if len(shared) < table.n_obs:
        warnings.warn(
            f"{table.n_obs - len(shared)} of {table.n_obs} spots of {counts_path} are not among the {len(positions)} "
            f"selected spots of {spots_path} and are left out. Check that both tables are of one section.",
            UserWarning,
            stacklevel=2,
        )
    table = table[shared].copy()
    positions = positions.loc[shared]

    estimated = mpp is None
    if mpp is None:
        mpp = _estimate_mpp(positions, pitch_um=pitch_um, source=spots_path)
    table.obs["array_row"] = positions["y"].to_numpy()
    table.obs["array_col"] = positions["x"].to_numpy()
    table.obsm["spatial"] = positions[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)

    levels, _ = open_raster(image_path)
    sdata = assemble(
        levels,
        table,
        diameter_px=spot_um / mpp,
        sample=sample if sample is not None else counts_path.name.split(".")[0],
        platform="legacy_st",
        mpp=mpp,
    )
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.legacy_st",
        counts=counts_path,
        image=image_path,
        spots=spots_path,
        spot_um=spot_um,
        pitch_um=pitch_um,
        mpp=mpp,
        mpp_source="array pitch" if estimated else "given",
        n_spots=sdata.tables[contract.COUNTS].n_obs,
        n_counted=n_counted,
        n_selected=n_selected,
    )
    return sdata


def _read_spots(path: Path) -> pd.DataFrame:
    """Read the selected spots, indexed by ``XxY``."""
    with open_text(path) as lines:
        frame = pd.read_csv(lines, sep="\t")
    missing = [name for name in SPOT_COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(
            f"Expected columns {SPOT_COLUMNS} in the spot table {path}, found {list(frame.columns)}. "
            f"Add {missing}; `selected` is 1 for spots under tissue."
        )
    wrong = [name for name in SPOT_COLUMNS if not pd.api.types.is_numeric_dtype(frame[name])]
    if wrong:
        raise ValueError(f"Expected numbers in the columns {SPOT_COLUMNS} of {path}, found text in {wrong}.")
    frame = frame[frame["selected"] == 1]
    if frame.empty:
        raise ValueError(f"Expected spots with `selected` = 1 in {path}, found none.")
    frame = frame.astype({"x": int, "y": int})
    frame.index = pd.Index(frame["x"].astype(str) + "x" + frame["y"].astype(str))
    check_unique(frame.index, what="spot", where=str(path))
    return frame


def _read_counts(path: Path) -> AnnData:
    # Read by rows. pandas reads by columns, takes ten times as long for 15,000 columns and silently renames repeated
    # genes.
    names, rows = [], []
    with open_text(path) as lines:
        genes = [name.strip('"') for name in next(lines, "").rstrip("\r\n").split("\t")]
        for line in lines:
            name, _, values = line.rstrip("\r\n").partition("\t")
            if values:
                names.append(name.strip('"'))
                rows.append(sp.csr_matrix(_parse_row(values, spot=name, source=path)))
    widths = {row.shape[1] for row in rows}
    if len(widths) != 1 or len(genes) - widths.pop() not in (0, 1):
        raise ValueError(
            f"Expected tab-separated counts, spots × genes, with a header of genes in {path}, found {len(rows)} "
            f"spot(s) with {sorted({row.shape[1] for row in rows})} values under a header of {len(genes)}."
        )
    index = pd.Index(names)
    check_unique(index, what="spot", where=str(path))
    return AnnData(
        X=as_counts(sp.vstack(rows, format="csr"), where=str(path)),
        obs=pd.DataFrame(index=index),
        var=pd.DataFrame(index=unique_genes(pd.Index(genes[len(genes) - rows[0].shape[1] :]), where=str(path))),
    )


def _parse_row(text: str, *, spot: str, source: Path) -> np.ndarray:
    """Parse the counts of one spot. Counts written as decimals take the slower path."""
    n_values = text.count("\t") + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            values = np.fromstring(text, sep="\t", dtype=np.int64)
        except (ValueError, DeprecationWarning):
            values = np.empty(0, dtype=np.int64)
    if len(values) == n_values:
        return values
    try:
        return np.array(text.split("\t"), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"Expected raw counts in {source}, found text in row {spot!r} ({error}).") from error


def _estimate_mpp(positions: pd.DataFrame, *, pitch_um: float, source: Path) -> float:
    pitch = pitch_px(positions[["pixel_x", "pixel_y"]].to_numpy(), positions[["x", "y"]].to_numpy(), STEPS)
    if not pitch:
        raise ValueError(
            f"Expected neighboring spots in {source} to estimate the resolution from, found none. Pass `mpp=`."
        )
    return pitch_um / pitch
