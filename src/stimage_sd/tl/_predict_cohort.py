"""A model on a cohort of whole slides, one after the other: from files to one row a slide."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stimage_sd import __version__, contract, io
from stimage_sd._steps import prepare_for_model
from stimage_sd._store import staged
from stimage_sd.pp._slide_qc import judged, slide_qc
from stimage_sd.tl._predict import predict
from stimage_sd.tl._pseudobulk import about_tiles, stacked, summary_of

Slides = pd.DataFrame | Sequence[str | Path]


def predict_cohort(
    slides: Slides,
    model: Any,
    *,
    out: str | Path,
    quality: bool = True,
    max_blurry: float = 0.9,
    max_regions_percentile: float = 97.5,
    min_pixels_percentile: float = 5.0,
    min_cohort: int = 20,
    stores: bool = False,
    weights: str | Path | None = None,
) -> ad.AnnData:
    """Predict a cohort of whole slides, and sum each of them up.

    Slide by slide: quality, tissue, a grid of tiles of the model's size, stain normalisation to the model's reference,
    embeddings, predictions. A slide that fails is noted with its reason, and the others go on. What is complete is kept
    in `out`: the same call, after an interruption or with more slides, computes nothing twice; within a slide it goes
    on with the tiles that are missing. Slides that failed are tried again.

    Parameters
    ----------
    slides
        Paths of slides, or a table with ``path`` and, where wanted, ``slide`` (a unique name; that of the file by
        default), ``patient``, ``mpp`` (micrometres a pixel, for files that do not state it) and columns of your own.
    model
        A fitted model of counts.
    out
        Folder; made where it is not there.
    quality
        Leave slides out by `stimage_sd.pp.slide_qc`; else all are predicted.
    max_blurry, max_regions_percentile, min_pixels_percentile, min_cohort
        As in `stimage_sd.pp.slide_qc`; the percentiles are over all slides that can be read.
    stores
        Write a zarr store a slide, ``out/stores/<slide>.zarr``, with tiles, predictions and tissue, but without the
        image, which is in its own file.
    weights
        The extractor's weights file, where they are not found by themselves.

    Returns
    -------
    Slides x genes, as `stimage_sd.tl.pseudobulk`: the slides that were predicted, with the columns of `slides` and
    ``mpp``, ``n_tiles``, ``ood_score``, ``seconds`` in ``obs``. ``uns["slides"]``: a row for every slide that was asked
    for: ``path``, ``status`` (``"predicted"``, ``"dropped"`` by quality, or ``"failed"``), ``reason``, and what was
    measured of its quality; ``uns["prediction"]``: the model and the version. Written as ``out/cohort.h5ad`` and
    ``out/slides.csv`` too.

    Raises
    ------
    ValueError
        If there are no slides, or names are not unique, or no slide could be predicted.
    KeyError
        If the table has no column ``path``.

    Warns
    -----
    UserWarning
        If the model standardises each section by its own tiles, which takes out what differs between slides.

    Notes
    -----
    Paper, section 2.10. With an active `dask.distributed` client the tiles of a slide are spread over its workers.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> cohort = sti.tl.predict_cohort(["a.svs", "b.svs"], model, out="tcga")  # doctest: +SKIP
    >>> cohort.uns["slides"][["status", "reason"]]  # doctest: +SKIP
    """
    table = _table(slides)
    _warn_of_standardisation(model)
    folder = Path(out)
    for name in ("quality", "predicted", *(["stores"] if stores else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    run = _Run(folder, model, _model_hash(model), stores, None if weights is None else Path(weights))
    report = table[["path"]].assign(status="", reason="")
    if quality:
        measured = _each(table, "quality", run.measure, report)
        limits = (max_blurry, max_regions_percentile, min_pixels_percentile, min_cohort)
        found = judged(pd.DataFrame.from_dict(measured, orient="index"), *limits) if measured else pd.DataFrame()
        report = report.join(found.drop(columns=["keep", "reason"], errors="ignore"))
        for name in found.index[~found["keep"]] if len(found) else ():
            report.loc[name, ["status", "reason"]] = "dropped", f"quality: {found.loc[name, 'reason']}"
    results = _each(table[report["status"] == ""], "predicting", run.predict, report)
    report.loc[list(results), "status"] = "predicted"
    report.to_csv(folder / "slides.csv", index_label="slide")
    if not results:
        raise ValueError(
            f"None of the {len(table)} slides could be predicted, for instance {report.index[0]!r}: "
            f"{report['reason'].iloc[0]}. All reasons are in {folder / 'slides.csv'}."
        )
    return _gathered(table, results, report, model, folder)


@dataclass(frozen=True)
class _Run:
    """What is done with each slide, and where what is complete is kept."""

    folder: Path
    model: Any
    model_hash: str
    stores: bool
    weights: Path | None

    def measure(self, name: str, row: pd.Series) -> dict[str, Any]:
        """Quality of a slide, from disk where it was measured before."""
        path = self.folder / "quality" / f"{name}.json"
        key = _file_key(row)
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
            return dict(kept["row"])
        values = slide_qc(_open(name, row)).iloc[0].drop(["keep", "reason"])
        plain = {str(name): value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        _write(path, json.dumps({"key": key, "row": plain}).encode())
        return plain

    def predict(self, name: str, row: pd.Series) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Summary of a slide and what is known of it, from disk where it was predicted before."""
        path = self.folder / "predicted" / f"{name}.npz"
        store = self.folder / "stores" / f"{name}.zarr"
        key = f"{_file_key(row)}-{self.model_hash}"
        if path.exists() and (store.exists() or not self.stores):
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["key"]) == key:
                    frame = pd.DataFrame(kept["values"], index=kept["genes"], columns=kept["columns"])
                    return frame, json.loads(str(kept["about"]))
        began = time.perf_counter()
        sdata = _open(name, row)
        prepare_for_model(sdata, self.model, weights=self.weights, say=lambda _: None)
        predict(sdata, self.model)
        table = contract.predictions(sdata)
        frame, about = summary_of(table), {"mpp": contract.info(sdata)["mpp"], **about_tiles(table)}
        if self.stores:
            with staged(store, overwrite=True) as target:
                _without_images(sdata).write(target)
        about["seconds"] = round(time.perf_counter() - began, 2)
        with staged(path, overwrite=True) as target:
            np.savez(target, key=key, values=frame.to_numpy(), genes=frame.index.to_numpy(dtype=str),
                     columns=frame.columns.to_numpy(dtype=str), about=json.dumps(about))  # fmt: skip
        return frame, about


def _warn_of_standardisation(model: Any) -> None:
    if getattr(getattr(model, "features", None), "standardize", None) == "section":
        warnings.warn(
            "The model standardises each section by its own tiles: that takes out what staining adds to a slide, and "
            "with it most of what differs between slides. To compare slides with each other, or with bulk, fit it with "
            '`standardize="cohort"` on sections of several patients.',
            UserWarning,
            stacklevel=3,
        )


def _table(slides: Slides) -> pd.DataFrame:
    """Slides by name, with at least the columns that are read."""
    given = slides if isinstance(slides, pd.DataFrame) else pd.DataFrame({"path": [*map(str, slides)]})
    frame = given.copy()
    if "path" not in frame:
        raise KeyError(f"Expected a column 'path' in the table of slides, found {sorted(map(str, frame.columns))}.")
    if frame.empty:
        raise ValueError("Expected at least one slide, found none.")
    frame["path"] = frame["path"].astype(str)
    if "slide" not in frame:
        frame["slide"] = [Path(path).name.split(".")[0] for path in frame["path"]]
    names = frame["slide"].astype(str)
    twice = names[names.duplicated()].tolist()
    unfit = [name for name in names if not name or set(name) & set('/\\:*?"<>|') or name in (".", "..")]
    if twice or unfit:
        raise ValueError(
            f"Expected a unique name a slide that a file can have, found {(twice or unfit)[:3]}. Name them in a column "
            "'slide'."
        )
    return frame.assign(mpp=frame.get("mpp", np.nan)).set_index(names.rename(None))


def _each(
    table: pd.DataFrame, what: str, work: Callable[[str, pd.Series], Any], report: pd.DataFrame
) -> dict[str, Any]:
    """Do something with every slide; note those that fail in the report, and give the results of the others."""
    results = {}
    for name, row in tqdm(table.iterrows(), total=len(table), desc=what, unit="slide"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                results[str(name)] = work(str(name), row)
        # whatever is wrong with one slide of a thousand, the others are to be done
        except Exception as error:  # noqa: BLE001
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            report.loc[name, ["status", "reason"]] = "failed", f"{type(error).__name__}: {' '.join(text.split())[:500]}"
    return results


def _open(name: str, row: pd.Series) -> SpatialData:
    return io.slide(row["path"], mpp=None if pd.isna(row["mpp"]) else float(row["mpp"]), sample=name)


def _without_images(sdata: SpatialData) -> SpatialData:
    return SpatialData(
        labels=dict(sdata.labels), shapes=dict(sdata.shapes), tables=dict(sdata.tables), attrs=dict(sdata.attrs)
    )


def _file_key(row: pd.Series) -> str:
    """Hash that a file which was changed, or is read by another resolution, is told by."""
    stat = os.stat(row["path"])
    about = [str(Path(row["path"]).resolve()), stat.st_size, stat.st_mtime_ns, str(row["mpp"]), __version__]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def _model_hash(model: Any) -> str:
    config, arrays = model.parts()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:24]


def _write(path: Path, content: bytes) -> None:
    with staged(path, overwrite=True) as target:
        target.write_bytes(content)


def _gathered(
    table: pd.DataFrame, results: dict[str, Any], report: pd.DataFrame, model: Any, folder: Path
) -> ad.AnnData:
    rows, about = ({name: result[number] for name, result in results.items()} for number in (0, 1))
    cohort = stacked(rows, about)
    own = table.loc[list(results)].drop(columns=["mpp", "slide"])
    cohort.obs = own.join(cohort.obs)
    cohort.uns["slides"] = report.assign(path=report["path"].astype(str))
    cohort.uns["prediction"] = {
        **model.description,
        "version": __version__,
        "trained_on": list(model.training.get("sections", [])),
    }
    with staged(folder / "cohort.h5ad", overwrite=True) as target:
        cohort.write_h5ad(target)
    return cohort
