"""Tiles as a model sees them: pixels of each field of view, their positions and their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import get_extractor
from stimage_sd.models._instance_model import InstanceModel
from stimage_sd.models._stand_ins import Embedded, Explainable, StandIns
from stimage_sd.stream.driver import pixel_positions, run_over_tiles
from stimage_sd.tl._explain.segments import Area, Positions

#: tiles per read
_READ = 16


@dataclass(frozen=True)
class Views:
    """Fields of view of a tile for one extractor.

    Attributes
    ----------
    pixels
        ``uint8 (n_fields, target, target, 3)``.
    positions
        Positions of each field's pixels on the H&E image.
    """

    pixels: np.ndarray
    positions: tuple[Positions, ...]


@dataclass(frozen=True)
class OpenedTiles:
    """Section opened for explanations.

    Attributes
    ----------
    sdata
        The section.
    stand_ins
        The model's predictions for perturbed tiles that replace a tile of the section.
    extractors
        One extractor per kind of embedding.
    rows
        Rows of the explained tiles among the kept tiles, ``int (n_tiles,)``.
    tiles
        ``instance_id`` of the explained tiles.
    centers
        x and y of the tiles' centers, H&E px, ``float64 (n_tiles, 2)``.
    """

    sdata: SpatialData
    stand_ins: StandIns
    extractors: tuple[Extractor, ...]
    rows: np.ndarray
    tiles: np.ndarray
    centers: np.ndarray

    def read(self) -> Iterator[tuple[int, list[Views], Area]]:
        """Yield each tile's row, fields of view and explained square, reading tiles in chunks."""
        for start in range(0, len(self.rows), _READ):
            chunk = slice(start, start + _READ)
            pixels = [self._pixels(stored, self.centers[chunk]) for stored in self.stand_ins.embedded]
            for index, row in enumerate(self.rows[chunk]):
                center = self.centers[chunk][index]
                views = [
                    Views(one[index], self._positions(stored, center))
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
        """Return the smallest field of view of all extractors."""
        sides = [self._sides(stored) for stored in self.stand_ins.embedded]
        which = int(np.argmin([min(side) for side in sides]))
        field = int(np.argmin(sides[which]))
        return Area(center, sides[which][field], views[which].pixels[field], views[which].positions[field])


def pooled_shift(stored: Embedded, row: int, values: np.ndarray) -> np.ndarray:
    """Return what to add to embeddings of a tile's squares, where the section's wide fields were pooled.

    With this shift the tile has its stored embedding, and what changes in its squares is added to it.

    - `stored`: the section's embeddings.
    - `row`: row of the tile.
    - `values`: embedding of the tile with every square embedded by itself, ``float32 (n_fields * n_features,)``.
    - returns: ``float32 (n_fields * n_features,)``, 0 for fields that were embedded by themselves.
    """
    fields = np.array(stored.tiles.fields_of_view)
    pooled = (fields > 1) & (stored.tiles.wide_fields == "pooled")
    return np.where(np.repeat(pooled, len(values) // len(fields)), stored.own[row] - values, 0).astype(np.float32)


def open_tiles(
    sdata: SpatialData, model: Explainable, tiles: Sequence[int], *, section: str, extractors: Sequence[Extractor]
) -> OpenedTiles:
    """Check a section, model and tiles before the slow part starts.

    Raises
    ------
    TypeError
        If the model does not predict from a tile's embeddings.
    KeyError
        If a tile is not a kept tile, or the image of the tiles is missing.
    ValueError
        If an extractor's weights differ from those that the model expects.
    """
    if not isinstance(model, Explainable):
        raise TypeError(
            "Expected a model that predicts by a tile's embeddings (NBModel, CombinedModel, FinetunedModel, "
            f"GeneClassifier), found {type(model).__name__}.{_instead(model)}"
        )
    stand_ins = model.stand_ins(sdata, section=section)
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    ids = kept.obs[contract.INSTANCE_KEY].to_numpy()
    place = {tile_id: row for row, tile_id in enumerate(ids.tolist())}
    unknown = [tile for tile in tiles if tile not in place]
    if unknown or len(tiles) == 0:
        given = f"{unknown[:5]}, which are not" if unknown else "none"
        raise KeyError(
            f'Expected `tiles` to be `obs["{contract.INSTANCE_KEY}"]` of kept tiles of section {section!r}, such as '
            f"{ids[:3].tolist()}; found {given}."
        )
    for stored in stand_ins.embedded:
        if stored.image not in sdata.images:
            raise KeyError(
                f"The tiles of section {section!r} were cut from the image {stored.image!r}, which is missing (found "
                f"{sorted(sdata.images)}). Run `stimage_sd.pp.stain_normalize` again with the settings in "
                "`model.tiles.stain`."
            )
    rows = np.array([place[tile] for tile in dict.fromkeys(tiles)])
    centers = contract.tile_geometry(sdata, kept[rows]).centers
    networks = tuple(_extractor(stored, extractors) for stored in stand_ins.embedded)
    return OpenedTiles(sdata, stand_ins, networks, rows, ids[rows], centers)


def _instead(model: object) -> str:
    """Say how a model of nuclei or squares is explained."""
    if not isinstance(model, InstanceModel):
        return ""
    return (
        " This model gives the contribution of each nucleus or square itself. Run "
        f'`stimage_sd.tl.predict(sdata, model, on="{model.on}")`.'
    )


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


def _as_they_are(tiles: np.ndarray) -> np.ndarray:
    return tiles
