"""Normalize stains: fit once per section on a thumbnail, then apply lazily to each chunk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._files import replacing
from stimage_sd._shown import Facts, shown
from stimage_sd.image import stain
from stimage_sd.io._raster import open_raster, raster_from_array
from stimage_sd.pp._stain_fit import fit_stain_matrix
from stimage_sd.pp._tissue import otsu_mask, tissue_mask

StainMethod = Literal["vahadane", "macenko", "reinhard"]
METHODS = ("vahadane", "macenko", "reinhard")
#: longest side of the thumbnail for the stain fit, px
_FIT_SIDE = 1024


@shown
@dataclass(frozen=True)
class StainReference:
    """Fitted staining of a section, to which other sections can be normalized.

    Attributes
    ----------
    method
        ``"vahadane"``, ``"macenko"`` or ``"reinhard"``.
    white_point
        ``(3,)`` intensity of unstained glass.
    stain_matrix
        ``(3, 3)`` optical densities of hematoxylin, eosin and the residual, as columns (not for Reinhard).
    concentrations
        ``(2,)`` 99th percentiles of hematoxylin and eosin over tissue (not for Reinhard).
    mean, deviation
        ``(3,)`` statistics of l, alpha, beta over tissue (only for Reinhard).
    """

    method: StainMethod
    white_point: tuple[float, ...]
    stain_matrix: tuple[tuple[float, ...], ...] | None = None
    concentrations: tuple[float, ...] | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def facts(self) -> Facts:
        """Names and values that describe the staining, as notebooks show them."""

        def joined(values: Iterable[float]) -> str:
            return ", ".join(f"{value:.3g}" for value in values)

        facts = {"method": self.method, "white point": joined(self.white_point)}
        if self.stain_matrix is not None and self.concentrations is not None:
            hematoxylin, eosin = (joined(row[stain] for row in self.stain_matrix) for stain in (0, 1))
            facts |= {"hematoxylin": f"optical densities {hematoxylin}", "eosin": f"optical densities {eosin}"}
            facts["concentrations"] = joined(self.concentrations)
        if self.mean is not None and self.deviation is not None:
            facts |= {"mean": f"l, alpha, beta {joined(self.mean)}", "deviation": joined(self.deviation)}
        return facts

    def __post_init__(self) -> None:
        """Raise `ValueError` if the two stains cannot be told apart."""
        if self.stain_matrix is not None and self.concentrations is not None:
            _refuse_one_stain(np.array(self.stain_matrix, float), np.array(self.concentrations, float))

    def save(self, path: str | Path) -> None:
        """Write the reference as JSON."""
        with replacing(Path(path)) as complete:
            complete.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StainReference:
        """Return a reference from the content that `save` wrote.

        Raises
        ------
        ValueError
            If a field of the method is missing or has another shape, or the two stains cannot be told apart.
        """
        shapes = _SHAPES.get(content.get("method"), {})
        unknown = set(content) - set(cls.__dataclass_fields__)
        if unknown or not shapes or any(np.shape(content.get(name, ())) != shape for name, shape in shapes.items()):
            given = {name: np.shape(value) for name, value in content.items()}
            raise ValueError(f"Expected a saved stain reference with {shapes or {'method': METHODS}}, found {given}.")
        return cls(**{key: _tuples(value) for key, value in content.items()})


#: fields of a reference and their shapes, by method
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
    key_added: str = contract.NORMALIZED,
) -> StainReference:
    """Normalize the stains of a section to a reference, and add the result as a lazy image.

    Stains are fitted on tissue pixels of a thumbnail (with squidpy's `fit_stain_reference` for Vahadane and Macenko).
    They are fitted against the section's own white point, so that a bright and a dim scan of one slide agree. The
    transfer is a closed form per pixel. A chunk is transformed when it is read.

    Parameters
    ----------
    data
        A section, or a cohort of sections.
    reference
        The target: a section, an image (array or file), a `StainReference`, or the path of a saved reference. `None`
        uses the first section of `data`.
    method
        ``"vahadane"`` (sparse non-negative factorization, as in the paper), ``"macenko"`` (angles in the plane of the
        two largest singular vectors) or ``"reinhard"`` (mean and deviation in l, alpha, beta).
    concentrations
        ``"match"`` scales hematoxylin and eosin by the ratio of the 99th percentiles, as StainTools does. ``"keep"``
        changes only the colors of the stains, as squidpy does.
    image_key
        The H&E image, if not the section's default.
    key_added
        Name of the image element to add or replace.

    Returns
    -------
    The reference, to save or to pass on. Writes ``images[key_added]``, ``uint8 (3, y, x)`` at every level of the
    source. The tiles of `tile` are read from this image.

    Raises
    ------
    ValueError
        If a section or the reference has no tissue or only one stain (for any method), or if the reference was fitted
        by another method.

    Notes
    -----
    Paper, section 2.2, "Vahadane normalization as the default option".

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
    if key_added in {contract.image_name(sdata, image_key) for sdata in cohort.values()}:
        raise ValueError(f"Expected `key_added` to be another name than that of the H&E itself, found {key_added!r}.")
    target = _resolve(reference if reference is not None else next(iter(cohort.values())), method, image_key)
    for sdata in cohort.values():
        name = contract.image_name(sdata, image_key)
        fitted = fit_section(sdata, method=method, image_key=image_key)
        convert = _transfer(fitted, target, concentrations)
        pyramid = [convert(level.data) for level in contract.levels(sdata, name)]
        if key_added in sdata.images:
            del sdata.images[key_added]
        sdata.images[key_added] = contract.derive_image(sdata, name, pyramid)
        how = {"method": method, "concentrations": concentrations, "reference": contract.plain(asdict(target))}
        contract.remember(sdata, normalized_image=key_added, stain=how)
        contract.record(sdata, "pp.stain_normalize", image=name, method=method, concentrations=concentrations)
    return target


def fit_section(sdata: SpatialData, *, method: StainMethod, image_key: str | None = None) -> StainReference:
    """Fit a section's staining on the tissue pixels of a thumbnail, after finding the tissue if needed."""
    name = contract.image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    if not contract.has_tissue(sdata):
        tissue_mask(sdata, image_key=image_key)
    thumbnail, _ = contract.thumbnail(sdata, name, max_side=_FIT_SIDE)
    mask, _ = contract.tissue(sdata, name)
    return fit_thumbnail(thumbnail, _nearest(mask, thumbnail.shape[:2]), method=method)


def fit_thumbnail(thumbnail: np.ndarray, mask: np.ndarray, *, method: StainMethod) -> StainReference:
    """Fit the staining of an image.

    - `thumbnail`: ``uint8 (y, x, 3)``.
    - `mask`: ``bool (y, x)``, `True` on tissue.
    - `method`: as in `stain_normalize`.
    - returns: the fitted reference.
    """
    if not mask.any():
        raise ValueError("Expected tissue to fit the stains on, found none. Is it an H&E image?")
    white = white_point(thumbnail, mask)
    pixels = thumbnail[mask]
    if method == "reinhard":
        _check_two_stains(thumbnail, mask, pixels, white)
        lab = stain.tissue_lab(pixels)
        return StainReference(
            method, _tuples(white), mean=_tuples(lab.mean(axis=0)), deviation=_tuples(lab.std(axis=0))
        )
    matrix = fit_stain_matrix(thumbnail, mask, method=method, white_point=white)
    strength = _amounts(pixels, matrix, white)
    return StainReference(method, _tuples(white), stain_matrix=_tuples(matrix), concentrations=_tuples(strength))


def _amounts(pixels: np.ndarray, matrix: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Return the 99th percentiles of hematoxylin and eosin over tissue."""
    amounts = stain.optical_density(pixels, white) @ np.linalg.inv(matrix).T
    return np.maximum(np.percentile(amounts[:, :2], 99, axis=0), 1e-6)


def _check_two_stains(thumbnail: np.ndarray, mask: np.ndarray, pixels: np.ndarray, white: np.ndarray) -> None:
    """Raise if the tissue has only one stain. Other failures of the fit do not matter for Reinhard's method."""
    try:
        matrix = fit_stain_matrix(thumbnail, mask, method="macenko", white_point=white)
    except ValueError:
        if (pixels.std(axis=0) < 1).all():
            raise ValueError("Expected tissue in two stains, found one color alone. Is it an H&E image?") from None
        return
    _refuse_one_stain(matrix, _amounts(pixels, matrix, white))


def _refuse_one_stain(matrix: np.ndarray, amounts: np.ndarray) -> None:
    why = stain.why_inseparable(matrix, amounts)
    if why is not None:
        raise ValueError(
            f"Expected tissue in two stains, found that hematoxylin and eosin cannot be told apart: {why}. No method "
            "can normalize such a section. Use it unnormalized, or crop it to an area with both stains."
        )


def white_point(thumbnail: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the intensity of glass: the median off tissue, or the brightest pixels if there is no glass.

    - `thumbnail`: ``uint8 (y, x, 3)``.
    - `mask`: ``bool (y, x)``, `True` on tissue.
    - returns: ``float64 (3,)``.
    """
    glass = thumbnail[~mask]
    # pen, dust and shadows are off tissue too, so pixels darker than the brightest tissue are not glass
    bright = glass[glass.mean(axis=1) >= np.percentile(thumbnail[mask].mean(axis=1), 90)] if mask.any() else glass
    if len(bright) >= 0.005 * mask.size:
        return np.median(bright, axis=0).astype(np.float64)
    return np.percentile(thumbnail.reshape(-1, 3), 99.9, axis=0).astype(np.float64)


def _resolve(reference: Any, method: StainMethod, image_key: str | None) -> StainReference:
    """Convert the user's reference to a fitted reference of the requested method."""
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
    """Lazy map over an image level. As a class, equal transfers get equal dask names."""

    def __init__(self, function: Any, **parameters: Any) -> None:
        self.function = function
        self.parameters = parameters

    def __call__(self, level: da.Array) -> da.Array:
        whole = level.rechunk({0: -1})
        return whole.map_blocks(self.function, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8), **self.parameters)


def _transfer(source: StainReference, target: StainReference, concentrations: str) -> _Convert:
    if source.method == "reinhard":
        return _Convert(
            stain.reinhard_transfer,
            source_mean=np.array(source.mean),
            source_deviation=np.array(source.deviation),
            target_mean=np.array(target.mean),
            target_deviation=np.array(target.deviation),
        )
    scale = np.ones(2)
    if concentrations == "match":
        scale = np.array(target.concentrations) / np.array(source.concentrations)
    matrix = stain.transfer_matrix(np.array(source.stain_matrix), np.array(target.stain_matrix), scale)
    tables = stain.transfer_tables(matrix, np.array(source.white_point), np.array(target.white_point))
    return _Convert(stain.apply_tables, tables=tables)


def _nearest(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = (np.arange(shape[0]) * mask.shape[0] // shape[0]).astype(int)
    columns = (np.arange(shape[1]) * mask.shape[1] // shape[1]).astype(int)
    return mask[np.ix_(rows, columns)]


def _tuples(value: Any) -> Any:
    """Return nested tuples of plain floats, so that references compare equal and serialize."""
    if isinstance(value, str) or value is None:
        return value
    return tuple(float(item) if np.ndim(item) == 0 else _tuples(item) for item in value)
