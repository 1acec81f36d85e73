"""CODEX, PhenoCycler and other multiplexed immunofluorescence: a table of cells, the image, an H&E beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from anndata.utils import make_index_unique
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

from stimage_sd import contract
from stimage_sd._squidpy import attach_spatial
from stimage_sd.io._cell_tables import CellTable, read_cells
from stimage_sd.io._multichannel import MultichannelImage, open_multichannel
from stimage_sd.io._raster import open_raster
from stimage_sd.io._section import check_mpp
from stimage_sd.io._xenium_images import HE, open_he

#: radius of the circles of cells whose area is not known, µm; for pictures only
NOMINAL_RADIUS_UM = 4.0
#: channels without an antibody
BLANK = re.compile(r"(blank|empty)(?![a-z])", re.IGNORECASE)
#: columns of a table that the contract has for itself, and what a cell table's own become
RESERVED = {contract.REGION_KEY: "acquisition_region", contract.INSTANCE_KEY: "own_instance_id"}

Channels = Sequence[str] | Mapping[str, str]


def codex(
    cells: str | Path | None = None,
    image: str | Path | None = None,
    *,
    channels: Channels | None = None,
    mpp: float | None = None,
    he_image: str | Path | None = None,
    alignment: str | Path | np.ndarray | None = None,
    sample: str | None = None,
) -> SpatialData:
    """Read a CODEX (PhenoCycler) section, or one of another multiplexed immunofluorescence.

    Parameters
    ----------
    cells
        Table of segmented cells: ``.csv``, ``.tsv`` or ``.txt`` (tabs), gzipped or not, or ``.fcs``. Known layouts are
        those of the CODEX Processor (``x:x``, ``cyc002_ch003:Ki67``), of QuPath (``Centroid X µm``,
        ``CD8: Cell: Mean`` or ``Cell: CD8 mean``) and a plain one, as MCMICRO's (``X_centroid``, then every numeric
        column that is no shape or place). Positions are looked for as ``x``/``y``, ``X_centroid``/``Y_centroid``,
        ``centroid_x``/``centroid_y``, ``Centroid X px``/``Centroid Y px`` (pixels of `image`),
        ``Centroid X µm``/``Centroid Y µm`` and ``x_um``/``y_um``, in this order, whatever their case and punctuation.
        `None`: the image alone.
    image
        Multiplex image: OME-TIFF, QPTIFF or multi-page TIFF. It may be left out, where its cells are enough.
    channels
        Which of the table's channels to keep: their names, or ``{name: new name}``, which renames those of the image
        as well. Columns' own names are understood too. The image keeps all its channels, since `pp.register` wants
        the nuclear one; only without `cells` is the choice among the image's. All are kept unless given.
    mpp
        Micrometres a pixel of the multiplex image and so of the cells' positions. Unless given, what `image` states;
        it is not guessed (Akoya's CODEX has 0.377 by default).
    he_image
        H&E image of the same section, in any format of `stimage_sd.io.slide`.
    alignment
        Where the H&E lies: a matrix ``(3, 3)``, or a CSV file of one, from ``(x, y, 1)`` in pixels of the H&E to
        pixels of the multiplex image, as that of `stimage_sd.io.xenium` is. ``np.eye(3)`` says that both have the
        same pixels, which is never assumed. Without it, run `stimage_sd.pp.register` afterwards.
    sample
        Sample id; the name of the file of cells, or of the image, up to its first dot unless given.

    Returns
    -------
    A section with the shapes ``cells`` (circles of the cells' areas; of 4 µm radius where the table has none), the
    table ``proteins`` that annotates them, the image ``multiplex`` (lazy, channels by name) and the image ``he``,
    as far as they were given. ``proteins`` has ``X`` float32 intensities as they are in the file, compensated,
    negative or not; ``var["column"]`` and ``var["blank"]``; ``obs`` with the remaining columns (names cleaned,
    ``region`` becomes ``acquisition_region``); ``obsm["spatial_um"]``, micrometres of the instrument; and
    ``obsm["spatial"]``, pixels of the H&E, where that is placed. Without an H&E, ``"global"`` and ``obsm["spatial"]``
    are pixels of the multiplex image.

    A channel name that appears twice, as nuclear stains and blanks do, gets a suffix (``Blank-1``) in the order of
    the table; one without a name is called by its column. Blank channels are kept and marked in ``var["blank"]``.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is truncated, empty or of another kind; the table lacks positions or has cells of several regions,
        repeated ids, or values that are not finite; a cell lies outside the image; the pixel size is not known;
        a channel of `channels` is not there; or the alignment puts no cell on the H&E.

    Warns
    -----
    UserWarning
        If the H&E states another resolution than its alignment implies, or most cells lie beside it.

    Notes
    -----
    Columns of the CODEX Processor, and that ``size`` counts a cell's voxels, are those of Akoya's page on its FCS
    format. Its positions are pixels of a region; a file of several regions is refused, since they overlap.

    Examples
    --------
    >>> import tempfile
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_codex(Path(tempfile.mkdtemp()) / "run", n_spots=5, n_proteins=3)
    >>> sdata = sti.io.codex(
    ...     run / "cells.csv", run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=run / "he_alignment.csv"
    ... )
    >>> sorted(sdata.images), list(sdata.tables["proteins"].var_names[-3:])
    (['he', 'multiplex'], ['AG01', 'AG02', 'AG03'])
    """
    check_mpp(mpp)
    if cells is None and image is None:
        raise ValueError("Expected cells, a multiplex image or both, found neither. Pass `cells=` or `image=`.")
    if alignment is not None and he_image is None:
        raise ValueError("Expected `he_image=` with `alignment=`, found no H&E. Pass the image that is aligned.")
    multiplex = None if image is None else open_multichannel(image)
    table = None if cells is None else read_cells(Path(cells).expanduser())
    pixel_um, mpp_source = _pixel_um(mpp, multiplex, cells, image)
    if table is not None and multiplex is not None:
        _check_inside(table, multiplex, pixel_um, image)
    proteins = None if table is None else _proteins(table, pixel_um, channels)
    if multiplex is not None and channels is not None:
        multiplex = _name_channels(multiplex, channels, select=table is None, source=image)
    he = _open_he(he_image, alignment, table=table, multiplex=multiplex, pixel_um=pixel_um)

    sdata = SpatialData(
        images={
            **({} if he is None else {contract.IMAGE: contract.build_image(he.levels)}),
            **({} if multiplex is None else {contract.MULTIPLEX: _build_multiplex(multiplex, pixel_um)}),
        },
        shapes={} if table is None else {contract.CELLS: _circles(table, pixel_um)},
    )
    contract.register(
        sdata,
        sample=sample if sample is not None else Path(cells or image or "").name.split(".")[0],
        platform="codex",
        image=None if he is None else contract.IMAGE,
        mpp=pixel_um if he is None else he.mpp,
    )
    if proteins is not None:
        sdata.tables[contract.PROTEINS] = contract.annotate(proteins, region=contract.CELLS)
    placing = np.diag([1.0 / pixel_um, 1.0 / pixel_um, 1.0]) if he is None else he.from_um
    if placing is not None:
        contract.place_instrument(sdata, placing)
        attach_spatial(sdata)
    contract.record(
        sdata,
        "io.codex",
        cells=cells,
        image=image,
        he_image=he_image,
        alignment=alignment,
        channels=channels,
        pixel_um=pixel_um,
        pixel_um_source=mpp_source,
        n_cells=0 if table is None else len(table.ids),
    )
    return sdata


# --------------------------------------------------------------------------------------------------
# resolution and place


def _pixel_um(
    mpp: float | None, multiplex: MultichannelImage | None, cells: str | Path | None, image: str | Path | None
) -> tuple[float, str]:
    """Return micrometres a pixel of the multiplex image, and where that is from."""
    if mpp is not None:
        return float(mpp), "given"
    if multiplex is not None and multiplex.pixel_um is not None:
        return multiplex.pixel_um, "file"
    where = f"{cells} has pixels alone, and no image is given" if image is None else f"{image} does not state it"
    raise ValueError(
        f"Expected the size of a pixel of the multiplex image, which the cells' micrometres follow from: {where}. Pass "
        "`mpp=`, micrometres a pixel (0.377 is the default of Akoya's CODEX)."
    )


def _check_inside(table: CellTable, multiplex: MultichannelImage, pixel_um: float, image: str | Path | None) -> None:
    positions = table.positions / (pixel_um if table.unit == "um" else 1.0)
    height, width = multiplex.levels[0].shape[1:]
    outside = np.asarray(((positions < 0) | (positions >= (width, height))).any(axis=1))
    if outside.any():
        low, high = positions.min(axis=0), positions.max(axis=0)
        raise ValueError(
            f"Expected all cells of {table.path} inside {image} of {width} x {height} px (x, y), found "
            f"{int(outside.sum())} of {len(outside)} outside; their positions span x {low[0]:.0f} to {high[0]:.0f}, y "
            f"{low[1]:.0f} to {high[1]:.0f} px. Pass the image in which they were segmented, at full resolution."
        )


def _open_he(
    he_image: str | Path | None,
    alignment: str | Path | np.ndarray | None,
    *,
    table: CellTable | None,
    multiplex: MultichannelImage | None,
    pixel_um: float,
) -> HE | None:
    if he_image is None:
        return None
    file = Path(he_image).expanduser()
    if alignment is None:
        levels, stated = open_raster(file)
        return HE(levels, stated, None, None)
    if table is not None:
        points = _micrometres(table, pixel_um)
    else:
        # Without cells it is the image itself that is to lie on the H&E.
        height, width = multiplex.levels[0].shape[1:] if multiplex is not None else (1, 1)
        fractions = np.stack(np.meshgrid(*[np.linspace(0.0, 1.0, 16)] * 2), axis=-1).reshape(-1, 2)
        points = fractions * (width, height) * pixel_um
    to_um = np.diag([pixel_um, pixel_um, 1.0])
    return open_he(file, alignment, bundle=file.parent, to_um=to_um, centres=points)


# --------------------------------------------------------------------------------------------------
# elements


def _circles(table: CellTable, pixel_um: float) -> geopandas.GeoDataFrame:
    radius = np.full(len(table.ids), NOMINAL_RADIUS_UM)
    if table.areas is not None:
        radius = np.sqrt(table.areas / np.pi) * (pixel_um if table.area_unit == "px" else 1.0)
    frame = geopandas.GeoDataFrame(
        {"radius": radius}, geometry=shapely.points(_micrometres(table, pixel_um)), index=table.ids
    )
    return ShapesModel.parse(frame, transformations={contract.INSTRUMENT: Identity()})


def _micrometres(table: CellTable, pixel_um: float) -> np.ndarray:
    return table.positions * (pixel_um if table.unit == "px" else 1.0)


def _proteins(table: CellTable, pixel_um: float, channels: Channels | None) -> AnnData:
    # The column of an unnamed channel is its cycle and channel, and a colon.
    named = [name or column.rstrip(":") for name, column in zip(table.channels, table.columns, strict=True)]
    names = list(make_index_unique(pd.Index(named)))
    chosen = dict(enumerate(names))
    if channels is not None:
        chosen = _choose(channels, [names, table.columns], where=str(table.path))
    numbers = list(chosen)
    obs = _clean(table.others).set_axis(table.ids.astype(str), axis=0)
    obs[contract.INSTANCE_KEY] = table.ids.to_numpy()
    return AnnData(
        X=np.ascontiguousarray(table.intensities[:, numbers]),
        obs=obs,
        var=pd.DataFrame(
            {
                "column": [table.columns[number] for number in numbers],
                "blank": [BLANK.match(named[number]) is not None for number in numbers],
            },
            index=pd.Index(chosen.values()),
        ),
        obsm={contract.SPATIAL_UM: _micrometres(table, pixel_um)},
    )


def _clean(others: pd.DataFrame) -> pd.DataFrame:
    """Give columns the names, and text the type, that a zarr store can hold."""
    names = [re.sub(r"[^A-Za-z0-9_.-]+", "_", str(name).replace("µ", "u").replace("μ", "u")) for name in others.columns]
    names = [name.strip("_") or "column" for name in names]
    names = [RESERVED.get(name.lower(), name) for name in names]
    # A store tells names apart by more than their case.
    seen = make_index_unique(pd.Index([name.lower() for name in names]))
    names = [name + unique[len(name) :] for name, unique in zip(names, seen, strict=True)]
    cleaned = others.set_axis(names, axis=1).copy()
    for name in cleaned.select_dtypes(include=["object", "string"]):
        cleaned[name] = cleaned[name].astype(str).where(cleaned[name].notna()).astype("category")
    return cleaned


def _name_channels(
    multiplex: MultichannelImage, channels: Channels, *, select: bool, source: str | Path | None
) -> MultichannelImage:
    """Choose and rename an image's channels, or rename them alone."""
    if select:
        chosen = _choose(channels, [multiplex.channels], where=str(source))
        levels = [level[list(chosen)] for level in multiplex.levels]
        return replace(multiplex, levels=levels, channels=list(chosen.values()))
    renamed = channels if isinstance(channels, Mapping) else {}
    return replace(multiplex, channels=[renamed.get(name, name) for name in multiplex.channels])


def _choose(channels: Channels, spellings: list[list[str]], *, where: str) -> dict[int, str]:
    """Return the numbers of the channels asked for, in that order, and their names."""
    if isinstance(channels, str) or not channels:
        raise ValueError(f"Expected `channels` to be a list of names or a mapping to new ones, found {channels!r}.")
    wanted = dict(channels) if isinstance(channels, Mapping) else {name: name for name in channels}
    chosen: dict[int, str] = {}
    missing = []
    for name, new in wanted.items():
        number = next((names.index(name) for names in spellings if name in names), None)
        if number is None:
            missing.append(name)
        else:
            # A column's own name finds its channel, which keeps its short one.
            chosen[number] = str(new) if isinstance(channels, Mapping) else spellings[0][number]
    if missing:
        raise ValueError(f"Expected the channels {missing} in {where}, found {spellings[0]}.")
    if len(set(chosen.values())) != len(wanted):
        raise ValueError(f"Expected every channel once in `channels`, found {wanted}.")
    return chosen


def _build_multiplex(multiplex: MultichannelImage, pixel_um: float) -> Any:
    return contract.build_multichannel(multiplex.levels, channels=multiplex.channels, pixel_um=pixel_um)
