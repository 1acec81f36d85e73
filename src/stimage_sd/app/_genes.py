"""Order in which the genes of a model are offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from stimage_sd.app._sections import Prediction

#: orders of genes, the first that a section has is the default
ORDERS = {
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
    if not isinstance(prediction.measured, str):
        orders["section"] = _ranked(prediction.measured.pearson.reindex(genes), "r = {:.2f}", "not scored")
    means = np.asarray(contract.predictions(prediction.sdata)[:, list(genes)].X).mean(axis=0)
    orders["mean"] = _ranked(pd.Series(means, genes), "mean {:.3g}", "")
    orders["name"] = pd.Series("", sorted(genes, key=str.casefold))
    return orders


def _ranked(values: pd.Series, words: str, without: str) -> pd.Series:
    ranked = values.sort_values(ascending=False, kind="stable", na_position="last")
    return ranked.map(lambda value: words.format(value) if np.isfinite(value) else without)
