"""A cohort with planted structure for the comparisons of fitting and predicting, kept on disk between runs.

Embeddings of 2,048 features are 64 factors of falling size, turned at random, noise beside them, and an offset a
section. Log means of 1,522 genes follow 12 of the factors; counts are negative binomial with a dispersion a gene and a
depth a spot, some 80 % of them zero. Tiles lie in four sections of the same number of tiles, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData

from benchmarks.slides import made
from stimage_sd import contract, pp
from stimage_sd.io._raster import raster_from_array
from stimage_sd.io._section import assemble

N_GENES, N_FEATURES, N_FACTORS, N_SHARED = 1_522, 2_048, 64, 12
GENES = [f"G{number}" for number in range(N_GENES)]
SECTIONS = ("a", "b", "c", "d")
#: the section that every side is validated on
HELD_OUT = "d"
EXTRACTOR = "planted"
#: pixels from tile to tile; the image is never looked at
_PITCH = 8
#: tiles that are made at a time
_BLOCK = 2_500


def features(n_tiles: int) -> np.ndarray:
    """Embeddings, ``float32 (n_tiles, 2048)``, read from disk as they are needed."""
    return np.load(made(f"nb_features_{n_tiles}.npy", partial(_write_features, n_tiles)), mmap_mode="r")


def counts(n_tiles: int) -> sp.csr_matrix:
    """Counts, ``int32 (n_tiles, 1522)``."""
    return sp.csr_matrix(sp.load_npz(made(f"nb_counts_{n_tiles}.npz", partial(_write_counts, n_tiles))))


def section_of(n_tiles: int) -> np.ndarray:
    """Name of the section of each tile."""
    return np.asarray(SECTIONS)[np.arange(n_tiles) * len(SECTIONS) // n_tiles]


def cohort(n_tiles: int) -> dict[str, SpatialData]:
    """The four sections, tiled and embedded."""
    embedded, measured, names = features(n_tiles), counts(n_tiles), section_of(n_tiles)
    return {name: section(np.array(embedded[names == name]), measured[names == name], name) for name in SECTIONS}


def section(embedded: np.ndarray, measured: sp.csr_matrix | None, name: str) -> SpatialData:
    """A section with a tile a spot, and its embeddings; without counts its table has one gene of zeros."""
    n_tiles = len(embedded)
    side = int(np.ceil(np.sqrt(n_tiles)))
    rows, columns = np.divmod(np.arange(n_tiles), side)
    table = AnnData(
        X=sp.csr_matrix((n_tiles, 1), dtype=np.int32) if measured is None else measured,
        obs=pd.DataFrame(index=[f"spot-{number}" for number in range(n_tiles)]),
        var=pd.DataFrame(index=GENES[:1] if measured is None else GENES),
        obsm={"spatial": np.column_stack([columns + 1.0, rows + 1.0]) * _PITCH},
    )
    pink = np.full(((side + 2) * _PITCH, (side + 2) * _PITCH, 3), (200, 120, 180), np.uint8)
    sdata = assemble(
        raster_from_array(pink), table, diameter_px=_PITCH / 2, sample=name, platform="planted", mpp=100 / _PITCH
    )
    pp.tile(sdata, min_tissue=0)
    tiles = contract.tiles(sdata)
    tiles.obsm[contract.feature_key(EXTRACTOR)] = embedded
    tiles.uns["embeddings"] = {EXTRACTOR: _how()}
    return sdata


def _how() -> dict[str, Any]:
    return {
        "image": contract.IMAGE,
        "weights_hash": "0123456789abcdef",
        "fields_of_view": [1.0],
        "input_px": 299,
        "context_rings": 0,
        "stain": "",
    }


def _blocks(n_tiles: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Tiles and their factors, a block at a time, with the block's number."""
    for number, start in enumerate(range(0, n_tiles, _BLOCK)):
        rows = np.arange(start, min(start + _BLOCK, n_tiles))
        yield number, rows, np.random.default_rng([1, number]).normal(size=(len(rows), N_FACTORS))


def _write_features(n_tiles: int, path: Path) -> None:
    law = np.random.default_rng(0)
    turned = np.linalg.qr(law.normal(size=(N_FEATURES, N_FACTORS)))[0].T * np.sqrt(N_FEATURES)
    turned *= (0.35 * np.arange(1, N_FACTORS + 1) ** -0.4)[:, None]
    offset = law.normal(0, 0.3, (len(SECTIONS), N_FEATURES))
    embedded = np.lib.format.open_memmap(path, "w+", np.float32, (n_tiles, N_FEATURES))
    for number, rows, factors in _blocks(n_tiles):
        noise = np.random.default_rng([2, number]).normal(0, 0.5, (len(rows), N_FEATURES))
        embedded[rows] = factors @ turned + noise + offset[rows * len(SECTIONS) // n_tiles]
    embedded.flush()


def _write_counts(n_tiles: int, path: Path) -> None:
    law = np.random.default_rng(1)
    followed = law.permutation(N_FACTORS // 2)[:N_SHARED]
    loadings = law.normal(0, 0.8 / np.sqrt(N_SHARED), (N_SHARED, N_GENES))
    log_mean = law.normal(-2.6, 1.6, N_GENES)
    dispersion = np.exp(law.normal(0.5, 0.7, N_GENES))
    measured = []
    for number, rows, factors in _blocks(n_tiles):
        random = np.random.default_rng([3, number])
        depth = random.normal(0, 0.3, (len(rows), 1))
        mean = np.exp(log_mean + factors[:, followed] @ loadings + depth)
        measured.append(sp.csr_matrix(random.negative_binomial(dispersion, dispersion / (dispersion + mean))))
    sp.save_npz(path, sp.vstack(measured).astype(np.int32).tocsr(), compressed=False)
