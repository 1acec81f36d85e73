"""A slide of 40,000 x 40,000 px from file to embeddings: seconds and peak memory, in a fresh process, cold cache.

Run as ``python -m benchmarks.slide``. The slide is synthetic and is painted once, into ``--folder``: as an Aperio SVS,
and the same tiles once more as a plain pyramidal TIFF that says nothing about its scanner. Prints one line of JSON and
writes it to ``benchmarks/results/slide.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Steps, machine, report

SIZE = 40_000
#: what is asked of the run
MOST_MB, MOST_OPENING_S = 1500, 2.0


def make_slides(folder: Path, size: int) -> dict[str, Path]:
    """Paint the slide, unless it is there, and write its tiles once more without Aperio's descriptions."""
    import numpy as np
    import tifffile

    from stimage_sd.datasets import synthetic_slide

    aperio = folder / f"slide_{size}" / "slide.svs"
    plain = folder / f"plain_{size}.tif"
    if not aperio.is_file():
        synthetic_slide(aperio.parent, size=size)
    if not plain.is_file():
        with tifffile.TiffFile(aperio) as source, tifffile.TiffWriter(plain, bigtiff=True) as target:
            for number, level in enumerate(source.series[0].levels):
                page = level.keyframe

                def tiles(page: tifffile.TiffPage = page) -> Iterator[bytes]:
                    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                        source.filehandle.seek(offset)
                        yield source.filehandle.read(count)

                target.write(
                    tiles(),
                    shape=page.shape,
                    dtype=np.uint8,
                    tile=(page.tilelength, page.tilewidth),
                    photometric="ycbcr",
                    subsampling=(2, 2),
                    compression="jpeg",
                    subfiletype=int(number > 0),
                    resolution=(2e4 / 4**number,) * 2,
                    resolutionunit="CENTIMETER",
                    metadata=None,
                    software=False,
                )
    return {"aperio": aperio, "plain": plain}


def run(path: Path, size_um: float, n_tiles: int) -> dict[str, Any]:
    """Open, mask and tile the slide, and embed its first tiles, each step measured."""
    # imported, and its lazy parts touched, before the measuring begins
    import squidpy  # noqa: F401

    import stimage_sd as sti

    calls = (sti.io.slide, sti.pp.tissue_mask, sti.pp.tile, sti.pp.embed)
    steps = Steps()
    with steps.step("open"):
        sdata = calls[0](path)
    with steps.step("tissue_mask"):
        calls[1](sdata)
    with steps.step("tile"):
        calls[2](sdata, size_um=size_um)
    tiles = sdata.tables["tiles"]
    n_all, n_kept = tiles.n_obs, int(tiles.obs["keep"].sum())
    sdata.tables["tiles"] = tiles[:n_tiles].copy()
    with steps.step("embed"):
        calls[3](sdata)
    return {
        "slide": path.suffix.lstrip("."),
        "levels": [int(sdata.images["he"][scale]["image"].shape[2]) for scale in sdata.images["he"].children],
        "mpp": sdata.attrs["stimage_sd"]["mpp"],
        "tiles": n_all,
        "tiles_kept": n_kept,
        "embedded": list(sdata.tables["tiles"].obsm["X_efficientnet_lite0_stages"].shape),
        "imports_mb": round(steps.start_megabytes),
        "peak_mb_above_imports": max(row["peak_mb_above_imports"] for row in steps.rows),
        "steps": steps.rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stimage-sd-slides")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the slide, px")
    parser.add_argument(
        "--size-um", type=float, default=108.0, help="side of a tile, µm; by default some 18,000 touch tissue"
    )
    parser.add_argument("--tiles", type=int, default=500, help="tiles that are embedded")
    parser.add_argument("--once", type=Path, help="run on this file, in this process, and print the result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slide.json"))
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(run(options.once, options.size_um, options.tiles)))
        return
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.slide"]
    command += ["--size-um", str(options.size_um), "--tiles", str(options.tiles), "--once"]
    results = {}
    for name, path in make_slides(options.folder, options.size).items():
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "STIMAGE_SD_CACHE": cache}
            done = subprocess.run([*command, str(path)], env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        opening = results[name]["steps"][0]["seconds"]
        results[name]["met"] = results[name]["peak_mb_above_imports"] < MOST_MB and opening < MOST_OPENING_S
    report(options.out, {"machine": machine(), "side_px": options.size, **results})


if __name__ == "__main__":
    main()
