"""Order in which the genes of a model are offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from stimage_sd.app._sections import Prediction

#: orders of genes, the first that a section has is the default
ORDERS = {
    "certificate": "predictability, by the model's certificate",
    "section": "correlation with this section's counts",
    "mean": "predicted mean, highest first",
    "name": "name",
}


def gene_orders(prediction: Prediction) -> dict[str, pd.Series]:
    """Return the possible orders of the genes.

    Parameters
    ----------
    prediction
        The predicted section.

    Returns
    -------
    Keys of `ORDERS`, and words about each gene, best gene first. Genes without a value come last.
    """
    from stimage_sd import contract

    genes = pd.Index(prediction.model.genes)
    orders = {}
    certificate = getattr(prediction.model, "certificate", None)
    if certificate is not None:
        orders["certificate"] = _certified(certificate.genes.set_index("gene").reindex(genes))
    if not isinstance(prediction.measured, str):
        orders["section"] = _ranked(prediction.measured.pearson.reindex(genes), "r = {:.2f}", "not scored")
    means = np.asarray(contract.predictions(prediction.sdata)[:, list(genes)].X).mean(axis=0)
    orders["mean"] = _ranked(pd.Series(means, genes), "mean {:.3g}", "")
    orders["name"] = pd.Series("", sorted(genes, key=str.casefold))
    return orders


def _certified(scores: pd.DataFrame) -> pd.Series:
    """Return predictable genes first, each group by correlation."""
    known = scores["predictable"].fillna(False).astype(bool)
    ranked = scores.assign(known=known).sort_values(["known", "pearson"], ascending=False, kind="stable")
    words = {
        gene: f"r = {r:.2f} in new sections" if is_known else "not predictable"
        for gene, r, is_known in zip(ranked.index, ranked["pearson"], ranked["known"], strict=True)
    }
    return pd.Series(words, dtype=object)


def doubt_about(gene: str, prediction: Prediction) -> str:
    """Say that the certificate does not call a gene predictable, or return an empty text."""
    certificate = getattr(prediction.model, "certificate", None)
    if certificate is None or gene in certificate.predictable:
        return ""
    scores = certificate.genes.set_index("gene")
    if gene not in scores.index or not np.isfinite(scores.loc[gene, "pearson"]):
        return "The model's certificate does not cover this gene, so its predictions were never tested."
    return (
        f"By the model's certificate this gene is not predictable. In sections that the model had not seen, its "
        f"correlation with the counts was {scores.loc[gene, 'pearson']:.2f}, which chance can explain (q-value "
        f"{scores.loc[gene, 'q_value']:.2g})."
    )


def _ranked(values: pd.Series, words: str, without: str) -> pd.Series:
    ranked = values.sort_values(ascending=False, kind="stable", na_position="last")
    return ranked.map(lambda value: words.format(value) if np.isfinite(value) else without)
