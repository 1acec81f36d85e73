"""What was predicted of slides against bulk expression of the same patients."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control, rankdata
from scipy.stats import t as student

from stimage_sd.nn.spatial import pearson

#: pairs that a correlation takes at least
_LEAST = 3


class BulkCorrelation(NamedTuple):
    """What `bulk_correlation` found.

    Attributes
    ----------
    genes
        A row a group and gene, across samples: ``group``, ``gene``, ``n``, ``pearson``, ``pearson_p``, ``pearson_q``,
        ``spearman``, ``spearman_p``, ``spearman_q``.
    samples
        A row a sample, across genes, with the same columns and ``sample`` in the place of the gene.
    unmatched
        A row a name without a partner: ``kind`` (``"gene"`` or ``"sample"``), ``side`` (``"predicted"`` or ``"bulk"``),
        ``name``.
    """

    genes: pd.DataFrame
    samples: pd.DataFrame
    unmatched: pd.DataFrame

    def __str__(self) -> str:
        """Say how many genes and samples matched."""
        n_genes, n_samples = self.genes["gene"].nunique(), self.samples["sample"].nunique()
        left = Counter(zip(self.unmatched["kind"], self.unmatched["side"], strict=True))
        without = ", ".join(f"{n} {kind}s of {side}" for (kind, side), n in left.items()) or "none"
        return f"{n_genes} genes and {n_samples} samples matched; without a partner: {without}"


def bulk_correlation(
    predicted: AnnData,
    bulk: AnnData,
    *,
    patient: str | None = None,
    average: bool = True,
    by: str | None = None,
    layer: str | None = None,
    log1p: bool = True,
) -> BulkCorrelation:
    """Correlate predicted expression of slides with bulk expression.

    Parameters
    ----------
    predicted
        Slides x genes, as `stimage_sd.tl.predict_cohort` gives.
    bulk
        Patients x genes, with the patients as ``obs_names``: logs or z-scores, which are taken as they are.
    patient
        Column of ``predicted.obs`` with the patient; by default the slides' own names are looked up in `bulk`.
    average
        Average a patient's slides; else each is a sample with the patient's bulk.
    by
        Column of ``predicted.obs``, or of ``bulk.obs``, with groups such as subtypes, in which genes are correlated
        one by one.
    layer
        Layer of the predictions, such as ``"q90"``; ``X`` by default.
    log1p
        Take log1p of the predictions, which are counts.

    Returns
    -------
    Correlations of genes across samples and of samples across genes, and the names that found no partner.

    Raises
    ------
    KeyError
        If a column or layer is not there.
    ValueError
        If names are not unique, or fewer than three genes or samples match.

    Notes
    -----
    Paper, section 2.10. Gene names match whatever their case, and without an Ensembl version. p-values are of
    Student's t, and q-values Benjamini and Hochberg's within a group. Samples of one patient depend on each other.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, stimage_sd as sti
    >>> bulk = ad.AnnData(np.random.default_rng(0).normal(size=(9, 4)))
    >>> bulk.obs_names, bulk.var_names = [f"P{i}" for i in range(9)], ["ERBB2", "CD74", "ACTB", "OTHER"]
    >>> predicted = ad.AnnData(np.exp(bulk.X[:, :3]))
    >>> predicted.obs_names, predicted.var_names = bulk.obs_names, ["erbb2", "CD74", "ACTB"]
    >>> found = sti.tl.bulk_correlation(predicted, bulk)
    >>> str(found)
    '3 genes and 9 samples matched; without a partner: 1 genes of bulk'
    >>> bool(found.genes["spearman"].min() > 0.99)
    True
    """
    genes, left = _match(predicted.var_names, bulk.var_names, "gene")
    samples = _samples(predicted, bulk, patient, average=average, by=by, layer=layer, log1p=log1p)
    rows = bulk.obs_names.get_indexer(samples.owners)
    known = rows >= 0
    if len(genes) < _LEAST or known.sum() < _LEAST:
        raise ValueError(
            f"Expected at least {_LEAST} genes and samples in both tables, found {len(genes)} genes (predicted "
            f"{predicted.var_names[:3].tolist()}, in bulk {bulk.var_names[:3].tolist()}) and {int(known.sum())} "
            f"samples (predicted {samples.owners[:3].tolist()}, in bulk {bulk.obs_names[:3].tolist()})."
        )
    left += [("sample", "predicted", str(name)) for name in samples.names[~known]]
    left += [("sample", "bulk", str(name)) for name in bulk.obs_names[~bulk.obs_names.isin(samples.owners)]]
    values, measured = samples.values[known][:, genes[:, 0]], _values(bulk, None)[rows[known]][:, genes[:, 1]]
    groups, gene_names = samples.groups[known], np.asarray(predicted.var_names)[genes[:, 0]]
    by_gene = [
        _correlated(values[groups == group], measured[groups == group], "gene", gene_names).assign(group=group)
        for group in dict.fromkeys(groups)
    ]
    by_sample = _correlated(values.T, measured.T, "sample", samples.names[known]).assign(group=groups)
    return BulkCorrelation(
        pd.concat(by_gene, ignore_index=True), by_sample, pd.DataFrame(left, columns=["kind", "side", "name"])
    )


class _Samples(NamedTuple):
    """Predictions, their names, whose they are, and their groups, ``"all"`` without."""

    values: np.ndarray
    names: np.ndarray
    owners: np.ndarray
    groups: np.ndarray


def _samples(
    predicted: AnnData,
    bulk: AnnData,
    patient: str | None,
    *,
    average: bool,
    by: str | None,
    layer: str | None,
    log1p: bool,
) -> _Samples:
    own = predicted.obs_names if patient is None else pd.Index(_column(predicted, patient).astype(str))
    values = _values(predicted, layer)
    values = np.log1p(values) if log1p else values
    groups = np.full(len(own), "all") if by is None else _groups(predicted, bulk, own, by)
    if not average:
        return _Samples(values, np.asarray(predicted.obs_names), np.asarray(own), groups)
    number, unique = pd.factorize(own)
    sums = np.zeros((len(unique), values.shape[1]))
    np.add.at(sums, number, values)
    names = np.asarray(unique)
    first = np.unique(number, return_index=True)[1]
    return _Samples(sums / np.bincount(number)[:, None], names, names, groups[first])


def _values(table: AnnData, layer: str | None) -> np.ndarray:
    if layer is not None and layer not in table.layers:
        raise KeyError(f"No layer {layer!r} in the table, found {sorted(table.layers)}.")
    matrix = table.X if layer is None else table.layers[layer]
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float64)


def _column(table: AnnData, name: str) -> pd.Series:
    if name not in table.obs:
        raise KeyError(f"No column {name!r} in the predictions' obs, found {sorted(map(str, table.obs.columns))}.")
    return table.obs[name]


def _groups(predicted: AnnData, bulk: AnnData, own: pd.Index, by: str) -> np.ndarray:
    if by in predicted.obs:
        return predicted.obs[by].astype(str).to_numpy()
    if by not in bulk.obs:
        raise KeyError(f"No column {by!r} in the obs of the predictions or of bulk.")
    return bulk.obs[by].astype(str).reindex(own).fillna("unknown").to_numpy()


def _match(left: pd.Index, right: pd.Index, kind: str) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """Numbers of names that are the same but for case and version, and those without a partner."""
    keys = []
    for side, names in (("predicted", left), ("bulk", right)):
        harmonised = pd.Index([re.sub(r"^(ENS\w*\d+)\.\d+$", r"\1", str(name).strip().upper()) for name in names])
        if not harmonised.is_unique:
            twice = names[harmonised.duplicated(keep=False)][:4].tolist()
            raise ValueError(f"Expected unique {kind}s, found {twice} in {side}. Add up or leave out what is double.")
        keys.append(harmonised)
    partner = keys[1].get_indexer(keys[0])
    pairs = np.column_stack([np.flatnonzero(partner >= 0), partner[partner >= 0]])
    without = [(kind, "predicted", str(name)) for name in left[partner < 0]]
    without += [(kind, "bulk", str(name)) for name in right[~keys[1].isin(keys[0])]]
    return pairs, without


def _correlated(one: np.ndarray, other: np.ndarray, kind: str, names: np.ndarray) -> pd.DataFrame:
    """Correlations of columns."""
    n = len(one)
    frame = pd.DataFrame({kind: names, "n": n})
    pairs = {"pearson": (one, other), "spearman": (rankdata(one, axis=0), rankdata(other, axis=0))}
    for name, (left, right) in pairs.items():
        r = pearson(left, right) if n >= _LEAST else np.full(len(names), np.nan)
        with np.errstate(divide="ignore"):
            p = 2 * student.sf(np.abs(r) * np.sqrt((n - 2) / np.maximum(1 - r**2, 0)), n - 2) if n > 2 else r
        q = np.full(len(names), np.nan)
        q[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)]) if np.isfinite(p).any() else []
        frame[name], frame[f"{name}_p"], frame[f"{name}_q"] = r, p, q
    return frame
