"""Measure what a model can be trusted with, on sections that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.pit import N_BINS, cumulative
from stimage_sd.models._certificate import KEY, Certificate
from stimage_sd.models._predictor import Predictor, gene_shifts
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._fit.seen import check_unseen, trained_patients
from stimage_sd.tl._predict.predict import predict
from stimage_sd.tl._score.cross_validate import shallow_copy
from stimage_sd.tl._score.evaluate import dense, evaluate
from stimage_sd.tl._score.predictable_genes import predictable_genes

Model = TypeVar("Model", bound=Predictor)
_MEANS = ("pearson", "coverage", "nll", "nll_floor")


def certify(
    data: SpatialData | contract.Cohort,
    model: Model | str | Path,
    *,
    q: float = 0.05,
    reliable: float = 0.5,
    scales: Sequence[int] = (1, 2, 4),
    method: Literal["shift", "free"] = "shift",
    n_permutations: int = 1000,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> Model:
    """Measure what a model can be trusted with, and keep the result in the model.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts, tiled and embedded as the model expects. Sections used to train
        or validate the model are refused. They are recognized by their spots and counts.
    model
        A fitted model of any kind that predicts genes, or the path of a saved model.
    q
        Largest q-value of predictable genes.
    reliable
        Correlation from which a gene counts as reliable at a scale.
    scales
        Radii of neighborhoods, in steps between spots. A gene that is not reliable at single spots may be at one of
        these.
    method, n_permutations, seed
        Permutations of the q-values, as in `stimage_sd.tl.predictable_genes`.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A copy of the model with a `stimage_sd.models.Certificate` in ``model.certificate``, which is saved with the model.
    `stimage_sd.tl.predict` then writes ``var["predictable"]``. The sections are not changed. Models made from this
    one, such as by `stimage_sd.tl.adapt`, have no certificate.

    Raises
    ------
    KeyError
        If a section was not tiled or embedded, or has no counts or no tiles on spots.
    ValueError
        If the model saw a section, no gene was measured, spots are not on a lattice (with ``method="shift"``), or an
        option is out of range.

    Notes
    -----
    The scores are those of `stimage_sd.tl.evaluate`, the q-values those of `stimage_sd.tl.predictable_genes` (paper,
    section 2.7, which has no p-values). The probability integral transform of counts is that of Czado, Gneiting and
    Held 2009, Biometrics 65:1254.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sections = {}
    >>> for seed, name in enumerate(("train", "new")):
    ...     path = sti.datasets.synthetic_visium(f"bundle_certify_{name}", n_spots=60, n_genes=20, seed=seed)
    ...     sections[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(sections)
    >>> sti.pp.embed(sections, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(sections["train"], n_top=5)
    >>> model = sti.tl.fit_nb(sections["train"], genes=genes, n_members=2, max_epochs=2)
    >>> model = sti.tl.certify(sections["new"], model)
    >>> len(model.certificate.genes)
    5
    """
    source = contract.Source(table_key, layer)
    if not 0 < q < 1 or not 0 < reliable < 1:
        raise ValueError(f"Expected `q` and `reliable` between 0 and 1, found {q} and {reliable}.")
    steps = sorted({int(step) for step in scales})
    if any(step < 1 for step in steps):
        raise ValueError(f"Expected `scales` of at least 1 step, found {list(scales)}.")
    fitted = as_model(model)
    cohort = contract.sections(data)
    check_unseen(fitted, cohort, source, purpose="certify")
    seen = {name: shallow_copy(sdata) for name, sdata in cohort.items()}
    depth = "total" if fitted.total is not None and gene_shifts(fitted) is None else None
    predict(seen, fitted, size_factors=cast(Any, depth), table_key=table_key, layer=layer)
    scores = evaluate(seen, table_key=table_key, layer=layer)
    chance = predictable_genes(
        seen, method=method, n_permutations=n_permutations, table_key=table_key, layer=layer, seed=seed
    )
    parts = [_totals(name, sdata, source) for name, sdata in seen.items()]
    genes = chance.set_index("gene").reindex(list(fitted.genes))
    genes = genes.join(scores.groupby("gene")[["coverage", "nll", "nll_floor"]].mean())
    genes = genes.join(pd.concat([part for part, _ in parts]).groupby("gene").mean())
    genes["n_sections"] = genes["n_sections"].fillna(0)
    genes["predictable"] = genes["q_value"] <= q
    at = {0: genes["pearson"]}
    for step in steps:
        means = evaluate(seen, scale=step, table_key=table_key, layer=layer).groupby("gene")["pearson"].mean()
        at[step] = means.reindex(genes.index)
    genes["steps"] = _smallest(pd.DataFrame(at) >= reliable, genes["predictable"])
    order = ["pearson", "n_sections", "p_value", "q_value", "predictable", "steps", "coverage", "calibration", "nll",
             "nll_floor", "shift"]  # fmt: skip
    certificate = Certificate(
        genes=genes[order].rename_axis("gene").reset_index(),
        sections=_sections(seen, scores),
        pit=np.mean([density for _, density in parts], axis=0),
        about={
            "model": {name: value for name, value in fitted.description.items() if isinstance(value, str | int)},
            "trained_on": list(fitted.training.get("sections", [])),
            "trained_patients": sorted(trained_patients(fitted) or ()),
            "q": float(q),
            "reliable": float(reliable),
            "scales": [0, *steps],
            "step_um": _step_um(seen),
            "method": method,
            "n_permutations": int(n_permutations),
        },
    )
    training = {**fitted.training, KEY: certificate.content()}
    return cast(Model, replace(cast(Any, fitted), training=training))


def _totals(name: str, sdata: SpatialData, source: contract.Source) -> tuple[pd.DataFrame, np.ndarray]:
    """Return each gene's PIT distance and shift in a section, and the PIT's density over all genes."""
    table = contract.predictions(sdata)
    rows, units = contract.align(sdata, table, source)
    genes = [gene for gene in table.var_names if gene in units.var_names]
    counts = dense(units[:, genes])
    made = contract.at_depth_of(table, rows, genes, contract.measured_exposure(table, rows, units))
    upto, below = cumulative(counts, np.maximum(made.mean, 1e-8), made.variance, made.shift_sd)
    width = np.maximum(upto - below, 1e-12)
    edges = np.linspace(0, 1, N_BINS + 1)
    reached = np.stack([np.clip((edge - below) / width, 0, 1).mean(axis=0) for edge in edges])
    shift = np.log2((counts.sum(axis=0) + 0.5) / (made.mean.sum(axis=0) + 0.5))
    frame = pd.DataFrame({"calibration": np.abs(reached - edges[:, None]).max(axis=0), "shift": shift}, index=genes)
    return frame.rename_axis("gene"), np.diff(reached.mean(axis=1)) * N_BINS


def _smallest(enough: pd.DataFrame, predictable: pd.Series) -> pd.Series:
    """Return the first scale at which a predictable gene is reliable, NaN for none."""
    first = enough.idxmax(axis=1).astype(float)
    return first.where(enough.any(axis=1) & predictable)


def _sections(seen: dict[str, SpatialData], scores: pd.DataFrame) -> pd.DataFrame:
    patients = contract.patients(seen)
    rows = []
    for name, sdata in seen.items():
        of_section = scores[scores["section"] == name]
        outside = contract.predictions(sdata).obs["ood_score"].to_numpy() > 1
        rows.append(
            {
                "section": name,
                "patient": patients.get(name, ""),
                "n_tiles": int(of_section["n_tiles"].iloc[0]),
                "exposure": float(of_section["exposure"].iloc[0]),
                "ood_share": float(outside.mean()),
                **{score: float(of_section[score].mean()) for score in _MEANS},
            }
        )
    return pd.DataFrame(rows)


def _step_um(seen: dict[str, SpatialData]) -> float | None:
    """Return the median distance between neighboring spots, µm, `None` if the resolution of a section is unknown."""
    from scipy.spatial import KDTree

    distances = []
    for sdata in seen.values():
        mpp = contract.mpp(sdata)
        if mpp is None:
            return None
        centers = contract.places(sdata, contract.predictions(sdata))
        distances.append(mpp * np.median(KDTree(centers).query(centers, k=2)[0][:, 1]))
    return float(np.mean(distances))
