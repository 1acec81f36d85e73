"""Test which genes can be predicted from the image better than by chance."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats.permutation import ShiftedMaps, shuffled_correlations
from stimage_sd.stats.spatial import pearson
from stimage_sd.tl._fit.seen import seen_sections
from stimage_sd.tl._score.evaluate import Transform, dense, transformed

#: number of values per block of genes
_BLOCK = 2**22


class _Maps(NamedTuple):
    """Predicted and measured expression of a section, ``(n_spots, n_genes)``, with spot positions."""

    predicted: np.ndarray
    measured: np.ndarray
    coordinates: np.ndarray
    genes: pd.Index


def predictable_genes(
    data: SpatialData | contract.Cohort,
    *,
    method: Literal["shift", "free"] = "shift",
    n_permutations: int = 1000,
    n_top: int | None = None,
    transform: Transform = "log1p",
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank genes by how well they are predicted on held-out sections, with p-values.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts and predictions. The predictions must be from models of other
        sections, as written by ``tl.cross_validate(..., keep_predictions=True)``.
    method
        Null model of predictions unrelated to the counts. ``"shift"``: predicted maps shifted over the lattice of
        spots, also after a rotation by 180 degrees, which keeps their smoothness. ``"free"``: predictions shuffled
        over spots. ``"free"`` ignores that neighboring spots are similar and calls too many genes predictable: 20 to
        40 % of unrelated smooth simulated maps at 0.05. Use ``"free"`` only for units far apart and not on a lattice.
    n_permutations
        Number of random combinations of shifts, with one shift per section. A single section has a limited number of
        shifts (about 250 for 15 by 15 spots). If this number is smaller, all shifts are used once. The smallest
        p-value is one over the number of permutations plus one.
    n_top
        Number of genes to return. Default: all. The false discovery rate is always computed over all genes.
    transform
        As in `stimage_sd.tl.evaluate`.
    key
        Name of the prediction table.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed of the permutations.

    Returns
    -------
    A table with one row per gene, best gene first. Columns: ``gene``; ``pearson``, the mean over sections;
    ``n_sections``, the number of sections where the gene is predicted and measured, and constant in neither;
    ``p_value``, one-sided, for the mean; ``q_value``, by Benjamini and Hochberg. Genes without any such section come
    last, with NaN.

    Raises
    ------
    KeyError
        If a section has no predictions or counts.
    ValueError
        If a section was predicted by a model trained on it, its spots are not on a lattice, or an option is out of
        range.

    Notes
    -----
    Paper, section 2.7, which gives no p-values. Correlations of shifted maps use the spots that both maps cover, at
    least half of all spots, with a correction for the number of spots (`stimage_sd.stats.permutation`). Shifts cannot
    separate a trend over the whole section from chance. Evidence then comes from the number of sections, and with four
    sections no p-value says much about a new patient.

    Examples
    --------
    >>> from functools import partial
    >>> import stimage_sd as sti
    >>> cohort = {}
    >>> for name in "ab":
    ...     path = sti.datasets.synthetic_visium(f"bundle_p{name}", n_spots=60, n_genes=20, seed=ord(name))
    ...     cohort[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(cohort)
    >>> sti.pp.embed(cohort, fields_of_view=(1.0,))
    >>> recipe = {"nb": partial(sti.tl.fit_nb, n_members=2, max_epochs=2)}
    >>> genes = sti.pp.select_genes(cohort, n_top=8)
    >>> scores = sti.tl.cross_validate(cohort, recipe, genes=genes, keep_predictions=True)
    >>> list(sti.tl.predictable_genes(cohort, n_permutations=100))
    ['gene', 'pearson', 'n_sections', 'p_value', 'q_value']
    """
    source = contract.Source(table_key, layer)
    if method not in ("shift", "free"):
        raise ValueError(f'Expected `method` to be "shift" or "free", found {method!r}.')
    if n_permutations < 1 or (n_top is not None and n_top < 1):
        raise ValueError(f"Expected `n_permutations` and `n_top` of at least 1, found {n_permutations} and {n_top}.")
    cohort = contract.sections(data)
    maps = {name: _maps(sdata, name, transform, source, key) for name, sdata in cohort.items()}
    genes = pd.Index(list(dict.fromkeys(gene for section in maps.values() for gene in section.genes)))
    observed = pd.DataFrame({name: pd.Series(pearson(m.predicted, m.measured), m.genes) for name, m in maps.items()})
    observed = observed.reindex(genes)
    n_sections = observed.notna().sum(axis=1)
    mean = observed.mean(axis=1)
    shifted = None if method == "free" else {name: _shifted(section, name) for name, section in maps.items()}
    drawn = _draws(shifted, list(maps), n_permutations, seed)
    more_extreme = _count_as_high(maps, observed, drawn, shifted)
    n_drawn = len(next(iter(drawn.values())))
    p_value = ((1 + more_extreme) / (1 + n_drawn)).where(n_sections > 0)
    table = pd.DataFrame({"pearson": mean, "n_sections": n_sections, "p_value": p_value, "q_value": np.nan})
    known = table["p_value"].notna()
    if known.any():
        table.loc[known, "q_value"] = false_discovery_control(table.loc[known, "p_value"].to_numpy())
    table = table.sort_values("pearson", ascending=False, kind="stable", na_position="last")
    return table.rename_axis("gene").reset_index().head(n_top if n_top is not None else len(table))


def _maps(sdata: SpatialData, name: str, transform: Transform, source: contract.Source, key: str) -> _Maps:
    predictions = contract.predictions(sdata, key)
    about = predictions.uns.get("prediction", {})
    named = [{"section": str(section)} for section in about.get("trained_on", [])]
    content = about.get("trained_on_content")
    groups = [{"genes": [], "sections": named}] if content is None else json.loads(content)
    if seen_sections(groups, {name: sdata}, source):
        raise ValueError(
            f"Section {name!r} was predicted by a model that was trained on it, so its scores do not show how well "
            "genes are predicted in new sections. Predict it by a model of other sections: "
            "`stimage_sd.tl.cross_validate(cohort, models, keep_predictions=True)`."
        )
    rows, counts = contract.align_to_spots(sdata, predictions, source)
    genes = predictions.var_names[predictions.var_names.isin(counts.var_names)]
    change = contract.depth_change(predictions, contract.measured_exposure(predictions, rows, counts))
    return _Maps(
        transformed(change * np.asarray(predictions[rows, genes].X, dtype=np.float64), transform),
        transformed(dense(counts[:, genes]), transform),
        contract.tile_geometry(sdata, predictions).centers[rows],
        pd.Index(genes.astype(str)),
    )


def _shifted(section: _Maps, name: str) -> ShiftedMaps:
    try:
        return ShiftedMaps(section.coordinates)
    except ValueError as error:
        raise ValueError(
            f'The spots of section {name!r} cannot be shifted: {error} Or pass `method="free"`, which calls too many '
            "genes predictable in smooth maps."
        ) from error


def _draws(
    shifted: dict[str, ShiftedMaps] | None, sections: list[str], n_permutations: int, seed: int
) -> dict[str, np.ndarray]:
    """Draw the shift, or the seed of the shuffle, per section and permutation."""
    random = np.random.default_rng([seed, 3])
    if shifted is None:
        return {name: random.integers(2**32, size=n_permutations) for name in sections}
    if len(sections) == 1:
        n_shifts = shifted[sections[0]].n_shifts
        return {sections[0]: np.sort(random.permutation(n_shifts)[:n_permutations])}
    return {name: random.integers(shifted[name].n_shifts, size=n_permutations) for name in sections}


def _count_as_high(
    maps: dict[str, _Maps],
    observed: pd.DataFrame,
    drawn: dict[str, np.ndarray],
    shifted: dict[str, ShiftedMaps] | None,
) -> pd.Series:
    """Count permutations per gene whose mean correlation is at least the observed mean."""
    n_drawn = len(next(iter(drawn.values())))
    mean = observed.mean(axis=1).to_numpy()
    n_sections = np.maximum(observed.notna().sum(axis=1).to_numpy(), 1)
    counts = np.zeros(len(observed), dtype=np.int64)
    width = max(1, _BLOCK // max(n_drawn, 8 * max(len(section.coordinates) for section in maps.values())))
    for start in range(0, len(observed), width):
        block = slice(start, start + width)
        total = np.zeros((n_drawn, len(mean[block])))
        for name, section in maps.items():
            known = observed[name].iloc[block].notna().to_numpy()
            columns = section.genes.get_indexer(observed.index[block][known])
            if not len(columns):
                continue
            predicted, measured = section.predicted[:, columns], section.measured[:, columns]
            if shifted is None:
                random = np.random.default_rng(drawn[name])
                total[:, known] += shuffled_correlations(predicted, measured, n_permutations=n_drawn, random=random)
            else:
                numbers, which = np.unique(drawn[name], return_inverse=True)
                total[:, known] += shifted[name].correlations(predicted, measured, numbers)[which]
        # tolerance, since a permutation may reproduce the observed value up to summation order
        counts[block] = (total / n_sections[block] >= mean[block] - 1e-12).sum(axis=0)
    return pd.Series(counts, index=observed.index)
