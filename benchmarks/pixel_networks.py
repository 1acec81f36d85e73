"""Networks that are trained from pixels, on the splits and genes of `benchmarks.cross_validation`.

Run as ``python -m benchmarks.pixel_networks --models HisToGene --epochs 100``. A network is fitted once a fold and its
means are scored, on log counts per 100,000 or (``--target log1p``) on log counts; there are no further fits for
dispersions, which `tl.fit_baseline` would make, so that more epochs can be run. Prints a Markdown table and writes
``benchmarks/results/pixel_networks_MODEL.json`` after each fold. What differs from the authors' hyperparameters is
what is passed here: epochs and learning rate.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.cross_validation import FROM_PIXELS, SECTIONS, average, lognorm, table
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract
from stimage_sd.models import Recipe, TrainingSection
from stimage_sd.models._baseline_model import section_data
from stimage_sd.stats.spatial import pattern_iou, pearson
from stimage_sd.tl._fit.training_set import measured_counts


def training_section(sdata: SpatialData, recipe: Recipe, genes: list[str]) -> TrainingSection:
    """All spots of a section, with their pictures."""
    seen = section_data(sdata, (), recipe)
    rows, counts, totals = measured_counts(sdata, genes, contract.Source())
    return TrainingSection((), seen.positions, rows, counts, totals, pixels=seen.pixels)


def scores(mean: np.ndarray, section: TrainingSection, target: str) -> dict[str, float]:
    """Mean Pearson, of all genes and the 50 most expressed, and mean IoU."""
    transform = np.log1p if target == "log1p" else lognorm
    observed = section.counts.toarray().astype(np.float64)
    predicted, measured = transform(mean[section.rows].astype(np.float64)), transform(observed)
    agreement = pearson(predicted, measured)
    top = np.argsort(-observed.mean(axis=0), kind="stable")[:50]
    overlap = pattern_iou(predicted, measured, section.positions[section.rows])
    return {
        "pearson": average(agreement, measured),
        "pearson_top_50": float(np.nan_to_num(agreement[top]).mean()),
        "iou": float(np.nanmean(overlap)) if np.isfinite(overlap).any() else float("nan"),
    }


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Leave each section out in turn."""
    kind, settings, _ = FROM_PIXELS[name]
    recipe = kind(target=options.target, **settings)
    chosen = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    recipe = replace(recipe, **{key: value for key, value in chosen.items() if value is not None})
    sections = {key: sti.datasets.her2st(key) for key in SECTIONS}
    reference = None
    for sdata in sections.values():
        reference = sti.pp.stain_normalize(sdata, reference)
        sti.pp.tile(sdata, min_tissue=0.0)
    listed = (options.data / "genes" / "her2st_785_hvg.txt").read_text().split()
    genes = [gene for gene in listed if all(gene in s.tables[contract.COUNTS].var_names for s in sections.values())]
    data = {key: training_section(sdata, recipe, genes) for key, sdata in sections.items()}
    steps, rows, result = Steps(), [], {}
    for held_out in options.folds:
        with steps.step(held_out):
            learned = recipe.fit([part for key, part in data.items() if key != held_out], seed=0)
            mean = recipe.mean(learned, data[held_out])
        cost = {key: steps.rows[-1][key] for key in ("seconds", "peak_mb_above_imports")}
        found = scores(mean, data[held_out], options.target)
        rows.append({"model": name, "scale": options.target, "section": held_out, **found, **cost})
        print(table(rows), flush=True)
        result = {"machine": machine(), "recipe": repr(recipe), "n_genes": len(genes), "rows": rows}
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        report(Path(f"benchmarks/results/pixel_networks_{slug}_{options.target}.json"), result)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("STIMAGE_SD_DATA"), required="STIMAGE_SD_DATA" not in os.environ
    )
    parser.add_argument("--models", nargs="+", default=["HisToGene"], choices=FROM_PIXELS)
    parser.add_argument("--target", choices=("log1p", "lognorm"), default="lognorm")
    parser.add_argument("--epochs", type=int, help="instead of the authors'")
    parser.add_argument("--learning-rate", type=float, help="instead of the authors'")
    parser.add_argument("--folds", nargs="+", default=SECTIONS, choices=SECTIONS)
    options = parser.parse_args()
    for name in options.models:
        run(name, options)


if __name__ == "__main__":
    main()
