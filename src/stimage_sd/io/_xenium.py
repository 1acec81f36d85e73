"""10x Xenium sections from output bundles of the onboard analysis, versions 1 to 4, with the H&E."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import attach_spatial
from stimage_sd.contract import GENES
from stimage_sd.io._section import check_mpp
from stimage_sd.io._tenx import PROTEINS, Matrix, read_matrix, tables_of
from stimage_sd.io._xenium_images import build_dapi, check_covered, open_he, open_morphology, pixel_size, pixels_to_um
from stimage_sd.io._xenium_parts import (
    check_same_cells,
    read_cell_boundaries,
    read_cells,
    read_nucleus_boundaries,
)
from stimage_sd.io._xenium_transcripts import read_transcripts

#: newest major version of the onboard analysis that this reader supports
NEWEST = 4

EXPERIMENT = "experiment.xenium"
FOCUS = "morphology_focus"
FORMS = (".parquet", ".csv.gz", ".csv")
#: parts of a bundle and their possible file endings, in order of preference
PARTS = {
    "cell_feature_matrix": (".h5", ""),
    "cells": FORMS,
    "cell_boundaries": FORMS,
    "nucleus_boundaries": FORMS,
    "transcripts": FORMS,
}


def xenium(
    path: str | Path,
    *,
    he_image: str | Path | None = None,
    alignment: str | Path | np.ndarray | None = None,
    sample: str | None = None,
    patient: str | None = None,
    dapi: bool = True,
    pixel_size_um: float | None = None,
    origin_um: tuple[float, float] = (0.0, 0.0),
) -> SpatialData:
    """Read a Xenium section from its output bundle, with an optional H&E.

    Parameters
    ----------
    path
        Folder of the bundle, with ``experiment.xenium``, ``cell_feature_matrix`` (``.h5``, or the folder of that name),
        ``cells``, ``cell_boundaries``, ``nucleus_boundaries`` and ``transcripts`` (``.parquet``, ``.csv.gz`` or
        ``.csv``). The morphology image is the folder ``morphology_focus`` of version 2 and later, or
        ``morphology_focus.ome.tif`` or ``morphology_mip.ome.tif`` of version 1. File names may have a prefix.
    he_image
        The H&E of the section, an OME-TIFF or any other file that `stimage_sd.io.slide` reads.
    alignment
        10x Genomics' alignment of the H&E, as a CSV file of 3 × 3 numbers or an array (3 × 3, or 2 × 3 without the
        last row). It maps pixels of the H&E to pixels of the morphology image, both at full resolution. By default
        ``*_imagealignment.csv`` is searched in the folder of `he_image` and in the bundle. If a matrix maps the other
        way, pass its inverse with `numpy.linalg.inv`.
    sample
        Sample id. By default the name of the folder of the bundle.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).
    dapi
        Whether to read the morphology image. Pass `False` for a bundle without the image.
    pixel_size_um
        Micrometers per pixel of the morphology image. By default as stated in ``experiment.xenium``.
    origin_um
        Position (x, y) of the corner of the morphology image, µm, for a bundle that was cut out of a larger one.

    Returns
    -------
    A section with these elements:

    - shapes ``cells`` and ``nuclei``: polygons. There are no ``nuclei`` if a segmentation was imported without nuclei;
    - points ``transcripts``: lazy, including controls, with ``x``, ``y``, ``z``, ``feature_name``, ``qv``,
      ``overlaps_nucleus`` and ``cell_id``, which is ``UNASSIGNED`` outside all cells;
    - image ``dapi``: lazy, with all stains of the morphology image;
    - image ``he``, if an H&E is given;
    - table ``counts``: ``X`` CSR of int32, cells × genes. ``obs`` has the columns of ``cells`` and ``control_counts``,
      the counts of all features that are not genes. ``obsm["spatial_um"]`` is in instrument micrometers;
    - table ``proteins`` of version 4: ``X`` float32 intensities, the whole numbers of the HDF5 file divided by its
      ``protein_scaling_factor``.

    All elements except the H&E have the coordinate system ``"instrument"``. With an H&E and its alignment, or without
    an H&E, they are also placed in ``"global"`` and ``obsm["spatial"]``. Otherwise `stimage_sd.pp.register` places
    them.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is truncated, empty, or from another run than the other files. Also if the cells do not lie on the
        morphology image or the H&E, or if sources disagree on the pixel size.

    Warns
    -----
    UserWarning
        If ``experiment.xenium`` is missing, newer than version 4 or states another number of cells, there are no
        nuclei, cells have no outline, gene names are repeated, the H&E states another resolution than its alignment, or
        most cells lie outside the H&E.

    Notes
    -----
    File formats follow the pages of 10x Genomics on the outputs of Xenium Onboard Analysis. The direction of the
    alignment follows their article on converting coordinates between H&E and Xenium data. In version 2 and later, a
    cell may have several outlines or nuclei. Several outlines become a multipolygon, and each nucleus is a separate
    shape. The layout is recognized by the files in the bundle, as the version says little about the layout.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_xenium(Path(tempfile.mkdtemp()) / "run", size_um=300.0, n_genes=9)
    >>> sdata = sti.io.xenium(run, he_image=run / "he_image.ome.tif")
    >>> sdata.tables["counts"].n_vars, sorted(sdata.images), sorted(sdata.shapes)
    (9, ['dapi', 'he'], ['cells', 'nuclei'])
    """
    check_mpp(pixel_size_um)
    if np.shape(origin_um) != (2,) or not np.isfinite(origin_um).all():
        raise ValueError(f"Expected two finite numbers, x and y in µm, as `origin_um`, found {origin_um!r}.")
    if alignment is not None and he_image is None:
        raise ValueError("Expected `he_image=` with `alignment=`, found no H&E. Pass the image that is aligned.")
    bundle = Bundle.find(Path(path).expanduser())
    experiment = read_experiment(bundle)
    # Counts and cells come first, as all other files have to match them.
    matrix_path, cells_path = bundle.part("cell_feature_matrix"), bundle.part("cells")
    cells, matrix = read_cells(cells_path), read_matrix(matrix_path)
    check_same_cells(matrix, cells, matrix_path=matrix_path, cells_path=cells_path)
    cells = cells.loc[matrix.barcodes]
    stated = experiment.get("num_cells", len(cells))
    if stated != len(cells):
        warnings.warn(
            f"{EXPERIMENT} of {bundle.folder} states {stated} cells, {cells_path.name} has {len(cells)}. Check that "
            "both are of one run, unless the run was cut.",
            UserWarning,
            stacklevel=2,
        )
    centers = cells[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)
    others = {name: bundle.part(name) for name in ("cell_boundaries", "transcripts")}

    morphology = open_morphology(bundle.morphology()) if dapi else None
    pixel_um, pixel_source = pixel_size(pixel_size_um, experiment, morphology)
    if morphology is not None:
        check_covered(morphology, centers, pixel_um, origin_um)
    to_um = pixels_to_um(pixel_um, origin_um)
    he = None
    if he_image is not None:
        he = open_he(Path(he_image).expanduser(), alignment, bundle=bundle.folder, to_um=to_um, centers=centers)

    outlines = read_cell_boundaries(others["cell_boundaries"], cells)
    nuclei = read_nucleus_boundaries(bundle.find_part("nucleus_boundaries"), cells, where=bundle.folder)
    tables = _build_tables(matrix, cells, centers, where=str(matrix_path))
    sdata = SpatialData(
        images={
            **({} if he is None else {contract.IMAGE: contract.build_image(he.levels)}),
            **({} if morphology is None else {contract.DAPI: build_dapi(morphology, pixel_um, origin_um)}),
        },
        shapes={
            contract.CELLS: outlines,
            **({} if nuclei is None else {contract.NUCLEI: nuclei}),
        },
        points={contract.TRANSCRIPTS: read_transcripts(others["transcripts"], outlines, matrix.features.index)},
    )
    contract.register(
        sdata,
        sample=sample if sample is not None else bundle.sample,
        platform="xenium",
        image=None if he is None else contract.IMAGE,
        mpp=pixel_um if he is None else he.mpp,
    )
    for name, table in tables.items():
        sdata.tables[name] = contract.annotate(table, region=contract.CELLS)
    placing = np.linalg.inv(to_um) if he is None else he.from_um
    if placing is not None:
        contract.place_instrument(sdata, placing)
        attach_spatial(sdata)
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.xenium",
        path=path,
        he_image=he_image,
        alignment=None if he is None else he.alignment,
        version=experiment.get("version"),
        pixel_size_um=pixel_um,
        pixel_size_source=pixel_source,
        origin_um=origin_um,
        n_cells=len(cells),
        features=matrix.features["feature_types"].value_counts().to_dict(),
    )
    return sdata


# --------------------------------------------------------------------------------------------------
# the bundle


@dataclass(frozen=True)
class Bundle:
    """Folder and files of a bundle."""

    folder: Path
    sample: str
    prefix: str

    @classmethod
    def find(cls, path: Path) -> Bundle:
        if not path.is_dir():
            raise FileNotFoundError(
                f"Expected the folder of a Xenium output bundle at {path}, found no folder. Check the path, and unpack "
                "an archive first."
            )
        folder = path / "outs" if (path / "outs").is_dir() else path
        resolved = folder.resolve()
        sample = resolved.parent.name if resolved.name == "outs" else resolved.name
        return cls(folder, sample, _find_prefix(folder))

    def entry(self, name: str) -> Path | None:
        """Return the file or folder with a name, with or without the prefix of the bundle."""
        places = (self.folder / f"{self.prefix}{name}", self.folder / name)
        return next((place for place in places if place.exists()), None)

    def find_part(self, stem: str) -> Path | None:
        """Return the file of a part, or `None` if it is missing."""
        entries = (self.entry(f"{stem}{form}") for form in PARTS[stem])
        return next((file for file in entries if file is not None), None)

    def part(self, stem: str) -> Path:
        """Return the file of a part, or raise `FileNotFoundError` if it is missing."""
        path = self.find_part(stem)
        if path is not None:
            return path
        forms = " or ".join(f"{stem}{form}" if form else f"{stem}/" for form in PARTS[stem])
        here = sorted(entry.name for entry in self.folder.iterdir())
        raise FileNotFoundError(
            f"Expected {forms} in the Xenium bundle {self.folder}, found none of them. It holds: {here[:20]}. Pass the "
            "folder that has `experiment.xenium` in it, complete."
        )

    def morphology(self) -> list[Path]:
        """Return the files of the morphology image: one file, or one file per stain."""
        folder = self.entry(FOCUS)
        if folder is not None and folder.is_dir():
            files = sorted(file for file in folder.glob("*.ome.tif*") if not file.name.startswith("."))
            if files:
                return files
        for name in (f"{FOCUS}.ome.tif", "morphology_mip.ome.tif"):
            file = self.entry(name)
            if file is not None:
                return [file]
        raise FileNotFoundError(
            f"Expected the morphology image in {self.folder}, the folder {FOCUS} with OME-TIFF files or {FOCUS}.ome.tif"
            ", found neither. Pass `dapi=False` to read a bundle without it."
        )


def _find_prefix(folder: Path) -> str:
    """Return the prefix of all file names, found from a file that only Xenium bundles have."""
    for name in ("cell_feature_matrix.h5", "cell_feature_matrix", EXPERIMENT):
        if (folder / name).exists():
            return ""
        # Hidden files are leftovers of other file systems.
        names = sorted(file.name for file in folder.glob(f"*_{name}") if not file.name.startswith("."))
        if len(names) > 1:
            raise ValueError(f"Expected one {name} in {folder}, found {names}. Give each run its own folder.")
        if names:
            return names[0].removesuffix(name)
    return ""


def read_experiment(bundle: Bundle) -> dict[str, Any]:
    """Return the content of ``experiment.xenium``, or an empty dictionary if the file is missing."""
    path = bundle.entry(EXPERIMENT)
    if path is None:
        warnings.warn(
            f"No {EXPERIMENT} in {bundle.folder}: version and pixel size of the run are taken from its other files.",
            UserWarning,
            stacklevel=3,
        )
        return {}
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, found something else ({error}). Copy it again.") from error
    size = experiment.get("pixel_size") if isinstance(experiment, dict) else None
    if not isinstance(size, int | float) or not size > 0:
        raise ValueError(f"Expected a positive `pixel_size` in {path}, found {size!r}. Copy it again.")
    # A resegmented run has the layout of the Xenium Ranger version that wrote it.
    ranger = experiment.get("xenium_ranger")
    software = (isinstance(ranger, dict) and ranger.get("version")) or experiment.get("analysis_sw_version", "")
    version = re.search(r"\d+(\.\d+)*", str(software))
    if version is not None and int(version.group().split(".")[0]) > NEWEST:
        warnings.warn(
            f"{path.name} is of version {software!r}; this reader supports versions 1 to {NEWEST} and may fail.",
            UserWarning,
            stacklevel=3,
        )
    return {**experiment, "version": str(software)}


# --------------------------------------------------------------------------------------------------
# tables


def _build_tables(matrix: Matrix, cells: pd.DataFrame, centers: np.ndarray, *, where: str) -> dict[str, AnnData]:
    """Build the tables of genes and proteins, with the sum of the control counts per cell in ``obs``."""
    controls = matrix.values[:, np.flatnonzero(~matrix.features["feature_types"].isin([GENES, *PROTEINS]))]
    obs = cells.drop(columns=["x_centroid", "y_centroid"])
    obs["control_counts"] = np.asarray(controls.sum(axis=1)).ravel().astype(np.int64)
    obs[contract.INSTANCE_KEY] = obs.index.to_numpy()
    obs.index.name = None
    tables = tables_of(matrix, None, where=where)
    for table in tables.values():
        table.obs = obs.copy()
        table.var = table.var[["gene_ids"]]
        table.obsm[contract.SPATIAL_UM] = centers.copy()
    return tables
