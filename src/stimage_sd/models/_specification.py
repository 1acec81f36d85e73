"""Tiling, staining and embedding of a section, and the check against those of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract

#: largest relative difference between the sides of tiles that count as equal
_TOLERANCE = 0.03
#: how messages name the ways to embed fields wider than a tile
_MADE = {"pooled": "pooled from one map", "separate": "embedded one by one"}


@dataclass(frozen=True)
class TileSpecification:
    """Tiling, staining and embedding that a section must have for a model to predict on it.

    - `extractor`, `weights_hash`: name of the extractor and hash of its weights.
    - `fields_of_view`: embedded fields of view, as multiples of the tile's side.
    - `context_rings`: rings of neighbors whose embeddings are also features. 0 for none.
    - `input_px`: side of the extractor's input, px.
    - `side_px`, `size_um`: side of a tile in H&E pixels, and in micrometers if the resolution is known.
    - `stain`: stain normalization of the tiled image (method, concentrations, reference), or `None`.
    - `wide_fields`: how fields wider than a tile were embedded, ``"pooled"`` or ``"separate"``, as in models of 0.1.0.
    """

    extractor: str
    weights_hash: str
    fields_of_view: tuple[float, ...]
    context_rings: int
    input_px: int
    side_px: float
    size_um: float | None = None
    stain: dict[str, Any] | None = None
    wide_fields: str = "separate"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TileSpecification:
        """Build a specification from a model file, where tuples are lists."""
        return cls(**{**values, "fields_of_view": tuple(values["fields_of_view"])})


def specification(sdata: SpatialData, extractor: str, *, context: bool = True) -> TileSpecification:
    """Read the tiling, staining and embedding of a section.

    - `sdata`: the section.
    - `extractor`: name of the extractor.
    - `context`: whether to include the rings of neighbors.
    - returns: the specification.
    """
    contract.embeddings(sdata, extractor)
    tiling = contract.tiling(sdata)
    how = contract.tiles(sdata).uns.get("embeddings", {}).get(extractor, {})
    stain = how.get("stain") or None
    return TileSpecification(
        extractor=extractor,
        weights_hash=str(how.get("weights_hash", "")),
        fields_of_view=tuple(float(value) for value in np.atleast_1d(how.get("fields_of_view", [1.0]))),
        context_rings=int(how.get("context_rings", 0)) if context else 0,
        input_px=int(how.get("input_px", tiling["target_px"])),
        side_px=float(tiling["side_px"]),
        size_um=float(tiling["size_um"]) if "size_um" in tiling else None,
        stain=json.loads(stain) if stain else None,
        wide_fields=str(how.get("wide_fields", "separate")),
    )


def features(sdata: SpatialData, tiles: TileSpecification) -> np.ndarray:
    """Return the embeddings of the kept tiles, with those of the neighbors if the specification has rings."""
    table = contract.tiles(sdata)
    keep = table.obs["keep"].to_numpy()
    if not keep.any():
        raise ValueError(
            f"Section {contract.sample(sdata)!r} is empty: none of its {len(keep)} tiles is kept. Leave the section "
            "out, or tile it again with a lower `min_tissue=`."
        )
    values = contract.embeddings(sdata, tiles.extractor)
    values = values if keep.all() else values[keep]
    if tiles.context_rings:
        values = np.concatenate([values, np.asarray(table.obsm[contract.context_key(tiles.extractor)])[keep]], axis=1)
    contract.check_finite(sdata, values, tiles.extractor)
    return values


def check_specification(stated: TileSpecification, expected: TileSpecification, *, section: str) -> None:
    """Raise `ValueError` if a section differs from the specification, with the step to run again."""
    problems = [
        *_size_problem(stated, expected),
        *_embedding_problems(stated, expected),
        *_stain_problem(stated.stain, expected.stain),
    ]
    if problems:
        raise ValueError(f"Section {section!r} does not match: " + "; ".join(problems) + ".")


def _size_problem(stated: TileSpecification, expected: TileSpecification) -> list[str]:
    if stated.size_um is not None and expected.size_um is not None:
        if abs(stated.size_um / expected.size_um - 1) > _TOLERANCE:
            return [
                f"tiles of {stated.size_um:.1f} µm, expected {expected.size_um:.1f} µm: run "
                f"`stimage_sd.pp.tile(sdata, size_um={expected.size_um:.4g})` and `pp.embed` again"
            ]
    elif abs(stated.side_px / expected.side_px - 1) > _TOLERANCE:
        return [
            f"tiles of {stated.side_px:.0f} px, expected {expected.side_px:.0f} px, and no resolution (`mpp`) to "
            "compare them by: pass `mpp=` to the reader and tile by `size_um=`"
        ]
    return []


def _embedding_problems(stated: TileSpecification, expected: TileSpecification) -> list[str]:
    call = (
        f"`stimage_sd.pp.embed(sdata, {expected.extractor!r}, fields_of_view={expected.fields_of_view}, "
        f"wide_fields={expected.wide_fields!r}, context_rings={expected.context_rings})`"
    )
    problems = []
    if stated.fields_of_view != expected.fields_of_view:
        problems.append(f"fields of view {stated.fields_of_view}, expected {expected.fields_of_view}: run {call}")
    elif stated.wide_fields != expected.wide_fields:
        made, needed = (_MADE.get(name, name) for name in (stated.wide_fields, expected.wide_fields))
        problems.append(f"fields wider than a tile {made}, expected {needed}: run {call}")
    elif stated.context_rings != expected.context_rings:
        problems.append(f"{stated.context_rings} rings of context, expected {expected.context_rings}: run {call}")
    if stated.weights_hash != expected.weights_hash:
        problems.append(
            f"embeddings by other weights of {expected.extractor!r} ({stated.weights_hash[:8] or 'unknown'}, expected "
            f"{expected.weights_hash[:8] or 'unknown'}): embed with the same `weights=`"
        )
    if stated.input_px != expected.input_px:
        problems.append(
            f"tiles embedded at {stated.input_px} px, expected {expected.input_px} px: run "
            f"`stimage_sd.pp.tile(sdata, target_px={expected.input_px})` and {call}"
        )
    return problems


def _stain_problem(stated: dict[str, Any] | None, expected: dict[str, Any] | None) -> list[str]:
    if expected is None and stated is None:
        return []
    if expected is None:
        return ["tiles of a stain-normalized image, expected the image as it is: embed with `image_key=`"]
    call = (
        f'`stimage_sd.pp.stain_normalize(sdata, model.tiles.stain["reference"], method={expected["method"]!r}, '
        f"concentrations={expected['concentrations']!r})` before `pp.embed`"
    )
    if stated is None:
        return [f"tiles without stain normalization, expected {expected['method']!r}: run {call}"]
    same = all(stated[name] == expected[name] for name in ("method", "concentrations")) and _close(
        stated["reference"], expected["reference"]
    )
    return [] if same else [f"tiles normalized by {stated['method']!r} to another reference: run {call}"]


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    keys = {key for key in (*one, *other) if one.get(key) is not None or other.get(key) is not None}
    numbers = keys - {"method"}
    if one.get("method") != other.get("method") or any(
        one.get(key) is None or other.get(key) is None for key in numbers
    ):
        return False
    return all(np.allclose(one[key], other[key], rtol=1e-5, atol=1e-6) for key in numbers)


def extractor_names(extractor: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list."""
    names = [extractor] if isinstance(extractor, str) else list(extractor)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected `extractor` to be a name or different names, found {extractor!r}.")
    return names


def common_specification(cohort: dict[str, SpatialData], extractor: str) -> TileSpecification:
    """Return the specification that all sections of a cohort share, with their mean tile size."""
    tiles_of = {name: specification(sdata, extractor) for name, sdata in cohort.items()}
    first = next(iter(tiles_of.values()))
    for name, tiles in tiles_of.items():
        check_specification(tiles, first, section=name)
    sizes = [tiles.size_um for tiles in tiles_of.values()]
    known = [size for size in sizes if size is not None]
    return replace(
        first,
        side_px=float(np.mean([tiles.side_px for tiles in tiles_of.values()])),
        size_um=float(np.mean(known)) if len(known) == len(sizes) else None,
    )
