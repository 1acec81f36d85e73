"""Synthetic whole slide in the format of Aperio scanners, with known truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from stimage_sd.datasets._pyramid_writer import QUALITY, STRIP, TILE, write_pyramid
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint
from stimage_sd.datasets._truth import FIELDS, check_folder, draw_genes

#: smallest side of a slide with tissue and a thumbnail, px
SMALLEST = 1024
#: `Tissue.eccentricity` of the outline of the tissue
REACH = 0.9
#: distance of the points with truth, µm
TRUTH_UM = 100.0
#: magnification of the objective times the micrometers per pixel
MAGNIFICATION_MPP = 10.0
#: standard deviation of the out-of-focus blur, µm
BLUR_UM = 5.0
#: width of a felt-tip pen, µm, and its largest width as a share of the side of a small slide
PEN_UM, PEN_SHARE = 700.0, 0.08
#: share of red, green and blue light that passes the ink of a pen
INKS = {"blue": (0.14, 0.37, 0.63), "green": (0.15, 0.52, 0.36), "black": (0.16, 0.16, 0.18)}


def synthetic_slide(
    path: str | Path,
    *,
    size: int = 8192,
    mpp: float = 0.5,
    n_genes: int = 60,
    blur: float = 0.0,
    pen: int = 0,
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
) -> Path:
    """Write a synthetic whole slide as an Aperio pyramid, with the truth of its genes.

    The tissue is the same as in `synthetic_visium`. Genes with the same `gene_seed` depend on the tissue in the same
    way. A model trained on a Visium section can therefore be scored on the slide, which has no measured genes. The
    image is written in strips. A slide with sides of 40,000 px needs about 2 GB of memory, mostly for the positions of
    one million nuclei.

    Parameters
    ----------
    path
        Folder to write. Created if missing, otherwise it has to be empty.
    size
        Side of the slide, px.
    mpp
        Micrometers per pixel.
    n_genes
        Number of genes. A third of the genes are noise.
    blur
        Share of the slide that is out of focus, from the left border, 0 to 1.
    pen
        Number of strokes of a felt-tip pen.
    seed
        Seed of the tissue and the pen.
    gene_seed
        Seed of the dependence of genes on the tissue.
    stain_seed
        Seed of the staining. By default the standard staining.

    Returns
    -------
    The folder, with these files:

    - ``slide.svs``: levels with tiles of 256 px, each with a fourth of the side of the previous level, and a thumbnail;
    - ``truth_genes.csv``: as in `synthetic_visium`;
    - ``truth_points.csv``: one row per point, every 100 µm, with ``x`` and ``y`` in pixels, the three fields,
      ``in_tissue``, ``blurred`` and ``pen``;
    - ``truth_slide.json``: arguments, border of the blurred part, and strokes.

    Raises
    ------
    ValueError
        If `size` is less than 1,024 px, `mpp` is not positive, there are fewer than three genes, `blur` is not from
        0 to 1 or `pen` is negative.
    FileExistsError
        If `path` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> folder = synthetic_slide(Path(tempfile.mkdtemp()) / "slide", size=2048)
    >>> sdata = sti.io.slide(folder / "slide.svs")
    >>> sdata.images["he"]["scale0"]["image"].shape, sdata.attrs["stimage_sd"]["mpp"]
    ((3, 2048, 2048), 0.5)
    """
    if size < SMALLEST:
        raise ValueError(f"Expected `size` of at least {SMALLEST} px, found {size}.")
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometers per pixel, found {mpp!r}.")
    if n_genes < 3:
        raise ValueError(f"Expected `n_genes` of at least 3, found {n_genes}.")
    if not 0.0 <= blur <= 1.0 or pen < 0:
        raise ValueError(f"Expected `blur` from 0 to 1 and `pen` of at least 0, found {blur} and {pen}.")
    path = check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    tissue = Tissue(size, mpp, seed)
    strokes = [_draw_stroke(size, mpp, seed, index) for index in range(pen)]
    blurred = round(blur * size)
    strips: Iterator[np.ndarray] = paint(tissue, reach=REACH, stain=make_stain(stain_seed), strip=STRIP)
    if blurred:
        strips = _out_of_focus(strips, blurred, BLUR_UM / mpp)
    if strokes:
        strips = _with_strokes(strips, strokes)
    write_pyramid(path / "slide.svs", strips, size=size, mpp=mpp, describe=_Description(size, mpp))
    draw_genes(n_genes, gene_seed).to_csv(path / "truth_genes.csv")
    _truth_points(tissue, strokes, blurred).to_csv(path / "truth_points.csv", index=False)
    about = {
        "size": size,
        "mpp": mpp,
        "seed": seed,
        "gene_seed": gene_seed,
        "stain_seed": stain_seed,
        "reach": REACH,
        "blurred_px": blurred,
        "pen": [{"ink": stroke.ink, "width_px": stroke.width, "points": stroke.points.tolist()} for stroke in strokes],
    }
    (path / "truth_slide.json").write_text(json.dumps(about))
    return path


@dataclass(frozen=True)
class _Description:
    """Description of a level in the format of an Aperio scanner."""

    size: int
    mpp: float

    def __call__(self, side: int) -> str:
        scan = f"{self.size}x{self.size} [0,0 {self.size}x{self.size}] ({TILE}x{TILE})"
        what = scan if side == self.size else f"{scan} -> {side}x{side}"
        power = f"AppMag = {MAGNIFICATION_MPP / self.mpp:g}|MPP = {self.mpp:.4f}"
        return f"Aperio Image Library v12.0.5 \r\n{what} JPEG/YCC Q={QUALITY}|{power}|ScanScope ID = SYNTHETIC"


@dataclass(frozen=True)
class _Stroke:
    """A stroke of a pen: points ``(n, 2)`` x, y and width, px."""

    points: np.ndarray
    width: int
    ink: str


def _draw_stroke(size: int, mpp: float, seed: int, index: int) -> _Stroke:
    """Draw a random stroke: an arc around a position on the slide, as if to mark a region."""
    generator = np.random.default_rng([seed, 30, index])
    middle, radius = generator.uniform(0.25, 0.75, 2) * size, generator.uniform(0.08, 0.2) * size
    angles = generator.uniform(0.0, 2.0 * np.pi) + np.linspace(0.0, generator.uniform(1.5, 5.0), 60)
    wobble = radius * (1.0 + 0.08 * np.sin(3.0 * angles + generator.uniform(0.0, 6.0)))
    points = middle + wobble[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    width = max(3, round(min(PEN_UM / mpp, PEN_SHARE * size)))
    return _Stroke(np.rint(points).astype(np.int32), width, list(INKS)[index % len(INKS)])


def _mark(stroke: _Stroke, shape: tuple[int, int], top: int) -> np.ndarray:
    """Return a mask ``uint8 (rows, columns)`` of a stroke, 255 in the stroke, for a strip from row `top`."""
    mask = np.zeros(shape, dtype=np.uint8)
    cv2.polylines(mask, [stroke.points - np.array([0, top], dtype=np.int32)], False, 255, stroke.width, cv2.LINE_8)
    return mask


def _with_strokes(strips: Iterable[np.ndarray], strokes: list[_Stroke]) -> Iterator[np.ndarray]:
    """Draw pen strokes on streamed strips. The ink dims the image."""
    top = 0
    for strip in strips:
        for stroke in strokes:
            half = stroke.width
            if stroke.points[:, 1].max() + half < top or stroke.points[:, 1].min() - half > top + strip.shape[0]:
                continue
            marked = _mark(stroke, strip.shape[:2], top) > 0
            strip[marked] = np.rint(strip[marked] * np.array(INKS[stroke.ink])).astype(np.uint8)
        top += strip.shape[0]
        yield strip


def _out_of_focus(strips: Iterable[np.ndarray], width: int, deviation: float) -> Iterator[np.ndarray]:
    """Blur the left part of streamed strips. Each strip is blurred with its neighbors, to avoid seams."""
    halo = int(np.ceil(4.0 * deviation))
    above: np.ndarray | None = None
    waiting: np.ndarray | None = None
    for strip in strips:
        if waiting is not None:
            yield _blur(above, waiting, strip, width, halo, deviation)
            above = waiting
        waiting = strip
    if waiting is not None:
        yield _blur(above, waiting, None, width, halo, deviation)


def _blur(
    above: np.ndarray | None, strip: np.ndarray, below: np.ndarray | None, width: int, halo: int, deviation: float
) -> np.ndarray:
    parts = [strip[:, : width + halo]]
    top = 0
    if above is not None:
        parts.insert(0, above[-halo:, : width + halo])
        top = parts[0].shape[0]
    if below is not None:
        parts.append(below[:halo, : width + halo])
    blurred = cv2.GaussianBlur(np.concatenate(parts), (0, 0), deviation)
    result = strip.copy()
    result[:, :width] = blurred[top : top + strip.shape[0], :width]
    return result


def _truth_points(tissue: Tissue, strokes: list[_Stroke], blurred: int) -> pd.DataFrame:
    grid = np.arange(TRUTH_UM / 2.0, tissue.size * tissue.mpp, TRUTH_UM) / tissue.mpp
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    frame = pd.DataFrame({"x": points[:, 0], "y": points[:, 1]})
    for name in FIELDS:
        frame[name] = tissue.at(name, points)
    frame["in_tissue"] = (tissue.eccentricity(points) < REACH).astype(int)
    frame["blurred"] = (points[:, 0] < blurred).astype(int)
    frame["pen"] = 0
    for stroke in strokes:
        # Drawn at an eighth of the resolution, as a full-resolution mask of the whole slide needs too much memory.
        small = _Stroke(stroke.points // 8, max(1, stroke.width // 8), stroke.ink)
        marked = _mark(small, (tissue.size // 8 + 1,) * 2, 0) > 0
        rows, columns = (points[:, axis].astype(int) // 8 for axis in (1, 0))
        frame["pen"] |= marked[rows, columns].astype(int)
    return frame
