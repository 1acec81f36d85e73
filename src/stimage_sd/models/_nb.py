"""Fitted ensembles of negative binomial heads, and their files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd._shown import Facts, counted, shown
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models._certificate import Certified
from stimage_sd.models._facts import certificate_facts, interval_facts, tile_facts, training_facts
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._files import SavedModel, under
from stimage_sd.models._members import Members, training_of
from stimage_sd.models._shared_patterns import SharedPatterns
from stimage_sd.models._specification import TileSpecification, check_specification, features, specification
from stimage_sd.models._stand_ins import Embedded, MixtureStandIns, Values, embedded, in_place
from stimage_sd.nn.sharding import shard_members

HeadName = Literal["paper", "dispersion"]
#: largest number of tiles that is padded to a power of two
_BLOCK = 1 << 16


@shown
@dataclass(frozen=True)
class NBModel(Certified, SavedModel, kind="nb"):
    """An ensemble that predicts a negative binomial for every gene and tile.

    Made by `stimage_sd.tl.fit_nb`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    tiles
        Tiling and embedding that a section must have.
    features
        Space from embeddings to components.
    head
        ``"paper"`` or ``"dispersion"``.
    parameters
        The heads' arrays. The first axis is the member.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    total
        Median total count of the training tiles, which has depth 1; `None` if sections and spots have no depth.
    interval_level
        Nominal level at which the mixture's central intervals covered 90 % of held-out counts.
    training
        Record of the fit: sections, validation, seed, options, package versions, metrics.
    patterns
        Projection from components to the input of each member's head. `None` if the input is the components.
    beside
        Tiling and embedding for further extractors, whose embeddings are appended to those of the first.
    shifts
        ``float32 (2, n_genes)``: standard deviation of the log of each gene's shift in another section of a training
        patient, and in another patient. `None` if the model was fitted without exposure.
    r_scale
        Factor on r, by which held-out counts are likeliest. The mean stays.
    spot_sd
        Standard deviation of the log of the factor that all genes of a spot share, given the image.
    """

    genes: tuple[str, ...]
    tiles: TileSpecification
    features: FeatureSpace
    head: HeadName
    parameters: Mapping[str, np.ndarray]
    floor: np.ndarray
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)
    patterns: SharedPatterns | None = None
    beside: tuple[TileSpecification, ...] = ()
    shifts: np.ndarray | None = None
    r_scale: float = 1.0
    spot_sd: float = 0.0

    @property
    def n_members(self) -> int:
        """Number of members of the ensemble."""
        return len(self.parameters["bias"])

    @property
    def members(self) -> Members[NBModel]:
        """Members of the ensemble. Indexing with an int, slice or list gives a model of these members."""

        def choose(chosen: list[int]) -> NBModel:
            return replace(
                self,
                parameters={name: np.asarray(array)[chosen] for name, array in self.parameters.items()},
                patterns=None if self.patterns is None else self.patterns.of(chosen),
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
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        extractors = "+".join(tiles.extractor for tiles in self.embeddings)
        return {"extractor": extractors, "head": self.head, "n_members": self.n_members}

    @property
    def embeddings(self) -> tuple[TileSpecification, ...]:
        """Tiling and embedding that a section must have for each extractor, in the order of the features."""
        return (self.tiles, *self.beside)

    def open(self, sdata: SpatialData, *, section: str) -> NBSection:
        """Check that a section matches the model, and project its embeddings to the heads' space.

        Parameters
        ----------
        sdata
            The section.
        section
            Name of the section, for error messages.

        Returns
        -------
        The opened section. Its `r_and_p` gives the predictions.

        Raises
        ------
        KeyError
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining differ from the model's. The error names the step to run again.
        """
        self._check(sdata, section)
        parts = [features(sdata, tiles) for tiles in self.embeddings]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        scale = self.features.scale(values, section=section)
        return NBSection(self, self.features.reduce(values, scale), self.features.strangeness(values))

    def stand_ins(self, sdata: SpatialData, *, section: str) -> MixtureStandIns:
        """Open a section, as `open` does, so that other tiles can replace one of its tiles."""
        self._check(sdata, section)
        return self.stand_ins_of(tuple(embedded(sdata, tiles) for tiles in self.embeddings))

    def stand_ins_of(self, section: tuple[Embedded, ...]) -> MixtureStandIns:
        """Return stand-ins for a section whose embeddings are given."""
        values = np.concatenate([part for one in section for part in (one.own, one.context)], axis=1)
        scale = self.features.scale(values)

        def r_and_p(row: int, own: Sequence[Values]) -> tuple[Values, Values]:
            return self._heads(self.features.reduce(in_place(section, row, own), scale))

        return MixtureStandIns(section, self.member_weights.astype(np.float32), r_and_p)

    def _check(self, sdata: SpatialData, section: str) -> None:
        for expected in self.embeddings:
            stated = specification(sdata, expected.extractor, context=expected.context_rings > 0)
            check_specification(stated, expected, section=section)

    def r_and_p(self, reduced: np.ndarray, *, members: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the parameters of the negative binomials.

        Parameters
        ----------
        reduced
            ``float32 (n_tiles, n_components)`` from ``features.reduce``.
        members
            Indices of the members. Default: all.

        Returns
        -------
        r and p, each ``float32 (n_members, n_tiles, n_genes)``.
        """
        r, p = self._heads(reduced, members=members)
        return np.asarray(r), np.asarray(p)

    def _heads(self, reduced: Values, *, members: Sequence[int] | None = None) -> tuple[jax.Array, jax.Array]:
        """Return r and p as JAX arrays, which can be differentiated."""
        chosen = dict(self.parameters)
        if members is not None:
            chosen = {name: array[list(members)] for name, array in chosen.items()}
        seen = reduced if self.patterns is None else self.patterns.project(reduced, members=members)
        r, p = _r_and_p(self.head)(shard_members(chosen), seen)
        return (r, p) if self.r_scale == 1 else (self.r_scale * r, self.r_scale * p / (1 + (self.r_scale - 1) * p))

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config = {
            "genes": list(self.genes),
            "tiles": asdict(self.tiles),
            "beside": [asdict(tiles) for tiles in self.beside],
            "head": self.head,
            "standardize": self.features.standardize,
            "total": self.total,
            "interval_level": self.interval_level,
            "r_scale": self.r_scale,
            "spot_sd": self.spot_sd,
            "training": self.training,
        }
        arrays = {f"head.{name}": np.asarray(array) for name, array in self.parameters.items()}
        if self.patterns is not None:
            arrays |= {"patterns.basis": self.patterns.basis, "patterns.center": self.patterns.center}
        if self.shifts is not None:
            arrays["shifts"] = self.shifts
        return config, {**arrays, **self.features.arrays(), "floor": self.floor}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> NBModel:
        """Build a model from what `to_parts` returned."""
        parameters = under("head.", arrays)
        n_genes = len(config["genes"])
        if config["head"] not in HEADS or arrays["floor"].shape != (2, n_genes):
            raise KeyError(f"head {config['head']!r} with a floor of shape {arrays['floor'].shape} for {n_genes} genes")
        shifts = arrays.get("shifts")
        if shifts is not None and shifts.shape != (2, n_genes):
            raise KeyError(f"shifts of shape {shifts.shape} for {n_genes} genes")
        n_components, n_members = arrays["features.components"].shape[1], len(parameters["bias"])
        if config["total"] is not None and "size_factors" not in config["training"].get("options", {}):
            warnings.warn(
                "The model was fitted with size factors by a version that multiplied r by depth. Its intervals at a "
                "spot's measured depth are wrong. Fit it again.",
                stacklevel=2,
            )
        patterns = _patterns(arrays, n_members=n_members, n_components=n_components)
        n_features = n_components if patterns is None else patterns.rank
        expected = _parameter_shapes(config["head"], n_members, n_features, n_genes)
        shapes = {name: array.shape for name, array in parameters.items()}
        if shapes != expected:
            raise KeyError(f"arrays of the head {config['head']!r} are {shapes}, expected {expected}")
        if config["standardize"] not in get_args(Standardize):
            raise KeyError(f"standardize is {config['standardize']!r}, expected one of {get_args(Standardize)}")
        return cls(
            genes=tuple(config["genes"]),
            tiles=TileSpecification.of(config["tiles"]),
            beside=tuple(map(TileSpecification.of, config.get("beside", ()))),
            features=FeatureSpace.from_arrays(arrays, standardize=config["standardize"]),
            head=config["head"],
            parameters=parameters,
            floor=arrays["floor"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
            patterns=patterns,
            shifts=shifts,
            r_scale=config.get("r_scale", 1.0),
            spot_sd=config.get("spot_sd", 0.0),
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        return {
            "genes": counted(self.genes),
            "members": f"{self.n_members}, head {self.head!r}",
            **tile_facts(*self.embeddings, standardize=self.features.standardize),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training),
        }


@dataclass(frozen=True)
class NBSection:
    """A section whose embeddings are projected to the space of a model's heads.

    - `model`: the model.
    - `reduced`: components of the tiles, ``float32 (n_tiles, n_components)``.
    - `strangeness`: distance from the training tiles, ``float32 (n_tiles,)``.
    """

    model: NBModel
    reduced: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some tiles, each ``float32 (n_members, n_rows, n_genes)``."""
        chosen = self.reduced[rows]
        # padded to a few sizes, so that JAX compiles the head only for these sizes
        size = min(_BLOCK, 1 << max(len(chosen) - 1, 1).bit_length())
        padded = np.zeros((max(size, len(chosen)), chosen.shape[1]), dtype=np.float32)
        padded[: len(chosen)] = chosen
        r, p = self.model.r_and_p(padded)
        return r[:, : len(chosen)], p[:, : len(chosen)]


def _patterns(arrays: Mapping[str, np.ndarray], *, n_members: int, n_components: int) -> SharedPatterns | None:
    """Return the patterns of a model file, or `None` if the model has no patterns."""
    if "patterns.basis" not in arrays:
        return None
    patterns = SharedPatterns(arrays["patterns.basis"], arrays["patterns.center"])
    if patterns.basis.shape[:2] != (n_members, n_components) or patterns.center.shape != (n_members, n_components):
        raise KeyError(
            f"patterns of shapes {patterns.basis.shape} and {patterns.center.shape} for {n_members} members and "
            f"{n_components} components"
        )
    return patterns


def _parameter_shapes(head: str, n_members: int, n_features: int, n_genes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a head's arrays, from the head's `initial`."""
    ones = np.ones(n_genes)
    initial = partial(HEADS[head].initial, mean=ones, dispersion=ones, n_members=n_members, n_features=n_features)
    return {name: array.shape for name, array in jax.eval_shape(initial, jax.random.key(0)).items()}


_COMPILED: dict[str, Any] = {}


def _r_and_p(head: str) -> Any:
    """Return the head's function, compiled once per process."""
    if head not in _COMPILED:
        _COMPILED[head] = jax.jit(HEADS[head].r_and_p)
    return _COMPILED[head]
