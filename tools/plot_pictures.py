"""Draw the pictures of the plots for the API pages and the gallery's thumbnails: `docs/_static/pl/<function>.webp`.

``python tools/plot_pictures.py`` runs the cells of `docs/gallery.md`, and then the plots that the gallery leaves to the
tutorials. It takes a few minutes of one core. ``python tools/plot_pictures.py cells roc`` writes these two only.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "_static" / "pl"
#: largest width and height of a picture, pixels, and largest file, bytes
WIDTH, HEIGHT, MOST = 640, 480, 40_000
#: plots that the gallery does not run: explanations and predicted cells
MORE = (
    """
tiles = sti.tl.top_tiles(test, best[0], n_tiles=2)
sti.pp.segment_nuclei(test, tiles=tiles)
sti.tl.explain(test, model, best[0], tiles=tiles, n_samples=600)
_ = sti.pl.explanation(test, best[0], tiles=tiles)
""",
    "_ = sti.pl.explanation_scores(sti.tl.explained_nuclei(test, best[0]))",
    """
sti.tl.saliency(test, model, best[0], tiles=tiles[:1], n_steps=8)
_ = sti.pl.saliency(test, best[0], tiles=tiles[:1])
""",
    """
held_out = sti.datasets.synthetic_xenium("held_out", size_um=400, n_genes=9, seed=1, pixel_um=0.425, n_markers=4)
held_out = sti.io.xenium(held_out, he_image=held_out / "he_image.ome.tif")
sti.pp.annotate_cells(held_out, reference, merge=reference.uns["merge"])
sti.pp.tissue_mask(xenium)
sti.pp.tissue_mask(held_out)
finder = sti.tl.fit_cell_classifier(
    xenium, tile_px=128, n_epochs=14, batch_size=2, learning_rate=3e-3
)
sti.tl.predict_cells(held_out, finder, key_added="nuclei_predicted")
cell_scores = sti.tl.evaluate_cells(held_out)
_ = sti.pl.cell_scores(cell_scores)
""",
    "_ = sti.pl.confusion(cell_scores.confusion)",
)


def cells(page: Path) -> Iterator[str]:
    """Yield the code cells of a page."""
    for match in re.finditer(r"^```\{code-cell\} python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        yield "\n".join(line for line in match[1].splitlines() if not line.startswith(":tags:"))


def run(wanted: set[str]) -> dict[str, Path]:
    """Run all cells, and write the first picture of every plot."""
    names: dict[str, Any] = {"__name__": "gallery"}
    written: dict[str, Path] = {}
    for source in (*cells(DOCS / "gallery.md"), *MORE):
        exec(source, names)
        called = re.findall(r"sti\.pl\.(\w+)\(", source)
        for name, number in zip(called, plt.get_fignums(), strict=False):
            if name not in written and (not wanted or name in wanted):
                written[name] = write(plt.figure(number), FOLDER / f"{name}.webp")
        plt.close("all")
    return written


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as a small picture on white."""
    figure.set_facecolor("white")
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight", pad_inches=0.1)
    pixels = cv2.imread(str(path.with_suffix(".png")))
    path.with_suffix(".png").unlink()
    if pixels is None:
        raise FileNotFoundError(f"{path.with_suffix('.png')} cannot be read.")
    scale = min(WIDTH / pixels.shape[1], HEIGHT / pixels.shape[0], 1)
    small = cv2.resize(np.asarray(pixels), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for quality in (85, 75, 60, 45, 30):
        cv2.imwrite(str(path), small, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if path.stat().st_size <= MOST:
            return path
    raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected at most {MOST:,}.")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for name, file in run(set(sys.argv[1:])).items():
            sys.stdout.write(f"{name}: {file.stat().st_size:,} bytes\n")
