"""Training tiles with typed nuclei: images on disk, and target maps drawn per batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.image.augmentation import augment
from stimage_sd.image.hv_maps import hv_maps
from stimage_sd.image.nuclear_contrast import hematoxylin
from stimage_sd.models._cell_classifier import MOST_COARSE, NUCLEUS_UM
from stimage_sd.nn.hovernet_loss import IGNORED, CellTargets
from stimage_sd.tl._fit.tile_store import TileStore

#: fractional bits of OpenCV's drawing coordinates
_SHIFT = 4
#: tiles per section to check the hematoxylin contrast of nuclei on, and the smallest accepted area under the ROC curve
_N_LOOKED_AT, _LEAST_CONTRAST = 24, 0.6
#: columns of the nuclei's shapes
CELL_TYPE, CONFIDENCE = "cell_type", "cell_type_confidence"


class TypedNuclei(NamedTuple):
    """Nuclei of a section with their types.

    - `outlines`: polygons, object array ``(n,)``, px of the H&E at full resolution.
    - `types`: ``int64 (n,)``: 0 to ``n_classes - 1``, or `IGNORED` if the type is unknown.
    """

    outlines: NDArray[np.object_]
    types: NDArray[np.int64]


def typed_nuclei(
    sdata: SpatialData,
    classes: Sequence[str],
    *,
    shapes_key: str | None,
    label_key: str = CELL_TYPE,
    image_key: str | None = None,
    min_confidence: float = 0.0,
) -> TypedNuclei:
    """Read a section's nuclei and their types.

    - `sdata`: the section.
    - `classes`: names of the types. Nuclei of another type get `IGNORED`.
    - `shapes_key`, `label_key`: name of the shapes, and name of their column of types.
    - `image_key`: image whose pixels are the unit of the outlines. Default: the section's H&E.
    - `min_confidence`: nuclei with a smaller ``cell_type_confidence`` (where the column exists) get `IGNORED`.
    - returns: the nuclei whose centers lie on the image.
    """
    frame = contract.nuclei(sdata, shapes_key, image_key)
    types = labels_of(sdata, frame, label_key, contract.nuclei_name(sdata, shapes_key))
    width, height = contract.image_size(sdata, image_key)
    outlines = contract.outlines(frame)
    x, y = shapely.get_coordinates(shapely.centroid(outlines)).T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if inside.mean() < 0.5:
        raise ValueError(
            f"Expected the nuclei of section {contract.sample(sdata)!r} on its H&E ({width} x {height} px), found "
            f"{1 - inside.mean():.0%} of them off it. Run `stimage_sd.pp.register(sdata)` to place them anew."
        )
    codes = pd.Categorical(types, categories=list(classes)).codes.astype(np.int64)
    if CONFIDENCE in frame.columns:
        codes[~(frame[CONFIDENCE].to_numpy(dtype=float) >= min_confidence)] = IGNORED
    return TypedNuclei(outlines[inside], codes[inside])


def labels_of(sdata: SpatialData, frame: pd.DataFrame, label_key: str, name: str) -> pd.Series:
    """Return the types of nuclei as text, missing where a nucleus has no type."""
    if label_key not in frame.columns:
        raise KeyError(
            f"The shapes {name!r} of section {contract.sample(sdata)!r} have no column {label_key!r} (found "
            f"{sorted(map(str, frame.columns.drop('geometry')))}). Run `stimage_sd.pp.annotate_cells(sdata)` first."
        )
    return frame[label_key].astype("string")


@dataclass(frozen=True)
class CellTiles:
    """Tiles of a cohort with the nuclei on them.

    - `store`: images of the tiles.
    - `section`: section number of each tile, ``int64 (n_tiles,)``.
    - `rings`, `types`: for each tile, the outlines of its nuclei in px of the tile, and their types.
    """

    store: TileStore
    section: NDArray[np.int64]
    rings: list[list[NDArray[np.float32]]]
    types: list[NDArray[np.int64]]

    @classmethod
    def cut(
        cls, cohort: Mapping[str, SpatialData], nuclei: Mapping[str, TypedNuclei], path: Path, *, mpp: float,
        tile_px: int, min_nuclei: int, image_key: str | None,
    ) -> CellTiles:  # fmt: skip
        """Lay tiles over each section's nuclei, and write the tiles with at least `min_nuclei` to a file."""
        corners, sides = {}, {}
        for name, sdata in cohort.items():
            sides[name] = tile_side(sdata, mpp=mpp, tile_px=tile_px, image_key=image_key)
            size = contract.image_size(sdata, image_key)
            corners[name] = _lay_tiles(sdata, nuclei[name], size, side=sides[name], min_nuclei=min_nuclei)
        store = TileStore(path, n_tiles=sum(map(len, corners.values())), side_px=tile_px)
        rings: list[list[NDArray[np.float32]]] = []
        types: list[NDArray[np.int64]] = []
        first = 0
        for name, sdata in cohort.items():
            store.cut(
                contract.levels(sdata, contract.image_name(sdata, image_key)),
                corners[name] + sides[name] / 2,
                side=sides[name],
                first=first,
                label=f"{contract.sample(sdata)}: cutting tiles",
            )
            first += len(corners[name])
            for chosen, outlines in _within(nuclei[name].outlines, corners[name], sides[name], tile_px):
                rings.append(outlines)
                types.append(nuclei[name].types[chosen])
        tiles = cls(store, np.repeat(np.arange(len(cohort)), [len(corners[name]) for name in cohort]), rings, types)
        tiles._check_contrast(list(cohort))
        return tiles

    def __len__(self) -> int:
        return len(self.section)

    def digest(self) -> str:
        """Return a hash of the images, outlines and types."""
        whole = hashlib.sha256(self.store.digest().encode())
        for rings, types in zip(self.rings, self.types, strict=True):
            for array in (*rings, types):
                whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def labels(self, row: int, side: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Draw a tile's nuclei as label maps: numbers from 1, and types in the code of `CellTargets`."""
        instances, types = np.zeros((side, side), np.int32), np.zeros((side, side), np.int32)
        for label, (ring, kind) in enumerate(zip(self.rings[row], self.types[row], strict=True), start=1):
            # OpenCV puts integer coordinates at pixel centers
            points = np.round((ring - 0.5) * (1 << _SHIFT)).astype(np.int32)
            cv2.fillPoly(instances, [points], label, shift=_SHIFT)
            cv2.fillPoly(types, [points], IGNORED if kind == IGNORED else int(kind) + 1, shift=_SHIFT)
        return instances, types

    def batch(self, rows: NDArray[np.int64], size: int, *, seed: int | None) -> tuple[NDArray[np.float32], CellTargets]:
        """Read a batch of tiles and draw their target maps.

        - `rows`: rows of the tiles.
        - `size`: batch size. Missing tiles are filled with repeated tiles of weight 0.
        - `seed`: seed of random flips, rotations and stains. `None`: no augmentation.
        - returns: images, ``float32 (size, side, side, 3)``, 0 to 1, and the targets.
        """
        tiles = self.store.read(rows)
        side = tiles.shape[1]
        if seed is not None:
            tiles = augment(tiles, seed=seed, flip=0.0, rotate=False)
        random = np.random.default_rng([0 if seed is None else seed, 1])
        pictures = np.zeros((size, side, side, 3), np.float32)
        nuclear, types = np.zeros((size, side, side), np.float32), np.zeros((size, side, side), np.int32)
        hv = np.zeros((size, side, side, 2), np.float32)
        for place, (row, tile) in enumerate(zip(rows, tiles, strict=True)):
            mirrored, turns = (False, 0) if seed is None else (random.random() < 0.5, int(random.integers(4)))
            picture, instances, kinds = (_turned(of, mirrored, turns) for of in (tile, *self.labels(int(row), side)))
            pictures[place] = picture / np.float32(255)
            nuclear[place], types[place] = instances > 0, kinds
            hv[place] = np.moveaxis(hv_maps(instances), 0, -1)
        # repeat tiles instead of blanks, because batch normalization uses the whole batch
        filled = np.arange(len(rows), size)
        pictures[filled] = pictures[filled % len(rows)]
        weight = (np.arange(size) < len(rows)).astype(np.float32)
        return pictures, CellTargets(nuclear, hv, types, weight)

    def _check_contrast(self, names: Sequence[str]) -> None:
        """Raise if nuclei are not darker in hematoxylin than their surroundings."""
        for index, name in enumerate(names):
            rows = np.flatnonzero(self.section == index)
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _N_LOOKED_AT)).astype(int))]
            tiles = self.store.read(rows)
            stain = np.stack([hematoxylin(np.moveaxis(tile, -1, 0)) for tile in tiles])
            inside = np.stack([self.labels(int(row), tiles.shape[1])[0] > 0 for row in rows])
            if inside.all() or not inside.any():
                continue
            told = roc_auc_score(inside.ravel(), stain.ravel())
            if told < _LEAST_CONTRAST:
                raise ValueError(
                    f"Expected the nuclei of section {name!r} where its H&E is dark, found that they are not (area "
                    f"under the curve {told:.2f}, expected at least {_LEAST_CONTRAST}). Their registration failed. "
                    "Look at `stimage_sd.pl.cells(sdata)`, and run `stimage_sd.pp.register(sdata)` again."
                )


def tile_side(sdata: SpatialData, *, mpp: float, tile_px: int, image_key: str | None = None) -> float:
    """Return the side of a tile, H&E px."""
    section_mpp = contract.require_mpp(sdata, purpose="finding nuclei", image_key=image_key)
    if section_mpp > MOST_COARSE * mpp:
        raise ValueError(
            f"Expected section {contract.sample(sdata)!r} at {mpp:g} µm per pixel or finer, found {section_mpp:g}: "
            f"nuclei of {NUCLEUS_UM:g} µm are {NUCLEUS_UM / section_mpp:.0f} px there. Use a finer scan, or fit with "
            f"`mpp={section_mpp:g}`."
        )
    side = tile_px * mpp / section_mpp
    width, height = contract.image_size(sdata, image_key)
    if side > min(height, width) + 1:
        raise ValueError(
            f"Expected section {contract.sample(sdata)!r} to be larger than a tile of {tile_px} px at {mpp:g} µm "
            f"({side:.0f} px of its own), found {width} x {height} px. Pass a smaller `tile_px=`."
        )
    return side


def _lay_tiles(
    sdata: SpatialData, nuclei: TypedNuclei, size: tuple[int, int], *, side: float, min_nuclei: int
) -> NDArray[np.float64]:
    """Return left and top of the tiles with enough nuclei, ``(n, 2)``."""
    width, height = size
    x, y = shapely.get_coordinates(shapely.centroid(nuclei.outlines)).T
    starts = [
        np.minimum(np.arange(np.floor(low / side) * side, high, side), max(most - side, 0))
        for low, high, most in ((x.min(), x.max() + 1, width), (y.min(), y.max() + 1, height))
    ]
    left, top = (axis.ravel() for axis in np.meshgrid(*(np.unique(start) for start in starts)))
    tree = shapely.STRtree(shapely.points(x, y))
    tiles, _ = tree.query(shapely.box(left, top, left + side, top + side), predicate="intersects")
    enough = np.bincount(tiles, minlength=len(left)) >= min_nuclei
    if not enough.any():
        raise ValueError(
            f"Expected tiles with at least {min_nuclei} nuclei in section {contract.sample(sdata)!r}, found none among "
            f"{len(left)} tiles and {len(x)} nuclei. Pass a smaller `min_nuclei=`, or larger tiles."
        )
    return np.stack([left, top], axis=1)[enough]


def _within(
    outlines: NDArray[np.object_], corners: NDArray[np.float64], side: float, tile_px: int
) -> list[tuple[NDArray[np.int64], list[NDArray[np.float32]]]]:
    """Return for each tile the numbers of its nuclei, and their outlines in px of the tile."""
    boxes = shapely.box(corners[:, 0], corners[:, 1], corners[:, 0] + side, corners[:, 1] + side)
    tiles, met = shapely.STRtree(outlines).query(boxes, predicate="intersects")
    order = np.lexsort((met, tiles))
    parts = np.split(met[order], np.cumsum(np.bincount(tiles, minlength=len(corners)))[:-1])
    scale = tile_px / side
    kept = []
    for corner, chosen in zip(corners, parts, strict=True):
        rings = shapely.get_exterior_ring(outlines[chosen])
        coordinates, owner = shapely.get_coordinates(rings, return_index=True)
        placed = ((coordinates - corner) * scale).astype(np.float32)
        kept.append((chosen, np.split(placed, np.cumsum(np.bincount(owner, minlength=len(chosen)))[:-1])))
    return kept


def _turned(image: NDArray[Any], mirrored: bool, turns: int) -> NDArray[Any]:
    return np.rot90(image[:, ::-1] if mirrored else image, turns)
