"""Score predicted cells against measured ones: detection, segmentation, types, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.nn.cell_scores import calibration_error, class_scores, confusion, match_centres, separation
from stimage_sd.nn.hovernet_loss import IGNORED
from stimage_sd.nn.instance_scores import Overlaps, matches, scores_of_overlaps
from stimage_sd.nn.polygons import polygon_overlaps
from stimage_sd.tl._cell_tiles import CELL_TYPE, TypedNuclei, typed_nuclei

Match = Literal["iou", "centres"]
_SECTION = "section"


class CellScores(NamedTuple):
    """Agreement of predicted with measured cells.

    Attributes
    ----------
    summary
        A row a section. Detection by the chosen match: ``n_truth``, ``n_found``, ``n_matched``, ``precision``,
        ``recall``, ``f1``. Of outlines: ``dice``, ``aggregated_jaccard``, ``segmentation_quality``,
        ``panoptic_quality``, and its mean over the classes, ``mean_panoptic_quality``. Of types: ``accuracy`` within
        matched cells, ``mean_f1`` and ``mean_iou`` over the classes that occur, ``calibration_error`` of the
        probabilities, and ``entropy_auc``: how well entropy tells wrong from right types.
    classes
        A row a section and class: ``n_truth``, ``n_found``, ``f1`` (a found cell is right where it is matched to a true
        one of its class), ``precision``, ``recall``, ``f1_hovernet`` (as published), ``panoptic_quality``, ``iou`` of
        the class' area.
    confusion
        A row a section, true class and predicted class: ``truth``, ``predicted``, ``n``, of matched cells.
    """

    summary: pd.DataFrame
    classes: pd.DataFrame
    confusion: pd.DataFrame

    def __repr__(self) -> str:
        mean = self.summary.mean(numeric_only=True)
        return (
            f"CellScores of {len(self.summary)} sections: detection F1 {mean['f1']:.3f}, panoptic quality "
            f"{mean['panoptic_quality']:.3f}, accuracy {mean['accuracy']:.3f}, mean F1 of classes {mean['mean_f1']:.3f}"
        )


def evaluate_cells(
    data: SpatialData | contract.Cohort,
    *,
    truth_key: str = contract.NUCLEI,
    label_key: str = CELL_TYPE,
    match: Match = "iou",
    radius_um: float = 3.0,
    min_confidence: float = 0.0,
) -> CellScores:
    """Compare predicted cells with measured nuclei and their types.

    Parameters
    ----------
    data
        A section, or a cohort of them, with predicted cells (`stimage_sd.tl.predict`) beside measured nuclei.
    truth_key, label_key
        Name of the measured nuclei's shapes, and of their column of types.
    match
        Which cells are the same: ``"iou"``, those that share more than half of their union; ``"centres"``, as
        published, those whose centres lie within `radius_um`, matched one to one.
    radius_um
        3 µm are the published 12 px at 0.25 µm.
    min_confidence
        Measured nuclei whose type is less sure are nuclei of unknown type: they count for detection alone.

    Returns
    -------
    The scores. Predicted cells beyond the measured ones (outside of the rectangle around their centres) are left out.
    ``tables["cell_types"].obs["true_type"]`` is written: the type of the measured nucleus that a cell is matched to,
    missing where there is none.

    Raises
    ------
    KeyError
        If a section has no predicted cells, no nuclei of that name, or these have no types.
    ValueError
        If the truth is the prediction itself, or an option is out of range.

    Notes
    -----
    Paper, Figure 4; scores of classes after Graham et al. 2019, panoptic quality after Kirillov et al. 2019.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.evaluate_cells(section, match="centres").summary  # doctest: +SKIP
    """
    if match not in ("iou", "centres"):
        raise ValueError(f'Expected `match` to be "iou" or "centres", found {match!r}.')
    if not radius_um > 0:
        raise ValueError(f"Expected `radius_um` above 0, found {radius_um}.")
    cohort = contract.sections(data)
    scores = [
        _scored(
            sdata, name, truth_key=truth_key, label_key=label_key, match=match, radius_um=radius_um,
            min_confidence=min_confidence,
        )
        for name, sdata in cohort.items()
    ]  # fmt: skip
    summaries, classes, tables = zip(*scores, strict=True)
    return CellScores(pd.DataFrame(summaries), *(pd.concat(parts, ignore_index=True) for parts in (classes, tables)))


class _Cells(NamedTuple):
    """Predicted cells: outlines, types, probabilities and entropy."""

    outlines: NDArray[np.object_]
    types: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    entropy: NDArray[np.float64]


def _scored(
    sdata: SpatialData, name: str, *, truth_key: str, label_key: str, match: Match, radius_um: float,
    min_confidence: float,
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:  # fmt: skip
    found, classes = _predicted(sdata, truth_key)
    frame = contract.nuclei(sdata, truth_key)
    measured = set(frame[label_key].dropna().astype(str)) if label_key in frame.columns else set()
    classes = [*classes, *sorted(measured - set(classes))]
    truth = typed_nuclei(
        sdata, classes, shapes_key=truth_key, label_key=label_key, min_confidence=min_confidence
    )  # fmt: skip
    found, inside = _within(found, truth)
    pairs = polygon_overlaps(truth.outlines, found.outlines)
    rows = _matched(truth, found, pairs, match, radius_um / contract.require_mpp(sdata, purpose="matching centres"))
    summary = {_SECTION: name, **_detection(truth, found, rows), **_outlines(pairs)}
    known = truth.types != IGNORED
    typed = known[rows[0]]
    sure = (rows[0][typed], rows[1][typed])
    table = _class_table(truth, found, pairs, sure, classes)
    codes = np.full(contract.cell_types(sdata).n_obs, -1)
    codes[inside[sure[1]]] = truth.types[sure[0]]
    contract.cell_types(sdata).obs["true_type"] = pd.Categorical.from_codes(codes, pd.Index(classes))
    right = truth.types[sure[0]] == found.types[sure[1]]
    confidence = found.probabilities[sure[1]].max(axis=1, initial=0.0)
    occur = table["n_truth"] > 0
    summary |= {
        "mean_panoptic_quality": table.loc[occur, "panoptic_quality"].mean(),
        "accuracy": right.mean() if len(right) else float("nan"),
        "mean_f1": table.loc[occur, "f1"].mean(),
        "mean_iou": table.loc[occur, "iou"].mean(),
        "calibration_error": calibration_error(confidence, right),
        "entropy_auc": separation(found.entropy[sure[1]], right),
    }
    counts = confusion(truth.types[sure[0]], found.types[sure[1]], n_classes=len(classes))
    long = pd.DataFrame(
        {
            _SECTION: name,
            "truth": np.repeat(classes, len(classes)),
            "predicted": np.tile(classes, len(classes)),
            "n": counts.ravel(),
        }
    )
    table.insert(0, _SECTION, name)
    return summary, table, long


def _predicted(sdata: SpatialData, truth_key: str) -> tuple[_Cells, list[str]]:
    table = contract.cell_types(sdata)
    shapes = contract.cell_shapes(sdata)
    if shapes == truth_key:
        raise ValueError(
            f"Expected measured nuclei as {truth_key!r} in section {contract.sample(sdata)!r}, found the predicted "
            "ones. Name those that were measured with `truth_key=`."
        )
    outlines = contract.outlines(contract.nuclei(sdata, shapes))
    probabilities = np.asarray(table.X, dtype=np.float64)
    types = pd.Categorical(table.obs["cell_type"], categories=list(table.var_names)).codes.astype(np.int64)
    return _Cells(outlines, types, probabilities, table.obs["entropy"].to_numpy(np.float64)), list(table.var_names)


def _within(found: _Cells, truth: TypedNuclei) -> tuple[_Cells, NDArray[np.int64]]:
    """Predicted cells that lie where cells were measured, and their rows."""
    (left, top), (right, bottom) = (of(_centres(truth.outlines), axis=0) for of in (np.min, np.max))
    x, y = _centres(found.outlines).T
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    return _Cells(*(column[inside] for column in found)), np.flatnonzero(inside)


def _centres(outlines: NDArray[np.object_]) -> NDArray[np.float64]:
    return np.asarray(shapely.get_coordinates(shapely.centroid(outlines)))


def _matched(
    truth: TypedNuclei, found: _Cells, pairs: Overlaps, match: Match, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if match == "centres":
        return match_centres(_centres(truth.outlines), _centres(found.outlines), radius=radius)
    same = matches(pairs)
    # overlapping outlines of one side may have the same partner: the first one has it
    _, first = np.unique(same.found_rows, return_index=True)
    rows, columns = same.truth_rows[first], same.found_rows[first]
    _, first = np.unique(rows, return_index=True)
    return rows[first], columns[first]


def _detection(truth: TypedNuclei, found: _Cells, rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> dict[str, Any]:
    n_truth, n_found, n_matched = len(truth.outlines), len(found.outlines), len(rows[0])
    return {
        "n_truth": n_truth,
        "n_found": n_found,
        "n_matched": n_matched,
        "precision": n_matched / n_found if n_found else float("nan"),
        "recall": n_matched / n_truth if n_truth else float("nan"),
        "f1": 2 * n_matched / (n_truth + n_found) if n_truth + n_found else float("nan"),
    }


def _outlines(pairs: Overlaps) -> Mapping[str, float]:
    scores = scores_of_overlaps(pairs)
    names = ("dice", "aggregated_jaccard", "segmentation_quality", "panoptic_quality")
    return {name: getattr(scores, name) for name in names}


def _class_table(
    truth: TypedNuclei, found: _Cells, pairs: Overlaps, rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    classes: list[str],
) -> pd.DataFrame:  # fmt: skip
    """A row a class; measured nuclei of unknown type, and what is matched to them, count nowhere."""
    known = truth.types != IGNORED
    # a predicted cell on a nucleus of unknown type is neither right nor made up
    on_unknown = np.zeros(len(found.types), dtype=bool)
    same = matches(pairs)
    on_unknown[same.found_rows[~known[same.truth_rows]]] = True
    number = np.cumsum(known) - 1, np.cumsum(~on_unknown) - 1
    kept = ~on_unknown[rows[1]]
    scores = class_scores(
        truth.types[known],
        found.types[~on_unknown],
        (number[0][rows[0][kept]], number[1][rows[1][kept]]),
        n_classes=len(classes),
    )
    table = pd.DataFrame({"cell_type": classes, **scores._asdict()})
    quality, overlap = [], []
    for code in range(len(classes)):
        among = pairs.among(truth.types == code, (found.types == code) & ~on_unknown)
        quality.append(scores_of_overlaps(among).panoptic_quality)
        union = among.truth_areas.sum() + among.found_areas.sum() - among.shared.sum()
        overlap.append(among.shared.sum() / union if union > 0 else float("nan"))
    return table.assign(panoptic_quality=quality, iou=overlap)
