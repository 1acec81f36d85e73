"""Predict a cohort of whole slides, from image files to one row per slide."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import __version__, contract, io
from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd._store import staged
from stimage_sd.models._predictor import Predictor
from stimage_sd.models._resolve import as_model
from stimage_sd.pp._prepare import prepare_for_model
from stimage_sd.pp._slide_qc import judged, slide_qc
from stimage_sd.tl._cohort.failures import reason
from stimage_sd.tl._cohort.pseudobulk import about_tiles, stacked, summary_of
from stimage_sd.tl._cohort.tries import Tries
from stimage_sd.tl._predict.predict import predict

#: failed slides whose reasons are in the warning
_N_SAID = 5
Slides = pd.DataFrame | Sequence[str | Path]


def predict_cohort(
    slides: Slides,
    model: Predictor | str | Path,
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
    """Predict a cohort of whole slides and summarize each slide in one row.

    Steps per slide: quality check, tissue mask, tiles of the model's size, stain normalization to the model's
    reference, embeddings, predictions. If a slide fails, its reason is recorded and the other slides continue.

    Complete slides are kept in `out`. A second call, after an interruption or with more slides, computes only missing
    slides and tiles, and retries failed slides. A slide that ends the process (crashing decoder, lack of memory) runs
    last in the next call. After the second time it is recorded as failed.

    Parameters
    ----------
    slides
        Paths of slides, or a table with column ``path``. Optional columns: ``slide`` (unique name, default the file's
        name), ``patient``, ``mpp`` (µm per pixel, for files without a resolution) and further columns.
    model
        A fitted count model, or the path of one.
    out
        Output folder. It is created if missing.
    quality
        Drop slides that fail `stimage_sd.pp.slide_qc`. If `False`, all slides are predicted.
    max_blurry, max_regions_percentile, min_pixels_percentile, min_cohort
        As in `stimage_sd.pp.slide_qc`. Percentiles are over all readable slides.
    stores
        Write one zarr store per slide, ``out/stores/<slide>.zarr``, with tiles, predictions and tissue but without the
        image.
    weights
        Weights file of the extractor, if the weights are not found automatically.

    Returns
    -------
    Slides x genes, as from `stimage_sd.tl.pseudobulk`, for the predicted slides. ``obs`` has the columns of `slides`
    and ``mpp``, ``n_tiles``, ``ood_score`` and ``seconds``. ``uns["slides"]`` has one row per input slide: ``path``,
    ``status`` (``"predicted"``, ``"dropped"`` by quality, or ``"failed"``), ``reason``, and the quality measurements.
    ``uns["prediction"]`` holds the model and the version. The same data are written to ``out/cohort.h5ad`` and
    ``out/slides.csv``.

    Raises
    ------
    ValueError
        If there are no slides, names are not unique, or no slide could be predicted.
    KeyError
        If the table has no column ``path``.

    Warns
    -----
    RuntimeWarning
        If the kept result of a slide is damaged. The slide is then computed again.
    UserWarning
        If the model standardizes each section by its own tiles, which removes differences between slides. Also if
        slides failed, with the reasons.

    Notes
    -----
    Paper, section 2.10. With an active `dask.distributed` client, its workers share the tiles of a slide.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> cohort = sti.tl.predict_cohort(["a.svs", "b.svs"], model, out="tcga")  # doctest: +SKIP
    >>> cohort.uns["slides"][["status", "reason"]]  # doctest: +SKIP
    """
    table = _table(slides)
    model = as_model(model)
    _warn_of_standardization(model)
    folder = Path(out)
    for name in ("quality", "predicted", *(["stores"] if stores else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tries = Tries(folder / "trying")
    run = _Run(folder, model, _model_hash(model), stores, None if weights is None else Path(weights))
    report = table[["path"]].assign(status="", reason="")
    logger.info("Predicting %d genes on %d slides. Complete slides are kept in %s.", len(model.genes), len(table), out)
    if quality:
        measured = _each(table, "quality", run.measure, report, tries)
        limits = (max_blurry, max_regions_percentile, min_pixels_percentile, min_cohort)
        verdicts = judged(pd.DataFrame.from_dict(measured, orient="index"), *limits) if measured else pd.DataFrame()
        report = report.join(verdicts.drop(columns=["keep", "reason"], errors="ignore"))
        for name in verdicts.index[~verdicts["keep"]] if len(verdicts) else ():
            report.loc[name, ["status", "reason"]] = "dropped", f"quality: {verdicts.loc[name, 'reason']}"
    results = _each(table[report["status"] == ""], "predicting", run.predict, report, tries)
    report.loc[list(results), "status"] = "predicted"
    with staged(folder / "slides.csv", overwrite=True) as target:
        report.to_csv(target, index_label="slide")
    if not results:
        raise ValueError(
            f"None of the {len(table)} slides could be predicted, for instance {report.index[0]!r}: "
            f"{report['reason'].iloc[0]}. All reasons are in {folder / 'slides.csv'}."
        )
    failed = report[report["status"] == "failed"]
    if len(failed):
        some = "; ".join(f"{name!r}: {why}" for name, why in failed["reason"].head(_N_SAID).items())
        warnings.warn(
            f"{len(failed)} of {len(table)} slides failed: {failed.index.tolist()}. {some}. All reasons are in "
            f"`uns['slides']` and {folder / 'slides.csv'}.",
            UserWarning,
            stacklevel=2,
        )
    return _gathered(table, results, report, model, folder)


@dataclass(frozen=True)
class _Run:
    """Steps per slide, with results kept in a folder."""

    folder: Path
    model: Any
    model_hash: str
    stores: bool
    weights: Path | None

    def measure(self, name: str, row: pd.Series) -> dict[str, Any]:
        """Measure the quality of a slide, or read an earlier measurement from disk."""
        path = self.folder / "quality" / f"{name}.json"
        key = _file_key(row)
        with _made_again_if_damaged(path):
            if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
                return dict(kept["row"])
        values = slide_qc(_open(name, row)).iloc[0].drop(["keep", "reason"])
        plain = {str(name): value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        _write(path, json.dumps({"key": key, "row": plain}).encode())
        return plain

    def predict(self, name: str, row: pd.Series) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Predict a slide and return its summary and facts, or read earlier ones from disk."""
        path = self.folder / "predicted" / f"{name}.npz"
        store = self.folder / "stores" / f"{name}.zarr"
        key = f"{_file_key(row)}-{self.model_hash}"
        with _made_again_if_damaged(path):
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
        frame, about = summary_of(table), {"mpp": contract.mpp(sdata), **about_tiles(table)}
        if self.stores:
            with staged(store, overwrite=True) as target:
                _without_images(sdata).write(target)
        about["seconds"] = round(time.perf_counter() - began, 2)
        with staged(path, overwrite=True) as target:
            np.savez(target, key=key, values=frame.to_numpy(), genes=frame.index.to_numpy(dtype=str),
                     columns=frame.columns.to_numpy(dtype=str), about=json.dumps(about))  # fmt: skip
        return frame, about


@contextmanager
def _made_again_if_damaged(path: Path) -> Iterator[None]:
    """Warn if the kept result of a slide cannot be read, and continue without this result."""
    try:
        yield
    except PermissionError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        # not a UserWarning, because these are silenced per slide
        warnings.warn(f"{path} is damaged ({error}). The slide is computed again.", RuntimeWarning, stacklevel=3)


def _warn_of_standardization(model: Any) -> None:
    if getattr(getattr(model, "features", None), "standardize", None) == "section":
        warnings.warn(
            "The model standardizes each section by its own tiles. This removes staining differences between slides, "
            "but also most other differences. To compare slides with each other or with bulk, fit the model with "
            '`standardize="cohort"` on sections of several patients.',
            UserWarning,
            stacklevel=3,
        )


def _table(slides: Slides) -> pd.DataFrame:
    """Return the table of slides, indexed by unique name, with columns ``path``, ``slide`` and ``mpp``."""
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
            f"Expected a unique name per slide that is valid as a file name, found {(twice or unfit)[:3]}. Name the "
            "slides in a column 'slide'."
        )
    return frame.assign(mpp=frame.get("mpp", np.nan)).set_index(names.rename(None))


def _each(
    table: pd.DataFrame, what: str, work: Callable[[str, pd.Series], Any], report: pd.DataFrame, tries: Tries
) -> dict[str, Any]:
    """Run a step on every slide, record failures in the report, and return the other results."""
    results, rows = {}, {str(name): row for name, row in table.iterrows()}
    for name in tqdm(sorted(rows, key=tries.ended), desc=what, unit="slide"):
        if (why_not := tries.why_not(name)) is not None:
            report.loc[name, ["status", "reason"]] = "failed", why_not
            continue
        try:
            with warnings.catch_warnings(), tries.trying(name):
                warnings.simplefilter("ignore", UserWarning)
                results[name] = work(name, rows[name])
        # any failure of one slide must not stop the others
        except Exception as error:  # noqa: BLE001
            report.loc[name, ["status", "reason"]] = "failed", reason(error)
    return {name: results[name] for name in rows if name in results}


def _open(name: str, row: pd.Series) -> SpatialData:
    return io.slide(row["path"], mpp=None if pd.isna(row["mpp"]) else float(row["mpp"]), sample=name)


def _without_images(sdata: SpatialData) -> SpatialData:
    return SpatialData(
        labels=dict(sdata.labels), shapes=dict(sdata.shapes), tables=dict(sdata.tables), attrs=dict(sdata.attrs)
    )


def _file_key(row: pd.Series) -> str:
    """Return a hash that changes with the file, the resolution and the package version."""
    stat = os.stat(row["path"])
    about = [str(Path(row["path"]).resolve()), stat.st_size, stat.st_mtime_ns, str(row["mpp"]), __version__]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def _model_hash(model: Any) -> str:
    config, arrays = model.to_parts()
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
    rows, about = ({name: result[index] for name, result in results.items()} for index in (0, 1))
    cohort = stacked(rows, about)
    given = table.loc[list(results)].drop(columns=["mpp", "slide"])
    cohort.obs = given.join(cohort.obs)
    cohort.uns["slides"] = report.assign(path=report["path"].astype(str))
    cohort.uns["prediction"] = {
        **model.description,
        "version": __version__,
        "trained_on": list(model.training.get("sections", [])),
    }
    with staged(folder / "cohort.h5ad", overwrite=True) as target:
        cohort.write_h5ad(target)
    return cohort
