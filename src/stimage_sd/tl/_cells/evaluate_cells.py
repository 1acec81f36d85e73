"""Score predicted cells against measured cells: detection, segmentation, types, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, counted, frames, shown
from stimage_sd.image.cell_scores import calibration_error, class_scores, confusion, match_centers, separation
from stimage_sd.image.instance_scores import Overlaps, matches, scores_of_overlaps
from stimage_sd.image.polygons import covered_areas, polygon_overlaps
from stimage_sd.nn.hovernet_loss import IGNORED
from stimage_sd.tl._cells.cell_tiles import CELL_TYPE, TypedNuclei, typed_nuclei

Match = Literal["iou", "centers"]
_SECTION = "section"


@shown
class CellScores(NamedTuple):
    """Agreement of predicted cells with measured cells.

    Attributes
    ----------
    summary
        One row per section.
        Detection: ``n_truth``, ``n_found``, ``n_matched``, ``precision``, ``recall``, ``f1``.
        Outlines: ``dice``, ``aggregated_jaccard``, ``segmentation_quality``, ``panoptic_quality``, and
        ``mean_panoptic_quality`` over the classes that occur.
        Types: ``accuracy`` on matched cells, ``mean_f1`` and ``mean_iou`` over the classes that occur,
        ``calibration_error`` of the probabilities, and ``entropy_auc``, the area under the ROC curve of wrong against
        right types by entropy.
    classes
        One row per section and class: ``n_truth``, ``n_found``, ``f1``, ``precision``, ``recall``, ``f1_hovernet`` (as
        published), ``panoptic_quality``, ``iou`` of the class area. A predicted cell is correct if it is matched to a
        measured cell of its class.
    confusion
        One row per section, true class and predicted class: ``truth``, ``predicted``, and ``n``, the number of matched
        cells.
    """

    summary: pd.DataFrame
    classes: pd.DataFrame
    confusion: pd.DataFrame

    def facts(self) -> Facts:
        """Names and values that describe the result, as notebooks show them."""
        mean = self.summary.mean(numeric_only=True)
        return {
            "sections": counted(self.summary["section"].tolist()),
            "cells": f"{self.summary['n_truth'].sum():,} measured, {self.summary['n_found'].sum():,} found, "
            f"{self.summary['n_matched'].sum():,} matched",
            "detection": f"F1 {mean['f1']:.3f}, panoptic quality {mean['panoptic_quality']:.3f}",
            "types": f"accuracy {mean['accuracy']:.3f}, mean F1 of classes {mean['mean_f1']:.3f}",
            "tables": frames(self),
        }


def evaluate_cells(
    data: SpatialData | contract.Cohort,
    *,
    match: Match = "iou",
    radius_um: float = 3.0,
    min_confidence: float = 0.0,
    truth_key: str = contract.NUCLEI,
    label_key: str = CELL_TYPE,
) -> CellScores:
    """Compare predicted cells with measured nuclei and their types.

    Parameters
    ----------
    data
        A section or a cohort with predicted cells (`stimage_sd.tl.predict_cells`) and measured nuclei.
    match
        Rule that matches cells to nuclei. ``"iou"``: their intersection is more than half of their union.
        ``"centers"`` (as published): their centers lie within `radius_um`, one to one.
    radius_um
        Largest distance of matched centers, µm. The published value is 12 px at 0.25 µm per pixel, which is 3 µm.
    min_confidence
        Measured nuclei with a smaller confidence of their type count as unknown type.
    truth_key, label_key
        Name of the measured nuclei's shapes, and name of their column of types.

    Returns
    -------
    The scores. A predicted cell is left out if its center lies outside the bounding box of the nuclei's centers and the
    cell neither matches nor overlaps a nucleus. Nuclei of unknown type, and cells matched to them, count for detection
    and outlines but not for types. Area under several outlines counts once.

    ``tables["cell_types"].obs["true_type"]`` is written. It is the type of the matched nucleus, or missing.

    Raises
    ------
    KeyError
        If a section has no predicted cells, no nuclei of that name, or no types of these nuclei.
    ValueError
        If the truth is the prediction itself, or an option is out of range.

    Notes
    -----
    Paper, Figure 4. Class scores after Graham et al. 2019, panoptic quality after Kirillov et al. 2019.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.evaluate_cells(section, match="centers").summary  # doctest: +SKIP
    """
    if match not in ("iou", "centers"):
        raise ValueError(f'Expected `match` to be "iou" or "centers", found {match!r}.')
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

    def of(self, rows: NDArray[np.bool_]) -> _Cells:
        """Return the cells of a mask."""
        return _Cells(self.outlines[rows], self.types[rows], self.probabilities[rows], self.entropy[rows])


def _scored(
    sdata: SpatialData, name: str, *, truth_key: str, label_key: str, match: Match, radius_um: float,
    min_confidence: float,
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:  # fmt: skip
    cells, classes = _predicted(sdata, truth_key)
    frame = contract.nuclei(sdata, truth_key)
    measured = set(frame[label_key].dropna().astype(str)) if label_key in frame.columns else set()
    classes = [*classes, *sorted(measured - set(classes))]
    truth = typed_nuclei(
        sdata, classes, shapes_key=truth_key, label_key=label_key, min_confidence=min_confidence
    )  # fmt: skip
    pairs = polygon_overlaps(truth.outlines, cells.outlines)
    radius = radius_um / contract.require_mpp(sdata, purpose="matching centers")
    rows = _matched(truth, cells, pairs, match, radius)
    # keep matched cells at the rim, whose centers may lie outside the bounding box
    kept = _within(cells, truth)
    kept[rows[1]] = kept[pairs.found_rows] = True
    rows = rows[0], (np.cumsum(kept) - 1)[rows[1]]
    cells, pairs = cells.of(kept), pairs.among(np.ones(len(truth.types), dtype=bool), kept)
    summary = {_SECTION: name, **_detection(truth, cells, rows), **_outlines(truth, cells, pairs)}
    known = truth.types != IGNORED
    typed = known[rows[0]]
    sure = (rows[0][typed], rows[1][typed])
    table = _class_table(truth, cells, pairs, rows, classes)
    codes = np.full(contract.cell_types(sdata).n_obs, -1)
    codes[np.flatnonzero(kept)[sure[1]]] = truth.types[sure[0]]
    contract.cell_types(sdata).obs["true_type"] = pd.Categorical.from_codes(codes, pd.Index(classes))
    right = truth.types[sure[0]] == cells.types[sure[1]]
    confidence = cells.probabilities[sure[1]].max(axis=1, initial=0.0)
    occur = table["n_truth"] > 0
    summary |= {
        "mean_panoptic_quality": table.loc[occur, "panoptic_quality"].mean(),
        "accuracy": right.mean() if len(right) else float("nan"),
        "mean_f1": table.loc[occur, "f1"].mean(),
        "mean_iou": table.loc[occur, "iou"].mean(),
        "calibration_error": calibration_error(confidence, right),
        "entropy_auc": separation(cells.entropy[sure[1]], right),
    }
    counts = confusion(truth.types[sure[0]], cells.types[sure[1]], n_classes=len(classes))
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
            "nuclei. Scores need measured nuclei, such as those of Xenium. Name their shapes with `truth_key=`: "
            f"{sorted(set(sdata.shapes) - {shapes})}."
        )
    outlines = contract.outlines(contract.nuclei(sdata, shapes).loc[table.obs[contract.INSTANCE_KEY]])
    probabilities = np.asarray(table.X, dtype=np.float64)
    types = pd.Categorical(table.obs["cell_type"], categories=list(table.var_names)).codes.astype(np.int64)
    return _Cells(outlines, types, probabilities, table.obs["entropy"].to_numpy(np.float64)), list(table.var_names)


def _within(cells: _Cells, truth: TypedNuclei) -> NDArray[np.bool_]:
    """Return whether predicted cells lie in the bounding box of the measured centers."""
    (left, top), (right, bottom) = (of(_centers(truth.outlines), axis=0) for of in (np.min, np.max))
    x, y = _centers(cells.outlines).T
    inside: NDArray[np.bool_] = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    return inside


def _centers(outlines: NDArray[np.object_]) -> NDArray[np.float64]:
    return np.asarray(shapely.get_coordinates(shapely.centroid(outlines)))


def _matched(
    truth: TypedNuclei, cells: _Cells, pairs: Overlaps, match: Match, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if match == "centers":
        return match_centers(_centers(truth.outlines), _centers(cells.outlines), radius=radius)
    same = matches(pairs)
    return same.truth_rows, same.found_rows


def _detection(truth: TypedNuclei, cells: _Cells, rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> dict[str, Any]:
    n_truth, n_found, n_matched = len(truth.outlines), len(cells.outlines), len(rows[0])
    return {
        "n_truth": n_truth,
        "n_found": n_found,
        "n_matched": n_matched,
        "precision": n_matched / n_found if n_found else float("nan"),
        "recall": n_matched / n_truth if n_truth else float("nan"),
        "f1": 2 * n_matched / (n_truth + n_found) if n_truth + n_found else float("nan"),
    }


def _outlines(truth: TypedNuclei, cells: _Cells, pairs: Overlaps) -> Mapping[str, float]:
    scores = scores_of_overlaps(pairs)
    names = ("aggregated_jaccard", "segmentation_quality", "panoptic_quality")
    truth_area, found_area, shared = covered_areas(truth.outlines, cells.outlines)
    return {"dice": 2 * shared / (truth_area + found_area), **{name: getattr(scores, name) for name in names}}


def _class_table(
    truth: TypedNuclei, cells: _Cells, pairs: Overlaps, rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    classes: list[str],
) -> pd.DataFrame:  # fmt: skip
    """Score each class, without nuclei of unknown type and the cells matched to them."""
    known = truth.types != IGNORED
    typed = known[rows[0]]
    # a predicted cell on a nucleus of unknown type is neither correct nor a false positive
    counts = np.ones(len(cells.types), dtype=bool)
    counts[rows[1][~typed]] = False
    places = np.cumsum(known) - 1, np.cumsum(counts) - 1
    scores = class_scores(
        truth.types[known],
        cells.types[counts],
        (places[0][rows[0][typed]], places[1][rows[1][typed]]),
        n_classes=len(classes),
    )
    table = pd.DataFrame({"cell_type": classes, **scores._asdict()})
    quality, overlap = [], []
    for code in range(len(classes)):
        of_truth, of_found = truth.types == code, (cells.types == code) & counts
        quality.append(scores_of_overlaps(pairs.among(of_truth, of_found)).panoptic_quality)
        truth_area, found_area, shared = covered_areas(truth.outlines[of_truth], cells.outlines[of_found])
        union = truth_area + found_area - shared
        overlap.append(shared / union if union > 0 else float("nan"))
    return table.assign(panoptic_quality=quality, iou=overlap)
