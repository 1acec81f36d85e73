"""Public Visium sections of 10x Genomics, by the downloads of squidpy."""

from __future__ import annotations

import re
from pathlib import Path

from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import cache_dir
from stimage_sd.io import visium as read_visium


def visium(section: str) -> SpatialData:
    """Read a public Visium section of 10x Genomics with its full-resolution H&E.

    The files are downloaded once into the cache folder and checked by sha256, by `squidpy.datasets.visium`. An H&E has
    up to several GB.

    Parameters
    ----------
    section
        Name of 10x Genomics, such as ``"V1_Breast_Cancer_Block_A_Section_1"``.

    Returns
    -------
    A section as returned by `stimage_sd.io.visium`. Sections of one block are of one patient, named by the block.

    Raises
    ------
    ValueError
        If squidpy has no such section, or its image is of immunofluorescence.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sdata = sti.datasets.visium("V1_Breast_Cancer_Block_A_Section_1")  # doctest: +SKIP
    """
    import squidpy as sq

    if section.endswith("_IF"):
        raise ValueError(f"The image of {section} is of immunofluorescence, expected a section with an H&E.")
    folder = cache_dir() / "visium"
    sq.datasets.visium(section, include_hires_tiff=True, base_dir=folder)
    return read_downloaded(folder / section, section)


def read_downloaded(folder: Path, section: str) -> SpatialData:
    """Read the folder that squidpy's download leaves."""
    image = next(iter(sorted(folder.glob("image.*"))), None)
    if image is None:
        raise FileNotFoundError(f"The H&E of {section} was not downloaded to {folder}. Try again.")
    patient = re.sub(r"_Section_\d+$", "", section)
    sdata = read_visium(folder, image=image, sample=section, patient=patient)
    contract.record(sdata, "datasets.visium", section=section)
    return sdata
