"""Explaining one tile by LIME over its nuclei, on EfficientNet-Lite0 with its ImageNet weights, at 224 px.

A tile of a synthetic section, with about 60 nuclei, one gene of a fitted model, black where nuclei are hidden, the
background hidden as a segment, the same seed and samples. Opening the section, fitting, imports, reading the weights
and a first batch are not timed. Each side ends in scores of the nuclei; `max_difference` is the largest from those of
the package `lime` on our extractor, as a share of the largest score. Sides other than ours:

- lime, torch: ``LimeImageExplainer.explain_instance`` as it comes (batches of ten) on timm's network in torch, eager,
  channels last, with the model's own head on its embeddings.
- lime, our extractor: the same on the package's own extractor, called on one thread, as `lime` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.embedding import Network, _in_torch, lite0_in_torch
from benchmarks.slides import made

PX, SEED, TILE = 224, 0, 31
LIME_TORCH, LIME_OURS = "lime, torch", "lime, our extractor"
Job = Callable[[], Mapping[str, Any]]


def ours(n_samples: int) -> Job:
    """Prepare ours: the section opened, the first batch behind it."""
    from stimage_sd import tl

    sdata, model = _section()
    _opened(sdata, model)
    expected = _reference(n_samples)

    def job() -> Mapping[str, Any]:
        tl.explain(
            sdata, model, model.genes[0], tiles=[TILE], n_samples=n_samples, stability=None, seed=SEED, hide_color=0,
            hide_background=True,
        )  # fmt: skip
        found = sdata.shapes["nuclei_explained"]
        return _agreement(found[f"lime_{model.genes[0]}"].to_numpy(), expected)

    return job


def by_lime(embedder: Callable[[], Callable[[np.ndarray], np.ndarray]], n_samples: int, *, refer: bool = True) -> Job:
    """Prepare lime's: the tile and its nuclei in memory, the network built."""
    from lime.lime_image import LimeImageExplainer

    sdata, model = _section()
    opened, row, pixels, segments = _opened(sdata, model)
    embed = embedder()
    embed(pixels[None])
    expected = _reference(n_samples) if refer else None

    def classifier(images: np.ndarray) -> np.ndarray:
        return opened.stand_ins.outputs(row, [embed(images)], np.array([0]))["mean"].astype(np.float64)

    def job() -> Mapping[str, Any]:
        found = LimeImageExplainer(random_state=SEED).explain_instance(
            pixels, classifier, labels=(0,), top_labels=None, hide_color=0, num_samples=n_samples,
            segmentation_fn=lambda _: segments,
        )  # fmt: skip
        scores = np.zeros(segments.max() + 1)
        for number, weight in found.local_exp[0]:
            scores[number] = weight
        return {"scores": scores[1:].tolist()} if expected is None else _agreement(scores[1:], expected)

    return job


# --------------------------------------------------------------------------------------------------
# what they share


def _torch() -> Callable[[np.ndarray], np.ndarray]:
    embed = _in_torch(Network("efficientnet_lite0", lambda: None, lite0_in_torch))
    return lambda images: embed(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _extractor() -> Callable[[np.ndarray], np.ndarray]:
    from stimage_sd.models import get_extractor

    return get_extractor("efficientnet_lite0")


def _section(fields: Sequence[float] = (1.0,), tiles: Sequence[int] = (TILE,)) -> tuple[Any, Any]:
    """Give a section with 64 nuclei on each of some tiles, and a model on embeddings of some fields of view."""
    import shapely
    from geopandas import GeoDataFrame

    import stimage_sd as sti

    sdata = sti.io.visium(_bundle(), image=_bundle() / "image.tif")
    sti.pp.tile(sdata, target_px=PX)
    sti.pp.embed(sdata, "efficientnet_lite0", fields_of_view=fields, context_rings=0)
    genes = sti.pp.select_genes(sdata, n_top=5)
    model = sti.tl.fit_nb(sdata, genes=genes, extractor="efficientnet_lite0", n_members=2, max_epochs=5)
    table = sdata.tables["tiles"]
    ids = table.obs["instance_id"].to_numpy().tolist()
    centers = np.asarray(table.obsm["spatial"])[[ids.index(tile) for tile in tiles]]
    side = float(table.uns["tiling"]["side_px"])
    places = (np.stack(np.divmod(np.arange(64), 8), axis=1) + 0.5) / 8 - 0.5
    jitter = np.random.default_rng(SEED).uniform(-0.02, 0.02, places.shape)
    points = np.concatenate([(places + jitter) * side + center for center in centers])
    discs = shapely.buffer(shapely.points(points), side / 24)
    sdata.shapes["nuclei"] = sti.contract.build_shapes(GeoDataFrame(geometry=discs), mpp=None)
    return sdata, model


def _opened(sdata: Any, model: Any) -> tuple[Any, int, np.ndarray, np.ndarray]:
    """Give the opened tile, its row, its pixels and its segments."""
    from stimage_sd import contract
    from stimage_sd.tl._explain.segments import segment_tile
    from stimage_sd.tl._explain.tile_views import open_tiles

    opened = open_tiles(sdata, model, [TILE], section="section", extractors=())
    row, views, area = next(opened.read())
    found = segment_tile(sdata, area, "nuclei", contract.nuclei(sdata))
    if found is None:
        raise ValueError("Expected nuclei on the tile, found none.")
    return opened, row, views[0].pixels[0], found.seen_at(views[0].positions[0])


def _bundle() -> Path:
    return made("lime_visium", _write_bundle)


def _write_bundle(path: Path) -> None:
    import stimage_sd as sti

    sti.datasets.synthetic_visium(path, n_spots=60, n_genes=20)


def _reference(n_samples: int) -> np.ndarray:
    """Scores by lime on our extractor, computed once and kept."""
    return np.load(made(f"lime_{n_samples}.npy", partial(_write_reference, n_samples)))


def _write_reference(n_samples: int, path: Path) -> None:
    np.save(path, by_lime(_extractor, n_samples, refer=False)()["scores"])


def _agreement(scores: np.ndarray, expected: np.ndarray) -> Mapping[str, Any]:
    return {
        "nuclei": len(scores),
        "max_difference": float(np.abs(scores - expected).max() / np.abs(expected).max()),
    }


WORK = Comparison(
    title="Explaining a tile by LIME, EfficientNet-Lite0, 224 px",
    unit="samples",
    sizes=(250, 1000, 4000),
    sides={LIME_TORCH: partial(by_lime, _torch), LIME_OURS: partial(by_lime, _extractor), OURS: ours},
    reach={LIME_TORCH: 3.0},
    at_most={LIME_TORCH: 1000, LIME_OURS: 1000},
)
