"""Mixtures of several fitted models, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from spatialdata import SpatialData

from stimage_sd._shown import Facts, counted, shown
from stimage_sd.models._certificate import Certified, without_certificate
from stimage_sd.models._facts import certificate_facts, interval_facts, training_facts
from stimage_sd.models._files import SavedModel, model_from, parts_of, under
from stimage_sd.models._members import Members
from stimage_sd.models._predictor import OpenedSection, Predictor, gene_shifts, spot_sd
from stimage_sd.models._stand_ins import Explainable, MixtureStandIns, Values


@shown
@dataclass(frozen=True)
class CombinedModel(Certified, SavedModel, kind="combined"):
    """A mixture of fitted models, such as one model per extractor.

    Made by `stimage_sd.tl.combine`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    genes
        Genes that all models predict.
    parts
        The models.
    weights
        Weight of each model. Weights are not negative and sum to 1. The members of a model share its weight. The
        variance of the mixture is the mean of the members' variances plus the variance of all members' means, so it
        covers differences within and between models.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit. If the models were trained on different
        counts, it is the weighted mean of their floors.
    total
        Total count at a depth of 1, the same for all models; `None` if sections and spots have no depth.
    interval_level
        Nominal level of the intervals. It is the mean of the models' levels until `stimage_sd.tl.calibrate` sets it.
    training
        Names of the training sections of all models, and how the weights were found.
    """

    genes: tuple[str, ...]
    parts: tuple[Predictor, ...]
    weights: tuple[float, ...]
    floor: np.ndarray
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def shifts(self) -> np.ndarray | None:
        """Standard deviations of gene shifts, ``(2, n_genes)``. Their variance is the models' weighted mean."""
        shifts = [gene_shifts(part) for part in self.parts]
        known = [one[:, chosen] for one, chosen in zip(shifts, self._columns(), strict=True) if one is not None]
        return np.sqrt(np.tensordot(self.weights, np.square(known), axes=1)) if len(known) == len(shifts) else None

    @property
    def spot_sd(self) -> float:
        """Standard deviation of the log of what all genes of a spot share: the models' weighted mean variance."""
        return float(np.sqrt(np.dot(self.weights, [spot_sd(part) ** 2 for part in self.parts])))

    @property
    def members(self) -> Members[CombinedModel]:
        """Members of all models, in the order of `member_weights`. Indexing gives a model of some of them.

        A model keeps the share of its weight that its chosen members have. Models without chosen members are left out.
        """
        weights = self.member_weights
        model_of = np.repeat(np.arange(len(self.parts)), [len(part.member_weights) for part in self.parts])
        first = np.searchsorted(model_of, np.arange(len(self.parts)))

        def choose(chosen: list[int]) -> CombinedModel:
            within: dict[int, list[int]] = {}
            for member in sorted(chosen):
                within.setdefault(int(model_of[member]), []).append(member - int(first[model_of[member]]))
            shares = [float(weights[[first[part] + one for one in members]].sum()) for part, members in within.items()]
            if not sum(shares) > 0:
                raise ValueError(f"Expected members with a weight above 0, found {chosen}.")
            parts: list[Any] = [self.parts[part] for part in within]
            return replace(
                self,
                parts=tuple(part.members[members] for part, members in zip(parts, within.values(), strict=True)),
                weights=tuple(share / sum(shares) for share in shares),
                training=without_certificate(self.training),
            )

        return Members(len(weights), choose)

    @property
    def member_weights(self) -> np.ndarray:
        """Weight of each member of each model in the mixture, ``float64 (n_members,)``."""
        return np.concatenate(
            [weight * np.asarray(part.member_weights) for weight, part in zip(self.weights, self.parts, strict=True)]
        )

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        about = [part.description for part in self.parts]
        return {
            "extractor": " + ".join(dict.fromkeys(str(one.get("extractor", "none")) for one in about)),
            "head": " + ".join(dict.fromkeys(str(one.get("head", "none")) for one in about)),
            "n_members": len(self.member_weights),
            "n_models": len(self.parts),
            "weights": list(self.weights),
        }

    def open(self, sdata: SpatialData, *, section: str) -> CombinedSection:
        """Open a section with each model.

        Parameters
        ----------
        sdata
            The section, tiled once and embedded with every model's extractor.
        section
            Name of the section, for error messages.

        Returns
        -------
        The opened section. Its `r_and_p` gives the predictions.

        Raises
        ------
        KeyError
            If the section was not tiled, or not embedded with one of the extractors.
        ValueError
            If tiles, embeddings or staining differ from those of a model. The error names the step to run.
        """
        opened = tuple(part.open(sdata, section=section) for part in self.parts)
        counts = {len(one.strangeness) for one in opened}
        if len(counts) > 1:
            raise ValueError(
                f"The models see {sorted(counts)} tiles in section {section!r}, expected the same: tile it once, then "
                "embed it with every extractor."
            )
        strangeness = np.tensordot(self.weights, np.stack([one.strangeness for one in opened]), axes=1)
        return CombinedSection(opened, self._columns(), strangeness.astype(np.float32))

    def stand_ins(self, sdata: SpatialData, *, section: str) -> MixtureStandIns:
        """Open a section with each model, so that other tiles can replace one of its tiles.

        Raises
        ------
        TypeError
            If one of the models does not predict from embeddings.
        """
        other = [type(part).__name__ for part in self.parts if not isinstance(part, Explainable)]
        if other:
            raise TypeError(
                f"Expected models that predict by a tile's embeddings, found {', '.join(other)} among them."
            )
        opened = [part.stand_ins(sdata, section=section) for part in self.parts if isinstance(part, Explainable)]
        mixtures = [one for one in opened if isinstance(one, MixtureStandIns)]
        ends = np.cumsum([len(one.embedded) for one in mixtures])

        def r_and_p(row: int, own: Sequence[Values]) -> tuple[Values, Values]:
            pairs = [
                one.r_and_p(row, own[end - len(one.embedded) : end]) for one, end in zip(mixtures, ends, strict=True)
            ]
            r, p = (
                jnp.concatenate([pair[which][..., chosen] for pair, chosen in zip(pairs, self._columns(), strict=True)])
                for which in (0, 1)
            )
            return r, p

        together = tuple(stored for one in mixtures for stored in one.embedded)
        return MixtureStandIns(together, self.member_weights.astype(np.float32), r_and_p)

    def _columns(self) -> tuple[np.ndarray, ...]:
        """Return the indices of the combination's genes in each model."""
        places = [{gene: index for index, gene in enumerate(part.genes)} for part in self.parts]
        return tuple(np.array([place[gene] for gene in self.genes]) for place in places)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        parts = [parts_of(part, f"part{place}.") for place, part in enumerate(self.parts)]
        config = {
            "genes": list(self.genes),
            "parts": [config for config, _ in parts],
            "weights": list(self.weights),
            "total": self.total,
            "interval_level": self.interval_level,
            "training": self.training,
        }
        return config, {"floor": self.floor, **{name: array for _, arrays in parts for name, array in arrays.items()}}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CombinedModel:
        """Build a model from what `to_parts` returned."""
        parts = [model_from(part, under(f"part{place}.", arrays)) for place, part in enumerate(config["parts"])]
        genes, weights = tuple(config["genes"]), tuple(map(float, config["weights"]))
        if len(weights) != len(parts) or arrays["floor"].shape != (2, len(genes)):
            raise KeyError(f"{len(weights)} weights of {len(parts)} models, floor of shape {arrays['floor'].shape}")
        absent = [gene for part in parts for gene in genes if gene not in set(part.genes)]
        if not parts or absent:
            raise KeyError(f"{len(parts)} models, of which some lack {absent[:5]}")
        return cls(
            genes=genes,
            parts=tuple(parts),
            weights=weights,
            floor=arrays["floor"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        parts = {
            f"model {number}": f"{weight:.2f} of {type(part).__name__}, head {part.description.get('head', 'none')}, "
            f"on {part.description.get('extractor', 'none')}, {len(part.member_weights)} members"
            for number, (weight, part) in enumerate(zip(self.weights, self.parts, strict=True), start=1)
        }
        return {
            "genes": counted(self.genes),
            "members": str(len(self.member_weights)),
            **parts,
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training),
        }


@dataclass(frozen=True)
class CombinedSection:
    """A section opened by each model of a combination.

    - `opened`: the section, opened by each model.
    - `columns`: indices of the combination's genes in each model.
    - `strangeness`: ``float32 (n_tiles,)``: weighted mean of the models' strangeness.
    """

    opened: Sequence[OpenedSection]
    columns: Sequence[np.ndarray]
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of all models for some tiles, each ``float32 (n_members, n_rows, n_genes)``."""
        pairs = [one.r_and_p(rows) for one in self.opened]
        r, p = (
            np.concatenate([pair[which][:, :, chosen] for pair, chosen in zip(pairs, self.columns, strict=True)])
            for which in (0, 1)
        )
        return r, p
