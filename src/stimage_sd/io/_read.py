"""Sections of any technology that spatialdata-io reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData
from spatialdata.transformations import Affine, Identity, set_transformation

from stimage_sd import contract
from stimage_sd._damaged_files import reading
from stimage_sd.io._from_spatialdata import from_spatialdata
from stimage_sd.io._raster import open_raster
from stimage_sd.io._text import open_text

#: technologies read by this package; these readers check the files against each other and read images lazily
OWN = ("visium", "visium_hd", "xenium", "codex")


def read(
    technology: str,
    path: str | Path,
    *,
    he_image: str | Path | None = None,
    alignment: np.ndarray | str | Path | None = None,
    image: str | None = None,
    shapes: str | None = None,
    table: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    sample: str | None = None,
    patient: str | None = None,
    options: Mapping[str, Any] | None = None,
    layer: str | None = None,
) -> SpatialData | dict[str, SpatialData]:
    """Read a section of any technology that spatialdata-io supports.

    Visium, Visium HD, Xenium and CODEX are read by the readers of this package.

    Parameters
    ----------
    technology
        Name of the reader in `spatialdata_io`, such as ``"merscope"``, ``"cosmx"``, ``"stereoseq"`` or ``"seqfish"``.
    path
        Folder of the run, the first argument of the reader.
    he_image
        File of an H&E that the reader does not read. It becomes the image ``"he"``.
    alignment
        ``(3, 3)`` matrix, or a CSV file with one. It maps pixels of the H&E to the coordinate system of the object.
        Identity by default.
    image, shapes, table, coordinate_system, mpp, sample, patient
        As in `from_spatialdata`. For Visium, `image` is the file of the H&E.
    options
        Further arguments of the reader.
    layer
        Layer with raw counts, if ``X`` holds none.

    Returns
    -------
    The return value of `from_spatialdata`.

    Raises
    ------
    ValueError
        If no reader has this name.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_visium(Path(tempfile.mkdtemp()) / "run", n_spots=20, n_genes=9)
    >>> section = sti.io.read("visium", run, image=run / "image.tif")
    >>> section.tables["counts"].shape
    (20, 9)
    """
    if technology in OWN:
        return _own(technology, path, he_image, alignment, image, mpp, sample, patient, dict(options or {}))
    readers = importlib.import_module("spatialdata_io")
    reader: Callable[..., SpatialData] | None = getattr(readers, technology, None)
    if reader is None or technology not in readers.__all__:
        known = sorted({*OWN, *(name for name in readers.__all__ if name.islower())})
        raise ValueError(f"No reader of {technology!r}. Expected one of {known}.")
    data = reader(path, **(options or {}))
    if he_image is not None:
        _add_he(data, he_image, alignment, coordinate_system)
        image = contract.IMAGE
    return from_spatialdata(
        data, image=image, shapes=shapes, table=table, coordinate_system=coordinate_system, mpp=mpp, sample=sample,
        patient=patient, layer=layer,
    )  # fmt: skip


def _own(
    technology: str,
    path: str | Path,
    he_image: str | Path | None,
    alignment: Any,
    image: str | None,
    mpp: float | None,
    sample: str | None,
    patient: str | None,
    options: dict[str, Any],
) -> SpatialData:
    given = {
        "he_image": he_image,
        "alignment": alignment,
        "image": image,
        "mpp": mpp,
        "sample": sample,
        "patient": patient,
    }
    reader: Callable[..., SpatialData] = getattr(importlib.import_module("stimage_sd.io"), technology)
    return reader(path, **{name: value for name, value in given.items() if value is not None}, **options)


def _add_he(data: SpatialData, path: str | Path, alignment: Any, coordinate_system: str | None) -> None:
    """Add an H&E to an object, in the coordinate system of the measured data."""
    systems = list(data.coordinate_systems)
    system = coordinate_system
    if system is None:
        system = "global" if "global" in systems else systems[0] if len(systems) == 1 else None
    if system is None:
        raise KeyError(f"Found the coordinate systems {sorted(systems)}. Say which one `alignment=` leads to with "
                       "`coordinate_system=`.")  # fmt: skip
    matrix = np.eye(3) if alignment is None else alignment
    if isinstance(matrix, str | Path):
        with reading(matrix, what="3 x 3 numbers"), open_text(Path(matrix).expanduser()) as lines:
            matrix = pd.read_csv(lines, header=None).to_numpy(dtype=np.float64)
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"Expected `alignment` as a finite matrix (3, 3), found {matrix.tolist()}.")
    levels, _ = open_raster(path)
    element = contract.build_image(levels)
    after = Identity() if np.array_equal(matrix, np.eye(3)) else Affine(matrix, ("x", "y"), ("x", "y"))
    set_transformation(element, {system: after}, set_all=True)
    data.images[contract.IMAGE] = element
