"""Dots of gene sets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import Normalize

from stimage_sd import pl, tl


def table() -> pd.DataFrame:
    tested = [f"G{i}" for i in range(200)]
    random = np.random.default_rng(0)
    sets = {f"set_{n}": [f"G{i}" for i in random.choice(200, 20, replace=False)] for n in range(30)}
    return tl.enrichment(tested[:60], sets, background=tested)


def test_dots_show_share_number_and_q_value() -> None:
    sets = table()
    (ax,) = pl.enrichment(sets, n_sets=7)
    best = sets.nsmallest(7, "p_value")
    assert [label.get_text() for label in ax.get_yticklabels()] == [name.replace("_", " ") for name in best["gene_set"]]
    (dots,) = (drawn for drawn in ax.collections if len(drawn.get_offsets()) == 7)
    np.testing.assert_allclose(dots.get_offsets()[:, 0], best["n_overlap"] / best["n_set"])
    np.testing.assert_allclose(dots.get_array(), -np.log10(best["q_value"]))
    assert np.argmax(dots.get_sizes()) == np.argmax(best["n_overlap"])
    assert isinstance(dots.norm, Normalize)
    assert dots.norm.vmin == 0
    assert ax.figure.axes[-1].get_ylabel() == "-log10 q-value"


def test_every_library_has_a_panel_and_all_share_colors() -> None:
    sets = pd.concat([table().assign(library="biological process"), table().head(3).assign(library="function")])
    axes = pl.enrichment(sets, n_sets=5)
    assert [ax.get_title() for ax in axes] == ["biological process", "function"]
    assert [len(ax.get_yticklabels()) for ax in axes] == [5, 3]
    assert len({ax.collections[0].norm.vmax for ax in axes}) == 1
    with pytest.raises(ValueError, match=r"table of `stimage_sd\.tl\.enrichment`, found a table lacking"):
        pl.enrichment(sets.drop(columns="q_value"))
    with pytest.raises(ValueError, match="`n_sets` of at least 1, found 0"):
        pl.enrichment(sets, n_sets=0)
