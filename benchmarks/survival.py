"""Survival of TCGA-BRCA by bulk expression: the screen, the cross-validated model, and controls.

``python -m benchmarks.survival``: reads ``cohort/tcga_brca.parquet`` (1,022 slides of 956 patients, 1,500 genes) from
``$STIMAGE_SD_DATA``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import stimage_sd as sti

COLUMNS = {"time_key": "survival_months", "event_key": "event", "patient_key": "case_id"}
ABOUT = ("case_id", "slide_id", "age", "site", "survival_months", "censorship", "oncotree_code")


def tcga() -> ad.AnnData:
    """Read the cohort: slides x genes, z-scores."""
    frame = pd.read_parquet(Path(os.environ["STIMAGE_SD_DATA"]) / "cohort" / "tcga_brca.parquet")
    genes = [name for name in frame.columns if name not in ABOUT and frame[name].dtype == np.float32]
    values = frame[genes].to_numpy()
    known = np.isfinite(values).all(axis=0) & (values.std(axis=0) > 0)
    obs = frame[list(ABOUT)].assign(event=(frame["censorship"] == 0).astype(int)).set_index("slide_id", drop=False)
    return ad.AnnData(values[:, known], obs.rename_axis(None), pd.DataFrame(index=np.array(genes)[known]))


def permuted(table: ad.AnnData, seed: int) -> ad.AnnData:
    """Return the cohort with the outcomes of other patients: what is left when genes tell nothing."""
    patients = table.obs.drop_duplicates("case_id")
    order = np.random.default_rng(seed).permutation(len(patients))
    outcome = patients[["survival_months", "event"]].iloc[order].set_axis(patients["case_id"])
    shuffled = table.copy()
    shuffled.obs[["survival_months", "event"]] = outcome.loc[table.obs["case_id"]].to_numpy()
    return shuffled


def timed(label: str, work: Any) -> tuple[Any, float]:
    """Run something, and say how long it took."""
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    print(json.dumps({"step": label, "seconds": round(seconds, 2)}), flush=True)
    return found, seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--controls", type=int, default=5)
    options = parser.parse_args()
    table = tcga()
    patients = table.obs.drop_duplicates("case_id")
    print(
        f"{table.n_obs} slides, {len(patients)} patients, {int(patients['event'].sum())} events, {table.n_vars} genes"
    )
    sti.tl.cox_screen(table[:, :5], **COLUMNS)  # compiled
    screened, _ = timed("screen", lambda: sti.tl.cox_screen(table, **COLUMNS))
    print(screened[["gene", "hazard_ratio", "p_value", "q_value", "c_index"]].head(10).to_string(index=False))
    best = screened.sort_values("c_index", ascending=False)
    print("highest c-index, in sample:", best[["gene", "c_index"]].head(5).to_dict("records"))
    settings = {**COLUMNS, "n_repeats": options.repeats}
    found, _ = timed("risk groups", lambda: sti.tl.risk_groups(table, **settings))
    print(found.summary.to_string(index=False))
    print(found.genes.head(8).to_string(index=False))
    controls = [
        sti.tl.risk_groups(permuted(table, seed), **{**settings, "n_repeats": max(2, options.repeats // 10)})
        for seed in range(options.controls)
    ]
    values = [float(control.summary["c_index"].iloc[0]) for control in controls]
    print(json.dumps({"permuted outcomes, c-index": values, "mean": float(np.mean(values))}))


if __name__ == "__main__":
    main()
