"""Ridge regression of log counts on the principal components of embeddings, of full or of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from stimage_sd.models.baselines._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    count_scale,
    floor,
    folds,
    targets,
)
from stimage_sd.models.baselines._space import Standardize, fit_space, reduce
from stimage_sd.nn.ridge import Moments, RidgePath
from stimage_sd.nn.spatial import pearson

#: penalties that are tried, in multiples of the features' total variance
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of log counts on principal components: the head of the HEST benchmark.

    With a `rank` the genes share strength: their predictions are projected on the few directions along which the
    fitted values vary most, so that a gene of few counts is predicted by patterns that many genes follow.

    Attributes
    ----------
    n_components
        Principal components of the standardised embeddings, at most one less than tiles.
    penalty
        scikit-learn's `alpha`, on components that are not whitened. ``"hest"``: 100 over the number of components
        times genes, as the benchmark has it. ``"held-out"``: of six, the one of highest mean Pearson on training
        sections that are left out in turn.
    rank
        Directions of expression that predictions vary along; `None`: all.
    standardize
        ``"section"``: each section's embeddings by their own mean and deviation; ``"cohort"``, as the benchmark:
        by the training tiles'.
    target
        ``"log1p"`` of counts, or ``"lognorm"``: of counts per million.

    Notes
    -----
    Jaume et al. 2024, "HEST-1k", for the benchmark. Different from it by default: the
    penalty, and whose mean and deviation embeddings are standardised by. Izenman 1975,
    "Reduced-rank regression for the multivariate linear model", for the rank.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.Ridge(rank=8).n_components
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
        """Solve for the coefficients; see `Recipe`."""
        solution = self._solve(sections, seed)
        penalty = self._penalty(sections, solution, seed)
        return {
            **{f"space.{name}": array for name, array in solution.space.items()},
            "coefficients": solution.path.coefficients(penalty, self.rank).astype(np.float32),
            "intercept": solution.path.intercept.astype(np.float32),
            "penalty": np.array([penalty], dtype=np.float32),
            "scale": count_scale(sections, self.target),
            "floor_mean": floor(sections, self.target)[0],
        }

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Multiply; see `Recipe`."""
        space = {name.removeprefix("space."): array for name, array in learnt.items() if name.startswith("space.")}
        reduced = reduce(space, section, self.standardize)
        return as_counts(reduced @ learnt["coefficients"] + learnt["intercept"], learnt["scale"], learnt["floor_mean"])

    def _solve(self, sections: Sequence[TrainingSection], seed: int) -> _Solution:
        space = fit_space(sections, n_components=self.n_components, standardize=self.standardize, seed=seed)
        reduced = np.concatenate([reduce(space, section, self.standardize)[section.rows] for section in sections])
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
        """Mean Pearson of each penalty on sections that were left out."""
        scores = np.zeros((len(left_out), len(_PENALTIES)))
        for number, section in enumerate(left_out):
            reduced = reduce(solution.space, section, self.standardize)[section.rows]
            wanted = targets([section], self.target)
            for place, penalty in enumerate(_PENALTIES):
                predicted = reduced @ solution.path.coefficients(penalty * solution.path.variance, self.rank)
                agreement = pearson(predicted, wanted)
                scores[number, place] = np.nanmean(agreement) if np.isfinite(agreement).any() else 0.0
        return scores.mean(axis=0).tolist()


class _Solution(NamedTuple):
    """The space of the embeddings, and the regression in it."""

    space: dict[str, np.ndarray]
    path: RidgePath
