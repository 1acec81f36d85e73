"""Bivariate Moran's I of 1,522 genes, predicted and measured, against esda's `Moran_BV`, a gene at a time.

esda is run on ten genes, and its seconds are scaled to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.spots import N_GENES, SPOTS, by_hand, made
from stimage_sd.stats.spatial import morans_i

#: genes that esda is run on
FEW = 10


def ours(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """All genes at once."""
    predicted, measured, weights = made(n_spots)

    def work() -> dict[str, Any]:
        return {"mean_of_ten": round(float(np.mean(morans_i(predicted, weights, measured)[:FEW])), 8)}

    return work


def esdas(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """A few genes by esda, without permutations."""
    import esda
    import libpysal

    predicted, measured, weights = made(n_spots)
    graph = libpysal.weights.WSP(weights).to_W(silence_warnings=True)
    graph.transform = "r"

    def work() -> dict[str, Any]:
        found = [esda.Moran_BV(predicted[:, g], measured[:, g], graph, permutations=0).I for g in range(FEW)]
        return {"mean_of_ten": round(float(np.mean(found)), 8), "times": N_GENES / FEW}

    return work


def loop(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """Gene by gene with numpy and scipy."""
    predicted, measured, weights = made(n_spots)

    def work() -> dict[str, Any]:
        found = [by_hand(predicted[:, gene], measured[:, gene], weights) for gene in range(N_GENES)]
        return {"mean_of_ten": round(float(np.mean(found[:FEW])), 8)}

    return work


WORK = Comparison(
    title="Bivariate Moran's I, 1,522 genes",
    unit="spots",
    sizes=SPOTS,
    sides={OURS: ours, "esda": esdas, "gene by gene": loop},
    reach={"esda": 100.0, "gene by gene": 20.0},
    repeats=3,
)
