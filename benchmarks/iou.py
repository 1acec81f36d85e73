"""Overlap of smoothed patterns of high expression (the paper's 2.8), 1,522 genes: all at once, against a loop.

The loop is what one writes from the paper: of each gene the z-score, above zero or not, laid out on the lattice,
`scipy.ndimage.gaussian_filter`, divided by the equally smoothed tissue, one half or more; then scikit-learn's
`jaccard_score`, or the two sums it comes to. Its lattice is square, on which rows and columns are the raster's, and the
smoothed tissue is computed once for all genes. scikit-learn's is run on some genes and scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.spots import N_GENES, SPOTS, agreement, made
from stimage_sd.stats.spatial import pattern_iou

#: genes that scikit-learn is run on
FEW = 100
Job = Callable[[], Mapping[str, Any]]
Score = Callable[[np.ndarray, np.ndarray], float]


def ours(n_spots: int) -> Job:
    """All genes at once; compared with the loop on some genes, outside the timed part."""
    predicted, measured, _ = made(n_spots)
    positions = _positions(n_spots)
    some = np.arange(0, N_GENES, 50)
    expected = np.array(_loop(predicted[:, some], measured[:, some], positions, _two_sums))
    return lambda: agreement(pattern_iou(predicted, measured, positions * 100.0), expected, some)


def numpys(n_spots: int) -> Job:
    """Gene by gene, numpy and scipy."""
    predicted, measured, _ = made(n_spots)
    positions = _positions(n_spots)
    return lambda: _figures(_loop(predicted, measured, positions, _two_sums))


def sklearns(n_spots: int) -> Job:
    """The same with scikit-learn's score, a few genes."""
    from sklearn.metrics import jaccard_score

    predicted, measured, _ = made(n_spots)
    positions = _positions(n_spots)

    def work() -> dict[str, Any]:
        found = _loop(predicted[:, :FEW], measured[:, :FEW], positions, jaccard_score)
        return {**_figures(found), "times": N_GENES / FEW}

    return work


def _positions(n_spots: int) -> np.ndarray:
    """Columns and rows of a square lattice, filled row by row, ``int64 (n_spots, 2)``."""
    row, column = np.divmod(np.arange(n_spots), int(np.ceil(np.sqrt(n_spots))))
    return np.stack([column, row], axis=1)


def _loop(predicted: np.ndarray, measured: np.ndarray, positions: np.ndarray, score: Score) -> list[float]:
    tissue = _smoothed(np.ones(len(positions)), positions)
    return [
        score(_pattern(predicted[:, gene], positions, tissue), _pattern(measured[:, gene], positions, tissue))
        for gene in range(predicted.shape[1])
    ]


def _pattern(values: np.ndarray, positions: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    high = (values - values.mean()) / values.std() > 0
    # a tie is one half, whatever the order of summation makes of it
    return _smoothed(high, positions) / tissue >= 0.5 - 1e-9


def _smoothed(on_spots: np.ndarray, positions: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    column, row = positions.T
    raster = np.zeros((row.max() + 1, column.max() + 1))
    raster[row, column] = on_spots
    return gaussian_filter(raster, 1.0, mode="constant")[row, column]


def _two_sums(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def _figures(values: Any) -> dict[str, Any]:
    return {"mean": round(float(np.mean(values)), 8)}


WORK = Comparison(
    title="IoU of smoothed patterns, 1,522 genes",
    unit="spots",
    sizes=SPOTS,
    sides={OURS: ours, "gene by gene, numpy and scipy": numpys, "gene by gene, jaccard_score": sklearns},
    reach={"gene by gene, numpy and scipy": 20.0, "gene by gene, jaccard_score": 20.0},
    repeats=3,
)
