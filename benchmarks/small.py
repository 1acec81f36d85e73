"""Whether a step is slower at small sizes than the simplest correct version of it: 50 tiles or spots, 10 genes.

Each step, ours and plain, runs in a process of its own with an empty cache of results: the first call, which loads what
is used, and the median of those after it. Imports are not timed; compiled code lies on disk, as after any earlier use.
The plain versions, in `benchmarks/small_plain.py`, are loops over tiles or genes of numpy, scipy and ONNX Runtime, on
tiles that are read one by one. They get the same section, from the same store; their results are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import stimage_sd as sti
from benchmarks import small_plain as plain
from benchmarks.compare import OURS
from benchmarks.measure import machine
from benchmarks.small_section import EXTRACTOR, columns, fitted, normalized, section
from stimage_sd import contract
from stimage_sd.stats import spatial
from stimage_sd.stats.lattice import neighbor_graph
from stimage_sd.stream.driver import run_over_tiles

#: calls in a process, after the first: so many, unless they take longer than this, seconds, and then these at least
CALLS, ENOUGH, LEAST = 50, 2.0, 3
PLAIN = "plain"
Work = Callable[[], Any]


class Step(NamedTuple):
    """A step: ours and its plain version, each of which prepares and gives the work; and how far results may differ.

    The difference is relative where values are above 1.
    """

    ours: Callable[[], Work]
    plain: Callable[[], Work]
    tolerance: float


def stain_ours() -> Work:
    """Tiles of the normalized image, through the tile stream; of each a few pixels are kept."""
    sdata = normalized()
    tiles, tiling = contract.tiles(sdata), contract.tiling(sdata)
    centers, side, target = np.asarray(tiles.obsm["spatial"]), tiling["side_px"], tiling["target_px"]
    levels = contract.levels(sdata, contract.NORMALIZED)
    return lambda: run_over_tiles(
        levels, centers, plain.kept, sides=[side], target=target, key="kept", shape=plain.kept_shape(target)
    )[:, 0]


def embed_ours() -> Work:
    """`stimage_sd.pp.embed`, one field of view."""
    sdata = section("raw")

    def work() -> np.ndarray:
        sti.pp.embed(sdata, EXTRACTOR, fields_of_view=(1.0,), context_rings=0)
        return np.asarray(contract.tiles(sdata).obsm[contract.feature_key(EXTRACTOR)])

    return work


def predict_ours() -> Work:
    """`stimage_sd.tl.predict`: means, variances and intervals, strangeness and the picture to draw on beside."""
    sdata, model = section("predicted"), fitted()

    def work() -> np.ndarray:
        sti.tl.predict(sdata, model)
        table = contract.predictions(sdata)
        return np.stack([np.asarray(table.X), *(table.layers[name] for name in plain.LAYERS)])

    return work


def evaluate_ours() -> Work:
    """`stimage_sd.tl.evaluate`: nine scores."""
    sdata = section("predicted")
    return lambda: sti.tl.evaluate(sdata)[list(plain.SCORES)].to_numpy()


def morans_i_ours() -> Work:
    """`stimage_sd.stats.spatial.morans_i`, neighbors given."""
    _, measured, positions = columns()
    weights = neighbor_graph(positions)
    return lambda: spatial.morans_i(measured, weights)


def pearson_ours() -> Work:
    """`stimage_sd.stats.spatial.pearson`."""
    predicted, measured, _ = columns()
    return lambda: spatial.pearson(predicted, measured)


def iou_ours() -> Work:
    """`stimage_sd.stats.spatial.pattern_iou`, from coordinates on."""
    predicted, measured, positions = columns()
    return lambda: spatial.pattern_iou(predicted, measured, positions)


STEPS = {
    "stain normalization": Step(stain_ours, plain.stain, 3.0),
    "embedding": Step(embed_ours, plain.embed, 1e-3),
    "predict": Step(predict_ours, plain.predict, 1e-3),
    "evaluate": Step(evaluate_ours, plain.evaluate, 1e-5),
    "Moran's I": Step(morans_i_ours, plain.morans_i, 1e-10),
    "Pearson": Step(pearson_ours, plain.pearson, 1e-10),
    "IoU": Step(iou_ours, plain.iou, 1e-10),
}


def run_side(step: str, side: str) -> dict[str, Any]:
    """Run one side of a step in this process: seconds of the first call, and of those after it."""
    work = (STEPS[step].ours if side == OURS else STEPS[step].plain)()
    seconds: list[float] = []
    result = None
    while len(seconds) <= CALLS and (len(seconds) <= LEAST or sum(seconds[1:]) < ENOUGH):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return {"cold": seconds[0], "warm": statistics.median(seconds[1:]), "result": np.asarray(result).tolist()}


def child(step: str, side: str) -> dict[str, Any]:
    """Run one side of a step in a new process with an empty cache of results."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.small", step, side]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STIMAGE_SD_CACHE": cache}
        out = Path(cache) / "out.json"
        done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return dict(json.loads(out.read_text()))


def measure(runs: int) -> list[dict[str, Any]]:
    """Run both sides of every step in turn, `runs` times, and compare what they give."""
    rows = []
    for name, step in STEPS.items():
        # compiles what this machine has not compiled yet
        child(name, OURS)
        pairs = [{side: child(name, side) for side in (PLAIN, OURS)} for _ in range(runs)]
        ours, expected = (np.array(pairs[-1][side]["result"]) for side in (OURS, PLAIN))
        difference = (np.abs(ours - expected) / np.maximum(1, np.abs(expected))).max()
        if not difference <= step.tolerance:
            raise ValueError(f"{name}: ours and plain differ by {difference:g}, expected at most {step.tolerance:g}.")
        row: dict[str, Any] = {"step": name, "max_difference": float(difference), "machine": machine()}
        for kind in ("warm", "cold"):
            for side in (OURS, PLAIN):
                row[f"{kind} {side}"] = statistics.median(pair[side][kind] for pair in pairs)
            row[f"{kind} times_as_fast"] = statistics.median(pair[PLAIN][kind] / pair[OURS][kind] for pair in pairs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One row per step."""
    lines = [
        "| step | ours, ms | plain, ms | times as fast | asked | first call: ours, ms | plain, ms | times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = "at least 1, met" if row["warm times_as_fast"] >= 1 else "at least 1, **not met**"
        warm, cold = (
            [f"{1e3 * row[f'{kind} {side}']:.3g}" for side in (OURS, PLAIN)] + [f"{row[f'{kind} times_as_fast']:.2f}"]
            for kind in ("warm", "cold")
        )
        lines.append(f"| {' | '.join([row['step'], *warm, met, *cold])} |")
    return "\n".join(lines)


def main() -> None:
    """Run one side of a step, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("side", choices=(OURS, PLAIN))
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(json.dumps(run_side(options.step, options.side)))


if __name__ == "__main__":
    main()
