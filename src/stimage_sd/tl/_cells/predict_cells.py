"""Find the nuclei of a slide and predict their types."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from stimage_sd._settings import logger
from stimage_sd._squidpy import spatial_uns
from stimage_sd.image.cell_scores import entropy
from stimage_sd.models._cell_classifier import MOST_COARSE, NUCLEUS_UM, CellFinder
from stimage_sd.models._latent_space import BACKGROUND_FEATURES, CELL_FEATURES
from stimage_sd.models._resolve import as_model
from stimage_sd.stream.driver import run_over_tiles
from stimage_sd.stream.nuclei_blocks import Blocks, Nuclei, find_in_blocks, lay_blocks, stitch
from stimage_sd.stream.region import Region
from stimage_sd.tl._cohort.failures import reason

#: windows for background features, side of a window in px, and places per window
_N_WINDOWS, _WINDOW_PX, _PLACES = 16, 256, 32
#: margin around a block's core, nucleus diameters
_MARGIN = 4.0


def predict_cells(
    data: SpatialData | contract.Cohort,
    model: CellFinder | str | Path,
    *,
    tiles: Sequence[str | int] | None = None,
    block_size: int = 512,
    key_added: str = contract.NUCLEI,
    image_key: str | None = None,
    n_jobs: int | None = None,
) -> None:
    """Find the nuclei on H&E and predict their types, with uncertainty.

    The slide is processed in blocks, on tissue only. A nucleus on a block border counts once. An interrupted call
    resumes where it stopped. If a section of a cohort fails, the other sections continue.

    Parameters
    ----------
    data
        A section or a cohort with tissue (`stimage_sd.pp.tissue_mask`) or tiles. Expression is not needed.
    model
        A fitted cell classifier, the path of one, or another cell finder.
    tiles
        Names or numbers of tiles. Only nuclei with their center in one of these tiles are kept.
    block_size
        Side of a block's core, px at the network's resolution. Memory grows with the square of the side.
    key_added
        Name of the shapes to write. Choose another name if a section has measured nuclei of this name.
    image_key
        Name of the H&E image. Default: the section's H&E.
    n_jobs
        Number of threads. Default: all cores. An active `dask.distributed` client takes precedence.

    Returns
    -------
    Nothing. Two elements are written.

    ``shapes["nuclei"]`` holds polygons in ``"global"`` with ``cell_type``, ``entropy`` (0 certain, 1 uniform), one
    probability per class (``p_<class>``), ``area`` (µm²), ``eccentricity`` and ``hematoxylin``.

    ``tables["cell_types"]`` annotates these shapes. ``X`` holds the probabilities. ``obs`` has ``cell_type``,
    ``entropy``, ``area``, ``eccentricity`` and ``hematoxylin``. ``obsm["spatial"]`` holds the centers, and
    ``obsm["X_cell_features"]`` the features from which the types are predicted. ``uns["background_features"]`` holds
    features of some places without a nucleus. Squidpy's neighborhood functions accept this table.

    Raises
    ------
    KeyError
        If a section has neither tissue nor tiles.
    ValueError
        If there are other shapes of that name, the slide's resolution is unknown or coarser than the network's, the
        image is not 8-bit RGB, no nucleus is found, or all sections of a cohort fail.

    Warns
    -----
    UserWarning
        If some sections of a cohort failed. The warning names the sections and the reasons.

    Notes
    -----
    Paper, section 2.7. The probabilities of a nucleus are means over its pixels, normalized without the background.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.predict_cells(section, model, key_added="nuclei_predicted")  # doctest: +SKIP
    """
    model = as_model(model)
    cohort = contract.sections(data)
    options: dict[str, Any] = {"tiles": tiles, "key_added": key_added, "block_size": block_size, "image_key": image_key}
    logger.info("Finding cells of %d types on %d sections.", len(model.classes), len(cohort))
    failed: dict[str, str] = {}
    first: Exception | None = None  # keep one exception only, because it keeps its section in memory
    for name, sdata in cohort.items():
        try:
            _predict_section(sdata, model, n_jobs=n_jobs, **options)
        # any failure of one section must not stop the others
        except Exception as error:
            if len(cohort) == 1:
                raise
            failed[name] = reason(error)
            first = error if first is None else first
    if first is None:
        return
    reasons = "; ".join(f"{name!r}: {why}" for name, why in failed.items())
    if len(failed) == len(cohort):
        first.add_note(f"All {len(cohort)} sections failed. {reasons}")
        raise first
    warnings.warn(f"{len(failed)} of {len(cohort)} sections failed. {reasons}", UserWarning, stacklevel=2)


def _predict_section(
    sdata: SpatialData, model: CellFinder, *, key_added: str, n_jobs: int | None, **options: Any
) -> None:
    """Find and write the nuclei of one section."""
    plan = _Plan.of(sdata, model, key_added=key_added, **options)
    nuclei = plan.run(model, n_jobs=n_jobs, label=f"{contract.sample(sdata)}: cells")
    if len(nuclei.centers) == 0:
        raise ValueError(
            f"Found no nuclei on section {contract.sample(sdata)!r}. Check that the image is H&E and in focus, and "
            "that `model` was fitted to such tissue."
        )
    frame, table = _tabled(sdata, nuclei, model, plan.image)
    if model.n_values > len(model.classes):
        table.uns[BACKGROUND_FEATURES] = plan.background(model, n_jobs=n_jobs)
    contract.write_cells(sdata, frame, table, name=key_added, image_key=plan.image)
    contract.record(
        sdata, "tl.predict_cells", model=model.key, classes=list(model.classes), key_added=key_added,
        n_nuclei=len(frame),
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """Image and blocks in which to look for the nuclei of a section."""

    image: str
    pyramid: list[xr.DataArray]
    where: Region
    blocks: Blocks

    @classmethod
    def of(
        cls, sdata: SpatialData, model: CellFinder, *, tiles: Sequence[str | int] | None, key_added: str,
        block_size: int, image_key: str | None,
    ) -> _Plan:  # fmt: skip
        """Check a section and lay blocks over its tissue."""
        contract.check_cells_can_be_written(sdata, key_added, call="stimage_sd.tl.predict_cells")
        name = contract.image_name(sdata, image_key)
        contract.check_rgb(sdata, name)
        mpp = contract.require_mpp(sdata, purpose="finding nuclei", image_key=name)
        if mpp > MOST_COARSE * model.mpp:
            raise ValueError(
                f"Expected section {contract.sample(sdata)!r} at {model.mpp:g} µm per pixel or finer, as the network "
                f"was trained on, found {mpp:g}. Use a finer scan, or a network fitted with `mpp={mpp:g}`."
            )
        margin = int(np.ceil(_MARGIN * NUCLEUS_UM / model.mpp / 8)) * 8
        if block_size < margin:
            raise ValueError(f"Expected `block_size` of at least {margin} px, found {block_size}.")
        pyramid, where = contract.levels(sdata, name), Region.of(sdata, name, tiles)
        height, width = pyramid[0].shape[1:]
        blocks = lay_blocks(width, height, downsample=model.mpp / mpp, core=block_size, margin=margin)
        return cls(name, pyramid, where, blocks.chosen(where.meets(blocks.cores)))

    def run(self, model: CellFinder, *, n_jobs: int | None, label: str) -> Nuclei:
        """Find the nuclei in all blocks."""
        parts = find_in_blocks(
            self.pyramid,
            self.blocks,
            model,
            key=f"cells-{model.key}",
            n_jobs=n_jobs,
            description=label,
            n_values=model.n_values,
        )
        return stitch([part.chosen(self.where.holds(part.centers)) for part in parts])

    def background(self, model: CellFinder, *, n_jobs: int | None) -> NDArray[np.float32]:
        """Return features of places without a nucleus, ``(n, n_features)``."""
        side = _WINDOW_PX * self.blocks.downsample
        height, width = self.pyramid[0].shape[1:]
        centers = self.where.sample(_N_WINDOWS, side=side)
        centers = np.clip(centers, side / 2, np.maximum(np.array([width, height]) - side / 2, side / 2))
        values = run_over_tiles(
            self.pyramid,
            centers,
            _Background(model),
            sides=[side],
            target=_WINDOW_PX,
            key=f"background-{model.key}",
            shape=(_PLACES, model.n_values - len(model.classes)),
            batch_size=1,
            n_jobs=n_jobs,
            description="background",
        )
        flat = values.reshape(-1, values.shape[-1])
        return flat[np.isfinite(flat).all(axis=1)]


@dataclass(frozen=True)
class _Background:
    """Sample features of places without a nucleus per window, NaN if there are too few."""

    model: CellFinder

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        labels, values = self.model(images)
        features = values[..., len(self.model.classes) :]
        drawn = np.full((len(images), _PLACES, features.shape[-1]), np.nan, dtype=np.float32)
        for index, (nuclei, of) in enumerate(zip(labels, features, strict=True)):
            free = of[nuclei == 0]
            chosen = np.random.default_rng(0).permutation(len(free))[:_PLACES]
            drawn[index, : len(chosen)] = free[chosen]
        return drawn


def _tabled(sdata: SpatialData, nuclei: Nuclei, model: CellFinder, image: str) -> tuple[gpd.GeoDataFrame, ad.AnnData]:
    """Build shapes and table of the predicted nuclei, with positions in px of the image."""
    mpp = contract.require_mpp(sdata, purpose="finding nuclei", image_key=image)
    classes, n_classes = list(model.classes), len(model.classes)
    raw = np.maximum(nuclei.values[:, :n_classes], 1e-9)
    probability = raw / raw.sum(axis=1, keepdims=True)
    columns: dict[str, Any] = {
        "cell_type": pd.Categorical(np.array(classes)[probability.argmax(axis=1)], categories=classes),
        "entropy": entropy(probability).astype(np.float32),
        "area": shapely.area(nuclei.outlines) * mpp**2,
        "eccentricity": nuclei.eccentricity,
        "hematoxylin": nuclei.hematoxylin,
    }
    shares = {f"p_{name}": probability[:, index].astype(np.float32) for index, name in enumerate(model.classes)}
    frame = gpd.GeoDataFrame({**columns, **shares}, geometry=nuclei.outlines)
    table = ad.AnnData(
        X=probability.astype(np.float32),
        obs=pd.DataFrame(columns, index=[f"nucleus_{index}" for index in range(len(frame))]),
        var=pd.DataFrame(index=list(model.classes)),
        obsm={"spatial": nuclei.centers},
    )
    table.obs[contract.INSTANCE_KEY] = np.arange(len(frame))
    if model.n_values > n_classes:
        table.obsm[CELL_FEATURES] = nuclei.values[:, n_classes:].astype(np.float32)
    table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=NUCLEUS_UM / mpp, image_key=image)
    return frame, table
