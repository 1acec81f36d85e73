"""Images of a Xenium section: the morphology image and the H&E, and their position in instrument micrometers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from spatialdata.transformations import Scale, Sequence, Translation, set_transformation

from stimage_sd import contract
from stimage_sd.io._multichannel import MultichannelImage, open_multichannel
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import require_file
from stimage_sd.io._text import open_text

#: micrometers per pixel of all Xenium morphology images at full resolution
PIXEL_UM = 0.2125
#: largest share of cells outside the morphology image; a larger share means a wrong pixel size or origin
OUTSIDE = 0.1
#: largest relative difference between two sources of the same resolution
TOLERANCE = 0.05
#: ending of the name of an alignment file, after the name of the H&E without its endings, or any name with "image"
SUFFIX = "alignment.csv"


# --------------------------------------------------------------------------------------------------
# the morphology image


@dataclass(frozen=True)
class Morphology:
    """A morphology image and its file."""

    image: MultichannelImage
    file: Path


def open_morphology(files: list[Path]) -> Morphology:
    """Open the morphology image.

    - `files`: one file, or one file per stain. Either the first file describes all stains, or each file only its own
      stain.
    """
    # The instrument writes one file per stain, and each file describes all stains.
    whole = open_multichannel(files[0], several_files=True)
    if whole.levels[0].shape[0] >= len(files):
        return Morphology(_name_dapi(whole), files[0])
    stains = [whole, *(open_multichannel(file, several_files=True) for file in files[1:])]
    sizes = {file.name: stain.levels[0].shape for file, stain in zip(files, stains, strict=True)}
    if len({tuple(level.shape for level in stain.levels) for stain in stains}) > 1 or whole.levels[0].shape[0] > 1:
        raise ValueError(
            f"Expected stains of one size, one per file, in {files[0].parent}, found {sizes}. Take the files of one "
            "run."
        )
    names = [
        stain.channels[0] if stain.named else re.sub(r"^ch\d+_", "", file.name.split(".")[0])
        for file, stain in zip(files, stains, strict=True)
    ]
    levels = [da.concatenate(level) for level in zip(*(stain.levels for stain in stains), strict=True)]
    return Morphology(_name_dapi(replace(whole, levels=levels, channels=names)), files[0])


def _name_dapi(image: MultichannelImage) -> MultichannelImage:
    # The first stain is DAPI in all versions, but files of version 1 do not name it.
    unnamed = not image.named or image.channels[0].lower() == "dapi"
    return replace(image, channels=["DAPI", *image.channels[1:]]) if unnamed else image


def pixel_size(given: float | None, experiment: Mapping[str, Any], morphology: Morphology | None) -> tuple[float, str]:
    """Return the micrometers per pixel of the morphology image, and their source."""
    if given is not None:
        return float(given), "given"
    stated = None if morphology is None else morphology.image.pixel_um
    if "pixel_size" in experiment:
        size = float(experiment["pixel_size"])
        if morphology is not None and stated is not None and abs(size / stated - 1.0) > TOLERANCE:
            raise ValueError(
                f"experiment.xenium and {morphology.file.name} disagree on the size of a pixel: {size} and {stated} "
                f"µm, in {morphology.file.parent}. Pass `pixel_size_um=`."
            )
        return size, "experiment.xenium"
    if stated is not None:
        return stated, "morphology image"
    # This is the pixel size of all images of the instrument. `check_covered` compares the image with the cells.
    return PIXEL_UM, "instrument"


def check_covered(morphology: Morphology, centers: np.ndarray, pixel_um: float, origin_um: tuple[float, float]) -> None:
    """Raise `ValueError` if the cell centers ``(n, 2)``, µm, do not lie on the morphology image."""
    height, width = morphology.image.levels[0].shape[1:]
    low = np.asarray(origin_um, dtype=np.float64)
    high = low + np.array([width, height]) * pixel_um
    outside = ((centers < low) | (centers > high)).any(axis=1).mean()
    if outside > OUTSIDE:
        first, last = centers.min(axis=0), centers.max(axis=0)
        raise ValueError(
            f"Expected the cells on {morphology.file.name} in {morphology.file.parent}, found {outside:.0%} outside. "
            f"At {pixel_um} µm per pixel its {width} x {height} px span x {low[0]:.0f} to {high[0]:.0f}, y "
            f"{low[1]:.0f} to {high[1]:.0f} µm; the cells span x {first[0]:.0f} to {last[0]:.0f}, y {first[1]:.0f} to "
            f"{last[1]:.0f} µm. The image was cut or reduced. Pass `pixel_size_um=` and `origin_um=`, or `dapi=False`."
        )


def pixels_to_um(pixel_um: float, origin_um: tuple[float, float]) -> np.ndarray:
    """Return the ``(3, 3)`` matrix from pixels of the morphology image to instrument micrometers."""
    return np.array([[pixel_um, 0.0, origin_um[0]], [0.0, pixel_um, origin_um[1]], [0.0, 0.0, 1.0]])


def build_dapi(morphology: Morphology, pixel_um: float, origin_um: tuple[float, float]) -> xr.DataTree:
    """Build the image element, placed in instrument micrometers."""
    image = contract.build_multichannel(morphology.image.levels, channels=morphology.image.channels, pixel_um=pixel_um)
    if any(origin_um):
        placed = Sequence([Scale([pixel_um] * 2, axes=("x", "y")), Translation(list(origin_um), axes=("x", "y"))])
        set_transformation(image, placed, to_coordinate_system=contract.INSTRUMENT)
    return image


# --------------------------------------------------------------------------------------------------
# the H&E


@dataclass(frozen=True)
class HE:
    """An H&E and its position.

    - `levels`: levels of the H&E, finest first.
    - `mpp`: micrometers per pixel, or `None` if unknown.
    - `alignment`: ``(3, 3)`` matrix from pixels of the H&E to pixels of the morphology image, or `None` without an
      alignment.
    - `from_um`: ``(3, 3)`` matrix from instrument micrometers to pixels of the H&E, or `None` without an alignment.
    """

    levels: list[da.Array]
    mpp: float | None
    alignment: np.ndarray | None
    from_um: np.ndarray | None


def open_he(
    file: Path,
    alignment: str | Path | np.ndarray | None,
    *,
    bundle: Path,
    to_um: np.ndarray,
    centers: np.ndarray,
) -> HE:
    """Open the H&E, and find and check its alignment.

    - `file`: file of the H&E.
    - `alignment`: alignment of the H&E. By default searched in the folder of the H&E and in the bundle.
    - `bundle`: folder of the bundle.
    - `to_um`: ``(3, 3)`` matrix from pixels of the morphology image to instrument micrometers.
    - `centers`: ``(n_cells, 2)`` x, y of the cells, instrument micrometers.
    """
    levels, stated = open_raster(file)
    given = alignment if alignment is not None else find_alignment(file, bundle)
    if given is None:
        return HE(levels, stated, None, None)
    source = Path(given).name if isinstance(given, str | Path) else "`alignment=`"
    matrix = read_alignment(given)
    from_um = np.linalg.inv(to_um @ matrix)
    mpp, backwards = (contract.scale_of(to_um @ way) for way in (matrix, np.linalg.inv(matrix)))
    _check_placed(centers, from_um, levels[0].shape[1:], file=file, source=source)
    if stated is not None and abs(backwards / stated - 1.0) <= TOLERANCE < abs(mpp / stated - 1.0):
        raise ValueError(
            f"Expected {source} to map pixels of {file.name} to pixels of the morphology image, found the other way: "
            f"{file.name} states {stated:.4f} µm per pixel; by the matrix it has {mpp:.4f}, by its inverse "
            f"{backwards:.4f}. Pass `np.linalg.inv` of the matrix."
        )
    if stated is not None and abs(mpp / stated - 1.0) > TOLERANCE:
        warnings.warn(
            f"{file.name} states {stated:.4f} µm per pixel; by {source} it has {mpp:.4f}, which is used. Check that "
            "the alignment is of this file.",
            UserWarning,
            stacklevel=3,
        )
    return HE(levels, mpp, matrix, from_um)


def find_alignment(he_image: Path, bundle: Path) -> Path | None:
    """Return the alignment file in the folder of the H&E or in the bundle, or `None` if there is none."""
    stem = he_image.name
    for ending in (".tif", ".tiff", ".btf", ".ome"):
        stem = stem.removesuffix(ending)
    for folder in (he_image.parent, bundle):
        if (folder / f"{stem}{SUFFIX}").is_file():
            return folder / f"{stem}{SUFFIX}"
    files = sorted({file.resolve() for folder in (he_image.parent, bundle) for file in folder.glob(f"*image{SUFFIX}")})
    # A run may also have an alignment of an immunofluorescence image.
    files = [file for file in files if "if_image" not in file.name]
    if len(files) > 1:
        names = [file.name for file in files]
        raise ValueError(f"Expected one alignment of {he_image.name}, found {names}. Pass one as `alignment=`.")
    return files[0] if files else None


def read_alignment(alignment: str | Path | np.ndarray) -> np.ndarray:
    """Read and check the ``(3, 3)`` matrix from pixels of the H&E to pixels of the morphology image."""
    if isinstance(alignment, str | Path):
        path = require_file(alignment, what="an alignment (a CSV file of 3 x 3 numbers)")
        # A file of two rows may be truncated, so only 3 × 3 is accepted.
        where, sizes = str(path), [(3, 3)]
        try:
            with open_text(path) as lines:
                values = pd.read_csv(lines, header=None).to_numpy(dtype=np.float64)
        except (ValueError, pd.errors.ParserError) as error:
            raise ValueError(f"Expected 3 x 3 numbers in {path}, found something else ({error}).") from error
    else:
        where, sizes = "`alignment`", [(3, 3), (2, 3)]
        values = np.asarray(alignment, dtype=np.float64)
    if values.shape not in sizes:
        raise ValueError(f"Expected a matrix of {' or '.join(map(str, sizes))} in {where}, found {values.shape}.")
    matrix = values if values.shape == (3, 3) else np.vstack([values, [0.0, 0.0, 1.0]])
    affine = np.isfinite(matrix).all() and np.allclose(matrix[2], [0.0, 0.0, 1.0])
    if not affine or abs(np.linalg.det(matrix[:2, :2])) < 1e-9:
        raise ValueError(
            f"Expected an invertible affine matrix in {where}, its last row 0, 0, 1, found {matrix.tolist()}. It maps "
            "pixels of the H&E to pixels of the morphology image."
        )
    return matrix


def _check_placed(centers: np.ndarray, from_um: np.ndarray, shape: tuple[int, int], *, file: Path, source: str) -> None:
    """Raise if no cell lies on the H&E of ``(y, x)`` pixels. Warn if less than half of the cells do."""
    placed = centers @ from_um[:2, :2].T + from_um[:2, 2]
    inside = ((placed >= 0) & (placed < (shape[1], shape[0]))).all(axis=1).mean()
    if inside == 0:
        low, high = placed.min(axis=0), placed.max(axis=0)
        raise ValueError(
            f"Expected cells on {file.name} ({shape[1]} x {shape[0]} px), found that {source} places them all outside: "
            f"x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}. The matrix has to map pixels of the "
            "H&E to pixels of the morphology image, both at full resolution. Pass `np.linalg.inv` of a matrix that "
            "maps the other way, or read without it and run `stimage_sd.pp.register(sdata)`."
        )
    if inside < 0.5:
        warnings.warn(
            f"{source} places {inside:.0%} of the cells on {file.name}; the others lie beyond its border. Check that "
            "the alignment is of this file.",
            UserWarning,
            stacklevel=4,
        )
