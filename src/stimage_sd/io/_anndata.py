"""Convert an AnnData object from scanpy, squidpy or stLearn to a section."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import dask.array as da
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._anndata_image import Library, Picture, find_library, open_picture, positions_of
from stimage_sd.io._anndata_table import find_counts, part_proteins, table_of
from stimage_sd.io._section import assemble, check_mpp, check_unique
from stimage_sd.io._space_ranger import TOLERANCE
from stimage_sd.stats.lattice import visium_pitch_px

if TYPE_CHECKING:
    from squidpy.im import ImageContainer

#: entry of ``attrs["stimage_sd"]`` with the renamed columns of ``obs``: new name to original name
RENAMED = "renamed_columns"
#: columns of ``obs`` with a spot's row and column on the Visium array
_ARRAY = ["array_row", "array_col"]


def from_anndata(
    adata: AnnData,
    image: str | Path | np.ndarray | da.Array | ImageContainer | None = None,
    *,
    sample: str | None = None,
    patient: str | None = None,
    mpp: float | None = None,
    library_id: str | None = None,
    spot_diameter_px: float | None = None,
    img_layer: str | None = None,
    layer: str | None = None,
) -> SpatialData:
    """Convert an existing scanpy, squidpy or stLearn analysis to a section.

    Parameters
    ----------
    adata
        One section, with ``obsm["spatial"]`` (x, y) in pixels of the full-resolution image. Without that entry,
        stLearn's ``obs["imagecol"]`` and ``obs["imagerow"]`` are used, with the scale of its ``use_quality``. All
        observations on the image are kept in order, including those with ``in_tissue`` 0. `adata` is not changed.
    image
        H&E image: a file, an array or squidpy's `ImageContainer`.

        Files and arrays are at full resolution. Arrays are ``(y, x, 3)`` or ``(3, y, x)``, from NumPy or dask. Values
        are ``uint8``, other numbers from 0 to 255, or floating-point numbers from 0 to 1. An alpha channel is blended
        onto white.

        For an `ImageContainer`, its ``scale``, crop and padding are applied to the positions. A crop must contain all
        observations.

        By default, the file that squidpy noted as ``source_image_path`` is used if it exists. Otherwise, the largest
        image of ``uns["spatial"]``, such as ``hires``, is used with its scale factor.
    sample
        Sample id. Default: the library id.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).
    mpp
        Micrometers per pixel of the full-resolution image. By default, the value that the file states. Otherwise,
        100 µm divided by the pitch of the Visium array. Otherwise, with Space Ranger's scale factors, 65 µm divided by
        ``spot_diameter_fullres``. In all other cases the resolution stays unknown.
    library_id
        Entry of ``uns["spatial"]`` to use. Needed where there are several.
    spot_diameter_px
        Spot diameter in pixels of the full-resolution image. See the notes for the default.
    img_layer
        Layer of the `ImageContainer`. Needed where there are several.
    layer
        Layer with raw counts. By default, the first of ``layers["counts"]``, ``X`` and ``raw.X`` that holds only
        counts.

    Returns
    -------
    A section with the image ``he``, the shapes ``spots`` and the table ``counts``. Positions and diameter are in pixels
    of ``he``. The table has the ``X``, ``obs``, ``var``, ``obsm``, ``obsp``, ``varm``, ``varp``, ``layers``, ``uns``
    and ``raw`` of `adata`. Where counts are in a layer or in ``raw``, ``X`` stays unchanged and the section's counts
    are read from a layer. Where counts are in ``X``, ``X`` becomes CSR of int32, or of int64 where a count needs it.
    ``uns["spatial"]`` is replaced, so that squidpy draws on ``he``. Ensembl ids lose their version suffix. Antibodies,
    as marked in ``var["feature_types"]``, go to the table ``proteins`` of the same spots.

    Raises
    ------
    KeyError
        If positions, image, layer, library or spot diameter are missing.
    ValueError
        If `adata` holds several sections or none, raw counts are not found, most spots lie off the image, or the image
        is not in color.

    Warns
    -----
    UserWarning
        If spots off the image are left out, the H&E is a reduced image, the image size contradicts the scale factors,
        pitch and file give resolutions more than 5 % apart, columns or keys are renamed, or gene names are repeated.
        Also if counts are in ``raw`` with other genes, so that ``X``, ``layers``, ``varm`` and ``varp`` are left out.

    Notes
    -----
    Space Ranger's ``spot_diameter_fullres`` is the diameter of a nominal spot of 65 µm. Visium spots are 55 µm wide.
    The spot diameter is the first of these that is available:

    - `spot_diameter_px`;
    - 0.55 of the pitch, where ``obs`` has the ``array_row`` and ``array_col`` of the hexagonal Visium array;
    - 55/65 of ``spot_diameter_fullres``, where the scale factors are Space Ranger's (they have
      ``fiducial_diameter_fullres`` and ``tissue_hires_scalef``);
    - ``spot_diameter_fullres``, since other tools write the real diameter.

    SpatialData allows letters, digits, ``_``, ``-`` and ``.`` in the names of columns and keys. Other characters become
    ``_``. Columns ``region`` and ``instance_id`` of ``obs`` become ``region_original`` and ``instance_id_original``.
    `stimage_sd.io.to_anndata` restores the original names of ``obs`` columns.

    Examples
    --------
    >>> import numpy as np
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> image = np.full((200, 200, 3), 230, np.uint8)
    >>> sdata = from_anndata(adata, image, sample="tiny", mpp=1.0, spot_diameter_px=55.0)
    >>> sdata.shapes["spots"].radius.tolist()
    [27.5, 27.5]
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"Expected an AnnData, found {type(adata).__name__}. Read a file by `anndata.read_h5ad`.")
    check_mpp(mpp)
    if spot_diameter_px is not None and not spot_diameter_px > 0:
        raise ValueError(f"Expected `spot_diameter_px` to be positive, found {spot_diameter_px!r}.")
    check_unique(
        adata.obs_names,
        what="observation",
        where="`adata.obs_names`",
        mend="Run `adata.obs_names_make_unique()` first.",
    )
    if adata.isbacked:
        adata = adata.to_memory()
    library = find_library(adata, library_id)
    _check_one_section(adata)
    adata, proteins = part_proteins(adata, layer)
    sample = sample if sample is not None else library.name if library.name is not None else "section"
    positions = positions_of(adata, library)
    pitch = _pitch(adata, positions)
    diameter = _diameter(spot_diameter_px, pitch, library)
    counted = find_counts(adata, layer)
    picture = open_picture(image, library, img_layer=img_layer)
    full_mpp, mpp_source = _resolution(mpp, pitch, library, picture, sample)
    scaled_mpp = None if full_mpp is None else full_mpp / picture.mean_scale
    if picture.is_reduced:
        _warn_of_reduced(picture, sample, scaled_mpp)

    table, renamed = table_of(adata, counted)
    table.obsm["spatial"] = picture.place(positions)
    _check_crop(picture, table.obsm["spatial"])
    sdata = assemble(
        picture.levels,
        table,
        diameter_px=diameter * picture.mean_scale,
        sample=sample,
        platform="anndata",
        mpp=scaled_mpp,
        proteins=proteins,
    )
    if library.metadata:
        sdata.tables[contract.COUNTS].uns["spatial"][sample]["metadata"] = dict(library.metadata)
    if counted.layer is not None:
        contract.remember(sdata, layers={contract.COUNTS: counted.layer})
    if renamed:
        contract.remember(sdata, **{RENAMED: renamed})
    contract.remember(sdata, patient=patient)
    contract.record(
        sdata,
        "io.from_anndata",
        image=picture.name,
        image_scale=picture.mean_scale,
        counts=counted.where,
        library_id=library.name,
        spot_diameter_px=diameter,
        mpp=scaled_mpp,
        mpp_source=mpp_source,
        n_spots=sdata.tables[contract.COUNTS].n_obs,
    )
    return sdata


def _check_one_section(adata: AnnData) -> None:
    """Raise an error for several sections in one table, since all spots share one image."""
    subset = "Subset `adata` to one section, and name its entry of `uns['spatial']` with `library_id=`."
    if "library_id" in adata.obs and adata.obs["library_id"].nunique() > 1:
        raise ValueError(
            f"Expected one section, found {sorted(map(str, adata.obs['library_id'].unique()))} in "
            f"`adata.obs['library_id']`. {subset}"
        )
    if set(_ARRAY) <= set(adata.obs):
        twice = int(adata.obs.duplicated(_ARRAY).sum())
        if twice:
            raise ValueError(
                f"Expected one section, found {twice} of {adata.n_obs} spots with the array position of another spot "
                f"(`obs['array_row']` and `obs['array_col']`). {subset}"
            )


# --------------------------------------------------------------------------------------------------
# size and resolution


def _pitch(adata: AnnData, positions: NDArray[np.float64]) -> float | None:
    """Return the pitch of the Visium array in full-resolution pixels; `None` without an array."""
    if not set(_ARRAY) <= set(adata.obs):
        return None
    return visium_pitch_px(positions, adata.obs[_ARRAY].to_numpy())


def _diameter(given: float | None, pitch: float | None, library: Library) -> float:
    """Return the spot diameter in full-resolution pixels."""
    if given is not None:
        return float(given)
    if pitch is not None:
        return pitch * contract.SPOT_UM / contract.PITCH_UM
    stated = library.scalefactors.get("spot_diameter_fullres")
    if stated is None or not stated > 0:
        raise KeyError(
            "Expected the diameter of a spot: `array_row` and `array_col` in `adata.obs`, or `spot_diameter_fullres` "
            f"in the scale factors of `adata.uns['spatial']`, found {sorted(library.scalefactors)}. Pass "
            "`spot_diameter_px=`, such as 55 µm (Visium) or 100 µm (legacy ST) divided by the micrometers per pixel."
        )
    return float(stated) * (contract.SPOT_UM / contract.NOMINAL_SPOT_UM if library.of_space_ranger else 1.0)


def _resolution(
    mpp: float | None, pitch: float | None, library: Library, picture: Picture, sample: str
) -> tuple[float | None, str | None]:
    """Return micrometers per full-resolution pixel, and the source of the value."""
    if mpp is not None:
        return mpp, "given"
    by_pitch = None if pitch is None else contract.PITCH_UM / pitch
    if picture.mpp is not None:
        if by_pitch is not None and abs(by_pitch / picture.mpp - 1.0) > TOLERANCE:
            warnings.warn(
                f"{picture.name} states {picture.mpp:.4f} µm per pixel, and this value is used. The spots of "
                f"{sample!r} are {pitch:.1f} px apart, which gives {by_pitch:.4f}. Pass `mpp=` if you know the value, "
                "and check that positions are in pixels of this image.",
                UserWarning,
                stacklevel=3,
            )
        return picture.mpp, "image file"
    if by_pitch is not None:
        return by_pitch, "array pitch"
    nominal = library.scalefactors.get("spot_diameter_fullres")
    if library.of_space_ranger and nominal is not None and nominal > 0:
        return contract.NOMINAL_SPOT_UM / float(nominal), "spot diameter"
    return None, None


def _warn_of_reduced(picture: Picture, sample: str, mpp: float | None) -> None:
    resolution = "an unknown number of" if mpp is None else f"{mpp:.3f}"
    warnings.warn(
        f"No full-resolution image given: the {picture.name} is the H&E of {sample!r}. It has {resolution} µm per "
        f"pixel, {1.0 / picture.mean_scale:.1f} times the pixel size of the full-resolution image, so tiles are "
        "coarse. Pass the full-resolution image as `image=`.",
        UserWarning,
        stacklevel=3,
    )


def _check_crop(picture: Picture, centers: NDArray[np.float64]) -> None:
    if not picture.is_crop:
        return
    outside = ((centers < 0) | (centers >= picture.size())).any(axis=1).astype(bool)
    if outside.any():
        raise ValueError(
            f"Expected all observations within the crop of the `ImageContainer`, found {int(outside.sum())} of "
            f"{len(outside)} outside. Subset the observations: `from_anndata(container.subset(adata), container)`."
        )
