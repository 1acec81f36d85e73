"""Stain normalisation: fitted once a section on a thumbnail, applied a chunk at a time when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._raster import open_raster, raster_from_array
from stimage_sd.nn import stain
from stimage_sd.pp._stain_fit import fit_stain_matrix
from stimage_sd.pp._tissue import otsu_mask, tissue_mask

StainMethod = Literal["vahadane", "macenko", "reinhard"]
METHODS = ("vahadane", "macenko", "reinhard")
#: longest side of the thumbnail that stains are fitted on, px
_FIT_SIDE = 1024


@dataclass(frozen=True)
class StainReference:
    """How a section is stained: what another section can be normalised to.

    Attributes
    ----------
    method
        ``"vahadane"``, ``"macenko"`` or ``"reinhard"``.
    white_point
        ``(3,)`` intensity of unstained glass.
    stain_matrix
        ``(3, 3)`` optical densities of haematoxylin, eosin and the residual, as columns (not Reinhard).
    concentrations
        ``(2,)`` 99th percentiles of haematoxylin and eosin over tissue (not Reinhard).
    mean, deviation
        ``(3,)`` statistics of l, alpha, beta over tissue (Reinhard alone).
    """

    method: StainMethod
    white_point: tuple[float, ...]
    stain_matrix: tuple[tuple[float, ...], ...] | None = None
    concentrations: tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def save(self, path: str | Path) -> None:
        """Write the reference as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StainReference:
        """Make a reference from what `save` wrote.

        Raises
        ------
        ValueError
            If something that the method needs is missing, or of another shape.
        """
        shapes = _SHAPES.get(content.get("method"), {})
        unknown = set(content) - set(cls.__dataclass_fields__)
        if unknown or not shapes or any(np.shape(content.get(name, ())) != shape for name, shape in shapes.items()):
            found = {name: np.shape(value) for name, value in content.items()}
            raise ValueError(f"Expected a saved stain reference with {shapes or {'method': METHODS}}, found {found}.")
        return cls(**{key: _tuples(value) for key, value in content.items()})


#: what a reference of each method has, and of which shape
_SHAPES: dict[Any, dict[str, tuple[int, ...]]] = {
    "vahadane": {"white_point": (3,), "stain_matrix": (3, 3), "concentrations": (2,)},
    "macenko": {"white_point": (3,), "stain_matrix": (3, 3), "concentrations": (2,)},
    "reinhard": {"white_point": (3,), "mean": (3,), "deviation": (3,)},
}


def stain_normalize(
    data: SpatialData | contract.Cohort,
    reference: SpatialData | StainReference | Mapping[str, Any] | np.ndarray | str | Path | None = None,
    *,
    method: StainMethod = "vahadane",
    concentrations: Literal["match", "keep"] = "match",
    image_key: str | None = None,
    image_key_added: str = contract.NORMALIZED,
) -> StainReference:
    """Give a section the staining of a reference; adds a lazy image element, computes nothing in full.

    The section's stains are fitted on tissue pixels of a thumbnail (by squidpy's `fit_stain_reference`
    for Vahadane and Macenko), against the section's own white point, so that a bright and a dim scan of
    one slide agree. The transfer is then a closed form of each pixel, applied to a chunk when it is read.

    Parameters
    ----------
    data
        A section, or a cohort of them.
    reference
        What to normalise to: a section, an image (array or file), a `StainReference`, or the path of a
        saved one. `None`: the first section of `data` itself.
    method
        ``"vahadane"`` (sparse non-negative factorisation, the paper's), ``"macenko"`` (angles in the plane
        of the two largest singular vectors) or ``"reinhard"`` (mean and deviation in l, alpha, beta).
    concentrations
        ``"match"``: scale haematoxylin and eosin by the ratio of the 99th percentiles, as StainTools does;
        ``"keep"``: change the stains' colours alone, as squidpy does.
    image_key
        The H&E image, where it is not the section's own.
    image_key_added
        Name of the image element that is added (or replaced).

    Returns
    -------
    The reference, to be saved or passed on. ``images[image_key_added]`` is written, ``uint8 (3, y, x)`` at
    every level of the source, and is what `tile`'s tiles are read from.

    Raises
    ------
    ValueError
        If a section has no tissue, its stains cannot be told apart, or the reference is of another method.

    Notes
    -----
    Paper, section 2.2, "Vahadane normalisation as the default option".

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_stain", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.stain_normalize(section).method
    'vahadane'
    >>> "he_normalized" in section.images
    True
    """
    cohort = contract.sections(data)
    if method not in METHODS:
        raise ValueError(f"Expected `method` to be one of {list(METHODS)}, found {method!r}.")
    if concentrations not in ("match", "keep"):
        raise ValueError(f'Expected `concentrations` to be "match" or "keep", found {concentrations!r}.')
    if image_key_added in {contract.image_name(sdata, image_key) for sdata in cohort.values()}:
        raise ValueError(
            f"Expected `image_key_added` to be another name than that of the H&E itself, found {image_key_added!r}."
        )
    target = _resolve(reference if reference is not None else next(iter(cohort.values())), method, image_key)
    for sdata in cohort.values():
        name = contract.image_name(sdata, image_key)
        own = fit_section(sdata, method=method, image_key=image_key)
        convert = _transfer(own, target, concentrations)
        pyramid = [convert(level.data) for level in contract.levels(sdata, name)]
        if image_key_added in sdata.images:
            del sdata.images[image_key_added]
        sdata.images[image_key_added] = contract.derive_image(sdata, name, pyramid)
        section = contract.info(sdata)
        section["normalized_image"] = image_key_added
        section["stain"] = {
            "method": method,
            "concentrations": concentrations,
            "reference": contract.plain(asdict(target)),
        }
        contract.record(sdata, "pp.stain_normalize", image=name, method=method, concentrations=concentrations)
    return target


def fit_section(sdata: SpatialData, *, method: StainMethod, image_key: str | None = None) -> StainReference:
    """Fit how a section is stained, on the tissue pixels of a thumbnail; finds the tissue where no one has."""
    name = contract.image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    if contract.TISSUE not in sdata.labels:
        tissue_mask(sdata, image_key=image_key)
    thumbnail, _ = contract.thumbnail(sdata, name, max_side=_FIT_SIDE)
    mask, _ = contract.tissue(sdata)
    return fit_thumbnail(thumbnail, _nearest(mask, thumbnail.shape[:2]), method=method)


def fit_thumbnail(thumbnail: np.ndarray, mask: np.ndarray, *, method: StainMethod) -> StainReference:
    """Fit how an image is stained.

    Parameters
    ----------
    thumbnail
        ``uint8 (y, x, 3)``.
    mask
        ``bool (y, x)``, `True` on tissue.
    method
        As in `stain_normalize`.

    Returns
    -------
    The image's own reference.

    Raises
    ------
    ValueError
        If the mask is empty or the stains cannot be told apart.
    """
    if not mask.any():
        raise ValueError("Expected tissue to fit the stains on, found none. Is it an H&E image?")
    white = white_point(thumbnail, mask)
    pixels = thumbnail[mask]
    if method == "reinhard":
        lab = stain.tissue_lab(pixels)
        return StainReference(
            method, _tuples(white), mean=_tuples(lab.mean(axis=0)), deviation=_tuples(lab.std(axis=0))
        )
    matrix = fit_stain_matrix(thumbnail, mask, method=method, white_point=white)
    amounts = stain.optical_density(pixels, white) @ np.linalg.inv(matrix).T
    strength = np.maximum(np.percentile(amounts[:, :2], 99, axis=0), 1e-6)
    return StainReference(method, _tuples(white), stain_matrix=_tuples(matrix), concentrations=_tuples(strength))


def white_point(thumbnail: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Intensity of unstained glass: the median off tissue, or the brightest pixels where all is tissue.

    Parameters
    ----------
    thumbnail
        ``uint8 (y, x, 3)``.
    mask
        ``bool (y, x)``, `True` on tissue.

    Returns
    -------
    ``float64 (3,)``.
    """
    glass = thumbnail[~mask]
    # pen, dust and shadows are off tissue too: what is darker than the tissue's bright end is no glass
    bright = glass[glass.mean(axis=1) >= np.percentile(thumbnail[mask].mean(axis=1), 90)] if mask.any() else glass
    if len(bright) >= 0.005 * mask.size:
        return np.median(bright, axis=0).astype(np.float64)
    return np.percentile(thumbnail.reshape(-1, 3), 99.9, axis=0).astype(np.float64)


def _resolve(reference: Any, method: StainMethod, image_key: str | None) -> StainReference:
    """Turn whatever the user gave into a fitted reference of the method asked for."""
    if isinstance(reference, SpatialData):
        return fit_section(reference, method=method, image_key=image_key)
    if isinstance(reference, Mapping):
        reference = StainReference.from_dict(reference)
    if isinstance(reference, str | Path) and str(reference).endswith(".json"):
        reference = _read_reference(Path(reference))
    if isinstance(reference, StainReference):
        if reference.method != method:
            raise ValueError(f"The reference was fitted by {reference.method!r}, found `method={method!r}`.")
        return reference
    levels = open_raster(reference)[0] if isinstance(reference, str | Path) else raster_from_array(reference)
    picture = SpatialData(images={contract.IMAGE: contract.build_image(levels)})
    thumbnail, _ = contract.thumbnail(picture, contract.IMAGE, max_side=_FIT_SIDE)
    return fit_thumbnail(thumbnail, otsu_mask(thumbnail), method=method)


def _read_reference(path: Path) -> StainReference:
    if not path.is_file():
        raise FileNotFoundError(f"No saved stain reference at {path}.")
    try:
        return StainReference.from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected a saved stain reference at {path}, found no JSON ({error}). Save it again."
        ) from error


class _Convert:
    """A lazy map over an image level; a class, so that dask names equal transfers alike."""

    def __init__(self, function: Any, **parameters: Any) -> None:
        self.function = function
        self.parameters = parameters

    def __call__(self, level: da.Array) -> da.Array:
        whole = level.rechunk({0: -1})
        return whole.map_blocks(self.function, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8), **self.parameters)


def _transfer(own: StainReference, target: StainReference, concentrations: str) -> _Convert:
    if own.method == "reinhard":
        return _Convert(
            stain.reinhard_transfer,
            source_mean=np.array(own.mean),
            source_deviation=np.array(own.deviation),
            target_mean=np.array(target.mean),
            target_deviation=np.array(target.deviation),
        )
    scale = np.ones(2)
    if concentrations == "match":
        scale = np.array(target.concentrations) / np.array(own.concentrations)
    matrix = stain.transfer_matrix(np.array(own.stain_matrix), np.array(target.stain_matrix), scale)
    tables = stain.transfer_tables(matrix, np.array(own.white_point), np.array(target.white_point))
    return _Convert(stain.apply_tables, tables=tables)


def _nearest(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = (np.arange(shape[0]) * mask.shape[0] // shape[0]).astype(int)
    columns = (np.arange(shape[1]) * mask.shape[1] // shape[1]).astype(int)
    return mask[np.ix_(rows, columns)]


def _tuples(value: Any) -> Any:
    """Nested tuples of plain floats, so that references compare equal and serialise as they are."""
    if isinstance(value, str) or value is None:
        return value
    return tuple(float(item) if np.ndim(item) == 0 else _tuples(item) for item in value)
