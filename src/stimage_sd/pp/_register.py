"""Register an instrument's image with the H&E, to place the instrument's measurements on it."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import Affine, Sequence, get_transformation, set_transformation

from stimage_sd import contract
from stimage_sd._shown import Facts, shown
from stimage_sd._squidpy import attach_spatial
from stimage_sd.image.registration import Alignment, TransformKind, align
from stimage_sd.io._other_objects import is_in_micrometers
from stimage_sd.pp._nuclear_image import read_nuclei

#: assumed resolution of an H&E of unknown resolution until it is aligned, µm per pixel (the usual 20×)
_USUAL_MPP = 0.5
#: least share of the clearly found patches that must agree with the transformation
_LEAST_SHARE = 0.3
#: largest ratio of the stretches of an affine transformation along two directions
_MOST_STRETCH = 1.25
#: largest tolerance for an inlier patch, working px; a larger one would accept patches by chance
_MOST_TOLERANCE = 4.0
#: relative difference between the stated and the found resolution above which a warning is raised
_SAME_SCALE = 0.05


@shown
@dataclass(frozen=True)
class Registration:
    """Result and quality of a registration of two images of a section.

    Attributes
    ----------
    moving, fixed
        Names of the images.
    transform
        ``"similarity"`` or ``"affine"``.
    matrix
        ``(3, 3)`` matrix as nested tuples, from ``(x, y, 1)`` of `source` to H&E pixels. For two images without an
        instrument's coordinates, to pixels of `fixed`.
    source
        ``"instrument"`` for micrometers of the instrument, as `stimage_sd.contract.place_instrument` takes them.
        Otherwise the name of the moving image, and the matrix starts from its full-resolution pixels.
    residual_um
        Median residual over all clearly found patches, µm. The residual of a patch is the distance between its found
        position and its position under a transformation fitted without this patch.
    n_inliers, n_patches
        Number of patches that agree with the transformation, and number of clearly found patches.
    n_matches
        Number of SIFT matches behind the first, coarse transformation.
    working_um
        Micrometers per pixel of the working resolution.
    mirrored
        Whether one image shows the tissue from behind.
    inverted
        Whether nuclei are bright in one image and dark in the other, in the selected channels.
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

    def facts(self) -> Facts:
        """Names and values that describe the registration, as notebooks show them."""
        notes = [text for flag, text in ((self.mirrored, "mirrored"), (self.inverted, "nuclei of opposite brightness"))
                 if flag]  # fmt: skip
        return {
            "images": f"{self.moving} on {self.fixed}",
            "transform": ", ".join([self.transform, f"from coordinates of {self.source}", *notes]),
            "residual": f"{self.residual_um:.2f} µm, the median over patches",
            "patches": f"{self.n_inliers} of {self.n_patches} agree; {self.n_matches} SIFT matches",
            "resolution": f"aligned at {self.working_um:.3g} µm per pixel",
        }


def register(
    data: SpatialData,
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
    """Register an instrument's image with the H&E by their nuclei, and place its measurements on the H&E.

    Parameters
    ----------
    data
        The section.
    moving
        The image to move. By default the instrument's image, DAPI or multiplex. In an object of
        ``spatialdata_io.xenium``, the H&E moves to the morphology image. Register it before `io.from_spatialdata`.
    fixed
        The image that stays. By default the H&E.
    method
        ``"sift"`` matches SIFT features of the DAPI and the hematoxylin channel and refines the result with patches.
    transform
        ``"similarity"`` (rotation, scale, shift) or ``"affine"``. Both may mirror, for a slide scanned from behind.
        Mirroring is tried last.
    working_um
        Micrometers per pixel of the working resolution. Small images are read at a finer resolution. Images of more
        than 64 million pixels are read at a coarser one. Neighboring sections of one block share tissue but no nuclei.
        They are refused at 2 µm per pixel and may register at 10, with a larger `max_residual_um`.
    channel
        Name of the nuclear channel in the image that is not H&E. By default DAPI, Hoechst or another DNA stain.
    max_residual_um
        Largest residual of an accepted alignment. Patches within this distance, or within four working pixels if that
        is less, count as inliers.
    min_inliers
        Least number of inliers of an accepted alignment. At least 30 % of the patches must be inliers as well.
    seed
        Seed of the random sampling. The same seed gives the same result.

    Returns
    -------
    The registration. If one image is the instrument's and the other the H&E, the call places all measurements of the
    instrument on the H&E with `stimage_sd.contract.place_instrument`. This holds for either order of the two images,
    because H&E pixels are the section's coordinates. For other images the call writes the transformation of `moving`
    to the coordinate systems of `fixed`. The returned values are also written to
    ``attrs["stimage_sd"]["registration"]``.

    Raises
    ------
    KeyError
        If an image or channel does not exist, or cannot be determined.
    ValueError
        If no alignment is good enough, the fixed image is not placed, or an option is invalid. Nothing is written then.

    Warns
    -----
    UserWarning
        If the H&E's stated resolution differs from the one that the alignment implies.

    Notes
    -----
    The published code places DAPI on H&E by an affine matrix found with SIFT. Micrometers are those of the
    instrument's image, or of `fixed` without an instrument's image. An H&E's stated resolution may be wrong or
    missing, so it serves only as the starting point.

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
    sdata = contract.section(data)
    _check_options(method, transform, working_um, max_residual_um, min_inliers)
    moving, fixed = _names(sdata, moving, fixed)
    frame, other = _frame(sdata, moving, fixed)
    frame_um, other_um = _pixel_um(sdata, frame), _pixel_um(sdata, other)
    if frame_um is None:
        frame_um = contract.require_mpp(sdata, purpose="registration, whose residual is in micrometers,")
    before = _matrix_of_fixed(sdata, moving, fixed)

    on_frame = read_nuclei(sdata, frame, channel, pixel_um=frame_um, working_um=working_um)
    on_other = read_nuclei(sdata, other, channel, pixel_um=other_um or _USUAL_MPP, working_um=working_um)
    alignment = align(
        on_other.picture,
        on_frame.picture,
        accept=lambda result: not _shortcomings(result, on_frame.um, max_residual_um, min_inliers),
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
    _warn_of_scale(sdata, other, other_um, frame_um * contract.scale_of(other_to_frame))
    result = Registration(
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
    contract.remember(sdata, registration=contract.plain(asdict(result)))
    asked = {"method": method, "channel": channel, "max_residual_um": max_residual_um, "min_inliers": min_inliers}
    contract.record(sdata, "pp.register", seed=seed, **asked, **asdict(result))
    return result


# --------------------------------------------------------------------------------------------------
# images and their coordinates


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
    morphology = _morphology_of_reader(sdata)
    if moving is None and fixed is None and morphology is not None and contract.info(sdata)["image"] is None:
        # all other elements lie on the morphology image, so the H&E moves
        return contract.image_name(sdata), morphology
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


def _morphology_of_reader(sdata: SpatialData) -> str | None:
    """Return the morphology image of an object of `spatialdata_io.xenium`, `None` for other objects."""
    if sdata.attrs.get("spatialdata_io_reader") != "xenium":
        return None
    return next((name for name in contract.MORPHOLOGY if name in sdata.images), None)


def _is_he(sdata: SpatialData, name: str) -> bool:
    section = contract.info(sdata)
    return name in (section["image"], section.get("normalized_image"))


def _systems(sdata: SpatialData, name: str) -> dict[str, Any]:
    return dict(get_transformation(sdata.images[name], get_all=True))


def _frame(sdata: SpatialData, moving: str, fixed: str) -> tuple[str, str]:
    """Return the image whose micrometers are used (the instrument's, else the fixed one), and the other image."""
    measured = [contract.INSTRUMENT in _systems(sdata, name) for name in (moving, fixed)]
    return (moving, fixed) if measured == [True, False] else (fixed, moving)


def _pixel_um(sdata: SpatialData, name: str) -> float | None:
    """Return micrometers per pixel at full resolution, or `None` if unknown."""
    systems = _systems(sdata, name)
    if contract.INSTRUMENT in systems:
        return contract.scale_of(contract.affine(systems[contract.INSTRUMENT], name))
    if _is_he(sdata, name):
        return contract.mpp(sdata, name)
    if name == _morphology_of_reader(sdata):
        # the reader's shapes are in micrometers, and all elements share the pixels of the morphology image
        return next(
            (1.0 / contract.scale_of(contract.affine(get_transformation(shapes, "global"), key))
             for key, shapes in sdata.shapes.items() if is_in_micrometers(sdata, key)), None
        )  # fmt: skip
    return contract.scale_of(contract.affine(systems["microns"], name)) if "microns" in systems else None


def _matrix_of_fixed(sdata: SpatialData, moving: str, fixed: str) -> np.ndarray:
    """Return the matrix from the image that stays to H&E pixels. An H&E stays even if it is `moving`."""
    stays = moving if _is_he(sdata, moving) and contract.INSTRUMENT in _systems(sdata, fixed) else fixed
    systems = _systems(sdata, stays)
    if set(systems) == {contract.INSTRUMENT}:
        raise ValueError(
            f"Expected {stays!r} to have a place in the section's coordinates, found only {sorted(systems)}. "
            f"Run `stimage_sd.pp.register(sdata)` to lay it on the H&E first."
        )
    if not any(contract.INSTRUMENT in _systems(sdata, name) for name in (moving, fixed)):
        return np.eye(3)
    return contract.pixel_frame(sdata).matrix(sdata.images[stays], stays)


# --------------------------------------------------------------------------------------------------
# acceptance and writing


def _shortcomings(alignment: Alignment, um: float, max_residual_um: float, min_inliers: int) -> list[str]:
    """Return the reasons to refuse an alignment, an empty list for an accepted one."""
    wrong = []
    if alignment.n_inliers < min_inliers:
        wrong.append(f"{min_inliers} inliers are needed")
    if alignment.n_inliers < _LEAST_SHARE * alignment.n_patches:
        wrong.append(f"{_LEAST_SHARE:.0%} of the patches must agree")
    if alignment.residual_px * um > max_residual_um:
        wrong.append(f"the residual may be {max_residual_um:g} µm")
    stretch = np.linalg.svd(alignment.matrix[:2, :2], compute_uv=False)
    if stretch[0] > _MOST_STRETCH * stretch[1]:
        wrong.append(f"one direction may be stretched {_MOST_STRETCH:g} times as much as another")
    return wrong


def _refusal(sdata: SpatialData, moving: str, fixed: str, alignment: Alignment, wrong: list[str], um: float) -> str:
    residual = f"{alignment.residual_px * um:.1f} µm" if np.isfinite(alignment.residual_px) else "unknown"
    return (
        f"Found no good alignment of {moving!r} with {fixed!r} in section {contract.sample(sdata)!r}: at best "
        f"{alignment.n_matches} SIFT matches agree, then {alignment.n_inliers} of {alignment.n_patches} patches "
        f"(inliers), with a residual of {residual} and a scale of {contract.scale_of(alignment.matrix):.3f}; "
        f"{'; '.join(wrong)}. "
        "Nothing was written. Do both show the same section? If they do, name the channel of nuclei with `channel=`, "
        "or try another `working_um=`."
    )


def _write(
    sdata: SpatialData, moving: str, fixed: str, moving_to_fixed: np.ndarray, to_pixels: np.ndarray
) -> tuple[str, np.ndarray]:
    """Write the transformation and return its source and its matrix to pixels of the H&E or of `fixed`."""
    instrument = contract.INSTRUMENT
    systems = {name: _systems(sdata, name) for name in (moving, fixed)}
    if instrument in systems[fixed] and _is_he(sdata, moving):
        matrix = (
            to_pixels
            @ np.linalg.inv(moving_to_fixed)
            @ np.linalg.inv(contract.affine(systems[fixed][instrument], fixed))
        )
    elif instrument in systems[moving] and instrument not in systems[fixed]:
        matrix = to_pixels @ moving_to_fixed @ np.linalg.inv(contract.affine(systems[moving][instrument], moving))
    else:
        to_fixed = Affine(moving_to_fixed, ("x", "y"), ("x", "y"))
        for system, after in systems[fixed].items():
            set_transformation(sdata.images[moving], Sequence([to_fixed, after]), to_coordinate_system=system)
        return moving, to_pixels @ moving_to_fixed
    contract.place_instrument(sdata, matrix)
    attach_spatial(sdata)
    return instrument, matrix


def _warn_of_scale(sdata: SpatialData, name: str, stated: float | None, measured: float) -> None:
    if stated is not None and abs(measured / stated - 1) > _SAME_SCALE:
        warnings.warn(
            f"Image {name!r} of section {contract.sample(sdata)!r} is stated to have {stated:.4g} µm per pixel. "
            f"Registration found {measured:.4g}. If that is right, pass `mpp={measured:.4g}` to its reader, because "
            "the sizes of tiles and spots depend on it.",
            UserWarning,
            stacklevel=3,
        )
