"""Cells of an H&E region by HoVer-Net at its published size: the comparison of ``benchmarks/hovernet.py``.

A window takes about 4e12 operations. Of larger regions four windows are run, and their seconds are scaled by the number
of windows. No weights come with the package: the weights are random, and the bias of the nuclear map is such that a
fifth of the pixels is nuclear. Which nuclei are found means nothing, and the time depends little on it. Ours finds the
cells block by block and merges the blocks, as ``tl.predict_cells`` does. It leaves out the features of places without
nuclei, which take as long as 2.6 windows in a section of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from spatialdata import SpatialData

from benchmarks.compare import OURS
from benchmarks.hovernet import ALONE, CORE, MARGIN, MPP, SMALLEST, TORCH, Network, _windows, comparison
from stimage_sd import contract
from stimage_sd.models import CellClassifier
from stimage_sd.nn.hovernet import SIZES, HoVerNet
from stimage_sd.stream.nuclei_blocks import find_in_blocks, lay_blocks, stitch

CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
#: variance that the normalization layers are given
VARIANCE = 4.0
#: share of the pixels that are nuclear
NUCLEAR = 0.2


def _random() -> CellClassifier:
    """Give the published size with random weights, whose nuclear map has a useful threshold."""
    network = HoVerNet(len(CLASSES), size=SIZES["published"], rngs=nnx.Rngs(0))
    for _, statistic in nnx.to_flat_state(nnx.state(network, nnx.BatchStat)):
        if float(statistic[...].min()) == 1.0:  # a variance; the values of random layers would grow beyond all numbers
            statistic[...] = statistic[...] * VARIANCE
    parts: dict[str, Any] = {"classes": CLASSES, "size": SIZES["published"], "mpp": MPP, "tile_px": 256}
    nuclear = CellClassifier.of(network, **parts).maps(_windows(SMALLEST)[:1, 256:384, 256:384]).nuclear
    bias = network.nuclear.maps.bias
    assert bias is not None
    threshold = float(np.quantile(nuclear, 1 - NUCLEAR))
    bias[...] = bias[...].at[1].add(-np.log(threshold / (1 - threshold)))
    return CellClassifier.of(network, **parts)


def _find(sdata: SpatialData, model: CellClassifier) -> int:
    """Find the cells of all blocks."""
    pyramid = contract.levels(sdata, contract.image_name(sdata))
    height, width = pyramid[0].shape[1:]
    blocks = lay_blocks(width, height, downsample=1, core=CORE, margin=MARGIN)
    parts = find_in_blocks(
        pyramid, blocks, model, key=f"cells-{model.key}", n_jobs=None, description="cells", n_values=model.n_values
    )
    return len(stitch(list(parts)).centers)


WORK = comparison(
    Network(_random, _find),
    title="Cells of a region by HoVer-Net at its published size",
    sizes=(4, 25, 100),
    at_most={OURS: 4, TORCH: 4, ALONE: 4},
)
