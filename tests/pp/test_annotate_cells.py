"""Types of measured cells: transferred from a reference, or given; merged, carried onto outlines, refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData

import stimage_sd as sti


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "run"
    return sti.datasets.synthetic_xenium(path, size_um=300, n_genes=9, seed=3, pixel_um=0.85, n_markers=3)


@pytest.fixture
def sdata(run: Path) -> SpatialData:
    return sti.io.xenium(run, he_image=run / "he_image.ome.tif")


@pytest.fixture(scope="module")
def truth(run: Path) -> pd.Series:
    return pd.read_csv(run / "truth_cells.csv", index_col=0)["cell_type"]


def test_types_of_a_reference(sdata: SpatialData, truth: pd.Series) -> None:
    reference = sti.datasets.synthetic_reference(n_markers=3, n_genes=6)
    before = reference.X.copy()
    sti.pp.annotate_cells(sdata, reference, merge=reference.uns["merge"])
    obs = sdata.tables["counts"].obs
    assert (obs["cell_type"].astype(str) == truth.reindex(obs.index)).mean() > 0.97
    assert obs["cell_type_confidence"].between(0.3, 1 + 1e-6).all()
    wrong = (obs["cell_type"].astype(str) != truth.reindex(obs.index)).to_numpy()
    if wrong.any():
        assert obs["cell_type_confidence"][wrong].mean() < obs["cell_type_confidence"][~wrong].mean()
    for name in ("nuclei", "cells"):
        frame = sdata.shapes[name]
        owners = frame.get("cell_id", frame.index)
        assert frame["cell_type"].astype(str).tolist() == obs["cell_type"].astype(str)[owners].tolist()
    assert (before != reference.X).nnz == 0
    assert sdata.tables["counts"].X.max() == int(sdata.tables["counts"].X.max())


def test_cells_are_annotated_after_transcripts_were_aggregated(sdata: SpatialData) -> None:
    reference = sti.datasets.synthetic_reference(n_markers=3)
    sti.pp.aggregate(sdata)
    sti.pp.annotate_cells(sdata, reference)
    assert sdata.tables["counts"].obs["cell_type"].notna().all()
    assert sdata.shapes["nuclei"]["cell_type"].notna().all()
    assert "cell_type" not in sdata.tables["spot_counts"].obs


def test_a_platforms_own_scale_does_not_matter(sdata: SpatialData, truth: pd.Series) -> None:
    """A reference of another efficiency a gene, and a finer name that is left out."""
    reference = sti.datasets.synthetic_reference(n_markers=3)
    gain = np.random.default_rng(0).integers(1, 9, reference.n_vars)
    reference.X = (reference.X.toarray() * gain).astype(np.int32)
    merge = {**reference.uns["merge"], "macrophage": None}
    sti.pp.annotate_cells(sdata, reference, merge=merge)
    obs = sdata.tables["counts"].obs
    assert (obs["cell_type"].astype(str) == truth.reindex(obs.index)).mean() > 0.9


def test_given_types(sdata: SpatialData, truth: pd.Series) -> None:
    some = truth.iloc[:-5]
    sti.pp.annotate_cells(sdata, labels=some, merge={**{name: name for name in truth.unique()}, "immune": "other"})
    obs = sdata.tables["counts"].obs
    assert obs["cell_type"].isna().sum() == 5
    assert obs["cell_type_confidence"].isin([0, 1]).all()
    assert set(obs["cell_type"].dropna()) == {"cancer epithelial", "endothelial", "stromal", "other"}
    assert sdata.shapes["nuclei"]["cell_type"].isna().sum() == 5
    obs["own"] = np.where(np.arange(len(obs)) % 2, "a", "b")
    sti.pp.annotate_cells(sdata, labels="own")
    assert set(sdata.shapes["cells"]["cell_type"]) == {"a", "b"}


def test_errors_say_what_to_do(sdata: SpatialData) -> None:
    reference = sti.datasets.synthetic_reference(n_markers=3)
    with pytest.raises(KeyError, match=r"1 of 1 that are not there, such as 'nowhere'"):
        sti.pp.annotate_cells(sdata, labels={"nowhere": "immune"})
    with pytest.raises(KeyError, match="No column 'kind' in the table of counts"):
        sti.pp.annotate_cells(sdata, labels="kind")
    with pytest.raises(KeyError, match="`labels` as a column of the reference's obs"):
        sti.pp.annotate_cells(sdata, reference, labels="kind")
    with pytest.raises(KeyError, match=r"`merge` to name all types, found none for \['B cell'"):
        sti.pp.annotate_cells(sdata, reference, merge={"T cell": "immune"})
    other = reference.copy()
    other.var_names = [f"other{n}" for n in range(other.n_vars)]
    with pytest.raises(ValueError, match="share at least 5 genes with the section, found 0"):
        sti.pp.annotate_cells(sdata, other)
    scaled = reference.copy()
    scaled.X = scaled.X.toarray() * 0.5
    with pytest.raises(ValueError, match="reference's X"):
        sti.pp.annotate_cells(sdata, scaled)
    assert "cell_type" not in sdata.shapes["nuclei"].columns
