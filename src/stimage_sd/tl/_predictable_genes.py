"""Which genes can be predicted from the image, and how surely that is no chance."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.nn.permutation import ShiftedMaps, shuffled_correlations
from stimage_sd.nn.spatial import pearson
from stimage_sd.tl._evaluate import Transform, _dense, _transformed

#: numbers that a block of genes takes at a time
_BLOCK = 2**22


class _Maps(NamedTuple):
    """A section's predicted and measured expression, ``(n_spots, n_genes)``, and where the spots are."""

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
    table_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank genes by how well they are predicted on sections that their models did not see.

    Parameters
    ----------
    data
        A section, or a cohort of them, with counts and predictions by models of other sections, as
        ``tl.cross_validate(..., keep_predictions=True)`` leaves them.
    method
        What predictions are that have nothing to do with the counts. ``"shift"``: the predicted maps shifted over
        the lattice of spots, also after half a turn, which keeps them as smooth as they are. ``"free"``: the
        predictions of shuffled spots. Neighbouring spots are alike in both maps, so that the second calls many
        genes predictable that are not: in simulated smooth maps without relation, 20 to 40 % at 0.05. It is meant
        for units that stand on no lattice and far apart.
    n_permutations
        How many random combinations of shifts, one a section. A single section has only so many shifts (some 250
        for 15 by 15 spots), which are all taken once where that is fewer; the least p-value is one over their
        number plus one.
    n_top
        How many genes to return; all by default. The false discovery rate is always over all.
    transform
        As in `stimage_sd.tl.evaluate`.
    table_key
        Name of the table of counts.
    seed
        Seed of the permutations.

    Returns
    -------
    A row a gene, the best first: ``gene``; ``pearson``: mean over sections; ``n_sections``: how many have the
    gene predicted and measured, and constant in neither; ``p_value``: one-sided, of the mean; ``q_value``: by
    Benjamini and Hochberg. Genes that no section can tell come last, as NaN.

    Raises
    ------
    KeyError
        If a section has no predictions or counts.
    ValueError
        If a section was predicted by a model that was trained on it, its spots stand on no lattice, or an option
        is out of range.

    Notes
    -----
    Paper, section 2.7, without p-values there. Correlations of shifted maps are over the spots that both maps then
    have, half of all at least, corrected for their number (`stimage_sd.nn.permutation`). A trend over the whole
    section is not told from chance by any shift: sections are what counts then, and with four no p-value says
    much about the next patient.

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
    if method not in ("shift", "free"):
        raise ValueError(f'Expected `method` to be "shift" or "free", found {method!r}.')
    if n_permutations < 1 or (n_top is not None and n_top < 1):
        raise ValueError(f"Expected `n_permutations` and `n_top` of at least 1, found {n_permutations} and {n_top}.")
    cohort = contract.sections(data)
    maps = {name: _maps(sdata, name, transform, table_key) for name, sdata in cohort.items()}
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


def _maps(sdata: SpatialData, name: str, transform: Transform, table_key: str | None) -> _Maps:
    predictions = contract.predictions(sdata)
    trained_on = [str(section) for section in predictions.uns.get("prediction", {}).get("trained_on", [])]
    if name in trained_on:
        raise ValueError(
            f"Section {name!r} was predicted by a model that was trained on it, which says nothing of how well genes "
            "are predicted elsewhere. Predict it by a model of other sections: `stimage_sd.tl.cross_validate(cohort, "
            "models, keep_predictions=True)`."
        )
    rows, counts = contract.align_to_spots(sdata, predictions, table_key)
    genes = predictions.var_names[predictions.var_names.isin(counts.var_names)]
    compared = predictions[rows, genes]
    return _Maps(
        _transformed(np.asarray(compared.X, dtype=np.float64), transform),
        _transformed(_dense(counts[:, genes]), transform),
        np.asarray(compared.obsm["spatial"]),
        pd.Index(genes.astype(str)),
    )


def _shifted(section: _Maps, name: str) -> ShiftedMaps:
    try:
        return ShiftedMaps(section.coordinates)
    except ValueError as error:
        raise ValueError(
            f'The spots of section {name!r} cannot be shifted: {error} Or pass `method="free"`, and mind what it says '
            "of smooth maps."
        ) from error


def _draws(
    shifted: dict[str, ShiftedMaps] | None, sections: list[str], n_permutations: int, seed: int
) -> dict[str, np.ndarray]:
    """Of each section the shift, or the seed of the shuffle, of every permutation."""
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
    """How many permutations have, of each gene, a mean correlation no lower than the observed one."""
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
                each, which = np.unique(drawn[name], return_inverse=True)
                total[:, known] += shifted[name].correlations(predicted, measured, each)[which]
        # a permutation that changes nothing but the order of a sum is as high
        counts[block] = (total / n_sections[block] >= mean[block] - 1e-12).sum(axis=0)
    return pd.Series(counts, index=observed.index)
