"""Labels of tiles, nuclei or squares, from whichever table of the section has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._counts import Source, measured
from stimage_sd.contract._names import INSTANCE_KEY
from stimage_sd.contract._section import sample
from stimage_sd.contract._tiles import tiles

#: wanted labels by column
Labeled: TypeAlias = Mapping[str, str | Sequence[str]]


def row_labels(
    sdata: SpatialData,
    rows: pd.DataFrame,
    column: str,
    *,
    units: pd.DataFrame | None = None,
    source: Source | None = None,
) -> NDArray[np.object_]:
    """Return a label per row of a table of tiles, nuclei or squares. `None` where there is none.

    Parameters
    ----------
    sdata
        The section.
    rows
        ``obs`` of tiles, or of predictions of tiles, nuclei or squares.
    column
        Name of a column. It is looked up in the measured spots, then in `rows`, then in the tiles that the rows are or
        lie in.
    units
        ``obs`` of the measurements of the rows, if they are at hand.
    source
        Table of the measurements.

    Raises
    ------
    KeyError
        If there is no such column.
    """
    every = tiles(sdata).obs
    spots = _spots(sdata, rows, source) if units is None else units
    for frame in (spots, rows):
        if frame is not None and column in frame:
            return _labels(frame[column])
    if column not in every:
        known = dict.fromkeys([*([] if spots is None else spots), *rows, *every])
        raise KeyError(
            f"No column {column!r} among those of the spots, predictions and tiles of section {sample(sdata)!r}, "
            f"{list(known)}. `stimage_sd.pp.label_by_annotations(sdata)` labels tiles by annotations."
        )
    if "tile" in rows:
        return _labels(every[column].reindex(rows["tile"]))
    return _labels(every.set_index(INSTANCE_KEY)[column].reindex(rows[INSTANCE_KEY]))


def _labels(values: pd.Series) -> NDArray[np.object_]:
    labels = np.array(values, dtype=object)  # a copy: pandas 3 lends arrays that can't be written
    labels[pd.isna(labels)] = None
    return labels


def _spots(sdata: SpatialData, rows: pd.DataFrame, source: Source | None) -> pd.DataFrame | None:
    """Return the ``obs`` of the spot that each tile sits on, `None` if tiles do not sit on spots."""
    if "spot_id" not in rows:
        return None
    try:
        return measured(sdata, None, source).obs.reindex(rows["spot_id"].astype(str))
    except KeyError:  # spots without a table
        return None


def labeled_rows(sdata: SpatialData, rows: pd.DataFrame, labels: Labeled) -> NDArray[np.int64]:
    """Return the rows that have one of the wanted labels in every column.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If no row has a wanted label.
    """
    inside = np.ones(len(rows), dtype=bool)
    for column, wanted in labels.items():
        found = row_labels(sdata, rows, column)
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        inside &= np.array([label is not None and str(label) in names for label in found])
        if not inside.any():
            present = sorted({str(label) for label in found if label is not None})
            raise ValueError(
                f"Expected tiles with {column!r} of {names} in section {sample(sdata)!r}, found none. {column!r} has "
                f"{present}."
            )
    return np.flatnonzero(inside)
