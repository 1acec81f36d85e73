"""Cross tables of two labels of tiles, such as clusters and a pathologist's annotation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, frames, listed, shown


@shown
class LabelAgreement(NamedTuple):
    """Agreement of two labels of tiles.

    Attributes
    ----------
    table
        Number of tiles, one row per value of the first label, one column per value of the second.
    scores
        One row per section, and one row ``"all"`` if there are several: ``section``, ``n_tiles``,
        ``adjusted_rand_index`` and ``normalized_mutual_information``.
    """

    table: pd.DataFrame
    scores: pd.DataFrame

    def facts(self) -> Facts:
        """Names and values that describe the result, as notebooks show them."""
        scores = {
            str(row.section): f"{row.n_tiles:,} tiles; adjusted Rand index {row.adjusted_rand_index:.3f}, "
            f"normalized mutual information {row.normalized_mutual_information:.3f}"
            for row in self.scores.itertuples()
        }
        return {
            **scores,
            "labels": f"{self.table.index.name or 'first'} (rows): {listed(self.table.index)}; "
            f"{self.table.columns.name or 'second'} (columns): {listed(self.table.columns)}",
            "tables": frames(self),
        }


def compare_labels(
    data: SpatialData | contract.Cohort, first: str, second: str, *, key: str = contract.PREDICTIONS
) -> LabelAgreement:
    """Cross-tabulate two labels of the predicted tiles, such as clusters and annotations.

    Parameters
    ----------
    data
        A section or a cohort of sections with predictions.
    first, second
        Names of columns. They are looked up in the ``obs`` of the spots, then of the predictions, then of the tiles.
        `stimage_sd.tl.cluster` writes ``"leiden"``, `stimage_sd.pp.label_by_annotations` writes ``"annotation"``.
    key
        Name of the prediction table. Its rows are counted.

    Returns
    -------
    The cross table over all sections, and the adjusted Rand index and the normalized mutual information. Tiles without
    one of the labels are left out.

    Raises
    ------
    KeyError
        If a section has no predictions, or there is no such column.
    ValueError
        If no tile has both labels.

    Notes
    -----
    Paper, section 3.9. The scores are scikit-learn's.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.compare_labels(section, "leiden", "annotation").table  # doctest: +SKIP
    """
    labels, names = [], []
    for name, sdata in contract.sections(data).items():
        rows = contract.predictions(sdata, key).obs
        pair = np.stack([contract.row_labels(sdata, rows, column) for column in (first, second)], axis=1)
        both = np.array([None not in one for one in pair.tolist()], dtype=bool)
        if not both.any():
            raise ValueError(f"No tile of section {name!r} has both {first!r} and {second!r}.")
        labels.append(pair[both].astype(str))
        names.append(name)
    scores = [_scores(name, one) for name, one in zip(names, labels, strict=True)]
    every = np.concatenate(labels)
    if len(names) > 1:
        scores.append(_scores("all", every))
    table = pd.crosstab(pd.Series(every[:, 0], name=first), pd.Series(every[:, 1], name=second))
    return LabelAgreement(table, pd.DataFrame(scores))


def _scores(section: str, labels: np.ndarray) -> dict[str, object]:
    first, second = labels.T
    return {
        "section": section,
        "n_tiles": len(labels),
        "adjusted_rand_index": adjusted_rand_score(first, second),
        "normalized_mutual_information": normalized_mutual_info_score(first, second),
    }
