"""Pictures over the H&E: predictions, their uncertainty, tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from scipy.stats import pearsonr
from spatialdata import SpatialData
from spatialdata.transformations import remove_transformation

from stimage_sd import contract, pl, pp, tl
from stimage_sd.pl._prediction import UNLIKE
from stimage_sd.stats.spatial import binary_pattern


def drawn_values(ax: Axes) -> np.ndarray:
    return np.asarray(ax.collections[0].get_array())


def scale_bars(ax: Axes) -> list[AnchoredSizeBar]:
    return [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]


def with_tables(section: SpatialData, *names: str) -> SpatialData:
    """The section with only some of its tables, copied."""
    made = SpatialData(images=dict(section.images), shapes=dict(section.shapes))
    for name in names:
        made.tables[name] = section.tables[name].copy()
    made.attrs.update(copy.deepcopy(dict(section.attrs)))
    return made


# --------------------------------------------------------------------------------------------------
# prediction


def test_prediction_draws_counts_and_means_of_the_tables(result) -> None:
    observed, predicted = pl.prediction(result.section, "G3")
    table = contract.predictions(result.section)
    rows, counts = contract.align_to_spots(result.section, table)
    np.testing.assert_allclose(drawn_values(observed), np.log1p(counts[:, "G3"].X.toarray().ravel()))
    # the section was measured at a depth of its own
    depth = np.median(counts.X.toarray().sum(axis=1)) / table.uns["prediction"]["total"]
    assert abs(depth - 1) > 0.01
    np.testing.assert_allclose(drawn_values(predicted), np.log1p(depth * table[:, "G3"].X.ravel()), rtol=1e-6)
    np.testing.assert_allclose(predicted.collections[0].get_offsets(), table.obsm["spatial"])
    assert observed.get_title() == "G3, observed"
    r = pearsonr(drawn_values(predicted)[rows], drawn_values(observed))[0]
    assert predicted.get_title() == f"G3, predicted (r = {r:.2f})"


def color_bars(axes: np.ndarray) -> list[str]:
    return [label for panel in axes.ravel()[0].figure.axes if (label := panel.get_xlabel())]


def test_measured_and_predicted_share_one_scale_and_say_so(result) -> None:
    axes = pl.prediction(result.section, "G0")
    assert color_bars(axes) == [
        "log(1 + count), at the section's depth\nmeasured counts and predicted means on one scale"
    ]
    ranges = {(panel.collections[0].norm.vmin, panel.collections[0].norm.vmax) for panel in axes}
    together = np.concatenate([drawn_values(panel) for panel in axes])
    assert ranges == {tuple(np.percentile(together, [1, 99]))}


def test_ranges_of_their_own_are_asked_for(result) -> None:
    axes = pl.prediction(result.section, "G0", scale="each")
    assert color_bars(axes) == [
        "log(1 + count) (own scale)",
        "log(1 + predicted mean count), at the section's depth (own scale)",
    ]
    for panel in axes:
        norm = panel.collections[0].norm
        np.testing.assert_allclose((norm.vmin, norm.vmax), np.percentile(drawn_values(panel), [1, 99]))
    with pytest.raises(ValueError, match=r"`scale` to be one of \['shared', 'each', 'pattern'\], found 'own'"):
        pl.prediction(result.section, "G0", scale="own")


def test_predictions_of_unlike_tiles_can_be_hidden(result) -> None:
    scores = contract.predictions(result.section).obs["ood_score"].to_numpy()
    limit = float(np.median(scores))
    observed, predicted = pl.prediction(result.section, "G0", max_ood=limit)
    hidden = np.ma.getmaskarray(np.ma.masked_invalid(predicted.collections[0].get_array()))
    np.testing.assert_array_equal(hidden, scores > limit)
    assert np.isfinite(drawn_values(observed)).all()
    assert to_hex(predicted.collections[0].get_cmap().get_bad()) == UNLIKE
    assert f"gray: ood_score above {limit:g}" in predicted.figure.axes[-1].get_xlabel()


def test_a_map_without_a_familiar_tile_has_no_color_bar(result) -> None:
    section = with_tables(result.section, "tiles", "predictions")
    limit = float(contract.predictions(section).obs["ood_score"].min()) / 2
    drawn = pl.prediction(section, "G0", max_ood=limit, return_fig=True)
    assert [panel.get_title() for panel in drawn.axes] == ["G0, predicted (all tiles unlike)"]


def test_a_layer_of_the_predictions_is_refused(result) -> None:
    for section in (result.section, with_tables(result.section, "tiles", "predictions")):
        with pytest.raises(KeyError, match=r"'epistemic' is a layer of the predictions.*pl\.uncertainty"):
            pl.prediction(section, "G0", layer="epistemic")


def test_the_title_has_the_correlation_of_evaluate(result) -> None:
    for gene in ("G0", "G5"):
        r = result.scores.set_index("gene")["pearson"][gene]
        assert f"(r = {r:.2f})" in pl.prediction(result.section, gene)[1].get_title()


def test_counts_are_moved_to_the_depth_of_a_model_with_size_factors(planted: Callable) -> None:
    cohort = planted(("a", "b", "test"), n_side=10, n_genes=12, depth=0.5)
    section = cohort.sections.pop("test")
    options = {"n_members": 3, "max_epochs": 1, "size_factors": "total"}
    model = tl.fit_nb(cohort.sections, genes=cohort.genes, extractor="toy", **options)
    tl.predict(section, model)
    observed, predicted = pl.prediction(section, "G0")
    table, counts = contract.predictions(section), contract.counts(section).X.toarray()
    expected = np.log1p(counts[:, 0] * model.total / counts.sum(axis=1))
    np.testing.assert_allclose(drawn_values(observed), expected)
    np.testing.assert_allclose(drawn_values(predicted), np.log1p(table[:, "G0"].X.ravel()), rtol=1e-6)
    assert color_bars(np.array([observed]))[0].startswith("log(1 + count), at the model's depth\n")
    tl.predict(section, model, size_factors="total")
    observed, _ = pl.prediction(section, "G0")
    np.testing.assert_allclose(drawn_values(observed), np.log1p(counts[:, 0]))


def test_a_cohort_has_one_range_and_one_bar_per_gene(result, planted: Callable) -> None:
    other = planted(("other",), n_side=10, n_genes=12, depth=0.8).sections["other"]
    tl.predict(other, result.model)
    cohort = {"test": result.section, "other": other}
    axes = pl.prediction(cohort, ["G0", "G1"])
    assert len(color_bars(axes)) == 2
    for place, gene in enumerate(("G0", "G1")):
        panels = axes[:, place].ravel()
        together = np.concatenate([drawn_values(panel) for panel in panels])
        ranges = {(panel.collections[0].norm.vmin, panel.collections[0].norm.vmax) for panel in panels}
        assert ranges == {tuple(np.percentile(together, [1, 99]))}
        assert color_bars(axes)[place].startswith(f"{gene}: log(1 + count)")


def test_patterns_are_those_of_the_iou(result) -> None:
    """Paper, section 2.8 and Figure 2d."""
    table = contract.predictions(result.section)
    rows, counts = contract.align_to_spots(result.section, table)
    where = contract.places(result.section, table)[rows]
    for gene in ("G0", "G3"):
        observed, predicted = pl.prediction(result.section, gene, scale="pattern")
        expected = binary_pattern(np.log1p(counts[:, gene].X.toarray()), where)[:, 0]
        np.testing.assert_array_equal(drawn_values(observed), expected)
        both = drawn_values(predicted)[rows].astype(bool) & expected
        either = drawn_values(predicted)[rows].astype(bool) | expected
        iou = result.scores.set_index("gene")["iou"][gene]
        assert both.sum() / either.sum() == pytest.approx(iou)
        assert predicted.get_title() == f"{gene}, predicted pattern (IoU = {iou:.2f})"
    with pytest.raises(ValueError, match=r'measured gene for `scale="pattern"`, found no measured values'):
        pl.prediction(with_tables(result.section, "tiles", "predictions"), "G0", scale="pattern")


def test_classes_of_genes_are_drawn_with_their_auc(result) -> None:
    section = with_tables(result.section, "tiles", "counts")
    classifier = tl.fit_gene_classifier(section, genes=["G0", "G3"], extractor="toy")
    tl.predict(section, classifier)
    scores = tl.evaluate_genes_high(section).set_index("gene")
    observed, predicted = pl.prediction(section, "G3", key="gene_classes")
    counts = np.log1p(contract.counts(section)[:, "G3"].X.toarray().ravel())
    np.testing.assert_array_equal(drawn_values(observed), counts > counts.mean())
    table = section.tables["gene_classes"]
    np.testing.assert_array_equal(drawn_values(predicted), table[:, "G3"].layers["high"].ravel())
    assert predicted.get_title() == f"G3, predicted class (AUC = {scores['auc']['G3']:.2f})"
    assert [text.get_text() for text in predicted.get_legend().get_texts()] == ["Low", "High"]
    low, high = predicted.collections[0].to_rgba([0.0, 1.0])
    handles = predicted.get_legend().legend_handles
    assert [tuple(handle.get_markerfacecolor()) for handle in handles] != []
    np.testing.assert_allclose(mpl.colors.to_rgba_array([handle.get_color() for handle in handles]), [low, high])
    latent = pl.latent(section, "G3", basis="pca", key="gene_classes", use="embeddings", extractor="toy")
    assert latent.figure.axes[-1].get_ylabel() == "probability of High"


def test_prediction_has_a_scale_bar_of_a_round_length_where_mpp_is_known(result) -> None:
    panel = pl.prediction(result.section, "G0")[0]
    (bar,) = scale_bars(panel)
    assert bar.txt_label.get_text() == "200 µm"
    length_px = bar.size_bar.get_children()[0].get_width()
    assert length_px * contract.info(result.section)["mpp"] == pytest.approx(200.0)


def test_prediction_without_mpp_has_no_scale_bar(result) -> None:
    section = with_tables(result.section, "tiles", "predictions", "counts")
    contract.remember(section, mpp=None)
    remove_transformation(section.images["he"], "microns")
    assert not any(scale_bars(panel) for panel in pl.prediction(section, "G0"))


def test_prediction_without_counts_is_alone(result) -> None:
    section = with_tables(result.section, "tiles", "predictions")
    (panel,) = pl.prediction(section, "G1")
    assert panel.get_title() == "G1, predicted"


def test_prediction_of_a_gene_that_was_not_measured_is_alone(result) -> None:
    section = with_tables(result.section, "tiles", "predictions", "counts")
    counts = section.tables["counts"]
    del section.tables["counts"]
    section.tables["counts"] = counts[:, [name != "G1" for name in counts.var_names]].copy()
    assert len(pl.prediction(section, "G1")) == 1
    assert len(pl.prediction(section, "G2")) == 2


def test_prediction_of_a_constant_gene_says_that_r_is_undefined(result) -> None:
    section = with_tables(result.section, "tiles", "predictions", "counts")
    section.tables["predictions"].X[:, 0] = 2.0
    assert "r undefined" in pl.prediction(section, "G0")[1].get_title()


def test_prediction_draws_on_the_axes_given(result) -> None:
    figure, axes = plt.subplots(1, 2)
    returned = pl.prediction(result.section, "G0", ax=axes)
    assert list(returned) == list(axes)
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("draw", [pl.prediction, pl.uncertainty])
def test_an_unknown_gene_names_the_closest(result, draw: Callable) -> None:
    with pytest.raises(KeyError, match=r"No gene 'g10x' among the 12 predicted genes; closest: G10"):
        draw(result.section, "g10x")


@pytest.mark.parametrize("draw", [pl.prediction, pl.uncertainty])
def test_a_gene_like_none_names_some(result, draw: Callable) -> None:
    with pytest.raises(KeyError, match="No gene 'ERBB2' among the 12 predicted genes; such as G0, G1, G2"):
        draw(result.section, "ERBB2")


@pytest.mark.parametrize("draw", [pl.prediction, pl.uncertainty])
def test_a_section_without_predictions_says_what_to_run(make_spots, draw: Callable) -> None:
    with pytest.raises(KeyError, match=r"has no predictions\. Run `stimage_sd\.tl\.predict"):
        draw(make_spots(n_side=4), "G0")


def test_too_few_axes_are_refused(result) -> None:
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="Expected `ax` to be 2 axes, one per panel, found 1"):
        pl.prediction(result.section, "G0", ax=ax)
    with pytest.raises(ValueError, match="Expected `ax` to be 4 axes, one per panel, found 1"):
        pl.uncertainty(result.section, "G0", ax=ax)


def test_the_map_is_cut_to_the_tiles_and_lies_on_the_image(result) -> None:
    panel = pl.prediction(result.section, "G0")[0]
    positions = contract.predictions(result.section).obsm["spatial"]
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    assert left < positions[:, 0].min() < positions[:, 0].max() < right
    assert top < positions[:, 1].min() < positions[:, 1].max() < bottom  # y points down, as in the image
    height, width = contract.levels(result.section, "he")[0].shape[1:]
    assert panel.images[0].get_extent() == [0, width, height, 0]


# --------------------------------------------------------------------------------------------------
# uncertainty


def test_uncertainty_draws_deviations_and_width(result) -> None:
    axes = pl.uncertainty(result.section, "G5")
    table = contract.predictions(result.section)[:, "G5"]
    wanted = [
        table.X,
        np.sqrt(table.layers["aleatoric"]),
        np.sqrt(table.layers["epistemic"]),
        table.layers["upper"] - table.layers["lower"],
    ]
    for panel, values in zip(axes, wanted, strict=True):
        np.testing.assert_allclose(drawn_values(panel), values.ravel(), rtol=1e-5)
    assert [panel.get_title() for panel in axes] == [
        "G5, predicted mean",
        "aleatoric (the counts' scatter)",
        "epistemic (members disagree, patients differ)",
        "width of the 90% interval",
    ]


# --------------------------------------------------------------------------------------------------
# tiles


def test_tiles_by_category_of_tiles_predictions_and_spots(result) -> None:
    """Clusters and annotations: paper, Figures S8c, S13a and S17a."""
    section = with_tables(result.section, "tiles", "predictions", "counts")
    kinds = np.where(contract.tiles(section).obsm["spatial"][:, 0] < 200, "tumor", "stroma")
    contract.tiles(section).obs["kind"] = kinds
    section.tables["predictions"].obs["cluster"] = pd.Categorical(kinds, categories=["stroma", "fat", "tumor"])
    section.tables["counts"].obs["label"] = pd.Series(kinds, section.tables["counts"].obs_names).where(kinds == "tumor")
    colors = {}
    for column, names, drawn in (
        ("kind", {"stroma", "tumor"}, 100), ("cluster", {"stroma", "fat", "tumor"}, 100), ("label", {"tumor"}, 40),
    ):  # fmt: skip
        panel = pl.tiles(section, column, palette={"tumor": "#ff0000"})
        squares = panel.collections[0]
        assert len(squares.get_paths()) == drawn
        counts = {name: int((kinds == name).sum()) for name in names}
        assert {text.get_text() for text in panel.get_legend().get_texts()} == {f"{n} ({k})" for n, k in counts.items()}
        colors[column] = {tuple(face[:3]) for face in squares.get_facecolor()}
        assert panel.get_title() == f"test: {column}"
    assert (1.0, 0.0, 0.0) in colors["label"]
    whole = pl.tiles({"one": section, "two": section}, "cluster")
    assert [panel.get_title() for panel in whole] == ["one: cluster", "two: cluster"]


def test_tiles_draws_every_tile_at_its_size(result) -> None:
    panel = pl.tiles(result.section)
    table = contract.tiles(result.section)
    np.testing.assert_allclose(drawn_values(panel), table.obs["tissue_fraction"])
    corners = panel.collections[0].get_paths()[0].vertices
    side = contract.tiling(result.section)["side_px"]
    np.testing.assert_allclose(np.ptp(corners, axis=0), [side, side])
    np.testing.assert_allclose(corners[:4].mean(axis=0), table.obsm["spatial"][0])
    assert panel.get_title() == "test: 100 tiles, 100 kept"


def test_tiles_by_keep_counts_them_in_the_legend(make_slide, picture) -> None:
    image = np.full((400, 600, 3), 255, np.uint8)
    image[:, 200:] = (200, 120, 180)
    section = make_slide(image, mpp=0.5)
    pp.tile(section, size_um=30)
    keep = contract.tiles(section).obs["keep"]
    panel = pl.tiles(section, "keep")
    texts = [text.get_text() for text in panel.get_legend().get_texts()]
    assert texts == [f"keep: yes ({keep.sum()})", f"keep: no ({(~keep).sum()})"]


def test_example_tiles_are_cut_from_the_image(make_slide, picture) -> None:
    image = np.minimum(picture(640, 640, seed=3), 200)
    section = make_slide(image, mpp=1.0)
    contract.write_tissue(section, np.ones((64, 64), bool), downsample=(10.0, 10.0))
    pp.tile(section, size_um=160)  # the size that examples are shown at: nothing is resampled
    panel = pl.tiles(section, n_examples=3)
    assert len(panel.child_axes) == 3
    assert [inset.texts[0].get_text() for inset in panel.child_axes] == ["1", "2", "3"]
    np.testing.assert_array_equal(panel.child_axes[0].images[0].get_array(), image[:160, :160])
    np.testing.assert_array_equal(panel.child_axes[2].images[0].get_array(), image[-160:, -160:])


def test_example_tiles_over_the_border_are_mirrored(make_slide, picture) -> None:
    image = np.minimum(picture(400, 400, seed=4), 200)
    section = make_slide(image, mpp=1.0)
    contract.write_tissue(section, np.ones((40, 40), bool), downsample=(10.0, 10.0))
    pp.tile(section, size_um=160)
    table = contract.tiles(section)
    # reaches 40 px over the left and 20 px over the upper border
    table.obsm["spatial"][0] = (40.0, 60.0)
    section.shapes["tile_squares"].loc[0, "geometry"] = shapely.box(-40, -20, 120, 140)
    table.obs["keep"] = np.arange(table.n_obs) == 0
    (inset,) = pl.tiles(section, n_examples=1).child_axes
    expected = np.pad(image, ((20, 0), (40, 0), (0, 0)), mode="reflect")[:160, :160]
    np.testing.assert_array_equal(inset.images[0].get_array(), expected)


def test_example_tiles_read_only_the_chunks_they_touch(make_slide, counted_image) -> None:
    counted = counted_image(2048, 2048, chunk=256, n_levels=3)
    section = make_slide(counted.levels, mpp=1.0)
    contract.write_tissue(section, np.ones((64, 64), bool), downsample=(32.0, 32.0))
    pp.tile(section, size_um=200)
    counted.reads.clear()
    pl.tiles(section, n_examples=2)
    assert 0 < counted.full_reads() <= 18  # 3 x 3 chunks of 64 around each of two tiles, at most


def test_more_examples_than_tiles_are_all_tiles(make_slide) -> None:
    section = make_slide(np.full((400, 400, 3), (200, 120, 180), np.uint8), mpp=1.0)
    pp.tile(section, size_um=200)
    assert len(pl.tiles(section, n_examples=50).child_axes) == 4


def test_tiles_refuses_what_it_cannot_draw(result, make_spots, make_slide) -> None:
    with pytest.raises(KeyError, match=r"No column 'nothing' among the tiles'.*tissue_fraction"):
        pl.tiles(result.section, "nothing")
    with pytest.raises(ValueError, match="or up to 40 categories, found 'spot_id' with 100"):
        pl.tiles(result.section, "spot_id")
    with pytest.raises(ValueError, match="`n_examples` of at least 0, found -1"):
        pl.tiles(result.section, n_examples=-1)
    with pytest.raises(KeyError, match=r"has no tiles\. Run `stimage_sd\.pp\.tile"):
        pl.tiles(make_spots(n_side=4, tiled=False))


def test_prediction_shows_the_protein_that_was_compared_with(make_spots) -> None:
    counts = np.random.default_rng(1).poisson(4.0, (64, 3))
    features = np.random.default_rng(2).normal(size=(64, 5))
    sdata = make_spots(counts=counts, features=features)
    model = tl.fit_nb(sdata, genes=["G0", "G1"], extractor="toy", n_members=2, max_epochs=2)
    tl.predict(sdata, model)
    table = contract.counts(sdata)[:, ["G2"]].copy()
    table.var_names = ["CD20"]
    sdata.tables[contract.PROTEINS] = contract.annotate(table, region=contract.SPOTS)
    tl.evaluate(sdata, against="proteins", names={"G0": "CD20"})
    observed, _ = pl.prediction(sdata, "G0")
    np.testing.assert_allclose(observed.collections[0].get_array(), np.log1p(counts[:, 2]))
    assert [ax.get_xlabel() for ax in observed.figure.axes if "CD20" in ax.get_xlabel()] == [
        "log(1 + intensity of CD20) (own scale)"
    ]
    assert len(pl.prediction(sdata, "G1")) == 1
