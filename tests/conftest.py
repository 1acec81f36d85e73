"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.sparse as sp
import xarray as xr
from anndata import AnnData
from hypothesis import settings
from spatialdata import SpatialData

REPOSITORY = Path(__file__).resolve().parents[1]
#: growth of a test process after which it drops what JAX compiled, bytes
LARGE_GROWTH = 1 << 30
# Most of the time of many tests is XLA's compiler. At this level it is a fifth faster, and its code as fast. Programs
# of tests are small, so splitting them for several threads costs more than it gains. The main job and the tests on the
# newest Python are compiled as users' code is.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1")

# A shared machine may stop a test for longer than any deadline; examples are the same in every run.
settings.register_profile("repository", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that need it are skipped only where it is absent."""
    folder = Path(os.environ.get("STIMAGE_SD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set STIMAGE_SD_DATA)")
    return folder


@pytest.fixture(scope="session")
def _size_of_process() -> dict[str, int]:
    """Bytes of the process when JAX's programs were last dropped."""
    return {"bytes": psutil.Process().memory_info().rss}


@pytest.fixture(scope="module", autouse=True)
def _small_heap(_size_of_process: dict[str, int]) -> Iterator[None]:
    """Drop what JAX compiled in a process that grew, and spare the garbage collector what lives as long as the session.

    Otherwise a process of thousands of tests takes 9 GB, and most of its time goes to looking through them.
    """
    yield
    if "jax" in sys.modules and psutil.Process().memory_info().rss > _size_of_process["bytes"] + LARGE_GROWTH:
        sys.modules["jax"].clear_caches()
        _size_of_process["bytes"] = psutil.Process().memory_info().rss
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's image and embedding cache away from the user's."""
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path_factory.getbasetemp() / "stimage-sd-cache"))


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for fixtures that live as long as the session, which are made before `_own_cache` is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIMAGE_SD_CACHE", str(tmp_path_factory.getbasetemp() / "stimage-sd-cache"))
        yield


# --------------------------------------------------------------------------------------------------
# images that count how often they are read


@dataclass
class CountedImage:
    """A lazy pyramid that knows which of its chunks were computed, and how often."""

    arrays: list[np.ndarray]
    chunk: int
    reads: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def levels(self) -> list[da.Array]:
        """Levels, finest first, lazy ``uint8 (3, y, x)``."""
        return [self._lazy(number, array) for number, array in enumerate(self.arrays)]

    @property
    def pyramid(self) -> list[xr.DataArray]:
        """The levels as `contract.levels` gives them."""
        return [xr.DataArray(level, dims=("c", "y", "x")) for level in self.levels]

    def full_reads(self) -> int:
        """How many chunks of the finest level were computed."""
        return sum(times for (level, _, _), times in self.reads.items() if level == 0)

    def _lazy(self, number: int, array: np.ndarray) -> da.Array:
        def read(block: np.ndarray, block_info: dict | None = None) -> np.ndarray:
            if block_info:  # dask asks for the type with an empty block, without a place
                _, row, column = block_info[0]["chunk-location"]
                with self.lock:
                    self.reads[number, row, column] += 1
            return block

        lazy = da.from_array(array, chunks=(3, self.chunk, self.chunk))
        return lazy.map_blocks(read, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))


def smooth_picture(height: int, width: int, *, seed: int = 0, grain: int = 24) -> np.ndarray:
    """A smooth random color picture, ``uint8 (y, x, 3)``."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // grain + 2, width // grain + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="session")
def picture() -> Callable[..., np.ndarray]:
    """`smooth_picture`, for tests."""
    return smooth_picture


@pytest.fixture(scope="session")
def counted_image() -> Callable[..., CountedImage]:
    """A function that makes a `CountedImage` of random pixels, with or without coarser levels."""

    def make(
        height: int, width: int, *, chunk: int = 128, n_levels: int = 1, seed: int = 0, image: np.ndarray | None = None
    ) -> CountedImage:
        whole = smooth_picture(height, width, seed=seed) if image is None else image
        arrays = [np.ascontiguousarray(np.moveaxis(whole, -1, 0))]
        for _ in range(n_levels - 1):
            whole = cv2.resize(whole, (whole.shape[1] // 2, whole.shape[0] // 2), interpolation=cv2.INTER_AREA)
            arrays.append(np.ascontiguousarray(np.moveaxis(whole, -1, 0)))
        return CountedImage(arrays, chunk)

    return make


# --------------------------------------------------------------------------------------------------
# sections


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., SpatialData]:
    """A function that makes a section of an image alone, ``uint8 (y, x, 3)`` or lazy levels."""
    from stimage_sd import contract
    from stimage_sd.io._raster import raster_from_array

    def make(image: np.ndarray | list[da.Array], *, mpp: float | None = None, sample: str = "slide") -> SpatialData:
        levels = raster_from_array(image) if isinstance(image, np.ndarray) else image
        sdata = SpatialData(images={contract.IMAGE: contract.build_image(levels)})
        return contract.register(sdata, sample=sample, platform="slide", image=contract.IMAGE, mpp=mpp)

    return make


def lattice_points(n_side: int, *, pitch: float, kind: str = "square") -> np.ndarray:
    """Points of an array, ``(n_side ** 2, 2)`` x and y, one pitch away from the border at least."""
    rows, columns = np.divmod(np.arange(n_side**2), n_side)
    if kind == "square":
        return np.stack([columns + 1.0, rows + 1.0], axis=1) * pitch
    return np.stack([columns + 1.0 + 0.5 * (rows % 2), 1.0 + rows * np.sqrt(3) / 2], axis=1) * pitch


@pytest.fixture(scope="session")
def make_spots() -> Callable[..., SpatialData]:
    """A function that makes a small section with spots on a lattice over tissue that is one color.

    ``features`` become embeddings by an extractor named "toy" and ``counts`` the table of counts, so that a
    model can be fitted on it without a pixel being looked at.
    """
    from stimage_sd import contract, pp
    from stimage_sd.io._raster import raster_from_array
    from stimage_sd.io._section import assemble

    def make(
        *,
        n_side: int = 8,
        counts: np.ndarray | sp.spmatrix | None = None,
        features: np.ndarray | None = None,
        genes: list[str] | None = None,
        kind: str = "square",
        pitch: float = 40.0,
        mpp: float | None = 2.5,
        sample: str = "made",
        tiled: bool = True,
        stripes: bool = False,
    ) -> SpatialData:
        points = lattice_points(n_side, pitch=pitch, kind=kind)
        side = int((n_side + 2) * pitch)
        if counts is None:
            counts = np.random.default_rng(0).poisson(3.0, (len(points), 4))
        genes = genes or [f"G{number}" for number in range(counts.shape[1])]
        table = AnnData(
            X=sp.csr_matrix(counts),
            obs=pd.DataFrame(index=[f"spot-{number}" for number in range(len(points))]),
            var=pd.DataFrame(index=genes),
            obsm={"spatial": points},
        )
        pink = np.full((side, side, 3), (200, 120, 180), np.uint8)
        if stripes:  # nuclei's color, for what tells two stains apart
            pink[::3] = (110, 80, 160)
        levels = raster_from_array(pink)
        sdata = assemble(levels, table, diameter_px=pitch / 2, sample=sample, platform="made", mpp=mpp)
        if tiled:
            pp.tile(sdata)
        if features is not None:
            tiles = contract.tiles(sdata)
            tiles.obsm["X_toy"] = np.asarray(features, dtype=np.float32)
            tiles.uns["embeddings"] = {
                "toy": {
                    "image": "he",
                    "weights_hash": "0123456789abcdef",
                    "fields_of_view": [1.0],
                    "input_px": 299,
                    "context_rings": 0,
                    "stain": "",
                }
            }
        return sdata

    return make


@dataclass
class PlantedCohort:
    """Sections whose counts follow from their embeddings by a known law."""

    sections: dict[str, SpatialData]
    mean: dict[str, np.ndarray]
    genes: list[str]
    dispersion: np.ndarray


@pytest.fixture(scope="session")
def planted(make_spots: Callable[..., SpatialData], _session_cache: None) -> Callable[..., PlantedCohort]:
    """A function that simulates a cohort: log means linear in features, negative binomial counts."""

    def make(
        names: tuple[str, ...] = ("a", "b", "c", "d"),
        *,
        n_side: int = 14,
        n_features: int = 12,
        n_genes: int = 10,
        strength: float = 0.8,
        seed: int = 0,
        depth: float = 0.0,
    ) -> PlantedCohort:
        law = np.random.default_rng([seed, 1])
        weights = law.normal(0, strength / np.sqrt(n_features), (n_features, n_genes))
        intercept, dispersion = law.uniform(1.0, 3.0, n_genes), law.uniform(3.0, 15.0, n_genes)
        genes = [f"G{number}" for number in range(n_genes)]
        sections, means = {}, {}
        for number, name in enumerate(names):
            random = np.random.default_rng([seed, 2, number])
            features = random.normal(size=(n_side**2, n_features))
            mean = np.exp(intercept + features @ weights)
            seen = mean * np.exp(random.normal(0, depth, (len(mean), 1)))
            counts = random.negative_binomial(dispersion, dispersion / (dispersion + seen))
            sections[name] = make_spots(
                n_side=n_side, counts=counts.astype(np.int32), features=features, genes=genes, sample=name
            )
            means[name] = mean
        return PlantedCohort(sections, means, genes, dispersion)

    return make


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> Callable[..., SpatialData]:
    """A function that reads a synthetic Visium section; each is painted once a session, and read anew."""
    from stimage_sd import datasets, io

    painted: dict[tuple, Path] = {}

    def read(**options: int) -> SpatialData:
        key = tuple(sorted(options.items()))
        if key not in painted:
            folder = tmp_path_factory.mktemp("synthetic") / "run"
            painted[key] = datasets.synthetic_visium(folder, **options)
        return io.visium(painted[key], image=painted[key] / "image.tif", sample="-".join(f"{k}{v}" for k, v in key))

    return read
