"""Whole slides without molecules."""

from __future__ import annotations

from pathlib import Path

from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._lazy_levels import scanner
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import check_mpp


def slide(path: str | Path, *, mpp: float | None = None, sample: str | None = None) -> SpatialData:
    """Read an H&E image or whole slide, lazily.

    Parameters
    ----------
    path
        A slide in a format that OpenSlide knows (SVS, NDPI, MRXS, SCN, BIF, ...), a TIFF or OME-TIFF with or without
        levels, a JPEG or a PNG. Colours may lie apart, a plane each.
    mpp
        Micrometres a pixel at full resolution. Unless given, what the file states; it is not guessed.
    sample
        Sample id; the name of the file up to its first dot unless given.

    Returns
    -------
    A section with the image ``he`` alone, its levels those of the file, and coarser ones where it has too few. The
    scanner's vendor and objective are in its history.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no image, is truncated, or is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If the image has an alpha channel or states an orientation, or three planes are taken for colours because
        they are light.

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
    path = Path(path).expanduser()
    levels, stated = open_raster(path)
    sdata = SpatialData(images={contract.IMAGE: contract.build_image(levels)})
    contract.register(
        sdata,
        sample=sample if sample is not None else path.name.split(".")[0],
        platform="slide",
        image=contract.IMAGE,
        mpp=mpp if mpp is not None else stated,
    )
    source = "given" if mpp is not None else "file" if stated is not None else "unknown"
    contract.record(
        sdata, "io.slide", path=path, mpp=mpp if mpp is not None else stated, mpp_source=source, **scanner(path)
    )
    return sdata
