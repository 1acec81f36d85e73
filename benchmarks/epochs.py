"""What an epoch of the networks from pixels costs, at their authors' sizes: three sections of her2st, 785 genes.

Run as ``python -m benchmarks.epochs --data FOLDER`` (the folder with ``genes/her2st_785_hvg.txt``). Prints a Markdown
table and writes ``benchmarks/results/epochs.json``. The first epoch compiles, once for each number of spots; an epoch
is the mean of the next two, as seconds by the clock and as seconds of all processors together, which say more of a
machine that does other work beside. `fit_hours` is for all of the authors' epochs in one fit, by the clock;
`tl.fit_baseline` makes such a fit for each section that is left out, and one more.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm

import stimage_sd as sti
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract
from stimage_sd.baselines import IGIDL, Hist2ST, HisToGene, THItoGene, _training
from stimage_sd.models import TrainingSection
from stimage_sd.models._baseline_model import section_data
from stimage_sd.tl._fit.training_set import measured_counts

SECTIONS = ("C2", "C3", "C4")
RECIPES = (HisToGene(), Hist2ST(), THItoGene(), IGIDL())


def prepare(recipe: Any, genes: Sequence[str]) -> list[TrainingSection]:
    """All spots of the sections, with the pictures that a recipe asks for."""
    found = []
    for name in SECTIONS:
        sdata = sti.datasets.her2st(name)
        sti.pp.tile(sdata, min_tissue=0.0)
        seen = section_data(sdata, (), recipe)
        measured = [gene for gene in genes if gene in set(sdata.tables[contract.COUNTS].var_names)]
        rows, counts, totals = measured_counts(sdata, measured, contract.Source())
        found.append(TrainingSection((), seen.positions, rows, counts, totals, pixels=seen.pixels))
    return found


class Clock(tqdm):
    """A progress bar that notes when it moves, by the clock and by the processors."""

    moved: ClassVar[list[tuple[float, float]]] = []

    def update(self, n: float | None = 1) -> bool | None:
        """Note the time, and move."""
        Clock.moved.append((time.perf_counter(), time.process_time()))
        return super().update(n)


def time_epochs(recipe: Any, sections: list[TrainingSection]) -> tuple[float, float, float]:
    """Seconds of the first epoch; of a later one, by the clock and by the processors."""
    _training.tqdm = Clock
    Clock.moved.clear()
    start = time.perf_counter()
    replace(recipe, epochs=3).fit(sections, seed=0)
    first, _, last = Clock.moved
    return first[0] - start, (last[0] - first[0]) / 2, (last[1] - first[1]) / 2


def run(*, data: Path, only: list[str] | None) -> dict[str, Any]:
    """Time the recipes one after another."""
    genes = (data / "genes" / "her2st_785_hvg.txt").read_text().split()
    steps, rows = Steps(), []
    for recipe in RECIPES:
        if only and recipe.name not in only:
            continue
        sections = prepare(recipe, genes)
        with steps.step(recipe.name):
            first, epoch, processors = time_epochs(recipe, sections)
        rows.append(
            {
                "model": recipe.name,
                "n_tiles": sum(len(section.rows) for section in sections),
                "n_genes": sections[0].counts.shape[1],
                "first_epoch_s": round(first, 1),
                "epoch_s": round(epoch, 1),
                "epoch_processor_s": round(processors, 1),
                "epochs": recipe.epochs,
                "fit_hours": round(epoch * recipe.epochs / 3600, 2),
                "peak_mb": round(steps.rows[-1]["peak_mb_above_imports"]),
            }
        )
        print(table(rows[-1:]), flush=True)
    return {"machine": machine(), "sections": SECTIONS, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("STIMAGE_SD_DATA"), required="STIMAGE_SD_DATA" not in os.environ
    )
    parser.add_argument("--models", nargs="+", help="some of the models alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/epochs.json"))
    options = parser.parse_args()
    result = run(data=options.data, only=options.models)
    print(table(result["rows"]))
    report(options.out, result)


if __name__ == "__main__":
    main()
