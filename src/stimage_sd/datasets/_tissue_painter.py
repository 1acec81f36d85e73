"""Painter of synthetic tissue that looks like H&E.

A tissue has three smooth random fields (density of nuclei, size of nuclei, share of stroma) inside an irregular
outline. Each pixel has a hematoxylin and an eosin concentration, and light falls off exponentially with both
(Beer-Lambert). The image is painted in strips, in 8 bit with lookup tables. This is fast and needs the memory of one
strip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import fft, ndimage, special

#: grid points per side of a field; the image interpolates between the points
GRID = 256
#: correlation length of the fields, as a share of the side of the tissue
SMOOTHNESS = 0.05
#: sides of the two textures, px; they have no small common multiple, which hides the repeats
TEXTURES = (1024, 720)
#: distance of the candidate positions of nuclei, µm
CANDIDATE_UM = 6.5
#: nuclei per mm² at density field 0 and 1
DENSITY = (900.0, 9500.0)
#: radius of nuclei at size field 0 and 1, µm
RADIUS_UM = (2.3, 4.9)
#: extra rows painted beyond a strip, px, to avoid seams
HALO = 32
#: fractional bits of OpenCV's drawing coordinates
SHIFT = 4

#: absorbance of the stains in red, green and blue (after Ruifrok and Johnston 2001, adapted to scanners)
HEMATOXYLIN = np.array([0.66, 0.69, 0.30])
EOSIN = np.array([0.10, 0.95, 0.40])


@dataclass(frozen=True)
class Stain:
    """A staining: absorbance per color of each stain, and gray value of the background."""

    hematoxylin: np.ndarray
    eosin: np.ndarray
    background: float = 244.0


def make_stain(seed: int | None) -> Stain:
    """Return the standard staining, or a random staining if a seed is given."""
    if seed is None:
        return Stain(HEMATOXYLIN, EOSIN)
    generator = np.random.default_rng([seed, 7])
    turned = [vector * generator.uniform(0.8, 1.2, 3) * generator.uniform(0.7, 1.4) for vector in (HEMATOXYLIN, EOSIN)]
    return Stain(turned[0], turned[1], background=generator.uniform(236.0, 250.0))


@dataclass(frozen=True)
class Tissue:
    """A synthetic tissue on a square image.

    - `size`: side of the image, px.
    - `mpp`: micrometers per pixel.
    - `seed`: seed of the fields, outline, nuclei and textures.
    """

    size: int
    mpp: float
    seed: int

    def field(self, name: str) -> np.ndarray:
        """Return a field ``(GRID, GRID)``, uniform on 0 to 1: ``density``, ``size``, ``stroma`` or ``angle``."""
        index = ("density", "size", "stroma", "angle").index(name)
        noise = np.random.default_rng([self.seed, index]).standard_normal((GRID, GRID))
        smooth = _smooth(noise, (SMOOTHNESS * GRID, SMOOTHNESS * GRID))
        return special.ndtr((smooth - smooth.mean()) / smooth.std()).astype(np.float32)

    def at(self, name: str, points: np.ndarray) -> np.ndarray:
        """Return a field at ``(n, 2)`` points (x, y), px."""
        places = (points[:, ::-1].T + 0.5) * GRID / self.size - 0.5
        return ndimage.map_coordinates(self.field(name), places, order=1, mode="nearest")

    def eccentricity(self, points: np.ndarray) -> np.ndarray:
        """Return the eccentricity of points ``(n, 2)``: 0 at the center, 1 on an irregular closed curve.

        The curve touches the border of the image. The outline of a tissue is a line of constant eccentricity.
        """
        generator = np.random.default_rng([self.seed, 5])
        waves = np.arange(2, 9)
        amplitudes = generator.uniform(0.3, 1.0, len(waves)) * 0.17 / waves**0.9
        phases = generator.uniform(0.0, 2.0 * np.pi, len(waves))

        def curve(angle: np.ndarray) -> np.ndarray:
            return 1.0 + (amplitudes * np.cos(waves * angle[:, None] + phases)).sum(axis=1)

        widest = curve(np.linspace(0.0, 2.0 * np.pi, 720)).max()
        middle = points - self.size / 2.0
        radius = curve(np.arctan2(middle[:, 1], middle[:, 0])) / widest * self.size / 2.0
        return np.hypot(middle[:, 0], middle[:, 1]) / radius


def paint(
    tissue: Tissue, *, reach: float, stain: Stain, strip: int, nuclei: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Paint a tissue in strips from top to bottom.

    - `tissue`: the tissue.
    - `reach`: `Tissue.eccentricity` of the outline of the tissue.
    - `stain`: the staining.
    - `strip`: rows per strip, px.
    - `nuclei`: ``(n, 6)`` nuclei, sorted from top to bottom. By default from `scatter_nuclei`.
    - yields: strips ``uint8 (strip, size, 3)``. The last strip may be lower.
    """
    painter = _Painter(tissue, reach, stain, scatter_nuclei(tissue, reach) if nuclei is None else nuclei)
    for start in range(0, tissue.size, strip):
        yield painter.rows(start, min(start + strip, tissue.size))


class _Painter:
    """State shared by all strips of a tissue."""

    def __init__(self, tissue: Tissue, reach: float, stain: Stain, nuclei: np.ndarray) -> None:
        self.tissue, self.nuclei = tissue, nuclei
        grid = (np.arange(GRID) + 0.5) * tissue.size / GRID
        points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
        # Opacity is 0.5 on the outline, and the edge is about 8 px wide.
        inside = (reach - tissue.eccentricity(points)) * tissue.size / 16.0
        self.inside = inside.reshape(GRID, GRID).astype(np.float32)
        self.stroma = tissue.field("stroma")
        self.reach = reach
        self.fibers, self.grain = (_texture(tissue.seed, stream) for stream in (0, 1))
        concentration = np.arange(256)[:, None] / 128.0
        self.hematoxylin = (255.0 * np.exp(-concentration * stain.hematoxylin)).round().astype(np.uint8)
        self.eosin = (stain.background * np.exp(-concentration * stain.eosin)).round().astype(np.uint8)

    def rows(self, start: int, stop: int) -> np.ndarray:
        top, bottom = start - HALO, stop + HALO
        shape = (bottom - top, self.tissue.size)
        inside = np.clip(self._stretch(self.inside, top, shape) + 0.5, 0.0, 1.0)
        stroma = self._stretch(self.stroma, top, shape)
        fibers, grain = self._tiled(self.fibers, top, shape), self._tiled(self.grain, top, shape)

        # Stroma has bright pink fibers. The rest is paler, more violet cytoplasm.
        eosin = inside * (12.0 + 16.0 * stroma + (0.10 + 0.26 * stroma) * fibers + 0.10 * grain)
        hematoxylin = inside * (6.0 + 14.0 * (1.0 - stroma) * grain / 128.0)
        stained = self._draw_nuclei(top, shape)
        hematoxylin += stained * (0.6 + 0.4 * grain / 128.0)

        # Beer-Lambert: the transmission of two stains is the product of both transmissions.
        picture = cv2.multiply(_look_up(hematoxylin, self.hematoxylin), _look_up(eosin, self.eosin), scale=1.0 / 255.0)
        return picture[HALO : HALO + stop - start]

    def _draw_nuclei(self, top: int, shape: tuple[int, int]) -> np.ndarray:
        nuclei = self.nuclei[(self.nuclei[:, 1] > top - HALO) & (self.nuclei[:, 1] < top + shape[0] + HALO)]
        canvas = np.zeros(shape, dtype=np.uint8)
        unit = 1 << SHIFT
        for x, y, long, short, angle, darkness in nuclei.tolist():
            center = (round(x * unit), round((y - top) * unit))
            axes = (round(long * unit), round(short * unit))
            cv2.ellipse(canvas, center, axes, angle, 0, 360, darkness, -1, cv2.LINE_AA, SHIFT)
            # Chromatin is denser at the membrane.
            cv2.ellipse(canvas, center, axes, angle, 0, 360, darkness * 1.15, 1, cv2.LINE_AA, SHIFT)
        return cv2.GaussianBlur(canvas, (0, 0), 0.9).astype(np.float32)

    def _stretch(self, field: np.ndarray, top: int, shape: tuple[int, int]) -> np.ndarray:
        """Interpolate a field of the image on the rows of a strip."""
        step = GRID / self.tissue.size
        shift = 0.5 * step - 0.5
        matrix = np.array([[step, 0.0, shift], [0.0, step, top * step + shift]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(field, matrix, (shape[1], shape[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def _tiled(self, textures: list[np.ndarray], top: int, shape: tuple[int, int]) -> np.ndarray:
        """Return the mean of repeated textures, 0 to 255."""
        pieces = []
        for texture in textures:
            rows = np.arange(top, top + shape[0]) % texture.shape[0]
            repeats = -(-shape[1] // texture.shape[1])
            pieces.append(np.tile(texture[rows], (1, repeats))[:, : shape[1]])
        return cv2.addWeighted(pieces[0], 0.5, pieces[1], 0.5, 0.0).astype(np.float32)


def scatter_nuclei(tissue: Tissue, reach: float) -> np.ndarray:
    """Return nuclei ``(n, 6)``: x, y, half axes (px), angle (degrees) and darkness, sorted from top to bottom."""
    generator = np.random.default_rng([tissue.seed, 6])
    spacing = CANDIDATE_UM / tissue.mpp
    grid = np.arange(spacing / 2.0, tissue.size, spacing)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    points = points + generator.uniform(-0.42, 0.42, points.shape) * spacing
    per_mm2 = DENSITY[0] + (DENSITY[1] - DENSITY[0]) * tissue.at("density", points)
    chosen = generator.random(len(points)) < per_mm2 * (CANDIDATE_UM * 1e-3) ** 2
    # Keep a margin, so that no nucleus crosses the outline of the tissue.
    chosen &= tissue.eccentricity(points) < reach - 6.0 * RADIUS_UM[1] / tissue.mpp / tissue.size
    points = points[chosen]

    n_nuclei = len(points)
    stroma = tissue.at("stroma", points)
    radius = (RADIUS_UM[0] + (RADIUS_UM[1] - RADIUS_UM[0]) * tissue.at("size", points)) / tissue.mpp
    radius *= np.exp(generator.normal(0.0, 0.13, n_nuclei))
    # Nuclei of stroma are spindles along the fibers, with the same area as round nuclei.
    spindle = generator.random(n_nuclei) < stroma * 0.85
    aspect = np.where(spindle, generator.uniform(1.7, 3.2, n_nuclei), generator.uniform(1.0, 1.45, n_nuclei))
    along = 180.0 * tissue.at("angle", points) + generator.normal(0.0, 18.0, n_nuclei)
    angle = np.where(spindle, along, generator.uniform(0.0, 180.0, n_nuclei))
    darkness = np.clip(generator.normal(np.where(spindle, 128.0, 108.0), 20.0), 60.0, 190.0)
    nuclei = np.column_stack([points, radius * np.sqrt(aspect), radius / np.sqrt(aspect), angle, darkness])
    return nuclei[np.argsort(nuclei[:, 1], kind="stable")]


def _texture(seed: int, stream: int) -> list[np.ndarray]:
    """Return periodic textures, ``uint8``: wavy fibers (0) or fine grain (1)."""
    made = []
    for side in TEXTURES:
        generator = np.random.default_rng([seed, 8 + stream, side])
        noise = generator.standard_normal((side, side)).astype(np.float32)
        texture = _smooth(noise, (1.3, 1.3)) if stream == 1 else _fibers(noise, generator)
        texture = (texture - texture.mean()) / texture.std()
        made.append(np.clip(128.0 + 52.0 * texture, 0.0, 255.0).astype(np.uint8))
    return made


def _fibers(noise: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Bend long streaks of noise by a smooth displacement, periodically."""
    side = noise.shape[0]
    streaks = _smooth(noise, (1.6, 22.0))
    bends = np.stack([_smooth(generator.standard_normal((side, side)), (side / 22.0, side / 22.0)) for _ in range(2)])
    bends *= side / 14.0 / bends.std()
    rows, columns = np.indices((side, side))
    return ndimage.map_coordinates(streaks, [rows + bends[0], columns + bends[1]], order=1, mode="grid-wrap")


def _smooth(noise: np.ndarray, deviations: tuple[float, float]) -> np.ndarray:
    """Filter with a periodic Gaussian, by Fourier transform, as direct filtering with wide Gaussians is slow."""
    rows = fft.fftfreq(noise.shape[0])[:, None] * deviations[0]
    columns = fft.rfftfreq(noise.shape[1]) * deviations[1]
    return fft.irfft2(fft.rfft2(noise) * np.exp(-2.0 * np.pi**2 * (rows**2 + columns**2)), s=noise.shape)


def _look_up(concentration: np.ndarray, table: np.ndarray) -> np.ndarray:
    level = cv2.convertScaleAbs(concentration)
    return cv2.LUT(cv2.merge([level, level, level]), table.reshape(256, 1, 3))
