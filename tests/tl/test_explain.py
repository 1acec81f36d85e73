"""Explanations: planted nuclei, `lime`'s own results, what is held fixed, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import cv2
import geopandas
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import spatialdata
from anndata import AnnData
from lime.lime_image import LimeImageExplainer
from sklearn.metrics import roc_auc_score
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Scale

from stimage_sd import contract, models, pp, tl
from stimage_sd.io._raster import raster_from_array
from stimage_sd.io._section import assemble

SIDE, N_SIDE = 96, 9
SMALL, LARGE = 5, 10
N_RANDOM = 24
EXTRACTOR = "granulometry"


def granulometry(tiles: np.ndarray) -> np.ndarray:
    """How much of a tile is dark, in discs of several sizes, and its color: what large nuclei are told by."""
    values = []
    for tile in tiles:
        dark = (tile[..., 1] < 120).astype(np.uint8)
        opened = [
            cv2.morphologyEx(dark, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
            for size in (3, 7, 9, 13)
        ]
        values.append([100 * one.mean() for one in opened] + (tile.mean(axis=(0, 1)) / 10).tolist())
    return np.array(values, dtype=np.float32)


def paint(seed: int) -> SpatialData:
    """A section of nuclei, small and large, whose first gene follows the large ones; the others are random."""
    random = np.random.default_rng(seed)
    size = SIDE * (N_SIDE + 1)
    image = random.normal((222, 180, 208), 4, (size, size, 3))
    centers = np.stack(np.divmod(np.arange(N_SIDE**2), N_SIDE)[::-1], axis=1) * SIDE + SIDE
    discs, radii, n_large = [], [], []
    for x, y in centers:
        slots = np.stack(np.divmod(random.permutation(16), 4), axis=1) * 24.0 - 36.0
        large = int(random.integers(0, 8))
        n_large.append(large)
        for number, (dx, dy) in enumerate(slots[:13]):
            radius = LARGE if number < large else SMALL
            discs.append((x + dx, y + dy))
            radii.append(radius)
            cv2.circle(image, (round(x + dx), round(y + dy)), radius, tuple(random.normal((95, 55, 130), 5)), -1)
    planted = random.poisson(4.0 + 6.0 * np.array(n_large))
    noise = random.poisson(random.permutation(planted)[:, None] * np.ones(N_RANDOM))
    counts = np.column_stack([planted, np.stack([random.permutation(column) for column in noise.T], axis=1)])
    table = AnnData(
        X=sp.csr_matrix(counts),
        obs=pd.DataFrame(index=[f"spot-{number}" for number in range(len(centers))]),
        var=pd.DataFrame(index=["PLANTED", *(f"RANDOM{number}" for number in range(N_RANDOM))]),
        obsm={"spatial": centers.astype(float)},
    )
    levels = raster_from_array(image.clip(0, 255).astype(np.uint8))
    sdata = assemble(levels, table, diameter_px=SIDE, sample=f"painted{seed}", platform="made", mpp=0.5)
    nuclei = geopandas.GeoDataFrame(
        {"kind": np.where(np.array(radii) == LARGE, "large", "small")},
        geometry=shapely.buffer(shapely.points(np.array(discs) + 0.5), np.array(radii) + 0.5),
    )
    nuclei.index = nuclei.index + 1000
    sdata.shapes["nuclei"] = contract.build_shapes(nuclei, mpp=0.5)
    pp.tile(sdata, target_px=SIDE, min_tissue=0)
    pp.embed(sdata, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=1)
    return sdata


@pytest.fixture(scope="module")
def painted(_session_cache: None) -> dict[str, SpatialData]:
    models.register_extractor(EXTRACTOR, granulometry, input_size=None, embedding_size=7, weights_hash="granulometry-1")
    return {f"painted{seed}": paint(seed) for seed in (0, 1, 2)}


@pytest.fixture(scope="module")
def model(painted: dict) -> models.NBModel:
    train = {name: painted[name] for name in ("painted0", "painted1")}
    genes = list(painted["painted0"].tables["counts"].var_names)
    return tl.fit_nb(train, genes=genes, extractor=EXTRACTOR, n_members=2, max_epochs=200, rank=None)


@pytest.fixture
def section(painted: dict) -> SpatialData:
    return copy.deepcopy(painted["painted2"])


@pytest.fixture(scope="module")
def explained(painted: dict, model: models.NBModel) -> SpatialData:
    sdata = copy.deepcopy(painted["painted2"])
    tl.predict(sdata, model)
    tl.explain(sdata, model, list(model.genes), tiles=[20, 31, 42], n_samples=300)
    return sdata


def auc(frame: geopandas.GeoDataFrame, column: str) -> float:
    each = [
        roc_auc_score(group["kind"] == "large", group[column])
        for _, group in frame.groupby("tile")
        if group["kind"].nunique() == 2
    ]
    return float(np.mean(each))


def test_large_nuclei_that_carry_a_gene_are_found(explained: SpatialData) -> None:
    frame = explained.shapes["nuclei_explained"]
    assert auc(frame, "lime_PLANTED") >= 0.9


def test_genes_of_random_labels_point_at_no_nuclei(explained: SpatialData) -> None:
    frame = explained.shapes["nuclei_explained"]
    values = [auc(frame, f"lime_RANDOM{number}") for number in range(N_RANDOM)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.1)


def test_the_whole_tile_is_predicted_as_predict_does(explained: SpatialData) -> None:
    table, predictions = contract.explanations(explained), contract.predictions(explained)
    rows = pd.Index(predictions.obs["instance_id"]).get_indexer(table.obs["instance_id"])
    np.testing.assert_allclose(table.layers["prediction"], predictions[rows, table.var_names].X, rtol=1e-5)
    assert table.obs["instance_id"].tolist() == [20, 31, 42]
    assert (table.obs["n_segments"] > 10).all()
    assert np.asarray(table.layers["r2"])[:, 0].min() > 0.3
    assert np.isfinite(np.asarray(table.layers["stability"])).all()


def test_what_is_written_survives_the_disk(explained: SpatialData, tmp_path: Path) -> None:
    explained.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    frame, before = back.shapes["nuclei_explained"], explained.shapes["nuclei_explained"]
    np.testing.assert_array_equal(frame["lime_PLANTED"], before["lime_PLANTED"])
    nuclei = back.shapes["nuclei"].loc[frame["nucleus"]]
    np.testing.assert_array_equal(frame["kind"], nuclei["kind"])
    np.testing.assert_allclose(frame["area_um2"], nuclei.area.to_numpy() * 0.25)
    assert back.tables["explanations"].shape == (3, 1 + N_RANDOM)
    assert contract.counts_name(back) == "counts"


def lime_itself(sdata: SpatialData, model: models.NBModel, tile: int, *, seed: int, n_samples: int) -> np.ndarray:
    """Weights by `lime`'s own loop over the tile's pixels; the other fields of view follow what it hid."""
    from stimage_sd.tl._explain.segments import segment_tile
    from stimage_sd.tl._explain.tile_views import open_tiles

    opened = open_tiles(sdata, model, [tile], section="it", extractors=())
    row, views, area = next(opened.read())
    found = segment_tile(sdata, area, "nuclei", contract.nuclei(sdata))
    segments = [found.seen_at(positions) for positions in views[0].positions]
    first = [np.flatnonzero(segments[0].ravel() == number)[0] for number in range(len(found.numbers))]
    extractor = opened.extractors[0]
    column = np.array([0])

    def classifier(images: np.ndarray) -> np.ndarray:
        shown = (images.reshape(len(images), -1, 3)[:, first] != 0).any(axis=-1)
        own = [extractor(images)]
        for pixels, seen in zip(views[0].pixels[1:], segments[1:], strict=True):
            copies = np.repeat(pixels[None], len(images), axis=0)
            for image, row_shown in zip(copies, shown, strict=True):
                for number in np.flatnonzero(~row_shown):
                    image[seen == number] = 0
            own.append(extractor(copies))
        return opened.stand_ins.outputs(row, [np.concatenate(own, axis=1)], column)["mean"].astype(np.float64)

    explainer = LimeImageExplainer(random_state=seed)
    explanation = explainer.explain_instance(
        views[0].pixels[0], classifier, labels=(0,), top_labels=None, hide_color=0, num_samples=n_samples,
        segmentation_fn=lambda _: segments[0],
    )  # fmt: skip
    weights = np.zeros(len(found.numbers))
    for number, weight in explanation.local_exp[0]:
        weights[number] = weight
    return weights


def test_scores_are_those_of_lime_itself(section: SpatialData, model: models.NBModel) -> None:
    expected = lime_itself(section, model, 31, seed=3, n_samples=60)
    tl.explain(
        section, model, "PLANTED", tiles=[31], n_samples=60, stability=None, seed=3, hide_color=0, hide_background=True
    )
    found = section.shapes["nuclei_explained"]["lime_PLANTED"].to_numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected[1:], rtol=0, atol=1e-6 * scale)
    background = contract.explanations(section).layers["background"][0, 0]
    assert background == pytest.approx(expected[0], abs=1e-6 * scale)


def test_results_do_not_depend_on_threads_or_on_other_tiles(section: SpatialData, model: models.NBModel) -> None:
    tl.explain(section, model, "PLANTED", tiles=[20, 31], n_samples=40, n_jobs=1)
    alone = section.shapes["nuclei_explained"].query("tile == 31")["lime_PLANTED"].to_numpy()
    tl.explain(section, model, "PLANTED", tiles=[31], n_samples=40, n_jobs=2)
    np.testing.assert_array_equal(section.shapes["nuclei_explained"]["lime_PLANTED"], alone)


def test_uncertainty_and_seeds(section: SpatialData, model: models.NBModel) -> None:
    tl.explain(section, model, "PLANTED", tiles=[31], n_samples=40, of=["mean", "epistemic"], n_seeds=2, seed=5)
    frame, table = section.shapes["nuclei_explained"], contract.explanations(section)
    each = []
    for seed in (5, 6):
        other = copy.deepcopy(section)
        tl.explain(other, model, "PLANTED", tiles=[31], n_samples=40, of="epistemic", seed=seed)
        each.append(other.shapes["nuclei_explained"]["lime_PLANTED_epistemic"].to_numpy())
    # a variance between members in float32: batches of another size round its last digits otherwise
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-4 * np.abs(each).max())
    close(frame["lime_PLANTED_epistemic"], np.mean(each, axis=0))
    close(frame["lime_PLANTED_epistemic_sd"], np.std(each, axis=0))
    # the mean of both seeds is steadier than the second one alone
    assert contract.explanations(other).layers["stability_epistemic"][0, 0] < table.layers["stability_epistemic"][0, 0]
    assert table.obs["n_samples"].tolist() == [78]  # the whole tile and 19 pairs, twice


def test_copies_are_added_until_the_scores_are_stable(
    section: SpatialData, model: models.NBModel, caplog: pytest.LogCaptureFixture
) -> None:
    def scores(**options: object) -> tuple[np.ndarray, int, float]:
        tl.explain(section, model, "PLANTED", tiles=[31], seed=2, **options)
        table = contract.explanations(section)
        frame = section.shapes["nuclei_explained"]
        return frame["lime_PLANTED"].to_numpy(), table.obs["n_samples"].iloc[0], table.layers["stability"][0, 0]

    with caplog.at_level("INFO", logger="stimage_sd"):
        found, n_samples, stability = scores()
    assert "(1 tiles, 1000 copies each)" in caplog.text
    assert n_samples < 1000
    assert stability >= 0.96
    same, *_ = scores(n_samples=int(n_samples), stability=1.0)
    np.testing.assert_array_equal(found, same)
    many, n_samples, _ = scores(n_samples=4000, stability=None)
    assert n_samples == 4000
    assert np.corrcoef(found, many)[0, 1] >= 0.95


@pytest.mark.parametrize("kind", ["slic", "labels", "function"])
def test_other_segments(section: SpatialData, model: models.NBModel, kind: str) -> None:
    quarters = np.kron(np.array([[0, 3], [5, 9]]), np.ones((SIDE // 2, SIDE // 2), int))
    x, y = section.tables["tiles"].obsm["spatial"][31]
    segments: object = kind
    if kind == "labels":
        labels = np.zeros((N_SIDE + 1, N_SIDE + 1), np.int32)
        labels[int(y) // SIDE, int(x) // SIDE] = 7
        scale = Scale([SIDE, SIDE], axes=("y", "x"))
        section.labels["regions"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": scale})
        segments = "regions"
    elif kind == "function":
        segments = lambda tile: quarters
    tl.explain(section, model, "PLANTED", tiles=[31], n_samples=20, segments=segments)
    frame = section.shapes["segments_explained"]
    area = shapely.box(x - SIDE / 2, y - SIDE / 2, x + SIDE / 2, y + SIDE / 2)
    if kind == "labels":
        assert frame["nucleus"].tolist() == [7]
        np.testing.assert_allclose(frame.area, SIDE**2)
    elif kind == "function":
        assert frame["nucleus"].tolist() == [3, 5, 9]
        np.testing.assert_allclose(frame.area, SIDE**2 / 4)
        assert frame.geometry.iloc[0].equals(shapely.box(x, y - SIDE / 2, x + SIDE / 2, y))
    else:
        assert frame.area.sum() == pytest.approx(area.area)
        assert np.isnan(contract.explanations(section).layers["background"]).all()
    assert "nuclei_explained" not in section.shapes


def test_a_tile_without_nuclei_says_so(section: SpatialData, model: models.NBModel) -> None:
    x, y = section.tables["tiles"].obsm["spatial"][31]
    nuclei = section.shapes["nuclei"]
    section.shapes["nuclei"] = nuclei[nuclei.distance(shapely.Point(x, y)) > SIDE]
    tl.explain(section, model, "PLANTED", tiles=[20, 31], n_samples=20)
    table = contract.explanations(section)
    assert table.obs["reason"].tolist() == ["", "no segment on the tile"]
    assert np.isnan(table.layers["prediction"][1, 0])
    del section.tables["explanations"], section.shapes["nuclei_explained"]
    with pytest.raises(ValueError, match="None of the 1 tiles"):
        tl.explain(section, model, "PLANTED", tiles=[31], n_samples=20)
    assert "explanations" not in section.tables


def test_gene_classifiers_and_combinations(section: SpatialData, painted: dict, model: models.NBModel) -> None:
    train = {name: painted[name] for name in ("painted0", "painted1")}
    classifier = tl.fit_gene_classifier(train, genes=["PLANTED", "RANDOM0"], extractor=EXTRACTOR)
    tl.predict(section, classifier)
    tl.explain(section, classifier, "PLANTED", tiles=[31], n_samples=40)
    classes = contract.gene_classes(section)
    row = classes.obs["instance_id"].tolist().index(31)
    assert contract.explanations(section).X[0, 0] == pytest.approx(classes[row, "PLANTED"].X[0, 0], rel=1e-5)
    with pytest.raises(ValueError, match="has no output"):
        tl.explain(section, classifier, "PLANTED", tiles=[31], n_samples=40, of="epistemic")
    both = tl.combine([model, model])
    tl.predict(section, both)
    tl.explain(section, both, "PLANTED", tiles=[31], n_samples=40)
    predictions = contract.predictions(section)
    assert contract.explanations(section).X[0, 0] == pytest.approx(predictions[row, "PLANTED"].X[0, 0], rel=1e-5)


def test_what_is_refused(section: SpatialData, model: models.NBModel) -> None:
    def refused(error: type, match: str, **changes: object) -> None:
        options = {"tiles": [31], "n_samples": 20, "gene": "PLANTED", "model": model} | changes
        with pytest.raises(error, match=match):
            tl.explain(section, options.pop("model"), options.pop("gene"), **options)

    refused(KeyError, "found \\['NONE'\\]", gene="NONE")
    refused(KeyError, "which are not", tiles=[10_000])
    refused(KeyError, "tl.predict", tiles=None)
    refused(ValueError, "`of` among", of="sd")
    refused(ValueError, "at least 10 samples", n_samples=3)
    refused(ValueError, "`stability` as a correlation", stability=1.5)
    refused(ValueError, "tl.saliency", method="gradients")
    refused(ValueError, "one of the labels", segments="cells")
    refused(ValueError, "gray level", hide_color="pink")
    refused(TypeError, "found dict", model={})
    assert "nuclei_explained" not in section.shapes
    image = section.images.pop("he")
    darker = raster_from_array(np.full((*image["scale0"]["image"].shape[1:], 3), 90, np.uint8))
    section.images["he"] = contract.build_image(darker, mpp=0.5)
    refused(ValueError, "pp.embed")
    del section.shapes["nuclei"]
    refused(KeyError, "pp.segment_nuclei")


def test_summaries(explained: SpatialData) -> None:
    best = tl.top_tiles(explained, "PLANTED", n_tiles=3)
    predictions = contract.predictions(explained)
    values = pd.Series(predictions[:, "PLANTED"].X.ravel(), index=predictions.obs["instance_id"].to_numpy())
    assert best == values.sort_values(ascending=False, kind="stable").index[:3].tolist()
    assert set(tl.top_tiles(explained, "PLANTED", n_tiles=2, among=[3, 4, 5])) <= {3, 4, 5}
    tiles = contract.tiles(explained)
    tiles.obs["annotation"] = np.where(tiles.obs["instance_id"].isin([2, 4, 6]), "Tumor", None)
    assert set(tl.top_tiles(explained, "PLANTED", among={"annotation": "Tumor"})) == {2, 4, 6}
    with pytest.raises(ValueError, match=r"tiles with 'annotation' of \['Fat'\] .* found none.* has \['Tumor'\]"):
        tl.top_tiles(explained, "PLANTED", among={"annotation": ["Fat"]})
    listed = tl.explained_nuclei(explained, ["PLANTED", "RANDOM0"], by="kind")
    frame = explained.shapes["nuclei_explained"]
    assert len(listed) == 2 * len(frame)
    compared = tl.compare_explanations(explained, "PLANTED", "RANDOM0", by="kind").set_index("class")
    positive = frame[frame["lime_PLANTED"] > 0]
    assert compared.loc["all", "area_PLANTED"] == pytest.approx(positive["area_um2"].median())
    assert compared.loc["large", "n_PLANTED"] == (positive["kind"] == "large").sum()
    assert (
        compared.loc["large", "share_PLANTED"] == (positive["kind"] == "large").sum() / (frame["kind"] == "large").sum()
    )
    assert compared.loc["all", "correlation"] == pytest.approx(
        np.corrcoef(frame["lime_PLANTED"], frame["lime_RANDOM0"])[0, 1]
    )
    medians = listed[listed["gene"] == "PLANTED"].groupby("class")["score"].median()
    assert medians["large"] > 2 * medians["small"]
    with pytest.raises(KeyError, match="lime_NONE"):
        tl.explained_nuclei(explained, "NONE")
    with pytest.raises(KeyError, match="No class"):
        tl.explained_nuclei(explained, "PLANTED", by="nothing")
