"""Embed tiles with an extractor, through the tile stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractor import ONNX_BATCH, Extractor
from stimage_sd.models._extractors import get_extractor
from stimage_sd.pp._context import spatial_context
from stimage_sd.pp._embed_instances import FIELDS_UM, embed_instances
from stimage_sd.pp._wide_fields import WideMap, is_pooled, wide_maps
from stimage_sd.stream.driver import TileJob, run_over_images

WideFields = Literal["pooled", "separate"]
#: default fields of view of tiles, as multiples of their side
_FIELDS = (1.0, 2.0, 4.0)
#: default tiles per batch; a GPU needs larger batches to be busy
_BATCH, _ACCELERATOR_BATCH = 32, 128


def embed(
    data: SpatialData | contract.Cohort,
    extractor: str | Extractor = "efficientnet_lite0_stages",
    *,
    on: contract.On = "tiles",
    fields_of_view: Sequence[float] | None = None,
    wide_fields: WideFields = "pooled",
    context_rings: int = 1,
    square_um: float = 16.0,
    weights: str | Path | None = None,
    batch_size: int | None = None,
    image_key: str | None = None,
    shapes_key: str | None = None,
    n_jobs: int | None = None,
) -> None:
    """Compute a feature vector per tile, nucleus or square of a fine grid with a pretrained network.

    Parameters
    ----------
    data
        A tiled section, or a cohort of tiled sections. Batches of all sections run together, so that no core waits for
        the last tiles of a section. A section is written when it is complete.
    extractor
        Name of a registered extractor (see `stimage_sd.models.extractors`), or an `Extractor`.
    on
        ``"tiles"``, ``"nuclei"`` (`segment_nuclei`, or other shapes) or ``"grid"`` (squares side by side over the
        tissue). Nuclei and squares are embedded where there are tiles, whose embeddings models of nuclei need as well.
    fields_of_view
        Sides of the squares that are embedded around a center. Their embeddings are concatenated. Of tiles, they are
        multiples of the tile's side, by default ``(1.0, 2.0, 4.0)``. The paper uses ``(1.0,)``. The wider squares show
        the surroundings and raise accuracy (docs, "Design decisions"). Of nuclei and squares, they are micrometers, by
        default 8 and 25.
    wide_fields
        For tiles: how fields wider than a tile are embedded. ``"pooled"`` embeds the tissue once per field, at a lower
        resolution, and takes the mean of the features inside each tile's field. This takes half of the time and scores
        as well (docs, "Design decisions"). Networks that do not average positions, such as vision transformers, and
        tiles of few pixels embed every field of every tile, as ``"separate"`` does, and as 0.1.0 did.
    context_rings
        For tiles: number of rings of neighboring tiles whose mean embedding is stored as well (see `spatial_context`).
        0 stores none.
    square_um
        For ``on="grid"``: side of the squares, µm.
    weights
        Weights file, if the weights are not found automatically.
    batch_size
        Tiles or nuclei per batch. By default 32 tiles, or fewer for few tiles, and 128 nuclei, or more for more than
        131,072 nuclei. On a GPU, 128 tiles and 1,024 nuclei.
    image_key
        The image that tiles are cut from. By default the stain-normalized H&E if it exists, else the H&E.
    shapes_key
        For ``on="nuclei"``: name of the nuclei's shapes, by default ``"nuclei"``.
    n_jobs
        Number of threads; all cores by default. An active `dask.distributed` client is used instead. Its workers must
        see the images and the cache folder (``$STIMAGE_SD_CACHE``). The folder keeps results until all sections are
        complete.

    Returns
    -------
    Nothing. Writes ``tables["tiles"].obsm["X_<extractor>"]``, ``float32 (n_tiles, n_fields * n_features)``, and the
    settings to ``uns["embeddings"]``. An interrupted run resumes where it stopped.

    For nuclei and squares, the table is ``tables["nuclei_features"]`` or ``tables["grid_features"]``, which annotates
    the nuclei, or the squares in ``shapes["grid_squares"]``.

    Raises
    ------
    KeyError
        If a section was not tiled, or has no nuclei. No section is embedded then.
    ValueError
        If a field of view is not positive, or `context_rings` is negative. For nuclei and squares, if the resolution is
        unknown, or none lies near a tile.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_embed", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> section.tables["tiles"].obsm["X_efficientnet_lite0_stages"].shape
    (30, 176)
    """
    if on not in ("tiles", "nuclei", "grid"):
        raise ValueError(f'Expected `on` to be "tiles", "nuclei" or "grid", found {on!r}.')
    usual = _FIELDS if on == "tiles" else FIELDS_UM
    fields = [float(field) for field in (usual if fields_of_view is None else fields_of_view)]
    if not fields or min(fields) <= 0:
        raise ValueError(f"Expected `fields_of_view` as positive lengths, found {fields}.")
    if wide_fields not in get_args(WideFields):
        raise ValueError(f'Expected `wide_fields` to be "pooled" or "separate", found {wide_fields!r}.')
    if not square_um > 0:
        raise ValueError(f"Expected `square_um` to be positive, found {square_um}.")
    if context_rings < 0:
        raise ValueError(f"Expected `context_rings` of at least 0, found {context_rings}.")
    network = get_extractor(extractor, weights=weights) if isinstance(extractor, str) else extractor
    cohort = contract.sections(data)
    if on != "tiles":
        embed_instances(
            cohort, network, on=on, fields_um=fields, square_um=square_um, shapes_key=shapes_key,
            batch_size=batch_size, image_key=image_key, n_jobs=n_jobs,
        )  # fmt: skip
        return
    plans = [
        _plan(sdata, network, fields, pooled=wide_fields == "pooled", image_key=image_key, batch_size=batch_size)
        for sdata in cohort.values()
    ]
    label = contract.sample(plans[0].sdata) if len(plans) == 1 else f"{len(plans)} sections"
    owners = [plan for plan in plans for _ in plan.jobs]
    jobs = [job for plan in plans for job in plan.jobs]
    done: list[np.ndarray] = []
    results = run_over_images(jobs, n_jobs=n_jobs, description=f"{label}: {network.name}")
    for plan, values in zip(owners, results, strict=True):
        done.append(values)
        if len(done) == len(plan.jobs):
            _write(plan, network, plan.together(done))
            done.clear()
            if context_rings:
                spatial_context(plan.sdata, network.name, n_rings=context_rings)


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a section's tiles are embedded: the jobs of the maps of wide fields, then that of the other fields."""

    sdata: SpatialData
    image: str
    target: int
    fields: list[float]
    maps: dict[int, WideMap]
    alone: list[int]
    jobs: list[TileJob]

    def together(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings of all fields, ``float32 (n_tiles, n_fields * n_features)``."""
        by_place = {place: one.pool(means) for (place, one), means in zip(self.maps.items(), results, strict=False)}
        for values in results[len(self.maps) :]:
            by_place |= {place: values[:, column] for column, place in enumerate(self.alone)}
        return np.concatenate([by_place[place] for place in range(len(self.fields))], axis=1)


def _plan(
    sdata: SpatialData, network: Extractor, fields: list[float], *, pooled: bool, image_key: str | None,
    batch_size: int | None,
) -> _Plan:  # fmt: skip
    """Check a section and return what to run over its tiles."""
    table = contract.tiles(sdata)
    name = contract.working_image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    pyramid = contract.levels(sdata, name)
    centers, side = contract.tile_geometry(sdata, image_key=name)
    target = contract.tiling(sdata)["target_px"] if network.input_size is None else network.input_size
    maps: dict[int, WideMap] = {}
    if pooled and is_pooled(network, fields, target):
        maps = wide_maps(fields, centers, side=side, target=target)
    alone = [place for place in range(len(fields)) if place not in maps]
    jobs = [one.job(pyramid, network) for one in maps.values()]
    if alone:
        of_tiles = TileJob(
            pyramid=pyramid,
            centers=centers,
            function=network,
            sides=[fields[place] * side for place in alone],
            target=target,
            key=f"{network.name}-{network.weights_hash}",
            shape=(network.embedding_size,),
            batch_size=_batch_size(network, len(table)) if batch_size is None else batch_size,
        )
        jobs.append(of_tiles)
    return _Plan(sdata, name, target, fields, maps, alone, jobs)


def _write(plan: _Plan, network: Extractor, values: np.ndarray) -> None:
    """Write a section's embeddings and their settings."""
    wide = "pooled" if plan.maps else "separate"
    contract.write_embeddings(
        plan.sdata,
        network.name,
        values,
        image=plan.image,
        input_px=plan.target,
        weights_hash=network.weights_hash,
        fields_of_view=plan.fields,
        wide_fields=wide,
        stain=contract.stain_of(plan.sdata, plan.image),
    )
    contract.record(
        plan.sdata, "pp.embed", extractor=network.name, fields_of_view=plan.fields, wide_fields=wide, image=plan.image
    )


def _batch_size(network: Extractor, n_tiles: int) -> int:
    """Return the default tiles per batch: 32, or fewer for few tiles if the network runs in small batches anyway.

    Few batches leave cores idle at the end: two cores take as long for 49 tiles in batches of 32 as for 64 tiles. The
    number does not depend on the number of cores, so that a run can be resumed on another machine of its kind.
    """
    if network.is_on_accelerator:
        return _ACCELERATOR_BATCH
    return min(_BATCH, ONNX_BATCH * max(1, n_tiles // 128)) if network.is_recordable else _BATCH
