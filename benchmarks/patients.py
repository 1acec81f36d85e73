"""What holds on another patient: depth, coverage and width of intervals, and what a few measured spots add.

Leave one section out of her2st C2 to C5, one patient. Other patients are made from the left-out section: its counts are
thinned to the depth of a section of another patient and by the difference of the genes' shares, both from published
counts (`her2st_counts`). The image stays that of the section, so only depth and gene shifts are those of the patient.
Run as ``python -m benchmarks.patients``. Prints Markdown tables, and writes
``benchmarks/results/patients.json``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.her2st import MARKERS, gene_sets, prepare
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract
from stimage_sd.likelihood import predictive
from stimage_sd.pl._calibration import pit_histogram
from stimage_sd.tl._score.cross_validate import shallow_copy

SECTIONS = ("C2", "C3", "C4", "C5")
#: one section of each of six other patients
OTHERS = ("A3", "D3", "E2", "F2", "G2", "H1")
#: share of counts kept in half of the training sections, and in the tested one
TRAINED, TESTED = 0.1, 0.07
SPOTS = (5, 10, 20, 40, 80)
SCALES = (None, 1, 2, 3)


def thinned(sdata: SpatialData, share: float | np.ndarray, *, seed: int, patient: str | None = None) -> SpatialData:
    """Keep each count by chance, for all genes or by gene."""
    copy, random = shallow_copy(sdata), np.random.default_rng(seed)
    table = contract.counts(sdata).copy()
    counts = sp.csr_matrix(table.X).copy()
    kept = np.broadcast_to(np.minimum(share, 1.0), table.n_vars)[counts.indices]
    counts.data = random.binomial(counts.data.astype(np.int64), kept).astype(counts.dtype)
    counts.eliminate_zeros()
    table.X = counts
    copy.tables[contract.COUNTS] = table
    if patient is not None:
        contract.remember(copy, patient=patient)
    return copy


def other_patients(sdata: SpatialData, folder: Path) -> Iterator[tuple[str, SpatialData]]:
    """Thin a section to the depth and the gene shares of sections of other patients."""
    measured = contract.counts(sdata)
    totals = pd.Series(np.asarray(measured.X.sum(axis=0)).ravel(), measured.var_names)
    depth = float(np.median(np.asarray(measured.X.sum(axis=1))))
    for number, name in enumerate(OTHERS):
        table = pd.read_csv(folder / f"{name}.tsv.gz", sep="\t", index_col=0)
        theirs = table.sum().reindex(totals.index).fillna(0)
        shift = ((theirs + 0.5) / (theirs.sum() + 0.5)) / ((totals + 0.5) / (totals.sum() + 0.5))
        share = float(table.sum(axis=1).median()) / depth * shift.to_numpy()
        yield name, thinned(sdata, share, seed=100 + number, patient=name[0])


def scored(sdata: SpatialData, model: Any, **options: Any) -> dict[str, float]:
    """Predict and score a section; width is that of the intervals that coverage is of."""
    sti.tl.predict(sdata, model)
    scores = sti.tl.evaluate(sdata, **options)
    table = contract.predictions(sdata)
    rows, _ = contract.align_to_spots(sdata, table)
    exposure = scores["exposure"].iloc[0]
    made = contract.at_depth_of(table, rows, table.var_names, None if np.isnan(exposure) else float(exposure))
    return {
        "pearson": float(scores["pearson"].mean()),
        "pearson_top_50": float(scores["pearson"].nlargest(50).mean()),
        "coverage": float(scores["coverage"].mean()),
        "width": float((made.upper - made.lower).mean()),
        "nll": float(scores["nll"].mean()),
    }


def corner(sdata: SpatialData, n: int) -> list[str]:
    """Return the names of the spots that lie farthest to the upper left."""
    table = contract.tiles(sdata)
    rows, units = contract.align_to_spots(sdata, table[table.obs["keep"].to_numpy()])
    order = np.argsort(table[table.obs["keep"].to_numpy()].obsm["spatial"][rows].sum(axis=1), kind="stable")
    return list(units.obs_names[order[:n]])


def without(sdata: SpatialData, spots: list[str]) -> SpatialData:
    """Leave the counts of some spots out."""
    rest, table = shallow_copy(sdata), contract.counts(sdata)
    rest.tables[contract.COUNTS] = table[~table.obs_names.isin(spots)].copy()
    return rest


def adapted(sdata: SpatialData, model: Any) -> Iterator[dict[str, Any]]:
    """Score the same rest of a section after adapting to more and more of the other spots."""
    rest = without(sdata, corner(sdata, max(SPOTS)))
    yield {"spots": 0, **scored(rest, model)}
    for n in SPOTS:
        yield {"spots": n, **scored(rest, sti.tl.adapt(model, sdata, spots=corner(sdata, n)))}


def histograms(sdata: SpatialData, model: Any) -> dict[str, list[float]]:
    """Return the probability integral transform of a section, for all genes and for thirds by mean count."""
    sti.tl.predict(sdata, model)
    table = contract.predictions(sdata)
    rows, units = contract.align_to_spots(sdata, table)
    made = contract.at_depth_of(table, rows, table.var_names, contract.measured_exposure(table, rows, units))
    counts = units[:, table.var_names].X.toarray().astype(np.float64)
    assert made.shift_sd is not None
    upto, below = (predictive.cdf(values, made.mean, made.variance, made.shift_sd) for values in (counts, counts - 1))
    order = np.argsort(counts.mean(axis=0), kind="stable")
    groups = {"all": order, **dict(zip(("low", "middle", "high"), np.array_split(order, 3), strict=True))}
    return {name: pit_histogram(upto[:, genes], below[:, genes]).tolist() for name, genes in groups.items()}


def signature(sdata: SpatialData, model: Any) -> dict[str, float]:
    """Return how often intervals of the mean log count of 14 markers hold the measured one, by spot and section."""
    sti.tl.predict(sdata, model)
    table = contract.predictions(sdata)
    rows, units = contract.align_to_spots(sdata, table)
    exposure = contract.measured_exposure(table, rows, units)
    genes = [gene for gene in MARKERS if gene in table.var_names]
    draws = np.log1p(
        sti.tl.sample(sdata, model, 200, exposure=exposure)[:, rows][:, :, table.var_names.get_indexer(genes)]
    )
    draws = draws.mean(axis=2).compute()
    measured = np.log1p(units[:, genes].X.toarray()).mean(axis=1)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    whole = np.quantile(draws.mean(axis=1), [0.05, 0.95])
    return {
        "spots": float(((measured >= low) & (measured <= high)).mean()),
        "section": float(whole[0] <= measured.mean() <= whole[1]),
    }


def fold(
    sections: dict[str, SpatialData], left_out: str, folder: Path, n_members: int
) -> dict[str, list[dict[str, Any]]]:
    """Do everything with one section left out."""
    train = {name: sdata for name, sdata in sections.items() if name != left_out}
    half = {
        name: thinned(sdata, TRAINED, seed=number) if number % 2 == 0 else sdata
        for number, (name, sdata) in enumerate(train.items())
    }
    genes = gene_sets(train, None)["most_expressed_1000"]
    known = set(contract.counts(sections[left_out]).var_names)
    genes = [gene for gene in genes if gene in known]
    options = {"genes": genes, "n_members": n_members}
    model, of_half = sti.tl.fit_nb(train, **options), sti.tl.fit_nb(half, **options)
    before = sti.tl.fit_nb(train, exposure=None, **options)
    flat = replace(model, shifts=np.zeros_like(model.shifts))
    test = sections[left_out]
    shallow = thinned(test, TESTED, seed=50)
    rows_by_question: dict[str, list[dict[str, Any]]] = {}
    rows_by_question["depth"] = [
        {"trained": trained, "tested": tested, "exposure": exposure, **scored(sdata, one, **given)}
        for trained, one in (("as measured", model), ("half thinned", of_half))
        for tested, sdata in (("as measured", test), ("thinned", shallow))
        for exposure, given in (("given", {}), ("1", {"exposure": 1.0}))
    ]
    rows_by_question["same patient"] = [
        {"model": name, **scored(test, one)}
        for name, one in (
            ("without exposure", before),
            ("without shifts", flat),
            ("with the shifts of a section", model),
            ("with the shifts of a patient", replace(model, shifts=model.shifts[[1, 1]])),
        )
    ]
    rows_by_question["scales"] = [{"steps": scale or 0, **scored(test, model, scale=scale)} for scale in SCALES]
    rows_by_question["histograms"] = [{"group": name, "density": row} for name, row in histograms(test, model).items()]
    rows_by_question["signature"] = [signature(test, model)]
    for name, section in other_patients(test, folder):
        models = (("without exposure", before), ("without shifts", flat), ("with shifts", model))
        rows = [{"model": kind, **scored(section, one)} for kind, one in models]
        rows_by_question.setdefault("other patients", []).extend({"patient": name[0], **row} for row in rows)
        rows_by_question.setdefault("adapted", []).extend(
            {"patient": name[0], **row} for row in adapted(section, model)
        )
    return {key: [{"section": left_out, **row} for row in rows] for key, rows in rows_by_question.items()}


def summary(result: dict[str, list[dict[str, Any]]]) -> dict[str, pd.DataFrame]:
    """Means over sections and patients."""
    by = {
        "depth": ["trained", "tested", "exposure"], "same patient": ["model"], "scales": ["steps"],
        "other patients": ["model"], "adapted": ["spots"],
    }  # fmt: skip
    tables = {
        key: pd.DataFrame(result[key]).groupby(columns, sort=False).mean(numeric_only=True).reset_index()
        for key, columns in by.items()
    }
    by_patient = pd.DataFrame(result["other patients"]).groupby(["patient", "model"], sort=False)
    tables["by patient"] = by_patient[["coverage", "width", "nll"]].mean().reset_index()
    density = pd.DataFrame(result["histograms"])
    tables["histograms"] = pd.DataFrame(
        {name: np.mean(rows["density"].tolist(), axis=0) for name, rows in density.groupby("group", sort=False)}
    ).T.reset_index(names="genes")
    tables["signature"] = pd.DataFrame(result["signature"]).mean(numeric_only=True).to_frame("coverage").reset_index()
    return tables


def draw(result: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw what measured spots add, a line per patient and their mean."""
    import matplotlib.pyplot as plt

    frame = pd.DataFrame(result["adapted"])
    shown = {
        "nll": "negative log-likelihood per count",
        "width": "mean interval width, counts",
        "coverage": "share of counts inside",
    }
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        for _, of_patient in frame.groupby("patient"):
            ax.plot(of_patient.groupby("spots")[column].mean(), color="0.75", linewidth=1)
        ax.plot(frame.groupby("spots")[column].mean(), "o-", color="black", linewidth=2, markersize=4)
        ax.set(xlabel="measured spots", ylabel=label, xscale="symlog")
        ax.set_xticks([0, *SPOTS], ["0", *map(str, SPOTS)])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[2].axhline(0.9, color="gray", linestyle="--", linewidth=1)
    axes[2].set_ylim(0.8, 1)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("STIMAGE_SD_DATA", "../shared/data")))
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patients.json"))
    options = parser.parse_args()
    sections = {name: sti.datasets.her2st(name) for name in SECTIONS}
    prepare(sections, Steps(), extractor="efficientnet_lite0_stages")
    result: dict[str, list[dict[str, Any]]] = {}
    for left_out in options.sections:
        print(f"{left_out} left out", flush=True)
        for key, rows in fold(sections, left_out, options.data / "her2st_counts", options.members).items():
            result.setdefault(key, []).extend(rows)
    for name, table in summary(result).items():
        print(f"\n{name}\n\n{table.round(3).to_markdown(index=False)}", flush=True)
    draw(result, Path(__file__).parent.parent / "docs" / "_static" / "adapted.png")
    report(options.out, {"machine": machine(), "n_members": options.members, "rows": result})


if __name__ == "__main__":
    main()
