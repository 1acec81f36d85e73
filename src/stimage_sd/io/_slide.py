"""H&E images and whole slides without molecular data."""

from __future__ import annotations

from pathlib import Path

from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._lazy_levels import scanner
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import check_mpp


def slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    series: int | str | None = None,
    sample: str | None = None,
    patient: str | None = None,
) -> SpatialData:
    """Read an H&E image or whole slide, lazily.

    Parameters
    ----------
    path
        A slide in a format that OpenSlide knows (SVS, NDPI, MRXS, SCN, BIF, ...), a TIFF or OME-TIFF with or without
        levels, a JPEG or a PNG. The colors may be stored as three separate planes.
    mpp
        Micrometers per pixel at full resolution. By default as stated in the file. The resolution is never guessed.
    series
        Image to read from a TIFF with several images (macro image, scenes, fields of view): its number in file order,
        from 0, or its name. By default the largest image. Not for scanner formats, which mark the slide themselves.
    sample
        Sample id. By default the name of the file up to the first dot.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).

    Returns
    -------
    A section with only the image ``he``. The image has the levels of the file, and coarser levels if the file has too
    few. The history of the section holds the vendor and objective of the scanner.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is not an image, is truncated or damaged, is not 8-bit RGB, keeps pixels in other files, or has no
        image `series`.

    Warns
    -----
    UserWarning
        If the image has an alpha channel, states an orientation, or is the largest of several. Also if three separate
        planes are read as colors because they are bright.

    Notes
    -----
    Strips and tiles are checked when they are read. A missing or damaged strip or tile raises a `ValueError`. Damage is
    detected in JPEG, deflate, LZW and PNG data, but not in uncompressed pixels. Limits are checked before memory is
    allocated: at most 20,000 directories or planes, and tiles of at most 256 MB.

    Examples
    --------
    >>> import tempfile
    >>> import cv2, numpy as np
    >>> path = Path(tempfile.mkdtemp()) / "biopsy.png"
    >>> _ = cv2.imwrite(str(path), np.full((600, 800, 3), 230, np.uint8))
    >>> sdata = slide(path, mpp=0.5)
    >>> sdata.attrs["stimage_sd"]["sample"], sdata.images["he"]["scale0"]["image"].shape
    ('biopsy', (3, 600, 800))
    """
    check_mpp(mpp)
    path = Path(path).expanduser().absolute()
    levels, stated = open_raster(path, series=series)
    sdata = SpatialData(images={contract.IMAGE: contract.build_image(levels)})
    contract.register(
        sdata,
        sample=sample if sample is not None else path.name.split(".")[0],
        platform="slide",
        image=contract.IMAGE,
        mpp=mpp if mpp is not None else stated,
    )
    source = "given" if mpp is not None else "file" if stated is not None else "unknown"
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.slide",
        path=path,
        mpp=mpp if mpp is not None else stated,
        mpp_source=source,
        series=series,
        **scanner(path),
    )
    return sdata
