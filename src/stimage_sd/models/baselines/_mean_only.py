"""The floor: every gene's mean, the same on every tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stimage_sd.models.baselines._recipe import Arrays, Need, SectionData, Target, TrainingSection, check_choice, floor


@dataclass(frozen=True)
class MeanOnly:
    """Every gene's training mean on every tile: what a model that sees the image has to beat.

    Attributes
    ----------
    target
        ``"log1p"``: the mean count; ``"lognorm"``: the mean count at the training tiles' median total.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.MeanOnly()
    MeanOnly(target='log1p')
    """

    target: Target = "log1p"

    name: ClassVar[str] = "mean_only"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        check_choice(self, "target", ["log1p", "lognorm"])

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Take the means; see `Recipe`."""
        return {"mean": floor(sections, self.target)[0]}

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Give the means; see `Recipe`."""
        return np.tile(learnt["mean"], (len(section.positions), 1))
