"""What each default is worth: leave-one-section-out over her2st C2, C3, C4, one choice changed at a time.

The test section of ``benchmarks.her2st`` is not touched. Run as ``python -m benchmarks.ablation``; prints a
row a variant as it is done and writes ``benchmarks/results/ablation.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.her2st import MARKERS, TRAIN
from benchmarks.measure import machine, report

DEFAULT: dict[str, Any] = {"stain": "vahadane", "target_px": 299, "fields_of_view": (1.0, 2.0, 4.0), "context_rings": 1}

#: what is changed, from the defaults: preparation of the sections, then options of `fit_nb`
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "no stain normalization": ({"stain": None}, {}),
    "stain: macenko": ({"stain": "macenko"}, {}),
    "stain: reinhard": ({"stain": "reinhard"}, {}),
    "tiles of 224 px": ({"target_px": 224}, {}),
    "one field of view": ({"fields_of_view": (1.0,)}, {}),
    "no context": ({"context_rings": 0}, {}),
    "one field of view, no context": ({"fields_of_view": (1.0,), "context_rings": 0}, {}),
    "two rings of context": ({"context_rings": 2}, {}),
    "standardized by cohort": ({}, {"standardize": "cohort"}),
    "dispersion head": ({}, {"head": "dispersion"}),
    "size factors": ({}, {"size_factors": "total"}),
    "64 components": ({}, {"n_components": 64}),
    "256 components": ({}, {"n_components": 256}),
    "weight decay 10": ({}, {"weight_decay": 10.0}),
    "weight decay 100": ({}, {"weight_decay": 100.0}),
}


def prepare(
    *, stain: str | None, target_px: int, fields_of_view: tuple[float, ...], context_rings: int
) -> dict[str, SpatialData]:
    """Read, normalize, tile and embed the training sections."""
    sections = {name: sti.datasets.her2st(name) for name in TRAIN}
    reference = None
    for sdata in sections.values():
        if stain is not None:
            reference = sti.pp.stain_normalize(sdata, reference, method=stain)
        sti.pp.tile(sdata, target_px=target_px)
        sti.pp.embed(sdata, fields_of_view=fields_of_view, context_rings=context_rings)
    return sections


def held_out_scores(sections: dict[str, SpatialData], options: dict[str, Any], *, n_members: int) -> dict[str, float]:
    """Fit on all sections but one, score on that one; mean over the sections."""
    rows = []
    for name, held_out in sections.items():
        train = {other: sdata for other, sdata in sections.items() if other != name}
        genes = sti.pp.select_genes(train, n_top=1000, include=MARKERS)
        genes = [gene for gene in genes if gene in held_out.tables["counts"].var_names]
        model = sti.tl.fit_nb(train, genes=genes, n_members=n_members, **options)
        sti.tl.predict(held_out, model)
        scores = sti.tl.evaluate(held_out)
        if options.get("size_factors"):  # counts compare with distributions at their own depth
            sti.tl.predict(held_out, model, size_factors="total")
            scores = scores.assign(**sti.tl.evaluate(held_out)[["nll", "nll_floor", "coverage"]])
        rows.append(
            {
                "pearson": scores["pearson"].mean(),
                "pearson_top_50": scores["pearson"].nlargest(50).mean(),
                "bivariate_morans_i": scores["bivariate_morans_i"].mean(),
                "iou": scores["iou"].mean(),
                "coverage_90": scores["coverage"].mean(),
                "nll_below_floor": (scores["nll_floor"] - scores["nll"]).mean(),
            }
        )
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    options = parser.parse_args()
    prepared: dict[str, dict[str, SpatialData]] = {}
    rows = []
    for variant in options.variants:
        preparation, fit = VARIANTS[variant]
        settings = {**DEFAULT, **preparation}
        if str(settings) not in prepared:
            prepared = {
                str(settings): prepare(**settings),
                **({str(DEFAULT): prepared[str(DEFAULT)]} if str(DEFAULT) in prepared else {}),
            }
        scores = held_out_scores(prepared[str(settings)], fit, n_members=options.members)
        rows.append({"variant": variant, **scores})
        print(rows[-1], flush=True)
    report(options.out, {"machine": machine(), "n_members": options.members, "rows": rows})


if __name__ == "__main__":
    main()
