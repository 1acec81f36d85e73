"""Write the command line's reports on scores, sections and models as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import lines
from stimage_sd.models import CellClassifier, InstanceModel, NBModel
from stimage_sd.models._facts import facts_of
from stimage_sd.tl._predict.predict import familiarity

#: number of best genes with their own mean score
TOP = 50
SCORES = {
    "pearson": "Pearson (log1p)",
    "spearman": "Spearman",
    "bivariate_morans_i": "bivariate Moran's I",
    "iou": "IoU of patterns",
    "coverage": "90% interval covers",
    "nll": "NLL per count",
    "nll_floor": "NLL per count, mean-only",
}


def score_report(scores: pd.DataFrame, *, n_best: int = 5) -> str:
    """Summarize the scores of `stimage_sd.tl.evaluate`: means over genes, one column per section.

    - `scores`: one row per section and gene.
    - `n_best`: number of genes to name, by highest Pearson correlation.
    - returns: lines of text.
    """
    columns = {}
    for section, part in scores.groupby("section", sort=False):
        # scores against proteins have no likelihood of counts
        known = {name: label for name, label in SCORES.items() if part[name].notna().any()}
        means = {label: f"{part[name].mean():.3f}" for name, label in known.items()}
        top = f"{part['pearson'].nlargest(TOP).mean():.3f}" if len(part) > TOP else "-"
        rows = {"genes": str(len(part)), "tiles": str(int(part["n_tiles"].iloc[0]))}
        first = {"Pearson (log1p)": means.pop("Pearson (log1p)", "-"), f"  of the best {TOP} genes": top}
        columns[str(section)] = {**rows, **first, **means}
    text = pd.DataFrame(columns).to_string(na_rep="-")
    best = scores.nlargest(n_best, "pearson")
    named = ", ".join(f"{gene} {r:.2f}" for gene, r in zip(best["gene"], best["pearson"], strict=True))
    return f"{text}\nbest predicted: {named}"


def section_report(sdata: SpatialData, path: Path) -> str:
    """Describe the content and history of a section, and name the next command.

    - `sdata`: the section.
    - `path`: store of the section, for the next command.
    - returns: lines of text.
    """
    section = contract.info(sdata)
    rows = [
        f"section      {section['sample']} ({section['platform']})",
        f"H&E          {_image_line(sdata)}",
        f"images       {', '.join(sorted(sdata.images))}",
        f"tables       {', '.join(f'{name} {table.n_obs} x {table.n_vars}' for name, table in sdata.tables.items())}",
    ]
    if contract.TILES in sdata.tables:
        rows += _tiles_lines(sdata)
    if contract.PREDICTIONS in sdata.tables:
        table = contract.predictions(sdata)
        how = table.uns["prediction"]
        trained = ", ".join(map(str, how["trained_on"]))
        rows.append(f"predictions  {table.n_vars} genes, {how['n_members']} members, trained on {trained}")
        if "predictable" in table.var:
            rows.append(f"predictable  {int(table.var['predictable'].sum())} genes, by the model's certificate")
        rows.append(f"familiarity  {familiarity(table)[0]}")
        if "pearson" in table.var:
            rows.append(f"scores       mean Pearson {table.var['pearson'].mean():.3f}")
    for index, entry in enumerate(section["history"]):
        rows.append(f"{'' if index else 'history':<12} {entry['time']}  {entry['step']}")
    return "\n".join([*rows, f"next         {_next(sdata, path)}"])


def _image_line(sdata: SpatialData) -> str:
    try:
        name = contract.image_name(sdata)
    except KeyError:
        # stores of a cohort leave the image out
        return f"none in this object, {_resolution(contract.info(sdata)['mpp'])}"
    height, width = contract.levels(sdata, name)[0].shape[1:]
    return f"{name}, {width} x {height} px, {_resolution(contract.mpp(sdata))}"


def _resolution(mpp: float | None) -> str:
    return "resolution unknown" if mpp is None else f"{mpp:.4g} µm per pixel"


def _tiles_lines(sdata: SpatialData) -> list[str]:
    table, tiling = contract.tiles(sdata), contract.tiling(sdata)
    size = f"{tiling['size_um']:.4g} µm" if "size_um" in tiling else f"{tiling['side_px']:.0f} px"
    rows = [f"tiles        {int(table.obs['keep'].sum())} of {table.n_obs} kept, {tiling['layout']}, {size}"]
    for extractor, how in table.uns.get("embeddings", {}).items():
        fields = ", ".join(f"{float(value):g}" for value in how["fields_of_view"])
        rows.append(
            f"embeddings   {extractor}, fields of view {fields}, context rings {int(how['context_rings'])}, "
            f"{'stain-normalized' if how['stain'] else 'image as it is'}"
        )
    return rows


def _next(sdata: SpatialData, path: Path) -> str:
    has_counts = contract.has_counts(sdata)
    if contract.has_units(sdata) and not contract.stands_on_spots(sdata):
        return f'in Python: stimage_sd.pp.aggregate(spatialdata.read_zarr("{path}")) to make spots of cells or bins'
    if contract.PREDICTIONS in sdata.tables:
        if has_counts and "pearson" not in contract.predictions(sdata).var:
            return f"stimage-sd evaluate {path}"
        gene = contract.predictions(sdata).var_names[0]
        return f'in Python: stimage_sd.pl.prediction(spatialdata.read_zarr("{path}"), "{gene}")'
    predict = f"stimage-sd predict {path} --model MODEL --out NEW.zarr"
    return f"stimage-sd train {path} ... --out MODEL, or {predict}" if has_counts else predict


def model_report(model: Any) -> str:
    """Describe what a model predicts, its inputs and its training, and name the next command.

    - `model`: a fitted model.
    - returns: lines of text.
    """
    facts = {"model": type(model).__name__, **facts_of(model), "next": _next_of_model(model)}
    return "\n".join(lines(facts))


def _next_of_model(model: Any) -> str:
    if isinstance(model, CellClassifier):
        return 'in Python: stimage_sd.tl.predict_cells(slide, "MODEL")'
    if isinstance(model, NBModel | InstanceModel):
        on = f" --on {model.on}" if isinstance(model, InstanceModel) else ""
        return f"stimage-sd predict SECTION.zarr --model MODEL --out NEW.zarr{on}"
    return 'in Python: stimage_sd.tl.predict(section, "MODEL")'
