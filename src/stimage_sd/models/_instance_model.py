"""Fitted ensembles that predict every nucleus, or every square of a fine grid, and the spots that they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, counted, shown
from stimage_sd.likelihood import instances as heads
from stimage_sd.likelihood.instances import Bags
from stimage_sd.models._certificate import Certified
from stimage_sd.models._facts import certificate_facts, interval_facts, tile_facts, training_facts
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import SavedModel
from stimage_sd.models._instance_specification import InstanceSpecification, instance_features
from stimage_sd.models._members import Members, training_of
from stimage_sd.models._shared_patterns import SharedPatterns
from stimage_sd.models._specification import TileSpecification, check_specification, features, specification

#: largest number of elements (members x nuclei x genes) computed at a time
_BLOCK = 8_000_000
#: number of tiles whose background is computed at a time
_TILES = 1024
#: names of the heads' arrays
_PARAMETERS = (
    "weight_nuclei", "hidden", "hidden_bias", "weight_hidden", "weight_context", "crowding", "bias",
    "weight_background", "bias_background", "weight_p", "bias_p",
)  # fmt: skip
#: least number of nuclei of a tile, for tiles without any
_LEAST_CROWDED = 0.5


def crowding(per_tile: np.ndarray, usual: float) -> np.ndarray:
    """Return the log of the number of nuclei per tile relative to the usual one, ``float32``."""
    return np.log(np.maximum(per_tile, _LEAST_CROWDED) / usual).astype(np.float32)


@shown
@dataclass(frozen=True)
class InstanceModel(Certified, SavedModel, kind="instances"):
    """An ensemble that predicts a negative binomial for every gene and nucleus (or square), and for their sums.

    Made by `stimage_sd.tl.fit_nb` with ``on=``, loaded by `stimage_sd.models.load`. A spot's r is the sum over its
    nuclei and the background that they do not cover; its p is that of its nuclei. So a spot has the distribution of the
    sum of its nuclei, exactly.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    tiles, instances
        Tiling and embedding that a section must have.
    context, features
        Spaces from embeddings of tiles, and of nuclei, to components.
    context_patterns, patterns
        Projections from components to the input of each member's heads.
    parameters
        The heads' arrays. The first axis is the member.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the counts of training spots.
    n_per_unit
        Mean number of nuclei or squares of a training spot; 1 where cells or bins were counted directly.
    per_tile
        Mean number of nuclei or squares in the tile of a training spot.
    total
        Median total count of the training spots, which has depth 1; `None` without exposure.
    interval_level, training, shifts, r_scale, spot_sd
        As in `NBModel`.
    """

    genes: tuple[str, ...]
    tiles: TileSpecification
    instances: InstanceSpecification
    context: FeatureSpace
    features: FeatureSpace
    context_patterns: SharedPatterns
    patterns: SharedPatterns
    parameters: Mapping[str, np.ndarray]
    floor: np.ndarray
    n_per_unit: float
    per_tile: float
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)
    shifts: np.ndarray | None = None
    r_scale: float = 1.0
    spot_sd: float = 0.0

    @property
    def on(self) -> Literal["nuclei", "grid"]:
        """What the model predicts beside tiles: ``"nuclei"`` or ``"grid"``."""
        return self.instances.on

    @property
    def n_members(self) -> int:
        """Number of members of the ensemble."""
        return len(self.parameters["bias"])

    @property
    def members(self) -> Members[InstanceModel]:
        """Members of the ensemble. Indexing with an int, slice or list gives a model of these members."""

        def choose(chosen: list[int]) -> InstanceModel:
            return replace(
                self,
                parameters={name: np.asarray(array)[chosen] for name, array in self.parameters.items()},
                context_patterns=self.context_patterns.of(chosen),
                patterns=self.patterns.of(chosen),
                training=training_of(self.training, chosen),
            )

        return Members(self.n_members, choose)

    @property
    def history(self) -> pd.DataFrame:
        """Losses, one row per member and epoch, with columns epoch, member, training_nll and validation_nll."""
        return pd.DataFrame(self.training["history"])

    @property
    def member_weights(self) -> np.ndarray:
        """Weight of each member in the mixture, all equal, ``float64 (n_members,)``."""
        return np.full(self.n_members, 1.0 / self.n_members)

    @property
    def head(self) -> str:
        """Name of the heads."""
        return "instances"

    @property
    def embeddings(self) -> tuple[TileSpecification, ...]:
        """Tiling and embedding of tiles that a section must have."""
        return (self.tiles,)

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        return {
            "extractor": f"{self.tiles.extractor}+{self.instances.extractor}",
            "head": "instances",
            "on": self.on,
            "n_members": self.n_members,
        }

    def open(self, sdata: SpatialData, *, section: str) -> InstanceSection:
        """Check that a section matches the model, and project its embeddings to the heads' spaces.

        Raises
        ------
        KeyError
            If the section was not tiled, or its tiles or nuclei were not embedded.
        ValueError
            If tiles, nuclei, embeddings or staining differ from the model's. The error names the step to run again.
        """
        stated = specification(sdata, self.tiles.extractor, context=self.tiles.context_rings > 0)
        check_specification(stated, self.tiles, section=section)
        self.instances.check(InstanceSpecification.of(sdata, self.on, self.instances.extractor), section=section)
        of_tiles, of_nuclei = features(sdata, self.tiles), instance_features(sdata, self.instances)
        return InstanceSection(
            self,
            contract.within_tiles(sdata, contract.instances(sdata, self.on)),
            self.context.reduce(of_tiles, self.context.scale(of_tiles, section=section)),
            self.features.reduce(of_nuclei, self.features.scale(of_nuclei, section=section)),
            self.context.strangeness(of_tiles),
            of_nuclei,
        )

    def predict_bags(
        self, context: np.ndarray, nuclei: np.ndarray, spot: np.ndarray, background: np.ndarray, per_tile: np.ndarray,
        *, members: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Return r and p of spots, ``float32 (n_members, n_spots, n_genes)``. For the parameters, see `bags`."""
        parameters, bags = self.bags(context, nuclei, spot, background, per_tile, members=members)
        r, p = _compiled("r_and_p")(parameters, bags)
        return self.scaled(np.asarray(r)[:, : len(context)], np.asarray(p)[:, : len(context)])

    def bags(
        self, context: np.ndarray, nuclei: np.ndarray, spot: np.ndarray, background: np.ndarray, per_tile: np.ndarray,
        *, members: Sequence[int] | None = None,
    ) -> tuple[dict[str, np.ndarray], Bags]:  # fmt: skip
        """Return the parameters of members, and spots with their nuclei as these members see them.

        Spots and nuclei are padded to powers of two, so that few shapes are compiled.

        Parameters
        ----------
        context
            Components of the spots, ``float32 (n_spots, n_components)``.
        nuclei
            Components of the nuclei, ``float32 (n_nuclei, n_components)``.
        spot
            Spot of each nucleus.
        background
            Share of each spot that no nucleus covers.
        per_tile
            Number of nuclei of each spot's tile.
        members
            Indices of the members. Default: all.
        """
        chosen = slice(None) if members is None else list(members)
        parameters = {name: np.asarray(array)[chosen] for name, array in self.parameters.items()}
        n_spots, n_nuclei = _padded(len(context)), _padded(len(nuclei))
        return parameters, Bags(
            self.context_patterns.project(_pad(context, n_spots), members=members),
            self.patterns.project(_pad(nuclei, n_nuclei), members=members),
            _pad(spot.astype(np.int32), n_nuclei, value=n_spots),
            _pad(background.astype(np.float32), n_spots),
            _pad(crowding(per_tile, self.per_tile), n_spots),
        )

    def scaled(self, r: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Multiply r by the learned factor, and change p so that the mean stays."""
        if self.r_scale == 1:
            return r, p
        return self.r_scale * r, self.r_scale * p / (1 + (self.r_scale - 1) * p)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config = {
            "genes": list(self.genes),
            "tiles": asdict(self.tiles),
            "instances": asdict(self.instances),
            "standardize": self.features.standardize,
            "n_per_unit": self.n_per_unit,
            "per_tile": self.per_tile,
            "total": self.total,
            "interval_level": self.interval_level,
            "r_scale": self.r_scale,
            "spot_sd": self.spot_sd,
            "training": self.training,
        }
        arrays = {f"head.{name}": np.asarray(array) for name, array in self.parameters.items()}
        for name, patterns in (("context_patterns", self.context_patterns), ("patterns", self.patterns)):
            arrays |= {f"{name}.basis": patterns.basis, f"{name}.center": patterns.center}
        for name, space in (("context", self.context), ("features", self.features)):
            arrays |= {f"{name}.{array}": values for array, values in space.arrays().items()}
        if self.shifts is not None:
            arrays["shifts"] = self.shifts
        return config, {**arrays, "floor": self.floor}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> InstanceModel:
        """Build a model from what `to_parts` returned."""
        n_genes, parameters = len(config["genes"]), {name: arrays[f"head.{name}"] for name in _PARAMETERS}
        patterns: dict[str, Any] = {
            name: SharedPatterns(arrays[f"{name}.basis"], arrays[f"{name}.center"])
            for name in ("context_patterns", "patterns")
        }
        of_genes = {name: array for name, array in parameters.items() if not name.startswith("hidden")}
        wrong = [name for name, array in of_genes.items() if array.shape[-1] != n_genes]
        for name, of in (("weight_nuclei", "patterns"), ("weight_context", "context_patterns")):
            wrong += [name] if parameters[name].shape[1] != patterns[of].rank else []
        if wrong or arrays["floor"].shape != (2, n_genes):
            raise KeyError(f"arrays {wrong or ['floor']} do not fit {n_genes} genes and the patterns")
        spaces: dict[str, Any] = {
            name: FeatureSpace.from_arrays(_within(arrays, name), standardize=config["standardize"])
            for name in ("context", "features")
        }
        instances = config["instances"]
        return cls(
            genes=tuple(config["genes"]),
            tiles=TileSpecification.of(config["tiles"]),
            instances=InstanceSpecification(**{**instances, "fields_um": tuple(instances["fields_um"])}),
            **spaces,
            **patterns,
            parameters=parameters,
            floor=arrays["floor"],
            n_per_unit=config["n_per_unit"],
            per_tile=config["per_tile"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
            shifts=arrays.get("shifts"),
            r_scale=config["r_scale"],
            spot_sd=config["spot_sd"],
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        sides = ", ".join(f"{value:g}" for value in self.instances.fields_um)
        return {
            "genes": counted(self.genes),
            "members": f"{self.n_members}, head {self.head!r}",
            self.on: f"{self.instances.extractor}, squares of {sides} µm; predict with on={self.on!r}",
            **tile_facts(*self.embeddings, standardize=self.context.standardize),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training),
        }


def _within(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def _padded(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()


def _pad(values: np.ndarray, n: int, *, value: float = 0) -> np.ndarray:
    padded = np.full((n, *values.shape[1:]), value, dtype=values.dtype)
    padded[: len(values)] = values
    return padded


@dataclass(frozen=True)
class InstanceSection:
    """A section opened by a model of nuclei. As an opened section of tiles, it predicts the sums over tiles.

    - `model`: the model.
    - `within`: place of the nuclei or squares among the kept tiles.
    - `context`, `reduced`: components of tiles and of nuclei, ``float32``.
    - `strangeness`: distance of the tiles from the training tiles, ``float32 (n_tiles,)``.
    - `embedded`: embeddings of the nuclei.
    """

    model: InstanceModel
    within: contract.Within
    context: np.ndarray
    reduced: np.ndarray
    strangeness: np.ndarray
    embedded: np.ndarray

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the nuclei within spots, ordered by tile, and the tile of each."""
        rows = np.flatnonzero(self.within.inside)
        rows = rows[np.argsort(self.within.tile[rows], kind="stable")]
        return rows, self.within.tile[rows]

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of tiles, sums over their nuclei and background, ``float32 (n_members, n_rows, n_genes)``."""
        tiles = np.arange(len(self.context))[rows]
        order, tile_of = self._sorted
        first, last = np.searchsorted(tile_of, tiles), np.searchsorted(tile_of, tiles, side="right")
        most = max(1, _BLOCK // (self.model.n_members * len(self.model.genes)))
        made = []
        for part in _parts(last - first, most):
            nuclei = np.concatenate([order[first[i] : last[i]] for i in part])
            spot, spots = np.repeat(np.arange(len(part)), (last - first)[part]), tiles[part]
            of_spots = self.within.uncovered[spots], self.within.per_tile[spots]
            made.append(self.model.predict_bags(self.context[spots], self.reduced[nuclei], spot, *of_spots))
        r, p = (np.concatenate(arrays, axis=1) for arrays in zip(*made, strict=True))
        return r, p

    def background(self) -> np.ndarray:
        """Return the mean counts of the tiles' backgrounds, ``float32 (n_tiles, n_genes)``."""
        model, means = self.model, []
        for start in range(0, len(self.context), _TILES):
            rows = slice(start, start + _TILES)
            context = model.context_patterns.project(self.context[rows])
            share = self.within.uncovered[rows].astype(np.float32)
            r, p = _compiled("r_and_p_of_background")(dict(model.parameters), context, share)
            means.append(np.asarray((r * (1 - p) / p).mean(axis=0)))
        return np.concatenate(means)

    def of_instances(self) -> tuple[OpenedInstances, np.ndarray]:
        """Return the nuclei or squares as an opened section of their own, and their rows in the table."""
        rows = np.flatnonzero(self.within.tile >= 0)
        # of all rows, because a selection of the embeddings would be a copy of gigabytes
        return OpenedInstances(self, rows, self.model.features.strangeness(self.embedded)[rows]), rows


@dataclass(frozen=True)
class OpenedInstances:
    """Nuclei or squares of a section, opened by a model.

    - `section`: the section.
    - `rows`: rows of the table that have a tile.
    - `strangeness`: distance from the training nuclei, ``float32 (n_rows,)``.
    """

    section: InstanceSection
    rows: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some nuclei or squares, ``float32 (n_members, n_rows, n_genes)``."""
        section, chosen = self.section, self.rows[rows]
        tiles, spot = np.unique(section.within.tile[chosen], return_inverse=True)
        parameters, bags = section.model.bags(
            section.context[tiles], section.reduced[chosen], spot, np.zeros(len(tiles)), section.within.per_tile[tiles]
        )
        # padding has a spot of its own, which must exist
        bags = bags._replace(spot=np.minimum(bags.spot, len(bags.background) - 1))
        r, p = (np.asarray(array)[:, : len(chosen)] for array in _compiled("r_and_p_of_nuclei")(parameters, bags))
        return section.model.scaled(r, p)


def _parts(sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Split spots into runs of at most `most` nuclei, or single spots."""
    # an empty spot counts as one, so that a run has a bounded number of spots
    ends = np.cumsum(np.maximum(sizes, 1))
    parts, start = [], 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        parts.append(np.arange(start, stop))
        start = stop
    return parts


_COMPILED: dict[str, Any] = {}


def _compiled(name: str) -> Any:
    """Return a function of the heads, compiled once per process."""
    if name not in _COMPILED:
        _COMPILED[name] = jax.jit(getattr(heads, name))
    return _COMPILED[name]
