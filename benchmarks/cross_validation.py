"""Every model on the same splits and genes: leave-one-section-out over her2st C2 to C5, the literature's 785 genes.

Run as ``python -m benchmarks.cross_validation --data FOLDER`` (the folder with ``genes/her2st_785_hvg.txt``). Prints a
Markdown table, one row per model, and writes ``benchmarks/results/cross_validation.json``.

All spots are scored by default, as the literature does; ``--drop-sparse`` keeps what `pp.tile` keeps, spots of 70 %
tissue. Scores are the mean over genes, and over the 50 genes of a held-out section that are most expressed, on log
counts (``log1p``) and on log counts per 100,000 of the listed genes. The latter are predicted in two ways: ``lognorm``
by a model that was fitted to them, ``lognorm, expected`` by what the distributions of a model of counts expect of them.
Networks that are trained from pixels take hours a fold on a CPU, and are run where ``--models`` names them. ST-Net's
own DenseNet-121 needs its ImageNet weights (``$STIMAGE_SD_WEIGHTS``); without them its way of training is measured on
the network whose weights come with the package, and is called so.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract
from stimage_sd.baselines import (
    IGIDL,
    Hist2ST,
    HisToGene,
    MeanOnly,
    NearestTiles,
    Retrieval,
    Ridge,
    STnet,
    THItoGene,
    ViTNB,
)
from stimage_sd.likelihood.expectation import expected_log1p
from stimage_sd.models._predictor import gene_shifts
from stimage_sd.stats.spatial import pattern_iou, pearson

SECTIONS = ("C2", "C3", "C4", "C5")
EXTRACTORS = ("efficientnet_lite0", "tissue_statistics")
#: two networks, each with its ImageNet weights
NETWORKS = ("efficientnet_lite0", "efficientnet_lite2")
PER = 1e5
#: trained from pixels, with their authors' epochs
FROM_PIXELS: dict[str, tuple[type, dict[str, Any], Sequence[str]]] = {
    "ST-Net": (STnet, {}, EXTRACTORS[:1]),
    "ST-Net's training of EfficientNet-Lite0, ImageNet weights": (
        STnet,
        {"backbone": "efficientnet_lite0"},
        EXTRACTORS[:1],
    ),
    "ViT_NB": (ViTNB, {}, EXTRACTORS[:1]),
    "HisToGene": (HisToGene, {}, EXTRACTORS[:1]),
    "Hist2ST": (Hist2ST, {}, EXTRACTORS[:1]),
    "THItoGene": (THItoGene, {}, EXTRACTORS[:1]),
    "IGI-DL": (IGIDL, {}, EXTRACTORS[:1]),
}
OF_LITE2, OF_NETWORKS = "STImage NB, EfficientNet-Lite2", "STImage NB, EfficientNet-Lite0 and -Lite2 combined"
#: run where they are named
ON_DEMAND = {*FROM_PIXELS, OF_LITE2, OF_NETWORKS}

Fit = Callable[..., Any]


def models(n_members: int) -> dict[str, dict[str, Fit]]:
    """By name, how each model is fitted: to counts, and where it can be to log-normalized counts."""
    recipes: dict[str, tuple[type, dict[str, Any], Sequence[str]]] = {
        "mean only": (MeanOnly, {}, EXTRACTORS[:1]),
        "ridge, PCA 128": (Ridge, {"n_components": 128}, EXTRACTORS[:1]),
        "ridge, PCA 256": (Ridge, {}, EXTRACTORS[:1]),
        "nearest tiles": (NearestTiles, {}, EXTRACTORS[:1]),
        "retrieval": (Retrieval, {}, EXTRACTORS[:1]),
        "ridge of rank 8": (Ridge, {"n_components": 512, "rank": 8}, EXTRACTORS[:1]),
        "ridge of rank 8, tissue statistics": (Ridge, {"n_components": 512, "rank": 8}, EXTRACTORS[1:]),
        "ridge of rank 8, both": (Ridge, {"n_components": 512, "rank": 8}, EXTRACTORS),
        "retrieval, both": (Retrieval, {}, EXTRACTORS),
        **FROM_PIXELS,
    }
    found: dict[str, dict[str, Fit]] = {
        name: {
            target: partial(sti.tl.fit_baseline, recipe=recipe(target=target, **options), extractor=extractors)
            for target in ("log1p", "lognorm")
        }
        for name, (recipe, options, extractors) in recipes.items()
    }
    found["NB, every gene by itself"] = {
        "log1p": partial(sti.tl.fit_nb, n_members=n_members, extractor=EXTRACTORS[0], rank=None)
    }
    found["STImage NB"] = {"log1p": partial(sti.tl.fit_nb, n_members=n_members, extractor=EXTRACTORS[0])}
    found["STImage NB, both"] = {"log1p": partial(sti.tl.fit_nb, n_members=n_members, extractor=EXTRACTORS)}
    found["STImage NB, combined"] = {"log1p": partial(fit_combined, n_members=n_members, extractors=EXTRACTORS)}
    found[OF_LITE2] = {"log1p": partial(sti.tl.fit_nb, n_members=n_members, extractor=NETWORKS[1])}
    found[OF_NETWORKS] = {"log1p": partial(fit_combined, n_members=n_members, extractors=NETWORKS)}
    return found


def fit_combined(train: dict[str, SpatialData], *, genes: list[str], n_members: int, extractors: Sequence[str]) -> Any:
    """One ensemble an extractor, put together."""
    return sti.tl.combine(
        [sti.tl.fit_nb(train, genes=genes, extractor=name, n_members=n_members) for name in extractors]
    )


def prepare(steps: Steps, *, all_spots: bool, extractors: Sequence[str]) -> dict[str, SpatialData]:
    """Read, stain, tile and embed the sections."""
    sections = {}
    reference = None
    for name in SECTIONS:
        with steps.step(f"{name}: read, stain, tile"):
            sections[name] = sti.datasets.her2st(name)
            reference = sti.pp.stain_normalize(sections[name], reference)
            sti.pp.tile(sections[name], **({"min_tissue": 0.0} if all_spots else {}))
        for extractor in extractors:
            with steps.step(f"{name}: embed, {extractor}"):
                sti.pp.embed(sections[name], extractor)
    return sections


def lognorm(values: np.ndarray) -> np.ndarray:
    """Log counts per 100,000."""
    return np.log1p(values / np.maximum(values.sum(axis=1, keepdims=True), 1e-12) * PER)


def expected_lognorm(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """What negative binomials expect of log counts per 100,000."""
    return expected_log1p(mean, variance, scale=PER / np.maximum(mean.sum(axis=1, keepdims=True), 1e-12))


def average(agreement: np.ndarray, measured: np.ndarray) -> float:
    """Mean over genes; a model that says the same of every spot has no correlation: 0."""
    return float(np.nan_to_num(agreement[~np.isnan(measured.std(axis=0))]).mean())


def scores(sdata: SpatialData, scale: str) -> dict[str, float]:
    """Of a section with predictions: mean Pearson, of all genes and the 50 most expressed, and mean IoU."""
    predictions = contract.predictions(sdata)
    rows, counts = contract.align_to_spots(sdata, predictions)
    observed = counts[:, predictions.var_names].X.toarray().astype(np.float64)
    mean = np.asarray(predictions.X, dtype=np.float64)[rows]
    transform = np.log1p if scale == "log1p" else lognorm
    measured = transform(observed)
    variance = np.asarray(predictions.layers["total_variance"], dtype=np.float64)[rows]
    predicted = expected_lognorm(mean, variance) if scale == "lognorm, expected" else transform(mean)
    agreement = pearson(predicted, measured)
    top = np.argsort(-observed.mean(axis=0), kind="stable")[:50]
    overlap = pattern_iou(predicted, measured, np.asarray(predictions.obsm["spatial"])[rows])

    inside = (observed >= predictions.layers["lower"][rows]) & (observed <= predictions.layers["upper"][rows])
    return {
        "pearson": average(agreement, measured),
        "pearson_top_50": float(np.nan_to_num(agreement[top]).mean()),
        "iou": float(np.nanmean(overlap)) if np.isfinite(overlap).any() else float("nan"),
        "coverage_90": float(inside.mean()),
    }


def run(*, data: Path, all_spots: bool, n_members: int, only: list[str] | None) -> dict[str, Any]:
    """Fit and score all models, fold by fold."""
    steps = Steps()
    extractors = EXTRACTORS + NETWORKS[1:] * (only is not None and not {OF_LITE2, OF_NETWORKS}.isdisjoint(only))
    sections = prepare(steps, all_spots=all_spots, extractors=extractors)
    listed = (data / "genes" / "her2st_785_hvg.txt").read_text().split()
    measured = [set(sdata.tables[contract.COUNTS].var_names) for sdata in sections.values()]
    genes = [gene for gene in listed if all(gene in names for names in measured)]
    rows = []
    for name, by_target in models(n_members).items():
        if name not in only if only else name in ON_DEMAND:
            continue
        for target, fit in by_target.items():
            for held_out, section in sections.items():
                with steps.step(f"{name}, {target}, {held_out}"):
                    model = fit({key: sdata for key, sdata in sections.items() if key != held_out}, genes=genes)
                    factors = "total" if model.total is not None and gene_shifts(model) is None else None
                    sti.tl.predict(section, model, size_factors=factors)
                cost = {key: steps.rows[-1][key] for key in ("seconds", "peak_mb_above_imports")}
                for scale in ("log1p", "lognorm, expected") if target == "log1p" else ("lognorm",):
                    rows.append({"model": name, "scale": scale, "section": held_out, **scores(section, scale), **cost})
            print(table(rows), flush=True)
    return {
        "machine": machine(), "all_spots": all_spots, "n_genes": len(genes), "n_members": n_members, "rows": rows,
        "steps": steps.rows,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the sections, as Markdown."""
    means = pd.DataFrame(rows).drop(columns="section").groupby(["model", "scale"], sort=False).mean().reset_index()
    lines = ["| " + " | ".join(means.columns) + " |", "|" + "---|" * means.shape[1]]
    for row in means.itertuples(index=False):
        lines.append(
            "| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("STIMAGE_SD_DATA"), required="STIMAGE_SD_DATA" not in os.environ
    )
    parser.add_argument("--drop-sparse", action="store_true", help="leave out spots under 70 %% tissue")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--models", nargs="+", help="some of the models alone, those from pixels among them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cross_validation.json"))
    options = parser.parse_args()
    result = run(data=options.data, all_spots=not options.drop_sparse, n_members=options.members, only=options.models)
    print(table(result["rows"]))
    report(options.out, result)


if __name__ == "__main__":
    main()
