"""200,000 nuclei of a slide of 20,000 px: embedded and predicted, in seconds and peak memory.

The slide is synthetic. The nuclei are circles of 8 µm around random places on its tissue, so that no segmentation is
timed. The model predicts 50 genes with five members, and was fitted on a small synthetic section. Beside it, the bare
network: the same number of squares of 64 px through ONNX Runtime on as many threads, without reading or cutting.

Run as ``python -m benchmarks.nuclei_slide``. Prints one line of JSON and writes it to
``benchmarks/results/nuclei_slide.json``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np

# touched before the measuring begins: memory is counted above the imports
import squidpy  # noqa: F401
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.measure import Steps, machine, report
from benchmarks.slides import made, slide
from stimage_sd import contract
from stimage_sd.models import InstanceModel, get_extractor

SIDE, N_NUCLEI, MPP = 20_000, 200_000, 0.5
TILE_UM, NUCLEUS_UM = 112.0, 8.0
N_GENES, N_MEMBERS = 50, 5
EXTRACTOR = "efficientnet_lite0_stages"


def fit_model(path: Path) -> None:
    """Fit the model on a small section, and save it."""
    with tempfile.TemporaryDirectory() as folder:
        run = sti.datasets.synthetic_visium(Path(folder) / "run", n_spots=80, n_genes=N_GENES)
        section = sti.io.visium(run, image=run / "image.tif")
        sti.pp.tile(section, size_um=TILE_UM)
        sti.pp.embed(section, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
        sti.pp.segment_nuclei(section)
        sti.pp.embed(section, EXTRACTOR, on="nuclei")
        genes = list(contract.counts(section).var_names)
        sti.tl.fit_nb(section, genes=genes, on="nuclei", n_members=N_MEMBERS, max_epochs=2).save(path)


def scatter(sdata: SpatialData, n: int) -> None:
    """Write circles at random places of the tissue as nuclei."""
    mask, (down_y, down_x) = contract.tissue(sdata)
    random = np.random.default_rng(0)
    rows, columns = np.nonzero(mask)
    chosen = random.integers(0, len(rows), n)
    x, y = (columns[chosen] + random.random(n)) * down_x, (rows[chosen] + random.random(n)) * down_y
    frame = gpd.GeoDataFrame({"radius": np.full(n, NUCLEUS_UM / MPP / 2)}, geometry=gpd.points_from_xy(x, y))
    contract.write_shapes(sdata, frame, name=contract.NUCLEI)


def bare(n: int) -> float:
    """Seconds of the network alone on so many squares, from those of a part."""
    network, part = get_extractor(EXTRACTOR), 4096
    squares = np.random.default_rng(0).integers(0, 255, (part, 64, 64, 3), dtype=np.uint8)
    batches = [squares[start : start + 128] for start in range(0, part, 128)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(network, batches[:4]))
        begin = time.perf_counter()
        list(pool.map(network, batches))
        return (time.perf_counter() - begin) * n / part


def run(n: int, out: Path) -> dict[str, Any]:
    """Do the whole job, each step measured."""
    model = sti.models.load(made("nuclei_model.stimage", fit_model))
    assert isinstance(model, InstanceModel)
    path, calls = slide(SIDE), (sti.io.slide, sti.pp.tile, sti.pp.embed, sti.tl.predict)
    steps = Steps()
    with steps.step("open, tile"):
        sdata = calls[0](path)
        calls[1](sdata, layout="grid", size_um=TILE_UM)
    scatter(sdata, n)
    with steps.step("embed tiles"):
        calls[2](sdata, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
    with steps.step("embed nuclei"):
        calls[2](sdata, EXTRACTOR, on="nuclei")
    with steps.step("predict nuclei, in memory"):
        calls[3](sdata, model, on="nuclei")
    del sdata.tables["nuclei_predictions"]
    with steps.step("predict nuclei, on disk"):
        calls[3](sdata, model, on="nuclei", out=out)
    with steps.step("predict tiles"):
        calls[3](sdata, model)
    seconds = {row["step"]: row["seconds"] for row in steps.rows}
    n_squares = 2 * sdata.tables["nuclei_features"].n_obs
    alone = bare(n_squares)
    return {
        "machine": machine(), "nuclei": n_squares // 2, "tiles": sdata.tables["tiles"].n_obs, "steps": steps.rows,
        "nuclei_a_second": round(n_squares / 2 / seconds["embed nuclei"], 1),
        "seconds_of_the_bare_network": round(alone, 1),
        "share_of_the_bare_network": round(alone / seconds["embed nuclei"], 3),
    }  # fmt: skip


def main() -> None:
    """Run once and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nuclei", type=int, default=N_NUCLEI)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STIMAGE_SD_CACHE"] = str(Path(folder) / "cache")
        result = run(options.nuclei, Path(folder) / "out")
    report(Path(__file__).parent / "results" / "nuclei_slide.json", result)


if __name__ == "__main__":
    main()
