"""Count transcripts per spot, one partition of the points at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
from dask.delayed import delayed
from spatialdata import SpatialData
from spatialdata.models import PointsModel

from stimage_sd import contract
from stimage_sd.image import aggregation
from stimage_sd.pp._aggregate_common import Measured, in_batches
from stimage_sd.pp._spot_layout import placed_box

#: prefixes of features that are not genes: controls, codewords without a gene and intergenic regions (10x Xenium),
#: blanks (MERSCOPE), negative probes and system controls (CosMx)
CONTROLS = (
    "NegControlProbe_",
    "NegControlCodeword_",
    "antisense_",
    "BLANK_",
    "Blank-",
    "UnassignedCodeword_",
    "DeprecatedCodeword_",
    "Intergenic_",
    "NegPrb",
    "SystemControl",
)
#: column of a transcript's Phred-scaled quality
QUALITY = "qv"
#: recorded tallies: all transcripts, then uncounted transcripts by the first reason that holds
_TALLIES = ("transcripts_read", "of_low_quality", "of_controls", "of_other_features")
#: number of waiting entries above which the counts of partitions are added up
_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Rule:
    """Rule that selects the transcripts to count and places them on the H&E.

    - `feature`, `quality`: columns with the feature name and the quality. Without a quality column there is no
      threshold.
    - `min_quality`, `controls`: as in `stimage_sd.pp.aggregate`.
    - `genes`: names of the genes to count. `None` counts all features except controls.
    - `matrix`: ``(2, 3)`` matrix from the coordinates of the points to H&E pixels.
    """

    feature: str
    quality: str | None
    min_quality: float | None
    controls: tuple[str, ...]
    genes: frozenset[str] | None
    matrix: np.ndarray


@dataclass(frozen=True)
class Transcripts:
    """Transcripts of a section.

    - `points`: the dask-backed points.
    - `rule`: rule that selects the transcripts to count.
    - `genes`: one row per gene. `None` counts all features.
    """

    points: Any
    rule: Rule
    genes: pd.DataFrame | None

    def field(self, n_jobs: int | None) -> shapely.Polygon:
        """Return the bounding box of all transcripts in their own coordinates, placed on the H&E."""
        tasks = [delayed(_extent, pure=False)(part) for part in self.points[["x", "y"]].to_delayed()]
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        for lowest, highest in in_batches(tasks, description="extent", n_jobs=n_jobs):
            low, high = np.minimum(low, lowest), np.maximum(high, highest)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("Expected transcripts at finite positions, found none, or one at infinity.")
        return placed_box(low, high, self.rule.matrix)

    def measure(self, regions: aggregation.Regions, n_jobs: int | None) -> Measured:
        """Count the transcripts in each region."""
        columns = ["x", "y", self.rule.feature, *([self.rule.quality] if self.rule.quality else [])]
        rule, where = delayed(self.rule, traverse=False), delayed(regions, traverse=False)
        tasks = [delayed(_count, pure=False)(part, rule, where) for part in self.points[columns].to_delayed()]
        names = {} if self.genes is None else {name: code for code, name in enumerate(self.genes.index)}
        total, tallies = _Total(len(regions.bounds)), np.zeros(len(_TALLIES), dtype=np.int64)
        for touched, counts, tally in in_batches(tasks, description="transcripts", n_jobs=n_jobs):
            total.add(counts, columns=[names.setdefault(name, len(names)) for name in touched])
            tallies += tally
        notes = dict(zip(_TALLIES, tallies.tolist(), strict=True))
        if tallies[0] == tallies[1:].sum():
            raise ValueError(
                f"No transcript counts: {notes}. Lower `min_quality=`, or pass with `table_key=` a table whose genes "
                f"are named as the column {self.rule.feature!r} names them."
            )
        counts, genes = total.counts(len(names)), self.genes
        if genes is None:  # sorted, because the order of discovery depends on the partitions
            genes = pd.DataFrame(index=sorted(names))
            counts = counts[:, [names[name] for name in genes.index]]
        counts.sort_indices()
        n_units = np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()
        return Measured(values=counts, var=genes, n_units=n_units, notes=notes)


def find_transcripts(
    sdata: SpatialData,
    *,
    points_key: str | None,
    table_key: str | None,
    min_quality: float | None,
    controls: Sequence[str],
) -> Transcripts:
    """Return a section's transcripts and genes."""
    name = contract.TRANSCRIPTS if points_key is None else points_key
    if points_key is None and name not in sdata.points and len(sdata.points) == 1:
        name = next(iter(sdata.points))
    if name not in sdata.points:
        raise KeyError(f"No points {name!r}; this section's points: {sorted(sdata.points)}. Choose with `points_key=`.")
    points = sdata.points[name]
    feature = points.attrs.get(PointsModel.ATTRS_KEY, {}).get(PointsModel.FEATURE_KEY) or "feature_name"
    if feature not in points.columns:
        raise ValueError(
            f"Expected a column {feature!r} of the points {name!r} with the features' names, found "
            f"{list(points.columns)}. Name it when the points are made: `PointsModel.parse(..., feature_key=...)`."
        )
    if table_key is not None and table_key not in sdata.tables:
        raise KeyError(f"No table {table_key!r}; this section's tables: {sorted(sdata.tables)}.")
    panel = table_key
    if panel is None:
        panels = [name for name in contract.cell_table_names(sdata) if contract.holds_counts(sdata, name)]
        panel = contract.COUNTS if contract.COUNTS in panels else panels[0] if len(panels) == 1 else None
    genes = None if panel is None else sdata.tables[panel].var
    if genes is not None:
        genes = genes[[not name.startswith(tuple(controls)) for name in genes.index]].copy()
    rule = Rule(
        feature=feature,
        quality=QUALITY if QUALITY in points.columns and min_quality is not None else None,
        min_quality=min_quality,
        controls=tuple(controls),
        genes=None if genes is None else frozenset(genes.index),
        matrix=contract.pixel_frame(sdata).matrix(points, name)[:2],
    )
    return Transcripts(points=points, rule=rule, genes=genes)


def _extent(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    if len(frame) == 0:
        return np.full(2, np.inf), np.full(2, -np.inf)
    values = [frame[axis].to_numpy() for axis in ("x", "y")]
    low, high = (np.array([reduce(column) for column in values]) for reduce in (np.fmin.reduce, np.fmax.reduce))
    # a partition with only NaN positions has no extent
    return np.where(np.isnan(low), np.inf, low), np.where(np.isnan(high), -np.inf, high)


def _count(
    frame: pd.DataFrame, rule: Rule, regions: aggregation.Regions
) -> tuple[list[str], sp.csr_matrix, np.ndarray]:
    """Return the genes of a partition, their counts per region, and tallies of uncounted transcripts by reason."""
    names, codes = _features(frame[rule.feature])
    control = np.array([name.startswith(rule.controls) for name in names], dtype=bool)
    other = np.array([rule.genes is not None and name not in rule.genes for name in names], dtype=bool) & ~control
    wanted = ~control & ~other & (np.bincount(codes[codes >= 0], minlength=len(names)) > 0)
    # the extra last entry serves code -1, a transcript without a name
    label = np.append(np.where(wanted, np.cumsum(wanted) - 1, -1), -1).astype(np.int32)
    reason = np.append(np.where(control, 1, np.where(other, 2, 3)), 2).astype(np.int8)[codes]
    labels = label[codes]
    if rule.quality is not None:
        poor = ~(frame[rule.quality].to_numpy() >= rule.min_quality)
        labels[poor], reason[poor] = -1, 0
    x, y = (_numbers(frame[axis]) for axis in ("x", "y"))
    counts = aggregation.count(regions, x, y, labels, n_labels=int(wanted.sum()), matrix=rule.matrix)
    tally = np.concatenate([[len(frame)], np.bincount(reason, minlength=4)[:3]])
    return [name for name, is_wanted in zip(names, wanted, strict=True) if is_wanted], counts, tally


def _features(column: pd.Series) -> tuple[list[str], np.ndarray]:
    """Return the feature names and the feature number of each transcript, -1 without a feature."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, names = column.cat.codes.to_numpy(), column.cat.categories
    else:
        codes, names = pd.factorize(column)
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names], codes


def _numbers(column: pd.Series) -> np.ndarray:
    """Return a column as contiguous float32 or float64, so that few kernels are compiled."""
    values = np.ascontiguousarray(column.to_numpy())
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


class _Total:
    """Running sum of counts. Waiting partitions are added in groups, to limit memory and the number of additions."""

    def __init__(self, n_regions: int) -> None:
        self._sum = sp.csr_matrix((n_regions, 0), dtype=np.int32)
        self._waiting: list[sp.csr_matrix] = []

    def add(self, counts: sp.csr_matrix, *, columns: list[int]) -> None:
        """Add the counts of a partition to the given columns of the sum."""
        to = np.array(columns, dtype=np.int32)
        width = max(columns, default=-1) + 1
        shape = (counts.shape[0], width)
        self._waiting.append(sp.csr_matrix((counts.data, to[counts.indices], counts.indptr), shape=shape))
        if sum(part.nnz for part in self._waiting) > max(_ENTRIES, self._sum.nnz):
            self._add_up()

    def counts(self, width: int) -> sp.csr_matrix:
        """Return the sum with `width` columns."""
        self._add_up()
        self._sum.resize(self._sum.shape[0], width)
        return self._sum

    def _add_up(self) -> None:
        width = max(part.shape[1] for part in (self._sum, *self._waiting))
        for part in (self._sum, *self._waiting):
            part.resize(part.shape[0], width)
        self._sum, self._waiting = sum(self._waiting, start=self._sum), []
