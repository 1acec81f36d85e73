"""Nuclei without a network, against the published recipe, on patches with true outlines.

Eleven H&E patches of 256 px at 0.25 µm/px with instance maps (``$STIMAGE_SD_DATA/nuclei``). They show three fields
only, mirrored and moved: ``--choose`` chooses the method's numbers on two fields and scores the third.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy.io
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.segmentation import watershed

from benchmarks.measure import machine, report
from stimage_sd.image.instance_scores import InstanceScores, instance_scores
from stimage_sd.image.nuclei_watershed import (
    RECIPE,
    Recipe,
    hematoxylin_histogram,
    nuclei_watershed,
    otsu_of_histogram,
)

#: patches of the same tissue; 9 and 10 are ``patch1`` and ``patch2``
FIELDS = ((0, 1, 2, 9), (3, 4, 5, 10), (6, 7, 8))
#: diameter of a nucleus at 0.25 µm a pixel
NUCLEUS_PX = 32.0
#: what is chosen among
GRID = {
    "least": (0.75, 0.85, 0.95),
    "surroundings": (0.6, 0.8, 1.0),
    "contrast": (1.05, 1.15),
    "opening": (0.07, 0.1, 0.13),
    "apart": (0.12, 0.2),
}
Segment = Callable[[np.ndarray], np.ndarray]


def patches(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and instance maps: the nine of ``patches.npz``, then ``patch1`` and ``patch2``."""
    nine = np.load(folder / "patches.npz")
    pairs = list(zip(nine["images"], nine["instances"], strict=True))
    for name in ("patch1", "patch2"):
        image = cv2.imread(str(folder / f"{name}.png"))[..., ::-1].copy()
        pairs.append((image, scipy.io.loadmat(folder / f"{name}.mat")["inst_map"]))
    return pairs


def published(image: np.ndarray) -> np.ndarray:
    """The recipe of STImage's code, read from it and written anew."""
    stain = rgb2hed(image)[..., 0]
    inside = ndimage.binary_fill_holes(stain > 0.9 * threshold_otsu(stain))
    distance = ndimage.distance_transform_edt(inside)
    peaks = (distance == ndimage.maximum_filter(distance, 5)) & inside
    labels = watershed(-stain, label(peaks, connectivity=2), mask=inside)
    small = np.bincount(labels.ravel()) < 64
    return np.where(small[labels], 0, labels)


def ours(image: np.ndarray, recipe: Recipe = RECIPE) -> np.ndarray:
    """`nuclei_watershed` at the image's own resolution."""
    threshold = otsu_of_histogram(hematoxylin_histogram(image, nucleus_px=NUCLEUS_PX, recipe=recipe))
    return nuclei_watershed(image, threshold=threshold, nucleus_px=NUCLEUS_PX, recipe=recipe)


def ours_at_half(image: np.ndarray) -> np.ndarray:
    """The same at 0.5 µm a pixel, where `pp.segment_nuclei` works by default."""
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    threshold = otsu_of_histogram(hematoxylin_histogram(small, nucleus_px=NUCLEUS_PX / 2))
    return np.kron(nuclei_watershed(small, threshold=threshold, nucleus_px=NUCLEUS_PX / 2), np.ones((2, 2), np.int32))


def scores_of(segment: Segment, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[InstanceScores]:
    """Scores patch by patch."""
    return [instance_scores(truth, segment(image)) for image, truth in pairs]


def over_fields(scores: list[InstanceScores], name: str) -> list[float]:
    """Mean of a score over the patches of each field."""
    return [float(np.mean([getattr(scores[number], name) for number in field])) for field in FIELDS]


def choose(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Choose the recipe's numbers on two fields, by panoptic quality, and score the third."""
    recipes = [RECIPE._replace(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    scored = [scores_of(partial(ours, recipe=recipe), pairs) for recipe in recipes]
    quality = np.array([over_fields(scores, "panoptic_quality") for scores in scored])
    f1 = np.array([over_fields(scores, "f1") for scores in scored])
    rows = []
    for held_out in range(len(FIELDS)):
        best = int(np.argmax(np.delete(quality, held_out, axis=1).mean(axis=1)))
        chosen = {name: getattr(recipes[best], name) for name in GRID}
        rows.append(
            {
                "held_out": held_out,
                **chosen,
                "f1": round(float(f1[best, held_out]), 3),
                "panoptic_quality": round(float(quality[best, held_out]), 3),
            }
        )
    return rows


def main() -> None:
    """Score both, patch by patch, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("STIMAGE_SD_DATA", ".")) / "nuclei")
    parser.add_argument("--choose", action="store_true", help="choose the numbers on two fields, score the third")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results/nuclei.json"))
    arguments = parser.parse_args()
    pairs = patches(arguments.data)
    result: dict[str, Any] = {"machine": machine()}
    for name, segment in (("published", published), ("ours", ours), ("ours at 0.5 µm/px", ours_at_half)):
        begin = time.perf_counter()
        scores = scores_of(segment, pairs)
        seconds = (time.perf_counter() - begin) / len(pairs)
        result[name] = {"seconds_a_patch": round(seconds, 3), "patches": [score._asdict() for score in scores]}
        for score in ("f1", "panoptic_quality", "aggregated_jaccard", "dice"):
            result[name][score] = round(float(np.mean([getattr(one, score) for one in scores])), 3)
            result[name][f"{score}_of_fields"] = [round(value, 3) for value in over_fields(scores, score)]
    print("| patch | nuclei | " + " | ".join(f"{name}: found | F1 | PQ" for name in list(result)[1:]) + " |")
    for number, (_, truth) in enumerate(pairs):
        cells = [f"{number}" if number < 9 else f"patch{number - 8}", str(len(np.unique(truth)) - 1)]
        for name in list(result)[1:]:
            one = result[name]["patches"][number]
            cells += [str(one["n_found"]), f"{one['f1']:.3f}", f"{one['panoptic_quality']:.3f}"]
        print("| " + " | ".join(cells) + " |")
    if arguments.choose:
        result["chosen"] = choose(pairs)
        print("\n".join(str(row) for row in result["chosen"]))
    report(arguments.out, result)


if __name__ == "__main__":
    main()
