"""Fitted elastic-net classifiers of genes (High or Low), and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import scipy.special
from spatialdata import SpatialData

from stimage_sd._shown import Facts, counted, shown
from stimage_sd.models._facts import tile_facts, training_facts
from stimage_sd.models._features import FeatureSpace, SectionScale, Standardize
from stimage_sd.models._files import SavedModel
from stimage_sd.models._specification import TileSpecification, check_specification, features, specification
from stimage_sd.models._stand_ins import ClassStandIns, Values, embedded, in_place


@shown
@dataclass(frozen=True)
class GeneClassifier(SavedModel, kind="gene_classifier"):
    """A classifier of genes as High or Low, with one logistic regression per gene on the tile's embedding.

    Made by `stimage_sd.tl.fit_gene_classifier`, loaded by `stimage_sd.models.load`. A gene is High on a tile if the
    z-score of its log1p count is above zero.

    Attributes
    ----------
    genes
        Names of the genes, in the order of the coefficients' rows.
    tiles
        Tiling and embedding that a section must have.
    features
        Mean and deviation of the embeddings, and principal components if the embeddings are reduced.
        ``features.standardize`` selects the mean of the section or of the cohort, for embeddings and z-scores.
    coefficients
        ``float32 (n_genes, n_features)``.
    intercepts
        ``float32 (n_genes,)``. Minus infinity for a gene that was constant in training, because it is never High.
    thresholds
        ``float64 (n_genes,)``: mean log1p count over the training tiles. A gene is High above its threshold if the
        cohort is standardized as one. Sections that are standardized by themselves use their own means.
    base_rates
        ``float32 (n_genes,)``: share of the training tiles on which the gene is High.
    training
        Record of the fit: sections, solver, options, package versions, convergence.
    """

    genes: tuple[str, ...]
    tiles: TileSpecification
    features: FeatureSpace
    coefficients: np.ndarray
    intercepts: np.ndarray
    thresholds: np.ndarray
    base_rates: np.ndarray
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        return {"extractor": self.tiles.extractor, "standardize": self.features.standardize}

    def probabilities(self, sdata: SpatialData, *, section: str) -> tuple[np.ndarray, np.ndarray]:
        """Predict the probability of High for every gene on a section's kept tiles, and the tiles' strangeness.

        Parameters
        ----------
        sdata
            The section.
        section
            Name of the section, for error messages.

        Returns
        -------
        Probabilities ``float32 (n_tiles, n_genes)``, and strangeness ``float32 (n_tiles,)``. Above 1, a tile is farther
        from the training tiles than 95 % of them.

        Raises
        ------
        KeyError
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining differ from the model's. The error names the step to run again.
        """
        self._check(sdata, section)
        values = features(sdata, self.tiles)
        scale = self.features.scale(values, section=section)
        probabilities = scipy.special.expit(self._margins(values, scale)).astype(np.float32)
        return probabilities, self.features.strangeness(values)

    def stand_ins(self, sdata: SpatialData, *, section: str) -> ClassStandIns:
        """Open a section, as `probabilities` does, so that other tiles can replace one of its tiles."""
        self._check(sdata, section)
        stored = embedded(sdata, self.tiles)
        scale = self.features.scale(np.concatenate([stored.own, stored.context], axis=1))

        def margins(row: int, embeddings: Sequence[Values]) -> Values:
            return self._margins(in_place((stored,), row, embeddings), scale)

        return ClassStandIns((stored,), margins)

    def _check(self, sdata: SpatialData, section: str) -> None:
        stated = specification(sdata, self.tiles.extractor, context=self.tiles.context_rings > 0)
        check_specification(stated, self.tiles, section=section)

    def _margins(self, values: Values, scale: SectionScale | None = None) -> Values:
        """Return log odds of High for a whole section, or for any tiles if the scale of their section is given."""
        return brought(self.features, values, scale) @ self.coefficients.T + self.intercepts

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config = {
            "genes": list(self.genes),
            "tiles": asdict(self.tiles),
            "standardize": self.features.standardize,
            "training": self.training,
        }
        arrays = {name: getattr(self, name) for name in ("coefficients", "intercepts", "thresholds", "base_rates")}
        return config, {**arrays, **self.features.arrays()}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> GeneClassifier:
        """Build a model from what `to_parts` returned."""
        if config["standardize"] not in get_args(Standardize):
            raise KeyError(f"standardize is {config['standardize']!r}, expected one of {get_args(Standardize)}")
        space = FeatureSpace.from_arrays(arrays, standardize=config["standardize"])
        n_genes = len(config["genes"])
        n_features = space.components.shape[1] if space.components.size else len(space.mean)
        expected = {
            "coefficients": (n_genes, n_features),
            "intercepts": (n_genes,),
            "thresholds": (n_genes,),
            "base_rates": (n_genes,),
        }
        shapes = {name: arrays[name].shape for name in expected}
        if shapes != expected:
            raise KeyError(f"arrays of the classifier are {shapes}, expected {expected}")
        return cls(
            genes=tuple(config["genes"]),
            tiles=TileSpecification.of(config["tiles"]),
            features=space,
            training=dict(config["training"]),
            **{name: arrays[name] for name in expected},
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        return {
            "genes": counted(self.genes),
            "predicts": "High or Low for every gene, with a probability",
            **tile_facts(self.tiles, standardize=self.features.standardize),
            **training_facts(self.training),
        }


def brought(space: FeatureSpace, values: Values, scale: SectionScale | None = None) -> Values:
    """Standardize embeddings for the classifier, and reduce them if the space has components."""
    return space.reduce(values, scale) if space.components.size else space.standardized(values, scale)


def is_high(counts: np.ndarray, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Return where genes are High: log1p counts above thresholds, or above their means (z-score above zero).

    - `counts`: ``(n_tiles, n_genes)``.
    - `thresholds`: ``(n_genes,)`` of log1p counts. `None`: the mean of each gene, and constant genes are never High.
    - returns: ``bool (n_tiles, n_genes)``.
    """
    logged = np.log1p(np.asarray(counts, dtype=np.float64))
    if thresholds is not None:
        return logged > thresholds
    # the mean of equal numbers can be rounded below these numbers
    return (logged > logged.mean(axis=0)) & (logged.max(axis=0) > logged.min(axis=0))
