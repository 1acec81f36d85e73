"""Embed nuclei, or the squares of a fine grid, with an extractor, through the tile stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractor import Extractor
from stimage_sd.stream.driver import TileJob, run_over_images

#: sides of the squares that are embedded around a nucleus, µm: the nucleus, and its surroundings
FIELDS_UM = (8.0, 25.0)
#: side that these squares are resampled to for networks that take any size, px
_TARGET_PX = 64
#: least and largest default number of nuclei per batch, and number of batches of a slide between both
_BATCH, _MOST, _BATCHES = 128, 1024, 1024
#: batches are multiples of this, so that ONNX Runtime sees the same nuclei together whatever the size of a batch
_TOGETHER = 8


def embed_instances(
    cohort: dict[str, SpatialData],
    network: Extractor,
    *,
    on: contract.On,
    fields_um: Sequence[float],
    square_um: float,
    shapes_key: str | None,
    batch_size: int | None,
    image_key: str | None,
    n_jobs: int | None,
) -> None:
    """Embed the nuclei or squares of sections; see `stimage_sd.pp.embed`."""
    target = _TARGET_PX if network.input_size is None else network.input_size
    names = {name: contract.working_image_name(sdata, image_key) for name, sdata in cohort.items()}
    mpps = {
        name: contract.require_mpp(sdata, purpose="fields of view in micrometers", image_key=names[name])
        for name, sdata in cohort.items()
    }
    tables = {}
    for name, sdata in cohort.items():
        contract.check_rgb(sdata, names[name])
        tables[name] = (
            _nuclei(sdata, shapes_key) if on == "nuclei" else _grid(sdata, square_um, names[name], mpps[name])
        )
    jobs = [
        TileJob(
            pyramid=contract.levels(sdata, names[name]),
            centers=contract.places(sdata, tables[name], names[name]),
            function=network,
            sides=[field / mpps[name] for field in fields_um],
            target=target,
            key=f"{network.name}-{network.weights_hash}",
            shape=(network.embedding_size,),
            batch_size=_batch_size(network, tables[name].n_obs) if batch_size is None else batch_size,
        )
        for name, sdata in cohort.items()
    ]
    label = next(iter(cohort)) if len(cohort) == 1 else f"{len(cohort)} sections"
    results = run_over_images(jobs, n_jobs=n_jobs, description=f"{label}: {network.name} of {on}")
    for (name, sdata), values in zip(cohort.items(), results, strict=True):
        about: dict[str, Any] = {
            "image": names[name],
            "weights_hash": network.weights_hash,
            "fields_um": [float(field) for field in fields_um],
            "input_px": target,
            "stain": contract.stain_of(sdata, names[name]),
        }
        tables[name].obsm[contract.feature_key(network.name)] = values.reshape(len(values), -1)
        tables[name].uns.setdefault("embeddings", {})[network.name] = about
        contract.record(
            sdata, "pp.embed", on=on, extractor=network.name, fields_um=about["fields_um"], image=names[name]
        )


def _batch_size(network: Extractor, n_nuclei: int) -> int:
    """Return the default nuclei per batch: more for a large slide, whose many batches would keep a scheduler busy."""
    if network.is_on_accelerator:
        return _MOST
    return min(_MOST, max(_BATCH, n_nuclei // _BATCHES // _TOGETHER * _TOGETHER))


def _nuclei(sdata: SpatialData, shapes_key: str | None) -> AnnData:
    """Make the table of the nuclei that lie near a tile."""
    frame = contract.nuclei(sdata, shapes_key)
    centers = shapely.get_coordinates(shapely.centroid(contract.outlines(frame)))
    near = _near_tiles(sdata, centers, "nuclei")
    name = contract.nuclei_name(sdata, shapes_key)
    return contract.write_instances(
        sdata, "nuclei", shapes=name, ids=frame.index[near], centers=centers[near], about={}
    )


def _grid(sdata: SpatialData, square_um: float, image: str, mpp: float) -> AnnData:
    """Lay squares side by side over the tissue near tiles, and make their table."""
    side = square_um / mpp
    width, height = contract.image_size(sdata, image)
    columns, rows = (np.arange(int(extent // side)) for extent in (width, height))
    if not len(columns) or not len(rows):
        raise ValueError(f"Squares of {square_um:g} µm are larger than section {contract.sample(sdata)!r}.")
    centers = (np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) + 0.5) * side
    if contract.has_tissue(sdata):
        mask, (down_y, down_x) = contract.tissue(sdata, image)
        at_row, at_column = (
            np.minimum((centers[:, axis] / down).astype(int), mask.shape[1 - axis] - 1)
            for axis, down in ((1, down_y), (0, down_x))
        )
        centers = centers[mask[at_row, at_column]]
    frame = gpd.GeoDataFrame(geometry=shapely.box(*(centers - side / 2).T, *(centers + side / 2).T))
    placed = contract.pixel_frame(sdata, image).shapes(frame.iloc[:1].copy())
    to_home = contract.pixel_frame(sdata).matrix(placed, contract.GRID_SQUARES)
    at_home = contract.apply(to_home, np.asarray(centers, dtype=np.float64))
    near = _near_tiles(sdata, at_home, "squares")
    frame = frame[near].reset_index(drop=True)
    about = {"size_um": float(square_um), "image": image}
    table = contract.write_instances(
        sdata, "grid", shapes=contract.GRID_SQUARES, ids=frame.index, centers=at_home[near], about=about
    )
    contract.write_shapes(sdata, frame, name=contract.GRID_SQUARES, image_key=image)
    return table


def _near_tiles(sdata: SpatialData, centers: NDArray[np.float64], what: str) -> NDArray[np.bool_]:
    """Return which centers, px of the H&E, lie on the image and near a tile."""
    near = ((centers >= 0) & (centers < contract.image_size(sdata))).all(axis=1) & contract.near_tiles(sdata, centers)
    if not near.any():
        raise ValueError(
            f"None of the {len(centers)} {what} of section {contract.sample(sdata)!r} lies near one of its tiles. Do "
            "shapes and tiles lie on the same tissue?"
        )
    return np.asarray(near)
