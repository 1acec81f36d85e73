"""Predict a distribution per gene and tile of a section."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import anndata as ad
import dask.array as da
import numpy as np
import zarr
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import keep_compiled
from stimage_sd._files import resuming, write_whole
from stimage_sd._progress import tqdm
from stimage_sd._zarr_chunks import WholeStore
from stimage_sd.likelihood import depth
from stimage_sd.likelihood.intervals import mixture_interval
from stimage_sd.likelihood.predictive import mixture_moments, nearest_interval, predictive
from stimage_sd.models._cell_classifier import CellClassifier
from stimage_sd.models._gene_classifier import GeneClassifier
from stimage_sd.models._predictor import OpenedSection, Predictor, gene_shifts
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._cells.predict_cells import predict_cells
from stimage_sd.tl._fit.held_out_level import COVERAGE
from stimage_sd.tl._fit.seen import remembered, shift_sd, warn_of_other_patients
from stimage_sd.tl._predict.predict_classes import predict_classes
from stimage_sd.tl._predict.targets import open_target

LAYERS = ("aleatoric", "epistemic", "total_variance", "lower", "upper")
#: page that says what to do about tiles unlike the training tiles
UNLIKE_HELP = "https://stimage-sd.readthedocs.io/en/latest/troubleshooting.html#unlike-tiles"
#: layer of models fitted with exposure
SHIFT = "shift"
#: elements computed at a time (members x tiles x genes), and elements of a chunk on disk (tiles x genes)
_BLOCK, _CHUNK = 8_000_000, 1_000_000
#: number of rows at each end that tell models apart
_ENDS = 4


def predict(
    data: SpatialData | contract.Cohort,
    model: Predictor | GeneClassifier | CellClassifier | str | Path,
    *,
    on: contract.On = "tiles",
    size_factors: Literal["total"] | None = None,
    exposure: float | None = None,
    conformal: bool = True,
    out: str | Path | None = None,
    key_added: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
) -> None:
    """Predict genes on all kept tiles, nuclei or squares, or nuclei with their cell types, with uncertainty.

    Parameters
    ----------
    data
        A section or a cohort of sections, tiled and embedded as the model expects. Counts are not needed. For a cell
        classifier, sections need tissue or tiles, but no embeddings.
    model
        A fitted model, or the path of a saved model.
    on
        ``"tiles"``, or for a model of nuclei or squares (``fit_nb(on=)``) ``"nuclei"`` or ``"grid"``.
    size_factors
        For a model fitted with size factors. ``"total"`` predicts for the measured depth of each spot, `None` for a
        tile of median depth. Depth multiplies the mean and keeps r. Measured counts can be compared only with
        distributions predicted at measured depth.
    exposure
        Depth of the sections relative to the training sections, for a model fitted with exposure. Default: 1, the
        median depth. Exposure multiplies the mean and keeps r. `stimage_sd.tl.evaluate` moves predictions to the depth
        that a section was measured at.
    conformal
        Whether to use the interval level that covered 90 % of the training cohort's held-out counts. Otherwise
        intervals are nominal.
    out
        Folder for gene predictions larger than memory. ``X`` and the layers are then dask arrays over zarr arrays in
        this folder, written one block of tiles at a time, with one subfolder per section. The subfolders must not
        exist before. They appear once all sections are predicted, and must not be moved afterwards. An interrupted run
        that is started again computes no block twice.
    key_added
        Name of the table to write. Default: ``"predictions"``, ``"nuclei_predictions"``, ``"grid_predictions"`` or
        ``"gene_classes"``. For cells, the name of the shapes, by default ``"nuclei"``.
    table_key
        Name of the count table, for `size_factors`.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    Nothing. ``tables["predictions"]`` is written, with ``X`` = mean and these layers: ``aleatoric`` (mean of the
    members' variances), ``epistemic`` (variance of the members' means), ``total_variance`` (their sum), ``lower`` and
    ``upper`` (central 90 % interval of the members' mixture). All are ``float32 (n_tiles, n_genes)``.

    A model fitted with exposure also predicts how far genes shift between sections, or between patients if the section
    is of another patient than the training sections. The layer ``shift`` is the variance that comes from this, a part
    of ``epistemic``. ``var["shift_sd"]`` is the standard deviation of the log of the shift. Intervals are the intervals
    of whole counts whose probability is nearest to 90 %.

    With ``on="nuclei"`` or ``"grid"``, the table annotates the nuclei or squares that lie near a tile. Those with
    ``obs["in_tile"]`` add up to the mean of their tile ``obs["tile"]``: for nuclei, together with the background that
    no nucleus covers, which is the layer ``background`` of the tiles' predictions.

    ``var["floor_mean"]`` and ``var["floor_dispersion"]`` are the fit of only the mean of each gene to the training
    counts, which ``nll_floor`` of `stimage_sd.tl.evaluate` scores. ``obs["size_factor"]`` is the depth of a tile.

    ``obs["ood_score"]`` is above 1 for tiles farther from the training tiles than 95 % of the training tiles. With a
    certified model (`stimage_sd.tl.certify`), ``var["predictable"]`` marks the genes that it predicted in new sections.

    A gene classifier writes ``tables["gene_classes"]`` with ``X`` = probability of High, layer ``high`` = above one
    half, and the same ``obs``. A cell classifier writes ``shapes["nuclei"]`` and ``tables["cell_types"]``, as
    `stimage_sd.tl.predict_cells` does with more options.

    Raises
    ------
    FileExistsError
        If `out` already has predictions of a section.
    KeyError
        If a section was not tiled or embedded.
    ValueError
        If tiles, embeddings or staining differ from the training data. The error names the step to run again. Also if
        the model does not predict `on`.

    Warns
    -----
    UserWarning
        If the model was trained on one patient and a section is known to be of another. If most tiles of a section are
        unlike the training tiles. Or if a model of nuclei predicts tiles most of which hold no nucleus.

    Notes
    -----
    Paper, section 2.4, Eq. 7, read with variances on both sides.

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
    source = contract.Source(table_key, layer)
    fitted = cast(Predictor | GeneClassifier | CellClassifier, as_model(model))
    if isinstance(fitted, CellClassifier | GeneClassifier) and (size_factors, exposure) != (None, None):
        option = "exposure" if size_factors is None else "size_factors"
        raise ValueError(f"A classifier predicts no counts, so `{option}` has no meaning for it.")
    if isinstance(fitted, CellClassifier | GeneClassifier) and on != "tiles":
        raise ValueError(f"`on={on!r}` is for models of `stimage_sd.tl.fit_nb(..., on={on!r})`.")
    if isinstance(fitted, CellClassifier):
        if out is not None:
            raise ValueError("`out` is for gene predictions. Cells are written to the section only.")
        return predict_cells(data, fitted, key_added=key_added or contract.NUCLEI)
    if isinstance(fitted, GeneClassifier):
        if out is not None:
            raise ValueError("`out` is for predicted distributions. Classes are written to the section only.")
        return predict_classes(contract.sections(data), fitted, key=key_added or contract.GENE_CLASSES)
    check_depth(fitted, size_factors, exposure)
    keep_compiled()
    cohort = contract.sections(data)
    # check all sections before writing any
    key = key_added or contract.predictions_key(on)
    check_key = contract.check_prediction_key if on == "tiles" else contract.check_instance_key
    for sdata in cohort.values():
        check_key(sdata, key)
    targets = {name: open_target(fitted, sdata, on=on, section=name) for name, sdata in cohort.items()}
    folders = {name: _new_folder(out, name) for name in cohort}
    warn_of_other_patients(fitted, cohort)
    level = fitted.interval_level if conformal else COVERAGE
    certificate = getattr(fitted, "certificate", None)
    factors, predicted = {}, {}
    shifts = {name: shift_sd(fitted, sdata) for name, sdata in cohort.items()}
    with ExitStack() as unfinished:  # folders appear once all sections are predicted
        for name, sdata in cohort.items():
            target = targets[name]
            spots = size_factors_of(sdata, target.table, fitted, size_factors, source)
            factors[name] = spots if exposure is None else np.full_like(spots, exposure)
            folder, sd = folders[name], shifts[name]
            written = LAYERS if sd is None else (*LAYERS, SHIFT)
            shape, made = (target.table.n_obs, len(fitted.genes)), None
            if folder is not None:
                key_of_run = _fingerprint(fitted, target.opened, shape, written, factors[name], sd, level)
                made = unfinished.enter_context(resuming(folder, key_of_run))
            predicted[name], done = _results(shape, written, made)
            blocks = _blocks(fitted, target.opened, shape[0], done, label=contract.sample(sdata), unit=target.unit)
            if sd is None:
                _mixtures(predicted[name], fitted, blocks, factors[name], level=level)
            else:
                _shifted(predicted[name], fitted, blocks, sd, exposure=exposure or 1.0, level=level)
    for name, sdata in cohort.items():
        folder, target, sd = folders[name], targets[name], shifts[name]
        layers = predicted[name] if folder is None else _lazily(folder, list(predicted[name]))
        predictions = target.results(sdata, layers, fitted.genes)
        if sd is not None:
            predictions.var["shift_sd"] = sd
        if certificate is not None:
            predictions.var["predictable"] = predictions.var_names.isin(certificate.predictable)
        if target.background is not None:
            predictions.layers["background"] = np.float32(exposure or 1.0) * target.background
        predictions.obs["size_factor"] = factors[name]
        predictions.uns["prediction"] = {
            **fitted.description,
            **({} if fitted.total is None else {"total": fitted.total, "at_measured_depth": size_factors == "total"}),
            **({} if sd is None else {"exposure": exposure or 1.0, "n_counted": fitted.training.get("n_counted", 0)}),
            "coverage": fitted.training.get("calibration", {}).get("coverage", COVERAGE) if conformal else COVERAGE,
            "interval_level": level,
            "trained_on": list(fitted.training.get("sections", [])),
            # stored as JSON text, since section names may hold characters that store keys may not
            "trained_on_content": json.dumps(remembered(fitted)),
        }
        text, most = familiarity(predictions, on)
        if most:
            warnings.warn(f"Section {name!r}: {text}", stacklevel=2)
        write = contract.write_predictions if on == "tiles" else contract.write_instance_predictions
        write(sdata, predictions, key=key)
        contract.record(
            sdata, "tl.predict", on=on, n_genes=len(fitted.genes), n_members=len(fitted.member_weights),
            conformal=conformal,
        )  # fmt: skip


def familiarity(table: ad.AnnData, on: contract.On = "tiles") -> tuple[str, bool]:
    """Say how many rows of a table of predictions are unlike the training data, and whether these are most of them."""
    scores, what = table.obs["ood_score"].to_numpy(), "squares" if on == "grid" else on
    outside = int((scores > 1).sum())
    text = f"{outside:,} of {len(scores):,} {what} are unlike those of the training sections (`ood_score` above 1)."
    if outside <= len(scores) / 2:
        return text, False
    return (
        f"{text} Their scores are {scores.min():.1f} to {scores.max():.1f}. The model was not tested on such tissue, "
        f"staining or scanners. Its predictions cannot be relied on there. What to do: {UNLIKE_HELP}",
        True,
    )


def size_factors_of(
    sdata: SpatialData, kept: ad.AnnData, model: Predictor, size_factors: str | None, source: contract.Source
) -> np.ndarray:
    """Return the size factor per kept tile, one without depth."""
    factors = np.ones(kept.n_obs, dtype=np.float32)
    if size_factors == "total" and model.total is not None:
        rows, counts = contract.align_to_spots(sdata, kept, source)
        factors[rows] = depth.size_factors(np.asarray(counts.X.sum(axis=1)).ravel(), model.total)
    return factors


def _new_folder(out: str | Path | None, section: str) -> Path | None:
    """Return the folder for the results of a section, which must not exist yet."""
    if out is None:
        return None
    folder = Path(out).expanduser() / quote(section, safe="")
    if folder.exists():
        raise FileExistsError(f"{folder} has predictions already. Choose another `out=`, or delete the folder.")
    return folder


def check_depth(model: Predictor, size_factors: str | None, exposure: float | None) -> None:
    """Raise `ValueError` if a model was fitted without the depth that is asked for."""
    by_section = gene_shifts(model) is not None
    if size_factors is not None and (model.total is None or by_section):
        raise ValueError('The model was fitted without size factors, so `size_factors="total"` has no meaning for it.')
    if exposure is not None and not by_section:
        raise ValueError("The model was fitted without exposure, so `exposure` has no meaning for it.")
    if exposure is not None and not (np.isfinite(exposure) and exposure > 0):
        raise ValueError(f"Expected `exposure` to be a positive number, found {exposure}.")


def _fingerprint(
    model: Predictor, opened: OpenedSection, shape: tuple[int, int], layers: Sequence[str], factors: np.ndarray,
    sd: np.ndarray | None, level: float,
) -> str:  # fmt: skip
    """Return a hash of what predictions on disk depend on. The first and the last rows stand for the model."""
    digest = hashlib.sha256(json.dumps([shape, list(layers), list(model.genes), float(level)]).encode())
    ends = (opened.r_and_p(rows) for rows in (slice(0, _ENDS), slice(max(shape[0] - _ENDS, 0), shape[0])))
    for array in (*(part for end in ends for part in end), opened.strangeness, factors, *([] if sd is None else [sd])):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Done:
    """Blocks of rows that are already on disk.

    - `path`: file with their first rows. `None` for results in memory.
    - `starts`: first rows of the blocks.
    """

    path: Path | None
    starts: list[int]

    def add(self, start: int) -> None:
        """Note that a block is on disk."""
        self.starts.append(start)
        if self.path is not None:
            write_whole(self.path, json.dumps(self.starts).encode())


def _results(shape: tuple[int, int], layers: Sequence[str], folder: Path | None) -> tuple[dict[str, Any], _Done]:
    """Allocate the result arrays in memory or on disk, or open those of an interrupted run."""
    names = ("mean", *layers)
    if folder is None:
        return {name: np.empty(shape, dtype=np.float32) for name in names}, _Done(None, [])
    done = folder.with_name("done.json")
    try:
        starts = [int(start) for start in json.loads(done.read_bytes())]
        group = zarr.open_group(folder, mode="r+")
        return {name: group[name] for name in names}, _Done(done, starts)
    except (OSError, ValueError, TypeError, KeyError):  # nothing there, or damaged
        done.unlink(missing_ok=True)
    group = zarr.open_group(folder, mode="w")
    chunks = (max(1, min(shape[0], _CHUNK // shape[1])), shape[1])
    return {
        name: group.create_array(
            name, shape=shape, chunks=chunks, dtype=np.float32, config={"write_empty_chunks": True}
        )
        for name in names
    }, _Done(done, [])


def _lazily(folder: Path, names: Sequence[str]) -> dict[str, da.Array]:
    """Open results on disk as dask arrays. Reading a missing chunk raises an error."""
    group = zarr.open_group(WholeStore(folder, read_only=True), mode="r")
    return {name: da.from_zarr(group[name]) for name in names}


def _blocks(
    model: Predictor, section: OpenedSection, n_rows: int, done: _Done, *, label: str, unit: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield blocks of rows that are not done yet with the r and p of their mixtures."""
    # round down to a power of two, since blocks of tiles are padded to one
    step = 1 << max((_BLOCK // (len(model.member_weights) * len(model.genes))).bit_length() - 1, 0)
    with tqdm(total=n_rows, desc=f"{label}: predicting", unit=unit) as bar:
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            if start not in done.starts:
                yield rows, *section.r_and_p(rows)
                done.add(start)  # the caller has written the block when it asks for the next
            bar.update(rows.stop - start)


def _mixtures(
    out: dict[str, Any], model: Predictor, blocks: Iterable[tuple[slice, np.ndarray, np.ndarray]],
    factors: np.ndarray, *, level: float,
) -> None:  # fmt: skip
    """Write mean, variances and interval of the members' mixture to `out`."""
    weights, scaled = np.asarray(model.member_weights), bool((factors != 1).any())
    for rows, r, p in blocks:
        p = depth.at_depth(p, factors[rows]) if scaled else p
        moments = mixture_moments(r, p, weights=weights)
        out["mean"][rows], out["aleatoric"][rows], out["epistemic"][rows] = moments
        out["total_variance"][rows] = moments.aleatoric + moments.epistemic
        out["lower"][rows], out["upper"][rows] = mixture_interval(r, p, coverage=level, weights=weights)


def _shifted(
    out: dict[str, Any], model: Predictor, blocks: Iterable[tuple[slice, np.ndarray, np.ndarray]], sd: np.ndarray,
    *, exposure: float, level: float,
) -> None:  # fmt: skip
    """Write mean, variances and interval of the mixture with a shift per gene to `out`."""
    weights = np.asarray(model.member_weights)
    for rows, r, p in blocks:
        made = predictive(mixture_moments(r, p, weights=weights), sd, exposure=exposure)
        out["mean"][rows], out["aleatoric"][rows], out["epistemic"][rows] = made.mean, made.aleatoric, made.epistemic
        out["total_variance"][rows], out["shift"][rows] = made.variance, made.shift
        out["lower"][rows], out["upper"][rows] = nearest_interval(made.mean, made.variance, sd, coverage=level)
