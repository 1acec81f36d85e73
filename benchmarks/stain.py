"""Stain normalization of tiles of 299 px: this package, squidpy, staintools and torchstain, on one image.

The image is a mosaic of real tissue on disk, chunked as the package writes its images. Every side reads it through
the same driver, `stimage_sd.stream.driver.run_over_tiles`, and hands on ``uint8`` tiles in batches; of each tile a
few pixels are kept, so that the results can be compared. Stains are fitted beforehand and untimed, but by the peers
that fit every tile anew. How many threads a peer works with is what it was found fastest with on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dask.array as da
import numpy as np
import spatialdata
import xarray as xr
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.compare import OURS, Comparison
from stimage_sd import contract
from stimage_sd.pp._stain import StainReference, fit_section
from stimage_sd.pp._tile import tissue_fraction
from stimage_sd.stream.driver import run_over_tiles

SIDE = 299
SOURCE = "C5"
#: of `stimage_sd.datasets.synthetic_slide`, whose staining the tissue is given
TARGET_STAIN = 3
#: of each result, one pixel in so many is kept along both axes
KEPT = 23
#: tiles whose result is compared with squidpy's
CHECKED = 64
#: longest side of the mosaic's coarse level, which stains are fitted on, px
COARSE = 500
BATCH = 32

Normalize = Callable[[np.ndarray], np.ndarray]
Work = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Mosaic:
    """What all sides start from.

    Attributes
    ----------
    section
        The mosaic, read lazily from disk.
    centers
        ``(n_tiles, 2)`` x and y of its tiles, px.
    target
        The staining to give it; its white point is the mosaic's own, as squidpy has one for both.
    source_pixels, target_pixels
        ``uint8 (299, 299, 3)``: tissue pixels of either, for peers that fit an image and not a section.
    """

    section: SpatialData
    centers: np.ndarray
    target: StainReference
    source_pixels: np.ndarray
    target_pixels: np.ndarray


# --------------------------------------------------------------------------------------------------
# the data


#: fewer tiles than this are too little tissue to fit stains on: they are the first of so many
LEAST = 50


def mosaic(size: int) -> Mosaic:
    """Read a mosaic of so many tiles, made at its first use and kept in the folder for temporary files.

    It is made in a process of its own, so that this one's peak memory is that of the work.
    """
    whole = max(size, LEAST)
    folder = _folder(whole)
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.stain", str(whole)], check=True)
    rows, columns = np.divmod(np.arange(size), _columns(whole))
    return Mosaic(
        spatialdata.read_zarr(folder / "mosaic.zarr"),
        (np.column_stack([columns, rows]) + 0.5) * SIDE,
        StainReference.from_dict(json.loads((folder / "target.json").read_text())),
        np.load(folder / "source_pixels.npy"),
        np.load(folder / "target_pixels.npy"),
    )


def _folder(size: int) -> Path:
    return Path(tempfile.gettempdir()) / "stimage-sd-benchmarks" / f"stain-{size}"


def _columns(size: int) -> int:
    return int(np.ceil(np.sqrt(size)))


def _make(size: int) -> None:
    folder = _folder(size)
    folder.mkdir(parents=True, exist_ok=True)
    source = sti.datasets.her2st(SOURCE)
    with tempfile.TemporaryDirectory() as target_folder:
        slide = sti.datasets.synthetic_slide(Path(target_folder) / "target", size=2048, stain_seed=TARGET_STAIN)
        target = sti.io.slide(slide / "slide.svs")
        _write(folder, size, source, target)
    (folder / "ready").touch()
    data = mosaic(size)
    np.save(folder / "expected.npy", _run(_squidpys_image(data), data.centers[:CHECKED], _as_they_are))


def _write(folder: Path, size: int, source: SpatialData, target: SpatialData) -> None:
    section = SpatialData(images={contract.IMAGE: contract.build_image(_pyramid(size, *_tiles_of(source)))})
    contract.register(section, sample="mosaic", platform="slide", image=contract.IMAGE, mpp=None)
    sti.pp.tissue_mask(section)
    section.write(folder / "mosaic.zarr", overwrite=True)
    own, fitted = (fit_section(each, method="vahadane") for each in (section, target))
    dataclasses.replace(fitted, white_point=own.white_point).save(folder / "target.json")
    np.save(folder / "source_pixels.npy", _tissue_pixels(section))
    np.save(folder / "target_pixels.npy", _tissue_pixels(target))


def _tiles_of(section: SpatialData) -> tuple[np.ndarray, np.ndarray]:
    """Cut a section's image into squares; give those of tissue and those of glass, ``uint8 (n, 3, 299, 299)``."""
    sti.pp.tissue_mask(section)
    image = contract.levels(section, contract.IMAGE)[0].data.compute()
    rows, columns = (length // SIDE for length in image.shape[1:])
    squares = image[:, : rows * SIDE, : columns * SIDE].reshape(3, rows, SIDE, columns, SIDE)
    squares = squares.transpose(1, 3, 0, 2, 4).reshape(rows * columns, 3, SIDE, SIDE)
    centers = (np.column_stack([np.tile(np.arange(columns), rows), np.repeat(np.arange(rows), columns)]) + 0.5) * SIDE
    share = tissue_fraction(*contract.tissue(section), centers, side=SIDE)
    return squares[share >= 0.7], squares[share == 0]


def _pyramid(size: int, tissue: np.ndarray, glass: np.ndarray) -> list[da.Array]:
    """Lay squares of tissue side by side, turned differently each time round, and a row of glass below them."""
    columns = _columns(size)
    rows = -(-size // columns) + 1

    def square(block_id: tuple[int, ...]) -> np.ndarray:
        number = block_id[1] * columns + block_id[2]
        if number >= size:
            return glass[number % len(glass)]
        turns, which = divmod(number, len(tissue))
        turned = np.rot90(tissue[which], turns % 4, axes=(1, 2))
        return turned[:, :, ::-1] if turns % 8 >= 4 else turned

    fine = da.map_blocks(
        square, chunks=((3,), (SIDE,) * rows, (SIDE,) * columns), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    step = -(-max(fine.shape) // COARSE)
    chunks = (3, contract.CHUNK, contract.CHUNK)
    return [fine.rechunk(chunks), fine[:, ::step, ::step].rechunk(chunks)]


def _tissue_pixels(section: SpatialData) -> np.ndarray:
    """As many tissue pixels as a tile has, from all over a section's thumbnail."""
    thumbnail, downsample = contract.thumbnail(section, contract.IMAGE)
    mask, spanned = contract.tissue(section)
    at = [
        (np.arange(length) * downsample / each).astype(int)
        for length, each in zip(thumbnail.shape, spanned, strict=False)
    ]
    pixels = thumbnail[mask[np.ix_(*(index.clip(0, length - 1) for index, length in zip(at, mask.shape, strict=True)))]]
    return pixels[np.linspace(0, len(pixels) - 1, SIDE**2).astype(int)].reshape(SIDE, SIDE, 3)


# --------------------------------------------------------------------------------------------------
# the sides


def ours(size: int) -> Work:
    """`stimage_sd.pp.stain_normalize`; its tables are applied to a chunk when it is read."""
    data = mosaic(size)
    sti.pp.stain_normalize(data.section, data.target, concentrations="keep")
    image = contract.levels(data.section, contract.NORMALIZED)
    return _work(data, image, _as_they_are, expected=np.load(_folder(size) / "expected.npy"))


def squidpys(size: int) -> Work:
    """`squidpy.experimental.im.normalize_stains`, lazy too."""
    data = mosaic(size)
    return _work(data, _squidpys_image(data), _as_they_are)


def staintools_fitted(size: int) -> Work:
    """`staintools.StainNormalizer` as it is: stains of every tile, its concentrations, the target's colors."""
    staintools = _peer("staintools")
    data = mosaic(size)
    normalizer = staintools.StainNormalizer(method="vahadane")
    normalizer.fit(data.target_pixels)
    return _work(data, _raw(data), _each(normalizer.transform), n_jobs=1)


def staintools_fixed(size: int) -> Work:
    """The same with one stain matrix of the source for all tiles, so that only concentrations are found."""
    _peer("staintools")
    from staintools.miscellaneous.get_concentrations import get_concentrations
    from staintools.stain_extraction.vahadane_stain_extractor import VahadaneStainExtractor

    data = mosaic(size)
    own, target = (VahadaneStainExtractor.get_stain_matrix(each) for each in (data.source_pixels, data.target_pixels))
    strengths = [
        np.percentile(get_concentrations(pixels, matrix), 99, axis=0)
        for pixels, matrix in ((data.source_pixels, own), (data.target_pixels, target))
    ]
    colors = (strengths[1] / strengths[0])[:, None] * target

    def transform(tile: np.ndarray) -> np.ndarray:
        return (255 * np.exp(-get_concentrations(tile, own) @ colors)).reshape(tile.shape).astype(np.uint8)

    return _work(data, _raw(data), _each(transform), n_jobs=1)


def torchstains(size: int) -> Work:
    """`torchstain`'s Macenko on torch, which fits every tile."""
    torch, torchstain = _peer("torch"), _peer("torchstain")
    torch.set_num_threads(1)  # batches run side by side
    data = mosaic(size)
    normalizer = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    normalizer.fit(torch.from_numpy(data.target_pixels).permute(2, 0, 1))

    def transform(tile: np.ndarray) -> np.ndarray:
        result, _, _ = normalizer.normalize(torch.from_numpy(tile).permute(2, 0, 1), stains=False)
        return result.numpy().astype(np.uint8)

    return _work(data, _raw(data), _each(transform))


def _peer(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise SystemExit(f'This side needs {name}, which is not installed: pip install -e ".[bench]"') from error


def _squidpys_image(data: Mosaic) -> list[xr.DataArray]:
    import squidpy as sq

    reference = sq.experimental.im.StainReference(
        method="vahadane",
        stain_matrix=np.array(data.target.stain_matrix),
        white_point=np.array(data.target.white_point),
    )
    normalized = sq.experimental.im.normalize_stains(
        data.section,
        contract.IMAGE,
        reference,
        tissue_mask_key=contract.TISSUE,
        inplace=False,
        preserve_background=False,
    )
    # the driver looks at a coarse level to know an image again; squidpy would compute the fine one for it
    return [normalized, _raw(data)[1]]


def _raw(data: Mosaic) -> list[xr.DataArray]:
    return contract.levels(data.section, contract.IMAGE)


def _as_they_are(tiles: np.ndarray) -> np.ndarray:
    return tiles


def _each(transform: Normalize) -> Normalize:
    return lambda tiles: np.stack([transform(tile) for tile in tiles])


def _run(
    image: Sequence[xr.DataArray], centers: np.ndarray, normalize: Normalize, *, n_jobs: int | None = None
) -> np.ndarray:
    """Normalize all tiles and keep some pixels of each."""

    def function(tiles: np.ndarray) -> np.ndarray:
        # the driver asks for the shape of a result with a blank tile, which has no stains to fit
        blank = len(tiles) == 1 and tiles.min() == 255
        result = tiles if blank else normalize(tiles)
        return result[:, ::KEPT, ::KEPT]

    return run_over_tiles(
        image, centers, function, sides=[SIDE], target=SIDE, key="stain", batch_size=BATCH, n_jobs=n_jobs
    )[:, 0]


def _work(
    data: Mosaic,
    image: Sequence[xr.DataArray],
    normalize: Normalize,
    *,
    n_jobs: int | None = None,
    expected: np.ndarray | None = None,
) -> Work:
    """Make the timed part; a few tiles are worked on first, so that it loads and compiles nothing."""
    _run(image, data.centers[:2], normalize, n_jobs=n_jobs)
    before = _run(_raw(data), data.centers[:CHECKED], _as_they_are)

    def work() -> dict[str, float]:
        kept = _run(image, data.centers, normalize, n_jobs=n_jobs)
        figures = {"mean": float(kept.mean()), "mean_change": float(np.abs(kept[: len(before)] - before).mean())}
        if expected is not None:
            difference = np.abs(kept[: len(expected)] - expected)
            figures |= {"mean_from_squidpys": float(difference.mean()), "most_from_squidpys": float(difference.max())}
        return figures

    return work


WORK = Comparison(
    title="Stain normalization of tiles of 299 px",
    unit="tiles",
    sizes=(200, 2000, 8000),
    sides={
        OURS: ours,
        "staintools, fitted a tile": staintools_fitted,
        "staintools, source fixed": staintools_fixed,
        "squidpy normalize_stains": squidpys,
        "torchstain Macenko, fitted a tile": torchstains,
    },
    reach={
        "staintools, fitted a tile": 200,
        "staintools, source fixed": 10,
        "squidpy normalize_stains": 8,
        "torchstain Macenko, fitted a tile": 3,
    },
    # every tile, or chunk, is work of its own for all of them
    at_most={
        "staintools, fitted a tile": 4,
        "staintools, source fixed": 100,
        "squidpy normalize_stains": 2000,
        "torchstain Macenko, fitted a tile": 200,
    },
)

if __name__ == "__main__":
    _make(int(sys.argv[1]))
