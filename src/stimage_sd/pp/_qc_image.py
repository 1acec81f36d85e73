"""Measure light and stain of a slide with squidpy's `experimental.im.qc_image`.

Only this file calls that function. It computes one value per tile and metric, which suits light and stain. It does not
replace HistoQC. Its outliers are the worst tenth of every slide's tiles, however sharp. Its tissue mask is as large as
the slide. It does not find pen marks, bubbles or specks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from squidpy.experimental.im import QCMetric

#: name of the logger that squidpy uses
LOGGER = "spatialdata._logging"
#: side of squidpy's tiles, map px
TILE = 32
#: squidpy's metrics and their names in the result
FIGURES = {
    QCMetric.BRIGHTNESS_MEAN: "brightness",
    QCMetric.BRIGHTNESS_STD: "contrast",
    QCMetric.HEMATOXYLIN_MEAN: "hematoxylin",
    QCMetric.EOSIN_MEAN: "eosin",
    QCMetric.FOLD_FRACTION: "dark_fraction",
}


def light_and_stain(rgb: np.ndarray, usable: np.ndarray) -> dict[str, float]:
    """Summarize squidpy's metrics over the tiles that lie wholly on usable tissue.

    - `rgb`: ``uint8 (y, x, 3)``, the slide at the resolution of the quality map.
    - `usable`: ``bool (y, x)``, `True` on usable tissue.
    - returns: medians over tiles of ``brightness`` and ``contrast`` (mean and standard deviation of gray values, 0 to
      255) and of ``hematoxylin`` and ``eosin`` (concentrations, Ruifrok and Johnston). ``dark_fraction`` is the mean
      share of dark and saturated pixels, which folds show. All are NaN if no tile lies wholly on usable tissue.
    """
    height, width = (side // TILE for side in usable.shape)
    names = list(FIGURES.values())
    inside = _tiles(usable, height, width).all(axis=(1, 2))
    if not inside.any():
        return dict.fromkeys(names, float("nan"))
    # squidpy computes every tile of an image, so it gets an image of the usable tiles only, stacked along y
    column = _tiles(rgb, height, width)[inside].reshape(-1, TILE, 3)
    small = SpatialData(images={"tiles": Image2DModel.parse(np.moveaxis(column, -1, 0), dims=("c", "y", "x"))})
    with _quiet():
        sq.experimental.im.qc_image(
            small,
            "tiles",
            metrics=list(FIGURES),
            tile_size=(TILE, TILE),
            detect_outliers=False,
            detect_tissue=False,
            progress=False,
            preview=False,
        )
    figures = np.asarray(small.tables["qc_img_tiles"].X)
    return {
        name: float(figures[:, index].mean() if name == "dark_fraction" else np.median(figures[:, index]))
        for index, name in enumerate(names)
    }


def _tiles(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cut an array ``(y, x, ...)`` into ``(rows * columns, TILE, TILE, ...)``, row by row, without the remainder."""
    cut = array[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE, *array.shape[2:])
    return cut.swapaxes(1, 2).reshape(-1, TILE, TILE, *array.shape[2:])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence squidpy's info messages about each slide. Its warnings stay."""
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
