"""Ten million transcripts onto five thousand spots: this package, and `spatialdata.aggregate`, on the same data.

Run as ``python -m benchmarks.aggregate``. The transcripts are made, written as a SpatialData store, and counted by
each in a process of its own; where the peer does not finish in ten minutes, both count the largest part of them that
it does finish. The counts are compared, in the peer's polygons and, circles against brute force, in exact discs.
Writes ``benchmarks/results/aggregate.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
import spatialdata
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel
from spatialdata.transformations import Identity

import stimage_sd as sti
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract

N_GENES = 300
N_SPOTS = 5_000
SPOT_UM, PITCH_UM, MPP = 55.0, 100.0, 0.25
#: transcripts in a partition, as those of a Xenium run lie in row groups
PARTITION = 500_000
LIMIT_SECONDS = 600


def make(path: Path, *, n_transcripts: int, seed: int = 0) -> None:
    """Write a section with transcripts and spots on a lattice, both in pixels of its H&E.

    In its own micrometers, as a run has them, the peer would have to transform the points first; version 0.7.3 gives
    them the y of other points then, where a store holds more than two partitions.
    """
    columns = int(np.ceil(np.sqrt(N_SPOTS)))
    rows, across = np.divmod(np.arange(N_SPOTS), columns)
    pitch = PITCH_UM / MPP
    centers = np.column_stack([across + 0.5 * (rows % 2) + 0.6, rows * np.sqrt(3) / 2 + 0.6]) * pitch
    extent = centers.max(axis=0) + 0.6 * pitch
    circles = gpd.GeoDataFrame({"radius": np.full(N_SPOTS, SPOT_UM / 2 / MPP)}, geometry=shapely.points(centers))
    # what the peer makes of circles by itself
    discs = gpd.GeoDataFrame(geometry=circles.buffer(circles["radius"], quad_segs=16))
    here = {"global": Identity()}
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for number, start in enumerate(range(0, n_transcripts, PARTITION)):
            parts.append(Path(folder) / f"part-{number:04d}.parquet")
            size = min(PARTITION, n_transcripts - start)
            part = draw_part(np.random.default_rng([seed, number]), size, extent)
            # the peer joins partitions by their index
            part.set_index(np.arange(start, start + size)).to_parquet(parts[-1])
        points = PointsModel.parse(
            dd.read_parquet(parts), coordinates={"x": "x", "y": "y"}, feature_key="feature_name", transformations=here
        )
        sdata = SpatialData(
            points={"transcripts": points},
            shapes={
                "circles": ShapesModel.parse(circles, transformations=here),
                "discs": ShapesModel.parse(discs, transformations=here),
            },
        )
        contract.register(sdata, sample="made", platform="xenium", image=None, mpp=MPP)
        sdata.write(path)


def draw_part(random: np.random.Generator, size: int, extent: np.ndarray) -> pd.DataFrame:
    """Transcripts of one partition: clustered, as cells are; genes from rare to frequent."""
    cells = random.uniform((0, 0), extent, (size // 100 + 1, 2))
    xy = (cells[random.integers(0, len(cells), size)] + random.normal(0, 4.0 / MPP, (size, 2))).clip(0, extent)
    share = random.permutation(1 / np.arange(1, N_GENES + 1))
    names = pd.Index([f"GENE{number}" for number in range(N_GENES)])
    genes = random.choice(N_GENES, size, p=share / share.sum())
    return pd.DataFrame(
        {
            "x": xy[:, 0].astype(np.float32),
            "y": xy[:, 1].astype(np.float32),
            "feature_name": pd.Categorical.from_codes(genes, names),
            "qv": random.uniform(0, 40, size).astype(np.float32),
        }
    )


def run(store: Path, way: str, out: Path | None) -> dict[str, Any]:
    """Aggregate the store's transcripts one way, measured; the counts are written to `out`."""
    sdata = spatialdata.read_zarr(store)
    steps = Steps()
    with steps.step(way):
        if way == "spatialdata":
            table = spatialdata.aggregate(
                values="transcripts", by="discs", values_sdata=sdata, by_sdata=sdata, value_key="feature_name"
            )["table"]
        elif way == "hex":
            sti.pp.aggregate(sdata)
            table = sdata["spot_counts"]
        else:
            sti.pp.aggregate(sdata, onto="spots", shapes_key=way, min_quality=None, controls=(), min_units=0)
            table = sdata["spot_counts"]
    if out is not None:
        counts = sp.csr_matrix(table[:, sorted(table.var_names)].X, dtype=np.int64)
        counts.eliminate_zeros()
        counts.sort_indices()
        sp.save_npz(out, counts)
    return {"way": way, "transcripts_in_spots": int(table.X.sum()), "spots": table.n_obs, **steps.rows[0]}


def brute_force(store: Path) -> sp.csr_matrix:
    """Count transcripts in exact discs with a tree of the centers, partition by partition."""
    sdata = spatialdata.read_zarr(store)
    centers = shapely.get_coordinates(sdata["circles"].geometry.to_numpy())
    tree, radius = cKDTree(centers), float(sdata["circles"]["radius"].iloc[0])
    genes = {name: number for number, name in enumerate(sorted(f"GENE{number}" for number in range(N_GENES)))}
    total = sp.csr_matrix((len(centers), N_GENES), dtype=np.int64)
    for part in sdata["transcripts"][["x", "y", "feature_name"]].partitions:
        frame = part.compute()
        xy = frame[["x", "y"]].to_numpy(dtype=np.float64)
        distance, nearest = tree.query(xy)  # the discs do not overlap
        inside = distance <= radius
        gene = frame["feature_name"].astype(str).map(genes).to_numpy()[inside]
        ones = np.ones(inside.sum(), dtype=np.int64)
        total += sp.coo_matrix((ones, (nearest[inside], gene)), shape=total.shape).tocsr()
    return total


def in_a_process(store: Path, way: str, out: Path | None, *, warm: Path, limit: int | None) -> dict[str, Any] | None:
    """Run one way in a process of its own; `None` where it does not end in time."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aggregate", "--way", way, "--store", str(store)]
    command += ["--warm", str(warm), *(["--counts", str(out)] if out is not None else [])]
    try:
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
            env=os.environ,
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(n_transcripts: int, folder: Path) -> dict[str, Any]:
    """Make data, run every way, compare counts."""
    warm = folder / "warm.zarr"
    make(warm, n_transcripts=2_000)
    while True:
        store = folder / f"{n_transcripts}.zarr"
        make(store, n_transcripts=n_transcripts)
        peer = in_a_process(store, "spatialdata", folder / "spatialdata.npz", warm=warm, limit=LIMIT_SECONDS)
        if peer is not None:
            break
        n_transcripts //= 2
    names = ("discs", "circles")
    ways: Any = [in_a_process(store, way, folder / f"{way}.npz", warm=warm, limit=None) for way in names]
    hexagonal = in_a_process(store, "hex", None, warm=warm, limit=None)
    counts = {way: sp.load_npz(folder / f"{way}.npz") for way in ("spatialdata", "discs", "circles")}
    return {
        "machine": machine(),
        "transcripts": n_transcripts,
        "genes": N_GENES,
        "spots": N_SPOTS,
        "runs": [peer, *ways, hexagonal],
        "times_faster": round(peer["seconds"] / ways[0]["seconds"], 1),
        "equal_to_spatialdata": bool((counts["discs"] != counts["spatialdata"]).nnz == 0),
        "circles_equal_to_brute_force": bool((counts["circles"] != brute_force(store)).nnz == 0),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transcripts", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/aggregate.json"))
    parser.add_argument("--way", help="run one way in this process: spatialdata, discs, circles or hex")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--warm", type=Path, help="a small store to count first, so that nothing is compiled later")
    parser.add_argument("--counts", type=Path)
    options = parser.parse_args()
    if options.way:
        run(options.warm, options.way, None)
        print(json.dumps(run(options.store, options.way, options.counts)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(options.out, compare(options.transcripts, Path(folder)))


if __name__ == "__main__":
    main()
