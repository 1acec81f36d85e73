"""10x Visium: what Space Ranger wrote, old and new."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import scanpy
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._raster import open_raster, raster_size
from stimage_sd.io._section import as_counts, assemble, check_mpp, pitch_px, unique_genes

#: diameter of a Visium spot, µm
SPOT_UM = 55.0
#: distance between the centres of neighbouring spots, µm
PITCH_UM = 100.0
#: what Space Ranger's ``spot_diameter_fullres`` stands for, µm: not the 55 µm of the spot itself
NOMINAL_SPOT_UM = 65.0
#: neighbours one pitch away on the hexagonal array, whose columns count half steps: (row, column)
STEPS = [(0, 2), (1, 1), (1, -1)]
#: two ways to the same number may differ by this much before the user is told
TOLERANCE = 0.05

MATRIX = "filtered_feature_bc_matrix"
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
SCALEFACTORS = "scalefactors_json.json"
HIRES = "tissue_hires_image.png"
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def visium(
    path: str | Path, *, image: str | Path | None = None, mpp: float | None = None, sample: str | None = None
) -> SpatialData:
    """Read a Visium section from the folder that Space Ranger wrote.

    Kept are the spots in tissue that have counts, in the order of the matrix.

    Parameters
    ----------
    path
        The run's folder or its ``outs``: ``filtered_feature_bc_matrix.h5`` or the folder of that name, and
        ``spatial`` with ``tissue_positions`` (``.parquet``, ``.csv``, or ``_list.csv`` without a header),
        ``scalefactors_json.json`` and ``tissue_hires_image.png``. File names may have a prefix.
    image
        The full-resolution image that Space Ranger was given. Without it ``tissue_hires_image.png`` is the
        section's H&E: positions and resolution are then those of its pixels.
    mpp
        Micrometres a pixel of the full-resolution image. Estimated unless given: 100 µm over the median
        distance of neighbouring spots in pixels; of a section without neighbours, 65 µm over
        ``spot_diameter_fullres``.
    sample
        Sample id; the name of the run's folder unless given.

    Returns
    -------
    A section with the image ``he``, the shapes ``spots`` (circles of 55 µm) and the table ``counts``: ``X``
    CSR of int32, ``obs`` with ``in_tissue``, ``array_row`` and ``array_col``, ``obsm["spatial"]`` float64
    (x, y) in H&E pixels.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If matrix and positions share no barcode, a table is not what Space Ranger writes, a spot lies
        outside the image, or the image is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If no full-resolution image is given, the image does not have the size that Space Ranger's scale
        factors imply, pitch and spot diameter disagree on the resolution, or gene names are repeated.

    Notes
    -----
    10x Genomics' page on spatial outputs has ``spot_diameter_fullres`` as the diameter of a theoretical
    spot of 65 µm. The pitch is measured on the positions themselves and needs no such convention.

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
    files = _find_files(Path(path).expanduser())
    scalefactors = _read_scalefactors(files.scalefactors)
    positions = _read_positions(files.positions)
    table = _read_matrix(files.matrix)
    n_counted = table.n_obs
    table, kept = _match(table, positions, files)
    full_mpp, mpp_source = _resolution(mpp, positions, scalefactors, source=files.positions)

    levels, scale = _open_image(image, files, scalefactors)
    for name in POSITION_COLUMNS[1:4]:
        table.obs[name] = kept[name].to_numpy(dtype=int)
    # Space Ranger's pixel row is y and its column x.
    table.obsm["spatial"] = kept[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=np.float64) * scale
    sdata = assemble(
        levels,
        table,
        diameter_px=SPOT_UM / full_mpp * scale,
        sample=sample if sample is not None else files.sample,
        platform="visium",
        mpp=full_mpp / scale,
    )
    contract.record(
        sdata,
        "io.visium",
        path=path,
        image=image if image is not None else files.hires,
        image_scale=scale,
        mpp=full_mpp / scale,
        mpp_source=mpp_source,
        n_spots=table.n_obs,
        n_counted=n_counted,
        n_in_tissue=int((positions["in_tissue"] == 1).sum()),
    )
    return sdata


@dataclass(frozen=True)
class _Files:
    """Where the parts of a run lie."""

    sample: str
    matrix: Path
    positions: Path
    scalefactors: Path
    hires: Path | None


def _find_files(path: Path) -> _Files:
    if not path.is_dir():
        raise FileNotFoundError(
            f"Expected the folder of a Space Ranger run at {path}, found no folder. Check the path."
        )
    outs = path / "outs" if (path / "outs").is_dir() else path
    if (outs / "binned_outputs").is_dir():
        raise ValueError(f"Expected a Visium run with spots, found the bins of a Visium HD run in {outs}.")
    spatial = outs / "spatial" if (outs / "spatial").is_dir() else outs
    matrix = _find(outs, f"{MATRIX}.h5") or _find(outs, MATRIX)
    positions = next((found for name in POSITIONS if (found := _find(spatial, name))), None)
    scalefactors = _find(spatial, SCALEFACTORS)
    if matrix is None or positions is None or scalefactors is None:
        wanted = {f"{MATRIX}.h5 or {MATRIX}/": matrix, " or ".join(POSITIONS): positions, SCALEFACTORS: scalefactors}
        missing = [f"{outs.name if number == 0 else spatial.name}/{name}" for number, name in enumerate(wanted)]
        missing = [name for name, found in zip(missing, wanted.values(), strict=True) if found is None]
        here = sorted(entry.relative_to(outs).as_posix() for folder in {outs, spatial} for entry in folder.iterdir())
        raise FileNotFoundError(
            f"Expected a Space Ranger output in {outs}, did not find {'; '.join(missing)}. It holds: {here[:20]}. "
            "Pass the run's `outs` folder."
        )
    resolved = outs.resolve()
    sample = resolved.parent.name if resolved.name == "outs" else resolved.name
    return _Files(sample, matrix, positions, scalefactors, _find(spatial, HIRES))


def _find(folder: Path, name: str) -> Path | None:
    """Return the entry of a folder that has a name, with or without a prefix."""
    found = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*{name}"))
    if len(found) > 1:
        raise ValueError(
            f"Expected one {name} in {folder}, found {[entry.name for entry in found]}. Give each run its own folder."
        )
    return found[0] if found else None


def _read_scalefactors(path: Path) -> dict[str, float]:
    try:
        scalefactors = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON in {path}, found something else ({error}).") from error
    wanted = ["spot_diameter_fullres", "tissue_hires_scalef"]
    wrong = [
        name for name in wanted if not (isinstance(scalefactors.get(name), int | float) and scalefactors[name] > 0)
    ]
    if wrong:
        raise ValueError(
            f"Expected positive {wanted} in {path}, found {scalefactors}; missing or not positive: {wrong}."
        )
    return scalefactors


def _read_positions(path: Path) -> pd.DataFrame:
    """Read positions, indexed by barcode; without a header they are those of Space Ranger 1."""
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    else:
        with path.open() as lines:
            headed = next(lines, "").startswith("barcode")
        frame = pd.read_csv(path) if headed else pd.read_csv(path, header=None)
        if not headed and frame.shape[1] == len(POSITION_COLUMNS):
            frame.columns = pd.Index(POSITION_COLUMNS)
    missing = [name for name in POSITION_COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(
            f"Expected the columns {POSITION_COLUMNS} in {path}, found {list(frame.columns)}. Take the file as Space "
            "Ranger wrote it."
        )
    return frame.set_index("barcode")


def _read_matrix(path: Path) -> AnnData:
    with warnings.catch_warnings():
        # Repeated gene names are made unique, and spoken of, by the reader itself.
        warnings.filterwarnings("ignore", message=".*names are not unique.*")
        table = scanpy.read_10x_mtx(path, make_unique=False) if path.is_dir() else scanpy.read_10x_h5(path)
    variables = table.var.set_axis(unique_genes(table.var_names, where=str(path)), axis=0)
    return AnnData(X=as_counts(table.X, where=str(path)), obs=table.obs, var=variables)


def _match(table: AnnData, positions: pd.DataFrame, files: _Files) -> tuple[AnnData, pd.DataFrame]:
    in_tissue = positions.index[positions["in_tissue"] == 1]
    shared = table.obs_names[table.obs_names.isin(in_tissue)]
    if shared.empty:
        example = in_tissue[0] if len(in_tissue) else "none"
        raise ValueError(
            f"Counts and spots share no barcode: {files.matrix} has such as {table.obs_names[0]!r}, the spots in "
            f"tissue of {files.positions} are such as {example!r}. Pass the folder of one run."
        )
    return table[shared].copy(), positions.loc[shared]


def _resolution(
    mpp: float | None, positions: pd.DataFrame, scalefactors: dict[str, float], *, source: Path
) -> tuple[float, str]:
    """Return micrometres a pixel at full resolution, and where that is from."""
    if mpp is not None:
        return mpp, "given"
    centres = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=np.float64)
    pitch = pitch_px(centres, positions[["array_row", "array_col"]].to_numpy(), STEPS)
    by_diameter = NOMINAL_SPOT_UM / scalefactors["spot_diameter_fullres"]
    if not pitch:
        return by_diameter, "spot diameter"
    by_pitch = PITCH_UM / pitch
    if abs(by_pitch / by_diameter - 1.0) > TOLERANCE:
        warnings.warn(
            f"The spots of {source} are {pitch:.1f} px apart, which makes {by_pitch:.4f} µm a pixel and is used; by "
            f"its `spot_diameter_fullres` it were {by_diameter:.4f}. Pass `mpp=` if you know it.",
            UserWarning,
            stacklevel=3,
        )
    return by_pitch, "array pitch"


def _open_image(image: str | Path | None, files: _Files, scalefactors: dict[str, Any]) -> tuple[list[da.Array], float]:
    """Return the H&E's levels and its pixels a full-resolution pixel."""
    scale = float(scalefactors["tissue_hires_scalef"])
    if image is not None:
        levels, _ = open_raster(image)
        _check_size(levels[0], image, files, scale)
        return levels, 1.0
    if files.hires is None:
        raise FileNotFoundError(
            f"Expected {HIRES} beside {files.positions}, found none. Pass the full-resolution image as `image=`."
        )
    warnings.warn(
        f"No full-resolution image given: {files.hires.name} is the H&E of {files.sample!r}, and its tiles will be "
        f"coarse ({1.0 / scale:.1f} times). Pass the image that Space Ranger was given as `image=`.",
        UserWarning,
        stacklevel=3,
    )
    levels, _ = open_raster(files.hires)
    return levels, scale


def _check_size(finest: da.Array, image: str | Path, files: _Files, scale: float) -> None:
    if files.hires is None:
        return
    implied = [size / scale for size in raster_size(files.hires)]
    if any(abs(size / expected - 1.0) > TOLERANCE for size, expected in zip(finest.shape[1:], implied, strict=True)):
        warnings.warn(
            f"{image} has {finest.shape[2]} x {finest.shape[1]} px; by its scale factors the image that Space Ranger "
            f"was given had about {implied[1]:.0f} x {implied[0]:.0f}. Pass that one as `image=` unless this is right.",
            UserWarning,
            stacklevel=4,
        )
