"""Predict a distribution for every gene and tile of a section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import zarr
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stimage_sd import contract
from stimage_sd._cache import keep_compiled
from stimage_sd._squidpy import spatial_uns
from stimage_sd.models._cell_classifier import CellClassifier
from stimage_sd.models._gene_classifier import GeneClassifier
from stimage_sd.models._predictor import OpenedSection, Predictor
from stimage_sd.nn.intervals import mixture_interval
from stimage_sd.nn.mixture_moments import mixture_moments
from stimage_sd.tl._fit_nb import COVERAGE
from stimage_sd.tl._predict_cells import predict_cells
from stimage_sd.tl._predict_classes import predict_classes

LAYERS = ("aleatoric", "epistemic", "total_variance", "lower", "upper")
#: elements (members x tiles x genes) that are computed at a time, and (tiles x genes) of a chunk on disk
_BLOCK, _CHUNK = 8_000_000, 1_000_000


def predict(
    data: SpatialData | contract.Cohort,
    model: Predictor | GeneClassifier | CellClassifier,
    *,
    size_factors: Literal["total"] | None = None,
    conformal: bool = True,
    out: str | Path | None = None,
    table_key: str | None = None,
) -> None:
    """Predict every gene on every kept tile, or every nucleus and its type, with the uncertainty.

    Parameters
    ----------
    data
        A section, or a cohort of them, tiled and embedded as the model expects. It needs no molecules. A classifier of
        cells needs tissue or tiles, and no embeddings.
    model
        A fitted model.
    size_factors
        For a model fitted with size factors: ``"total"`` predicts for each spot's measured depth, `None`
        for a tile of median depth.
    conformal
        Whether the intervals are those that covered 90 % of the training cohort's held-out counts, or
        nominal ones.
    out
        A folder for what is predicted of genes, where it is larger than memory: ``X`` and the layers are then dask
        arrays over zarr arrays in it, written a block of tiles at a time, a subfolder a section. It must not have one
        of these yet, and has to stay where it is.
    table_key
        Name of the table of counts, for `size_factors`.

    Returns
    -------
    Nothing; ``tables["predictions"]`` is written: ``X`` = mean; layers ``aleatoric`` (mean of the members'
    variances), ``epistemic`` (variance of the members' means), ``total_variance`` (their sum), ``lower``
    and ``upper`` (central 90 % interval of the members' mixture), all ``float32 (n_tiles, n_genes)``;
    ``obs["ood_score"]`` (above 1: farther from the training tiles than 95 % of those). By a classifier of genes it is
    ``tables["gene_classes"]``: ``X`` = probability of High, layer ``high`` = above one half, and the same ``obs``. By a
    classifier of cells it is ``shapes["nuclei"]`` and ``tables["cell_types"]``, as of `stimage_sd.tl.predict_cells`,
    which has more options.

    Raises
    ------
    FileExistsError
        If `out` has predictions of a section already.
    KeyError
        If the section was not tiled or embedded.
    ValueError
        If tiles, embeddings or staining are not those of the model; the error names the step to run again.

    Notes
    -----
    Paper, section 2.4, Eq. 7, with variances on both sides.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_predict", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> section.tables["predictions"].n_vars
    5
    """
    if isinstance(model, CellClassifier):
        if size_factors is not None:
            raise ValueError("A classifier of cells predicts no counts; `size_factors` has no meaning for it.")
        if out is not None:
            raise ValueError("`out` is for predictions of genes; cells are written to the section alone.")
        return predict_cells(data, model)
    if isinstance(model, GeneClassifier):
        if size_factors is not None:
            raise ValueError("A classifier of genes predicts no counts; `size_factors` has no meaning for it.")
        if out is not None:
            raise ValueError("`out` is for predicted distributions; classes are written to the section alone.")
        return predict_classes(contract.sections(data), model)
    if size_factors is not None and model.total is None:
        raise ValueError('The model was fitted without size factors; `size_factors="total"` has no meaning for it.')
    keep_compiled()
    cohort = contract.sections(data)
    # all are checked before any is written
    opened = {name: model.open(sdata, section=name) for name, sdata in cohort.items()}
    folders = {name: _new_folder(out, name) for name in cohort}
    for name, sdata in cohort.items():
        table = contract.tiles(sdata)
        kept = table[table.obs["keep"].to_numpy()]
        factors = _size_factors(sdata, kept, model, size_factors, table_key)
        level = model.interval_level if conformal else COVERAGE
        section = opened[name]
        shape = (kept.n_obs, len(model.genes))
        layers = _results(shape, folders[name])
        _distribution(layers, model, section, factors, level=level, label=contract.sample(sdata))
        if folders[name] is not None:
            layers = {key: da.from_zarr(array) for key, array in layers.items()}
        predictions = ad.AnnData(
            X=layers.pop("mean"),
            obs=kept.obs.drop(columns=contract.REGION_KEY).copy(),
            var=pd.DataFrame(
                {"floor_mean": model.floor[0], "floor_dispersion": model.floor[1]}, index=list(model.genes)
            ),
            layers=layers,
            obsm={"spatial": np.asarray(kept.obsm["spatial"]).copy()},
        )
        predictions.obs["ood_score"] = section.strangeness
        predictions.obs["size_factor"] = factors
        predictions.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=contract.tiling(sdata)["side_px"])
        predictions.uns["prediction"] = {
            **model.description,
            "coverage": model.training.get("calibration", {}).get("coverage", COVERAGE) if conformal else COVERAGE,
            "interval_level": level,
            "trained_on": list(model.training.get("sections", [])),
        }
        contract.write_predictions(sdata, predictions)
        contract.record(
            sdata, "tl.predict", n_genes=len(model.genes), n_members=len(model.member_weights), conformal=conformal
        )


def _size_factors(
    sdata: SpatialData, kept: ad.AnnData, model: Predictor, size_factors: str | None, table_key: str | None
) -> np.ndarray:
    factors = np.ones(kept.n_obs, dtype=np.float32)
    if size_factors == "total" and model.total is not None:
        rows, counts = contract.align_to_spots(sdata, kept, table_key)
        factors[rows] = np.maximum(np.asarray(counts.X.sum(axis=1)).ravel() / model.total, 1e-3)
    return factors


def _new_folder(out: str | Path | None, section: str) -> Path | None:
    """Where a section's results go; nothing is there yet."""
    if out is None:
        return None
    folder = Path(out).expanduser() / quote(section, safe="")
    if folder.exists():
        raise FileExistsError(f"{folder} has predictions already. Choose another `out=`, or delete it.")
    return folder


def _results(shape: tuple[int, int], folder: Path | None) -> dict[str, Any]:
    """Arrays to be filled: in memory, or on disk."""
    names = ("mean", *LAYERS)
    if folder is None:
        return {name: np.empty(shape, dtype=np.float32) for name in names}
    group = zarr.open_group(folder, mode="w")
    chunks = (max(1, min(shape[0], _CHUNK // shape[1])), shape[1])
    return {name: group.create_array(name, shape=shape, chunks=chunks, dtype=np.float32) for name in names}


def _distribution(
    out: dict[str, Any], model: Predictor, section: OpenedSection, factors: np.ndarray, *, level: float, label: str
) -> None:
    """Mean, variances and interval of the mixture, a block of tiles at a time, into `out`."""
    weights = np.asarray(model.member_weights)
    shape = (len(factors), len(model.genes))
    # the power of two below: blocks of tiles are filled up to one
    step = 1 << max((_BLOCK // (len(weights) * shape[1])).bit_length() - 1, 0)
    scaled = bool((factors != 1).any())
    with tqdm(total=shape[0], desc=f"{label}: predicting", unit="tile") as bar:
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            r, p = section.r_and_p(rows)
            r = r * factors[rows][None, :, None] if scaled else r
            moments = mixture_moments(r, p, weights=weights)
            out["mean"][rows], out["aleatoric"][rows], out["epistemic"][rows] = moments
            out["total_variance"][rows] = moments.aleatoric + moments.epistemic
            out["lower"][rows], out["upper"][rows] = mixture_interval(r, p, coverage=level, weights=weights)
            bar.update(rows.stop - start)
