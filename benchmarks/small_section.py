"""The section of `benchmarks/small.py`: 50 spots, and a model of 10 genes that was fitted to it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.slides import made
from stimage_sd import contract

TILES, GENES, PX = 50, 10, 299
EXTRACTOR = "efficientnet_lite0"


def section(name: str) -> SpatialData:
    """Open the section from its store: ``"raw"``, tiled; ``"predicted"``, with embeddings and predictions too."""
    import spatialdata

    return spatialdata.read_zarr(made("small", _write) / f"{name}.zarr")


def normalized() -> SpatialData:
    """Open the tiled section, its stains fitted, with the lazy image in another staining."""
    sdata = section("raw")
    sti.pp.stain_normalize(sdata, reference())
    return sdata


def reference() -> Path:
    """Give the file of that staining."""
    return made("small", _write) / "stain.json"


def fitted() -> sti.models.NBModel:
    """Load the model."""
    return sti.models.load(made("small", _write) / "model.stimage")


def columns() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted and measured log counts, ``(50, 10)``, and the spots' places, ``(50, 2)`` px."""
    sdata = section("predicted")
    predictions = contract.predictions(sdata)
    rows, counts = contract.align_to_spots(sdata, predictions)
    measured = np.asarray(counts[:, list(predictions.var_names)].X.todense())
    predicted = np.asarray(predictions.X, dtype=np.float64)[rows]
    return np.log1p(predicted), np.log1p(measured.astype(np.float64)), np.asarray(predictions.obsm["spatial"])[rows]


def _write(path: Path) -> None:
    path.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        bundle = sti.datasets.synthetic_visium(Path(folder) / "bundle", n_spots=TILES, n_genes=60)
        sdata = sti.io.visium(bundle, image=bundle / "image.tif")
        sti.pp.tile(sdata, target_px=PX, min_tissue=0.0)
        sdata.write(path / "raw.zarr")
        sti.pp.embed(sdata, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
        genes = sti.pp.select_genes(sdata, n_top=GENES)
        model = sti.tl.fit_nb(sdata, genes=genes, extractor=EXTRACTOR, n_members=10, max_epochs=20, exposure=None)
        model.save(path / "model.stimage")
        sti.tl.predict(sdata, model)
        sdata.write(path / "predicted.zarr")
        other = sti.datasets.synthetic_visium(Path(folder) / "other", n_spots=TILES, n_genes=60, stain_seed=3)
        sti.pp.stain_normalize(sti.io.visium(other, image=other / "image.tif")).save(path / "stain.json")
