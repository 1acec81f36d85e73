"""Names in pictures are shown as they are: dollar signs, underscores and backslashes are no mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from spatialdata import SpatialData

from stimage_sd import contract, pl

#: mathematics that matplotlib cannot read, some that it would show as an italic A, and more that it takes for its own
NAMES = ["$_{\\x$", "HLA$A$", "_hidden", "two\nlines", "\\$5"]


@pytest.fixture(scope="module")
def section(result: Any) -> SpatialData:
    """The session's section with such genes and a cluster and sample of such names."""
    tables = {name: table.copy() for name, table in result.section.tables.items()}
    for name, table in tables.items():
        table.var_names = [NAMES[int(gene[1:])] if gene[1:] < "5" and len(gene) == 2 else gene
                           for gene in table.var_names]  # fmt: skip
        if name == contract.PREDICTIONS:
            table.obs["cluster"] = pd.Categorical(np.resize(NAMES, table.n_obs))
    attrs = {key: {**value, "sample": NAMES[0]} for key, value in result.section.attrs.items()}
    elements = {kind: dict(getattr(result.section, kind)) for kind in ("images", "labels", "shapes", "points")}
    return SpatialData(**elements, tables=tables, attrs=attrs)


@pytest.fixture(params=["tiles", "prediction", "uncertainty", "latent", "scores", "models", "confusion",
                        "survival", "explanation_scores"])  # fmt: skip
def draw(request: pytest.FixtureRequest, section: SpatialData, result: Any) -> Callable[..., Any]:
    """Each picture whose text comes from its data."""
    scores = result.scores.replace({"gene": dict(zip(("G0", "G1", "G2", "G3", "G4"), NAMES, strict=True))})
    models = pd.concat([scores.assign(model=name) for name in NAMES[:3]])
    confusion = pd.DataFrame({"truth": np.repeat(NAMES, 5), "predicted": NAMES * 5, "n": np.arange(25)})
    survival = pd.DataFrame({"time": np.arange(10.0) + 1, "event": 1, "risk_group": NAMES * 2, "group": NAMES[0]})
    nuclei = pd.DataFrame({"gene": np.repeat(NAMES[:2], 20), "score": np.linspace(-1, 1, 40),
                           "area_px": np.arange(40.0), "cell_type": NAMES * 8})  # fmt: skip
    return {
        "tiles": lambda: pl.tiles(section, return_fig=True),
        "prediction": lambda: pl.prediction(section, NAMES, return_fig=True),
        "uncertainty": lambda: pl.uncertainty(section, NAMES, return_fig=True),
        "latent": lambda: pl.latent(section, [NAMES[0], "cluster"], basis="pca", return_fig=True),
        "scores": lambda: pl.scores(scores, return_fig=True),
        "models": lambda: pl.scores(models, by="model", n_named=36, return_fig=True),
        "confusion": lambda: pl.confusion(confusion, return_fig=True),
        "survival": lambda: pl.survival(survival, return_fig=True),
        "explanation_scores": lambda: pl.explanation_scores(nuclei, return_fig=True),
    }[request.param]


def shown(figure: Any) -> list[Text]:
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_text()]


def test_names_are_drawn_as_they_are(draw: Callable[..., Any]) -> None:
    named = [text for text in shown(draw()) if any(name in text.get_text() for name in NAMES)]
    assert named
    assert not any(text.get_parse_math() for text in named)


def test_all_groups_are_in_the_legend() -> None:
    data = pd.DataFrame({"time": np.arange(10.0) + 1, "event": 1, "risk_group": ["_low", "high"] * 5})
    legend = pl.survival(data)[0].get_legend()
    assert {text.get_text().split(" (")[0] for text in legend.get_texts()} == {"_low", "high"}


def test_mathematics_of_the_users_own_stay(section: SpatialData) -> None:
    _, axes = plt.subplots(1, 3)
    axes[2].set_title("$x^2$")
    axes[2].set(xscale="log", xlim=(1, 1e3))
    pl.prediction(section, NAMES[0], ax=axes[:2], title=["$\\alpha$", "$_{\\x$"])
    powers = [text for text in shown(axes[2].figure) if "10^{" in text.get_text()]
    assert [ax.title.get_parse_math() for ax in axes] == [True, False, True]
    assert powers
    assert all(text.get_parse_math() for text in powers)
