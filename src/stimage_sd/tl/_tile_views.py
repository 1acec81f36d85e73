"""Tiles as a model sees them: every field of view's pixels, where they come from, and how they are embedded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractors import Extractor, get_extractor
from stimage_sd.models._stand_ins import Embedded, Explainable, StandIns
from stimage_sd.stream import pixel_positions, run_over_tiles
from stimage_sd.tl._segments import Area, Positions

#: tiles that are read at a time
_READ = 16
#: perturbed images that are built and embedded at a time
BLOCK = 16


@dataclass(frozen=True)
class Views:
    """A tile's fields of view for one extractor.

    Attributes
    ----------
    pixels
        ``uint8 (n_fields, target, target, 3)``.
    positions
        Where the pixels of each field come from.
    """

    pixels: np.ndarray
    positions: tuple[Positions, ...]


@dataclass(frozen=True)
class OpenedTiles:
    """A section opened for explanations.

    Attributes
    ----------
    stand_ins
        The model's predictions for tiles in the place of others.
    extractors
        The extractor of each of its embeddings.
    rows
        ``int (n_tiles,)``: which of the kept tiles are explained.
    tiles
        Their ``instance_id``.
    centers
        ``float64 (n_tiles, 2)``: x and y, H&E px.
    """

    sdata: SpatialData
    stand_ins: StandIns
    extractors: tuple[Extractor, ...]
    rows: np.ndarray
    tiles: np.ndarray
    centers: np.ndarray

    def read(self) -> Iterator[tuple[int, list[Views], Area]]:
        """Give each tile's row, fields of view and explained square, some tiles read at a time."""
        for start in range(0, len(self.rows), _READ):
            chunk = slice(start, start + _READ)
            pixels = [self._pixels(stored, self.centers[chunk]) for stored in self.stand_ins.embedded]
            for number, row in enumerate(self.rows[chunk]):
                center = self.centers[chunk][number]
                views = [
                    Views(one[number], self._positions(stored, center))
                    for one, stored in zip(pixels, self.stand_ins.embedded, strict=True)
                ]
                yield int(row), views, self._area(views, center)

    def _sides(self, stored: Embedded) -> list[float]:
        side = float(contract.tiling(self.sdata)["side_px"])
        return [field * side for field in stored.tiles.fields_of_view]

    def _pixels(self, stored: Embedded, centers: np.ndarray) -> np.ndarray:
        target = stored.tiles.input_px
        read = run_over_tiles(
            contract.levels(self.sdata, stored.image),
            centers,
            _as_they_are,
            sides=self._sides(stored),
            target=target,
            key="pixels",
            shape=(target, target, 3),
            description=f"{contract.sample(self.sdata)}: reading",
        )
        return read.astype(np.uint8)

    def _positions(self, stored: Embedded, center: np.ndarray) -> tuple[Positions, ...]:
        levels = contract.levels(self.sdata, stored.image)
        target = stored.tiles.input_px
        return tuple(pixel_positions(levels, center, side=side, target=target) for side in self._sides(stored))

    def _area(self, views: Sequence[Views], center: np.ndarray) -> Area:
        """The smallest field of view that any extractor is shown."""
        sides = [self._sides(stored) for stored in self.stand_ins.embedded]
        which = int(np.argmin([min(each) for each in sides]))
        field = int(np.argmin(sides[which]))
        return Area(center, sides[which][field], views[which].pixels[field], views[which].positions[field])


def open_tiles(
    sdata: SpatialData, model: Explainable, tiles: Sequence[int], *, section: str, extractors: Sequence[Extractor]
) -> OpenedTiles:
    """Check a section and what is asked of it, before anything is computed.

    Raises
    ------
    TypeError
        If the model does not predict by a tile's embeddings.
    KeyError
        If a tile is not among those to keep, or the image that tiles were cut from is gone.
    ValueError
        If an extractor has other weights than the model expects.
    """
    if not isinstance(model, Explainable):
        raise TypeError(
            "Expected a model that predicts by a tile's embeddings (NBModel, CombinedModel, FinetunedModel, "
            f"GeneClassifier), found {type(model).__name__}."
        )
    stand_ins = model.stand_ins(sdata, section=section)
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    ids = kept.obs[contract.INSTANCE_KEY].to_numpy()
    place = {number: row for row, number in enumerate(ids.tolist())}
    unknown = [tile for tile in tiles if tile not in place]
    if unknown or len(tiles) == 0:
        found = f"{unknown[:5]}, which are not" if unknown else "none"
        raise KeyError(
            f'Expected `tiles` to be `obs["{contract.INSTANCE_KEY}"]` of kept tiles of section {section!r}, such as '
            f"{ids[:3].tolist()}; found {found}."
        )
    for stored in stand_ins.embedded:
        if stored.image not in sdata.images:
            raise KeyError(
                f"The tiles of section {section!r} were cut from the image {stored.image!r}, which is not here (found "
                f"{sorted(sdata.images)}). Run `stimage_sd.pp.stain_normalize` again, as the model has it: "
                "`model.tiles.stain`."
            )
    rows = np.array([place[tile] for tile in dict.fromkeys(tiles)])
    centers = np.asarray(kept.obsm["spatial"], dtype=np.float64)[rows]
    networks = tuple(_extractor(stored, extractors) for stored in stand_ins.embedded)
    return OpenedTiles(sdata, stand_ins, networks, rows, ids[rows], centers)


def _extractor(stored: Embedded, given: Sequence[Extractor]) -> Extractor:
    if stored.extractor is not None:
        return stored.extractor
    named = {one.name: one for one in given}
    name, expected = stored.tiles.extractor, stored.tiles.weights_hash
    extractor = named[name] if name in named else get_extractor(name)
    if extractor.weights_hash != expected:
        raise ValueError(
            f"The extractor {name!r} has other weights than the model expects ({extractor.weights_hash[:8]}, expected "
            f"{expected[:8]}): pass `extractors=[stimage_sd.models.get_extractor({name!r}, weights=...)]`."
        )
    return extractor


def embed_blocks(
    extractor: Extractor, build: Callable[[int, int], np.ndarray], n_images: int, pool: Executor
) -> np.ndarray:
    """Embed images that are built as they are needed, on all threads of a pool.

    Parameters
    ----------
    extractor
        The extractor.
    build
        From start and stop to the images between, ``uint8 (n, y, x, 3)``.
    n_images
        How many there are.
    pool
        Threads.

    Returns
    -------
    ``float32 (n_images, n_features)``, the same on any number of threads.
    """

    def embed(start: int) -> np.ndarray:
        images = build(start, min(start + BLOCK, n_images))
        if extractor.is_recordable:
            return extractor(images)
        # compiled for one number of tiles
        filled = np.concatenate([images, np.repeat(images[-1:], BLOCK - len(images), axis=0)])
        return extractor(filled)[: len(images)]

    return np.concatenate(list(pool.map(embed, range(0, n_images, BLOCK))))


def _as_they_are(tiles: np.ndarray) -> np.ndarray:
    return tiles
