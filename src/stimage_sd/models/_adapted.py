"""Fitted models adapted to one patient by a few measured spots, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stimage_sd._shown import Facts, shown
from stimage_sd.models._certificate import Certified, without_certificate
from stimage_sd.models._facts import certificate_facts, facts_of, interval_facts
from stimage_sd.models._files import SavedModel, model_from, parts_of, under
from stimage_sd.models._members import Members
from stimage_sd.models._predictor import OpenedBags, OpenedSection, Predictor, spot_sd
from stimage_sd.models._stand_ins import Explainable, MixtureStandIns, Values


@shown
@dataclass(frozen=True)
class AdaptedModel(Certified, SavedModel, kind="adapted"):
    """A model whose depth and gene shifts were updated by measurements of one section or patient.

    Made by `stimage_sd.tl.adapt`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    base
        The model before.
    factors
        Factor on the mean of each gene, ``float32 (n_genes,)``. It contains the section's depth.
    shifts
        ``float32 (2, n_genes)``: standard deviation of the log of each gene's shift that the measurements leave. Both
        rows are equal, since the model is for this section.
    total
        Total count at a depth of 1, which is now the depth of the section.
    interval_level
        Nominal level of the intervals.
    training
        Record of the fit, with ``training["adaptation"]``.
    """

    base: Predictor
    factors: np.ndarray
    shifts: np.ndarray
    total: float
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the genes, in the order of every array's last axis."""
        return self.base.genes

    @property
    def floor(self) -> np.ndarray:
        """Mean and dispersion of the mean-only fit, at the depth and with the gene factors of the section."""
        mean, dispersion = self.base.floor
        return np.stack([mean * self.factors, dispersion]).astype(np.float32)

    @property
    def spot_sd(self) -> float:
        """Standard deviation of the log of what all genes of a spot share."""
        return spot_sd(self.base)

    @property
    def members(self) -> Members[AdaptedModel]:
        """Members of the ensemble. Indexing with an int, slice or list gives a model of these members."""
        base: Any = self.base
        training = without_certificate(self.training)
        return Members(
            len(self.member_weights), lambda chosen: replace(self, base=base.members[chosen], training=training)
        )

    @property
    def member_weights(self) -> np.ndarray:
        """Weight of each member in the mixture, ``float64 (n_members,)``."""
        return self.base.member_weights

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        return {**self.base.description, "adapted_to": str(self.training["adaptation"]["section"])}

    def open(self, sdata: SpatialData, *, section: str) -> AdaptedSection:
        """Check that a section matches the model, and read the model's inputs from it.

        Raises
        ------
        KeyError
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining differ from the model's. The error names the step to run again.
        """
        opened = self.base.open(sdata, section=section)
        kind_of = AdaptedBags if isinstance(opened, OpenedBags) else AdaptedSection
        return kind_of(opened, self.factors.astype(np.float64), opened.strangeness)

    def stand_ins(self, sdata: SpatialData, *, section: str) -> MixtureStandIns:
        """Open a section, as `open` does, so that other tiles can replace one of its tiles.

        Raises
        ------
        TypeError
            If the model before does not predict from embeddings.
        """
        base: Any = self.base
        before: Any = base.stand_ins(sdata, section=section) if isinstance(base, Explainable) else None
        if not isinstance(before, MixtureStandIns):
            raise TypeError(f"Expected a model that predicts by a tile's embeddings, found a {type(base).__name__}.")

        def r_and_p(row: int, own: Sequence[Values]) -> tuple[Values, Values]:
            r, p = before.r_and_p(row, own)
            return r, _with_factors(p, self.factors)

        return replace(before, r_and_p=r_and_p)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        base, arrays = parts_of(self.base, "base.")
        config = {
            "base": base,
            "total": self.total,
            "interval_level": self.interval_level,
            "training": self.training,
        }
        return config, {**arrays, "factors": self.factors, "shifts": self.shifts}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> AdaptedModel:
        """Build a model from what `to_parts` returned."""
        base = model_from(config["base"], under("base.", arrays))
        n_genes = len(base.genes)
        if arrays["factors"].shape != (n_genes,) or arrays["shifts"].shape != (2, n_genes):
            raise KeyError(f"factors of shape {arrays['factors'].shape} for {n_genes} genes")
        return cls(
            base=base,
            factors=arrays["factors"],
            shifts=arrays["shifts"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        how = self.training["adaptation"]
        return {
            "adapted to": f"{how['section']!r} by {how['measured']}",
            "base": type(self.base).__name__,
            **facts_of(self.base),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
        }


@dataclass(frozen=True)
class AdaptedSection:
    """A section opened by the model before, with the factors of genes."""

    opened: OpenedSection
    factors: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some tiles at the adapted depth and shifts; p is ``float64``."""
        r, p = self.opened.r_and_p(rows)
        return r, np.asarray(_with_factors(p.astype(np.float64), self.factors))


@dataclass(frozen=True)
class AdaptedBags(AdaptedSection):
    """A section opened by an adapted model of nuclei or squares."""

    opened: Any

    def background(self) -> np.ndarray:
        """Return the mean counts of the tiles' backgrounds."""
        return np.asarray(self.opened.background() * self.factors, dtype=np.float32)

    def of_instances(self) -> tuple[AdaptedSection, np.ndarray]:
        """Return the nuclei or squares as an opened section, and their rows in the table."""
        inner, rows = self.opened.of_instances()
        return AdaptedSection(inner, self.factors, inner.strangeness), rows


def _with_factors(p: Values, factors: np.ndarray) -> Values:
    """Multiply the odds of failure by a factor per gene, which multiplies the mean and keeps r."""
    return p / (p + factors * (1 - p))
