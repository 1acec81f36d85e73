"""Every public function on a section that lies elsewhere than in its own pixels.

One section is walked through all functions twice: as it was read, and moved. Of the moved one the coordinate system has
another name and is turned, mirrored and shifted; shapes have their coordinates in it, the image alone has a matrix, and
the positions that tables state are nonsense. The image's pixels are the same, and so must be all results.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import geopandas as gpd
import h5py
import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import peers
import pytest
import shapely
import spatialdata
from anndata import AnnData
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from spatialdata import SpatialData
from spatialdata.transformations import Sequence, Translation, get_transformation, set_transformation

import stimage_sd as sti
from stimage_sd import baselines, contract
from stimage_sd.image.nuclei_watershed import nuclei_watershed
from stimage_sd.models._gene_classifier import GeneClassifier
from stimage_sd.models._nb import NBModel
from stimage_sd.nn.hovernet import HoVerNetSize
from stimage_sd.nn.parts import Part

pytestmark = pytest.mark.slow

#: functions that are given neither an image nor positions, and why the walk leaves them out
ELSEWHERE = {
    **dict.fromkeys(
        ("io.codex", "io.from_anndata", "io.hest", "io.legacy_st", "io.read", "io.slide", "io.visium", "io.visium_hd",
         "io.xenium"),
        "reads files, and makes the section",
    ),
    "io.read_loupe": "joins labels by barcode",
    "pp.augment": "takes an array of tiles",
    "tl.predict_cohort": "reads the files of slides, and makes its own sections",
    **dict.fromkeys(
        ("tl.bulk_correlation", "tl.cox_screen", "tl.drug_response", "tl.risk_groups"), "takes a table of slides"
    ),
    "tl.enrichment": "takes names of genes",
    **dict.fromkeys(
        ("pl.cell_scores", "pl.confusion", "pl.enrichment", "pl.explanation_scores", "pl.scores", "pl.survival"),
        "draws a table of scores",
    ),
    "pl.roc": "draws what `tl.drug_response` returns",
    "pl.training": "draws a model's history",
}  # fmt: skip


def public_functions() -> set[str]:
    found = set()
    for module in ("io", "pp", "tl", "pl"):
        package = importlib.import_module(f"stimage_sd.{module}")
        values = {name: getattr(package, name) for name in package.__all__}
        found |= {f"{module}.{name}" for name, value in values.items() if inspect.isfunction(value)}
    return found


# --------------------------------------------------------------------------------------------------
# sections


MOVED = "bench"


def moved(section: SpatialData, *, system: str = "global", results: bool = False) -> SpatialData:
    """Turn, mirror, shift and rename a section's coordinate system; spoil the positions that tables state."""
    nothing = pd.DataFrame({"x": [], "y": []})
    data = peers.rotate_coordinates(
        peers.Peer(section, nothing, nothing, peers.MPP, lambda: section, coordinate_system=system)
    ).data
    for _, _, element in data.gen_spatial_elements():
        placed = get_transformation(element, get_all=True)
        renamed = {MOVED if name == system else name: each for name, each in placed.items()}
        set_transformation(element, renamed, set_all=True)
    for name, table in data.tables.items():
        if "spatial" in table.obsm and (results or not contract.is_result(name, table)):
            table.obsm["spatial"] = np.random.default_rng(0).uniform(-9e4, 9e4, (table.n_obs, 2))
    return data


class MeansOfColor(nnx.Module):
    """Mean of each color and of its square, in parts that gradients go through."""

    def __init__(self) -> None:
        self.scale = nnx.Param(np.ones((1,), np.float32))

    def parts(self) -> list[Part]:
        return [
            Part((self.scale,), lambda tiles: tiles * self.scale[...]),
            Part((), lambda value: jax.numpy.concatenate([value.mean((1, 2)), (value**2).mean((1, 2))], axis=1)),
        ]

    def __call__(self, tiles: jax.Array) -> jax.Array:
        first, second = self.parts()
        return second.run(first.run(tiles))


class Dark:
    """A finder of cells without weights: the watershed's nuclei, of two types by how red they are."""

    classes, mpp, n_values, key = ("red", "blue"), 0.5, 2, "dark"

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.stack([nuclei_watershed(image, threshold=0.25, nucleus_px=16.0) for image in images])
        red = images[..., :1].astype(np.float32) / 255
        return labels, np.concatenate([red, 1 - red], axis=-1)


EXTRACTOR, GENES = "walk_means_of_color", 4
#: so small that an epoch takes a second
TINY = HoVerNetSize(8, (1, 1, 1, 1), (1, 1), 3)
FIT: dict[str, Any] = {"extractor": EXTRACTOR, "n_members": 2, "max_epochs": 5, "n_components": 4}


def embedded(section: SpatialData) -> SpatialData:
    """A section with tiles and embeddings, where a step of the walk does not make them."""
    sti.pp.tile(section, target_px=32, min_tissue=0.3)
    sti.pp.embed(section, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=1)
    return section


@dataclass
class Stage:
    """A section on its way, and what its steps need."""

    fresh: Callable[[], SpatialData]
    folder: Path
    other: SpatialData | None = None
    model: Any = None
    genes: list[str] = field(default_factory=list)
    classifier: GeneClassifier | None = None
    section: SpatialData = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.section = self.fresh()

    @property
    def cohort(self) -> dict[str, SpatialData]:
        assert self.other is not None
        return {"walked": self.section, "other": self.other}

    def outlines(self, *names: str) -> list[gpd.GeoDataFrame]:
        return [contract.shapes_in_pixels(self.section, name) for name in names]


#: columns that no two runs have alike
COSTS = ["fit_seconds", "predict_seconds", "peak_mb"]
Step = Callable[[Stage], Any]
#: by name of the function, in the order of the walk: what it gives on a section of spots, and on one of cells
SPOTS: dict[str, Step] = {}
CELLS: dict[str, Step] = {}


def step(name: str, steps: dict[str, Step] = SPOTS) -> Callable[[Step], Step]:
    def add(function: Step) -> Step:
        steps[name] = function
        return function

    return add


def drawn(*axes: Axes) -> list[Any]:
    """What pictures show: limits, images with their extents, collections with their places and values."""
    found: list[Any] = []
    for ax in axes:
        found += [ax.get_xlim(), ax.get_ylim(), [(image.get_array(), image.get_extent()) for image in ax.get_images()]]
        for each in ax.collections:
            places = (
                [path.vertices for path in each.get_paths()] if isinstance(each, PolyCollection) else each.get_offsets()
            )
            found += [np.asarray(each.get_array()) if each.get_array() is not None else None, places]
        found += [line.get_xydata() for line in ax.lines]
    plt.close("all")
    return found


# --------------------------------------------------------------------------------------------------
# a section of spots


@step("io.from_spatialdata")
def _(stage: Stage) -> Any:
    """Of an object that no reader of this package made."""
    section = stage.fresh()
    section.attrs = {}
    adopted = sti.io.from_spatialdata(section, mpp=peers.MPP)
    units = contract.find_units(adopted)
    return units.positions(adopted), units.diameter(adopted), contract.image_name(adopted), contract.mpp(adopted)


@step("io.read_tile_features")
def _(stage: Stage) -> Any:
    section = stage.fresh()
    path = stage.folder / "features.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.arange(12, dtype=np.float32).reshape(4, 3)
        file["coords"] = np.array([[300, 400], [556, 400], [300, 656], [556, 656]])
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 256})
    sti.io.read_tile_features(section, path, extractor="theirs")
    first = contract.tile_squares(section), contract.embeddings(section, "theirs")
    sti.io.read_tile_features(section, path, extractor="again")  # onto the tiles that are there
    return first, contract.embeddings(section, "again")


@step("pp.tissue_mask")
def _(stage: Stage) -> Any:
    sti.pp.tissue_mask(stage.section)
    return contract.tissue(stage.section)


@step("pp.slide_qc")
def _(stage: Stage) -> Any:
    return sti.pp.slide_qc(stage.section), np.asarray(stage.section.labels["quality"])


@step("pp.stain_normalize")
def _(stage: Stage) -> Any:
    reference = sti.pp.stain_normalize(stage.section, stage.other)
    normalized = contract.working_image_name(stage.section)
    return reference.stain_matrix, contract.thumbnail(stage.section, normalized, max_side=400)


@step("pp.tile")
def _(stage: Stage) -> Any:
    sti.pp.tile(stage.section, target_px=32, min_tissue=0.3)
    obs = contract.tiles(stage.section).obs
    columns = ["x", "y", "tissue_fraction", "keep", "spot_id"]
    return contract.tile_geometry(stage.section), contract.tiling(stage.section), obs[columns]


@step("pp.embed")
def _(stage: Stage) -> Any:
    sti.pp.embed(stage.section, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=0)
    return contract.embeddings(stage.section, EXTRACTOR)


@step("pp.spatial_context")
def _(stage: Stage) -> Any:
    sti.pp.spatial_context(stage.section, EXTRACTOR)
    return contract.tiles(stage.section).obsm[contract.context_key(EXTRACTOR)]


@step("pp.segment_nuclei")
def _(stage: Stage) -> Any:
    tiles = contract.tiles(stage.section)
    sti.pp.segment_nuclei(stage.section, tiles.obs_names[:3].tolist(), key_added="some")
    sti.pp.segment_nuclei(stage.section)
    return stage.outlines("some", "nuclei")


@step("pp.select_genes")
def _(stage: Stage) -> Any:
    return sti.pp.select_genes(stage.section, n_top=GENES)


@step("tl.fit_nb")
def _(stage: Stage) -> Any:
    return sti.tl.fit_nb(stage.cohort, genes=stage.genes, **FIT).history


@step("tl.predict")
def _(stage: Stage) -> Any:
    sti.tl.predict(stage.section, stage.classifier)
    sti.tl.predict(stage.section, stage.model)
    table = contract.predictions(stage.section)
    spatial = next(iter(table.uns["spatial"].values()))
    return (
        contract.gene_classes(stage.section).X, table.X, dict(table.layers), table.obs["ood_score"],
        table.obsm["spatial"], spatial["scalefactors"], spatial["images"]["hires"],
    )  # fmt: skip


@step("tl.evaluate")
def _(stage: Stage) -> Any:
    return sti.tl.evaluate(stage.section)


@step("tl.pool_members")
def _(stage: Stage) -> Any:
    return sti.tl.pool_members(stage.section, stage.model, size=1, n_pools=1)


@step("tl.local_morans_i")
def _(stage: Stage) -> Any:
    return sti.tl.local_morans_i(stage.section, stage.genes[:2], n_permutations=19, correction="none")


@step("tl.compare_labels")
def _(stage: Stage) -> Any:
    contract.tiles(stage.section).obs["half"] = np.arange(contract.tiles(stage.section).n_obs) % 2
    agreement = sti.tl.compare_labels(stage.section, "half", "keep")
    return agreement.table, agreement.scores


@step("tl.evaluate_genes_high")
def _(stage: Stage) -> Any:
    return sti.tl.evaluate_genes_high(stage.section)


@step("tl.risk_coverage")
def _(stage: Stage) -> Any:
    return sti.tl.risk_coverage(stage.section, coverages=(0.5, 1.0))


@step("tl.predictable_genes")
def _(stage: Stage) -> Any:
    return sti.tl.predictable_genes(stage.section, method="free", n_permutations=20)


@step("pp.prepare")
def _(stage: Stage) -> Any:
    section = stage.fresh()
    sti.pp.prepare(section, stage.model)
    return contract.embeddings(section, EXTRACTOR), contract.tile_geometry(section)


@step("tl.certify")
def _(stage: Stage) -> Any:
    certificate = sti.tl.certify(stage.section, stage.model, method="free", n_permutations=20).certificate
    return certificate.genes, certificate.sections, certificate.pit


@step("tl.pseudobulk")
def _(stage: Stage) -> Any:
    table = sti.tl.pseudobulk(stage.section)
    return table.X, dict(table.layers)


@step("tl.calibrate")
def _(stage: Stage) -> Any:
    return sti.tl.calibrate(stage.section, stage.model).interval_level


@step("tl.adapt")
def _(stage: Stage) -> Any:
    adapted = sti.tl.adapt(stage.model, stage.section, spots=list(contract.counts(stage.section).obs_names[:9]))
    return adapted.factors, adapted.shifts


@step("tl.sample")
def _(stage: Stage) -> Any:
    return sti.tl.sample(stage.section, stage.model, 2).mean(axis=1).compute()


@step("tl.combine")
def _(stage: Stage) -> Any:
    both = [stage.model, sti.tl.fit_nb(stage.other, genes=stage.genes, seed=1, **FIT)]
    return sti.tl.combine(both, weights="validation", validation=stage.section).member_weights


@step("tl.fit_baseline")
def _(stage: Stage) -> Any:
    model = sti.tl.fit_baseline(stage.cohort, baselines.Ridge(n_components=4), genes=stage.genes, extractor=EXTRACTOR)
    return model.floor, model.total


@step("tl.fit_gene_classifier")
def _(stage: Stage) -> Any:
    model = sti.tl.fit_gene_classifier(stage.cohort, genes=stage.genes, extractor=EXTRACTOR)
    return model.coefficients, model.intercepts


@step("tl.cross_validate")
def _(stage: Stage) -> Any:
    recipe = partial(sti.tl.fit_baseline, recipe=baselines.Ridge(n_components=4), extractor=EXTRACTOR)
    return sti.tl.cross_validate(stage.cohort, {"ridge": recipe}, genes=stage.genes).drop(columns=COSTS)


@step("tl.finetune_nb")
def _(stage: Stage) -> Any:
    model = sti.tl.finetune_nb(
        stage.cohort, genes=stage.genes, extractor=EXTRACTOR, validation=["other"], n_components=4, max_epochs=1,
        batch_size=16, micro_batch_size=8, unfreeze="all", augment=False,
    )  # fmt: skip
    return model.history


@step("tl.cluster")
def _(stage: Stage) -> Any:
    sti.tl.cluster(stage.section, use="embeddings", extractor=EXTRACTOR, n_neighbors=5)
    return contract.tiles(stage.section).obs["leiden"].astype(str)


@step("tl.top_tiles")
def _(stage: Stage) -> Any:
    return sti.tl.top_tiles(stage.section, stage.genes[0], n_tiles=4)


@step("tl.explain")
def _(stage: Stage) -> Any:
    tiles = _with_nuclei(stage.section)
    sti.tl.explain(stage.section, stage.model, stage.genes[0], tiles=tiles[:1], segments="tissue", n_samples=20)
    by_labels = stage.outlines("segments_explained")
    sti.tl.explain(stage.section, stage.model, stage.genes[:2], tiles=tiles[:2], n_samples=20)
    table = contract.explanations(stage.section)
    return by_labels, stage.outlines("nuclei_explained"), table.X, dict(table.layers), table.obsm["spatial"]


@step("tl.saliency")
def _(stage: Stage) -> Any:
    """One tile that is explained already, and one that is not: old and new nuclei come to lie in one element."""
    maps = sti.tl.saliency(
        stage.section, stage.model, stage.genes[0], tiles=_with_nuclei(stage.section)[1:3], n_steps=2
    )
    return list(maps.values()), stage.outlines("nuclei_explained")


@step("pl.saliency")
def _(stage: Stage) -> Any:
    return drawn(*sti.pl.saliency(stage.section, stage.genes[0]))


@step("tl.explained_nuclei")
def _(stage: Stage) -> Any:
    return sti.tl.explained_nuclei(stage.section, stage.genes[:2])


@step("tl.compare_explanations")
def _(stage: Stage) -> Any:
    # 20 copies are too few for stable scores
    return sti.tl.compare_explanations(stage.section, *stage.genes[:2], min_stability=None, min_r2=None)


def _with_nuclei(section: SpatialData) -> list[int]:
    """Numbers of tiles with the most nuclei."""
    nuclei = shapely.STRtree(contract.nuclei(section).geometry.to_numpy())
    squares = shapely.box(*contract.tile_squares(section).T)
    tile, _ = nuclei.query(squares, predicate="contains")
    table = contract.tiles(section)
    counts = np.bincount(tile, minlength=len(squares)) * table.obs["keep"].to_numpy()
    return table.obs[contract.INSTANCE_KEY].to_numpy()[np.argsort(-counts, kind="stable")].tolist()


@step("io.to_anndata")
def _(stage: Stage) -> Any:
    found = sti.io.to_anndata(stage.section)
    return found.X, found.obsm["spatial"]


@step("io.write_geojson")
def _(stage: Stage) -> Any:
    path = stage.folder / "nuclei.geojson"
    sti.io.write_geojson(stage.section, path, key="nuclei")
    sti.io.write_geojson(stage.section, stage.folder / "tiles.geojson", key="tile_squares", genes=stage.genes[:1])
    return [
        [
            (feature["geometry"], feature["properties"].get("measurements"))
            for feature in json.loads(each.read_text())["features"]
        ]
        for each in (path, stage.folder / "tiles.geojson")
    ]


@step("io.read_geojson")
def _(stage: Stage) -> Any:
    halves = {"left": shapely.box(0, 0, 700, 1536), "right": shapely.box(700, 0, 1536, 1536)}
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(area),
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, area in halves.items()
    ]
    path = stage.folder / "halves.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    sti.io.read_geojson(stage.section, path)
    return stage.outlines("annotations")


@step("pp.label_by_annotations")
def _(stage: Stage) -> Any:
    for onto in ("tiles", "spots", "nuclei"):
        sti.pp.label_by_annotations(stage.section, onto=onto)
    section = stage.section
    tables = contract.tiles(section).obs, section.tables["counts"].obs, section.shapes["nuclei"]
    found = [table["annotation"].astype(str) for table in tables]
    assert all(set(each) == {"left", "right"} for each in found)
    return found


@step("pl.prediction")
def _(stage: Stage) -> Any:
    return drawn(*sti.pl.prediction(stage.section, stage.genes[0])), drawn(
        *sti.pl.prediction(stage.section, stage.genes[0], zoom=[(200, 300, 900, 800)]).ravel()
    )


@step("pl.uncertainty")
def _(stage: Stage) -> Any:
    return drawn(*np.atleast_1d(sti.pl.uncertainty(stage.section, stage.genes[0])))


@step("pl.tiles")
def _(stage: Stage) -> Any:
    of_labels = sti.pl.tiles({"one": stage.section}, "annotation")
    return drawn(*sti.pl.tiles(stage.section, n_examples=2, return_fig=True).axes), drawn(*of_labels)


@step("pl.cells")
def _(stage: Stage) -> Any:
    return drawn(sti.pl.cells(stage.section, "area")), drawn(
        sti.pl.cells(stage.section, "area", zoom=(200, 300, 900, 800), outline=True)
    )


@step("pl.explanation")
def _(stage: Stage) -> Any:
    axes = sti.pl.explanation(stage.section, stage.genes[0], method="saliency", tiles=_with_nuclei(stage.section)[1:3])
    return drawn(*axes), drawn(
        *sti.pl.explanation(stage.section, stage.genes[0], tiles=_with_nuclei(stage.section)[:2])
    )


@step("pl.calibration")
def _(stage: Stage) -> Any:
    return drawn(*sti.pl.calibration(stage.section))


@step("pl.latent")
def _(stage: Stage) -> Any:
    return drawn(sti.pl.latent(stage.section, basis="pca", use="embeddings", extractor=EXTRACTOR))


# --------------------------------------------------------------------------------------------------
# a section of cells, which is placed on its H&E on the way


@step("pp.register", CELLS)
def _(stage: Stage) -> Any:
    found = sti.pp.register(stage.section)
    table = stage.section.tables["counts"]
    diameter = next(iter(table.uns["spatial"].values()))["scalefactors"]["spot_diameter_fullres"]
    points = contract.find_units(stage.section).positions(stage.section)
    return (
        found.residual_um, found.n_inliers, points, table.obsm["spatial"], diameter, stage.outlines("cells", "nuclei"),
    )  # fmt: skip


@step("pp.aggregate", CELLS)
def _(stage: Stage) -> Any:
    found: list[Any] = []
    for source, options in (("transcripts", {}), ("cells", {"onto": "spots"}), ("image", {"image_key": "dapi"})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sti.pp.aggregate(stage.section, source, **options)
        table = contract.measured(stage.section, "proteins" if source == "image" else "counts")
        found += [table.to_df(), table.obsm["spatial"], stage.outlines("spots")]
    return found


@step("pp.annotate_cells", CELLS)
def _(stage: Stage) -> Any:
    reference = sti.datasets.synthetic_reference(n_markers=4)
    sti.pp.annotate_cells(stage.section, reference, merge=reference.uns["merge"])
    return [stage.section.shapes[name]["cell_type"].astype(str) for name in ("cells", "nuclei")]


@step("pl.cells of genes", CELLS)
def _(stage: Stage) -> Any:
    gene = stage.section.tables["counts"].var_names[0]
    return [drawn(sti.pl.cells(stage.section, gene, shapes_key=name)) for name in ("cells", "nuclei")]


@step("tl.fit_cell_classifier", CELLS)
def _(stage: Stage) -> Any:
    sti.pp.tissue_mask(stage.section)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stimage_sd.tl._cells.fit_cell_classifier.CellRun", _stop)
        try:
            sti.tl.fit_cell_classifier(stage.section, size=TINY, tile_px=128)
        except Reached as reached:
            return reached.args
    raise AssertionError("Expected tiles to be cut.")


class Reached(Exception):
    """What a network is about to be trained on; compiling one takes longer than all of the walk."""


def _stop(network: Any, tiles: Any, *options: Any) -> None:
    raise Reached(tiles.store.read(np.arange(len(tiles))), tiles.rings, tiles.types)


@step("tl.predict_cells", CELLS)
def _(stage: Stage) -> Any:
    sti.tl.predict_cells(stage.section, Dark(), key_added="found")
    table = contract.cell_types(stage.section)
    return stage.outlines("found"), table.X, table.obsm["spatial"]


@step("tl.evaluate_cells", CELLS)
def _(stage: Stage) -> Any:
    frame = stage.section.shapes["nuclei"]
    frame["kind"] = np.where(frame["cell_type"].astype(str) == "immune", "red", "blue")
    return [
        part
        for match in ("iou", "centers")
        for part in sti.tl.evaluate_cells(stage.section, match=match, label_key="kind")
    ]


@step("pl.cells of measured types", CELLS)
def _(stage: Stage) -> Any:
    return drawn(sti.pl.cells(stage.section, mark_wrong=True)), drawn(
        sti.pl.cells(stage.section, shapes_key="nuclei", zoom=(100, 150, 500, 600))
    )


@step("tl.cross_validate_cells", CELLS)
def _(stage: Stage) -> Any:
    del stage.section.tables["cell_types"], stage.section.shapes["found"]
    section = stage.section
    fewer = {**section.shapes, "nuclei": section.shapes["nuclei"].iloc[1:]}  # one section twice is refused
    again = SpatialData(
        images=dict(section.images), labels=dict(section.labels), shapes=fewer, tables=dict(section.tables),
        attrs=dict(section.attrs),
    )  # fmt: skip
    cohort = {"walked": section, "again": again}
    table = sti.tl.cross_validate_cells(cohort, {"dark": lambda cohort: Dark()}, label_key="kind")
    return table.drop(columns=COSTS)


# --------------------------------------------------------------------------------------------------
# the walk


def walk(stage: Stage, steps: Mapping[str, Step]) -> dict[str, Any]:
    """By name of a step what it gives, or the error that it raises: `compare` raises it again."""
    found: dict[str, Any] = {}
    for name, run in steps.items():
        try:
            found[name] = run(stage)
        except Exception as error:  # noqa: BLE001
            found[name] = error
    return found


@pytest.fixture(scope="module", autouse=True)
def _without_screen(_session_cache: None) -> Iterator[None]:
    sti.models.register_extractor(
        EXTRACTOR, MeansOfColor(), input_size=None, embedding_size=6, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    with mpl.rc_context({"backend": "Agg"}):
        yield


@pytest.fixture(scope="module")
def other(bundles: Path) -> SpatialData:
    """A second section, which models are fitted on."""
    section = peers.own_visium(bundles, peers.OTHER_SEED).data
    sti.pp.stain_normalize(section, section)
    return embedded(section)


@pytest.fixture(scope="module")
def spots(
    bundles: Path, other: SpatialData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Stage], dict[str, dict[str, Any]]]:
    """Stages and results of the two walks over spots."""
    genes = sti.pp.select_genes(other, n_top=GENES)
    shared = {
        "other": other,
        "genes": genes,
        "model": sti.tl.fit_nb(other, genes=genes, **FIT),
        "classifier": sti.tl.fit_gene_classifier(other, genes=genes, extractor=EXTRACTOR),
    }
    stages = {
        "as it is": Stage(lambda: peers.own_visium(bundles).data, tmp_path_factory.mktemp("walk"), **shared),
        "moved": Stage(lambda: moved(peers.own_visium(bundles).data), tmp_path_factory.mktemp("walk"), **shared),
    }
    return stages, {name: walk(stage, SPOTS) for name, stage in stages.items()}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> dict[str, Any]:
    """Stages and results of the two walks over cells."""
    run = tmp_path_factory.mktemp("xenium") / "run"
    sti.datasets.synthetic_xenium(run, size_um=450, n_genes=6, seed=11, pixel_um=0.425, n_markers=4, align=False)
    read = lambda: sti.io.xenium(run, he_image=run / "he_image.ome.tif", sample="run")
    stages = {"as it is": Stage(read, run), "moved": Stage(lambda: moved(read()), run)}
    return stages, {name: walk(stage, CELLS) for name, stage in stages.items()}


def assert_same(found: Any, expected: Any) -> None:
    """Compare what two walks give, whatever it is made of."""
    assert type(found) is type(expected)
    if isinstance(expected, gpd.GeoDataFrame):
        assert len(expected)
        assert list(found.index) == list(expected.index)
        assert shapely.hausdorff_distance(found.geometry.to_numpy(), expected.geometry.to_numpy()).max() < 1e-6
        assert_same(pd.DataFrame(found.drop(columns="geometry")), pd.DataFrame(expected.drop(columns="geometry")))
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6, check_categorical=False)
    elif isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(found, expected, rtol=1e-4, atol=1e-6, check_categorical=False)
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_same(one, two)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind in "fiu":
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-4, atol=1e-4)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    else:
        np.testing.assert_array_equal(found, expected)


def compare(results: Mapping[str, Mapping[str, Any]], name: str) -> None:
    for each in results.values():
        if isinstance(each[name], Exception):
            raise each[name]
    assert_same(results["moved"][name], results["as it is"][name])


def test_every_function_is_walked_or_known_to_see_no_image() -> None:
    walked = set(SPOTS) | {name for name in CELLS if " " not in name}
    assert walked | set(ELSEWHERE) == public_functions()
    assert not walked & set(ELSEWHERE)


@pytest.mark.parametrize("name", SPOTS)
def test_a_section_of_spots_may_lie_anywhere(name: str, spots: tuple) -> None:
    compare(spots[1], name)


@pytest.mark.parametrize("name", CELLS)
def test_a_section_of_cells_may_lie_anywhere(name: str, cells: tuple) -> None:
    compare(cells[1], name)


def test_what_the_walks_wrote_lies_where_the_image_lies(spots: tuple, cells: tuple) -> None:
    for stages, _ in (spots, cells):
        for stage in stages.values():
            section, given = stage.section, {name for _, name, _ in stage.fresh().gen_elements()}
            systems = set(get_transformation(section.images[contract.image_name(section)], get_all=True))
            written = [element for _, name, element in section.gen_spatial_elements() if name not in given]
            assert written
            for element in written:
                assert set(get_transformation(element, get_all=True)) == systems


# --------------------------------------------------------------------------------------------------
# a finished section that is moved, or cropped


@pytest.fixture(scope="module")
def apart(other: SpatialData) -> NBModel:
    """A model whose prediction of a tile does not depend on what else the section holds."""
    return sti.tl.fit_nb(other, genes=sti.pp.select_genes(other, n_top=GENES), standardize="cohort", **FIT)


@pytest.fixture(scope="module")
def finished(spots: tuple, apart: NBModel) -> SpatialData:
    """A section that went through all steps."""
    section = spots[0]["as it is"].section
    sti.tl.predict(section, apart)
    return section


def test_a_finished_section_may_be_moved(finished: SpatialData, apart: NBModel) -> None:
    """Squares of tiles and outlines of nuclei were moved with what was measured, and no table states where."""
    section = moved(finished, results=True)
    gene = apart.genes[0]
    centers, side = contract.tile_geometry(finished)
    found = contract.tile_geometry(section)
    np.testing.assert_allclose(found.centers, centers, atol=1e-5)
    assert found.side == pytest.approx(side)
    assert contract.tiling(section)["side_px"] == pytest.approx(side)
    for name in ("nuclei", "nuclei_explained", "annotations"):
        assert_same(contract.shapes_in_pixels(section, name), contract.shapes_in_pixels(finished, name))
    pd.testing.assert_frame_equal(sti.tl.evaluate(section), sti.tl.evaluate(finished), rtol=1e-5)
    assert_same(drawn(*sti.pl.prediction(section, gene)), drawn(*sti.pl.prediction(finished, gene)))
    assert_same(drawn(*sti.pl.explanation(section, gene)), drawn(*sti.pl.explanation(finished, gene)))
    expected = contract.embeddings(finished, EXTRACTOR).copy()
    sti.pp.embed(section, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=1)
    np.testing.assert_allclose(contract.embeddings(section, EXTRACTOR), expected, atol=1e-5)
    context = contract.context_key(EXTRACTOR)
    np.testing.assert_allclose(contract.tiles(section).obsm[context], contract.tiles(finished).obsm[context], atol=1e-5)
    sti.tl.predict(section, apart)
    np.testing.assert_allclose(contract.predictions(section).X, contract.predictions(finished).X, rtol=1e-4)


#: left, top, right and bottom of a crop, px
BOX = (320, 256, 1250, 1300)


def cropped(section: SpatialData) -> SpatialData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return section.query.bounding_box(
            axes=("x", "y"),
            min_coordinate=list(BOX[:2]),
            max_coordinate=list(BOX[2:]),
            target_coordinate_system="global",
        )


def noted(section: SpatialData) -> dict[str, Any]:
    """What a section says of itself, and the shape of all that it holds."""
    return {
        "attrs": copy.deepcopy(section.attrs),
        "uns": {name: sorted(map(str, table.uns)) for name, table in section.tables.items()},
        "embeddings": copy.deepcopy(section.tables["tiles"].uns["embeddings"]),
        "obs": {name: table.obs.copy() for name, table in section.tables.items()},
        "obsm": {name: sorted(table.obsm) for name, table in section.tables.items()},
        "shapes": {name: list(frame.columns) for name, frame in section.shapes.items()},
        "names": sorted(name for _, name, _ in section.gen_elements()),
    }


def rows_of(whole: AnnData, part: AnnData) -> np.ndarray:
    """Rows of a table that a crop kept."""
    return pd.Index(whole.obs[contract.INSTANCE_KEY]).get_indexer(part.obs[contract.INSTANCE_KEY])


def inside(squares: np.ndarray, size: tuple[int, int], *, times: float = 1.0) -> np.ndarray:
    """Which squares lie on the image with a field of view that is so many times as wide."""
    margin = (squares[:, 2:3] - squares[:, :1]) * (times - 1) / 2
    low, high = squares[:, :2] - margin, squares[:, 2:] + margin
    return (low >= 0).all(axis=1) & (high <= size).all(axis=1)


def test_pictures_of_a_crop_show_what_was_kept(finished: SpatialData, apart: NBModel) -> None:
    crop, gene = cropped(finished), apart.genes[0]
    width, height = BOX[2] - BOX[0], BOX[3] - BOX[1]
    assert contract.image_size(crop) == (width, height)
    rows = rows_of(contract.predictions(finished), contract.predictions(crop))
    places = contract.tile_geometry(finished, contract.predictions(finished)).centers[rows] - BOX[:2]
    assert 5 < len(places) < contract.predictions(finished).n_obs
    measured, _ = contract.align_to_spots(crop, contract.predictions(crop))
    for axes in (sti.pl.prediction(crop, gene), sti.pl.uncertainty(crop, gene)):
        for ax in np.ravel(axes):
            (image,) = ax.get_images()
            assert tuple(image.get_extent()) == (0, width, height, 0)
            (collection,) = (each for each in ax.collections if len(each.get_offsets()) > 1)
            # the circle of a spot is left out where its center is, the square of a tile where all of it is
            expected = places[measured] if ax.get_title().endswith("observed") else places
            np.testing.assert_allclose(np.asarray(collection.get_offsets()), expected, atol=1e-6)
    plt.close("all")
    (squares,) = sti.pl.tiles(crop).collections
    middles = [(path.vertices.min(axis=0) + path.vertices.max(axis=0)) / 2 for path in squares.get_paths()]
    centers = contract.tile_geometry(finished).centers[rows_of(contract.tiles(finished), contract.tiles(crop))]
    np.testing.assert_allclose(middles, centers - BOX[:2], atol=1e-6)
    plt.close("all")
    ax = sti.pl.cells(crop, "area", shapes_key="nuclei")
    (collection,) = ax.collections
    kept = contract.shapes_in_pixels(finished, "nuclei").loc[crop.shapes["nuclei"].index]
    for path, outline in zip(collection.get_paths(), kept.geometry, strict=True):
        corners = shapely.get_coordinates(outline) - BOX[:2]
        np.testing.assert_allclose(path.vertices[: len(corners)], corners, atol=1e-6)
    plt.close("all")


def test_explanations_of_a_crop_are_those_of_its_tiles(finished: SpatialData, apart: NBModel) -> None:
    gene = apart.genes[0]
    explained = list(dict.fromkeys(finished.shapes["nuclei_explained"]["tile"]))
    shift = np.floor(contract.tile_squares(finished, [int(tile) for tile in explained])[:, 0].min())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crop = finished.query.bounding_box(
            axes=("x", "y"), min_coordinate=[float(shift), 0.0], max_coordinate=[float(peers.SIDE)] * 2,
            target_coordinate_system="global",
        )  # fmt: skip
    whole = {ax.get_title(): drawn_of(ax) for ax in sti.pl.explanation(finished, gene)}
    part = {ax.get_title(): drawn_of(ax) for ax in sti.pl.explanation(crop, gene)}
    plt.close("all")
    assert part.keys() == whole.keys()
    for title, (picture, extent, outlines) in part.items():
        expected = whole[title]
        np.testing.assert_array_equal(picture, expected[0])
        np.testing.assert_allclose(np.array(extent[:2]) + shift, expected[1][:2], atol=1e-6)
        for one, two in zip(outlines, expected[2], strict=True):
            np.testing.assert_allclose(one + np.array([shift, 0]), two, atol=1e-6)
    before = noted(finished)
    new = next(tile for tile in _with_nuclei(crop) if tile not in explained)
    sti.tl.saliency(crop, apart, gene, tiles=[new], n_steps=2)
    added = contract.shapes_in_pixels(crop, "nuclei_explained")
    frame = contract.shapes_in_pixels(finished, "nuclei_explained")
    for tile, group in added.groupby("tile"):
        center = contract.tile_geometry(crop, contract.tiles(crop)[contract.tiles(crop).obs["instance_id"] == tile])
        apart_px = shapely.distance(group.geometry.to_numpy(), shapely.Point(*center.centers[0]))
        assert apart_px.max() < center.side
    assert set(added["tile"]) == {*explained, new}
    assert len(frame) < len(added)
    assert_unchanged(finished, before)


def drawn_of(ax: Axes) -> tuple[np.ndarray, Any, list[np.ndarray]]:
    (image,), (outlines,) = ax.get_images(), ax.collections
    # spatialdata's query may give shapes in another order
    drawn = sorted((path.vertices for path in outlines.get_paths()), key=lambda one: tuple(one.min(axis=0)))
    return np.asarray(image.get_array()), image.get_extent(), drawn


def test_a_tile_that_was_cropped_away_is_not_drawn(finished: SpatialData, apart: NBModel) -> None:
    crop = cropped(finished)
    frame = crop.shapes["nuclei_explained"]
    kept = list(dict.fromkeys(frame["tile"]))
    gone = sorted(set(finished.tables["tiles"].obs["instance_id"]) - set(crop.tables["tiles"].obs["instance_id"]))
    # as of a nucleus that reached over the border of a tile that is gone
    crop.shapes["nuclei_explained"] = frame.assign(tile=np.where(np.arange(len(frame)) == 0, gone[0], frame["tile"]))
    assert len(sti.pl.explanation(crop, apart.genes[0])) == len(kept)
    with pytest.raises(KeyError, match="among the explained ones"):
        sti.pl.explanation(crop, apart.genes[0], tiles=[gone[0]])
    plt.close("all")


def assert_unchanged(section: SpatialData, before: dict[str, Any]) -> None:
    after = noted(section)
    for name in ("attrs", "uns", "embeddings", "obsm", "shapes", "names"):
        assert after[name] == before[name], name
    for name, obs in before["obs"].items():
        pd.testing.assert_frame_equal(after["obs"][name], obs)


def test_a_crop_goes_on_and_the_whole_knows_nothing_of_it(finished: SpatialData, apart: NBModel) -> None:
    crop, before = cropped(finished), noted(finished)
    scores = sti.tl.evaluate(crop, exposure=1.0).set_index("gene")
    rows, counts = contract.align_to_spots(crop, contract.predictions(crop))
    for gene in apart.genes:
        mean = np.log1p(np.asarray(contract.predictions(crop)[rows, gene].X).ravel())
        measured = np.log1p(counts[:, gene].X.toarray().ravel())
        assert scores.loc[gene, "pearson"] == pytest.approx(np.corrcoef(mean, measured)[0, 1], rel=1e-4)
    whole, part = contract.tiles(finished), contract.tiles(crop)
    kept = rows_of(whole, part)
    sti.tl.predict(crop, apart)
    again, expected = contract.predictions(crop), contract.predictions(finished)
    np.testing.assert_allclose(again.X, expected.X[rows_of(expected, again)], rtol=1e-4)
    scale = next(iter(again.uns["spatial"].values()))
    assert max(scale["images"]["hires"].shape) == pytest.approx(
        scale["scalefactors"]["tissue_hires_scalef"] * max(contract.image_size(crop)), abs=1
    )
    sti.pp.embed(crop, EXTRACTOR, fields_of_view=(1.0, 2.0), context_rings=1)
    seen = inside(contract.tile_squares(crop), contract.image_size(crop), times=2.0)
    assert seen.sum() > 5
    np.testing.assert_allclose(
        contract.embeddings(crop, EXTRACTOR)[seen], contract.embeddings(finished, EXTRACTOR)[kept][seen], atol=1e-5
    )
    sti.tl.predict(crop, apart)
    sti.tl.cluster(crop, use="embeddings", extractor=EXTRACTOR, n_neighbors=4)
    sti.pp.label_by_annotations(crop, key_added="side")
    sti.pp.slide_qc(crop)
    with pytest.warns(UserWarning, match="has new tiles"):
        sti.pp.tile(crop, target_px=32, min_tissue=0.0)
    tiles = contract.tiles(crop)
    squares = contract.tile_squares(crop)
    own = inside(squares, contract.image_size(crop))
    by_spot = whole.obs.set_index("spot_id")["tissue_fraction"]
    np.testing.assert_allclose(
        tiles.obs["tissue_fraction"][own], by_spot.loc[tiles.obs["spot_id"][own]].to_numpy(), atol=0.03
    )
    assert_unchanged(finished, before)


# --------------------------------------------------------------------------------------------------
# two finished sections in one object


def test_concatenated_sections_go_on(finished: SpatialData, other: SpatialData, apart: NBModel) -> None:
    sti.tl.predict(other, apart)
    expected = sti.tl.evaluate({"one": finished, "two": other})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the elements that are given get the new names of coordinate systems themselves
        together = spatialdata.concatenate({"one": peers._copied(finished), "two": peers._copied(other)})
        cohort = sti.io.from_spatialdata(together)
    assert list(cohort) == ["one", "two"]
    pd.testing.assert_frame_equal(sti.tl.evaluate(cohort), expected, rtol=1e-5)
    for name, section in {"one": finished, "two": other}.items():
        assert contract.mpp(cohort[name]) == pytest.approx(contract.mpp(section))
        assert contract.working_image_name(cohort[name]) == "he_normalized"
        np.testing.assert_allclose(
            contract.tile_geometry(cohort[name]).centers, contract.tile_geometry(section).centers
        )
    sti.tl.predict(cohort, apart)
    for name, section in {"one": finished, "two": other}.items():
        np.testing.assert_allclose(contract.predictions(cohort[name]).X, contract.predictions(section).X, rtol=1e-4)
    assert len(sti.pl.prediction(cohort["two"], apart.genes[0])) == 2
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# an image beside the H&E, and pictures of other tools


def test_cells_found_on_another_image_lie_where_they_are(cells: tuple) -> None:
    """A second picture of a part of the tissue: its pixels begin elsewhere."""
    section = cells[0]["moved"].section
    he = contract.levels(section, "he")[0]
    section.images["part"] = contract.build_image([he.data[:, 96:896, 64:864]])
    before = get_transformation(section.images["he"], MOVED)
    shift = Translation([64.0, 96.0], axes=("x", "y"))
    set_transformation(section.images["part"], {MOVED: Sequence([shift, before])}, set_all=True)
    sti.tl.predict_cells(section, Dark(), key_added="whole")
    whole = contract.shapes_in_pixels(section, "whole")
    sti.tl.predict_cells(section, Dark(), key_added="of_part", image_key="part")
    part = contract.shapes_in_pixels(section, "of_part")
    nearest = shapely.STRtree(whole.geometry.centroid.to_numpy()).query_nearest(
        part.geometry.centroid.to_numpy(), return_distance=True, all_matches=False
    )[1]
    assert len(part) > 50
    assert np.median(nearest) < 0.5
    assert (nearest < 5).mean() > 0.9


@pytest.fixture(scope="module")
def theirs(bundles: Path, other: SpatialData, apart: NBModel) -> peers.Peer:
    """spatialdata-io's Visium, turned, after the pipeline."""
    peer = peers.rotate_coordinates(peers.io_visium(bundles))
    section = sti.io.from_spatialdata(peer.data)
    sti.pp.stain_normalize(section, other)
    sti.pp.tissue_mask(section)
    embedded(section)
    sti.pp.segment_nuclei(section, contract.tiles(section).obs_names[:3].tolist(), threshold=0.25)
    sti.tl.predict(section, apart)
    return peer


def test_spatialdata_plot_draws_tiles_on_the_tissue(theirs: peers.Peer, apart: NBModel) -> None:
    pytest.importorskip("spatialdata_plot")  # gives objects their `.pl`

    section, image, system = theirs.data, str(theirs.image), str(theirs.coordinate_system)
    shown = section.pl.render_images(image).pl.render_shapes(
        "tile_squares", color=apart.genes[0], table_name="predictions"
    )
    ax = shown.pl.show(coordinate_systems=system, return_ax=True)
    matrix = peers.matrix(section.images[image], system)
    (picture,) = ax.get_images()
    # a turned picture is drawn in the box around it, with pixels of several of the image's
    left, right, bottom, top = picture.get_extent()
    drawn_at = (picture.get_transform() - ax.transData).transform([[left, top], [right, bottom]])
    corners = np.array([[0, 0], [peers.SIDE, 0], [peers.SIDE] * 2, [0, peers.SIDE]]) @ matrix[:2, :2].T + matrix[:2, 2]
    # a turned picture is drawn in the box around it, with pixels of several of the image's
    pixel = np.ptp(drawn_at[:, 0]) / picture.get_array().shape[1]
    assert 1 < pixel < 8
    found = [drawn_at.min(axis=0), drawn_at.max(axis=0)]
    np.testing.assert_allclose(found, [corners.min(axis=0), corners.max(axis=0)], atol=1.5 * pixel)
    (squares,) = ax.collections
    middles = np.array([(path.vertices[:4]).mean(axis=0) for path in squares.get_paths()])
    spots = contract.predictions(section).obs["spot_id"].astype(str)
    places = theirs.painted.loc[spots].to_numpy() @ matrix[:2, :2].T + matrix[:2, 2]
    np.testing.assert_allclose(middles, places, atol=1.0)
    plt.close("all")


def test_what_was_made_stays_in_the_images_coordinate_system(theirs: peers.Peer) -> None:
    kept = theirs.data.filter_by_coordinate_system(str(theirs.coordinate_system))
    names = {name for _, name, _ in kept.gen_elements()}
    assert {"tile_squares", "tiles", "predictions", "tissue", "nuclei", "he_normalized"} <= names


def test_squidpy_draws_predictions_on_the_tissue(theirs: peers.Peer, finished: SpatialData, apart: NBModel) -> None:
    import squidpy as sq

    for section in (theirs.data, finished, cropped(finished)):
        table = section.tables["predictions"]
        ax = sq.pl.spatial_scatter(table, color=apart.genes[0], return_ax=True)
        (picture,) = ax.get_images()
        (points,) = (each for each in ax.collections if len(each.get_offsets()) or len(each.get_paths()) == table.n_obs)
        offsets = np.asarray(points.get_offsets())
        if len(offsets) < table.n_obs:
            ends = [(path.vertices.min(axis=0), path.vertices.max(axis=0)) for path in points.get_paths()]
            offsets = np.mean(ends, axis=1)
        left, right, bottom, top = picture.get_extent()
        assert ((offsets >= [left, top]) & (offsets <= [right, bottom])).all()
        scale = next(iter(table.uns["spatial"].values()))["scalefactors"]["tissue_hires_scalef"]
        assert len(picture.get_array()) == pytest.approx(scale * peers.SIDE, abs=1)
        spots = table.obs["spot_id"].astype(str)
        np.testing.assert_allclose(offsets, theirs.painted.loc[spots].to_numpy() * scale, atol=1.0)
        plt.close("all")
