"""Nuclei of a slide to embeddings on disk: two squares around each, by the stages of EfficientNet-Lite0.

The slide is a synthetic Aperio slide at 0.5 µm per pixel, with 500 nuclei per million pixels: 2,000 px a side have
2,000 nuclei, 5,000 px have 12,500, and 10,000 px have 50,000. The nuclei are circles at random places of the tissue.
Around each, squares of 8 µm (16 px) and 25 µm (50 px) are resampled to 64 px. All sides have the same weights and
every core, and write the embeddings as a zarr array. Opening, reading the weights and a first batch are not timed.

- ours: ``pp.embed(on="nuclei")`` with its defaults. It also makes the table of the nuclei.
- torch: the plain loop over the nuclei from top to bottom. OpenSlide reads the square of 25 µm of each nucleus from the
  slide, which it opens lazily. The square of 8 µm is cut out of it, OpenCV resamples both, and the network runs in
  eager mode, channels last, on batches of 128 squares. It stops after the last stage that is used.
- the network alone: the session that ours runs, in ONNX Runtime, on squares that are in memory. It reads and writes
  nothing, and is a limit. As in ours, it has one thread, and runs 128 squares a call on each core at once.

`max_difference` is from torch's embeddings of the first nuclei, the largest over all features, and `largest` the
largest of those. `cpu_seconds` are the processor's. The peer runs up to 2,000 nuclei. Above, its seconds are scaled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# touched before the measuring begins: what is counted is above the imports
import cv2
import numpy as np
import shapely
import squidpy  # noqa: F401
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.compare import OURS, Comparison
from benchmarks.embedding import _settings, _write_embeddings, lite0_in_torch
from benchmarks.measure import with_cpu_seconds
from benchmarks.nuclei_slide import scatter
from benchmarks.slides import made, slide
from stimage_sd import contract
from stimage_sd.models import get_extractor

EXTRACTOR, BATCH, TARGET = "efficientnet_lite0_stages", 128, 64
#: sides of the squares, px, and nuclei per pixel of the slide
INNER, OUTER, DENSITY = 16, 50, 500e-6
#: stages of the network whose means are the embedding
STAGES = (1, 2, 4)
#: nuclei whose embeddings are compared
CHECKED = 256
TORCH, ALONE = "torch, nucleus by nucleus", "network alone (ONNX Runtime)"
Job = Callable[[], Mapping[str, Any]]


# --------------------------------------------------------------------------------------------------
# the sides


def ours(n_nuclei: int) -> Job:
    """Prepare ours: a section with nuclei and tiles."""
    sdata, expected = _section(n_nuclei), _reference(n_nuclei)
    get_extractor(EXTRACTOR)(np.zeros((BATCH, TARGET, TARGET, 3), np.uint8))

    def job() -> Mapping[str, Any]:
        sti.pp.embed(sdata, EXTRACTOR, on="nuclei")
        values = np.asarray(sdata.tables["nuclei_features"].obsm[contract.feature_key(EXTRACTOR)])
        _write_embeddings(values)
        return _agreement(values, expected)

    return with_cpu_seconds(job)


def by_torch(n_nuclei: int) -> Job:
    """Prepare torch's: the slide opened, the network built."""
    import openslide

    embed = _in_torch()
    corners, expected = _corners(_section(n_nuclei)), _reference(n_nuclei)
    reader = openslide.OpenSlide(slide(_side(n_nuclei)))
    embed(np.zeros((BATCH, TARGET, TARGET, 3), np.uint8))

    def job() -> Mapping[str, Any]:
        values = np.empty((n_nuclei, 2, _settings(EXTRACTOR)["embedding_size"]), np.float32)
        # OpenSlide keeps the slide's last tiles, so that neighbors are read together
        order = np.lexsort((corners[:, 0], corners[:, 1] // 256))
        for start in range(0, n_nuclei, BATCH // 2):
            rows = order[start : start + BATCH // 2]
            squares = [_squares(reader, *corner) for corner in corners[rows].tolist()]
            values[rows] = embed(np.concatenate(squares)).reshape(len(rows), 2, -1)
        result = values.reshape(n_nuclei, -1)
        _write_embeddings(result)
        return _agreement(result, expected)

    return with_cpu_seconds(job)


def alone(n_nuclei: int) -> Job:
    """Prepare the network alone: the package's own session, squares in memory."""
    extractor = get_extractor(EXTRACTOR)
    squares = np.random.default_rng(0).integers(0, 255, (2 * n_nuclei, TARGET, TARGET, 3), dtype=np.uint8)
    batches = [squares[start : start + BATCH] for start in range(0, len(squares), BATCH)]
    extractor(batches[0])

    def job() -> Mapping[str, Any]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {"squares": sum(len(values) for values in pool.map(extractor, batches))}

    return with_cpu_seconds(job)


# --------------------------------------------------------------------------------------------------
# what they share


def _side(n_nuclei: int) -> int:
    return round((n_nuclei / DENSITY) ** 0.5)


def _section(n_nuclei: int) -> SpatialData:
    """Open the slide, lay tiles over its tissue, and scatter nuclei."""
    sdata = sti.io.slide(slide(_side(n_nuclei)))
    sti.pp.tile(sdata, layout="grid", size_um=112.0, min_tissue=0.0)
    scatter(sdata, n_nuclei)
    return sdata


def _corners(sdata: SpatialData) -> np.ndarray:
    """Corners of the larger squares, ``(n_nuclei, 2)`` x and y, inside the slide."""
    centers = shapely.get_coordinates(sdata.shapes[contract.NUCLEI].geometry.centroid)
    corners = np.floor(centers - OUTER / 2 + 0.5).astype(int)
    width, height = contract.image_size(sdata)
    if corners.min() < 0 or (corners + OUTER > (width, height)).any():
        raise ValueError("Expected all squares inside the slide.")
    return corners


def _squares(reader: Any, left: int, top: int) -> np.ndarray:
    """Read the squares around a nucleus, ``uint8 (2, 64, 64, 3)``."""
    outer = np.asarray(reader.read_region((left, top), 0, (OUTER, OUTER)))[..., :3]
    margin = (OUTER - INNER) // 2
    inner = outer[margin : margin + INNER, margin : margin + INNER]
    return np.stack([cv2.resize(np.ascontiguousarray(square), (TARGET, TARGET)) for square in (inner, outer)])


def _in_torch() -> Callable[[np.ndarray], np.ndarray]:
    """Give a function from squares, ``uint8 (batch, y, x, 3)``, to embeddings."""
    network = lite0_in_torch()
    import torch

    network = network.eval().to(memory_format=torch.channels_last)
    settings = _settings(EXTRACTOR)
    levels = torch.tensor(255 * np.asarray(settings["mean"]), dtype=torch.float32)[:, None, None]
    scale = torch.tensor(1 / (255 * np.asarray(settings["std"])), dtype=torch.float32)[:, None, None]

    def embed(squares: np.ndarray) -> np.ndarray:
        batch = (torch.from_numpy(squares).permute(0, 3, 1, 2).float() - levels) * scale
        with torch.inference_mode():
            value = network.bn1(network.conv_stem(batch.contiguous(memory_format=torch.channels_last)))
            means = []
            for number, stage in enumerate(network.blocks[: STAGES[-1] + 1]):
                value = stage(value)
                if number in STAGES:
                    means.append(value.mean((2, 3)))
            return torch.cat(means, 1).numpy()

    return embed


def _reference(n_nuclei: int) -> np.ndarray:
    """Give torch's embeddings of the first nuclei, computed once in a process of its own and kept."""
    return np.load(made(f"nuclei_{n_nuclei}.npy", partial(_write_reference, n_nuclei)))


def _write_reference(n_nuclei: int, path: Path) -> None:
    import openslide

    reader, embed = openslide.OpenSlide(slide(_side(n_nuclei))), _in_torch()
    squares = [_squares(reader, *corner) for corner in _corners(_section(n_nuclei))[:CHECKED].tolist()]
    np.save(path, embed(np.concatenate(squares)).reshape(len(squares), -1))


def _agreement(values: np.ndarray, expected: np.ndarray) -> Mapping[str, Any]:
    return {
        "nuclei": len(values),
        "max_difference": float(np.abs(values[: len(expected)] - expected).max()),
        "largest": float(np.abs(expected).max()),
    }


WORK = Comparison(
    title="Embedding the nuclei of a slide, two squares of 64 px each",
    unit="nuclei",
    sizes=(2_000, 12_500, 50_000),
    sides={OURS: ours, TORCH: by_torch, ALONE: alone},
    reach={TORCH: 3.0},
    at_most={TORCH: 2_000},
)
