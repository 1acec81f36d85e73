"""Maps of local Moran's I in the object: esda's own on predictions and counts, and what lies nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import esda
import numpy as np
import pandas as pd
import pytest
import squidpy as sq
from anndata import AnnData
from libpysal.weights import lat2W
from spatialdata import SpatialData

from stimage_sd import contract, tl

#: esda numbers quadrants counter-clockwise from high-high
ESDA = {1: "high-high", 2: "low-high", 3: "low-low", 4: "high-low"}
SIDE = 12


@pytest.fixture
def section(make_spots: Callable[..., SpatialData]) -> SpatialData:
    """Counts with a hot corner, and noise; predictions that know the corner."""
    random = np.random.default_rng(0)
    rows, columns = np.divmod(np.arange(SIDE**2), SIDE)
    mean = 2 + 30 * np.exp(-((rows - 2) ** 2 + (columns - 2) ** 2) / 9.0)
    counts = np.stack([random.poisson(mean), random.poisson(5, SIDE**2), np.full(SIDE**2, 3)], axis=1)
    sdata = make_spots(n_side=SIDE, counts=counts, genes=["HOT", "NOISE", "FLAT"])
    tiles = contract.tiles(sdata)
    tiles.obs.loc[tiles.obs_names[70], "keep"] = False
    kept = tiles[tiles.obs["keep"].to_numpy()].copy()
    predicted = mean[tiles.obs["keep"].to_numpy()] * random.uniform(0.7, 1.3, SIDE**2 - 1)
    table = AnnData(
        X=np.stack([predicted, predicted[::-1]], axis=1).astype(np.float32),
        obs=kept.obs.drop(columns=contract.REGION_KEY).assign(size_factor=1.0, ood_score=0.5),
        var=pd.DataFrame(index=["HOT", "NOISE"]),
        obsm={"spatial": kept.obsm["spatial"].copy()},
    )
    for name in ("aleatoric", "epistemic", "lower", "upper"):
        table.layers[name] = np.ones(table.shape, np.float32)
    table.uns["prediction"] = {}
    contract.write_predictions(sdata, table)
    return sdata


def weights() -> Any:
    """Queen contiguity over the lattice without the tile that is not kept."""
    made = lat2W(SIDE, SIDE, rook=False)
    made = made.__class__({i: [j for j in near if j != 70] for i, near in made.neighbors.items() if i != 70})
    made.transform = "r"
    return made


def test_maps_are_esdas(section: SpatialData) -> None:
    kept = np.arange(SIDE**2) != 70
    counts = np.log1p(contract.counts(section).X.toarray()[kept])
    predicted = np.log1p(contract.predictions(section).X.astype(float))
    for of, expected in (
        ("observed", lambda g: esda.Moran_Local(counts[:, g], weights(), permutations=0)),
        ("predicted", lambda g: esda.Moran_Local(predicted[:, g], weights(), permutations=0)),
        ("bivariate", lambda g: esda.Moran_Local_BV(predicted[:, g], counts[:, g], weights(), permutations=0)),
    ):
        table = tl.local_morans_i(section, ["HOT", "NOISE"], of=of, level=0.99, correction="none", n_permutations=99)
        obs = contract.tiles(section).obs
        for number, gene in enumerate(("HOT", "NOISE")):
            local = expected(number)
            np.testing.assert_allclose(obs.loc[kept, f"local_moran_i_{gene}"], local.Is, atol=1e-6)
            p_value = obs.loc[kept, f"local_moran_p_{gene}"]
            quadrants = np.where(p_value <= 0.99, [ESDA[q] for q in local.q], "not significant")
            assert obs.loc[kept, f"local_moran_{gene}"].astype(str).tolist() == quadrants.tolist()
            row = table.set_index("gene").loc[gene]
            assert row["high-high"] == (quadrants == "high-high").sum()
            assert row["n_tiles"] == SIDE**2 - 1
            n = len(local.Is)
            assert row["morans_i"] == pytest.approx(local.Is.sum() / (n - 1), abs=1e-6)
        assert pd.isna(obs["local_moran_HOT"].iloc[70])


def test_the_hot_corner_is_high_among_high_and_noise_is_not_significant(section: SpatialData) -> None:
    table = tl.local_morans_i(section, ["HOT", "NOISE"]).set_index("gene")
    category = contract.tiles(section).obs["local_moran_HOT"].to_numpy().reshape(SIDE, SIDE)
    assert (category[1:4, 1:4] == "high-high").all()
    assert (category[8:, 8:] != "high-high").all()
    assert table.loc["NOISE", "not significant"] > 0.97 * SIDE**2
    loose = tl.local_morans_i(section, ["HOT", "NOISE"], correction="none").set_index("gene")
    assert loose.loc["NOISE", "not significant"] < table.loc["NOISE", "not significant"]


def test_columns_go_through_the_disk_and_into_squidpys_picture(section: SpatialData, tmp_path: Any) -> None:
    import spatialdata

    tl.local_morans_i(section, "HOT", of="observed")
    section.write(tmp_path / "section.zarr")
    table = contract.tiles(spatialdata.read_zarr(tmp_path / "section.zarr"))
    assert table.obs["local_moran_HOT"].cat.categories[0] == "high-high"
    axes = sq.pl.spatial_scatter(table, shape=None, color="local_moran_HOT", return_ax=True)
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"high-high", "not significant"}


def test_constant_genes_have_no_category(section: SpatialData) -> None:
    table = tl.local_morans_i(section, ["FLAT"], of="observed")
    obs = contract.tiles(section).obs
    assert obs["local_moran_FLAT"].isna().all()
    assert obs["local_moran_p_FLAT"].isna().all()
    assert table[["high-high", "not significant"]].sum(axis=1).tolist() == [0]


def test_what_is_not_there_is_named_and_nothing_is_written(section: SpatialData) -> None:
    before = list(contract.tiles(section).obs)
    with pytest.raises(KeyError, match=r"Genes \['FLAT'\] were not predicted in section 'made'"):
        tl.local_morans_i(section, ["HOT", "FLAT"])
    with pytest.raises(KeyError, match=r"Genes \['XYZ'\] were not measured in section 'made'"):
        tl.local_morans_i(section, "XYZ", of="observed")
    with pytest.raises(ValueError, match=r"`of` to be one of \['bivariate', 'predicted', 'observed'\], found 'both'"):
        tl.local_morans_i(section, "HOT", of="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`level` between 0 and 1, found 5"):
        tl.local_morans_i(section, "HOT", level=5)
    contract.predictions(section).uns["instances"] = {"on": "nuclei"}
    with pytest.raises(ValueError, match=r"are of nuclei or squares\. Map those of tiles"):
        tl.local_morans_i(section, "HOT")
    assert list(contract.tiles(section).obs) == before
