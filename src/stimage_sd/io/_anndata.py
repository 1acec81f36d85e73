"""An analysis that was begun with scanpy or squidpy, and the H&E beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._raster import open_raster, raster_from_array
from stimage_sd.io._section import as_counts, assemble, check_mpp, check_unique, unique_genes

#: columns of `obs` that the section's table needs for itself
RESERVED = (contract.REGION_KEY, contract.INSTANCE_KEY)


def from_anndata(
    adata: AnnData,
    image: str | Path | np.ndarray | da.Array,
    *,
    sample: str | None = None,
    mpp: float | None = None,
    layer: str | None = None,
    library_id: str | None = None,
    spot_diameter_px: float | None = None,
) -> SpatialData:
    """Make a section of an existing squidpy or scanpy analysis.

    Parameters
    ----------
    adata
        One section, with ``obsm["spatial"]`` (x, y) in pixels of `image`. It is not changed; ``obs``,
        ``var`` and ``obsm`` are kept. Columns ``region`` and ``instance_id`` of ``obs`` are kept as
        ``region_original`` and ``instance_id_original``.
    image
        The H&E at full resolution: a file, or ``uint8 (y, x, 3)`` or ``(3, y, x)``.
    sample
        Sample id; the library id unless given.
    mpp
        Micrometres a pixel of the image. Unless given, what the file states; it is not guessed.
    layer
        The layer with raw counts. Unless given, the first of ``layers["counts"]``, ``X`` and ``raw.X``
        that holds nothing but counts.
    library_id
        The entry of ``uns["spatial"]`` to take the spot's diameter from, where there are several.
    spot_diameter_px
        Diameter of a spot, pixels of the image; ``spot_diameter_fullres`` of the library unless given.

    Returns
    -------
    A section with the image ``he``, the shapes ``spots`` and the table ``counts``.

    Raises
    ------
    KeyError
        If ``obsm["spatial"]``, the layer, the library or the spot's diameter is missing.
    ValueError
        If nothing holds raw counts, a spot lies outside the image, or the image is not 8-bit RGB.

    Examples
    --------
    >>> import numpy as np
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> image = np.full((200, 200, 3), 230, np.uint8)
    >>> sdata = from_anndata(adata, image, sample="tiny", mpp=1.0, spot_diameter_px=55.0)
    >>> sdata.shapes["spots"].radius.tolist()
    [27.5, 27.5]
    """
    check_mpp(mpp)
    if "spatial" not in adata.obsm:
        raise KeyError(
            f'Expected `adata.obsm["spatial"]` (x, y in pixels of the image), found {sorted(adata.obsm)}. '
            "Set it to the spots' positions."
        )
    check_unique(adata.obs_names, what="observation", where="`adata`")
    library, scalefactors = _library(adata, library_id)
    if spot_diameter_px is None:
        spot_diameter_px = scalefactors.get("spot_diameter_fullres")
    if spot_diameter_px is None or not spot_diameter_px > 0:
        raise KeyError(
            f"Expected the spot's diameter in `adata.uns['spatial'][{library!r}]['scalefactors']"
            f"['spot_diameter_fullres']`, found {sorted(scalefactors)}. Pass `spot_diameter_px=`."
        )
    values, variables, source = _raw_counts(adata, layer)
    table = AnnData(
        X=values,
        obs=adata.obs.rename(columns={name: f"{name}_original" for name in RESERVED}),
        var=variables.set_axis(unique_genes(variables.index, where="`adata`"), axis=0),
        obsm={key: np.array(value) if key == "spatial" else value for key, value in adata.obsm.items()},
    ).copy()
    table.obsm["spatial"] = np.asarray(table.obsm["spatial"], dtype=np.float64)[:, :2]

    levels, stated = open_raster(image) if isinstance(image, str | Path) else (raster_from_array(image), None)
    mpp = mpp if mpp is not None else stated
    sample = sample if sample is not None else library if library is not None else "section"
    sdata = assemble(levels, table, diameter_px=float(spot_diameter_px), sample=sample, platform="anndata", mpp=mpp)
    contract.record(
        sdata,
        "io.from_anndata",
        image=image if isinstance(image, str | Path) else f"array {tuple(image.shape)}",
        counts=source,
        library_id=library,
        spot_diameter_px=spot_diameter_px,
        mpp=mpp,
        n_spots=table.n_obs,
    )
    return sdata


def _library(adata: AnnData, library_id: str | None) -> tuple[str | None, Mapping[str, Any]]:
    """Return the library's id and its scale factors, `None` and nothing where there is no library."""
    libraries = adata.uns.get("spatial", {})
    if library_id is None:
        if not libraries:
            return None, {}
        if len(libraries) > 1:
            raise KeyError(
                f"Expected one section, found the libraries {sorted(libraries)} in `adata.uns['spatial']`. "
                "Subset `adata` to one of them and name it with `library_id=`."
            )
        library_id = next(iter(libraries))
    if library_id not in libraries:
        raise KeyError(f"No library {library_id!r} in `adata.uns['spatial']`; its libraries: {sorted(libraries)}.")
    return library_id, libraries[library_id].get("scalefactors", {})


def _raw_counts(adata: AnnData, layer: str | None) -> tuple[Any, pd.DataFrame, str]:
    """Return raw counts, their genes and where they were found."""
    if layer is not None:
        if layer not in adata.layers:
            named = sorted(name for name in adata.layers if name is not None)  # anndata 0.13 lists X as None
            raise KeyError(f"No layer {layer!r} in `adata`; its layers: {named}.")
        where = f"`adata.layers[{layer!r}]`"
        return as_counts(adata.layers[layer], where=where), adata.var, where
    candidates: list[tuple[str, Any, pd.DataFrame]] = []
    if "counts" in adata.layers:
        candidates.append(("`adata.layers['counts']`", adata.layers["counts"], adata.var))
    if adata.X is not None:
        candidates.append(("`adata.X`", adata.X, adata.var))
    if adata.raw is not None:
        candidates.append(("`adata.raw.X`", adata.raw.X, adata.raw.var))
    refusals = []
    for where, values, variables in candidates:
        try:
            return as_counts(values, where=where), variables, where
        except ValueError as error:
            refusals.append(str(error))
    raise ValueError(
        f"Expected raw counts in `layers['counts']`, `X` or `raw.X` of `adata`, found none. {' '.join(refusals)} "
        "Name a layer with `layer=`."
    )
