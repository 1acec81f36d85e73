"""One section from file to embeddings: seconds and peak memory, in a fresh process with a cold cache.

Run as ``python -m benchmarks.section``. Prints one line of JSON a run and writes them to
``benchmarks/results/section.json``.
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

from benchmarks.measure import Steps, machine, report


def run(section: str, extractor: str) -> dict[str, Any]:
    """Read, normalize, tile and embed one section of her2st, each step measured."""
    # imported, and its lazy parts touched, before the measuring begins
    import squidpy  # noqa: F401

    import stimage_sd as sti

    calls = (sti.datasets.her2st, sti.pp.stain_normalize, sti.pp.tile, sti.pp.embed)
    steps = Steps()
    with steps.step("read"):
        sdata = calls[0](section)
    with steps.step("stain_normalize"):
        calls[1](sdata)
    with steps.step("tile"):
        calls[2](sdata)
    with steps.step("embed"):
        calls[3](sdata, extractor)
    return {
        "section": section,
        "extractor": extractor,
        "tiles": int(sdata.tables["tiles"].n_obs),
        "seconds": round(sum(row["seconds"] for row in steps.rows), 2),
        "imports_mb": round(steps.start_megabytes),
        "peak_mb_above_imports": max(row["peak_mb_above_imports"] for row in steps.rows),
        "steps": steps.rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", default="C5")
    parser.add_argument("--extractor", default="efficientnet_lite0_stages")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="run in this process and print the result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/section.json"))
    options = parser.parse_args()
    if options.once:
        print(json.dumps(run(options.section, options.extractor)))
        return
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.section", "--once"]
    command += ["--section", options.section, "--extractor", options.extractor]
    results = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "STIMAGE_SD_CACHE": cache}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    results.sort(key=lambda result: result["seconds"])
    report(options.out, {"machine": machine(), "median": results[len(results) // 2], "runs": results})


if __name__ == "__main__":
    main()
