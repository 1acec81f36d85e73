"""A slide from file to predictions on disk: opened, tissue found, tiled, embedded, 1,000 genes predicted, written.

Synthetic Aperio slides; tiles of 224 px, one field of view, EfficientNet-Lite0, an ensemble of ten members. Before the
timed part each side does the whole job on a slide of 2,048 px, so that it imports, loads and compiles nothing.

- ours: ``io.slide``, ``pp.tile``, ``pp.embed``, ``tl.predict``, and the table of predictions written as zarr, with the
  interval of every prediction.
- LazySlide: ``find_tissues``, ``tile_tissues``, ``feature_extraction`` of torch's network with the same weights (eager,
  channels last, batches of 16), then the same heads in numpy, without intervals, and the table written as zarr. Its
  tissue and tiles are its own. It embeds and predicts a part of them at large slides, whole columns from the first on;
  the time of that is scaled to as many tiles as ours embeds, that of the rest is not.

Figures: seconds of each step, milliseconds a tile, and, of ours, `max_difference`, the largest relative difference of
a few tiles' means from those of the heads in numpy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# touched before the measuring begins: what is counted is above the imports
import anndata as ad
import numpy as np
import pandas as pd
import squidpy  # noqa: F401

import stimage_sd as sti
from benchmarks.compare import OURS, Comparison
from benchmarks.embedding import TORCH_BATCH, Network, _released, _torch_parts, lite0_in_torch
from benchmarks.slides import made, needs_bench, slide
from stimage_sd.models import NBModel

PX, MPP = 224, 0.5
NETWORK = Network("efficientnet_lite0", _released, lite0_in_torch)
#: side of the slide that each side works on first, px
SMALL = 2048
#: tiles that LazySlide embeds at most
AT_MOST = 2_000
#: tiles whose predictions are computed by numpy as well
CHECKED = 8
LAYERS = ("aleatoric", "epistemic", "total_variance")
Job = Callable[[], Mapping[str, Any]]
STEPS = (sti.io.slide, sti.pp.tile, sti.pp.embed, sti.tl.predict)


class Clock(dict[str, float]):
    """Seconds of steps, by name."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        begin = time.perf_counter()
        yield
        self[name] = time.perf_counter() - begin


# --------------------------------------------------------------------------------------------------
# the sides


def ours(side: int) -> Job:
    """Prepare ours."""
    model = _model()
    _by_us(SMALL, model)
    slide(side)
    return lambda: _by_us(side, model)


def _by_us(side: int, model: NBModel) -> Mapping[str, Any]:
    open_slide, tile, embed, predict = STEPS
    clock = Clock()
    with clock("open"):
        sdata = open_slide(slide(side))
    with clock("tile"):
        tile(sdata, layout="grid", size_um=PX * MPP, target_px=PX)
    with clock("embed"):
        embed(sdata, NETWORK.name, fields_of_view=(1.0,), context_rings=0)
    with clock("predict"):
        predict(sdata, model)
    with clock("write"), tempfile.TemporaryDirectory() as folder:
        sdata.tables["predictions"].write_zarr(Path(folder) / "predictions.zarr")
    tiles, predictions = sdata.tables["tiles"], sdata.tables["predictions"]
    kept = np.asarray(tiles.obsm["X_efficientnet_lite0"])[tiles.obs["keep"].to_numpy()]
    expected, _ = _heads(model, kept, slice(0, CHECKED))
    found = np.asarray(predictions.X[:CHECKED])
    return {
        **_figures(clock, tiles.n_obs, predictions.X),
        "max_difference": float(np.abs(found / expected - 1).max()),
    }


def lazyslides(side: int) -> Job:
    """Prepare LazySlide's."""
    try:
        import lazyslide
        import wsidata
    except ImportError as error:
        raise needs_bench("lazyslide") from error
    import torch

    module, levels, scale = _torch_parts(NETWORK)
    model = _model()

    def normalized(tile: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(tile).permute(2, 0, 1).float() - levels) * scale

    def embed(batch: torch.Tensor) -> torch.Tensor:
        return module(batch.contiguous(memory_format=torch.channels_last))

    def work(side: int, n_ours: int) -> Mapping[str, Any]:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            with clock("open"):
                wsi = wsidata.open_wsi(slide(side), store=str(Path(folder) / "slide.zarr"))
            with clock("tile"):
                lazyslide.pp.find_tissues(wsi)
                lazyslide.pp.tile_tissues(wsi, PX)
            n_found = len(wsi.shapes["tiles"])
            wsi.shapes["tiles"] = wsi.shapes["tiles"].iloc[:AT_MOST]
            with clock("embed"):
                lazyslide.tl.feature_extraction(
                    wsi, embed, model_name="lite0", transform=normalized, batch_size=TORCH_BATCH, pbar=False
                )
            with clock("predict"):
                table = _predictions(model, np.asarray(wsi.tables["lite0_tiles"].X))
            with clock("write"):
                table.write_zarr(Path(folder) / "predictions.zarr")
        return {**_scaled(clock, table.n_obs, n_ours), "tiles_found": n_found, "mean": float(table.X.mean())}

    work(SMALL, AT_MOST)
    n_ours = int(made(f"tiles_{side}.txt", _Count(side)).read_text())
    return lambda: work(side, n_ours)


def _scaled(clock: Clock, n_tiles: int, n_ours: int) -> dict[str, Any]:
    """Figures of a job of which the tiles were done in part: how many times as long the whole takes."""
    fixed = clock["open"] + clock["tile"]
    by_tile = clock["embed"] + clock["predict"] + clock["write"]
    return {
        "times": (fixed + by_tile * n_ours / n_tiles) / (fixed + by_tile),
        "tiles": n_tiles,
        "ms_a_tile": round(1e3 * (fixed / n_ours + by_tile / n_tiles), 3),
        "seconds_of_steps": {name: round(value, 3) for name, value in clock.items()},
    }


def _figures(clock: Clock, n_tiles: int, means: np.ndarray) -> dict[str, Any]:
    return {
        "tiles": n_tiles,
        "ms_a_tile": round(1e3 * sum(clock.values()) / n_tiles, 3),
        "mean": float(means.mean()),
        "seconds_of_steps": {name: round(value, 3) for name, value in clock.items()},
    }


# --------------------------------------------------------------------------------------------------
# the heads in numpy


def _predictions(model: NBModel, embeddings: np.ndarray, *, block: int = 256) -> ad.AnnData:
    """Means and variances of all tiles, a block at a time."""
    shape = (len(embeddings), len(model.genes))
    means, layers = np.empty(shape, np.float32), {name: np.empty(shape, np.float32) for name in LAYERS}
    for start in range(0, len(embeddings), block):
        rows = slice(start, start + block)
        means[rows], variances = _heads(model, embeddings, rows)
        for name, values in zip(LAYERS, variances, strict=True):
            layers[name][rows] = values
    return ad.AnnData(means, var=pd.DataFrame(index=list(model.genes)), layers=layers)


def _heads(model: NBModel, embeddings: np.ndarray, rows: slice) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Mean and variances of some tiles, which are standardized by the mean and deviation of all of them."""
    space, patterns, head = model.features, model.patterns, model.parameters
    values = (embeddings[rows] - embeddings.mean(axis=0)) / np.maximum(embeddings.std(axis=0), 1e-6)
    reduced = (values * space.weight) @ space.components
    seen = (reduced - patterns.center[:, None]) @ patterns.basis
    r_logits, p_logits = np.split(seen @ head["weight"] + head["bias"][:, None], 2, axis=-1)
    r, p = np.logaddexp(0, r_logits.clip(-15, 100)), 1 / (1 + np.exp(-p_logits.clip(-15, 15)))
    means = r * (1 - p) / p
    aleatoric, epistemic = (means / p).mean(axis=0), means.var(axis=0)
    return means.mean(axis=0), (aleatoric, epistemic, aleatoric + epistemic)


# --------------------------------------------------------------------------------------------------
# what they share


class _Count:
    """Writes how many tiles ours has on a slide."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, path: Path) -> None:
        sdata = sti.io.slide(slide(self.side))
        sti.pp.tile(sdata, layout="grid", size_um=PX * MPP, target_px=PX)
        path.write_text(str(sdata.tables["tiles"].n_obs))


def _model() -> NBModel:
    return sti.models.load(made("slide_model.stimage", _write_model))


def _write_model(path: Path) -> None:
    """Fit a model to a synthetic section; one epoch, as how well it predicts does not matter here."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = sti.datasets.synthetic_visium(Path(folder) / "bundle", n_spots=300, n_genes=1_000)
        section = sti.io.visium(bundle, image=bundle / "image.tif")
        sti.pp.tile(section, size_um=PX * MPP, target_px=PX)
        sti.pp.embed(section, NETWORK.name, fields_of_view=(1.0,), context_rings=0)
        genes = list(section.tables["counts"].var_names)
        sti.tl.fit_nb(section, genes=genes, extractor=NETWORK.name, n_members=10, max_epochs=1).save(path)


WORK = Comparison(
    title="A slide from file to predictions of 1,000 genes on disk",
    unit="px a side",
    sizes=(10_000, 20_000, 40_000),
    target=40_000,
    sides={OURS: ours, "LazySlide, then heads in numpy": lazyslides},
    reach={"LazySlide, then heads in numpy": 1.5},
    most_mb=2_000,
)
