"""Scores against scipy, esda and squidpy, a gene at a time, on the table as written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import esda
import libpysal
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import scipy.sparse as sp
import scipy.stats
import shapely
import spatialdata
import squidpy as sq
from spatialdata import SpatialData

from stimage_sd import contract, pp, tl

N_SIDE = 12


@pytest.fixture(scope="module")
def section(planted: Callable) -> SpatialData:
    """A predicted section, its features smooth in space so that patterns have something to overlap."""
    cohort = planted(("a", "b", "c"), n_side=N_SIDE, n_features=5, n_genes=6, strength=1.0, seed=2)
    for sdata in cohort.sections.values():  # a gene that is never seen
        counts = contract.counts(sdata).X.tolil()
        counts[:, 5] = 0
        contract.counts(sdata).X = counts.tocsr()
    model = tl.fit_nb(
        {name: cohort.sections[name] for name in "ab"},
        genes=cohort.genes, extractor="toy", n_members=3, max_epochs=30, exposure=None,
    )  # fmt: skip
    tl.predict(cohort.sections["c"], model)
    return cohort.sections["c"]


def pair(sdata: SpatialData, transform: str) -> tuple[np.ndarray, np.ndarray]:
    predicted = contract.predictions(sdata).X.astype(np.float64)
    measured = contract.counts(sdata)[contract.predictions(sdata).obs["spot_id"].astype(str)].X.toarray().astype(float)
    if transform == "raw":
        return predicted, measured
    if transform == "lognorm":
        scale, measured_scale = (
            np.median(values.sum(axis=1)) / values.sum(axis=1)[:, None] for values in (predicted, measured)
        )
        variance = contract.predictions(sdata).layers["total_variance"].astype(np.float64)
        return _expected_logarithm(predicted, variance, scale), np.log(measured * measured_scale + 1)
    return np.log(predicted + 1), np.log(measured + 1)


def squidpys_graph(predictions: ad.AnnData) -> sp.csr_matrix:
    """The eight neighbors on the lattice, by squidpy."""
    table = ad.AnnData(
        obsm={"spatial": predictions.obsm["spatial"] / 40}, obs=pd.DataFrame(index=predictions.obs_names)
    )
    sq.gr.spatial_neighbors(table, coord_type="generic", radius=1.5)
    return sp.csr_matrix(table.obsp["spatial_connectivities"])


def _expected_logarithm(mean: np.ndarray, variance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """By the sum over counts of the negative binomial of this mean and variance."""
    r = mean**2 / np.maximum(variance - mean, 1e-9 * mean)
    largest = int(scipy.stats.nbinom.isf(1e-10, r, r / (r + mean)).max())  # small r has a long tail
    return sum(
        scipy.stats.nbinom.pmf(count, r, r / (r + mean)) * np.log(scale * count + 1) for count in range(1, largest)
    )  # fmt: skip


@pytest.mark.parametrize("transform", ["log1p", "raw", "lognorm"])
def test_correlations_are_scipys(section: SpatialData, transform: str) -> None:
    scores = tl.evaluate(section, transform=transform)
    assert list(scores["gene"]) == list(contract.predictions(section).var_names)
    assert set(scores["section"]) == {"c"}
    assert set(scores["n_tiles"]) == {N_SIDE**2}
    predicted, measured = pair(section, transform)
    # the expected logarithm is an integral, good to 1e-9: two tiles as close as that may change places
    within, ranks_within = (1e-6, 1e-3) if transform == "lognorm" else (1e-9, 1e-9)
    for gene in range(5):
        row = scores.iloc[gene]
        ours, theirs = predicted[:, gene], measured[:, gene]
        assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(ours, theirs)[0], abs=within)
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(ours, theirs)[0], abs=ranks_within)


def test_morans_i_is_squidpys_and_esdas(section: SpatialData) -> None:
    scores = tl.evaluate(section)
    predicted, measured = pair(section, "log1p")
    predictions = contract.predictions(section).copy()
    sq.gr.spatial_neighbors(predictions, coord_type="grid", n_neighs=8)
    weights = libpysal.weights.lat2W(N_SIDE, N_SIDE, rook=False)
    weights.transform = "r"
    for column, values in (("morans_i_observed", measured), ("morans_i_predicted", predicted)):
        predictions.layers["values"] = values
        sq.gr.spatial_autocorr(
            predictions, layer="values", genes=list(predictions.var_names), mode="moran", n_perms=None
        )
        theirs = predictions.uns["moranI"]["I"].reindex(predictions.var_names)
        np.testing.assert_allclose(scores[column][:5], theirs[:5], atol=1e-5)
    for gene in range(5):
        bivariate = esda.Moran_BV(predicted[:, gene], measured[:, gene], weights, permutations=0).I
        assert scores["bivariate_morans_i"][gene] == pytest.approx(bivariate, abs=1e-5)


def test_iou_is_the_papers(section: SpatialData) -> None:
    scores = tl.evaluate(section)
    tissue = scipy.ndimage.gaussian_filter(np.ones((N_SIDE, N_SIDE)), 1.0, mode="constant")
    patterns = []
    for values in pair(section, "log1p"):
        high = (values > values.mean(axis=0)).astype(float).reshape(N_SIDE, N_SIDE, -1)
        smooth = [scipy.ndimage.gaussian_filter(high[..., gene], 1.0, mode="constant") / tissue for gene in range(6)]
        patterns.append(np.stack(smooth) >= 0.5 - 1e-9)
    for gene in range(5):
        one, two = patterns[0][gene], patterns[1][gene]
        assert scores["iou"][gene] == pytest.approx((one & two).sum() / (one | two).sum(), abs=1e-12)


def test_likelihood_and_coverage_are_loops(section: SpatialData) -> None:
    scores = tl.evaluate(section)
    predictions = contract.predictions(section)
    _, counts = pair(section, "raw")
    mean, variance = predictions.X.astype(np.float64), predictions.layers["total_variance"].astype(np.float64)
    for gene in range(5):
        p = mean[:, gene] / variance[:, gene]
        r = mean[:, gene] * p / (1 - p)
        assert scores["nll"][gene] == pytest.approx(-scipy.stats.nbinom.logpmf(counts[:, gene], r, p).mean(), rel=1e-3)
        floor_mean, floor_r = predictions.var[["floor_mean", "floor_dispersion"]].iloc[gene]
        floor = -scipy.stats.nbinom.logpmf(counts[:, gene], floor_r, floor_r / (floor_r + floor_mean)).mean()
        assert scores["nll_floor"][gene] == pytest.approx(floor, rel=1e-3)
        inside = [
            low <= count <= high
            for count, low, high in zip(
                counts[:, gene], predictions.layers["lower"][:, gene], predictions.layers["upper"][:, gene], strict=True
            )
        ]
        assert scores["coverage"][gene] == pytest.approx(np.mean(inside))


def test_a_constant_gene_is_nan_and_counted(section: SpatialData) -> None:
    scores = tl.evaluate(section)
    assert len(scores) == 6
    constant = scores.iloc[5]
    for metric in ("pearson", "spearman", "morans_i_observed", "bivariate_morans_i", "iou"):
        assert np.isnan(constant[metric]), metric
    assert constant["coverage"] == 1.0
    assert np.isfinite(constant["nll"])
    assert np.isfinite(scores.iloc[:5].drop(columns=["section", "gene", "exposure"]).to_numpy(dtype=float)).all()


def test_scores_are_written_and_survive_the_disk(section: SpatialData, tmp_path: Path) -> None:
    scores = tl.evaluate(section)
    variables = contract.predictions(section).var
    for metric in ("pearson", "iou", "nll", "coverage"):
        np.testing.assert_array_equal(variables[metric], scores[metric])
    section.write(tmp_path / "c.zarr")
    back = spatialdata.read_zarr(tmp_path / "c.zarr")
    np.testing.assert_array_equal(contract.predictions(back).var["pearson"], scores["pearson"])
    pd.testing.assert_frame_equal(tl.evaluate(back), scores)


def test_a_graph_of_the_users_changes_moran_alone(section: SpatialData) -> None:
    predictions = contract.predictions(section).copy()
    sq.gr.spatial_neighbors(predictions, coord_type="generic", n_neighs=3)
    plain = tl.evaluate(section)
    other = tl.evaluate(section, graph=predictions.obsp["spatial_connectivities"])
    moran = [name for name in plain.columns if "morans" in name]
    pd.testing.assert_frame_equal(plain.drop(columns=moran), other.drop(columns=moran))
    assert (plain[moran].iloc[:5] != other[moran].iloc[:5]).to_numpy().all()


def test_strata_are_scored_as_sections_of_their_own(section: SpatialData) -> None:
    predictions, tiles = contract.predictions(section), contract.tiles(section)
    x = predictions.obsm["spatial"][:, 0]
    right = x > np.median(x)
    tiles.obs["side"] = pd.Categorical(np.where(right, "right", "left"))
    tiles.obs.iloc[7, tiles.obs.columns.get_loc("side")] = np.nan
    before = predictions.var.copy()
    graph = squidpys_graph(predictions)
    scores = tl.evaluate(section, by="side")
    pd.testing.assert_frame_equal(predictions.var, before)
    assert scores.groupby("stratum")["n_tiles"].first().to_dict() == {
        name: int((tiles.obs["side"] == name).sum()) for name in ("left", "right")
    }
    for name in ("left", "right"):
        inside = np.flatnonzero((tiles.obs["side"] == name).to_numpy())
        own = scores[scores["stratum"] == name].set_index("gene")
        predicted, measured = (values[inside] for values in pair(section, "log1p"))
        near = graph[inside][:, inside]
        table = ad.AnnData(measured[:, :5], obsp={"spatial_connectivities": near})
        sq.gr.spatial_autocorr(table, mode="moran", n_perms=None, show_progress_bar=False)
        observed = table.uns["moranI"]["I"].reindex(table.var_names)
        np.testing.assert_allclose(own["morans_i_observed"].iloc[:5], observed, atol=1e-6)
        counts = np.round(np.expm1(measured))
        for gene in range(5):
            row = own.iloc[gene]
            assert row["pearson"] == pytest.approx(np.corrcoef(predicted[:, gene], measured[:, gene])[0, 1], abs=1e-6)
            lower, upper = (predictions.layers[layer][inside, gene] for layer in ("lower", "upper"))
            assert row["coverage"] == pytest.approx(((counts[:, gene] >= lower) & (counts[:, gene] <= upper)).mean())


def test_strata_of_the_spots_and_those_that_are_not_there(section: SpatialData) -> None:
    counts = contract.counts(section)
    counts.obs["zone"] = np.resize(["b", "a", None], counts.n_obs)
    scores = tl.evaluate(section, by="zone", scale=1)
    assert list(scores["stratum"].unique()) == ["a", "b"]
    assert set(scores["n_tiles"]) == {N_SIDE**2 // 3}
    with pytest.raises(KeyError, match=r"No column 'nowhere' among .*'zone'.*pp\.label_by_annotations"):
        tl.evaluate(section, by="nowhere")
    counts.obs["zone"] = None
    with pytest.raises(ValueError, match="No compared tile of section 'c' has a value in column 'zone'"):
        tl.evaluate(section, by="zone")


def test_a_cohort_gives_a_row_a_section_and_gene(section: SpatialData) -> None:
    scores = tl.evaluate({"one": section, "two": section})
    assert list(scores["section"]) == ["one"] * 6 + ["two"] * 6
    np.testing.assert_array_equal(scores["pearson"][:6], scores["pearson"][6:])


def test_refusals(section: SpatialData, make_spots: Callable, planted: Callable) -> None:
    with pytest.raises(ValueError, match='"log1p", "raw" or "lognorm", found \'sqrt\''):
        tl.evaluate(section, transform="sqrt")
    with pytest.raises(KeyError, match=r"'made' has no predictions. Run `stimage_sd.tl.predict"):
        tl.evaluate(make_spots(n_side=5))
    other = planted(("x",), n_side=N_SIDE, n_features=5, n_genes=6).sections["x"]
    other.tables["predictions"] = contract.predictions(section).copy()
    other.tables["counts"].var_names = [f"ENSG{number}" for number in range(6)]
    with pytest.raises(ValueError, match=r"None of the 6 predicted genes .* 'G0'; its counts are \['ENSG0'"):
        tl.evaluate(other)


def test_predictions_of_a_grid_cannot_be_evaluated(planted: Callable) -> None:
    sdata = planted(("x",), n_side=N_SIDE, n_features=5, n_genes=6).sections["x"]
    model = tl.fit_nb(sdata, genes=["G0", "G1"], extractor="toy", n_members=3, max_epochs=2)
    how = contract.tiles(sdata).uns["embeddings"]
    pp.tile(sdata, layout="grid", size_um=50.0)
    tiles = contract.tiles(sdata)
    tiles.obsm["X_toy"] = np.random.default_rng(0).normal(size=(tiles.n_obs, 5)).astype(np.float32)
    tiles.uns["embeddings"] = how
    tl.predict(sdata, model)
    with pytest.raises(KeyError, match=r'do not sit on spots.*layout="spots"'):
        tl.evaluate(sdata)


def test_units_on_no_lattice_have_no_iou(section: SpatialData) -> None:
    on_lattice = tl.evaluate(section)
    squares = section.shapes["tile_squares"]
    x, y = np.random.default_rng(0).uniform(0, 1000, (2, len(squares)))
    section.shapes["tile_squares"] = squares.set_geometry(shapely.box(x, y, x + 20, y + 20))
    places = contract.tile_geometry(section, contract.predictions(section)).centers
    neighbors = libpysal.weights.KNN.from_array(places, k=6).sparse
    try:
        with pytest.warns(UserWarning, match="IoU is left out"):
            scores = tl.evaluate(section, graph=neighbors)
    finally:
        section.shapes["tile_squares"] = squares
    assert scores["iou"].isna().all()
    np.testing.assert_allclose(scores["pearson"], on_lattice["pearson"])
    assert scores["morans_i_predicted"].notna().any()


# --------------------------------------------------------------------------------------------------
# against proteins, and under other names


@pytest.fixture
def with_proteins(section: SpatialData) -> SpatialData:
    """The section with proteins that follow two of its genes, one of them compensated below zero."""
    counts = contract.counts(section)
    values = counts[:, ["G0", "G1"]].X.toarray().astype(np.float32) * 0.7
    values[:, 1] -= 3.0
    table = ad.AnnData(
        X=values,
        obs=pd.DataFrame(index=counts.obs_names),
        var=pd.DataFrame(index=["CD20", "G1"]),
        obsm={"spatial": np.asarray(counts.obsm["spatial"]).copy()},
    )
    section.tables[contract.PROTEINS] = contract.annotate(table, region=contract.SPOTS)
    return section


def test_proteins_are_scored_under_the_names_given(with_proteins: SpatialData) -> None:
    scores = tl.evaluate(with_proteins, against="proteins", names={"G0": "CD20"}).set_index("gene")
    assert list(scores.index) == ["G0", "G1"]
    predicted = np.log1p(contract.predictions(with_proteins)[:, "G0"].X[:, 0])
    proteins = contract.proteins(with_proteins).X
    expected = scipy.stats.pearsonr(predicted, np.log1p(proteins[:, 0])).statistic
    assert scores.loc["G0", "pearson"] == pytest.approx(expected, abs=1e-5)
    # below zero the logarithm keeps the sign
    signed = np.sign(proteins[:, 1]) * np.log1p(np.abs(proteins[:, 1]))
    predicted = np.log1p(contract.predictions(with_proteins)[:, "G1"].X[:, 0])
    expected = scipy.stats.pearsonr(predicted, signed).statistic
    assert scores.loc["G1", "pearson"] == pytest.approx(expected, abs=1e-5)
    assert scores[["coverage", "nll", "nll_floor"]].isna().all(axis=None)
    assert scores[["bivariate_morans_i", "iou", "spearman"]].notna().all(axis=None)
    var = contract.predictions(with_proteins).var
    assert list(var["measured"][:3]) == ["CD20", "G1", ""]
    assert contract.predictions(with_proteins).uns["evaluation"]["against"] == "proteins"


def test_counts_may_go_by_other_names(section: SpatialData) -> None:
    plain = tl.evaluate(section)
    crossed = tl.evaluate(section, names={"G0": "G1", "G1": "G0"})
    predicted, measured = pair(section, "log1p")
    expected = scipy.stats.pearsonr(predicted[:, 0], measured[:, 1]).statistic
    assert crossed["pearson"][0] == pytest.approx(expected, abs=1e-5)
    pd.testing.assert_frame_equal(plain.iloc[2:], crossed.iloc[2:])


def test_names_that_lead_nowhere_are_listed(with_proteins: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"genes that were not predicted: \['G77'\]"):
        tl.evaluate(with_proteins, against="proteins", names={"G77": "CD20"})
    with pytest.raises(KeyError, match=r"names that were not measured: \['CD3'\].*proteins of \['CD20', 'G1'\]"):
        tl.evaluate(with_proteins, against="proteins", names={"G0": "CD3"})
    with pytest.raises(ValueError, match='"counts" or "proteins", found \'lipids\''):
        tl.evaluate(with_proteins, against="lipids")
    with pytest.raises(ValueError, match='have no total to scale to: use `transform="log1p"`'):
        tl.evaluate(with_proteins, against="proteins", transform="lognorm")
    del with_proteins.tables[contract.PROTEINS]
    with pytest.raises(KeyError, match=r"no table of proteins .*`stimage_sd.io.codex`"):
        tl.evaluate(with_proteins, against="proteins")
