"""Fit stain matrices with squidpy. Only this file calls squidpy's experimental stain functions."""

from __future__ import annotations

import numpy as np
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

#: largest number of tissue pixels for a fit; more pixels change the stain vectors by less than half a degree
_MOST_PIXELS = 60_000


def fit_stain_matrix(thumbnail: np.ndarray, mask: np.ndarray, *, method: str, white_point: np.ndarray) -> np.ndarray:
    """Fit hematoxylin and eosin on tissue pixels with squidpy's `experimental.im.fit_stain_reference`.

    - `thumbnail`: ``uint8 (y, x, 3)``.
    - `mask`: ``bool (y, x)``, `True` on tissue.
    - `method`: ``"vahadane"`` or ``"macenko"``.
    - `white_point`: ``(3,)`` intensity of unstained glass.
    - returns: unit optical densities of hematoxylin, eosin and the residual as columns, ``float64 (3, 3)``.
    """
    pixels = thumbnail[mask]
    if len(pixels) > _MOST_PIXELS:
        pixels = pixels[np.linspace(0, len(pixels) - 1, _MOST_PIXELS).astype(int)]
    strip = np.ascontiguousarray(pixels.T[:, None, :])
    small = SpatialData(
        images={"pixels": Image2DModel.parse(strip, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        labels={"pixels_tissue": Labels2DModel.parse(np.ones(strip.shape[1:], np.uint8), dims=("y", "x"))},
    )
    try:
        fitted = sq.experimental.im.fit_stain_reference(small, "pixels", method=method, white_point=white_point)
    except RuntimeError as error:  # squidpy's StainFittingError
        raise ValueError(
            f"The stains could not be fitted by {method!r}: {error} Is it an H&E image? "
            'Reinhard\'s method needs no stain vectors: `stain_normalize(..., method="reinhard")`.'
        ) from error
    return np.asarray(fitted.stain_matrix)
