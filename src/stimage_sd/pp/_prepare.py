"""Run the missing steps of sections before training or prediction, from the image on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._settings import logger
from stimage_sd.models import InstanceModel, NBModel
from stimage_sd.models._resolve import as_model
from stimage_sd.models._specification import TileSpecification
from stimage_sd.pp._context import spatial_context
from stimage_sd.pp._embed import WideFields, embed
from stimage_sd.pp._segment_nuclei import segment_nuclei
from stimage_sd.pp._stain import StainMethod, stain_normalize
from stimage_sd.pp._tile import tile

Say = Callable[[str], None]


def prepare(
    data: SpatialData | contract.Cohort,
    model: NBModel | InstanceModel | str | Path,
    *,
    weights: str | Path | None = None,
) -> None:
    """Run the steps that a model needs before it predicts: stain normalization, tiling and embedding.

    Parameters
    ----------
    data
        A section or a cohort of sections. An image is enough.
    model
        A fitted model, the path of a saved model, or the name of a ready model (`stimage_sd.models.pretrained`).
    weights
        The extractor's weights file, if it is not found automatically.

    Returns
    -------
    Nothing. The sections get what `stimage_sd.pp.stain_normalize`, `stimage_sd.pp.tile` and `stimage_sd.pp.embed`
    write, with the settings of the model. For a model of nuclei or squares, these are found and embedded too. Steps
    that were run before are not repeated, whatever their settings: `stimage_sd.tl.predict` says which to run again.

    Raises
    ------
    TypeError
        If the model does not state the tiles that it needs, as wrapped predictors do not.
    ValueError
        If the resolution of a section is unknown and it has no spots, so that the size of tiles is unknown.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sections = {}
    >>> for seed, name in enumerate(("train", "new")):
    ...     path = sti.datasets.synthetic_visium(f"bundle_prepare_{name}", n_spots=60, n_genes=20, seed=seed)
    ...     sections[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(sections["train"])
    >>> sti.pp.embed(sections["train"], fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(sections["train"], n_top=5)
    >>> model = sti.tl.fit_nb(sections["train"], genes=genes, n_members=2, max_epochs=2)
    >>> sti.pp.prepare(sections["new"], model)
    >>> sti.tl.predict(sections["new"], model)
    """
    fitted: Any = as_model(model)
    if not hasattr(fitted, "tiles") or not hasattr(fitted, "embeddings"):
        raise TypeError(
            f"Expected a model that states its tiles and embeddings, found a {type(fitted).__name__}. Run `pp.tile` "
            "and what the model reads by hand."
        )
    for sdata in contract.sections(data).values():
        prepare_for_model(sdata, fitted, weights=None if weights is None else Path(weights), say=logger.info)


def prepare_cohort(
    cohort: Mapping[str, SpatialData], *, extractor: str, stain: str | None, weights: Path | None, say: Say
) -> None:
    """Stain-normalize, tile and embed the sections of a cohort that have no embeddings.

    - `cohort`: the sections. They are changed in memory.
    - `extractor`: name of the extractor.
    - `stain`: method of stain normalization. `None` uses the images without normalization.
    - `weights`: the extractor's weights file, if it is not found automatically.
    - `say`: function that prints the current step.

    The reference of the stain normalization is that of the first normalized section, else the first section itself.
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
            say(f"{name}: stain normalization ({stain})")
            reference = stain_normalize(sdata, reference, method=cast(StainMethod, stain))
        if contract.TILES not in sdata.tables:
            say(f"{name}: tiling")
            tile(sdata)
        say(f"{name}: embedding ({extractor})")
        embed(sdata, extractor, weights=weights, image_key=None if stain else contract.image_name(sdata))


def prepare_for_model(
    sdata: SpatialData, model: NBModel | InstanceModel, *, weights: Path | None, say: Say
) -> list[str]:
    """Run the missing stain normalization, tiling and embedding of a section with a model's settings.

    For a model of nuclei, nuclei are found and embedded as well. Steps that were run with other settings are not
    repeated. `stimage_sd.tl.predict` reports which to run again.

    - `sdata`: the section. The section is changed in memory.
    - `model`: the model for the prediction.
    - `weights`: the extractor's weights file, if it is not found automatically.
    - `say`: function that prints the current step.
    - returns: names of the written elements, without the normalized image. That image is computed lazily, and
      `stimage_sd.pp.stain_normalize` makes it again.
    """
    name, tiles = contract.sample(sdata), model.tiles
    had_tissue = contract.has_tissue(sdata)
    changed: list[str] = []
    if not model.embeddings:
        _make_tiles(sdata, tiles, changed, say=say)
    for embedding in model.embeddings:
        if not _is_embedded(sdata, embedding.extractor):
            _make_tiles(sdata, tiles, changed, say=say)
            say(f"{name}: embedding ({embedding.extractor})")
            embed(
                sdata,
                embedding.extractor,
                fields_of_view=embedding.fields_of_view,
                wide_fields=cast(WideFields, embedding.wide_fields),
                context_rings=embedding.context_rings,
                weights=weights if embedding is tiles else None,
                image_key=contract.image_name(sdata) if tiles.stain is None else None,
            )
            changed.append(contract.TILES)
        elif embedding.context_rings and contract.context_key(embedding.extractor) not in contract.tiles(sdata).obsm:
            say(f"{name}: context of the tiles ({embedding.context_rings} rings)")
            spatial_context(sdata, embedding.extractor, n_rings=embedding.context_rings)
            changed.append(contract.TILES)
    if isinstance(model, InstanceModel):
        changed += _embed_instances(sdata, model, weights=weights, say=say)
    changed = list(dict.fromkeys(changed))
    return changed if had_tissue or not contract.has_tissue(sdata) else [contract.tissue_name(sdata), *changed]


def _embed_instances(sdata: SpatialData, model: InstanceModel, *, weights: Path | None, say: Say) -> list[str]:
    """Find and embed the nuclei, or lay and embed the squares, that a model needs; return what was written."""
    name, how = contract.sample(sdata), model.instances
    key, changed = contract.features_key(how.on), []
    if key in sdata.tables and contract.feature_key(how.extractor) in sdata.tables[key].obsm:
        return []
    if how.on == "nuclei" and contract.nuclei_name(sdata) not in sdata.shapes:
        say(f"{name}: nuclei")
        segment_nuclei(sdata)
        changed.append(contract.NUCLEI)
    say(f"{name}: embedding of {how.on} ({how.extractor})")
    embed(
        sdata,
        how.extractor,
        on=how.on,
        fields_of_view=how.fields_um,
        square_um=how.size_um or 16.0,
        weights=weights,
        image_key=None if how.stain else contract.image_name(sdata),
    )
    return [*changed, key, *([contract.GRID_SQUARES] if how.on == "grid" else [])]


def _make_tiles(sdata: SpatialData, tiles: TileSpecification, changed: list[str], *, say: Say) -> None:
    """Run the missing stain normalization and tiling of a section with a model's settings."""
    name = contract.sample(sdata)
    # without a known resolution, the spots give the tile size
    known = contract.mpp(sdata) is not None or not contract.has_units(sdata)
    needs_tiles = contract.TILES not in sdata.tables
    if needs_tiles and known and tiles.size_um is not None:
        contract.require_mpp(sdata, purpose="`size_um=`")
    normalize_for_model(sdata, tiles, say=say)
    if needs_tiles:
        say(f"{name}: tiling")
        tile(sdata, size_um=tiles.size_um if known else None, target_px=tiles.input_px)
        changed.append(contract.TILE_SQUARES)


def normalize_for_model(sdata: SpatialData, tiles: TileSpecification, *, say: Say) -> None:
    """Make the stain-normalized image for a model's tiles if it is missing, as after reading from a store."""
    if tiles.stain is None or _is_normalized(sdata):
        return
    method, concentrations = tiles.stain["method"], tiles.stain["concentrations"]
    say(f"{contract.sample(sdata)}: stain normalization ({method}, to the model's reference)")
    stain_normalize(sdata, tiles.stain["reference"], method=method, concentrations=concentrations)


def _is_embedded(sdata: SpatialData, extractor: str) -> bool:
    return contract.TILES in sdata.tables and contract.feature_key(extractor) in contract.tiles(sdata).obsm


def _is_normalized(sdata: SpatialData) -> bool:
    return contract.info(sdata).get("normalized_image") in sdata.images
