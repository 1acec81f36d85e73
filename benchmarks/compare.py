"""The same work by several hands: paired runs, each in a process of its own, at several sizes.

A module of comparisons (``benchmarks/stain.py`` and others) has `WORK`, a `Comparison`. One run of one side is
``python -m benchmarks.compare MODULE SIDE SIZE``, which prints a line of JSON; `compare` runs the sides in turn, so
that what else the machine does falls on all alike, and gives a dict a size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Steps, machine, versions

RESULTS = Path(__file__).parent / "results"
#: what a side does: prepare for a size, untimed, and return the work, whose result are figures to keep; of work that
#: was done in part, the figure "times" says how many times as much the whole is
Side = Callable[[int], Callable[[], Mapping[str, Any] | None]]
OURS = "stimage-sd"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes
    ----------
    title
        What the work is, for the docs.
    unit
        What a size counts, such as ``"tiles"``.
    sizes
        Three of them, so that growth shows.
    sides
        By name; ``"stimage-sd"`` is ours, the others are peers or limits.
    reach
        For a peer, how many times as fast ours is to be: theirs over ours, in seconds.
    most_mb
        What our peak memory above the imports is to stay below, where that is asked for.
    repeats
        Runs in a process; with more than one the first, which compiles, is kept apart.
    at_most
        For a slow peer, the largest size it is run at; above, its seconds are scaled from there, and said to be.
    target
        The size that `reach` and `most_mb` are asked for; the middle one unless given.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    sides: Mapping[str, Side]
    reach: Mapping[str, float]
    most_mb: float | None = None
    repeats: int = 1
    at_most: Mapping[str, int] = field(default_factory=dict)
    target: int | None = None


class MissingPeerError(RuntimeError):
    """A side whose package is not installed."""


def run_side(work: Comparison, side: str, size: int) -> dict[str, Any]:
    """Run one side once, in this process."""
    steps = Steps()
    with steps.step("prepare"):
        job = work.sides[side](size)
    seconds, figures = [], None
    with steps.step("work"):
        for _ in range(work.repeats):
            begin = time.perf_counter()
            figures = job()
            seconds.append(time.perf_counter() - begin)
    times = dict(figures or {}).get("times", 1)
    seconds = [value * times for value in seconds]
    return {
        "side": side,
        "size": size,
        "seconds": statistics.median(seconds[1:] or seconds),
        "seconds_first": seconds[0],
        "peak_mb_above_imports": max(row["peak_mb_above_imports"] for row in steps.rows),
        "figures": dict(figures or {}),
        "versions": versions(),
    }


def child(module: str, side: str, size: int) -> dict[str, Any]:
    """Run one side once, in a new process with an empty cache."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compare", module, side, str(size)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STIMAGE_SD_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        missing = side != OURS and "ModuleNotFoundError" in done.stderr
        kind = MissingPeerError if missing else RuntimeError
        raise kind(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(module: str, *, runs: int = 5, sizes: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Run every side of a module's work at every size, in turn; give a case a size.

    Parameters
    ----------
    module
        Name of the module in `benchmarks`.
    runs
        Paired runs; seconds and ratios are their medians.
    sizes
        Instead of the work's own.

    Yields
    ------
    The case: seconds, peak memory and figures of each side, and the ratio of each peer's seconds to ours.
    """
    work: Comparison = importlib.import_module(f"benchmarks.{module}").WORK
    for size in sizes or work.sizes:
        rows: dict[str, list[dict[str, Any]]] = {side: [] for side in work.sides}
        for _ in range(runs):
            for side in work.sides:
                rows[side].append(child(module, side, min(size, work.at_most.get(side, size))))
        yield _case(work, size, rows)


def _case(work: Comparison, size: int, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    scale = {side: size / each[0]["size"] for side, each in rows.items()}
    seconds = {side: [row["seconds"] * scale[side] for row in each] for side, each in rows.items()}
    ratios = {
        side: statistics.median(theirs / ours for theirs, ours in zip(seconds[side], seconds[OURS], strict=True))
        for side in rows
        if side != OURS
    }
    peak = max(row["peak_mb_above_imports"] for row in rows[OURS])
    at_target = size == (work.target or work.sizes[len(work.sizes) // 2])
    met = {side: ratios[side] >= factor for side, factor in work.reach.items()} if at_target else {}
    if at_target and work.most_mb is not None:
        met["peak memory"] = peak <= work.most_mb
    return {
        "work": work.title,
        "unit": work.unit,
        "size": size,
        "sides": {
            side: {
                "seconds": round(statistics.median(seconds[side]), 4),
                "seconds_all": [round(value, 4) for value in seconds[side]],
                "seconds_first": round(statistics.median(row["seconds_first"] * scale[side] for row in each), 4),
                "scaled_from": each[0]["size"] if scale[side] != 1 else None,
                "peak_mb_above_imports": max(row["peak_mb_above_imports"] for row in each),
                "figures": each[-1]["figures"],
            }
            for side, each in rows.items()
        },
        "times_as_fast": {side: round(value, 2) for side, value in ratios.items()},
        "reach": dict(work.reach) if at_target else {},
        "met": met,
        "load": os.getloadavg()[0],
        "machine": machine(),
        "versions": {name: version for each in rows.values() for name, version in each[-1]["versions"].items()},
    }


def run(module: str, *, runs: int, sizes: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Compare, print a line of JSON a case, and keep them in ``benchmarks/results``."""
    cases = []
    for case in compare(module, runs=runs, sizes=sizes):
        print(json.dumps(case), flush=True)
        cases.append(case)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{module}.json").write_text(json.dumps(cases, indent=1) + "\n")
    return cases


def main() -> None:
    """Run one side once, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("side")
    parser.add_argument("size", type=int)
    options = parser.parse_args()
    work = importlib.import_module(f"benchmarks.{options.module}").WORK
    print(json.dumps(run_side(work, options.side, options.size)))


if __name__ == "__main__":
    main()
