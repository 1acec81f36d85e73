"""Explaining tiles as `tl.explain` does by default, and by the package `lime` on torch, to the same stability.

Tiles of a synthetic section with 64 nuclei each, one gene of a fitted model, EfficientNet-Lite0 with its ImageNet
weights at 224 px, and three fields of view, the default of `pp.embed`. Both sides hide nuclei in the mean color of the
background, and never the background. Opening the section, fitting, imports, reading the weights and a first batch are
not timed. The sides:

- ours: ``tl.explain`` with its defaults, which adds copies until the scores are stable.
- lime, torch: ``LimeImageExplainer.explain_instance`` as it comes (batches of ten), tile by tile. Its classifier puts
  the background back, lays each copy over the center of the two wider fields, and embeds the three fields by timm's
  network in torch, channels last. The wide fields of the section are pooled, so what a copy changes in its squares is
  added to the stored embedding, as in ours. The model's own heads predict from the embeddings.

`lime` does not say how many copies are enough. So the number is found first, and this is not timed: the smallest
multiple of 64 with which explanations of three seeds agree as well as three of ours by default. Agreement is the mean
correlation of the scores over pairs of seeds, on one tile. For this, copies of `lime` are embedded by our extractor,
whose embeddings equal torch's to rounding. The first copies of a long explanation are those of a short one. `lime` is
then timed on `PART` copies per tile, and its time multiplied.

The number is found on the first tile, which is the size that the target is for. The other tiles need more copies: ours
draws the most that it may there, and `lime` is timed with the number of the first tile.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.lime import PX, _extractor, _section, _torch
from benchmarks.slides import made

if TYPE_CHECKING:
    from stimage_sd.tl._explain.tile_views import OpenedTiles

FIELDS, TILES, SEEDS = (1.0, 2.0, 4.0), (31, 12, 45, 50), (0, 1, 2)
#: the gene of the model that is explained
GENE = 0
#: copies are counted in steps of so many, up to so many
STEP, MOST = 64, 1536
#: copies that lime is timed on
PART = 128
LIME_TORCH = "lime, torch"
Job = Callable[[], Mapping[str, Any]]
Embed = Callable[[np.ndarray], np.ndarray]


def ours(n_tiles: int) -> Job:
    """Prepare ours: the section opened, a first tile behind it."""
    from stimage_sd import tl

    sdata, model = _section(FIELDS, TILES)
    tl.explain(sdata, model, model.genes[GENE], tiles=TILES[-1:], n_samples=16)
    agreement = _found()["ours"]

    def job() -> Mapping[str, Any]:
        tl.explain(sdata, model, model.genes[GENE], tiles=TILES[:n_tiles])
        copies = sdata.tables["explanations"].obs["n_samples"].tolist()
        return {"nuclei": len(sdata.shapes["nuclei_explained"]), "copies": copies, "agreement": agreement}

    return job


def by_lime(n_tiles: int) -> Job:
    """Prepare lime's: the tiles and their nuclei in memory, the network built."""
    from lime.lime_image import LimeImageExplainer

    found = _found()
    embed = _torch()
    tiles = [_Tile(*opened, embed) for opened in _opened(n_tiles)]
    tiles[0].classify(tiles[0].pixels[:1])

    def job() -> Mapping[str, Any]:
        n_nuclei = 0
        for tile in tiles:
            explained = LimeImageExplainer(random_state=SEEDS[0]).explain_instance(
                tile.pixels[0], tile.classify, labels=(0,), top_labels=None, hide_color=tile.color,
                num_samples=PART, segmentation_fn=lambda _, tile=tile: tile.segments,
            )  # fmt: skip
            n_nuclei += len(explained.local_exp[0]) - 1
        times = found["copies"] / PART
        return {"nuclei": n_nuclei, "copies": found["copies"], "agreement": found["lime"], "times": times}

    return job


# --------------------------------------------------------------------------------------------------
# what they share


class _Tile:
    """A tile as `lime` explains it: its three fields of view, its nuclei, and a classifier of its copies.

    Segment 0 is the background, which the classifier puts back: `lime` hides every segment.
    """

    def __init__(self, row: int, pixels: np.ndarray, segments: np.ndarray, opened: OpenedTiles, embed: Embed) -> None:
        self.row, self.pixels, self.segments, self._embed = row, pixels, segments, embed
        from stimage_sd.tl._explain.tile_views import pooled_shift

        self._outputs = opened.stand_ins.outputs
        self._background = segments == 0
        (stored,) = opened.stand_ins.embedded
        self._shift = pooled_shift(stored, row, self._embeddings(pixels[:1])[0])
        self.color = tuple(int(value) for value in pixels[0][self._background].mean(axis=0))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Predict copies of the tile, ``uint8 (n, PX, PX, 3)``."""
        copies = np.where(self._background[..., None], self.pixels[0], images)
        embedded = self._embeddings(copies) + self._shift
        return np.asarray(self._outputs(self.row, [embedded], np.array([GENE]))["mean"]).astype(np.float64)

    def _embeddings(self, copies: np.ndarray) -> np.ndarray:
        """Embed the three fields of view of copies."""
        fields = [copies]
        for field, around in zip(FIELDS[1:], self.pixels[1:], strict=True):
            side = round(PX / field)
            start = (PX - side) // 2
            wide = np.repeat(around[None], len(copies), axis=0)
            for one, copy in zip(wide, copies, strict=True):
                one[start : start + side, start : start + side] = cv2.resize(
                    copy, (side, side), interpolation=cv2.INTER_AREA
                )
            fields.append(wide)
        return np.concatenate([self._embed(np.ascontiguousarray(images)) for images in fields], axis=1)


def _opened(n_tiles: int) -> list[tuple[int, np.ndarray, np.ndarray, OpenedTiles]]:
    """Give row, fields of view and segments of tiles, and the opened section."""
    from stimage_sd import contract
    from stimage_sd.tl._explain.segments import segment_tile
    from stimage_sd.tl._explain.tile_views import open_tiles

    sdata, model = _section(FIELDS, TILES)
    opened = open_tiles(sdata, model, TILES[:n_tiles], section="section", extractors=())
    nuclei, tiles = contract.nuclei(sdata), []
    for row, views, area in opened.read():
        cut = segment_tile(sdata, area, "nuclei", nuclei)
        if cut is None:
            raise ValueError("Expected nuclei on the tile, found none.")
        tiles.append((row, views[0].pixels, cut.seen_at(views[0].positions[0]), opened))
    return tiles


def _found() -> Mapping[str, Any]:
    """Give the copies that lime needs, and the agreement of seeds of both sides; computed once and kept."""
    return dict(json.loads(made("lime_default.json", _find).read_text()))


def _find(path: Path) -> None:
    from stimage_sd import tl
    from stimage_sd.image import lime

    sdata, model = _section(FIELDS, TILES)
    scores = []
    for seed in SEEDS:
        tl.explain(sdata, model, model.genes[GENE], tiles=TILES[:1], seed=seed)
        scores.append(sdata.shapes["nuclei_explained"][f"lime_{model.genes[GENE]}"].to_numpy())
    agreement = _agreement(scores)
    tile = _Tile(*_opened(1)[0], _extractor())
    hidden = lime.hidden_image(tile.pixels[0], tile.segments, tile.color)
    draws = [lime.perturbations(MOST, int(tile.segments.max()) + 1, seed=seed) for seed in SEEDS]
    outputs: list[list[np.ndarray]] = [[] for _ in SEEDS]
    for n_copies in range(STEP, MOST + 1, STEP):
        for shown, known in zip(draws, outputs, strict=True):
            new = shown[n_copies - STEP : n_copies]
            known.append(tile.classify(lime.perturbed_images(tile.pixels[0], hidden, tile.segments, new)))
        fitted = [
            lime.leave_one_out(shown[:n_copies], np.concatenate(known)).weights[1:, 0]
            for shown, known in zip(draws, outputs, strict=True)
        ]
        if _agreement(fitted) >= agreement:
            break
    path.write_text(json.dumps({"copies": n_copies, "ours": agreement, "lime": _agreement(fitted)}))


def _agreement(scores: list[np.ndarray]) -> float:
    """Give the mean correlation over pairs of seeds."""
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in itertools.combinations(scores, 2)]))


WORK = Comparison(
    title="Explaining tiles by default, EfficientNet-Lite0, 224 px, three fields of view",
    unit="tiles",
    sizes=(1, 2, 4),
    sides={LIME_TORCH: by_lime, OURS: ours},
    reach={LIME_TORCH: 10.0},
    at_most={LIME_TORCH: 1},
    target=1,
)
