"""Read CODEX, PhenoCycler and other multiplexed immunofluorescence, with an optional H&E."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
from stimage_sd.io._section import check_mpp, on_image
from stimage_sd.io._xenium_images import HE, open_he

#: radius in µm of the circles of cells without a known area; used for plots only
NOMINAL_RADIUS_UM = 4.0
#: channels without an antibody
BLANK = re.compile(r"(blank|empty)(?![a-z])", re.IGNORECASE)
#: column names that the contract reserves, with the new name of such a column of a cell table
RESERVED = {contract.REGION_KEY: "acquisition_region", contract.INSTANCE_KEY: "own_instance_id"}

Channels = Sequence[str] | Mapping[str, str]


def codex(
    cells: str | Path | None = None,
    image: str | Path | None = None,
    *,
    channels: Channels | None = None,
    series: int | str | None = None,
    several_files: bool = False,
    mpp: float | None = None,
    he_image: str | Path | None = None,
    alignment: str | Path | np.ndarray | None = None,
    sample: str | None = None,
    patient: str | None = None,
) -> SpatialData:
    """Read a section of CODEX (PhenoCycler) or another multiplexed immunofluorescence.

    Parameters
    ----------
    cells
        Table of segmented cells: ``.csv``, ``.tsv`` or ``.txt`` (tabs), plain or gzipped, or ``.fcs``
        (extra ``codex``). Known layouts:

        - CODEX Processor: ``x:x``, ``cyc002_ch003:Ki67``;
        - QuPath: ``Centroid X µm`` with ``CD8: Cell: Mean``, ``Cell: CD8 mean``, or ``CD8: Mean`` of StarDist nuclei;
        - CosMx: ``CenterX_global_px``, ``Mean.CD8``;
        - plain, such as MCMICRO and scimap: ``X_centroid``, then numeric columns as channels. Columns named for shape,
          position, group or spread stay in ``obs``.

        Text is UTF-8, UTF-16 or the Western Windows code page. Position columns are searched as ``x``/``y``,
        ``X_centroid``/``Y_centroid``, ``centroid_x``/``centroid_y``, ``Centroid X px``/``Centroid Y px`` (pixels of
        `image`), ``Centroid X µm``/``Centroid Y µm`` and ``x_um``/``y_um``, in this order, ignoring case and
        punctuation. `None` reads the image alone.
    image
        Multiplex image: OME-TIFF, QPTIFF or multi-page TIFF. Optional where `cells` is given.
    channels
        Channels of the table to keep. Give a list of names, or ``{name: new name}`` to rename them in the table and the
        image. Column names of the file work too, including numeric columns that are not read as channels by default.
        The image keeps all its channels, since `pp.register` needs the nuclear channel. Without `cells`, the choice
        applies to the image. All channels are kept by default.
    series
        Image to read from a file `image` with several images (scenes, macro images). Give its number in the file,
        from 0, or its name. Default: the largest.
    several_files
        Whether to read the other files that hold channels of an OME-TIFF `image`, from the folder of `image` only.
    mpp
        Micrometers per pixel of the multiplex image, and so of the cell positions. Default: the value that `image`
        states. No other default is assumed (Akoya's CODEX has 0.377 µm).
    he_image
        H&E image of the same section, in any format of `stimage_sd.io.slide`.
    alignment
        Matrix ``(3, 3)``, or a CSV file of the matrix, from ``(x, y, 1)`` in pixels of the H&E to pixels of the
        multiplex image, as in `stimage_sd.io.xenium`. ``np.eye(3)`` states that both images have the same pixels. This
        is never assumed. Without an alignment, run `stimage_sd.pp.register` afterwards.
    sample
        Sample id. Default: the name of the cell table, or else of the image, up to its first dot.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).

    Returns
    -------
    A section with the shapes ``cells``, the table ``proteins`` that annotates them, the image ``multiplex`` (lazy,
    channels by name) and the image ``he``, depending on the files given. ``cells`` are circles with the areas of the
    cells, or with a radius of 4 µm where the table has no areas. ``proteins`` has ``X``, float32 intensities unchanged
    from the file (compensated or negative values stay); ``var["column"]`` and ``var["blank"]``; ``obs`` with the
    remaining columns (names cleaned, ``region`` becomes ``acquisition_region``); ``obsm["spatial_um"]`` in micrometers
    of the instrument; and ``obsm["spatial"]`` in pixels of the H&E, where the H&E is placed. Without an H&E,
    ``"global"`` and ``obsm["spatial"]`` are pixels of the multiplex image.

    Repeated channel names, such as nuclear stains and blanks, get a suffix (``Blank-1``) in the order of the table.
    Unnamed channels are named after their column. Blank channels are kept and marked in ``var["blank"]``.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ModuleNotFoundError
        If `cells` is an FCS file and the extra ``codex`` is not installed.
    ValueError
        If a file is truncated, empty or of another kind; the table lacks positions or has cells of several regions,
        repeated ids or non-finite values; most cells lie off the image; the pixel size is unknown; a channel of
        `channels` or the image `series` does not exist; `image` refers to other files and `several_files` is not set;
        or the alignment puts no cell on the H&E.

    Warns
    -----
    UserWarning
        If cells off the multiplex image are left out, the H&E states a resolution that differs from its alignment, or
        most cells lie off the H&E. Also if `image` holds several images, states an orientation, or ends in rows or
        tiles of zeros.

    Notes
    -----
    Columns of the CODEX Processor follow Akoya's page on its FCS format, where ``size`` is a cell's number of voxels.
    Positions are pixels of a region. Files with several regions are not supported, since the regions overlap.

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
        raise ValueError("Expected `he_image=` with `alignment=`, found no H&E. Pass the aligned H&E image.")
    multiplex = None if image is None else open_multichannel(image, series=series, several_files=several_files)
    table = None if cells is None else read_cells(Path(cells).expanduser(), wanted=channels or ())
    pixel_um, mpp_source = _pixel_um(mpp, multiplex, cells, image)
    if table is not None and multiplex is not None:
        table = _on_image(table, multiplex, pixel_um, image)
    proteins = None if table is None else _proteins(table, pixel_um, channels)
    if multiplex is not None and channels is not None:
        multiplex = _name_channels(multiplex, channels, select=table is None, source=image)
    he = _open_he(he_image, alignment, table=table, multiplex=multiplex, pixel_um=pixel_um)

    images = {} if he is None else {contract.IMAGE: contract.build_image(he.levels)}
    if multiplex is not None:
        images[contract.MULTIPLEX] = contract.build_multichannel(
            multiplex.levels, channels=multiplex.channels, pixel_um=pixel_um
        )
    sdata = SpatialData(
        images=images,
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
    contract.remember(sdata, patient=patient)
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
    """Return micrometers per pixel of the multiplex image, and the source of the value."""
    if mpp is not None:
        return float(mpp), "given"
    if multiplex is not None and multiplex.pixel_um is not None:
        return multiplex.pixel_um, "file"
    where = f"{cells} does not state it, and no image is given" if image is None else f"{image} does not state it"
    raise ValueError(
        f"Expected the pixel size of the multiplex image, to convert cell positions to micrometers: {where}. Pass "
        "`mpp=`, micrometers per pixel (0.377 is the default of Akoya's CODEX)."
    )


def _on_image(table: CellTable, multiplex: MultichannelImage, pixel_um: float, image: str | Path | None) -> CellTable:
    """Drop cells off the image."""
    inside = on_image(
        table.positions / (pixel_um if table.unit == "um" else 1.0),
        multiplex.levels[0].shape[1:],
        what="cells",
        where=str(table.path),
        image=str(image),
        mend="Pass the image in which they were segmented, at full resolution.",
    )
    return table.taken(inside)


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
        points = _micrometers(table, pixel_um)
    else:
        # Without cells, a grid of points over the image must lie on the H&E.
        height, width = multiplex.levels[0].shape[1:] if multiplex is not None else (1, 1)
        fractions = np.stack(np.meshgrid(*[np.linspace(0.0, 1.0, 16)] * 2), axis=-1).reshape(-1, 2)
        points = fractions * (width, height) * pixel_um
    to_um = np.diag([pixel_um, pixel_um, 1.0])
    return open_he(file, alignment, bundle=file.parent, to_um=to_um, centers=points)


# --------------------------------------------------------------------------------------------------
# elements


def _circles(table: CellTable, pixel_um: float) -> geopandas.GeoDataFrame:
    radius = np.full(len(table.ids), NOMINAL_RADIUS_UM)
    if table.areas is not None:
        radius = np.sqrt(table.areas / np.pi) * (pixel_um if table.area_unit == "px" else 1.0)
    frame = geopandas.GeoDataFrame(
        {"radius": radius}, geometry=shapely.points(_micrometers(table, pixel_um)), index=table.ids
    )
    return ShapesModel.parse(frame, transformations={contract.INSTRUMENT: Identity()})


def _micrometers(table: CellTable, pixel_um: float) -> np.ndarray:
    return table.positions * (pixel_um if table.unit == "px" else 1.0)


def _proteins(table: CellTable, pixel_um: float, channels: Channels | None) -> AnnData:
    # The column of an unnamed channel is cycle, channel and a colon, such as "cyc002_ch003:".
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
                "column": [table.columns[index] for index in numbers],
                "blank": [BLANK.match(named[index]) is not None for index in numbers],
            },
            index=pd.Index(chosen.values()),
        ),
        obsm={contract.SPATIAL_UM: _micrometers(table, pixel_um)},
    )


def _clean(others: pd.DataFrame) -> pd.DataFrame:
    """Give columns names, and text a type, that a zarr store can hold."""
    names = [re.sub(r"[^A-Za-z0-9_.-]+", "_", str(name).replace("µ", "u").replace("μ", "u")) for name in others.columns]
    names = [name.strip("_") or "column" for name in names]
    names = [RESERVED.get(name.lower(), name) for name in names]
    # Names in a store must be unique ignoring case.
    seen = make_index_unique(pd.Index([name.lower() for name in names]))
    names = [name + unique[len(name) :] for name, unique in zip(names, seen, strict=True)]
    cleaned = others.set_axis(names, axis=1).copy()
    for name in cleaned.select_dtypes(include=["object", "string"]):
        cleaned[name] = cleaned[name].astype(str).where(cleaned[name].notna()).astype("category")
    return cleaned


def _name_channels(
    multiplex: MultichannelImage, channels: Channels, *, select: bool, source: str | Path | None
) -> MultichannelImage:
    """Rename the channels of an image, and with `select` keep only those in `channels`."""
    if select:
        chosen = _choose(channels, [multiplex.channels], where=str(source))
        levels = [level[list(chosen)] for level in multiplex.levels]
        return replace(multiplex, levels=levels, channels=list(chosen.values()))
    renamed = channels if isinstance(channels, Mapping) else {}
    return replace(multiplex, channels=[renamed.get(name, name) for name in multiplex.channels])


def _choose(channels: Channels, spellings: list[list[str]], *, where: str) -> dict[int, str]:
    """Return the numbers of the requested channels, in that order, with their new names."""
    if isinstance(channels, str) or not channels:
        raise ValueError(f"Expected `channels` to be a list of names or a mapping to new ones, found {channels!r}.")
    wanted = dict(channels) if isinstance(channels, Mapping) else {name: name for name in channels}
    chosen: dict[int, str] = {}
    missing = []
    for name, new in wanted.items():
        column = next((names.index(name) for names in spellings if name in names), None)
        if column is None:
            missing.append(name)
        else:
            # A channel found by its column name keeps its short name.
            chosen[column] = str(new) if isinstance(channels, Mapping) else spellings[0][column]
    if missing:
        raise ValueError(f"Expected the channels {missing} in {where}, found {spellings[0]}.")
    if len(set(chosen.values())) != len(wanted):
        raise ValueError(f"Expected every channel once in `channels`, found {wanted}.")
    return chosen
