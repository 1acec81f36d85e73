"""Run the steps that a section lacks before a model can be trained on it, or predict on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spatialdata import SpatialData

from stimage_sd import contract, pp
from stimage_sd.models import NBModel
from stimage_sd.models._specification import TileSpecification

Say = Callable[[str], None]


def prepare_cohort(
    cohort: Mapping[str, SpatialData], *, extractor: str, stain: str | None, weights: Path | None, say: Say
) -> None:
    """Stain-normalise, tile and embed the sections of a cohort that are not embedded yet.

    Parameters
    ----------
    cohort
        The sections; changed in memory.
    extractor
        Whose embeddings are needed.
    stain
        Method of stain normalisation; `None`: the images as they are.
    weights
        The extractor's weights file, where they are not found by themselves.
    say
        Is told which step is run.

    Notes
    -----
    The reference is that of the first section that is normalised already, else the first section itself.
    """
    reference: Any = next(
        (
            contract.info(sdata)["stain"]["reference"]
            for sdata in cohort.values()
            if _is_normalized(sdata) and contract.info(sdata)["stain"]["method"] == stain
        ),
        None,
    )
    for name, sdata in cohort.items():
        if _is_embedded(sdata, extractor):
            continue
        if stain is not None and not _is_normalized(sdata):
            say(f"{name}: stain normalisation ({stain})")
            reference = pp.stain_normalize(sdata, reference, method=stain)
        if contract.TILES not in sdata.tables:
            say(f"{name}: tiling")
            pp.tile(sdata)
        say(f"{name}: embedding ({extractor})")
        pp.embed(sdata, extractor, weights=weights, image_key=None if stain else contract.image_name(sdata))


def prepare_for_model(sdata: SpatialData, model: NBModel, *, weights: Path | None, say: Say) -> list[str]:
    """Stain-normalise, tile and embed a section as a model expects, where that was not done.

    Steps that were done otherwise are left; `stimage_sd.tl.predict` then says which to run again.

    Parameters
    ----------
    sdata
        The section; changed in memory.
    model
        The model that is to predict on it.
    weights
        The extractor's weights file, where they are not found by themselves.
    say
        Is told which step is run.

    Returns
    -------
    Names of the elements that were written, the normalised image not among them: it is a transfer applied
    lazily, and made again by `stimage_sd.pp.stain_normalize`.
    """
    name, tiles = contract.sample(sdata), model.tiles
    had_tissue = contract.TISSUE in sdata.labels
    changed: list[str] = []
    if not model.embeddings:
        _make_tiles(sdata, tiles, changed, say=say)
    for embedding in model.embeddings:
        if not _is_embedded(sdata, embedding.extractor):
            _make_tiles(sdata, tiles, changed, say=say)
            say(f"{name}: embedding ({embedding.extractor})")
            pp.embed(
                sdata,
                embedding.extractor,
                fields_of_view=embedding.fields_of_view,
                context_rings=embedding.context_rings,
                weights=weights if embedding is tiles else None,
                image_key=contract.image_name(sdata) if tiles.stain is None else None,
            )
            changed.append(contract.TILES)
        elif embedding.context_rings and contract.context_key(embedding.extractor) not in contract.tiles(sdata).obsm:
            say(f"{name}: context of the tiles ({embedding.context_rings} rings)")
            pp.spatial_context(sdata, embedding.extractor, n_rings=embedding.context_rings)
            changed.append(contract.TILES)
    changed = list(dict.fromkeys(changed))
    return changed if had_tissue or contract.TISSUE not in sdata.labels else [contract.TISSUE, *changed]


def _make_tiles(sdata: SpatialData, tiles: TileSpecification, changed: list[str], *, say: Say) -> None:
    """Stain-normalise and tile a section as a model expects, where that was not done."""
    name = contract.sample(sdata)
    normalize_for_model(sdata, tiles, say=say)
    if contract.TILES not in sdata.tables:
        say(f"{name}: tiling")
        # a section with spots whose resolution is unknown is tiled by the spots' own size
        known = contract.info(sdata)["mpp"] is not None or not contract.has_units(sdata)
        pp.tile(sdata, size_um=tiles.size_um if known else None, target_px=tiles.input_px)
        changed.append(contract.TILE_SQUARES)


def normalize_for_model(sdata: SpatialData, tiles: TileSpecification, *, say: Say) -> None:
    """Make the stain-normalised image that a model's tiles are cut from, which no store holds, where it is not here."""
    if tiles.stain is None or _is_normalized(sdata):
        return
    method, concentrations = tiles.stain["method"], tiles.stain["concentrations"]
    say(f"{contract.sample(sdata)}: stain normalisation ({method}, to the model's reference)")
    pp.stain_normalize(sdata, tiles.stain["reference"], method=method, concentrations=concentrations)


def _is_embedded(sdata: SpatialData, extractor: str) -> bool:
    return contract.TILES in sdata.tables and contract.feature_key(extractor) in contract.tiles(sdata).obsm


def _is_normalized(sdata: SpatialData) -> bool:
    return contract.info(sdata).get("normalized_image") in sdata.images
