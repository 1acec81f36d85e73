"""Open sections for the app, prepare and predict them, and explain their tiles."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stimage_sd.app._measured import Measured, find_measured
from stimage_sd.app._uploads import UploadError, check_image, plain_words

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

#: largest number of tiles of an uploaded image, 5.5 x 5.5 mm with tiles of 55 µm
MOST_TILES = 10_000
#: default of the largest number of perturbed copies of a tile
N_SAMPLES = 300


Say = Callable[[str], None]


@dataclass(frozen=True)
class Prediction:
    """Section with the predictions of a model.

    Attributes
    ----------
    sdata
        The section.
    model
        The model.
    opened
        The section as inputs of the model's heads.
    tiles
        One row per kept tile: ``tile``, ``x``, ``y`` (H&E px), ``ood_score``.
    side
        Side of a tile, H&E px.
    measured
        Measured counts, or in words why there are none.
    """

    sdata: SpatialData
    model: Any
    opened: Any
    tiles: pd.DataFrame
    side: float
    measured: Measured | str

    @property
    def is_outside(self) -> np.ndarray:
        """Tiles that are farther from the training tiles than 95 % of the training tiles, ``bool (n_tiles,)``."""
        return self.tiles["ood_score"].to_numpy() > 1

    def of_gene(self, gene: str) -> pd.DataFrame:
        """Return the predictions of a gene, one row per tile, with the measured counts if there are any."""
        from stimage_sd import contract

        table = contract.predictions(self.sdata)[:, gene]
        frame = self.tiles.copy()
        frame.insert(3, "mean", np.asarray(table.X).ravel())
        for column, name in enumerate(("total_variance", "aleatoric", "epistemic")):
            values = np.sqrt(np.asarray(table.layers[name]).ravel())
            frame.insert(4 + column, "sd" if name == "total_variance" else f"{name}_sd", values)
        for column, name in enumerate(("lower", "upper")):
            frame.insert(7 + column, name, np.asarray(table.layers[name]).ravel())
        counts = None if isinstance(self.measured, str) else self.measured.of_gene(gene, len(frame))
        return frame if counts is None else frame.join(counts.set_axis(frame.index))


@dataclass(frozen=True)
class Explanation:
    """Explanation of a tile.

    Attributes
    ----------
    sdata
        The section with the explanation, for `stimage_sd.pl.explanation`.
    segments
        One row per nucleus, or per superpixel if the tile has no nuclei.
    of_nuclei
        Whether the segments are nuclei.
    r2, stability
        R² of LIME's linear model on copies that it was not fitted to, and stability of the scores.
    n_copies
        Number of perturbed copies.
    doubt
        Why scores of single nuclei are not to be read, empty if they are.
    """

    sdata: SpatialData
    segments: GeoDataFrame
    of_nuclei: bool
    r2: float
    stability: float
    n_copies: int
    doubt: str


def open_image(path: Path, *, mpp: float, name: str, all_tissue: bool) -> SpatialData:
    """Open an uploaded image as a section without molecules.

    Parameters
    ----------
    path
        The file, with a checked header.
    mpp
        Micrometers per pixel.
    name
        Name of the section.
    all_tissue
        Whether the whole image is tissue, as for a tile cut from a slide. No tissue mask is computed then.

    Raises
    ------
    UploadError
        If the file is damaged, or not an H&E image.
    """
    import warnings

    from stimage_sd import contract, io

    check_image(path)
    try:
        with warnings.catch_warnings():
            # warnings about alpha channels and orientation do not help a visitor
            warnings.simplefilter("ignore", UserWarning)
            sdata = io.slide(path, mpp=mpp, sample=name)
    except (ValueError, OSError) as error:
        raise UploadError(plain_words(error, path)) from error
    if all_tissue:
        height, width = contract.levels(sdata, contract.IMAGE)[0].shape[1:]
        contract.write_tissue(sdata, np.ones((1, 1), bool), downsample=(float(height), float(width)))
    return sdata


def open_store(path: Path) -> SpatialData:
    """Read a section from its zarr store.

    Raises
    ------
    UploadError
        If the store cannot be read.
    """
    from stimage_sd._store import read_section

    try:
        return read_section(path)
    except (ValueError, OSError) as error:
        raise UploadError(plain_words(error, path)) from error


def stated_mpp(path: Path) -> float | None:
    """Return the micrometers per pixel that a TIFF or slide states, or `None` without a value."""
    if path.suffix != ".tif":
        return None  # a PNG or JPEG states the resolution of the print
    from stimage_sd.io._raster import open_raster

    try:
        return open_raster(path)[1]
    except (ValueError, OSError) as error:
        raise UploadError(plain_words(error, path)) from error


def predict(sdata: SpatialData, model: Any, say: Say) -> Prediction:
    """Run the missing steps of a section and predict it (see `stimage_sd.tl.predict`).

    Parameters
    ----------
    sdata
        The section, which is changed in memory.
    model
        The model.
    say
        Called with the name of each step.

    Raises
    ------
    UploadError
        If the section is too large for the app, too small for the model, or does not fit the model.
    """
    from stimage_sd import contract, tl
    from stimage_sd.pp._prepare import prepare_for_model

    try:
        _check_extent(sdata, model)
        prepare_for_model(sdata, model, weights=None, say=say)
        _normalize(sdata, model)
        say("Predicting")
        _check_number(int(contract.tiles(sdata).obs["keep"].sum()), model)
        tl.predict(sdata, model)
        opened = model.open(sdata, section=contract.sample(sdata))
    except UploadError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ModuleNotFoundError) as error:
        raise UploadError(f"The section cannot be predicted: {plain_words(error, Path('/'))}") from error
    table = contract.predictions(sdata)
    places = contract.tile_geometry(sdata, table)
    x, y = places.centers.T
    tiles = pd.DataFrame(
        {
            "tile": table.obs[contract.INSTANCE_KEY].to_numpy(),
            "x": x,
            "y": y,
            "ood_score": table.obs["ood_score"].to_numpy(),
        }
    )
    return Prediction(sdata, model, opened, tiles, float(places.side), find_measured(sdata, model))


def explain(prediction: Prediction, gene: str, tile: int, *, n_samples: int) -> Explanation:
    """Score a tile's nuclei for a gene by LIME (see `stimage_sd.tl.explain`).

    Parameters
    ----------
    prediction
        The predicted section, which is not changed.
    gene
        The gene.
    tile
        ``obs["instance_id"]``.
    n_samples
        Largest number of perturbed copies of the tile. Fewer are made if the scores are stable before.

    Raises
    ------
    UploadError
        If the tile cannot be explained.
    """
    from stimage_sd import contract, tl

    sdata = own_copy(prediction.sdata)
    try:
        of_nuclei = _find_nuclei(sdata, tile)
        tl.explain(
            sdata, prediction.model, gene, tiles=[tile], n_samples=n_samples,
            segments="nuclei" if of_nuclei else "slic",
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UploadError(f"The tile cannot be explained: {plain_words(error, Path('/'))}") from error
    table = contract.explanations(sdata)
    r2, stability = (float(np.asarray(table.layers[name])[0, 0]) for name in ("r2", "stability"))
    doubts = contract.unstable_tiles(sdata, gene, min_stability=contract.MIN_STABILITY, min_r2=contract.MIN_R2)
    n_copies = int(table.obs["n_samples"].iloc[0])
    return Explanation(sdata, contract.explained(sdata), of_nuclei, r2, stability, n_copies, doubts.get(tile, ""))


def distribution(prediction: Prediction, gene: str, tile: int, *, share: float = 0.999) -> pd.DataFrame:
    """Return the predicted count distribution of a tile, and the training distribution from the model file.

    Parameters
    ----------
    prediction
        The predicted section.
    gene
        The gene.
    tile
        ``obs["instance_id"]``.
    share
        Counts are listed up to this quantile of both distributions.

    Returns
    -------
    Columns ``count`` (from 0), ``predicted`` (probability from the mixture of the members' negative binomials) and
    ``training`` (probability from the negative binomial fitted to all training counts, without an image).
    """
    from scipy.stats import nbinom

    row = int(np.flatnonzero(prediction.tiles["tile"].to_numpy() == tile)[0])
    column = list(prediction.model.genes).index(gene)
    r, p = (np.asarray(one, np.float64)[:, 0, column] for one in prediction.opened.r_and_p(slice(row, row + 1)))
    weights = np.asarray(prediction.model.member_weights)
    mean, dispersion = (float(value) for value in prediction.model.floor[:, column])
    training = nbinom(dispersion, dispersion / (dispersion + mean))
    last = int(np.nanmax([*nbinom.ppf(share, r, p), training.ppf(share), 5.0]))
    counts = np.arange(min(last, 100_000) + 1)
    predicted = (nbinom.pmf(counts[:, None], r, p) * weights).sum(axis=1)
    return pd.DataFrame({"count": counts, "predicted": predicted, "training": training.pmf(counts)})


def segment_table(explanation: Explanation) -> pd.DataFrame:
    """Return the nuclei of a tile, highest score first, with center (H&E px), area and other columns."""
    frame = explanation.segments
    table = pd.DataFrame(frame.drop(columns="geometry"))
    table.insert(2, "x", frame.geometry.centroid.x.round(1).to_numpy())
    table.insert(3, "y", frame.geometry.centroid.y.round(1).to_numpy())
    score = next(name for name in table.columns if name.startswith("lime_"))
    return table.sort_values(score, ascending=False, kind="stable").reset_index(drop=True)


def own_copy(sdata: SpatialData) -> SpatialData:
    """Return a copy that shares pixels and shapes. Elements added to the copy do not appear in the original."""
    from spatialdata import SpatialData

    return SpatialData(
        images=dict(sdata.images),
        labels=dict(sdata.labels),
        points=dict(sdata.points),
        shapes=dict(sdata.shapes),
        tables={name: table.copy() for name, table in sdata.tables.items()},
        attrs=deepcopy(dict(sdata.attrs)),
    )


def _check_extent(sdata: SpatialData, model: Any) -> None:
    """Raise before tiling if an image without spots is too large for the app or too small for the model."""
    from stimage_sd import contract

    size, mpp = model.tiles.size_um, contract.mpp(sdata)
    if contract.TILES in sdata.tables or contract.has_units(sdata) or size is None or mpp is None:
        return
    height, width = contract.levels(sdata, contract.image_name(sdata))[0].shape[1:]
    shown = f"The image shows {width * mpp:,.0f} x {height * mpp:,.0f} µm at {mpp:g} µm per pixel"
    # same tile count as `pp.tile`
    if min(width, height) * mpp < size:
        raise UploadError(
            f"{shown}, less than one of the model's tiles of {size:g} µm. Upload a larger piece, or correct the "
            "micrometers per pixel."
        )
    n_tiles = int(width * mpp // size) * int(height * mpp // size)
    if n_tiles > MOST_TILES:
        raise UploadError(
            f"{shown}, which is {n_tiles:,} of the model's tiles. The app takes {MOST_TILES:,} at most. Crop the "
            "image, correct the micrometers per pixel, or run `stimage-sd predict` and show its result with "
            "`stimage-sd app --data`."
        )
    _check_number(n_tiles, model)


def _check_number(n_tiles: int, model: Any) -> None:
    """Raise if there are too few tiles for a model that standardizes each section by itself."""
    from stimage_sd.models._features import LEAST_TILES

    if model.features.standardize == "section" and n_tiles < LEAST_TILES:
        raise UploadError(
            f"The image has {n_tiles} of the model's tiles. This model standardizes each section by its own tiles, to "
            f"remove effects of staining and scanner. It needs at least {LEAST_TILES} tiles, so a tile alone cannot be "
            "predicted. Upload a larger piece of the slide, or choose a model that was trained with "
            "`--standardize cohort`, such as that of the bundled example."
        )


def _normalize(sdata: SpatialData, model: Any) -> None:
    """Recompute the stain-normalized image if the section was stored without it."""
    from stimage_sd import contract, pp

    stain = model.tiles.stain
    if stain is not None and contract.info(sdata).get("normalized_image") not in sdata.images:
        pp.stain_normalize(sdata, stain["reference"], method=stain["method"], concentrations=stain["concentrations"])


def _find_nuclei(sdata: SpatialData, tile: int) -> bool:
    """Find the nuclei of a tile if the section has none, and return whether the tile has nuclei."""
    from stimage_sd import contract, pp

    if contract.nuclei_name(sdata) in sdata.shapes:
        square = contract.tile_squares(sdata, [tile])[0]
        return bool(len(contract.nuclei(sdata).cx[square[0] : square[2], square[1] : square[3]]))
    try:
        pp.segment_nuclei(sdata, tiles=[tile])
    except ValueError:
        return False  # a tile of stroma or fat may have no nuclei
    return True
