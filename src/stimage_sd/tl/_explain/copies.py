"""Copies of a tile with hidden segments: their pixels, embeddings and predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any, Literal

import numpy as np

from stimage_sd.image import lime
from stimage_sd.models._extractor import Extractor
from stimage_sd.nn.onnx_changes import Box
from stimage_sd.tl._explain.segments import Segments, background_color, present
from stimage_sd.tl._explain.tile_views import OpenedTiles, Views, pooled_shift

HideColor = int | tuple[int, int, int] | Literal["background"] | None
#: copies per call of a network
_BATCH = 16
#: copies per call of the heads
_HEADS = 128
#: allowed difference between new and stored embeddings of a tile, as a fraction of the largest stored value
_TOLERANCE = 1e-2


class Copies:
    """Copies of one tile.

    - `section`: the section of the tile.
    - `row`: row of the tile among the kept tiles.
    - `views`: fields of view of the tile, for each of the section's embeddings.
    - `cut`: segments of the tile.
    - `hide_color`: color of hidden segments, as in `stimage_sd.tl.explain`.
    - `seconds`: time that the networks took in the latest call of `outputs`.
    """

    def __init__(
        self, section: OpenedTiles, row: int, views: Sequence[Views], cut: Segments, hide_color: HideColor
    ) -> None:
        self.section, self.row = section, row
        self.seconds = 0.0
        kinds: dict[Any, list[_Field]] = {}
        self.fields = []
        for stored, extractor, one in zip(section.stand_ins.embedded, section.extractors, views, strict=True):
            tiles = stored.tiles
            key = (extractor.name, extractor.weights_hash, tiles.fields_of_view, tiles.input_px, stored.image)
            if key not in kinds:
                kinds[key] = _fields(extractor, one, cut, hide_color)
            self.fields.append(kinds[key])
        self._distinct = list(kinds.values())
        self._shifts: list[np.ndarray] | None = None

    def outputs(self, shown: np.ndarray, of: Sequence[str], columns: np.ndarray, pool: Executor) -> np.ndarray:
        """Predict copies.

        - `shown`: shown segments per copy, ``(n_copies, n_segments)``. Copies of earlier calls are not embedded
          again.
        - `of`: names of the outputs.
        - `columns`: indices of the genes.
        - `pool`: threads of the networks. Results do not depend on their number.
        - returns: ``float64 (n_copies, n_of * n_genes)``.
        """
        started_at = time.perf_counter()
        if self._shifts is None:
            whole = self._embeddings(np.ones_like(shown[:1]), pool)
            embedded = self.section.stand_ins.embedded
            self._shifts = [
                pooled_shift(stored, self.row, values[0]) for stored, values in zip(embedded, whole, strict=True)
            ]
        embeddings = [values + shift for values, shift in zip(self._embeddings(shown, pool), self._shifts, strict=True)]
        self.seconds = time.perf_counter() - started_at
        if shown[0].all():
            self._check(embeddings)
        return self._predict(embeddings, of, columns)

    def _embeddings(self, shown: np.ndarray, pool: Executor) -> list[np.ndarray]:
        pending = [one.embed(shown, pool) for fields in self._distinct for one in fields]
        for started in pending:
            for batch in started:
                batch.result()
        return [np.concatenate([one.embeddings(shown) for one in fields], axis=1) for fields in self.fields]

    def _predict(self, embeddings: Sequence[np.ndarray], of: Sequence[str], columns: np.ndarray) -> np.ndarray:
        blocks = []
        for start in range(0, len(embeddings[0]), _HEADS):
            block = [values[start : start + _HEADS] for values in embeddings]
            n = len(block[0])
            # pad to a fixed batch size so JAX compiles the heads once
            filled = [np.concatenate([values, np.repeat(values[-1:], _HEADS - n, axis=0)]) for values in block]
            outputs = self.section.stand_ins.outputs(self.row, filled, columns)
            blocks.append(np.concatenate([np.asarray(outputs[name])[:n] for name in of], axis=1))
        return np.concatenate(blocks).astype(np.float64)

    def _check(self, embeddings: Sequence[np.ndarray]) -> None:
        for stored, values in zip(self.section.stand_ins.embedded, embeddings, strict=True):
            expected = stored.own[self.row]
            difference = np.abs(values[0] - expected).max() / max(np.abs(expected).max(), 1e-12)
            if difference > _TOLERANCE:
                raise ValueError(
                    f"The stored embeddings by {stored.tiles.extractor!r} do not match the current image "
                    f"{stored.image!r} (they differ by {difference:.1%} of the largest value). Run "
                    "`stimage_sd.pp.embed` again."
                )


class _Field:
    """One field of view of all copies. Copies that look alike in this field are embedded once."""

    def __init__(self, extractor: Extractor, pixels: np.ndarray, hidden: np.ndarray, segments: np.ndarray) -> None:
        self._numbers = present(segments)
        crop, self._run = extractor.for_copies(pixels, _box(segments >= 0))
        self._is_padded = not extractor.is_recordable
        # number the segments of this field of view from 0
        renumbered = np.where(segments >= 0, np.searchsorted(self._numbers, segments), -1)
        self._pixels, self._hidden, self._segments = (part[crop.slices] for part in (pixels, hidden, renumbered))
        self._known: dict[bytes, Future[np.ndarray]] = {}
        self._place: dict[bytes, int] = {}

    def embed(self, shown: np.ndarray, pool: Executor) -> list[Future[np.ndarray]]:
        """Start to embed the copies that are new, and return their batches."""
        rows = np.ascontiguousarray(shown[:, self._numbers], np.uint8)
        new = list(dict.fromkeys(row.tobytes() for row in rows))
        new = [key for key in new if key not in self._known]
        batches = []
        for start in range(0, len(new), _BATCH):
            keys = new[start : start + _BATCH]
            batch = pool.submit(self._embed, np.array([np.frombuffer(key, np.uint8) for key in keys]))
            batches.append(batch)
            for place, key in enumerate(keys):
                self._known[key], self._place[key] = batch, place
        return batches

    def embeddings(self, shown: np.ndarray) -> np.ndarray:
        """Return the embeddings of copies, ``float32 (n_copies, n_features)``."""
        keys = [row.tobytes() for row in np.ascontiguousarray(shown[:, self._numbers], np.uint8)]
        return np.stack([self._known[key].result()[self._place[key]] for key in keys])

    def _embed(self, shown: np.ndarray) -> np.ndarray:
        images = lime.perturbed_images(self._pixels, self._hidden, self._segments, shown)
        if not self._is_padded:
            return np.asarray(self._run(images))
        # pad to a fixed batch size so JAX compiles the network once
        filled = np.concatenate([images, np.repeat(images[-1:], _BATCH - len(images), axis=0)])
        return np.asarray(self._run(filled))[: len(images)]


def _fields(extractor: Extractor, views: Views, cut: Segments, hide_color: HideColor) -> list[_Field]:
    seen = np.stack([cut.seen_at(positions) for positions in views.positions])
    if hide_color == "background":
        hide_color = background_color(views.pixels, np.stack([cut.background_at(one) for one in views.positions]))
    hidden = lime.hidden_image(views.pixels, seen, hide_color)
    return [_Field(extractor, *field) for field in zip(views.pixels, hidden, seen, strict=True)]


def _box(inside: np.ndarray) -> Box:
    """Return the smallest box around the pixels that can be hidden."""
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return Box(0, 0, 0, 0)
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
