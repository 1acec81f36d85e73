"""Interface of recipes: hyperparameters, a fit that returns arrays, and a prediction of means from the arrays."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from stimage_sd.likelihood import depth, mean_only

#: inputs of a recipe
Need = Literal["embeddings", "positions", "pixels"]
Target = Literal["log1p", "lognorm"]
Arrays = Mapping[str, np.ndarray]
#: maximum number of folds, which are groups of sections or strips of a single section
MOST_FOLDS = 5


@dataclass(frozen=True)
class SectionData:
    """Input of a recipe for one section: all kept tiles, without counts.

    Attributes
    ----------
    embeddings
        ``float32 (n_tiles, n_features)`` for each extractor.
    positions
        ``float64 (n_tiles, 2)``: x and y of the tiles' centers in pixels.
    pixels
        ``uint8 (n_tiles, pixels_px, pixels_px, 3)`` for recipes that need pixels. The recipe sets `pixels_px`.
    name
        Name of the section, for error messages.
    """

    embeddings: tuple[np.ndarray, ...]
    positions: np.ndarray
    pixels: np.ndarray | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class TrainingSection(SectionData):
    """Training data of one section.

    Attributes
    ----------
    rows
        ``int (n_measured,)``: indices of the training tiles, which sit on a spot.
    counts
        ``(n_measured, n_genes)`` sparse.
    totals
        ``float64 (n_measured,)``: total count per tile over all measured genes.
    """

    rows: np.ndarray
    counts: sp.csr_matrix
    totals: np.ndarray

    def only(self, chosen: np.ndarray) -> TrainingSection:
        """Return the section with a subset of its measured tiles, given by a mask or by indices."""
        return replace(self, rows=self.rows[chosen], counts=self.counts[chosen], totals=self.totals[chosen])


@runtime_checkable
class Recipe(Protocol):
    """Hyperparameters of a model, a frozen dataclass of plain values with `fit` and `mean`.

    A recipe has no state. `fit` returns arrays, and `mean` takes them. Model files hold the arrays and the
    hyperparameters.

    Attributes
    ----------
    name
        Name in model files, one of `recipes`.
    needs
        Inputs of the recipe. A recipe that needs ``"pixels"`` also has an attribute `pixels_px`, the side in px that
        tiles are resized to.
    target
        Values that means are fitted to. ``"log1p"``: log1p of raw counts. ``"lognorm"``: log1p of counts scaled to a
        common total per spot, so that depth is not predicted.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @property
    def target(self) -> Target:
        """``"log1p"`` or ``"lognorm"``."""
        ...

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Fit the model on sections.

        Parameters
        ----------
        sections
            At least one section.
        seed
            Seed of all random numbers.

        Returns
        -------
        Learned arrays by name.
        """
        ...

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Predict the mean counts of all tiles of a section, ``float32 (n_tiles, n_genes)``, positive.

        With target ``"lognorm"``, means are for tiles with the median total count of the training tiles.
        """
        ...


def recipes() -> dict[str, type[Any]]:
    """Return the recipes of `stimage_sd.baselines` by their names in model files."""
    # imported by name, because stimage_sd.baselines imports this module and loads its networks on first use
    known = importlib.import_module("stimage_sd.baselines")
    return {recipe.name: recipe for recipe in (getattr(known, name) for name in known.__all__)}


def options(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's hyperparameters for JSON."""
    return {item.name: getattr(recipe, item.name) for item in fields(recipe)}  # type: ignore[arg-type]


def check_positive(recipe: Any, *names: str) -> None:
    """Raise `ValueError` if a hyperparameter is not an integer of at least 1."""
    for name in names:
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"Expected `{name}` of {type(recipe).__name__} to be an integer of 1 or more, found {value!r}."
            )


def check_positive_number(recipe: Any, name: str) -> None:
    """Raise `ValueError` if a hyperparameter is not above 0."""
    if not getattr(recipe, name) > 0:
        raise ValueError(
            f"Expected `{name}` of {type(recipe).__name__} to be above 0, found {getattr(recipe, name)!r}."
        )


def check_choice(recipe: Any, name: str, choices: Sequence[str]) -> None:
    """Raise `ValueError` if a hyperparameter is not one of the allowed choices."""
    if getattr(recipe, name) not in choices:
        raise ValueError(
            f"Expected `{name}` of {type(recipe).__name__} to be one of {list(choices)}, "
            f"found {getattr(recipe, name)!r}."
        )


# --------------------------------------------------------------------------------------------------
# counts and regression targets

#: total that counts are scaled to before the logarithm for target "lognorm": counts per million
LOGNORM_TOTAL = 1e6


def targets(sections: Sequence[TrainingSection], target: Target) -> np.ndarray:
    """Return log1p targets of all sections in order, ``float32 (n_measured, n_genes)``."""
    blocks = []
    for section in sections:
        counts = section.counts.toarray().astype(np.float64)
        if target == "lognorm":
            counts *= LOGNORM_TOTAL / np.maximum(section.totals, 1)[:, None]
        blocks.append(np.log1p(counts))
    return np.concatenate(blocks).astype(np.float32)


def median_total(sections: Sequence[TrainingSection]) -> float:
    """Return the median total count of the measured tiles."""
    return depth.median_total(np.concatenate([section.totals for section in sections]))


def floor(sections: Sequence[TrainingSection], target: Target) -> np.ndarray:
    """Fit each gene's mean and dispersion without tile features, ``float32 (2, n_genes)``."""
    counts = sp.vstack([section.counts for section in sections]).tocsr()
    totals = np.concatenate([section.totals for section in sections])
    factors = None if target == "log1p" else depth.size_factors(totals, median_total(sections))
    return mean_only.floor(counts, factors)


def count_arrays(sections: Sequence[TrainingSection], target: Target) -> dict[str, np.ndarray]:
    """Return the arrays that `as_counts` needs: ``scale``, ``float32 (1,)``, and ``floor_mean``, ``(n_genes,)``."""
    scale = 1.0 if target == "log1p" else median_total(sections) / LOGNORM_TOTAL
    return {"scale": np.array([scale], dtype=np.float32), "floor_mean": floor(sections, target)[0]}


def as_counts(logarithms: np.ndarray, learned: Arrays) -> np.ndarray:
    """Convert predicted logarithms to means of at least a thousandth of the gene's mean, because means are positive."""
    means = np.expm1(np.minimum(logarithms, 25.0)) * learned["scale"]
    return np.maximum(means, 1e-3 * learned["floor_mean"]).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# cross-validation folds


class Fold:
    """Training sections and left-out sections of one fold."""

    def __init__(self, train: list[TrainingSection], test: list[TrainingSection]) -> None:
        self.train, self.test = train, test


def folds(sections: Sequence[TrainingSection]) -> Iterator[Fold]:
    """Yield folds of sections, or of strips from left to right if there is a single section."""
    if len(sections) > 1:
        n_folds = min(MOST_FOLDS, len(sections))
        for fold in range(n_folds):
            yield Fold(
                [section for index, section in enumerate(sections) if index % n_folds != fold],
                [section for index, section in enumerate(sections) if index % n_folds == fold],
            )
        return
    (section,) = sections
    order = np.argsort(section.positions[section.rows, 0], kind="stable")
    for strip in np.array_split(order, min(MOST_FOLDS, len(order))):
        held = np.zeros(len(order), dtype=bool)
        held[strip] = True
        if held.all():
            raise ValueError(
                f"Expected two measured tiles or more to learn from, found {len(order)} in section {section.name!r}. "
                "Add sections or spots to the cohort."
            )
        yield Fold([section.only(~held)], [section.only(held)])
