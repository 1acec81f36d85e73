"""Moran's I of 1,522 genes: one sparse product for all, against squidpy's, and against a product a gene."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.spots import N_GENES, SPOTS, by_hand, made
from stimage_sd.stats.spatial import morans_i


def _figures(values: Any) -> dict[str, Any]:
    return {"mean": round(float(np.mean(values)), 8)}


def ours(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """All genes at once."""
    _, measured, weights = made(n_spots)
    return lambda: _figures(morans_i(measured, weights))


def squidpys(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """By squidpy, without permutations."""
    import anndata as ad
    import squidpy as sq

    _, measured, weights = made(n_spots)
    table = ad.AnnData(measured)
    table.obsp["spatial_connectivities"] = weights
    return lambda: _figures(sq.gr.spatial_autocorr(table, mode="moran", n_perms=None, copy=True)["I"])


def loop(n_spots: int) -> Callable[[], Mapping[str, Any]]:
    """Gene by gene with numpy and scipy."""
    _, measured, weights = made(n_spots)
    return lambda: _figures([by_hand(measured[:, gene], measured[:, gene], weights) for gene in range(N_GENES)])


WORK = Comparison(
    title="Moran's I, 1,522 genes",
    unit="spots",
    sizes=SPOTS,
    sides={OURS: ours, "squidpy": squidpys, "gene by gene": loop},
    reach={"squidpy": 10.0, "gene by gene": 20.0},
    repeats=3,
)
