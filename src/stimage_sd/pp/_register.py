"""Laying an instrument's image on the H&E: the one step that finds where measured things are."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import Affine, get_transformation, set_transformation

from stimage_sd import contract
from stimage_sd._squidpy import attach_spatial
from stimage_sd.contract._elements import add_microns
from stimage_sd.nn.registration import Alignment, TransformKind, align
from stimage_sd.pp._nuclear_image import read_nuclei

#: what an H&E of unknown resolution is taken for until it is aligned, µm a pixel; the usual 20×
_USUAL_MPP = 0.5
#: of the patches found clearly, so many must be where the transformation puts them
_LEAST_SHARE = 0.3
#: an affine transformation may stretch one direction so much more than another
_MOST_STRETCH = 1.25
#: a patch is where it should be within so many pixels at most; more would be found there by chance
_MOST_TOLERANCE = 4.0
#: a stated resolution that differs more than this from the one found is told to the user
_SAME_SCALE = 0.05


@dataclass(frozen=True)
class Registration:
    """How a section's images were laid on each other, and how well.

    Attributes
    ----------
    moving, fixed
        Names of the images.
    transform
        ``"similarity"`` or ``"affine"``.
    matrix
        ``(3, 3)``, as nested tuples, from ``(x, y, 1)`` of `source` to ``"global"``.
    source
        ``"instrument"``: micrometres of the instrument, as `stimage_sd.contract.place_instrument` takes them; else
        the name of the moving image, and the matrix is from its full-resolution pixels.
    residual_um
        Median distance between where a patch of one image was found in the other and where a transformation
        fitted without it puts it, over all patches found clearly, µm.
    n_inliers, n_patches
        Patches that agree with the transformation, of those found clearly.
    n_matches
        SIFT matches that the first, coarse transformation rests on.
    working_um
        Micrometres a pixel of the resolution worked at.
    mirrored
        Whether one image shows the tissue from behind.
    inverted
        Whether nuclei are bright in one image and dark in the other, after the channels were chosen.
    """

    moving: str
    fixed: str
    transform: TransformKind
    matrix: tuple[tuple[float, float, float], ...]
    source: str
    residual_um: float
    n_inliers: int
    n_patches: int
    n_matches: int
    working_um: float
    mirrored: bool
    inverted: bool


def register(
    sdata: SpatialData,
    moving: str | None = None,
    fixed: str | None = None,
    *,
    method: Literal["sift"] = "sift",
    transform: TransformKind = "similarity",
    working_um: float = 2.0,
    channel: str | None = None,
    max_residual_um: float = 5.0,
    min_inliers: int = 20,
    seed: int = 0,
) -> Registration:
    """Lay an instrument's image on the H&E by their nuclei, and all that the instrument measured with it.

    Parameters
    ----------
    sdata
        The section.
    moving
        The image that is laid on `fixed`: by default the instrument's, DAPI or multiplex.
    fixed
        The image that stays: by default the H&E.
    method
        ``"sift"``: SIFT features of the DAPI and the haematoxylin channel, matched and refined by patches.
    transform
        ``"similarity"`` (rotation, scale, shift) or ``"affine"``. Either may mirror, which is tried after all
        else, for a slide scanned from behind.
    working_um
        Micrometres a pixel worked at. Less is read where the images are small, more where they are large (more
        than 64 million pixels). Neighbouring sections of one block share tissue but no nuclei: they are refused
        at 2 µm and may be laid on each other at 10, with a `max_residual_um` to match.
    channel
        Name of the channel that shows nuclei, in an image that is no H&E; by default DAPI, Hoechst or another
        stain of DNA.
    max_residual_um
        An alignment with a greater residual is refused. Patches within it (or within four pixels of the working
        resolution, where that is less) count as inliers.
    min_inliers
        An alignment with fewer is refused, and so is one that less than 30 % of the patches agree with.
    seed
        Of the random sampling; the same seed gives the same result.

    Returns
    -------
    What was found. Written are: where either image is the instrument's and the other the H&E, the place of
    everything the instrument measured, by `stimage_sd.contract.place_instrument`, whichever of the two was named
    as moving, since H&E pixels are the section's coordinates; for other images the transformation of `moving`
    to the coordinate systems of `fixed`. ``attrs["stimage_sd"]["registration"]`` has the returned values.

    Raises
    ------
    KeyError
        If an image or channel is not there, or cannot be told.
    ValueError
        If no alignment is good enough, if the fixed image has no place itself, or an option is none. Nothing is
        written then.

    Warns
    -----
    UserWarning
        If the H&E's stated resolution is not the one that the alignment implies.

    Notes
    -----
    The published code lays DAPI on H&E by an affine matrix found with SIFT. The micrometres here are those of the
    instrument's image, or of `fixed` where there is none: an H&E's stated resolution may be wrong or missing, and
    only says where to begin.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import stimage_sd as sti
    >>> run = sti.datasets.synthetic_codex(Path(tempfile.mkdtemp()) / "run", n_spots=10, n_proteins=3)
    >>> sdata = sti.io.codex(run / "cells.csv", run / "multiplex.ome.tif", he_image=run / "he.tif")
    >>> sti.pp.register(sdata).residual_um < 1.0
    True
    """
    _check_options(method, transform, working_um, max_residual_um, min_inliers)
    moving, fixed = _names(sdata, moving, fixed)
    frame, other = _frame(sdata, moving, fixed)
    frame_um, other_um = _pixel_um(sdata, frame), _pixel_um(sdata, other)
    if frame_um is None:
        frame_um = contract.require_mpp(sdata, purpose="registration, whose residual is in micrometres,")
    before = _matrix_of_fixed(sdata, moving, fixed)

    on_frame = read_nuclei(sdata, frame, channel, pixel_um=frame_um, working_um=working_um)
    on_other = read_nuclei(sdata, other, channel, pixel_um=other_um or _USUAL_MPP, working_um=working_um)
    alignment = align(
        on_other.picture,
        on_frame.picture,
        accept=lambda found: not _shortcomings(found, on_frame.um, max_residual_um, min_inliers),
        kind=transform,
        tolerance=min(max_residual_um / on_frame.um, _MOST_TOLERANCE),
        seed=seed,
    )
    wrong = _shortcomings(alignment, on_frame.um, max_residual_um, min_inliers)
    if wrong:
        raise ValueError(_refusal(sdata, moving, fixed, alignment, wrong, on_frame.um))
    other_to_frame = on_frame.to_full @ alignment.matrix @ np.linalg.inv(on_other.to_full)
    moving_to_fixed = other_to_frame if frame == fixed else np.linalg.inv(other_to_frame)

    source, matrix = _write(sdata, moving, fixed, moving_to_fixed, before)
    _warn_of_scale(sdata, other, other_um, frame_um * _scale(other_to_frame))
    found = Registration(
        moving=moving,
        fixed=fixed,
        transform=transform,
        matrix=tuple(tuple(float(value) for value in row) for row in matrix),  # type: ignore[misc]
        source=source,
        residual_um=alignment.residual_px * on_frame.um,
        n_inliers=alignment.n_inliers,
        n_patches=alignment.n_patches,
        n_matches=alignment.n_matches,
        working_um=on_frame.um,
        mirrored=alignment.mirrored,
        inverted=alignment.inverted,
    )
    contract.info(sdata)["registration"] = contract.plain(asdict(found))
    asked = {"method": method, "channel": channel, "max_residual_um": max_residual_um, "min_inliers": min_inliers}
    contract.record(sdata, "pp.register", seed=seed, **asked, **asdict(found))
    return found


# --------------------------------------------------------------------------------------------------
# which images, and what is known of them


def _check_options(method: str, transform: str, working_um: float, max_residual_um: float, min_inliers: int) -> None:
    if method != "sift":
        raise ValueError(f'Expected `method` to be "sift", found {method!r}.')
    if transform not in ("similarity", "affine"):
        raise ValueError(f'Expected `transform` to be "similarity" or "affine", found {transform!r}.')
    for name, value in (("working_um", working_um), ("max_residual_um", max_residual_um), ("min_inliers", min_inliers)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"Expected `{name}` to be positive, found {value!r}.")


def _names(sdata: SpatialData, moving: str | None, fixed: str | None) -> tuple[str, str]:
    for name in (moving, fixed):
        if name is not None and name not in sdata.images:
            raise KeyError(
                f"No image {name!r} in section {contract.sample(sdata)!r}; its images: {sorted(sdata.images)}."
            )
    moving = moving if moving is not None else _instrument_image(sdata, "moving")
    if fixed is None:
        fixed = _instrument_image(sdata, "fixed") if _is_he(sdata, moving) else contract.image_name(sdata)
    if moving == fixed:
        raise ValueError(f"Expected two images to lay on each other, found {moving!r} twice.")
    return moving, fixed


def _instrument_image(sdata: SpatialData, argument: str) -> str:
    for name in (contract.DAPI, contract.MULTIPLEX):
        if name in sdata.images:
            return name
    raise KeyError(
        f"Section {contract.sample(sdata)!r} has no image {contract.DAPI!r} or {contract.MULTIPLEX!r}; its images: "
        f"{sorted(sdata.images)}. Name one with `{argument}=`."
    )


def _is_he(sdata: SpatialData, name: str) -> bool:
    section = contract.info(sdata)
    return name in (section["image"], section.get("normalized_image"))


def _systems(sdata: SpatialData, name: str) -> dict[str, Any]:
    return dict(get_transformation(sdata.images[name], get_all=True))


def _affine(transformation: Any) -> np.ndarray:
    return np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), dtype=np.float64)


def _scale(matrix: np.ndarray) -> float:
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def _frame(sdata: SpatialData, moving: str, fixed: str) -> tuple[str, str]:
    """Return the image whose micrometres are used, and the other: the instrument's, else the fixed one."""
    measured = [contract.INSTRUMENT in _systems(sdata, name) for name in (moving, fixed)]
    return (moving, fixed) if measured == [True, False] else (fixed, moving)


def _pixel_um(sdata: SpatialData, name: str) -> float | None:
    """Micrometres a pixel at full resolution; `None` where unknown."""
    systems = _systems(sdata, name)
    for system in (contract.INSTRUMENT, "microns"):
        if system in systems:
            return _scale(_affine(systems[system]))
    return None


def _matrix_of_fixed(sdata: SpatialData, moving: str, fixed: str) -> np.ndarray:
    """Matrix from the pixels of the image that stays to ``"global"``; that is the H&E, even where it is `moving`."""
    stays = moving if _is_he(sdata, moving) and contract.INSTRUMENT in _systems(sdata, fixed) else fixed
    systems = _systems(sdata, stays)
    if "global" not in systems:
        raise ValueError(
            f"Expected {stays!r} to have a place in the section's coordinates, found only {sorted(systems)}. "
            f"Run `stimage_sd.pp.register(sdata)` to lay it on the H&E first."
        )
    return _affine(systems["global"])


# --------------------------------------------------------------------------------------------------
# judging and writing


def _shortcomings(found: Alignment, um: float, max_residual_um: float, min_inliers: int) -> list[str]:
    """Say why an alignment is not good enough; nothing where it is."""
    wrong = []
    if found.n_inliers < min_inliers:
        wrong.append(f"{min_inliers} inliers are needed")
    if found.n_inliers < _LEAST_SHARE * found.n_patches:
        wrong.append(f"{_LEAST_SHARE:.0%} of the patches must agree")
    if found.residual_px * um > max_residual_um:
        wrong.append(f"the residual may be {max_residual_um:g} µm")
    stretch = np.linalg.svd(found.matrix[:2, :2], compute_uv=False)
    if stretch[0] > _MOST_STRETCH * stretch[1]:
        wrong.append(f"one direction may be stretched {_MOST_STRETCH:g} times as much as another")
    return wrong


def _refusal(sdata: SpatialData, moving: str, fixed: str, found: Alignment, wrong: list[str], um: float) -> str:
    residual = f"{found.residual_px * um:.1f} µm" if np.isfinite(found.residual_px) else "unknown"
    return (
        f"Found no good alignment of {moving!r} with {fixed!r} in section {contract.sample(sdata)!r}: at best "
        f"{found.n_matches} SIFT matches agree, then {found.n_inliers} of {found.n_patches} patches (inliers), with a "
        f"residual of {residual} and a scale of {_scale(found.matrix):.3f}; {'; '.join(wrong)}. Nothing was written. "
        "Do both show the same section? If they do, name the channel of nuclei with `channel=`, or try another "
        "`working_um=`."
    )


def _write(
    sdata: SpatialData, moving: str, fixed: str, moving_to_fixed: np.ndarray, to_global: np.ndarray
) -> tuple[str, np.ndarray]:
    """Write the transformation; return what it is from, and its matrix to ``"global"``."""
    instrument = contract.INSTRUMENT
    own = {name: _systems(sdata, name) for name in (moving, fixed)}
    if instrument in own[fixed] and _is_he(sdata, moving):
        matrix = to_global @ np.linalg.inv(moving_to_fixed) @ np.linalg.inv(_affine(own[fixed][instrument]))
    elif instrument in own[moving] and instrument not in own[fixed]:
        matrix = to_global @ moving_to_fixed @ np.linalg.inv(_affine(own[moving][instrument]))
    else:
        matrix = to_global @ moving_to_fixed
        element = sdata.images[moving]
        set_transformation(element, Affine(matrix, ("x", "y"), ("x", "y")), to_coordinate_system="global")
        if contract.info(sdata)["mpp"] is not None:
            add_microns(element, float(contract.info(sdata)["mpp"]))
        return moving, matrix
    contract.place_instrument(sdata, matrix)
    attach_spatial(sdata)
    return instrument, matrix


def _warn_of_scale(sdata: SpatialData, name: str, stated: float | None, found: float) -> None:
    if stated is not None and abs(found / stated - 1) > _SAME_SCALE:
        warnings.warn(
            f"Image {name!r} of section {contract.sample(sdata)!r} is stated to have {stated:.4g} µm a pixel; laid on "
            f"the other image it has {found:.4g}. Pass `mpp={found:.4g}` to its reader if that is right: the sizes of "
            "tiles and spots follow from it.",
            UserWarning,
            stacklevel=3,
        )
