"""Images of a synthetic Xenium section: DAPI of the nuclei, and pyramidal OME-TIFF files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from stimage_sd.datasets._tissue_painter import GRID, SHIFT, Tissue

#: side of a tile and rows per strip, px; a power of two, so it can be halved for all levels
TILE = 512
#: longest side of the coarsest level, px
COARSEST = 1000
#: extra rows drawn beyond a strip, µm, to avoid seams
HALO_UM = 24.0
#: standard deviation of the blur of the microscope, µm
BLUR_UM = 0.45
#: camera counts of darkness, of tissue without nuclei, and per unit of brightness of a nucleus
DARK, BACKGROUND, GAIN = 90.0, 110.0, 22.0


@dataclass(frozen=True)
class DapiPainter:
    """Draws nuclei as in a fluorescence microscope.

    - `tissue`: tissue with the nuclei.
    - `reach`: `Tissue.eccentricity` of the outline of the tissue.
    - `nuclei`: ``(n, 6)`` nuclei from `scatter_nuclei`, pixels of the H&E.
    - `to_dapi`: ``(3, 3)`` similarity from pixels of the H&E to pixels of the DAPI image.
    - `size`: side of the image, px.
    - `pixel_um`: micrometers per pixel.
    """

    tissue: Tissue
    reach: float
    nuclei: np.ndarray
    to_dapi: np.ndarray
    size: int
    pixel_um: float

    def strips(self) -> Iterator[np.ndarray]:
        """Yield strips ``uint16 (TILE, size)`` of the image from top to bottom. The last strip may be lower."""
        drawn = self._drawn()
        inside = self._inside()
        halo = int(np.ceil(HALO_UM / self.pixel_um))
        for start in range(0, self.size, TILE):
            stop = min(start + TILE, self.size)
            shape = (stop - start + 2 * halo, self.size)
            near = drawn[(drawn[:, 1] > start - 2 * halo) & (drawn[:, 1] < stop + 2 * halo)]
            light = _draw(near, start - halo, shape)
            blurred = cv2.GaussianBlur(light, (0, 0), BLUR_UM / self.pixel_um)[halo : halo + stop - start]
            signal = DARK + GAIN * blurred + BACKGROUND * self._stretch(inside, start, (stop - start, self.size))
            # Shot noise: the variance of a camera is proportional to the signal.
            noise = np.random.default_rng([self.tissue.seed, 31, start]).standard_normal(signal.shape, np.float32)
            yield np.clip(signal + 1.5 * np.sqrt(signal) * noise, 0, 65535).astype(np.uint16)

    def _drawn(self) -> np.ndarray:
        """Return center, half axes, angle and brightness of the nuclei in the DAPI image."""
        scale = float(np.sqrt(np.linalg.det(self.to_dapi[:2, :2])))
        turned = np.degrees(np.arctan2(self.to_dapi[1, 0], self.to_dapi[0, 0]))
        centers = self.nuclei[:, :2] @ self.to_dapi[:2, :2].T + self.to_dapi[:2, 2]
        return np.column_stack([centers, self.nuclei[:, 2:4] * scale, self.nuclei[:, 4] + turned, self.nuclei[:, 5]])

    def _inside(self) -> np.ndarray:
        grid = (np.arange(GRID) + 0.5) * self.tissue.size / GRID
        points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
        inside = (self.reach - self.tissue.eccentricity(points)) * self.tissue.size / 32.0 + 0.5
        return np.clip(inside, 0.0, 1.0).reshape(GRID, GRID).astype(np.float32)

    def _stretch(self, field: np.ndarray, top: int, shape: tuple[int, int]) -> np.ndarray:
        """Interpolate a field of the H&E on rows of the DAPI image."""
        step = GRID / self.tissue.size
        to_grid = np.array([[step, 0.0, 0.5 * step - 0.5], [0.0, step, 0.5 * step - 0.5], [0.0, 0.0, 1.0]])
        shift = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
        matrix = (to_grid @ np.linalg.inv(self.to_dapi) @ shift)[:2]
        return cv2.warpAffine(field, matrix, (shape[1], shape[0]), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _draw(nuclei: np.ndarray, top: int, shape: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(shape, dtype=np.uint8)
    unit = 1 << SHIFT
    for x, y, long, short, angle, brightness in nuclei.tolist():
        center = (round(x * unit), round((y - top) * unit))
        axes = (round(long * unit), round(short * unit))
        cv2.ellipse(canvas, center, axes, angle, 0, 360, brightness, -1, cv2.LINE_AA, SHIFT)
    return canvas.astype(np.float32)


def write_ome_pyramid(
    path: Path,
    strips: Iterable[np.ndarray],
    *,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    metadata: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Write streamed strips as a tiled OME-TIFF, with coarser levels in sub-directories.

    - `path`: file to write.
    - `strips`: strips of `TILE` rows of the image from top to bottom. The last strip may be lower.
    - `shape`: shape of the image, ``(y, x)`` or ``(y, x, 3)``.
    - `dtype`: type of the pixels.
    - `metadata`: metadata for the OME-XML.
    - `options`: compression and other arguments of `tifffile.TiffWriter.write`.
    """
    shapes = [shape]
    while max(shapes[-1][:2]) > COARSEST:
        shapes.append((shapes[-1][0] // 2, shapes[-1][1] // 2, *shape[2:]))
    common = {"dtype": dtype, "tile": (TILE, TILE), **options}
    # The finest level has to be first in the file, so the coarser levels are kept on disk.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, tifffile.TiffWriter(path, ome=True) as writer:
        coarser = [
            np.memmap(Path(scratch) / str(index), dtype=dtype, mode="w+", shape=size)
            for index, size in enumerate(shapes[1:])
        ]
        writer.write(_finest(strips, coarser), shape=shape, subifds=len(coarser), metadata=dict(metadata), **common)
        for level in coarser:
            writer.write(_tiles(level), shape=level.shape, subfiletype=1, metadata=None, **common)


def _finest(strips: Iterable[np.ndarray], coarser: list[np.memmap]) -> Iterator[np.ndarray]:
    """Yield the tiles of the finest level, and fill the coarser levels."""
    tops = [0] * len(coarser)
    for strip in strips:
        rows = strip
        for index, level in enumerate(coarser):
            width, height = level.shape[1], rows.shape[0] // 2
            rows = cv2.resize(rows[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
            level[tops[index] : tops[index] + height] = rows
            tops[index] += height
        yield from _tiles(strip)


def _tiles(image: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(0, image.shape[0], TILE):
        for left in range(0, image.shape[1], TILE):
            yield np.ascontiguousarray(image[top : top + TILE, left : left + TILE])
