"""Lowest baseline: the training mean per gene, equal on all tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stimage_sd.models._recipe import Arrays, Need, SectionData, Target, TrainingSection, check_choice, floor


@dataclass(frozen=True)
class MeanOnly:
    """Training mean of each gene on every tile. A model that uses the image should do better.

    Attributes
    ----------
    target
        ``"log1p"`` predicts the mean count. ``"lognorm"`` predicts the mean count at the training tiles' median total.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.MeanOnly()
    MeanOnly(target='log1p')
    """

    target: Target = "log1p"

    name: ClassVar[str] = "mean_only"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        check_choice(self, "target", ["log1p", "lognorm"])

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Compute the means (see `Recipe`)."""
        return {"mean": floor(sections, self.target)[0]}

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Return the means (see `Recipe`)."""
        return np.tile(learned["mean"], (len(section.positions), 1))
