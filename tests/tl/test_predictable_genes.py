"""p-values that are uniform where smooth maps have nothing to do with each other, and small where they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import shapely
from spatialdata import SpatialData

from stimage_sd import contract, pp, tl
from stimage_sd.stats.permutation import ShiftedMaps, shuffled_correlations

N_SIDE = 16


def smooth_maps(random: np.random.Generator, n: int, *, n_side: int = N_SIDE, sigma: float = 1.5) -> np.ndarray:
    """Maps ``(n_side ** 2, n)`` cut out of smoothed noise."""
    noise = random.normal(size=(n_side + 16, n_side + 16, n))
    smooth = scipy.ndimage.gaussian_filter(noise, (sigma, sigma, 0))[8:-8, 8:-8]
    return (smooth / smooth.std()).reshape(n_side**2, n)


@pytest.fixture
def with_maps(make_spots: Callable, planted: Callable) -> Callable[..., SpatialData]:
    """A function that makes a section whose predictions and counts are given maps."""

    def make(measured: np.ndarray, predicted: np.ndarray, *, sample: str = "test") -> SpatialData:
        counts = np.random.default_rng(0).poisson(np.exp(2.0 + measured))
        n_side = int(np.sqrt(len(measured)))
        sdata = make_spots(n_side=n_side, counts=counts, features=predicted[:, :2], sample=sample)
        cohort = planted(("train",), n_side=6, n_features=2, n_genes=measured.shape[1])
        model = tl.fit_nb(cohort.sections, genes=cohort.genes, extractor="toy", n_members=1, max_epochs=1)
        tl.predict(sdata, model)
        contract.predictions(sdata).X = np.exp(predicted).astype(np.float32)
        return sdata

    return make


def test_unrelated_smooth_maps_have_uniform_p_values_when_shifted_and_not_when_shuffled(with_maps) -> None:
    random = np.random.default_rng(1)
    sdata = with_maps(smooth_maps(random, 300), smooth_maps(random, 300))
    shift = tl.predictable_genes(sdata, method="shift")["p_value"]
    assert scipy.stats.kstest(shift, "uniform").pvalue > 0.01
    assert 0.02 <= (shift <= 0.05).mean() <= 0.09
    free = tl.predictable_genes(sdata, method="free")["p_value"]
    assert (free <= 0.05).mean() > 0.15
    assert scipy.stats.kstest(free, "uniform").pvalue < 1e-6


def test_a_cohorts_p_values_are_uniform_too(with_maps) -> None:
    random = np.random.default_rng(2)
    cohort = {name: with_maps(smooth_maps(random, 300), smooth_maps(random, 300), sample=name) for name in "ab"}
    table = tl.predictable_genes(cohort, n_permutations=400)
    assert scipy.stats.kstest(table["p_value"], "uniform").pvalue > 0.01
    assert 0.02 <= (table["p_value"] <= 0.05).mean() <= 0.09
    assert table["p_value"].min() >= 1 / 401


def test_related_maps_are_found_and_few_others(with_maps) -> None:
    random = np.random.default_rng(3)
    measured, predicted = smooth_maps(random, 80), smooth_maps(random, 80)
    predicted[:, :30] = 0.8 * measured[:, :30] + 0.6 * predicted[:, :30]
    cohort = {name: with_maps(measured, predicted, sample=name) for name in "ab"}
    table = tl.predictable_genes(cohort)
    related = {f"G{number}" for number in range(30)}
    found = set(table.loc[table["q_value"] < 0.05, "gene"])
    assert len(found & related) >= 29
    assert len(found - related) <= 4
    assert table["pearson"].is_monotonic_decreasing
    assert set(tl.predictable_genes(cohort, n_top=5)["gene"]) == set(table["gene"][:5])


def test_the_rate_is_benjamini_and_hochbergs_and_the_mean_is_evaluates(with_maps) -> None:
    random = np.random.default_rng(4)
    measured = smooth_maps(random, 12)
    cohort = {
        name: with_maps(measured, 0.5 * measured + smooth_maps(random, 12), sample=name) for name in ("one", "two")
    }
    contract.counts(cohort["one"]).X[:, 3] = 0
    contract.counts(cohort["one"]).X.eliminate_zeros()
    for sdata in cohort.values():
        counts = contract.counts(sdata).X.tolil()
        counts[:, 7] = 4
        contract.counts(sdata).X = counts.tocsr()
    table = tl.predictable_genes(cohort, n_permutations=200).set_index("gene")
    scores = tl.evaluate(cohort).groupby("gene")["pearson"].mean()
    np.testing.assert_allclose(table["pearson"], scores[table.index], atol=1e-12)
    assert table.loc["G3", "n_sections"] == 1
    assert table.loc["G0", "n_sections"] == 2
    assert table.index[-1] == "G7"
    assert table.loc["G7"].isna().sum() == 3
    p = np.sort(table["p_value"].dropna())
    q = [min(p[j] * len(p) / (j + 1) for j in range(rank, len(p))) for rank in range(len(p))]
    np.testing.assert_allclose(np.sort(table["q_value"].dropna()), q)


@pytest.mark.parametrize("kind", ["square", "hexagonal"])
def test_shifted_correlations_are_those_of_a_loop(kind: str) -> None:
    random = np.random.default_rng(5)
    rows, columns = np.divmod(np.arange(56), 8)
    if kind == "hexagonal":
        columns = 2 * columns + rows % 2
    kept = random.random(56) > 0.15
    rows, columns = rows[kept], columns[kept]
    coordinates = np.stack([columns, rows], axis=1).astype(float)
    moving, fixed = random.normal(size=(2, len(rows), 3))
    maps = ShiftedMaps(coordinates)
    found = maps.correlations(moving, fixed, np.arange(maps.n_shifts))
    place = {spot: number for number, spot in enumerate(zip(rows, columns, strict=True))}
    expected = []
    for turn in (1, -1):
        for down in range(-20, 21):
            for right in range(-40, 41):
                pairs = [
                    (number, place[turn * row + down, turn * column + right])
                    for (row, column), number in place.items()
                    if (turn * row + down, turn * column + right) in place
                ]
                if len(pairs) < len(rows) / 2 or (turn, down, right) == (1, 0, 0):
                    continue
                here, there = np.array(pairs).T
                r = [scipy.stats.pearsonr(moving[here, gene], fixed[there, gene])[0] for gene in range(3)]
                expected.append(np.array(r) * np.sqrt(len(pairs) / len(rows)))
    assert maps.n_shifts == len(expected)
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(expected, axis=0), atol=1e-9)


def test_shuffled_correlations_are_scipys() -> None:
    random = np.random.default_rng(6)
    moving, fixed = random.normal(size=(2, 20, 3))
    found = shuffled_correlations(moving, fixed, n_permutations=2, random=np.random.default_rng(0))
    again = np.random.default_rng(0)
    for row in found:
        order = again.permutation(20)
        expected = [scipy.stats.pearsonr(moving[order, gene], fixed[:, gene])[0] for gene in range(3)]
        np.testing.assert_allclose(row, expected)


def test_predictions_of_a_training_section_are_refused(planted: Callable) -> None:
    cohort = planted(("a", "b"), n_side=8, n_genes=4, n_features=3)
    model = tl.fit_nb({"a": cohort.sections["a"]}, genes=cohort.genes, extractor="toy", n_members=1, max_epochs=1)
    tl.predict(cohort.sections, model)
    with pytest.raises(
        ValueError, match=r"Section 'a' was predicted by a model that was trained on it.*cross_validate"
    ):
        tl.predictable_genes(cohort.sections)
    assert len(tl.predictable_genes(cohort.sections["b"])) == 4


def test_refusals(with_maps, make_spots: Callable) -> None:
    random = np.random.default_rng(7)
    sdata = with_maps(smooth_maps(random, 3), smooth_maps(random, 3))
    with pytest.raises(ValueError, match='"shift" or "free", found \'rotate\''):
        tl.predictable_genes(sdata, method="rotate")
    with pytest.raises(ValueError, match="of at least 1, found 0 and None"):
        tl.predictable_genes(sdata, n_permutations=0)
    with pytest.raises(KeyError, match="has no predictions"):
        tl.predictable_genes(make_spots(n_side=4))
    squares = sdata.shapes["tile_squares"]
    x, y = random.uniform(0, 500, (2, len(squares)))
    sdata.shapes["tile_squares"] = squares.set_geometry(shapely.box(x, y, x + 20, y + 20))
    with pytest.raises(ValueError, match=r"spots of section 'test' cannot be shifted: .*`method=\"free\"`"):
        tl.predictable_genes(sdata)
    assert tl.predictable_genes(sdata, method="free")["p_value"].notna().all()


def test_the_functional_genes_are_taken_as_a_list(data_dir: Path) -> None:
    from stimage_sd import io

    folder = data_dir / "her2st" / "C5"
    sdata = io.legacy_st(folder / "counts.tsv.gz", folder / "image.jpg", folder / "spots.tsv", sample="C5")
    listed = (data_dir / "genes" / "functional_1630.txt").read_text().split()
    with pytest.warns(UserWarning, match=r"of 1630 genes are not in every section: \['HES5'"):
        genes = pp.select_genes(sdata, listed)
    measured = set(contract.counts(sdata).var_names)
    assert genes == [gene for gene in listed if gene in measured]
    assert len(genes) > 1300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pp.select_genes(sdata, genes) == genes
