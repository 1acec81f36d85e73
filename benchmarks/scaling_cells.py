"""What a nucleus costs, and the steps on a slide of a million nuclei, for docs/scaling.md.

Run as ``python -m benchmarks.scaling_cells``. Writes ``benchmarks/results/scaling_cells.json``.

``cost``: a small synthetic slide is segmented, its nuclei are embedded and predicted, and everything is written.
Seconds are of the processor. Bytes are those of the store on disk.

``growth``: the steps that need no network, on a slide of so many nuclei on a lazy blank image: merging blocks, writing
the shapes, embedding by a function that costs nothing, predicting, drawing, writing and reading. Each size runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Steps, machine, report
from benchmarks.slides import slide

MPP, TILE_UM, NUCLEUS_PX, N_POINTS = 0.5, 112.0, 16.0, 16
N_GENES, N_MEMBERS = 50, 5
EXTRACTOR, CHEAP, N_FEATURES = "efficientnet_lite0_stages", "cheap", 176
#: side of the square that a nucleus has for itself, px: 10,000 nuclei per mm²
PITCH = 20


def size_of(path: Path) -> int:
    """Bytes of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def cheap(tiles: np.ndarray) -> np.ndarray:
    """Return as many features as the default network, for next to nothing."""
    pixels = tiles[:, ::8, ::8, :].reshape(len(tiles), -1)[:, :N_FEATURES].astype(np.float32)
    return np.asarray(pixels + 0.01 * np.arange(len(tiles), dtype=np.float32)[:, None])


# --------------------------------------------------------------------------------------------------
# one nucleus


def cost(side: int) -> dict[str, Any]:
    """Run all steps on a synthetic slide, and return what a nucleus takes."""
    import stimage_sd as sti

    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        seconds[name] = time.process_time() - begin

    def prepare(sdata: Any, *, layout: str) -> None:
        sti.pp.tile(sdata, layout=layout, size_um=TILE_UM)
        sti.pp.embed(sdata, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)

    model = _model(prepare)
    for _ in range(2):  # the first compiles
        sdata = sti.io.slide(slide(side))
        prepare(sdata, layout="grid")
        _all_steps(sdata, model, step)
    nuclei, table, predicted = (
        sdata.shapes["nuclei"],
        sdata.tables["nuclei_features"],
        sdata.tables["nuclei_predictions"],
    )
    mm2 = sdata.tables["tiles"].n_obs * (TILE_UM / 1000) ** 2
    with tempfile.TemporaryDirectory() as folder:
        outlines = nuclei.copy()
        outlines.attrs = {}  # transformations, which Parquet does not take
        outlines.to_parquet(Path(folder) / "nuclei.parquet")
        table.write_zarr(Path(folder) / "features.zarr")
        predicted.write_zarr(Path(folder) / "predictions.zarr")
        disk = {
            path.stem: (path.stat().st_size if path.is_file() else size_of(path)) for path in Path(folder).iterdir()
        }
    counts = {"segmentation": len(nuclei), "embedding": table.n_obs, "predicting": predicted.n_obs}
    return {
        "nuclei": len(nuclei),
        "mm2_of_tiles": mm2,
        "points_a_nucleus": float(np.mean(nuclei.geometry.count_coordinates())),
        "cpu_s_a_nucleus": {name: seconds[name] / counts[name] for name in counts},
        "segmentation_cpu_s_a_mm2": seconds["segmentation"] / mm2,
        "disk_bytes_a_nucleus": {
            "shapes": disk["nuclei"] / len(nuclei),
            "features": disk["features"] / table.n_obs,
            f"predictions of {N_GENES} genes": disk["predictions"] / predicted.n_obs,
        },
    }


def _model(prepare: Callable[..., None], extractor: str = EXTRACTOR) -> Any:
    """Fit a model of nuclei on a small synthetic section."""
    import stimage_sd as sti
    from stimage_sd import contract

    with tempfile.TemporaryDirectory() as folder:
        path = sti.datasets.synthetic_visium(Path(folder) / "run", n_spots=80, n_genes=N_GENES)
        section = sti.io.visium(path, image=path / "image.tif")
        prepare(section, layout="spots")
        sti.pp.segment_nuclei(section)
        sti.pp.embed(section, extractor, on="nuclei")
        genes = list(contract.counts(section).var_names)
        return sti.tl.fit_nb(section, extractor=extractor, genes=genes, on="nuclei", n_members=N_MEMBERS, max_epochs=2)


def _all_steps(sdata: Any, model: Any, step: Callable[[str], Any]) -> None:
    import stimage_sd as sti

    with step("segmentation"):
        sti.pp.segment_nuclei(sdata)
    with step("embedding"):
        sti.pp.embed(sdata, EXTRACTOR, on="nuclei")
    with step("predicting"):
        sti.tl.predict(sdata, model, on="nuclei")


# --------------------------------------------------------------------------------------------------
# a million nuclei


def blank(side: int) -> Any:
    """Return a section on a lazy blank image, with tiles all over."""
    import dask.array as da
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    import stimage_sd as sti
    from stimage_sd import contract

    image = Image2DModel.parse(
        da.full((3, side, side), 180, chunks=(3, 1024, 1024), dtype=np.uint8),
        dims=("c", "y", "x"), c_coords=("r", "g", "b"), scale_factors=[4],
    )  # fmt: skip
    sdata = sti.io.from_spatialdata(SpatialData(images={"he": image}), image="he", mpp=MPP, sample="blank")
    contract.write_tissue(sdata, np.ones((side // 20,) * 2, dtype=bool), downsample=(20.0, 20.0))
    sti.pp.tile(sdata, layout="grid", size_um=TILE_UM)
    return sdata


def parts_of(n: int, side: int) -> list[Any]:
    """Return outlines around jittered places, in blocks of 1,024 px; one in 50 was found by two blocks."""
    import shapely

    from stimage_sd.stream.nuclei_blocks import Nuclei

    random = np.random.default_rng(0)
    across = side // PITCH
    lattice = np.stack(np.divmod(random.permutation(across**2)[:n], across), axis=1)
    centers = (lattice + 0.5) * PITCH + random.uniform(-2, 2, (n, 2))
    block = (centers // 1024).astype(int) @ [1000, 1]
    again = random.permutation(n)[: n // 50]
    places, block = np.concatenate([centers, centers[again] + 1]), np.concatenate([block, block[again] + 1])
    angle = 2 * np.pi * np.arange(N_POINTS) / N_POINTS
    circle = NUCLEUS_PX / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    parts = []
    for number in np.unique(block):
        own = places[block == number]
        outlines = shapely.polygons(np.round(own[:, None] + circle))
        parts.append(Nuclei(outlines, own, random.random(len(own)), random.random(len(own)), np.zeros((len(own), 0))))
    return parts


def growth(n: int) -> dict[str, Any]:
    """Run the steps of so many nuclei; return seconds on the clock, processor seconds and peak memory of each."""
    import matplotlib.pyplot as plt
    import spatialdata

    import stimage_sd as sti
    from stimage_sd import contract
    from stimage_sd.pp._segment_nuclei import _frame
    from stimage_sd.stream.nuclei_blocks import stitch

    sti.models.register_extractor(CHEAP, cheap, input_size=64, embedding_size=N_FEATURES, weights_hash=CHEAP)

    def prepare(sdata: Any, *, layout: str) -> None:
        sti.pp.tile(sdata, layout=layout, size_um=TILE_UM)
        sti.pp.embed(sdata, CHEAP, fields_of_view=(1.0,), context_rings=0)

    model = _model(prepare, CHEAP)
    side = int(np.ceil(np.sqrt(n / 0.9))) * PITCH
    sdata = blank(side)
    sti.pp.embed(sdata, CHEAP, fields_of_view=(1.0,), context_rings=0)
    steps, cpu = Steps(), {}
    parts = parts_of(n, side)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        begin = time.process_time()
        with steps.step(name):
            yield
        cpu[name] = round(time.process_time() - begin, 2)

    with step("merge blocks"):
        nuclei = stitch(parts)
    del parts
    with step("write shapes"):
        contract.write_shapes(sdata, _frame(nuclei, MPP), name="nuclei")
    del nuclei
    with step("embed, no network"):
        sti.pp.embed(sdata, CHEAP, on="nuclei")
    table = sdata.tables["nuclei_features"]
    # a section of one color has no features that vary
    table.obsm[f"X_{CHEAP}"][:] = np.random.default_rng(1).normal(size=(1, 2 * N_FEATURES)).astype(np.float32)
    table.obsm[f"X_{CHEAP}"] += np.random.default_rng(2).random((table.n_obs, 1), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        with step("predict on disk"):
            sti.tl.predict(sdata, model, on="nuclei", out=Path(folder) / "out")
        gene = model.genes[0]
        with step("draw a gene of the whole slide"):
            sti.pl.prediction(sdata, gene, key="nuclei_predictions")
        plt.close("all")
        with step("draw a gene in a window"):
            sti.pl.prediction(sdata, gene, key="nuclei_predictions", zoom=(0, 0, 2000, 2000))
        plt.close("all")
        with step("draw nuclei"):
            sti.pl.cells(sdata, "area")
        plt.close("all")
        with step("write GeoJSON"):
            sti.io.write_geojson(sdata, Path(folder) / "nuclei.geojson", key="nuclei")
        with step("write shapes and tables"):
            small = spatialdata.SpatialData(
                shapes={"nuclei": sdata.shapes["nuclei"]}, tables={"nuclei_features": table}
            )
            small.write(Path(folder) / "store.zarr")
        with step("read shapes and tables"):
            spatialdata.read_zarr(Path(folder) / "store.zarr")
        disk = {name: size_of(Path(folder) / name) for name in ("out", "store.zarr")}
    with step("predict in memory"):
        sti.tl.predict(sdata, model, on="nuclei")
    for row in steps.rows:
        row["cpu_s"] = cpu[row["step"]]
    return {"nuclei": len(sdata.shapes["nuclei"]), "side_px": side, "steps": steps.rows, "disk_bytes": disk}


def child(n: int) -> dict[str, Any]:
    """Run `growth` in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scaling_cells", "--grow", str(n)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="side of the synthetic slide, px")
    parser.add_argument("--nuclei", type=int, nargs="*", default=[200_000, 1_000_000])
    parser.add_argument("--grow", type=int, help="run the steps of so many nuclei in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["STIMAGE_SD_CACHE"] = cache
        if options.grow:
            print(json.dumps(growth(options.grow)))
            return
        results = {
            "machine": machine(),
            "cost": cost(options.size) if options.size else None,
            "growth": [child(n) for n in options.nuclei],
        }
    report(Path(__file__).parent / "results" / "scaling_cells.json", results)


if __name__ == "__main__":
    main()
