"""Tiles and embeddings from HDF5 files of TRIDENT and CLAM."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._section import require_file

#: a tile matches a patch if center and side differ by at most this share of the side, or by at most 1 px
SAME_PLACE = 0.01


def read_tile_features(data: SpatialData, path: str | Path, *, extractor: str, side_px: float | None = None) -> None:
    """Read patches of TRIDENT or CLAM and their features into a section, as tiles and embeddings.

    If the section already has tiles, the features are joined to the tiles by position.

    Parameters
    ----------
    data
        The section. The patches were cut from its H&E at full resolution.
    path
        HDF5 file with ``features``, ``(n, d)`` or ``(1, n, d)``, and ``coords``, ``(n, 2)``. The coordinates are the
        upper left corners of the patches, px of level 0. TRIDENT writes ``features_<encoder>/<slide>.h5``. CLAM's
        ``extract_features_fp.py`` writes ``h5_files/<slide>.h5``.
    extractor
        Name of the embeddings: ``"uni"`` writes ``obsm["X_uni"]``.
    side_px
        Side of a patch, px of level 0. By default as stated in the attributes of ``coords``. CLAM's feature files do
        not state the side. There it is ``patch_size * downsample`` from ``patches/<slide>.h5``.

    Returns
    -------
    Nothing. The embeddings are written to ``obsm["X_<extractor>"]`` of ``tables["tiles"]``, ``float32 (n_tiles, d)``,
    and their source to ``uns["embeddings"]``. If the section has no tiles, ``tables["tiles"]`` and
    ``shapes["tile_squares"]`` are written as in `stimage_sd.pp.tile`. All tiles then have ``keep=True`` and an unknown
    ``tissue_fraction`` (NaN). The spatial context is not computed, see `stimage_sd.pp.spatial_context`.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    KeyError
        If the file has no features or coordinates, or the section has no H&E.
    ValueError
        If the file is not HDF5, if the shapes of features and coordinates differ, or if features are not finite. Also
        if the side is unknown or differs from `side_px`, if the patches belong to another slide, or if the section has
        tiles at other positions.

    Warns
    -----
    UserWarning
        If a position appears more than once. The features of the first patch are used.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> from stimage_sd.io import from_anndata
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> image = np.full((200, 200, 3), 230, np.uint8)
    >>> sdata = from_anndata(adata, image, sample="tiny", spot_diameter_px=55.0)
    >>> path = Path(tempfile.mkdtemp()) / "tiny.h5"
    >>> with h5py.File(path, "w") as file:
    ...     file["features"] = np.ones((2, 8), np.float32)
    ...     file["coords"] = np.array([[0, 0], [100, 0]])
    ...     file["coords"].attrs.update({"patch_size": 50, "patch_size_level0": 100})
    >>> read_tile_features(sdata, path, extractor="uni")
    >>> sdata.tables["tiles"].obsm["X_uni"].shape, sdata.tables["tiles"].obs[["x", "y"]].values.tolist()
    ((2, 8), [[50.0, 50.0], [150.0, 50.0]])
    """
    sdata = contract.section(data)
    if not re.fullmatch(r"[\w.-]+", extractor):
        raise ValueError(f"Expected letters, digits, `_`, `.` and `-` in `extractor`, found {extractor!r}.")
    path = require_file(path, what="an HDF5 file of features")
    image = contract.image_name(sdata)
    patches = _read(path, side_px)
    width, height = contract.image_size(sdata, image)
    _check_slide(patches, width, height, path)
    patches = patches.without_repeats(path)
    joined = contract.TILES in sdata.tables
    if joined:
        rows = _rows_of_tiles(sdata, patches, path)
    else:
        rows = np.arange(len(patches.centers))
        _write_tiles(sdata, patches)
    contract.write_embeddings(
        sdata, extractor, patches.features[rows], image=image, input_px=patches.target_px, source=patches.source
    )
    contract.record(
        sdata, "io.read_tile_features", path=path, extractor=extractor, source=patches.source, joined=joined,
        n_tiles=len(rows), side_px=patches.side_px,
    )  # fmt: skip


@dataclass(frozen=True)
class _Patches:
    """Patches and features of a file.

    - `centers`: ``(n, 2)``, x and y, px of level 0.
    - `features`: ``float32 (n, d)``.
    - `side_px`, `target_px`: side of a patch at level 0, and side of the input of the network, px.
    - `source`: tool that wrote the file, from the attributes of the file.
    - `stated_size`: width and height of the slide as stated in the file, px.
    """

    centers: NDArray[np.float64]
    features: NDArray[np.float32]
    side_px: float
    target_px: int
    source: str
    stated_size: tuple[int, int] | None

    def without_repeats(self, path: Path) -> _Patches:
        """Return only the first patch at each position."""
        _, first = np.unique(self.centers, axis=0, return_index=True)
        n_repeated = len(self.centers) - len(first)
        if not n_repeated:
            return self
        warnings.warn(
            f"{n_repeated} of {len(self.centers)} patches in {path.name} are at the position of an earlier patch and "
            "are left out.",
            UserWarning,
            stacklevel=3,
        )
        rows = np.sort(first)
        return _Patches(
            self.centers[rows], self.features[rows], self.side_px, self.target_px, self.source, self.stated_size
        )


def _read(path: Path, side_px: float | None) -> _Patches:
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "coords") if name not in file]
            if missing:
                raise KeyError(
                    f"Expected `features` and `coords` in {path}, found {sorted(file)}. Pass the file of the feature "
                    "extraction, not the file of the patches."
                )
            features, corners = np.asarray(file["features"]), np.asarray(file["coords"])
            attributes = {name: value for name, value in file["coords"].attrs.items() if not _is_none(value)}
    except OSError as error:
        raise ValueError(f"Expected an HDF5 file at {path}, found one that cannot be read ({error}).") from error
    features = features[0] if features.ndim == 3 and features.shape[0] == 1 else features
    corners = corners[0] if corners.ndim == 3 and corners.shape[0] == 1 else corners
    if features.ndim == 1 and corners.ndim == 2:
        raise ValueError(
            f"Expected one feature vector per patch in {path}, found one of the slide {features.shape} for "
            f"{len(corners)} patches. Pass the features of the patches."
        )
    if features.ndim != 2 or corners.ndim != 2 or corners.shape[1] != 2 or len(features) != len(corners):
        raise ValueError(
            f"Expected `features` (n, d) and `coords` (n, 2) in {path}, found {features.shape} and {corners.shape}."
        )
    if not len(features):
        raise ValueError(f"Expected patches in {path}, found none.")
    features = features.astype(np.float32, copy=False)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"Expected finite features in {path}, found NaN or infinity in {int((~finite).sum())} of {len(finite)} "
            "rows."
        )
    side, target_px, source = _sides(attributes, side_px, path)
    size = (attributes.get("level0_width"), attributes.get("level0_height"))
    stated_size = None if size[0] is None or size[1] is None else (int(size[0]), int(size[1]))
    return _Patches(corners.astype(np.float64) + side / 2, features, side, target_px, source, stated_size)


def _is_none(value: Any) -> bool:
    """Return whether an attribute is TRIDENT's ``None``, stored as text because HDF5 has no ``None``."""
    return (value.decode() if isinstance(value, bytes) else value) == "None" if np.ndim(value) == 0 else False


def _sides(attributes: dict[str, Any], side_px: float | None, path: Path) -> tuple[float, int, str]:
    """Return the side of a patch at level 0, the side of the network input, and the tool."""
    patch_size, stated, source = attributes.get("patch_size"), None, "unknown"
    if "patch_size_level0" in attributes:
        stated, source = float(attributes["patch_size_level0"]), "TRIDENT"
    elif patch_size is not None and {"level0_magnification", "target_magnification"} <= attributes.keys():
        magnified = attributes["level0_magnification"] / attributes["target_magnification"]
        stated, source = float(round(patch_size * magnified)), "TRIDENT"
    elif patch_size is not None and ("downsample" in attributes or attributes.get("patch_level") == 0):
        downsample = float(np.mean(attributes.get("downsample", 1.0))) * float(attributes.get("custom_downsample", 1))
        stated, source = float(patch_size) * downsample, "CLAM"
    if side_px is not None and not (np.isfinite(side_px) and side_px > 0):
        raise ValueError(f"Expected `side_px` to be a positive number of pixels, found {side_px!r}.")
    if stated is not None and side_px is not None and abs(stated - side_px) > max(1.0, SAME_PLACE * stated):
        raise ValueError(
            f"Expected `side_px={stated:g}`, as the attributes of `coords` in {path} state, found {side_px:g}."
        )
    side = stated if stated is not None else side_px
    if side is None or side <= 0:
        raise ValueError(
            f"Expected the side of a patch in the attributes of `coords` in {path}, found {sorted(attributes)}. Pass "
            "`side_px=`, in pixels of level 0: for CLAM `patch_size * downsample`, which `patches/<slide>.h5` states."
        )
    return float(side), int(patch_size) if patch_size is not None else max(1, round(side)), source


def _check_slide(patches: _Patches, width: int, height: int, path: Path) -> None:
    if patches.stated_size is not None and patches.stated_size != (width, height):
        raise ValueError(
            f"Expected patches of the H&E of {width} x {height} px, found that {path} states a slide of "
            f"{patches.stated_size[0]} x {patches.stated_size[1]} px. Pass the file of this slide."
        )
    half = patches.side_px / 2
    outside = ((patches.centers + half <= 0) | (patches.centers - half >= (width, height))).any(axis=1)
    if outside.any():
        right, bottom = patches.centers.max(axis=0) + half
        raise ValueError(
            f"Expected all patches of {path} on the H&E of {width} x {height} px, found {int(outside.sum())} of "
            f"{len(patches.centers)} outside; they reach to x {right:.0f}, y {bottom:.0f}. Check that the coordinates "
            "are pixels of level 0 of this slide."
        )


def _rows_of_tiles(sdata: SpatialData, patches: _Patches, path: Path) -> NDArray[np.intp]:
    """Return the row of the matching patch for each tile of the section."""
    squares = contract.tile_squares(sdata)
    centers, sides = (squares[:, :2] + squares[:, 2:]) / 2, squares[:, 2] - squares[:, 0]
    tolerance = max(1.0, SAME_PLACE * patches.side_px)
    distances, rows = cKDTree(patches.centers).query(centers, p=np.inf)
    apart = (distances > tolerance) | (np.abs(sides - patches.side_px) > tolerance)
    if apart.any():
        raise ValueError(
            f"Section {contract.sample(sdata)!r} has tiles of {sides[0]:.1f} px; {int(apart.sum())} of {len(apart)} "
            f"have no patch in {path}, whose patches have {patches.side_px:.1f} px. First remove the tiles with "
            f"`del sdata.tables[{contract.TILES!r}]`, and the predictions on them."
        )
    return rows


def _write_tiles(sdata: SpatialData, patches: _Patches) -> None:
    obs = pd.DataFrame(patches.centers, columns=["x", "y"]).assign(tissue_fraction=np.nan, keep=True)
    tiling: dict[str, Any] = {"layout": "grid", "side_px": patches.side_px, "target_px": patches.target_px}
    mpp = contract.mpp(sdata)
    if mpp is not None:
        tiling["size_um"] = float(patches.side_px * mpp)
    contract.write_tiles(sdata, obs, tiling)
