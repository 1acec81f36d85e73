"""Fit heads of nuclei, or of squares of a fine grid, to the counts of the spots that they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import keep_compiled
from stimage_sd.likelihood import instances as heads
from stimage_sd.likelihood import mean_only
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._instance_model import InstanceModel, crowding
from stimage_sd.models._instance_specification import InstanceSpecification, instance_features
from stimage_sd.models._shared_patterns import SharedPatterns, find_patterns
from stimage_sd.models._specification import common_specification, features
from stimage_sd.nn.sharding import shard_members
from stimage_sd.tl._fit.bags import BagFeatures
from stimage_sd.tl._fit.held_out_level import with_interval_level
from stimage_sd.tl._fit.training import INSTANCES, TrainingData, train
from stimage_sd.tl._fit.training_set import (
    Spots,
    bootstrap,
    check_measured,
    counted_genes,
    depths,
    held_out_tiles,
    kept_centers,
    measured_counts,
)

#: leading components of nuclei beside the patterns, and the deviation of the first (patterns: 1 over spots)
_LEADING, _DEVIATION = 24, 0.25
#: largest share of spots without nuclei
_MOST_EMPTY = 0.5


def fit_on_instances(
    cohort: dict[str, SpatialData],
    *,
    on: contract.On,
    genes: list[str],
    extractor: str | Sequence[str],
    head: str,
    n_members: int,
    validation: float | Sequence[str],
    patients: Mapping[str, str],
    standardize: Standardize,
    source: contract.Source,
    seed: int,
    options: dict[str, Any],
) -> InstanceModel:
    """Fit an ensemble whose spots are sums of nuclei or squares; see `stimage_sd.tl.fit_nb`."""
    name = _check(on, extractor, head, options)
    tiles = common_specification(cohort, name)
    specifications = {section: InstanceSpecification.of(sdata, on, name) for section, sdata in cohort.items()}
    first = next(iter(specifications.values()))
    for section, stated in specifications.items():
        first.check(stated, section=section)
    embedded = (
        {section: features(sdata, tiles) for section, sdata in cohort.items()},
        {section: instance_features(sdata, first) for section, sdata in cohort.items()},
    )
    context, nuclei = (_space(values, standardize, seed, options) for values in embedded)
    bags, spots, n_per_unit = _measure(cohort, on, genes, options["exposure"], source)
    reduced = _Reduced.of(*embedded, context, nuclei, bags)
    del embedded
    per_tile = max(float(reduced.per_tile.mean()), 1.0)
    held_out = held_out_tiles(
        spots.sections, spots.positions, validation, n_members=n_members, seed=seed, patients=patients
    )
    measured = (spots.counts, spots.factors, held_out)
    context_patterns = find_patterns(reduced.context, *measured, rank=options["rank"])
    patterns = _beside_components(
        find_patterns(reduced.means(), *measured, rank=options["rank"]), float(reduced.nuclei.std(axis=0).max())
    )
    data = TrainingData(
        BagFeatures(
            context_patterns.project(reduced.context), patterns.project(reduced.nuclei), reduced.starts,
            reduced.background, crowding(reduced.per_tile, per_tile),
        ),
        spots.counts, spots.factors, bootstrap(~held_out, seed=seed), held_out,
    )  # fmt: skip
    keep_compiled()
    initial = heads.initial(
        jax.random.key(seed),
        spots.floor[0],
        spots.floor[1],
        n_members,
        patterns.rank,
        context_patterns.rank,
        n_nuclei=n_per_unit,
    )
    trained = ("max_epochs", "batch_size", "learning_rate", "weight_decay", "patience")
    parameters, history = train(
        INSTANCES, shard_members(initial), data, seed=seed, **{option: options[option] for option in trained}
    )
    model = InstanceModel(
        genes=tuple(genes), tiles=tiles, instances=first, context=context, features=nuclei,
        context_patterns=context_patterns, patterns=patterns,
        parameters={name: np.asarray(array) for name, array in parameters.items()},
        floor=spots.floor, n_per_unit=n_per_unit, per_tile=per_tile, total=spots.total,
        training=spots.record(
            cohort, held_out, history, patients=patients, source=source, seed=seed,
            options={**options, "rank": context_patterns.rank},
        ),
    )  # fmt: skip

    def r_and_p(rows: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return reduced.r_and_p(model, rows, members)

    return with_interval_level(model, r_and_p, data, spots.sections, patients)


def _check(on: str, extractor: str | Sequence[str], head: str, options: Mapping[str, Any]) -> str:
    """Raise `ValueError` for options that models of nuclei do not have, and return the name of the extractor."""
    if on not in ("nuclei", "grid"):
        raise ValueError(f'Expected `on` to be "tiles", "nuclei" or "grid", found {on!r}.')
    if not isinstance(extractor, str):
        raise ValueError(f"Expected the name of one extractor with `on={on!r}`, found {list(extractor)}.")
    if head != "paper":
        raise ValueError(f'Expected `head="paper"` with `on={on!r}`: only with r and p apart do nuclei add up.')
    if options["rank"] is None:
        raise ValueError(f"Expected a `rank` with `on={on!r}`, found None.")
    if options["size_factors"] is not None:
        raise ValueError(f'`size_factors` are not for `on={on!r}`. Use the depth of sections: `exposure="section"`.')
    return extractor


def _space(
    embedded: Mapping[str, np.ndarray], standardize: Standardize, seed: int, options: Mapping[str, Any]
) -> FeatureSpace:
    return FeatureSpace.fit(embedded, n_components=options["n_components"], standardize=standardize, seed=seed)


def _beside_components(patterns: SharedPatterns, deviation: float) -> SharedPatterns:
    """Add the leading components of the nuclei to the patterns.

    Patterns are what differs between means of spots. Nuclei of one spot also differ in other ways, of which the leading
    components have most.
    """
    n_members, n_components, _ = patterns.basis.shape
    leading = np.eye(n_components, dtype=np.float32)[:, :_LEADING] * np.float32(_DEVIATION / max(deviation, 1e-12))
    return SharedPatterns(
        np.concatenate([patterns.basis, np.tile(leading, (n_members, 1, 1))], axis=2), patterns.center
    )


class _Measured(NamedTuple):
    """Measured spots or cells of a section, and the nuclei in each.

    - `tile`: kept tile of each unit, ``int64 (n_units,)``.
    - `counts`: ``(n_units, n_genes)`` sparse.
    - `totals`: total counts, ``(n_units,)``.
    - `rows`: rows of the table of nuclei, ordered by unit.
    - `starts`: first nucleus of each unit, and the number of nuclei, ``(n_units + 1,)``.
    - `background`: share that no nucleus covers, ``(n_units,)``.
    - `per_tile`: number of nuclei in the tile of each unit, ``(n_units,)``.
    - `is_direct`: whether every unit is one nucleus or square.
    """

    tile: np.ndarray
    counts: sp.csr_matrix
    totals: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    background: np.ndarray
    per_tile: np.ndarray
    is_direct: bool


def _measure(
    cohort: Mapping[str, SpatialData], on: contract.On, genes: list[str], exposure: str | None, source: contract.Source
) -> tuple[dict[str, _Measured], Spots, float]:
    """Read the measurements of a cohort, and return the mean number of nuclei of a spot."""
    counted, n_counted = counted_genes(cohort, source) if exposure is not None else (None, 0)
    bags = {}
    for name, sdata in cohort.items():
        read = _of_spots if contract.tiling(sdata)["layout"] == "spots" else _directly
        bags[name] = read(sdata, on, genes, source, counted)
    check_measured({name: bag.counts for name, bag in bags.items()})
    on_spots = [bag for bag in bags.values() if not bag.is_direct]
    n_nuclei = sum(len(bag.rows) for bag in on_spots) / max(sum(len(bag.totals) for bag in on_spots), 1)
    for name, bag in bags.items():
        _check_filled(name, on, bag)
    n_per_unit = n_nuclei if on_spots else 1.0
    counts = sp.vstack([bag.counts for bag in bags.values()]).tocsr()
    # a cell counts as much as a spot of as many such cells, so that sections of cells and of spots have one depth
    totals = [bag.totals * (n_per_unit if bag.is_direct else 1.0) for bag in bags.values()]
    total, factors = depths(totals, None, exposure)
    sections = np.repeat(list(bags), [len(bag.totals) for bag in bags.values()])
    reference = np.repeat([not on_spots or not bag.is_direct for bag in bags.values()], [*map(len, totals)])
    spots = Spots(
        genes=tuple(genes),
        rows={name: bag.tile for name, bag in bags.items()},
        sections=sections,
        positions=np.concatenate([_positions(cohort[name], on, bag) for name, bag in bags.items()]),
        counts=counts,
        factors=factors.astype(np.float32),
        floor=mean_only.floor(counts[reference], factors[reference]),
        total=total,
        n_counted=n_counted,
    )
    return bags, spots, float(n_per_unit)


def _check_filled(name: str, on: str, bag: _Measured) -> None:
    """Raise `ValueError` if most spots hold no nucleus, as if only some tiles were segmented."""
    empty = float((np.diff(bag.starts) == 0).mean())
    if not bag.is_direct and empty > _MOST_EMPTY:
        raise ValueError(
            f"{empty:.0%} of the spots of section {name!r} hold none of its {on}, so their counts would be taken for "
            "background. Do shapes and spots lie on the same tissue, and were all tiles segmented? Run "
            "`stimage_sd.pp.segment_nuclei(sdata)` without `tiles=`, and embed again."
        )


def _of_spots(
    sdata: SpatialData, on: contract.On, genes: list[str], source: contract.Source, counted: list[str] | None
) -> _Measured:
    """Read the counts of spots, and the nuclei in each."""
    tile, counts, totals = measured_counts(sdata, genes, source, counted)
    within = contract.within_tiles(sdata, contract.instances(sdata, on))
    unit_of = np.full(len(within.uncovered), -1)
    unit_of[tile] = np.arange(len(tile))
    rows = np.flatnonzero(within.inside)
    rows = rows[unit_of[within.tile[rows]] >= 0]
    rows = rows[np.argsort(unit_of[within.tile[rows]], kind="stable")]
    sizes = np.bincount(unit_of[within.tile[rows]], minlength=len(tile))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return _Measured(tile, counts, totals, rows, starts, within.uncovered[tile], within.per_tile[tile], is_direct=False)


def _directly(
    sdata: SpatialData, on: contract.On, genes: list[str], source: contract.Source, counted: list[str] | None
) -> _Measured:
    """Read the counts of cells or bins, each of one nucleus or square."""
    table = contract.instances(sdata, on)
    rows, units = contract.align_to_instances(sdata, table, source)
    within = contract.within_tiles(sdata, table)
    tile = within.tile[rows]
    rows, units, tile = rows[tile >= 0], units[tile >= 0], tile[tile >= 0]
    totals = np.asarray((units.X if counted is None else units[:, counted].X).sum(axis=1), dtype=np.float64).ravel()
    counts, starts = sp.csr_matrix(units[:, genes].X), np.arange(len(rows) + 1)
    return _Measured(tile, counts, totals, rows, starts, np.zeros(len(rows)), within.per_tile[tile], is_direct=True)


def _positions(sdata: SpatialData, on: contract.On, bag: _Measured) -> np.ndarray:
    if bag.is_direct:
        return contract.places(sdata, contract.instances(sdata, on))[bag.rows]
    return kept_centers(sdata)[bag.tile]


class _Reduced(NamedTuple):
    """Components of the spots of a cohort and of their nuclei, as in `BagFeatures` for no member yet."""

    context: np.ndarray
    nuclei: np.ndarray
    starts: np.ndarray
    background: np.ndarray
    per_tile: np.ndarray

    @classmethod
    def of(
        cls, tiles: Mapping[str, np.ndarray], instances: Mapping[str, np.ndarray], context: FeatureSpace,
        nuclei: FeatureSpace, bags: Mapping[str, _Measured],
    ) -> _Reduced:  # fmt: skip
        """Project the embeddings of the measured spots and their nuclei."""
        of_spots, of_nuclei = [], []
        for name, bag in bags.items():
            of_spots.append(context.reduce(tiles[name], context.scale(tiles[name], section=name))[bag.tile])
            scale = nuclei.scale(instances[name], section=name)
            of_nuclei.append(nuclei.reduce(instances[name][bag.rows], scale))
        sizes = np.concatenate([np.diff(bag.starts) for bag in bags.values()])
        return cls(
            np.concatenate(of_spots),
            np.concatenate(of_nuclei),
            np.concatenate([[0], np.cumsum(sizes)]),
            np.concatenate([bag.background for bag in bags.values()]).astype(np.float32),
            np.concatenate([bag.per_tile for bag in bags.values()]),
        )

    def means(self) -> np.ndarray:
        """Return the mean over each spot's nuclei, zero (the mean of the section) for spots without nuclei."""
        sizes = np.diff(self.starts)
        belongs = sp.csr_matrix((np.ones(len(self.nuclei), np.float32), np.arange(len(self.nuclei)), self.starts))
        return np.asarray(belongs @ self.nuclei / np.maximum(sizes, 1)[:, None], dtype=np.float32)

    def r_and_p(self, model: InstanceModel, rows: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some spots by some members."""
        sizes = np.diff(self.starts)[rows]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        nuclei = self.nuclei[np.repeat(self.starts[rows], sizes) + within]
        return model.predict_bags(
            self.context[rows], nuclei, np.repeat(np.arange(len(rows)), sizes), self.background[rows],
            self.per_tile[rows], members=members,
        )  # fmt: skip
