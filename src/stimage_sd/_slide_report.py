"""Predict an image or whole slide, and write its section and a report of one page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract, pl, tl
from stimage_sd._page import Block, write_page
from stimage_sd._store import staged
from stimage_sd.models._facts import facts_of
from stimage_sd.models._predictor import Predictor
from stimage_sd.pp._prepare import prepare_for_model
from stimage_sd.tl._predict.predict import familiarity

#: genes with a map, and genes in the table
N_MAPS, N_LISTED = 6, 15
Say = Callable[[str], None]


def predict_and_report(
    sdata: SpatialData, model: Any, out: Path, *, weights: Path | None, overwrite: bool, say: Say
) -> str:
    """Predict all genes of a model on a slide, and write ``section.zarr`` and ``report.html`` into a folder.

    - `sdata`: the slide.
    - `model`: the fitted model.
    - `out`: folder to write. It appears when it is complete.
    - `weights`: the extractor's weights file, if it is not found automatically.
    - `overwrite`: whether a section and report that are there may be replaced.
    - `say`: function that prints the current step.
    - returns: what the report says about the tiles, and where it is.
    """
    on_disk = set(sdata.images)
    prepare_for_model(sdata, model, weights=weights, say=say)
    say(f"{contract.sample(sdata)}: predicting {len(model.genes)} genes")
    with warnings.catch_warnings():
        # the report and the last line say it
        warnings.filterwarnings("ignore", message=".* are unlike those of the training sections", category=UserWarning)
        tl.predict(sdata, model)
    for name in set(sdata.images) - on_disk:
        del sdata.images[name]
    say("writing the section and its report")
    with staged(out, overwrite=overwrite) as folder:
        folder.mkdir()
        write_page(folder / "report.html", _blocks(sdata, model))
        sdata.write(folder / "section.zarr")
    return f"{familiarity(contract.predictions(sdata))[0]}\nSection and report in {out}."


def _blocks(sdata: SpatialData, model: Predictor) -> Iterator[Block]:
    table = contract.predictions(sdata)
    yield Block(f"Predicted expression of {contract.sample(sdata)}", is_heading=True)
    yield Block(f"{_slide(sdata)} {table.n_obs:,} tiles with tissue. {len(model.genes):,} genes.")
    yield Block(familiarity(table)[0].replace("`", ""))
    certificate = getattr(model, "certificate", None)
    if certificate is None:
        yield Block("The model has no certificate, so it is unknown which genes it predicts in new sections.")
    else:
        yield Block(f"{certificate!r}. Tested on {', '.join(certificate.sections['section'])}.")
    genes = _genes(table, certificate)
    which = "of highest accuracy in the certificate" if certificate is not None else "that vary most over the tiles"
    if (table.obs["ood_score"] <= 1).any():
        yield Block(
            f"Predicted means of the {len(genes[:N_MAPS])} genes {which}. Tiles unlike the training tiles are gray."
        )
        yield Block(
            "Maps of predicted genes",
            figure=partial(_png, partial(pl.prediction, sdata, genes[:N_MAPS], max_ood=1.0)),
        )
    else:
        yield Block("There are no maps of genes, because no tile is like the training tiles.")
    yield Block("Distance from the training tiles. Above 1, a tile is farther than 95 % of the training tiles.")
    yield Block(
        "Map of the distance from the training tiles", figure=partial(_png, partial(pl.tiles, sdata, color="ood_score"))
    )
    yield Block(f"The {len(genes[:N_LISTED])} genes {which}, over all tiles, also those unlike the training tiles.")
    yield Block(table=_listed(table, genes[:N_LISTED]))
    yield Block(
        "Mean: mean over the tiles of the predicted counts. Low and high: their 10th and 90th percentile. Uncertain: "
        "predicted standard deviation over the mean. Counts are of a spot at the depth of the training sections."
    )
    facts = pd.DataFrame(facts_of(model).items(), columns=["model", type(model).__name__])
    yield Block(table=facts[facts["model"] != "certificate"])


def _slide(sdata: SpatialData) -> str:
    height, width = contract.levels(sdata, contract.image_name(sdata))[0].shape[1:]
    mpp = contract.mpp(sdata)
    size = f"{width:,} × {height:,} px"
    return (
        f"{size}."
        if mpp is None
        else f"{size} at {mpp:.3g} µm per px ({width * mpp / 1000:.1f} × {height * mpp / 1000:.1f} mm)."
    )


def _genes(table: AnnData, certificate: Any) -> list[str]:
    """Return the predictable genes, best first, or without a certificate those that vary most over the tiles."""
    if certificate is not None and certificate.predictable:
        return [gene for gene in certificate.predictable if gene in table.var_names]
    spread = np.log1p(np.asarray(table.X)).std(axis=0)
    return table.var_names[np.argsort(-spread, kind="stable")].tolist()


def _listed(table: AnnData, genes: list[str]) -> pd.DataFrame:
    mean = np.asarray(table[:, genes].X, dtype=np.float64)
    deviation = np.sqrt(np.asarray(table[:, genes].layers["total_variance"], dtype=np.float64))
    low, high = np.percentile(mean, [10, 90], axis=0)
    frame = pd.DataFrame(
        {
            "gene": genes,
            "mean": mean.mean(axis=0),
            "low": low,
            "high": high,
            "uncertain": (deviation / mean).mean(axis=0),
        }
    )
    return frame.assign(**{str(name): frame[name].map("{:.3g}".format) for name in frame if name != "gene"})


def _png(draw: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    figure = draw(return_fig=True)
    figure.savefig(buffer, format="png", dpi=75, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
