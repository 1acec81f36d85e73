"""Expression of nuclei learned from spots: planted truth, Xenium's cells, and her2st at the spot.

1. Synthetic Xenium sections with four cell types, aggregated to spots of Visium. Models learn from the spots of two
   sections and predict the nuclei of a third, whose cells were measured. Beside ours: the same with the nuclei's
   embeddings shuffled within spots (what a model of patches can know), the tile model spread evenly over the nuclei,
   multiple-instance learning by least squares in the manner of sCellST, and ours trained on the cells themselves.
2. her2st C2 to C5, one section left out in turn: models of nuclei, of tiles, and both combined, at the spot.
3. The public crop of a Xenium lung (200 cells, 338 genes), learned from the cells of one half and scored in the other.

Run as ``python -m benchmarks.cells_from_spots``. Prints Markdown tables and writes
``benchmarks/results/cells_from_spots.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.her2st import gene_sets, prepare
from benchmarks.measure import Steps, machine
from stimage_sd import contract
from stimage_sd.stats.spatial import pearson
from stimage_sd.tl._score.cross_validate import shallow_copy

SIZES_UM = {"one": 2000.0, "two": 2000.0, "new": 1500.0}
N_MARKERS = 5
SECTIONS = ("C2", "C3", "C4", "C5")
#: micrometers per pixel of the crop of the lung, which does not state any: its nuclei are 3 to 4 px wide
LUNG_MPP = 2.0


# --------------------------------------------------------------------------------------------------
# planted truth


def planted(folder: Path) -> dict[str, SpatialData]:
    """Synthetic Xenium sections whose cells are known, with the spots of a Visium array over them."""
    sections = {}
    for seed, (name, size) in enumerate(SIZES_UM.items()):
        path = sti.datasets.synthetic_xenium(
            folder / name, size_um=size, n_genes=9, n_markers=N_MARKERS, pixel_um=0.85, seed=seed
        )
        sections[name] = sti.io.xenium(path, he_image=path / "he_image.ome.tif", sample=name)
        sti.pp.aggregate(sections[name])
    sti.pp.tile(sections)
    for on in ("tiles", "nuclei"):
        sti.pp.embed(sections, on=on)
    return sections


def on_cells(sections: dict[str, SpatialData]) -> dict[str, SpatialData]:
    """The same sections tiled by a grid, where cells are learned directly."""
    copies = {name: shallow_copy(sdata) for name, sdata in sections.items()}
    for sdata in copies.values():
        del sdata.tables["spot_counts"]
        contract.activate(sdata, "counts", contract.COUNTS)
    sti.pp.tile(copies, layout="grid", size_um=100.0)
    sti.pp.embed(copies)
    return copies


def cell_scores(sdata: SpatialData, genes: list[str], predicted: np.ndarray) -> np.ndarray:
    """Correlation over nuclei per gene with the counts of measured cells."""
    table = contract.instances(sdata, "nuclei")
    rows, units = contract.align_to_instances(sdata, table, contract.Source("counts"))
    return pearson(np.log1p(predicted[rows]), np.log1p(np.asarray(units[:, genes].X.toarray(), np.float64)))


def of_nuclei(sdata: SpatialData, model: Any) -> np.ndarray:
    """Predicted means of all nuclei of the table, zero for those without a tile."""
    copy = shallow_copy(sdata)
    sti.tl.predict(copy, model, on="nuclei")
    made, table = copy.tables["nuclei_predictions"], contract.instances(sdata, "nuclei")
    means = np.zeros((table.n_obs, made.n_vars))
    means[table.obs_names.get_indexer(made.obs_names)] = made.X
    return means


def shuffled(sdata: SpatialData, seed: int = 0) -> SpatialData:
    """Exchange the embeddings of nuclei within each spot."""
    copy, random = shallow_copy(sdata), np.random.default_rng(seed)
    table = contract.instances(sdata, "nuclei").copy()
    within = contract.within_tiles(sdata, table)
    order = np.arange(table.n_obs)
    for tile in np.unique(within.tile[within.tile >= 0]):
        rows = np.flatnonzero(within.tile == tile)
        order[rows] = random.permutation(rows)
    for key in table.obsm:
        if key.startswith("X_"):
            table.obsm[key] = table.obsm[key][order]
    copy.tables["nuclei_features"] = table
    return copy


def evenly(sdata: SpatialData, model: Any) -> np.ndarray:
    """The tile model's prediction, spread evenly over the nuclei of each spot."""
    copy = shallow_copy(sdata)
    sti.tl.predict(copy, model)
    within = contract.within_tiles(sdata, contract.instances(sdata, "nuclei"))
    made = np.asarray(copy.tables["predictions"].X, np.float64)
    n = np.maximum(np.bincount(within.tile[within.inside], minlength=len(made)), 1)
    means = (made / n[:, None])[within.tile]
    means[within.tile < 0] = 0
    return means


def least_squares(train: dict[str, SpatialData], new: SpatialData, genes: list[str]) -> np.ndarray:
    """Multiple-instance learning in the manner of sCellST: a network per nucleus, summed, least squares on spots."""
    nuclei, spots, counts, first = [], [], [], 0
    for sdata in train.values():
        table = contract.instances(sdata, "nuclei")
        within = contract.within_tiles(sdata, table)
        tiles = contract.tiles(sdata)
        rows, units = contract.align_to_spots(sdata, tiles[tiles.obs["keep"].to_numpy()])
        spot_of = np.full(len(within.uncovered), -1)
        spot_of[rows] = np.arange(len(rows))
        inside = within.inside & (spot_of[within.tile] >= 0)
        nuclei.append(_standardized(table)[inside])
        spots.append(first + spot_of[within.tile[inside]])
        counts.append(units[:, genes].X.toarray())
        first += len(rows)
    features, spot, measured = jnp.asarray(np.concatenate(nuclei)), np.concatenate(spots), np.concatenate(counts)
    scale = measured.std(axis=0) + 1e-6
    n_hidden, (key, other) = 256, jax.random.split(jax.random.key(0))
    mean = np.log(np.expm1(np.maximum(measured.mean(axis=0) / (len(spot) / len(measured)), 1e-3)))
    parameters = {
        "hidden": jax.random.normal(key, (features.shape[1], n_hidden)) / np.sqrt(features.shape[1]),
        "out": 0.01 * jax.random.normal(other, (n_hidden, len(genes))) / np.sqrt(n_hidden),
        "bias": jnp.asarray(mean, jnp.float32),
    }

    def of(parameters: Any, features: Any) -> Any:
        return jax.nn.softplus(jax.nn.relu(features @ parameters["hidden"]) @ parameters["out"] + parameters["bias"])

    held = jnp.asarray(np.random.default_rng(0).random(len(measured)) < 0.2)

    def loss(parameters: Any, mask: Any) -> Any:
        summed = jax.ops.segment_sum(of(parameters, features), jnp.asarray(spot), len(measured))
        return ((((summed - measured) / scale) ** 2).mean(axis=1) * mask).sum() / mask.sum()

    optimizer = optax.adamw(1e-3, weight_decay=1e-2)

    @jax.jit
    def step(parameters: Any, state: Any) -> Any:
        update, state = optimizer.update(jax.grad(loss)(parameters, ~held), state, parameters)
        parameters = optax.apply_updates(parameters, update)
        return parameters, state, loss(parameters, held)

    state, best, kept, waited = optimizer.init(parameters), np.inf, parameters, 0
    while waited < 30:
        parameters, state, validation = step(parameters, state)
        waited += 1
        if float(validation) < best:
            best, kept, waited = float(validation), parameters, 0
    return np.asarray(of(kept, jnp.asarray(_standardized(contract.instances(new, "nuclei")))))


def _standardized(table: ad.AnnData) -> np.ndarray:
    values = np.asarray(table.obsm["X_efficientnet_lite0_stages"])
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-6)


def run_planted(n_members: int) -> pd.DataFrame:
    """Correlations over the nuclei of the new section, median over the markers."""
    with tempfile.TemporaryDirectory() as folder:
        sections = planted(Path(folder))
        train, new = {name: sdata for name, sdata in sections.items() if name != "new"}, sections["new"]
        genes = [gene for gene in contract.counts(new).var_names if not gene.startswith(("SIGNAL", "NOISE"))]
        fit: dict[str, Any] = {"genes": genes, "n_members": n_members}
        nuclei = sti.tl.fit_nb(train, on="nuclei", **fit)
        tiles = sti.tl.fit_nb(train, **fit)
        means = {
            "ours, from spots": of_nuclei(new, nuclei),
            "ours, nuclei shuffled within spots": of_nuclei(shuffled(new), nuclei),
            "tile model, spread evenly": evenly(new, tiles),
            "least squares (as sCellST), from spots": least_squares(train, new, genes),
        }
        direct = on_cells(sections)
        cells = sti.tl.fit_nb({name: direct[name] for name in train}, on="nuclei", **fit)
        means["ours, from cells (upper bound)"] = of_nuclei(direct["new"], cells)
        scores = {name: cell_scores(new, genes, values) for name, values in means.items()}
    frame = pd.DataFrame(scores, index=genes)
    return pd.DataFrame({"median": frame.median(), "lowest": frame.min(), "highest": frame.max()})


# --------------------------------------------------------------------------------------------------
# real tissue


def run_her2st(n_members: int, n_genes: int) -> pd.DataFrame:
    """Leave one section out in turn, and score at the spot."""
    sections = {name: sti.datasets.her2st(name) for name in SECTIONS}
    prepare(sections, Steps(), extractor="efficientnet_lite0_stages")
    for sdata in sections.values():
        sti.pp.segment_nuclei(sdata, tiles=list(contract.tiles(sdata).obs_names))
    sti.pp.embed(sections, on="nuclei")
    return pd.DataFrame([row for left_out in SECTIONS for row in _fold(sections, left_out, n_members, n_genes)])


def _fold(sections: dict[str, SpatialData], left_out: str, n_members: int, n_genes: int) -> Iterator[dict[str, Any]]:
    train = {name: sdata for name, sdata in sections.items() if name != left_out}
    new = sections[left_out]
    genes = gene_sets(train, None)["most_expressed_1000"][:n_genes]
    models: dict[str, Any] = {
        "tiles": sti.tl.fit_nb(train, genes=genes, n_members=n_members),
        "nuclei": sti.tl.fit_nb(train, genes=genes, n_members=n_members, on="nuclei"),
    }
    models["both"] = sti.tl.combine([models["tiles"], models["nuclei"]])
    for name, model in models.items():
        sti.tl.predict(new, model)
        scores = sti.tl.evaluate(new)
        yield {
            "left out": left_out, "model": name, "pearson": scores["pearson"].mean(),
            "best 50": scores["pearson"].nlargest(50).mean(), "coverage": scores["coverage"].mean(),
            "nll": scores["nll"].mean(),
        }  # fmt: skip


def run_lung(data: Path, n_members: int) -> pd.DataFrame:
    """Learn the cells of one half of the crop, and score the other, both ways round."""
    halves = {}
    for name in ("upper", "lower"):
        table = ad.read_h5ad(data / "xenium_he" / "NCBI858.h5ad")
        # x_pixel of this file is the row
        table.obsm["spatial"] = table.obs[["y_pixel", "x_pixel"]].to_numpy(np.float64)
        first = table.obsm["spatial"][:, 1] < np.median(table.obsm["spatial"][:, 1])
        half = table[first if name == "upper" else ~first].copy()
        halves[name] = sti.io.from_anndata(
            half, data / "xenium_he" / "NCBI858.jpg", sample=name, mpp=LUNG_MPP, spot_diameter_px=8 / LUNG_MPP
        )
        sti.pp.tile(halves[name], layout="grid", size_um=110.0, min_tissue=0.2)
    sti.pp.embed(halves)
    # at this resolution no nuclei can be outlined: circles around the places of the cells stand for them
    sti.pp.embed(halves, on="nuclei", shapes_key=contract.find_units(halves["upper"]).shapes)
    genes = sti.pp.select_genes(next(iter(halves.values())), n_top=50)
    rows = []
    for trained, scored in (("upper", "lower"), ("lower", "upper")):
        model = sti.tl.fit_nb({trained: halves[trained]}, genes=genes, on="nuclei", n_members=n_members, rank=4)
        sti.tl.predict(halves[scored], model, on="nuclei")
        scores = sti.tl.evaluate(halves[scored], key="nuclei_predictions")
        rows.append(
            {
                "learned from": trained, "scored on": scored, "cells": int(scores["n_tiles"].iloc[0]),
                "pearson": scores["pearson"].mean(), "best 10": scores["pearson"].nlargest(10).mean(),
                "coverage": scores["coverage"].mean(), "nll": scores["nll"].mean(),
                "nll_floor": scores["nll_floor"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    """Run all parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--parts", nargs="*", default=["planted", "her2st", "lung"])
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if "planted" in options.parts:
        frame = run_planted(options.members)
        results["planted"] = frame.to_dict()
        print(frame.round(3).to_markdown())
    if "her2st" in options.parts:
        frame = run_her2st(options.members, options.genes)
        results["her2st"] = frame.to_dict("records")
        print(frame.round(3).to_markdown(index=False))
        print(frame.groupby("model", sort=False).mean(numeric_only=True).round(3).to_markdown())
    data = Path(os.environ.get("STIMAGE_SD_DATA", "../shared/data"))
    if "lung" in options.parts and data.is_dir():
        frame = run_lung(data, options.members)
        results["lung"] = frame.to_dict("records")
        print(frame.round(3).to_markdown(index=False))
    path = Path(__file__).parent / "results" / "cells_from_spots.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
