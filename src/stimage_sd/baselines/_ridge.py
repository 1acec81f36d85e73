"""Ridge regression of log counts on principal components of embeddings, with full or low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from stimage_sd.baselines._space import Standardize, fit_space, reduce, reduce_measured
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    count_arrays,
    folds,
    targets,
)
from stimage_sd.stats.ridge import Moments, RidgePath
from stimage_sd.stats.spatial import pearson

#: candidate penalties, as multiples of the features' total variance
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of log counts on principal components, as in the HEST benchmark.

    With a `rank`, predictions are projected on the few directions along which the fitted values vary most. A gene with
    few counts is then predicted from patterns that many genes share.

    Attributes
    ----------
    n_components
        Number of principal components of the standardized embeddings, less than the number of tiles.
    penalty
        scikit-learn's `alpha`, on components that are not whitened. ``"hest"`` is 100 divided by the number of
        components times the number of genes, as in the benchmark. ``"held-out"`` picks the best of six penalties by
        the mean Pearson correlation on training sections left out in turn.
    rank
        Number of directions of expression along which predictions vary. `None` uses all.
    standardize
        ``"section"`` standardizes each section by its own mean and deviation. ``"cohort"`` uses those of the training
        tiles, as in the benchmark.
    target
        ``"log1p"`` of counts, or ``"lognorm"``, log1p of counts per million.

    Notes
    -----
    Jaume et al. 2024, "HEST-1k", for the benchmark. The default penalty and the default standardization differ from it.
    Izenman 1975, "Reduced-rank regression for the multivariate linear model", for the rank.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.Ridge(rank=8).n_components
    256
    """

    n_components: int = 256
    penalty: float | Literal["hest", "held-out"] = "held-out"
    rank: int | None = None
    standardize: Standardize = "section"
    target: Target = "log1p"

    name: ClassVar[str] = "ridge"
    needs: ClassVar[frozenset[Need]] = frozenset({"embeddings"})

    def __post_init__(self) -> None:
        check_positive(self, "n_components", *(["rank"] if self.rank is not None else []))
        check_choice(self, "standardize", ["section", "cohort"])
        check_choice(self, "target", ["log1p", "lognorm"])
        known = self.penalty in ("hest", "held-out") if isinstance(self.penalty, str) else self.penalty >= 0
        if not known:
            raise ValueError(
                f'Expected `penalty` of Ridge to be a number of 0 or more, "hest" or "held-out", got {self.penalty!r}.'
            )

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Solve for the coefficients (see `Recipe`)."""
        solution = self._solve(sections, seed)
        penalty = self._penalty(sections, solution, seed)
        return {
            **solution.space,
            "coefficients": solution.path.coefficients(penalty, self.rank).astype(np.float32),
            "intercept": solution.path.intercept.astype(np.float32),
            "penalty": np.array([penalty], dtype=np.float32),
            **count_arrays(sections, self.target),
        }

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Apply the coefficients (see `Recipe`)."""
        reduced = reduce(learned, section, self.standardize)
        return as_counts(reduced @ learned["coefficients"] + learned["intercept"], learned)

    def _solve(self, sections: Sequence[TrainingSection], seed: int) -> _Solution:
        space = fit_space(sections, n_components=self.n_components, standardize=self.standardize, seed=seed)
        reduced = reduce_measured(space, sections, self.standardize)
        return _Solution(space, RidgePath.solve(Moments.of(reduced, targets(sections, self.target))))

    def _penalty(self, sections: Sequence[TrainingSection], solution: _Solution, seed: int) -> float:
        if self.penalty == "hest":
            return 100.0 / (len(solution.path.values) * len(solution.path.intercept))
        if self.penalty != "held-out":
            return float(self.penalty)
        scores = []
        for fold in folds(sections):
            part = self._solve(fold.train, seed)
            scores.append(self._scores(part, fold.test))
        best = int(np.argmax(np.mean(scores, axis=0)))
        return _PENALTIES[best] * solution.path.variance

    def _scores(self, solution: _Solution, left_out: Sequence[TrainingSection]) -> list[float]:
        """Return the mean Pearson correlation per penalty on left-out sections."""
        scores = np.zeros((len(left_out), len(_PENALTIES)))
        for row, section in enumerate(left_out):
            reduced = reduce_measured(solution.space, [section], self.standardize)
            wanted = targets([section], self.target)
            for place, penalty in enumerate(_PENALTIES):
                predicted = reduced @ solution.path.coefficients(penalty * solution.path.variance, self.rank)
                agreement = pearson(predicted, wanted)
                scores[row, place] = np.nanmean(agreement) if np.isfinite(agreement).any() else 0.0
        return scores.mean(axis=0).tolist()


class _Solution(NamedTuple):
    """Space of the embeddings, and the regression in this space."""

    space: dict[str, np.ndarray]
    path: RidgePath
