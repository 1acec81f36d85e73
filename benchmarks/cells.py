"""Cells found and typed: the small HoVer-Net on real patches, and a large slide's memory, seams and speed.

``python -m benchmarks.cells patches`` leaves out one of nine H&E patches at a time (``$STIMAGE_SD_DATA/nuclei``), and
then all patches of a field: the nine show three fields only, mirrored and moved, so that leaving out one leaves its
mirror image in. ``python -m benchmarks.cells slide`` finds the cells of a synthetic slide of 20,000 px a side, stops
and goes on, and does the same on the slide moved by half a tile.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.compare import RESULTS
from benchmarks.measure import Steps, machine, report
from benchmarks.nuclei import ours
from stimage_sd import contract
from stimage_sd.image.label_maps import trace_objects
from stimage_sd.models import CellClassifier

MPP = 0.25
CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
#: patches of the same tissue
FIELDS = {"0": "A", "1": "A", "2": "A", "3": "B", "4": "B", "5": "B", "6": "C", "7": "C", "8": "C"}
SHOWN = ["f1", "panoptic_quality", "aggregated_jaccard", "dice", "accuracy", "mean_f1"]


def section(image: np.ndarray, instances: np.ndarray, types: np.ndarray, folder: Path, name: str) -> SpatialData:
    """A patch as a section, its nuclei as polygons with a type each."""
    path = folder / f"{name}.png"
    cv2.imwrite(str(path), image[..., ::-1])
    sdata = sti.io.slide(path, mpp=MPP, sample=name)
    numbers = np.unique(instances)[1:]
    rings = [outline + 0.5 for outline in trace_objects(instances, numbers)]
    shapes = [shapely.Polygon(ring).buffer(0.5, cap_style="square", join_style="mitre") if len(ring) > 2
              else shapely.MultiPoint(ring).buffer(0.5, cap_style="square").envelope for ring in rings]  # fmt: skip
    kinds = [CLASSES[int(np.bincount(types[instances == number])[1:].argmax())] for number in numbers]
    frame = gpd.GeoDataFrame({"cell_type": pd.Categorical(kinds)}, geometry=shapes)
    contract.write_shapes(sdata, frame.assign(geometry=frame.geometry.buffer(0)), name=contract.NUCLEI)
    sti.pp.tile(sdata, layout="grid", size_um=256 * MPP, min_tissue=0.0)
    return sdata


class Watershed:
    """The watershed of `pp.segment_nuclei`, as a finder of cells that knows one type."""

    classes, mpp, n_values, key = ("nucleus",), MPP, 1, "watershed-of-patches"

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the nuclei of patches."""
        return np.stack([ours(image) for image in images]), np.ones((*images.shape[:3], 1), np.float32)


def on_patches(data: Path, *, n_epochs: int, out: Path) -> list[dict[str, Any]]:
    """Scores of held-out patches, one row per model and way of holding out."""
    nine = np.load(data / "patches.npz")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cohort = {
            str(n): section(*parts, Path(folder), str(n))
            for n, parts in enumerate(zip(nine["images"], nine["instances"], nine["types"], strict=True))
        }
        fit = partial(
            sti.tl.fit_cell_classifier, mpp=MPP, tile_px=128, n_epochs=n_epochs, learning_rate=2e-3, batch_size=4
        )
        recipes = {"HoVer-Net, small": fit, "watershed": lambda cohort: Watershed()}
        ways: dict[str, dict[str, Any]] = {
            "a patch": {"strategy": "leave-one-section-out"},
            "a field": {"strategy": "leave-one-patient-out", "patients": FIELDS},
        }
        for way, how in ways.items():
            for name, recipe in recipes.items():
                table = sti.tl.cross_validate_cells(cohort, {name: recipe}, out=out / way.replace(" ", "_"), **how)
                every = table[table["cell_type"] == "all"].pivot(index="section", columns="metric", values="value")
                means = every[SHOWN].mean().round(3).to_dict()
                seconds = round(table["fit_seconds"].mean(), 1)
                rows.append({"held out": way, "model": name, **means, "seconds a fit": seconds})
    return rows


def on_a_slide(folder: Path, *, size: int, model: CellClassifier) -> dict[str, Any]:
    """Cells of a large slide, and of the same moved by half a tile: numbers, seconds, memory."""
    run = folder / f"slide_{size}"
    if not run.exists():
        sti.datasets.synthetic_slide(run, size=size)
    found: dict[str, Any] = {}
    sdata = sti.io.slide(run / "slide.svs")
    sti.pp.tissue_mask(sdata)
    moved = _moved(sdata, 128)
    sti.pp.tissue_mask(moved)
    steps = Steps()
    for name, each in (("as it is", sdata), ("moved by half a tile", moved)):
        with steps.step(name):
            sti.tl.predict_cells(each, model)
        found[name] = {"n_cells": contract.cell_types(each).n_obs, **steps.rows[-1]}
    image = np.random.default_rng(0).integers(0, 256, (8, 640, 640, 3)).astype(np.uint8)
    model.maps(image[:1])
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda n: model.maps(image[n : n + 1]), range(len(image))))
    found["network alone, mm2 a second"] = round(8 * (512 * model.mpp / 1000) ** 2 / (time.perf_counter() - started), 3)
    mask, scale = contract.tissue(sdata)
    tissue = mask.sum() * scale[0] * scale[1] * (0.5 / 1000) ** 2
    found["all, mm2 of tissue a second"] = round(tissue / found["as it is"]["seconds"], 3)
    shift = found["moved by half a tile"]["n_cells"] / found["as it is"]["n_cells"] - 1
    return {**found, "difference of numbers": f"{shift:+.3%}", "tissue_mm2": round(float(tissue), 1)}


def fitted(folder: Path) -> CellClassifier:
    """Fit the small network to two synthetic Xenium sections; it is kept in the folder."""
    path = folder / "cells.stimage"
    if not path.exists():
        reference = sti.datasets.synthetic_reference(n_markers=4)
        sections = {}
        for seed in (11, 12):
            run = folder / f"xenium_{seed}"
            sti.datasets.synthetic_xenium(run, size_um=450, n_genes=6, seed=seed, pixel_um=0.425, n_markers=4)
            sections[run.name] = sti.io.xenium(run, he_image=run / "he_image.ome.tif", sample=run.name)
            sti.pp.annotate_cells(sections[run.name], reference, merge=reference.uns["merge"])
        sti.tl.fit_cell_classifier(sections, n_epochs=14, tile_px=128, batch_size=4, learning_rate=3e-3).save(path)
    return sti.models.load(path)


def _moved(sdata: SpatialData, pixels: int) -> SpatialData:
    """The same slide, with a margin of glass on the left and on top."""
    level = contract.levels(sdata, contract.image_name(sdata))[0].data
    padded = da.pad(level, ((0, 0), (pixels, 0), (pixels, 0)), constant_values=244).rechunk((3, 1024, 1024))
    levels = [padded]
    while min(levels[-1].shape[1:]) > 2000:
        levels.append(da.coarsen(np.mean, levels[-1], {1: 2, 2: 2}, trim_excess=True).astype(np.uint8))
    moved = SpatialData(images={contract.IMAGE: contract.build_image(levels)})
    contract.register(moved, sample="moved", platform="slide", image=contract.IMAGE, mpp=contract.info(sdata)["mpp"])
    return moved


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("patches", "slide"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("STIMAGE_SD_DATA", ".")) / "nuclei")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stimage-sd-slides")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--model", type=Path, help="a cell classifier, for `slide`; one is fitted where none is given")
    options = parser.parse_args()
    if options.what == "patches":
        rows = on_patches(options.data, n_epochs=options.epochs, out=options.folder / "cells")
        print(pd.DataFrame(rows).to_markdown(index=False))
        report(RESULTS / "cells_patches.json", {"rows": rows, "machine": machine()})
        return
    model = fitted(options.folder) if options.model is None else sti.models.load(options.model)
    found = on_a_slide(options.folder, size=options.size, model=model)
    print(found)
    report(RESULTS / "cells_slide.json", {**found, "machine": machine()})


if __name__ == "__main__":
    main()
