"""A predicted section, a model and their scores, for all pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from spatialdata import SpatialData

from stimage_sd import tl
from stimage_sd.models import NBModel

mpl.use("agg")


class Result(NamedTuple):
    """What the main job leaves."""

    section: SpatialData
    model: NBModel
    scores: pd.DataFrame


@pytest.fixture(scope="session")
def result(planted: Callable) -> Result:
    """Predictions on a planted section with counts."""
    cohort = planted(("a", "b", "test"), n_side=10, n_genes=12)
    test = cohort.sections.pop("test")
    model = tl.fit_nb(cohort.sections, genes=cohort.genes, extractor="toy", n_members=3, max_epochs=8)
    tl.predict(test, model)
    return Result(test, model, tl.evaluate(test))


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")
