"""What a recipe is: hyperparameters, a fit that gives arrays, and means from those arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from stimage_sd.nn.mean_only import fit_mean_only

#: what of a section a recipe looks at
Need = Literal["embeddings", "positions", "pixels"]
Target = Literal["log1p", "lognorm"]
Arrays = Mapping[str, np.ndarray]
#: groups of sections, or parts of a single one, that are left out in turn
MOST_FOLDS = 5


@dataclass(frozen=True)
class SectionData:
    """What a recipe sees of a section: all its kept tiles, no counts.

    Attributes
    ----------
    embeddings
        ``float32 (n_tiles, n_features)`` by each extractor.
    positions
        ``float64 (n_tiles, 2)``: x and y of the tiles' centres in pixels.
    pixels
        ``uint8 (n_tiles, pixels_px, pixels_px, 3)`` for a recipe that needs them, of its attribute `pixels_px`.
    """

    embeddings: tuple[np.ndarray, ...]
    positions: np.ndarray
    pixels: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class TrainingSection(SectionData):
    """A section to learn from.

    Attributes
    ----------
    rows
        ``int (n_measured,)``: the tiles that sit on a spot and may be learnt from.
    counts
        ``(n_measured, n_genes)`` sparse.
    totals
        ``float64 (n_measured,)``: total count of each, over all genes that were measured.
    """

    rows: np.ndarray
    counts: sp.csr_matrix
    totals: np.ndarray

    def only(self, chosen: np.ndarray) -> TrainingSection:
        """The same section, with some of the measured tiles to learn from (a mask or numbers)."""
        return replace(self, rows=self.rows[chosen], counts=self.counts[chosen], totals=self.totals[chosen])


@runtime_checkable
class Recipe(Protocol):
    """A model's hyperparameters: a frozen dataclass of plain values, with these functions.

    A recipe keeps nothing that it learns: `fit` returns arrays, and `mean` takes them. Arrays and hyperparameters
    are what is saved.

    Attributes
    ----------
    name
        Its name in model files; one of `RECIPES`.
    needs
        What of a section it looks at. One that needs ``"pixels"`` has an attribute `pixels_px` too: the side that tiles
        are resized to.
    target
        What means are fitted to: ``"log1p"`` of counts as they are; ``"lognorm"``: of counts of a spot scaled to a
        common total, so that depth is no part of what is predicted.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @property
    def target(self) -> Target:
        """``"log1p"`` or ``"lognorm"``."""
        ...

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Learn from sections.

        Parameters
        ----------
        sections
            At least one.
        seed
            Seed of everything random.

        Returns
        -------
        What was learnt, by name.
        """
        ...

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Predict the mean counts of all tiles of a section, ``float32 (n_tiles, n_genes)``, positive.

        Of a recipe whose target is ``"lognorm"``, the mean counts of tiles whose total is the training tiles' median.
        """
        ...


def recipes() -> dict[str, type[Any]]:
    """The recipes by the names they have in model files."""
    from stimage_sd.models.baselines import (
        IGIDL,
        Hist2ST,
        HisToGene,
        MeanOnly,
        NearestTiles,
        Retrieval,
        Ridge,
        STnet,
        THItoGene,
        ViTNB,
    )

    known = (HisToGene, Hist2ST, IGIDL, MeanOnly, NearestTiles, Retrieval, Ridge, STnet, THItoGene, ViTNB)
    return {recipe.name: recipe for recipe in known}


def options(recipe: Recipe) -> dict[str, Any]:
    """A recipe's hyperparameters, as JSON holds them."""
    return {item.name: getattr(recipe, item.name) for item in fields(recipe)}  # type: ignore[arg-type]


def check_positive(recipe: Any, *names: str) -> None:
    """Raise `ValueError` where hyperparameters are not whole numbers of at least 1."""
    for name in names:
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"Expected `{name}` of {type(recipe).__name__} to be an integer of 1 or more, got {value!r}."
            )


def check_positive_number(recipe: Any, name: str) -> None:
    """Raise `ValueError` where a hyperparameter is not above 0."""
    if not getattr(recipe, name) > 0:
        raise ValueError(f"Expected `{name}` of {type(recipe).__name__} to be above 0, got {getattr(recipe, name)!r}.")


def check_choice(recipe: Any, name: str, choices: Sequence[str]) -> None:
    """Raise `ValueError` where a hyperparameter is none of some words."""
    if getattr(recipe, name) not in choices:
        raise ValueError(
            f"Expected `{name}` of {type(recipe).__name__} to be one of {list(choices)}, got {getattr(recipe, name)!r}."
        )


# --------------------------------------------------------------------------------------------------
# counts and what regressions are fitted to


#: total that counts are scaled to before the logarithm, of target "lognorm": counts per million
LOGNORM_TOTAL = 1e6


def targets(sections: Sequence[TrainingSection], target: Target) -> np.ndarray:
    """Logarithms of the counts, ``float32 (n_measured, n_genes)`` of all sections, in their order."""
    blocks = []
    for section in sections:
        counts = section.counts.toarray().astype(np.float64)
        if target == "lognorm":
            counts *= LOGNORM_TOTAL / np.maximum(section.totals, 1)[:, None]
        blocks.append(np.log1p(counts))
    return np.concatenate(blocks).astype(np.float32)


def median_total(sections: Sequence[TrainingSection]) -> float:
    """Median of the measured tiles' total counts."""
    return max(float(np.median(np.concatenate([section.totals for section in sections]))), 1.0)


def count_scale(sections: Sequence[TrainingSection], target: Target) -> np.ndarray:
    """What brings the exponentials of targets to counts, ``float32 (1,)``."""
    scale = 1.0 if target == "log1p" else median_total(sections) / LOGNORM_TOTAL
    return np.array([scale], dtype=np.float32)


def floor(sections: Sequence[TrainingSection], target: Target) -> np.ndarray:
    """Mean and dispersion of the mean-only fit, ``float32 (2, n_genes)``."""
    counts = sp.vstack([section.counts for section in sections]).tocsr()
    totals = np.concatenate([section.totals for section in sections])
    factors = None if target == "log1p" else np.maximum(totals / median_total(sections), 1e-3)
    fit = fit_mean_only(counts, factors)
    # a gene never seen in training may still be seen later: half a count in all tiles together
    mean = np.maximum(fit.mean, 0.5 / counts.shape[0])
    dispersion = np.clip(np.nan_to_num(fit.r, nan=1.0, posinf=1e4), 1e-3, 1e4)
    return np.stack([mean, dispersion]).astype(np.float32)


def as_counts(logarithms: np.ndarray, scale: np.ndarray, floor_mean: np.ndarray) -> np.ndarray:
    """Means from predicted logarithms; no less than a thousandth of a gene's own mean, as a mean is positive."""
    return np.maximum(np.expm1(np.minimum(logarithms, 25.0)) * scale, 1e-3 * floor_mean).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# parts that are left out in turn


class Fold:
    """Sections to learn from, and those that are left out with their measured tiles."""

    def __init__(self, train: list[TrainingSection], test: list[TrainingSection]) -> None:
        self.train, self.test = train, test


def folds(sections: Sequence[TrainingSection]) -> Iterator[Fold]:
    """Leave each section out in turn; of a single one, the strips of it from left to right."""
    if len(sections) > 1:
        n_folds = min(MOST_FOLDS, len(sections))
        for fold in range(n_folds):
            yield Fold(
                [section for number, section in enumerate(sections) if number % n_folds != fold],
                [section for number, section in enumerate(sections) if number % n_folds == fold],
            )
        return
    (section,) = sections
    order = np.argsort(section.positions[section.rows, 0], kind="stable")
    for strip in np.array_split(order, min(MOST_FOLDS, len(order))):
        held = np.zeros(len(order), dtype=bool)
        held[strip] = True
        if held.all():
            raise ValueError(f"Expected two measured tiles or more to learn from, found {len(order)}.")
        yield Fold([section.only(~held)], [section.only(held)])
