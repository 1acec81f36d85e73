"""Pearson's correlation of 1,522 genes, predicted and measured: all at once, against a call a gene.

scipy's `pearsonr` is what is called in such loops; numpy's `corrcoef` of two columns is the quicker habit. "numpy, all
at once" is what one writes who knows better: standardized copies of both matrices, multiplied and added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.spots import N_GENES, SPOTS, agreement, made
from stimage_sd.stats.spatial import pearson

Job = Callable[[], Mapping[str, Any]]


def ours(n_spots: int) -> Job:
    """All genes at once; compared with scipy's of some genes, outside the timed part of the peers."""
    from scipy.stats import pearsonr

    predicted, measured, _ = made(n_spots)
    some = np.arange(0, N_GENES, 50)
    expected = np.array([pearsonr(predicted[:, gene], measured[:, gene]).statistic for gene in some])
    return lambda: agreement(pearson(predicted, measured), expected, some)


def scipys(n_spots: int) -> Job:
    """`scipy.stats.pearsonr`, gene by gene."""
    from scipy.stats import pearsonr

    predicted, measured, _ = made(n_spots)
    return lambda: _figures([pearsonr(predicted[:, gene], measured[:, gene]).statistic for gene in range(N_GENES)])


def numpys(n_spots: int) -> Job:
    """`numpy.corrcoef`, gene by gene."""
    predicted, measured, _ = made(n_spots)
    return lambda: _figures([np.corrcoef(predicted[:, gene], measured[:, gene])[0, 1] for gene in range(N_GENES)])


def at_once(n_spots: int) -> Job:
    """Numpy on whole matrices."""
    predicted, measured, _ = made(n_spots)

    def work() -> dict[str, Any]:
        one, other = predicted - predicted.mean(axis=0), measured - measured.mean(axis=0)
        lengths = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
        return _figures((one * other).sum(axis=0) / lengths)

    return work


def _figures(values: Any) -> dict[str, Any]:
    return {"mean": round(float(np.mean(values)), 8)}


WORK = Comparison(
    title="Pearson's correlation, 1,522 genes",
    unit="spots",
    sizes=SPOTS,
    sides={OURS: ours, "scipy pearsonr": scipys, "numpy corrcoef": numpys, "numpy, all at once": at_once},
    reach={"scipy pearsonr": 20.0},
    repeats=3,
)
