"""Laying a DAPI image on a real H&E: how often, how well, how fast, in how much memory; and what is refused.

Run as ``python -m benchmarks.register``. The DAPI is made from the hematoxylin of a real section: turned, scaled,
shifted, blurred, of another gamma, lit unevenly, noisy, its border cut, and in every second case with dark nuclei.
Each case runs in a process of its own, which begins with the imports alone. Prints a line of JSON a case, then the
summary, which is written to ``benchmarks/results/register.json``.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import dask.array as da
import numpy as np
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.measure import Steps, machine, report
from stimage_sd import contract
from stimage_sd.datasets._her2st import _locate
from stimage_sd.datasets._synthetic_xenium_images import TILE, write_ome_pyramid
from stimage_sd.image.nuclear_contrast import hematoxylin

# imported here, and not where they are first called and measured
_ = sti.io.codex, sti.io.slide, sti.io.xenium, sti.datasets.synthetic_xenium, sti.pp.register, sti.pp.tissue_mask

SECTIONS = ("C2", "C3", "C4", "C5")
#: micrometers a pixel of the H&E
MPP = 0.69
#: what is asked of the run: residual against the truth, µm, and in how many of the transforms
MOST_UM, LEAST_FOUND = 2.0, 0.95
#: rows beyond a strip that the blur needs, px
HALO = 8
#: side of the large image, px, and what one of its pixels is of a pixel of the sections it is made of
LARGE, LARGE_STEP = 60_000, 3


@dataclass(frozen=True)
class Dapi:
    """How a DAPI image is made from an H&E: ``matrix`` maps its pixels to those of the DAPI image."""

    matrix: tuple[tuple[float, float, float], ...]
    shape: tuple[int, int]
    rotation: float
    scale: float
    blur_px: float
    gamma: float
    noise: float
    inverted: bool
    mirrored: bool
    seed: int

    @classmethod
    def draw(cls, shape: tuple[int, int], seed: int, *, mirrored: bool = False) -> Dapi:
        """Draw a random similarity, and what else differs between the two images."""
        random = np.random.default_rng([17, seed])
        rotation, scale = random.uniform(-180.0, 180.0), float(np.exp(random.uniform(np.log(0.5), np.log(2.0))))
        turn = scale * np.exp(1j * np.radians(rotation))
        linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
        size = np.array(shape[::-1], dtype=np.float64)
        extent = np.ceil(np.abs(linear) @ size / TILE).astype(int) * TILE
        # up to a twentieth of the section lies beyond the border of the DAPI image
        shift = extent / 2 - linear @ size / 2 + random.uniform(-0.05, 0.05, 2) * extent
        matrix = np.vstack([np.column_stack([linear, shift]), [0.0, 0.0, 1.0]])
        return cls(
            matrix=tuple(tuple(float(value) for value in row) for row in matrix),  # type: ignore[misc]
            shape=(int(extent[1]), int(extent[0])),
            rotation=float(rotation),
            scale=scale,
            blur_px=float(random.uniform(0.5, 2.0)),
            gamma=float(random.uniform(0.6, 1.6)),
            noise=float(random.uniform(0.02, 0.08)),
            inverted=seed % 2 == 1,
            mirrored=mirrored,
            seed=seed,
        )

    def strips(self, stain: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the image from top to bottom, ``uint16 (TILE, x)``, from a stain of nuclei between 0 and 1."""
        height, width = self.shape
        # where the image is coarser than the H&E, a pixel's light is that of its whole area
        smooth = cv2.GaussianBlur(stain, (0, 0), 0.4 / self.scale) if self.scale < 1 else stain
        center = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
        phase = np.random.default_rng([18, self.seed]).uniform(0, 2 * np.pi)
        across = np.linspace(-1.0, 1.0, width, dtype=np.float32)
        for top in range(0, height, TILE):
            rows = min(TILE, height - top)
            down = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, top - HALO], [0.0, 0.0, 1.0]])
            to_stain = np.linalg.inv(center) @ np.linalg.inv(np.array(self.matrix)) @ down @ center
            light = cv2.warpAffine(
                smooth, to_stain[:2], (width, rows + 2 * HALO), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            )
            light = cv2.GaussianBlur(light, (0, 0), self.blur_px)[HALO : HALO + rows] ** np.float32(self.gamma)
            along = np.linspace(-1.0, 1.0, height, dtype=np.float32)[top : top + rows, None]
            lamp = 1.0 + 0.45 * (np.cos(phase) * across + np.sin(phase) * along) / np.sqrt(2)
            light = (light + 0.05) * lamp.astype(np.float32)
            random = np.random.default_rng([19, self.seed, top])
            light += self.noise * np.sqrt(light) * random.standard_normal(light.shape, np.float32)
            light = np.clip(light, 0.0, 2.0) * 2000.0
            yield (4000.0 - light if self.inverted else light).astype(np.uint16)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Carry points of the H&E over to the DAPI image, px."""
        matrix = np.array(self.matrix)
        return points @ matrix[:2, :2].T + matrix[:2, 2]


# --------------------------------------------------------------------------------------------------
# images


def image_of(section: str) -> Path:
    """Return the file of a section's H&E."""
    return next(path for path in _locate(section) if path.suffix == ".jpg")


def stain_of(rgb: np.ndarray) -> np.ndarray:
    """Return the hematoxylin of an image ``(y, x, 3)``, ``float32 (y, x)`` from 0 to 1."""
    stain = np.empty(rgb.shape[:2], np.float32)
    for top in range(0, len(rgb), TILE):
        stain[top : top + TILE] = hematoxylin(np.moveaxis(rgb[top : top + TILE], -1, 0))
    return np.clip(stain / np.percentile(stain[::8, ::8], 99.9), 0.0, 1.0)


def read_rgb(path: Path) -> np.ndarray:
    """Read an image whole, ``uint8 (y, x, 3)``."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def save_stain(file: Path, he: Path) -> tuple[int, int]:
    """Write the stain of an H&E as an array, and return its shape."""
    stain = stain_of(read_rgb(he))
    np.save(file, stain)
    return stain.shape


def write_stain(folder: Path, he: Path) -> tuple[Path, tuple[int, int]]:
    """Write the stain of an H&E into a folder, in a process of its own; return the file and the shape."""
    file = folder / f"stain_{he.parent.name}.npy"
    return file, apart(save_stain, file, he)


def write_dapi(path: Path, dapi: Dapi, stain: Path) -> None:
    """Write a DAPI image made from a stain as a pyramidal OME-TIFF, which states no pixel size."""
    about = {"axes": "YX", "Channel": {"Name": ["DAPI"]}}
    strips = dapi.strips(np.load(stain))
    write_ome_pyramid(path, strips, shape=dapi.shape, dtype=np.uint16, metadata=about, options={})


def tissue_points(he: Path, n_points: int = 2000) -> np.ndarray:
    """Return points spread over the tissue of an H&E, px."""
    sdata = sti.io.slide(he, mpp=MPP)
    sti.pp.tissue_mask(sdata)
    mask, step = contract.tissue(sdata)
    rows, columns = np.nonzero(mask)
    chosen = np.random.default_rng(0).choice(len(rows), n_points)
    return (np.column_stack([columns, rows])[chosen] + 0.5) * step[::-1]


# --------------------------------------------------------------------------------------------------
# cases


def place(
    sdata: SpatialData, dapi: Dapi, points: np.ndarray, pixel_um: float, *, mpp: float = MPP, fine: float = 1.0
) -> dict[str, Any]:
    """Register a section, measured, and compare with the truth.

    `pixel_um` is what a pixel of the DAPI is stated to have, `mpp` what one of the H&E has in truth, and `fine` how
    many pixels the section has to one of the points.
    """
    steps = Steps()
    result: dict[str, Any] = {}
    with steps.step("register"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sti.pp.register(sdata)
        except ValueError as error:
            result["refused"] = str(error)
        else:
            result = {"refused": None, **asdict(found)}
    matrix = contract.instrument_matrix(sdata)
    if matrix is not None:
        placed = dapi.apply(points) * pixel_um @ matrix[:2, :2].T + matrix[:2, 2]
        away = np.linalg.norm(placed / fine - points, axis=1) * mpp
        result |= {"error_um": round(float(np.median(away)), 3), "worst_um": round(float(away.max()), 3)}
    return result | {key: steps.rows[0][key] for key in ("seconds", "peak_mb_above_imports")}


def run(
    he: Path,
    file: Path,
    dapi: Dapi,
    points: np.ndarray,
    pixel_um: float,
    stated: float | None,
    mpp: float = MPP,
) -> dict[str, Any]:
    """Read an H&E, which states a resolution or none, and a DAPI image, and register them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdata = sti.io.codex(image=file, he_image=he, mpp=pixel_um)
    if stated is None and contract.info(sdata)["mpp"] is not None:
        raise RuntimeError(f"Expected an H&E that states no resolution, found {contract.info(sdata)['mpp']}.")
    if stated is not None:
        contract.register(sdata, sample="made", platform="codex", image=contract.IMAGE, mpp=stated)
    return place(sdata, dapi, points, pixel_um, mpp=mpp)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which begins with the imports and nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.register"])
    # a process that hangs says where
    watch: dict[str, Any] = {"initializer": faulthandler.dump_traceback_later, "initargs": (240,)}
    with ProcessPoolExecutor(1, mp_context=context, **watch) as pool:
        return pool.submit(function, *arguments).result(timeout=300)


def similarities(folder: Path, n_cases: int, *, section: str = "C2") -> list[dict[str, Any]]:
    """Register random similarities of a section, each in two ways.

    Told the scale, the DAPI states its true pixel size and the H&E none, as with an instrument. Not told, both are said
    to have the H&E's, so that the whole scale, 0.5 to 2, has to be found in the pictures.
    """
    he = image_of(section)
    points = apart(tissue_points, he)
    stain, shape = write_stain(folder, he)
    rows = []
    for seed in range(n_cases):
        dapi, file = Dapi.draw(shape, seed), folder / "dapi.ome.tif"
        apart(write_dapi, file, dapi, stain)
        for case, pixel_um, stated in (("told scale", MPP / dapi.scale, None), ("unknown scale", MPP, MPP)):
            row = {"case": case, "section": section, **of_dapi(dapi)}
            rows.append(show(row | apart(run, he, file, dapi, points, pixel_um, stated)))
    return rows


def others(folder: Path) -> list[dict[str, Any]]:
    """Try to lay the DAPI of one section on the H&E of another: neighbors in one block, and synthetic tissues."""
    rows = []
    for number, mine in enumerate(SECTIONS):
        stain, shape = write_stain(folder, image_of(mine))
        dapi, file = Dapi.draw(shape, 100 + number), folder / "dapi.ome.tif"
        apart(write_dapi, file, dapi, stain)
        for theirs in SECTIONS:
            if theirs != mine:
                row = {"case": "another section", "section": theirs, "dapi_of": mine, "scale": dapi.scale}
                found = apart(run, image_of(theirs), file, dapi, np.zeros((1, 2)), MPP / dapi.scale, None)
                rows.append(show(row | without_error(found)))
    for number in range(3):
        runs = [folder / f"synthetic_{number}_{side}" for side in (0, 1)]
        for side, path in enumerate(runs):
            apart(make_xenium, path, 10 * number + side)
        row = {"case": "another synthetic section", "section": f"seed {10 * number}"}
        rows.append(show(row | without_error(apart(run_xenium, runs[0], runs[1] / "he_image.ome.tif"))))
    return rows


def make_xenium(path: Path, seed: int) -> None:
    """Write a synthetic Xenium section that has no alignment."""
    sti.datasets.synthetic_xenium(path, size_um=1200.0, n_genes=3, seed=seed, align=False, pixel_um=0.425)


def run_xenium(path: Path, he: Path) -> dict[str, Any]:
    """Lay a synthetic Xenium section on an H&E that is not its own."""
    sdata = sti.io.xenium(path, he_image=he)
    dapi = Dapi.draw((8, 8), 0)
    return place(sdata, dapi, np.zeros((1, 2)), 1.0)


def without_error(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out the distance to a truth that there is none of."""
    return {key: value for key, value in row.items() if key not in ("error_um", "worst_um")}


def mirrored(folder: Path, n_cases: int = 3) -> list[dict[str, Any]]:
    """Register slides scanned from behind."""
    he = image_of("C4")
    points = apart(tissue_points, he)
    stain, shape = write_stain(folder, he)
    rows = []
    for seed in range(200, 200 + n_cases):
        dapi, file = Dapi.draw(shape, seed, mirrored=True), folder / "dapi.ome.tif"
        apart(write_dapi, file, dapi, stain)
        row = {"case": "from behind", "section": "C4", **of_dapi(dapi)}
        rows.append(show(row | apart(run, he, file, dapi, points, MPP / dapi.scale, None)))
    return rows


def small(folder: Path, n_cases: int = 8) -> list[dict[str, Any]]:
    """Register a field of 512 px: immunohistochemistry with brown nuclei, and a DAPI made from its hematoxylin.

    The file is said to hold a real DAPI panel beside it; its six panels are one and the same, which is stated.
    """
    whole = read_rgb(_locate("C2")[0].parents[2] / "registration" / "22_2.png")
    panels = [whole[:, left : left + 512] for left in range(0, whole.shape[1], 512)]
    real = any((panel != panels[0]).any() for panel in panels)
    he, file = folder / "field.png", folder / "dapi.ome.tif"
    cv2.imwrite(str(he), cv2.cvtColor(np.ascontiguousarray(panels[0]), cv2.COLOR_RGB2BGR))
    stain, _ = write_stain(folder, he)
    inner = np.random.default_rng(0).uniform(64, 448, (200, 2))
    rows = []
    for seed in range(300, 300 + n_cases):
        dapi = Dapi.draw((512, 512), seed)
        # a field at 40x: 0.25 µm a pixel
        apart(write_dapi, file, dapi, stain)
        row = {"case": "field of 512 px", "section": "22_2", "panels_differ": real, **of_dapi(dapi)}
        rows.append(show(row | apart(run, he, file, dapi, inner, 0.25 / dapi.scale, None, 0.25)))
    return rows


# --------------------------------------------------------------------------------------------------
# an image of 60,000 px a side


@dataclass
class Lazy:
    """Levels that are made a chunk at a time where they are asked for, and that know how often they were."""

    source: np.ndarray
    sides: list[int]
    read: list[int]

    @classmethod
    def over(cls, source: np.ndarray, side: int) -> Lazy:
        """Stretch a picture, ``(c, y, x)``, over `side` pixels."""
        sides = [side]
        while sides[-1] > 1024:
            sides.append(sides[-1] // 2)
        return cls(source, sides, [0] * len(sides))

    def levels(self) -> list[da.Array]:
        """Return the pyramid, finest first."""
        return [self._level(number, side) for number, side in enumerate(self.sides)]

    def _level(self, number: int, side: int) -> da.Array:
        chunks = (len(self.source), contract.CHUNK, contract.CHUNK)
        blank = da.zeros((len(self.source), side, side), chunks=chunks, dtype=self.source.dtype)

        def chunk(block: np.ndarray, block_info: dict | None = None) -> np.ndarray:
            if not block_info:
                return block
            self.read[number] += 1
            (_, _), (top, bottom), (left, right) = block_info[0]["array-location"]
            step = self.source.shape[1] / side
            to_source = np.array([[step, 0, (left + 0.5) * step - 0.5], [0, step, (top + 0.5) * step - 0.5]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            size = (right - left, bottom - top)
            first = int(max(0, top * step - 4))
            last = int(bottom * step + 5)
            to_source[1, 2] -= first
            planes = [cv2.warpAffine(plane[first:last], to_source, size, flags=flags) for plane in self.source]
            return np.stack(planes)

        return blank.map_blocks(chunk, dtype=self.source.dtype, meta=np.empty((0, 0, 0), self.source.dtype))


def mosaic() -> np.ndarray:
    """Return all four sections in one picture, ``uint8 (3, y, x)``, square."""
    side = LARGE // LARGE_STEP // 2
    whole = np.full((3, 2 * side, 2 * side), 235, np.uint8)
    for number, section in enumerate(SECTIONS):
        image = np.moveaxis(read_rgb(image_of(section)), -1, 0)[:, :side, :side]
        top, left = (number // 2) * side, (number % 2) * side
        whole[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return whole


def write_large(he: Path, dapi_file: Path) -> Dapi:
    """Write the mosaic, and a DAPI image of it, as arrays."""
    whole = mosaic()
    dapi = Dapi.draw(whole.shape[1:], 400)
    turn = np.exp(1j * np.radians(dapi.rotation))
    size = whole.shape[1]
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    matrix = np.vstack([np.column_stack([linear, size / 2 - linear @ [size / 2, size / 2]]), [0.0, 0.0, 1.0]])
    dapi = replace(dapi, matrix=tuple(map(tuple, matrix.tolist())), shape=(size, size), scale=1.0)
    np.save(he, whole)
    np.save(dapi_file, np.concatenate(list(dapi.strips(stain_of(np.moveaxis(whole, 0, -1)))))[None])
    return dapi


def run_large(he_file: Path, dapi_file: Path, dapi: Dapi) -> dict[str, Any]:
    """Register two images of 60,000 px a side whose chunks are made when they are read."""
    mpp = MPP / LARGE_STEP
    he, other = (Lazy.over(np.load(file), LARGE) for file in (he_file, dapi_file))
    sdata = SpatialData(
        images={
            contract.IMAGE: contract.build_image(he.levels(), mpp=mpp),
            contract.DAPI: contract.build_multichannel(other.levels(), channels=["DAPI"], pixel_um=mpp),
        }
    )
    contract.register(sdata, sample="large", platform="xenium", image=contract.IMAGE, mpp=mpp)
    points = np.random.default_rng(0).uniform(0.15, 0.85, (2000, 2)) * he.source.shape[1]
    # in pixels of the mosaic; the section's are a third of them
    found = place(sdata, dapi, points, MPP, fine=LARGE_STEP)
    chunks = [(side // contract.CHUNK + 1) ** 2 for side in he.sides]
    return {"read_of_he": he.read, "read_of_dapi": other.read, "chunks": chunks, **found}


def large(folder: Path) -> list[dict[str, Any]]:
    """Register a pair of 60,000 px a side without loading it."""
    files = folder / "large_he.npy", folder / "large_dapi.npy"
    dapi = apart(write_large, *files)
    return [show({"case": "60,000 px a side", "rotation": dapi.rotation} | apart(run_large, *files, dapi))]


# --------------------------------------------------------------------------------------------------
# what comes out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all cases of a kind, and whether what is asked of them holds."""
    result: dict[str, Any] = {"machine": machine()}
    for kind in dict.fromkeys(row["case"] for row in rows):
        chosen = [row for row in rows if row["case"] == kind]
        errors = [row.get("error_um", np.inf) for row in chosen]
        result[kind] = {
            "cases": len(chosen),
            "refused": sum(row["refused"] is not None for row in chosen),
            "seconds": [float(np.median(values := [row["seconds"] for row in chosen])), max(values)],
            "peak_mb": [float(np.median(values := [row["peak_mb_above_imports"] for row in chosen])), max(values)],
        }
        if not kind.startswith("another"):
            within = sum(error < MOST_UM for error in errors)
            placed = [error for error in errors if np.isfinite(error)]
            result[kind] |= {"within_2_um": within, "holds": within >= LEAST_FOUND * len(chosen)}
            result[kind]["median_and_worst_error_um"] = [float(np.median(placed)), max(placed)] if placed else None
        else:
            result[kind] |= {
                "holds": result[kind]["refused"] == len(chosen),
                "most_inliers": max(inliers_of(row) for row in chosen),
            }
    return result


def inliers_of(row: dict[str, Any]) -> int:
    """Return how many patches agreed, of a case that was refused as well."""
    if row["refused"] is None:
        return int(row["n_inliers"])
    return int(re.search(r"then (\d+) of", row["refused"]).group(1))  # type: ignore[union-attr]


def of_dapi(dapi: Dapi) -> dict[str, Any]:
    """Return what describes a DAPI image in a line."""
    values = {name: value for name, value in asdict(dapi).items() if name not in ("matrix", "inverted", "mirrored")}
    return {**values, "shape": list(dapi.shape), "dark_nuclei": dapi.inverted, "from_behind": dapi.mirrored}


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a case as a line of JSON."""
    short = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    short.pop("matrix", None)
    print(json.dumps(short), flush=True)
    return short


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/register.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = similarities(folder, options.cases)
        for kind in (others, mirrored, small, large):
            rows += kind(folder)
    report(options.out, {**summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
