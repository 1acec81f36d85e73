"""Embeddings of tiles by an extractor, through the tile stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractors import ONNX_BATCH, Extractor, get_extractor
from stimage_sd.pp._context import spatial_context
from stimage_sd.stream import TileJob, run_over_images


def embed(
    data: SpatialData | contract.Cohort,
    extractor: str | Extractor = "efficientnet_lite0",
    *,
    fields_of_view: Sequence[float] = (1.0, 2.0, 4.0),
    context_rings: int = 1,
    weights: str | Path | None = None,
    image_key: str | None = None,
    batch_size: int | None = None,
    n_workers: int | None = None,
) -> None:
    """Turn every tile into a vector by a pretrained network.

    Parameters
    ----------
    data
        A section, or a cohort of them; tiled. Batches of all sections run together, so that no core waits for the
        last tiles of a section; each section is written when it is complete.
    extractor
        Name of a registered extractor (`stimage_sd.models.extractors` lists them), or an `Extractor`.
    fields_of_view
        Sides of the squares that are embedded around a tile's centre, in multiples of the tile's side;
        their embeddings are concatenated. The paper's own is ``(1.0,)``; the wider ones show the
        surroundings and raise accuracy (docs, "Design decisions").
    context_rings
        Rings of neighbouring tiles whose mean embedding is stored beside (see `spatial_context`); 0: none.
    weights
        Weights file, where they are not found by themselves.
    image_key
        The image that tiles are cut from; by default the stain-normalised H&E where there is one.
    batch_size
        Tiles a batch; by default 32, fewer where tiles are few.
    n_workers
        Threads; all cores by default. An active `dask.distributed` client is used instead; its workers must see the
        images and the cache folder (``$STIMAGE_SD_CACHE``), where results are kept until all
        sections are complete.

    Returns
    -------
    Nothing; ``tables["tiles"].obsm["X_<extractor>"]`` is written, ``float32 (n_tiles, n_fields * n_features)``,
    and ``uns["embeddings"]`` says how. A run that was interrupted goes on where it stopped.

    Raises
    ------
    KeyError
        If a section was not tiled; none is embedded then.
    ValueError
        If a field of view is not positive, or `context_rings` is negative.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_embed", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> section.tables["tiles"].obsm["X_efficientnet_lite0"].shape
    (30, 1280)
    """
    fields = [float(field) for field in fields_of_view]
    if not fields or min(fields) <= 0:
        raise ValueError(f"Expected `fields_of_view` as positive multiples of the tile's side, found {fields}.")
    if context_rings < 0:
        raise ValueError(f"Expected `context_rings` of at least 0, found {context_rings}.")
    network = get_extractor(extractor, weights=weights) if isinstance(extractor, str) else extractor
    sections = list(contract.sections(data).values())
    jobs = [_job(sdata, network, fields, image_key=image_key, batch_size=batch_size) for sdata in sections]
    label = contract.sample(sections[0]) if len(sections) == 1 else f"{len(sections)} sections"
    results = run_over_images(jobs, n_workers=n_workers, description=f"{label}: {network.name}")
    for sdata, job, values in zip(sections, jobs, results, strict=True):
        _write(sdata, network, fields, contract.working_image_name(sdata, image_key), job.target, values)
        if context_rings:
            spatial_context(sdata, network.name, n_rings=context_rings)


def _job(
    sdata: SpatialData, network: Extractor, fields: list[float], *, image_key: str | None, batch_size: int | None
) -> TileJob:
    """Check a section, and say what is to be run over its tiles."""
    table = contract.tiles(sdata)
    name = contract.working_image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    tiling = contract.tiling(sdata)
    return TileJob(
        pyramid=contract.levels(sdata, name),
        centers=np.asarray(table.obsm["spatial"]),
        function=network,
        sides=[field * tiling["side_px"] for field in fields],
        target=tiling["target_px"] if network.input_size is None else network.input_size,
        key=f"{network.name}-{network.weights_hash}",
        shape=(network.embedding_size,),
        batch_size=_batch_size(network, len(table)) if batch_size is None else batch_size,
    )


def _write(
    sdata: SpatialData, network: Extractor, fields: list[float], image: str, target: int, values: np.ndarray
) -> None:
    """Write a section's embeddings and how they were made; those of its tiles' neighbours are no longer true."""
    table = contract.tiles(sdata)
    table.obsm[contract.feature_key(network.name)] = values.reshape(len(values), -1)
    table.obsm.pop(contract.context_key(network.name), None)
    table.uns.setdefault("embeddings", {})[network.name] = {
        "image": image,
        "weights_hash": network.weights_hash,
        "fields_of_view": fields,
        "input_px": int(target),
        "context_rings": 0,
        "stain": _stain(sdata, image),
    }
    contract.record(sdata, "pp.embed", extractor=network.name, fields_of_view=fields, image=image)


def _batch_size(network: Extractor, n_tiles: int) -> int:
    """Tiles a batch where nobody says: 32, or fewer where tiles are few and a network runs them in pairs anyway.

    Few batches leave cores idle at the end: two cores take as long for 49 tiles in batches of 32 as for 64. The number
    does not depend on the machine, so that a run can be resumed on another.
    """
    return min(32, ONNX_BATCH * max(1, n_tiles // 128)) if network.is_recordable else 32


def _stain(sdata: SpatialData, image: str) -> str:
    """How the image that was embedded is stain-normalised, as JSON; empty where it is not."""
    section = contract.info(sdata)
    return json.dumps(section["stain"]) if section.get("normalized_image") == image else ""
