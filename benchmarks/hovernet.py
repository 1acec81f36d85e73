"""Cells of an H&E region by the small HoVer-Net, from the slide's file to outlines with types.

The region is a synthetic Aperio slide at 0.5 µm per pixel, all of which counts as tissue. A size is a number of windows
of 640 px that overlap by 128 px: 100 windows are 5,248 px a side. All sides have the same weights and every core. The
weights were fitted to two synthetic Xenium sections. Opening the slide, reading the weights and a first window are not
timed.

- ours: ``tl.predict_cells`` with its defaults, up to shapes and table in the section. It also averages the features of
  each nucleus and samples the features of places without nuclei.
- torch: the same network in eager mode, channels last, window by window. OpenSlide reads the window from the slide.
  Then the post-processing of ``benchmarks/hovernet_nuclei.py``, as published. Nuclei count if their center lies in the
  core of a window, and their features are not computed.
- the network alone: the session that ours runs, in ONNX Runtime, on windows that are in memory. It reads and finds
  nothing, and is a limit. As in ours, it has one thread, and runs one window on each core at once.

Figures: number of nuclei, seconds of the processor, and for torch `max_difference`, the largest difference of its maps
of a part of a window from ours, beside `largest`, the largest absolute value.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# touched before the measuring begins: what is counted is above the imports
import numpy as np
import squidpy  # noqa: F401
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.cells import fitted
from benchmarks.compare import OURS, Comparison
from benchmarks.hovernet_nuclei import CORE, MARGIN, WINDOW, Maps, published
from benchmarks.measure import with_cpu_seconds
from benchmarks.slides import made, needs_bench, slide
from stimage_sd import contract
from stimage_sd.models import CellClassifier
from stimage_sd.models._hovernet_weights import arrays_in_authors_naming

MPP = 0.5
#: windows of the smallest slide
SMALLEST = 4
TORCH, ALONE = "torch, channels last", "network alone (ONNX Runtime)"
REFERENCE = Path(__file__).parent.parent / "tests" / "parity" / "hovernet_reference.py"
Job = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Network:
    """A network that all sides run: how it is made, and how ours finds the cells of a section with it."""

    make: Callable[[], CellClassifier]
    find: Callable[[SpatialData, CellClassifier], int]


def comparison(network: Network, *, title: str, sizes: tuple[int, ...], at_most: Mapping[str, int]) -> Comparison:
    """Give the comparison of one network."""
    sides = {OURS: ours, TORCH: by_torch, ALONE: alone}
    return Comparison(
        title=title,
        unit="windows of 640 px",
        sizes=sizes,
        target=sizes[-1],
        sides={name: partial(side, network) for name, side in sides.items()},
        reach={TORCH: 1.5, ALONE: 0.85},
        at_most=at_most,
    )


# --------------------------------------------------------------------------------------------------
# the sides


def ours(network: Network, n_windows: int) -> Job:
    """Prepare ours: the section opened, all of it tissue; imports and first calls are behind it."""
    model = network.make()
    sti.pp.segment_nuclei(sti.io.slide(slide(_side(SMALLEST))))
    sdata = sti.io.slide(slide(_side(n_windows)))
    contract.write_tissue(sdata, np.ones((8, 8), bool), downsample=(_side(n_windows) / 8,) * 2)
    model(_windows(SMALLEST)[:1])
    return with_cpu_seconds(lambda: {"nuclei": network.find(sdata, model)})


def by_torch(network: Network, n_windows: int) -> Job:
    """Prepare torch's: the slide opened, the network built."""
    import openslide

    model = network.make()
    maps_of = _in_torch(model)
    reader = openslide.OpenSlide(slide(_side(n_windows)))
    difference = _difference(model, maps_of)

    def count(left: int, top: int) -> int:
        window = np.asarray(reader.read_region((left, top), 0, (WINDOW, WINDOW)))[..., :3]
        maps = maps_of(window)
        found = published(maps, maps.types.argmax(axis=0), by_boxes=False)
        # at a border of the slide, the core reaches to the border
        low = [0 if start == 0 else MARGIN for start in (left, top)]
        high = [WINDOW if start + WINDOW >= _side(n_windows) else MARGIN + CORE for start in (left, top)]
        centers = np.array([one.center for one in found]).reshape(-1, 2)
        return int(((centers >= low) & (centers < high)).all(axis=1).sum())

    def job() -> Mapping[str, Any]:
        return {"nuclei": sum(count(left, top) for top, left in _corners(n_windows)), **difference}

    return with_cpu_seconds(job)


def alone(network: Network, n_windows: int) -> Job:
    """Prepare the network alone: the package's own session, windows in memory."""
    model = network.make()
    windows = _windows(n_windows)
    model.maps(windows[:1, :64, :64])

    def run(number: int) -> int:
        (maps,) = model._session.run(["embedding"], {"tiles": windows[number : number + 1]})
        return int(maps.shape[1])

    def job() -> Mapping[str, Any]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {"maps": sum(pool.map(run, range(n_windows)))}

    return with_cpu_seconds(job)


# --------------------------------------------------------------------------------------------------
# what they share


def _side(n_windows: int) -> int:
    """Side of a slide of so many windows, px."""
    return WINDOW + CORE * (round(n_windows**0.5) - 1)


def _corners(n_windows: int) -> list[tuple[int, int]]:
    starts = range(0, _side(n_windows) - WINDOW + 1, CORE)
    return [(top, left) for top in starts for left in starts]


def _windows(n_windows: int) -> np.ndarray:
    """Read windows into memory, ``uint8 (n_windows, 640, 640, 3)``."""
    import openslide

    reader = openslide.OpenSlide(slide(_side(n_windows)))
    corners = _corners(n_windows)
    return np.stack([np.asarray(reader.read_region((x, y), 0, (WINDOW, WINDOW)))[..., :3] for y, x in corners])


def _in_torch(model: CellClassifier) -> Callable[[np.ndarray], Maps]:
    """Give a function from a window, ``uint8 (y, x, 3)``, to maps, by torch with the model's weights."""
    try:
        import torch
    except ImportError as error:
        raise needs_bench("torch") from error
    found = importlib.util.spec_from_file_location("hovernet_reference", REFERENCE)
    assert found is not None
    assert found.loader is not None
    reference: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(reference)
    reference.N_TYPES = len(model.classes)
    size = model.size
    network = reference.HoVerNet(
        size.width, size.depths, size.dense, size.kernel_size, size.padding == "same", size.pad_stem
    )
    weights = {name: torch.from_numpy(array) for name, array in arrays_in_authors_naming(model.module).items()}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"Expected the same weights, found {missing} missing and {unexpected} too many.")
    network = network.eval().to(memory_format=torch.channels_last)

    def maps_of(window: np.ndarray) -> Maps:
        batch = torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            nuclear, hv, types = network(batch.contiguous(memory_format=torch.channels_last))
            return Maps(nuclear.softmax(1)[0, 1].numpy(), hv[0].numpy(), types.softmax(1)[0].numpy())

    return maps_of


def _difference(model: CellClassifier, maps_of: Callable[[np.ndarray], Maps]) -> dict[str, float]:
    """Compare the maps of both sides on a part of a window."""
    part = _windows(SMALLEST)[0, 256:384, 256:384]
    theirs, ours = maps_of(part), model.maps(part[None])
    pairs = ((theirs.nuclear, ours.nuclear[0]), (theirs.hv, ours.hv[0]), (theirs.types, ours.types[0]))
    return {
        "max_difference": max(float(np.abs(one - other).max()) for one, other in pairs),
        "largest": max(float(np.abs(one).max()) for one, _ in pairs),
    }


def _small() -> CellClassifier:
    """Give the small network, fitted once and kept; its images have the slide's resolution."""
    model: Any = sti.models.load(made("cells.stimage", _fit))
    return replace(model, mpp=MPP)


def _fit(path: Path) -> None:
    folder = path.parent / "fitted"
    folder.mkdir()
    fitted(folder).save(path)


def _predict_cells(sdata: SpatialData, model: CellClassifier) -> int:
    sti.tl.predict_cells(sdata, model)
    return len(sdata.shapes[contract.NUCLEI])


WORK = comparison(
    Network(_small, _predict_cells),
    title="Cells of a region by the small HoVer-Net",
    sizes=(4, 25, 100),
    at_most={},
)
