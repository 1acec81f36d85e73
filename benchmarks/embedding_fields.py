"""Three fields of view of tiles, the default of `pp.embed`, beside one field and beside a pass per field.

Tiles of 112 µm lie side by side over the tissue of a synthetic slide (JPEG in an Aperio SVS, 0.5 µm per pixel).
`embedding_fields_lattice` has tiles of 55 µm that are 93 µm apart, as many per area as the spots of Visium.
EfficientNet-Lite0's stages embed them at 224 px on all cores. Opening, the tissue, imports, weights and a first batch
are not timed.

- one field of view: ``fields_of_view=(1.0,)``.
- three passes: ``wide_fields="separate"``, which embeds each field of each tile by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.slides import slide

PX = 224
ONE, PASSES = "one field of view", "three passes"
#: three fields are to take at most this many times as long as one
MOST = 1.7
Wide = Literal["pooled", "separate"]


def comparison(*, title: str, size_um: float, stride_um: float) -> Comparison:
    """Give the comparison of one layout of tiles."""
    side = partial(embedding, size_um=size_um, stride_um=stride_um)
    return Comparison(
        title=title,
        unit="px per side",
        sizes=(2_500, 5_000, 10_000),
        sides={
            ONE: partial(side, (1.0,), "pooled"),
            PASSES: partial(side, (1.0, 2.0, 4.0), "separate"),
            OURS: partial(side, (1.0, 2.0, 4.0), "pooled"),
        },
        reach={ONE: round(1 / MOST, 2)},
    )


def embedding(
    fields: tuple[float, ...], wide_fields: Wide, px: int, *, size_um: float, stride_um: float
) -> Callable[[], Mapping[str, Any]]:
    """Prepare a side: the slide opened, and tiled."""
    from stimage_sd import contract, io, pp
    from stimage_sd.models import get_extractor

    sdata = io.slide(slide(px))
    pp.tile(sdata, layout="grid", size_um=size_um, stride_um=stride_um, target_px=PX)
    network = get_extractor("efficientnet_lite0_stages")
    network(np.zeros((2, PX, PX, 3), np.uint8))
    if wide_fields == "pooled":
        network.cell_means(10 * 32, 10)

    def job() -> Mapping[str, Any]:
        pp.embed(sdata, network, fields_of_view=fields, wide_fields=wide_fields, context_rings=0)
        return {"n_tiles": len(contract.embeddings(sdata, network.name))}

    return job


WORK = comparison(title="Three fields of view, tiles side by side", size_um=PX / 2, stride_um=PX / 2)
