"""Accuracy of an ensemble's single members, and of members pooled at random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._progress import tqdm
from stimage_sd.models._predictor import OpenedSection, Predictor, gene_shifts
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._predict.held_out import expected_sums
from stimage_sd.tl._predict.predict import size_factors_of
from stimage_sd.tl._score.evaluate import dense, transformed

PoolTransform = Literal["log1p", "raw"]
#: elements computed at a time (members x tiles x genes)
_BLOCK = 8_000_000
_COLUMNS = ["section", "gene", "kind", "number", "members", "n_tiles", "pearson"]


def pool_members(
    data: SpatialData | contract.Cohort,
    model: Predictor | str | Path,
    *,
    size: int = 5,
    n_pools: int = 5,
    transform: PoolTransform = "log1p",
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the accuracy of single members with that of pools of members drawn at random.

    Every member predicts once. A pool is the average of its members' means, as in ``model.members[...]``.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts, tiled and embedded as the model expects.
    model
        An ensemble, or the path of one.
    size
        Number of members per pool, drawn without replacement.
    n_pools
        Number of pools. No two pools have the same members.
    transform
        Scale of the correlations, as in `stimage_sd.tl.evaluate`: ``"log1p"`` of counts and means, or ``"raw"``.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed of the pools.

    Returns
    -------
    One row per section, gene and member or pool. Columns are ``section``, ``gene``, ``kind`` (``"member"`` or
    ``"pool"``), ``number`` (of the member or the pool), ``members`` (numbers of the members, separated by spaces),
    ``n_tiles`` and ``pearson``, NaN for constant genes. The section is not changed.

    Raises
    ------
    KeyError
        If a section was not tiled or embedded, or has no counts.
    ValueError
        If the model has too few members, or no predicted gene was measured.

    Notes
    -----
    Paper, section 2.4: 30 single models, five ensembles of five models each, Pearson's correlation of each. To get the
    distribution of a pool, predict with ``model.members[[0, 4, 7]]``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_pools", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=4, max_epochs=2)
    >>> scores = sti.tl.pool_members(section, model, size=2, n_pools=3)
    >>> scores.groupby("kind")["number"].nunique().to_dict()
    {'member': 4, 'pool': 3}
    """
    if transform not in get_args(PoolTransform):
        raise ValueError(f'Expected `transform` to be "log1p" or "raw", found {transform!r}.')
    fitted = as_model(model)
    weights = np.asarray(fitted.member_weights, dtype=np.float64)
    pools = _pools(len(weights), size=size, n_pools=n_pools, seed=seed)
    chosen = [[member] for member in range(len(weights))] + pools
    shares = np.zeros((len(chosen), len(weights)))
    for row, members in enumerate(chosen):
        shares[row, members] = weights[members] if weights[members].any() else 1.0
    shares /= shares.sum(axis=1, keepdims=True)
    source = contract.Source(table_key, layer)
    cohort = contract.sections(data)
    opened = {name: fitted.open(sdata, section=name) for name, sdata in cohort.items()}
    tables = []
    for name, sdata in cohort.items():
        genes, n_tiles, scores = _scored(fitted, sdata, opened[name], shares, transform, source, section=name)
        for number, (members, row) in enumerate(zip(chosen, scores, strict=True)):
            is_pool = number >= len(weights)
            about: dict[str, Any] = {
                "section": name, "kind": "pool" if is_pool else "member", "n_tiles": n_tiles,
                "number": number - len(weights) if is_pool else number, "members": " ".join(map(str, members)),
            }  # fmt: skip
            tables.append(pd.DataFrame({"gene": genes, "pearson": row, **about}))
    return pd.concat(tables, ignore_index=True)[_COLUMNS]


def _pools(n_members: int, *, size: int, n_pools: int, seed: int) -> list[list[int]]:
    """Draw pools of different members, in ascending order."""
    if size < 1 or n_pools < 1:
        raise ValueError(f"Expected `size` and `n_pools` of at least 1, found {size} and {n_pools}.")
    if math.comb(n_members, size) < n_pools:
        raise ValueError(
            f"Expected an ensemble with {n_pools} different pools of {size} members, found {n_members} members, which "
            f"have {math.comb(n_members, size)}. Fit more members (`n_members=30`), or ask for fewer pools."
        )
    random = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < n_pools:
        drawn = np.sort(random.choice(n_members, size, replace=False))
        found.setdefault(tuple(drawn.tolist()))
    return [list(pool) for pool in found]


def _scored(
    model: Predictor, sdata: SpatialData, opened: OpenedSection, shares: np.ndarray, transform: PoolTransform,
    source: contract.Source, *, section: str,
) -> tuple[list[str], int, np.ndarray]:  # fmt: skip
    """Correlate the means of members and pools with counts. Blocks of tiles are added up, so that means fit in memory.

    Returns
    -------
    The genes, the number of tiles, and correlations, ``float64 (n_members + n_pools, n_genes)``.
    """
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    rows, units = contract.align_to_spots(sdata, kept, source)
    measured = np.array([gene in units.var_names for gene in model.genes])
    genes, columns = (
        [gene for gene, known in zip(model.genes, measured, strict=True) if known],
        np.flatnonzero(measured),
    )
    if not genes:
        raise ValueError(
            f"None of the {len(model.genes)} predicted genes was measured in section {section!r}, such as "
            f"{model.genes[0]!r}; its counts are of {list(units.var_names[:5])} and others."
        )
    counts = transformed(dense(units[:, genes]), transform)
    depths = _depths(model, sdata, kept, rows, units, source)
    target = counts - counts.mean(axis=0)
    start_at: np.ndarray | None = None
    totals = np.zeros((3, len(shares), len(genes)))
    step = max(1, _BLOCK // (shares.shape[1] * len(model.genes)))
    place = np.full(kept.n_obs, -1)
    place[rows] = np.arange(len(rows))
    for start in tqdm(range(0, kept.n_obs, step), desc=f"{contract.sample(sdata)}: pooling", unit="block"):
        here = place[start : start + step]
        if not (here >= 0).any():
            continue
        r, p = (part[:, here >= 0][:, :, columns] for part in opened.r_and_p(slice(start, start + len(here))))
        chosen = here[here >= 0]
        means = r.astype(np.float64) * (1 - p.astype(np.float64)) / p * depths[chosen][:, None]
        values = transformed(np.tensordot(shares, means, axes=1), transform)
        # values around their start keep digits that sums of squares would lose
        start_at = values.mean(axis=1, keepdims=True) if start_at is None else start_at
        values -= start_at
        totals += np.stack([values.sum(axis=1), (values**2).sum(axis=1), (values * target[chosen]).sum(axis=1)])
    return genes, len(rows), _correlations(totals, target)


def _correlations(totals: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return Pearson's correlations from sums, squares and products, NaN for constant genes."""
    sums, squares, products = totals
    spread = squares - sums**2 / len(target)
    constant = spread <= 1e-12 * np.maximum(squares, 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = products / np.sqrt(spread * (target**2).sum(axis=0))
    return np.where(constant | (np.ptp(target, axis=0) == 0), np.nan, found)


def _depths(
    model: Predictor, sdata: SpatialData, kept: Any, rows: np.ndarray, units: Any, source: contract.Source
) -> np.ndarray:
    """Return the depth at which the prediction of each spot is compared, as in `tl.evaluate`, ``float64 (n_rows,)``."""
    if gene_shifts(model) is None:
        return size_factors_of(sdata, kept, model, "total", source)[rows].astype(np.float64)
    assert model.total is not None
    if contract.totals_compare(units.n_vars, model.training.get("n_counted", 0)):
        depth = contract.exposure_of(np.median(np.asarray(units.X.sum(axis=1))), model.total)
    else:
        shared = [gene in units.var_names for gene in model.genes]
        expected = expected_sums(model, sdata, rows, n_tiles=kept.n_obs)[0][shared].sum()
        depth = contract.exposure_of(units[:, list(np.array(model.genes)[shared])].X.sum(), expected)
    return np.full(len(rows), depth)
