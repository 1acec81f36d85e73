"""Pictures of numbers: scores, training, calibration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats

from stimage_sd import contract, pl, tl
from stimage_sd.likelihood.pit import coverage, cumulative
from stimage_sd.pl._calibration import KEPT, LEVELS


def line(ax: plt.Axes, label: str) -> np.ndarray:
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return found.get_xydata()


# --------------------------------------------------------------------------------------------------
# scores


def test_scores_draws_a_point_a_gene(result) -> None:
    axes = pl.scores(result.scores)
    assert len(axes) == 5
    names = ["pearson", "bivariate_morans_i", "iou", "coverage"]
    for panel, name in zip(axes, names, strict=False):
        points = panel.collections[1].get_offsets()[:, 1]  # after the violin
        np.testing.assert_allclose(points, result.scores[name])
    gain = axes[4].collections[1].get_offsets()[:, 1]
    np.testing.assert_allclose(gain, result.scores["nll_floor"] - result.scores["nll"])


def test_scores_names_the_best_genes_and_the_median(result) -> None:
    panel = pl.scores(result.scores, n_named=3)[0]
    best = result.scores.nlargest(3, "pearson")["gene"].tolist()
    assert [text.get_text() for text in panel.texts] == best
    assert panel.get_xticklabels()[0].get_text() == f"test\nmedian {result.scores['pearson'].median():.2f}"


def test_names_of_genes_with_equal_scores_do_not_overlap(result) -> None:
    table = result.scores.assign(pearson=0.5, nll=1.0, nll_floor=1.0)
    panel = pl.scores(table)[0]
    panel.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in panel.texts]  # without the line to the point
    assert all(lower.y1 <= upper.y0 + 1 for upper, lower in itertools.pairwise(boxes))


def test_scores_of_several_sections_stand_side_by_side(result) -> None:
    other = result.scores.assign(section="other", pearson=[np.nan, *np.linspace(0.2, 0.4, 11)])
    table = pd.concat([result.scores, other, result.scores.assign(section="third", pearson=np.nan)])
    panel = pl.scores(table)[0]
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels[1:] == ["other\nmedian 0.30\n1 undefined", "third\nno scores"]


def test_scores_refuses_another_table(result) -> None:
    with pytest.raises(ValueError, match=r"scores that `stimage_sd\.tl\.evaluate` returns, found a table lacking"):
        pl.scores(result.scores.drop(columns="iou"))
    with pytest.raises(ValueError, match="found a table without a row"):
        pl.scores(result.scores.iloc[:0])
    with pytest.raises(ValueError, match="Expected `ax` to be 5 axes, one per panel, found 1"):
        pl.scores(result.scores, ax=plt.subplots()[1])


# --------------------------------------------------------------------------------------------------
# training


def test_training_draws_the_history(result) -> None:
    _, ax = plt.subplots()
    assert pl.training(result.model, ax=ax) is ax
    history = result.model.history
    for name in ("training", "validation"):
        mean = history.groupby("epoch")[f"{name}_nll"].mean()
        np.testing.assert_allclose(line(ax, f"{name}, mean"), np.stack([mean.index, mean], axis=1))
    best = line(ax, "a member's best epoch")
    assert best[:, 0].tolist() == result.model.training["metrics"]["best_epoch"]
    np.testing.assert_allclose(best[:, 1], result.model.training["metrics"]["validation_nll"])
    assert len(ax.lines) == 2 * (result.model.n_members + 1) + 1


def test_training_shows_all_but_an_early_spike(result) -> None:
    history = {
        "epoch": list(range(1, 101)),
        "member": [0] * 100,
        "training_nll": [1000.0, *np.linspace(2.0, 1.0, 99)],
        "validation_nll": [1000.0, *np.linspace(2.2, 1.5, 99)],
    }
    ax = pl.training(replace(result.model, training={"history": history}))
    low, high = ax.get_ylim()
    assert low < 1.0
    assert 2.2 < high < 4.0


def test_the_mean_loss_does_not_jump_where_a_member_stops(result) -> None:
    # the member that stops first is far better
    history = {
        "epoch": [1, 2, 3, 1, 2, 3, 4, 5],
        "member": [0, 0, 0, 1, 1, 1, 1, 1],
        "training_nll": [1.0, 0.8, 0.6, 3.0, 2.8, 2.6, 2.4, 2.2],
        "validation_nll": [1.1, 0.9, 0.7, 3.1, 2.9, 2.7, 2.5, 2.3],
    }
    ax = pl.training(replace(result.model, training={"history": history}))
    np.testing.assert_allclose(line(ax, "training, mean")[:, 1], [2.0, 1.8, 1.6, 1.5, 1.4])
    np.testing.assert_allclose(line(ax, "validation, mean")[:, 1], [2.1, 1.9, 1.7, 1.6, 1.5])
    assert ax.get_title() == "2 members, 12 genes, head 'paper'"


def test_training_of_a_model_without_history(result) -> None:
    with pytest.raises(ValueError, match="Expected a model with a training history"):
        pl.training(replace(result.model, training={}))


# --------------------------------------------------------------------------------------------------
# calibration


def test_coverage_equals_scipys_intervals() -> None:
    random = np.random.default_rng(0)
    mean, r = random.uniform(0.1, 30.0, 4000), random.uniform(0.5, 20.0, 4000)
    counts = random.poisson(mean)
    whole, _ = coverage(*cumulative(counts.astype(float), mean, mean + mean**2 / r), LEVELS)
    for level, found in zip(LEVELS, whole, strict=True):
        low, high = stats.nbinom.interval(level, r, r / (r + mean))
        assert found == pytest.approx(((counts >= low) & (counts <= high)).mean(), abs=1e-3)


def test_coverage_is_nominal_for_true_distributions_whatever_the_counts() -> None:
    random = np.random.default_rng(1)
    mean, r = random.uniform(0.05, 4.0, 60_000), random.uniform(0.5, 20.0, 60_000)
    counts = random.negative_binomial(r, r / (r + mean)).astype(float)
    whole, part = coverage(*cumulative(counts, mean, mean + mean**2 / r), LEVELS)
    np.testing.assert_allclose(part, LEVELS, atol=0.01)
    assert (whole > LEVELS).all()


def test_coverage_without_excess_variance_is_the_poissons() -> None:
    random = np.random.default_rng(2)
    mean = random.uniform(0.5, 20.0, 3000)
    counts = random.poisson(mean).astype(float)
    whole, _ = coverage(*cumulative(counts, mean, 0.5 * mean), np.array([0.5, 0.9]))
    for level, found in zip((0.5, 0.9), whole, strict=True):
        low, high = stats.poisson.interval(level, mean)
        assert found == pytest.approx(((counts >= low) & (counts <= high)).mean(), abs=3e-3)


def test_calibration_marks_the_stored_interval(result) -> None:
    axes = pl.calibration(result.section)
    assert len(axes) == 4
    assert axes[0].get_xlabel() == "nominal coverage"
    (star,) = [drawn for drawn in axes[0].lines if drawn.get_marker() == "*"]
    assert star.get_xydata()[0] == pytest.approx([0.9, result.scores["coverage"].mean()])


def test_calibration_groups_errors_by_predicted_deviation(result) -> None:
    points = line(pl.calibration(result.section)[1], "a tenth of the predictions")
    table = contract.predictions(result.section)
    assert len(points) == 10
    assert (np.diff(points[:, 0]) > 0).all()
    rows, counts = contract.align_to_spots(result.section, table)
    made = contract.at_depth_of(table, rows, table.var_names, contract.measured_exposure(table, rows, counts))
    error = counts[:, table.var_names].X.toarray() - made.mean
    assert np.sqrt((points[:, 1] ** 2).mean()) == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    assert np.sqrt((points[:, 0] ** 2).mean()) == pytest.approx(np.sqrt(made.variance.mean()), rel=1e-4)


def test_calibration_draws_the_risk_of_the_tiles_that_are_kept(result) -> None:
    ax = pl.calibration(result.section)[2]
    for kind in ("total", "epistemic"):
        table = tl.risk_coverage(result.section, uncertainty=kind, coverages=KEPT)
        expected = (table["risk"] / table["random"]).groupby(table["coverage"]).mean()
        np.testing.assert_allclose(line(ax, f"least {kind} uncertainty")[:, 1], expected, rtol=1e-6)
        assert line(ax, f"least {kind} uncertainty")[-1] == pytest.approx([1.0, 1.0])
    best = line(ax, "least error")[:, 1]
    assert (np.diff(best) >= 0).all()
    assert (best <= line(ax, "least total uncertainty")[:, 1] + 1e-12).all()


def test_calibration_of_chosen_genes(result) -> None:
    ax = pl.calibration(result.section, genes=["G0", "G2"])[0]
    assert ax.get_title() == "coverage, 200 counts"


def test_calibration_of_a_large_section_takes_some_tiles(result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stimage_sd.pl._calibration._MOST", 240)
    assert pl.calibration(result.section)[0].get_title() == "coverage, 240 counts"


def test_calibration_refuses(result, make_spots, make_slide) -> None:
    with pytest.raises(KeyError, match="No gene 'G99' among the 12 predicted genes; closest"):
        pl.calibration(result.section, genes=["G99"])
    with pytest.raises(KeyError, match=r"has no predictions\. Run"):
        pl.calibration(make_spots(n_side=4))
    with pytest.raises(ValueError, match="Expected `ax` to be 4 axes"):
        pl.calibration(result.section, ax=[plt.subplots()[1]])
