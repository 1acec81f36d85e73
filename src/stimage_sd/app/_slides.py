"""Serve pieces of a visitor's slide to the viewer, at the resolution of the window."""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import cv2
import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from spatialdata import SpatialData
    from starlette.requests import Request
    from starlette.responses import Response

#: path of the pieces. `Guard` serves them only with the page's cookie.
SLIDES = "/slides/"
PIECE = SLIDES + "{token}/{level:int}/{column:int}_{row:int}.jpg"
#: side of a piece, px
SIDE = 512
#: longest side of the copy that replaces missing coarse levels, px
OVERVIEW = 2048
#: most pixels of a stored level per pixel of a piece, along one side; bounds the memory of one request to 50 MB
MOST_REDUCTION = 8
#: pieces that are read at the same time
_READING = threading.Semaphore(2)
#: slides by the token in their address. They belong to the sessions that hold them.
_SERVED: WeakValueDictionary[str, Slide] = WeakValueDictionary()


class Slide:
    """The H&E of a section, cut into square pieces at halved resolutions.

    At level ``n``, one pixel covers ``2**n`` pixels of the H&E along each side. The last level fits into one piece.
    The slide has an address that only its session knows. The address works as long as the session holds the slide.

    Parameters
    ----------
    sdata
        The section.

    Attributes
    ----------
    width, height
        Size of the H&E, px.
    mpp
        Micrometers per pixel, `None` if unknown.
    last_level
        Number of the coarsest level.
    token
        Random part of the address.
    """

    def __init__(self, sdata: SpatialData) -> None:
        from stimage_sd import contract

        name = contract.image_name(sdata)
        self._levels = contract.levels(sdata, name)
        self.height, self.width = (int(length) for length in self._levels[0].shape[1:])
        self.mpp = contract.mpp(sdata)
        self.last_level = max(0, int(np.ceil(np.log2(max(self.width, self.height) / SIDE))))
        self._overview, self._overview_reduction = contract.thumbnail(sdata, name, max_side=OVERVIEW)
        self.token = secrets.token_urlsafe(32)
        _SERVED[self.token] = self

    def as_data(self) -> dict[str, Any]:
        """Return size, resolution and address as JSON for the viewer."""
        return {
            "address": f"{SLIDES}{self.token}/", "width": self.width, "height": self.height, "mpp": self.mpp,
            "last_level": self.last_level, "piece_px": SIDE,
        }  # fmt: skip

    def piece(self, level: int, column: int, row: int) -> np.ndarray | None:
        """Return a piece, ``uint8 (height, width, 3)``, or `None` if the slide has no such piece.

        Parameters
        ----------
        level
            Number of the level.
        column, row
            Place of the piece among the pieces of its level.
        """
        if not 0 <= level <= self.last_level or column < 0 or row < 0:
            return None
        reduction = 2**level
        left, top = column * SIDE * reduction, row * SIDE * reduction
        if left >= self.width or top >= self.height:
            return None
        right, bottom = min(left + SIDE * reduction, self.width), min(top + SIDE * reduction, self.height)
        size = (-(-(right - left) // reduction), -(-(bottom - top) // reduction))
        with _READING:
            pixels = self._read(left, top, right, bottom, reduction)
        if pixels.shape[1::-1] == size:
            return pixels
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    def _read(self, left: int, top: int, right: int, bottom: int, reduction: int) -> np.ndarray:
        """Read a box from the coarsest level that is fine enough."""
        fine = [level for level in self._levels if _step(level, "x") <= 1.01 * reduction]
        level = fine[-1]
        if reduction / _step(level, "x") > MOST_REDUCTION:
            step = self._overview_reduction
            edges = [(top, bottom, self._overview.shape[0]), (left, right, self._overview.shape[1])]
            rows, columns = (_cut(start / step, stop / step, size) for start, stop, size in edges)
            return np.ascontiguousarray(self._overview[rows, columns])
        rows, columns = _window(level, "y", top, bottom), _window(level, "x", left, right)
        values = level.data[:, rows, columns].compute(scheduler="synchronous")
        return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def _step(level: xr.DataArray, axis: str) -> float:
    """Return the H&E pixels per pixel of a level."""
    places = level[axis].values
    return float((places[-1] - places[0]) / (len(places) - 1)) if len(places) > 1 else 1.0


def _window(level: xr.DataArray, axis: str, start: int, stop: int) -> slice:
    """Return the pixels of a level between two places of the H&E, to half a pixel of the level."""
    step = _step(level, axis)
    first = float(level[axis].values[0]) - step / 2
    return _cut((start - first) / step, (stop - first) / step, level.sizes[axis])


def _cut(start: float, stop: float, size: int) -> slice:
    low = min(max(round(start), 0), size - 1)
    return slice(low, max(min(round(stop), size), low + 1))


def serve_piece(request: Request) -> Response:
    """Answer a request for a piece with a JPEG, or with 404 if there is no such slide or piece."""
    from starlette.responses import Response

    slide = _SERVED.get(request.path_params["token"])
    place = (request.path_params[name] for name in ("level", "column", "row"))
    pixels = None if slide is None else slide.piece(*place)
    # patients' images should not stay in the browser's cache on disk
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if pixels is None:
        return Response("No such piece of a slide.", 404, headers, media_type="text/plain")
    _, jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return Response(jpeg.tobytes(), 200, headers, media_type="image/jpeg")
