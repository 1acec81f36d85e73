"""Find the nuclei of a slide and tell the type of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import xarray as xr
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._nuclei_blocks import Blocks, Nuclei, find_in_blocks, lay_blocks, stitch
from stimage_sd._slide_region import Region
from stimage_sd._squidpy import spatial_uns
from stimage_sd.models._cell_classifier import MOST_COARSE, NUCLEUS_UM, CellFinder
from stimage_sd.models._latent_space import BACKGROUND_FEATURES, CELL_FEATURES
from stimage_sd.nn.cell_scores import entropy
from stimage_sd.stream import run_over_tiles

#: windows that places without a nucleus are drawn from, their side, px, and places a window
_N_WINDOWS, _WINDOW_PX, _PLACES = 16, 256, 32
#: what is seen around a block's core, diameters of a nucleus
_MARGIN = 4.0


def predict_cells(
    data: SpatialData | contract.Cohort,
    model: CellFinder,
    *,
    tiles: Sequence[str | int] | None = None,
    shapes_key: str = contract.NUCLEI,
    block_size: int = 512,
    image_key: str | None = None,
    n_workers: int | None = None,
) -> None:
    """Find the nuclei of H&E and predict the type of each, with its uncertainty.

    The slide is worked through block by block, on tissue only; a nucleus on a border is counted once, and a run that
    was interrupted goes on where it stopped.

    Parameters
    ----------
    data
        A section, or a cohort of them. It needs no molecules, only tissue (`stimage_sd.pp.tissue_mask`) or tiles.
    model
        A fitted cell classifier, or another network of that kind.
    tiles
        Names or numbers of tiles: only nuclei with their centre in one of them.
    shapes_key
        Name of the shapes to write. Where a section has measured nuclei of that name, choose another.
    block_size
        Side of a block's core, px of the network's resolution. Memory grows with its square.
    image_key
        The H&E image, where it is not the section's own.
    n_workers
        Threads; all cores by default. An active `dask.distributed` client is used instead.

    Returns
    -------
    Nothing; written are ``shapes["nuclei"]``: polygons in ``"global"`` with ``cell_type``, ``entropy`` (0 sure, 1 none
    the wiser), a probability a class (``p_<class>``), ``area`` (µm²), ``eccentricity`` and ``haematoxylin``; and
    ``tables["cell_types"]``, which annotates them: ``X`` = the probabilities, ``obs`` the same columns,
    ``obsm["spatial"]`` their centres, ``obsm["X_cell_features"]`` what the types were told by, and
    ``uns["background_features"]`` the same of some places without a nucleus. Squidpy's functions on neighbourhoods take
    the table as it is.

    Raises
    ------
    KeyError
        If a section has neither tissue nor tiles.
    ValueError
        If there are other shapes of that name, the slide's resolution is unknown or coarser than the network's, the
        image is not 8-bit RGB, or no nucleus is found.

    Notes
    -----
    Paper, section 2.7. The probabilities of a nucleus are the means over its pixels, without the background's.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.predict_cells(section, model, shapes_key="nuclei_predicted")  # doctest: +SKIP
    """
    cohort = contract.sections(data)
    # all are checked before any is written
    plans = {
        name: _Plan.of(sdata, model, tiles, shapes_key=shapes_key, block_size=block_size, image_key=image_key)
        for name, sdata in cohort.items()
    }
    for name, sdata in cohort.items():
        nuclei = plans[name].run(model, n_workers=n_workers, label=f"{contract.sample(sdata)}: cells")
        if len(nuclei.centres) == 0:
            raise ValueError(
                f"Found no nuclei on section {contract.sample(sdata)!r}. Is it H&E, in focus, and does `model` know it?"
            )
        frame, table = _tabled(sdata, nuclei, model)
        if model.n_values > len(model.classes):
            table.uns[BACKGROUND_FEATURES] = plans[name].background(model, n_workers=n_workers)
        contract.write_cells(sdata, frame, table, name=shapes_key)
        contract.record(
            sdata, "tl.predict_cells", model=model.key, classes=list(model.classes), shapes_key=shapes_key,
            n_nuclei=len(frame),
        )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """Where nuclei of a section are looked for, and on which image."""

    pyramid: list[xr.DataArray]
    where: Region
    blocks: Blocks

    @classmethod
    def of(
        cls, sdata: SpatialData, model: CellFinder, tiles: Sequence[str | int] | None, *, shapes_key: str,
        block_size: int, image_key: str | None,
    ) -> _Plan:  # fmt: skip
        """Check a section, and lay blocks over its tissue."""
        contract.check_cells_can_be_written(sdata, shapes_key, call="stimage_sd.tl.predict_cells")
        name = contract.image_name(sdata, image_key)
        contract.check_rgb(sdata, name)
        mpp = contract.require_mpp(sdata, purpose="finding nuclei")
        if mpp > MOST_COARSE * model.mpp:
            raise ValueError(
                f"Expected section {contract.sample(sdata)!r} at {model.mpp:g} µm a pixel or finer, as the network was "
                f"trained on, found {mpp:g}. Use a finer scan, or a network that was fitted with `mpp={mpp:g}`."
            )
        margin = int(np.ceil(_MARGIN * NUCLEUS_UM / model.mpp / 8)) * 8
        if block_size < margin:
            raise ValueError(f"Expected `block_size` of at least {margin} px, found {block_size}.")
        pyramid, where = contract.levels(sdata, name), Region.of(sdata, name, tiles)
        height, width = pyramid[0].shape[1:]
        blocks = lay_blocks(width, height, downsample=model.mpp / mpp, core=block_size, margin=margin)
        return cls(pyramid, where, blocks.chosen(where.meets(blocks.cores)))

    def run(self, model: CellFinder, *, n_workers: int | None, label: str) -> Nuclei:
        """Find the nuclei."""
        parts = find_in_blocks(
            self.pyramid,
            self.blocks,
            model,
            key=f"cells-{model.key}",
            n_workers=n_workers,
            description=label,
            n_values=model.n_values,
        )
        return stitch([part.chosen(self.where.holds(part.centres)) for part in parts])

    def background(self, model: CellFinder, *, n_workers: int | None) -> NDArray[np.float32]:
        """Features of places without a nucleus, ``(n, n_features)``."""
        side = _WINDOW_PX * self.blocks.downsample
        height, width = self.pyramid[0].shape[1:]
        centers = self.where.sample(_N_WINDOWS, side=side)
        centers = np.clip(centers, side / 2, np.maximum(np.array([width, height]) - side / 2, side / 2))
        found = run_over_tiles(
            self.pyramid,
            centers,
            _Background(model),
            sides=[side],
            target=_WINDOW_PX,
            key=f"background-{model.key}",
            shape=(_PLACES, model.n_values - len(model.classes)),
            batch_size=1,
            n_workers=n_workers,
            description="background",
        )
        flat = found.reshape(-1, found.shape[-1])
        return flat[np.isfinite(flat).all(axis=1)]


@dataclass(frozen=True)
class _Background:
    """Draws places without a nucleus from windows; NaN where there are too few."""

    model: CellFinder

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        labels, values = self.model(images)
        features = values[..., len(self.model.classes) :]
        drawn = np.full((len(images), _PLACES, features.shape[-1]), np.nan, dtype=np.float32)
        for number, (own, of) in enumerate(zip(labels, features, strict=True)):
            free = of[own == 0]
            chosen = np.random.default_rng(0).permutation(len(free))[:_PLACES]
            drawn[number, : len(chosen)] = free[chosen]
        return drawn


def _tabled(sdata: SpatialData, nuclei: Nuclei, model: CellFinder) -> tuple[gpd.GeoDataFrame, ad.AnnData]:
    """Shapes and table of predicted nuclei."""
    mpp = contract.require_mpp(sdata, purpose="finding nuclei")
    classes, n_classes = list(model.classes), len(model.classes)
    raw = np.maximum(nuclei.values[:, :n_classes], 1e-9)
    probability = raw / raw.sum(axis=1, keepdims=True)
    columns: dict[str, Any] = {
        "cell_type": pd.Categorical(np.array(classes)[probability.argmax(axis=1)], categories=classes),
        "entropy": entropy(probability).astype(np.float32),
        "area": shapely.area(nuclei.outlines) * mpp**2,
        "eccentricity": nuclei.eccentricity,
        "haematoxylin": nuclei.haematoxylin,
    }
    shares = {f"p_{name}": probability[:, number].astype(np.float32) for number, name in enumerate(model.classes)}
    frame = gpd.GeoDataFrame({**columns, **shares}, geometry=nuclei.outlines)
    table = ad.AnnData(
        X=probability.astype(np.float32),
        obs=pd.DataFrame(columns, index=[f"nucleus_{number}" for number in range(len(frame))]),
        var=pd.DataFrame(index=list(model.classes)),
        obsm={"spatial": nuclei.centres},
    )
    table.obs[contract.INSTANCE_KEY] = np.arange(len(frame))
    if model.n_values > n_classes:
        table.obsm[CELL_FEATURES] = nuclei.values[:, n_classes:].astype(np.float32)
    table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=NUCLEUS_UM / mpp)
    return frame, table
