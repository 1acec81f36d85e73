"""Correlation of predicted expression with bulk expression of the same patients."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control, rankdata
from scipy.stats import t as student

from stimage_sd import contract
from stimage_sd._shown import Facts, frames, shown
from stimage_sd.stats.spatial import pearson

#: smallest number of pairs for a correlation
_LEAST = 3


@shown
class BulkCorrelation(NamedTuple):
    """Result of `bulk_correlation`.

    Attributes
    ----------
    genes
        One row per group and gene, correlated across samples: ``group``, ``gene``, ``n``, ``pearson``, ``pearson_p``,
        ``pearson_q``, ``spearman``, ``spearman_p``, ``spearman_q``.
    samples
        One row per sample, correlated across genes. Columns as in `genes`, with ``sample`` instead of ``gene``.
    unmatched
        One row per name that is in one table only: ``kind`` (``"gene"`` or ``"sample"``), ``side`` (``"predicted"`` or
        ``"bulk"``), ``name``.
    missing
        One row per matched gene or sample with missing or infinite values: ``kind``, ``side``, ``name``, ``n_missing``.
        These values are left out. The logarithm of zero is infinite, so add a pseudocount to bulk.
    """

    genes: pd.DataFrame
    samples: pd.DataFrame
    unmatched: pd.DataFrame
    missing: pd.DataFrame

    def __str__(self) -> str:
        """Return a line with the numbers of matched and unmatched genes and samples."""
        n_genes, n_samples = self.genes["gene"].nunique(), self.samples["sample"].nunique()
        left = Counter(zip(self.unmatched["kind"], self.unmatched["side"], strict=True))
        without = ", ".join(f"{n} {kind}s of {side}" for (kind, side), n in left.items()) or "none"
        said = f"{n_genes} genes and {n_samples} samples matched; without a partner: {without}"
        genes = self.missing[self.missing["kind"] == "gene"].groupby("side")["n_missing"].sum()
        values = ", ".join(f"{n} of {side}" for side, n in genes.items())
        return f"{said}; missing values left out: {values}" if values else said

    def facts(self) -> Facts:
        """Names and values that describe the result, as notebooks show them."""
        return {
            "matched": str(self),
            "of genes": f"median Pearson correlation {self.genes['pearson'].median():.3f} over samples",
            "of samples": f"median Pearson correlation {self.samples['pearson'].median():.3f} over genes",
            "tables": frames(self),
        }


def bulk_correlation(
    data: AnnData,
    bulk: AnnData,
    *,
    average: bool = True,
    by: str | None = None,
    log1p: bool = True,
    patient_key: str | None = None,
    layer: str | None = None,
) -> BulkCorrelation:
    """Correlate predicted expression of slides with bulk expression of the same patients.

    Parameters
    ----------
    data
        Slides x genes, as from `stimage_sd.tl.predict_cohort`.
    bulk
        Patients x genes, with patients as ``obs_names``. Values are logs or z-scores and are not transformed.
    average
        Average a patient's slides. If `False`, each slide is a sample, paired with the patient's bulk.
    by
        Column of ``data.obs`` or ``bulk.obs`` with groups such as subtypes. Genes are correlated within each group.
    log1p
        Take log1p of the predictions, which are counts.
    patient_key
        Column of ``data.obs`` with the patient. By default the slide's name is the patient.
    layer
        Layer of the predictions, such as ``"q90"``. Default: ``X``.

    Returns
    -------
    Correlations of genes across samples and of samples across genes, unmatched names, and missing values. A correlation
    uses the ``n`` pairs without missing values. It is NaN with fewer than three pairs.

    Raises
    ------
    KeyError
        If a column or layer is missing.
    ValueError
        If names are not unique, fewer than three genes or samples match, a prediction is negative with `log1p`, or the
        slides of a patient are in different groups.

    Notes
    -----
    Paper, section 2.10. Gene names match regardless of case and Ensembl version. p-values are from Student's t.
    q-values are Benjamini and Hochberg's within a group. Samples of one patient are not independent.

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
    genes, left = _match(data.var_names, bulk.var_names, "gene")
    samples = _samples(data, bulk, patient_key, average=average, by=by, layer=layer, log1p=log1p)
    rows = bulk.obs_names.get_indexer(samples.owners)
    known = rows >= 0
    if len(genes) < _LEAST or known.sum() < _LEAST:
        raise ValueError(
            f"Expected at least {_LEAST} genes and samples in both tables, found {len(genes)} genes (predicted "
            f"{data.var_names[:3].tolist()}, in bulk {bulk.var_names[:3].tolist()}) and {int(known.sum())} "
            f"samples (predicted {samples.owners[:3].tolist()}, in bulk {bulk.obs_names[:3].tolist()})."
        )
    left += [("sample", "predicted", str(name)) for name in samples.names[~known]]
    left += [("sample", "bulk", str(name)) for name in bulk.obs_names[~bulk.obs_names.isin(samples.owners)]]
    values, measured = samples.values[known][:, genes[:, 0]], _values(bulk, None)[rows[known]][:, genes[:, 1]]
    groups, gene_names = samples.groups[known], np.asarray(data.var_names)[genes[:, 0]]
    missing = [
        table
        for side, part in (("predicted", values), ("bulk", measured))
        for table in (_missing(part, "gene", side, gene_names), _missing(part.T, "sample", side, samples.names[known]))
    ]
    by_gene = [
        _correlated(values[groups == group], measured[groups == group], "gene", gene_names).assign(group=group)
        for group in dict.fromkeys(groups)
    ]
    by_sample = _correlated(values.T, measured.T, "sample", samples.names[known]).assign(group=groups)
    return BulkCorrelation(
        pd.concat(by_gene, ignore_index=True),
        by_sample,
        pd.DataFrame(left, columns=["kind", "side", "name"]),
        pd.concat(missing, ignore_index=True),
    )


class _Samples(NamedTuple):
    """Predictions with sample name, patient and group per row, the group ``"all"`` without `by`."""

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
    labels = predicted.obs_names if patient is None else pd.Index(_column(predicted, patient).astype(str))
    values = _values(predicted, layer)
    if log1p and (values < 0).any():
        raise ValueError(
            f"Expected predictions of 0 or more, found {np.nanmin(values):g}. Values that are logs or z-scores already "
            "take `log1p=False`."
        )
    values = np.log1p(values) if log1p else values
    groups = np.full(len(labels), "all") if by is None else _groups(predicted, bulk, labels, by)
    if not average:
        return _Samples(values, np.asarray(predicted.obs_names), np.asarray(labels), groups)
    codes, unique = pd.factorize(labels)
    by_patient = pd.Series(groups).groupby(codes)
    if (by_patient.nunique() > 1).any():
        which = unique[int(by_patient.nunique().argmax())]
        raise ValueError(f"Slides of patient {which!r} differ in {by!r}. Expected one group per patient.")
    # pandas ignores missing values in the mean over slides
    means = pd.DataFrame(values).groupby(codes).mean().to_numpy()
    names = np.asarray(unique)
    return _Samples(means, names, names, by_patient.first().to_numpy())


def _values(table: AnnData, layer: str | None) -> np.ndarray:
    if layer is not None and layer not in table.layers:
        raise KeyError(f"No layer {layer!r} in the table, found {sorted(table.layers)}.")
    matrix = table.X if layer is None else table.layers[layer]
    values = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _column(table: AnnData, name: str) -> pd.Series:
    if name not in table.obs:
        raise KeyError(f"No column {name!r} in the predictions' obs, found {sorted(map(str, table.obs.columns))}.")
    return table.obs[name]


def _groups(predicted: AnnData, bulk: AnnData, names: pd.Index, by: str) -> np.ndarray:
    if by in predicted.obs:
        return predicted.obs[by].astype(str).to_numpy()
    if by not in bulk.obs:
        raise KeyError(f"No column {by!r} in the obs of the predictions or of bulk.")
    return bulk.obs[by].astype(str).reindex(names).fillna("unknown").to_numpy()


def _match(left: pd.Index, right: pd.Index, kind: str) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """Match names regardless of case and version, and return pairs of numbers and unmatched names."""
    keys = []
    for side, names in (("predicted", left), ("bulk", right)):
        harmonized = contract.without_versions(names.astype(str).str.strip().str.upper())
        if not harmonized.is_unique:
            twice = names[harmonized.duplicated(keep=False)][:4].tolist()
            raise ValueError(f"Expected unique {kind}s, found {twice} in {side}. Sum or remove the duplicates.")
        keys.append(harmonized)
    partner = keys[1].get_indexer(keys[0])
    pairs = np.column_stack([np.flatnonzero(partner >= 0), partner[partner >= 0]])
    without = [(kind, "predicted", str(name)) for name in left[partner < 0]]
    without += [(kind, "bulk", str(name)) for name in right[~keys[1].isin(keys[0])]]
    return pairs, without


def _missing(values: np.ndarray, kind: str, side: str, names: np.ndarray) -> pd.DataFrame:
    """Count the missing values of columns that have any."""
    n_missing = np.isnan(values).sum(axis=0)
    table = pd.DataFrame({"kind": kind, "side": side, "name": names.astype(str), "n_missing": n_missing})
    return table[n_missing > 0]


def _correlated(one: np.ndarray, other: np.ndarray, kind: str, names: np.ndarray) -> pd.DataFrame:
    """Correlate columns over the rows where both have a value."""
    known = np.isfinite(one) & np.isfinite(other)
    frame = pd.DataFrame({kind: names, "n": known.sum(axis=0)})
    n = frame["n"].to_numpy()
    both = {name: np.full(len(names), np.nan) for name in ("pearson", "spearman")}
    # process columns with the same missing rows together
    patterns, pattern = np.unique(known, axis=1, return_inverse=True)
    for column in range(patterns.shape[1]):
        columns = np.flatnonzero(pattern.ravel() == column)
        if n[columns[0]] < _LEAST:
            continue
        left, right = (side[np.ix_(patterns[:, column], columns)] for side in (one, other))
        both["pearson"][columns] = pearson(left, right)
        both["spearman"][columns] = pearson(rankdata(left, axis=0), rankdata(right, axis=0))
    for name, r in both.items():
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where there are too few pairs
            p = 2 * student.sf(np.abs(r) * np.sqrt((n - 2) / np.maximum(1 - r**2, 0)), n - 2)
        q = np.full(len(names), np.nan)
        q[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)]) if np.isfinite(p).any() else []
        frame[name], frame[f"{name}_p"], frame[f"{name}_q"] = r, p, q
    return frame
