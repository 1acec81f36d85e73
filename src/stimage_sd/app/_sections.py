"""Sections as the app shows them: opened, prepared for a model, predicted, and a tile of them explained."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stimage_sd.app._uploads import UploadError, check_image, plain_words

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

#: most tiles that an uploaded image may be cut into: 5.5 x 5.5 mm of tiles of 55 µm
MOST_TILES = 10_000
#: perturbed copies of a tile by default: on two cores about 4 s a field of view
N_SAMPLES = 300

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prediction:
    """A section with a model's predictions.

    Attributes
    ----------
    sdata
        The section, this session's own.
    model
        The model.
    opened
        The section in the space of the model's heads.
    tiles
        A row a kept tile: ``tile``, ``x``, ``y`` (H&E px), ``ood_score``.
    """

    sdata: SpatialData
    model: Any
    opened: Any
    tiles: pd.DataFrame

    def of_gene(self, gene: str) -> pd.DataFrame:
        """Predictions of a gene, a row a tile."""
        from stimage_sd import contract

        table = contract.predictions(self.sdata)[:, gene]
        frame = self.tiles.copy()
        frame.insert(3, "mean", np.asarray(table.X).ravel())
        for number, name in enumerate(("total_variance", "aleatoric", "epistemic")):
            values = np.sqrt(np.asarray(table.layers[name]).ravel())
            frame.insert(4 + number, "sd" if name == "total_variance" else f"{name}_sd", values)
        for number, name in enumerate(("lower", "upper")):
            frame.insert(7 + number, name, np.asarray(table.layers[name]).ravel())
        return frame


@dataclass(frozen=True)
class Explanation:
    """A tile, explained.

    Attributes
    ----------
    sdata
        The section with the explanation in it, for `stimage_sd.pl.explanation`.
    segments
        A row a nucleus, or a superpixel where the tile has no nuclei.
    of_nuclei
        Whether they are nuclei.
    r2, stability
        Of LIME's linear model.
    """

    sdata: SpatialData
    segments: GeoDataFrame
    of_nuclei: bool
    r2: float
    stability: float


def open_image(path: Path, *, mpp: float, name: str, all_tissue: bool) -> SpatialData:
    """Open an uploaded image as a section without molecules.

    Parameters
    ----------
    path
        The file, whose header was checked.
    mpp
        Micrometres a pixel.
    name
        What the section is called.
    all_tissue
        Whether it shows tissue all over, as a tile cut from a slide does, so that no mask is to be found.

    Raises
    ------
    UploadError
        If it is damaged, or no H&E image.
    """
    import warnings

    from stimage_sd import contract, io

    check_image(path)
    try:
        with warnings.catch_warnings():
            # alpha and orientation: nothing here that a visitor could act on
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
        If it cannot be read.
    """
    from stimage_sd._store import read_section

    try:
        return read_section(path)
    except (ValueError, OSError) as error:
        raise UploadError(plain_words(error, path)) from error


def stated_mpp(path: Path) -> float | None:
    """Return the micrometres a pixel that a TIFF or slide states; `None` where it states none."""
    if path.suffix != ".tif":
        return None  # the resolution in a PNG or JPEG is a printer's
    from stimage_sd.io._raster import open_raster

    try:
        return open_raster(path)[1]
    except (ValueError, OSError) as error:
        raise UploadError(plain_words(error, path)) from error


def predict(sdata: SpatialData, model: Any, say: Say) -> Prediction:
    """Run the steps that a section lacks, and predict; see `stimage_sd.tl.predict`.

    Parameters
    ----------
    sdata
        The section; changed in memory.
    model
        The model.
    say
        Is told which step is run.

    Raises
    ------
    UploadError
        If the section is too large for the app, too small for the model, or not as the model expects.
    """
    from stimage_sd import contract, tl
    from stimage_sd._steps import prepare_for_model

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
    tiles = pd.DataFrame(
        {
            "tile": table.obs[contract.INSTANCE_KEY].to_numpy(),
            "x": np.asarray(table.obsm["spatial"])[:, 0],
            "y": np.asarray(table.obsm["spatial"])[:, 1],
            "ood_score": table.obs["ood_score"].to_numpy(),
        }
    )
    return Prediction(sdata, model, opened, tiles)


def explain(prediction: Prediction, gene: str, tile: int, *, n_samples: int) -> Explanation:
    """Score a tile's nuclei for a gene by LIME; see `stimage_sd.tl.explain`.

    Parameters
    ----------
    prediction
        The section; nothing in it is changed.
    gene
        The gene.
    tile
        ``obs["instance_id"]``.
    n_samples
        Perturbed copies of the tile.

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
    return Explanation(sdata, contract.explained(sdata), of_nuclei, r2, stability)


def distribution(prediction: Prediction, gene: str, tile: int, *, share: float = 0.999) -> pd.DataFrame:
    """What a tile is predicted to count, beside what the model file says of the counts that it was trained on.

    Parameters
    ----------
    prediction
        The section.
    gene
        The gene.
    tile
        ``obs["instance_id"]``.
    share
        Counts are listed up to this quantile of both.

    Returns
    -------
    Columns ``count`` (from 0), ``predicted`` (probability by the mixture of the members' negative binomials) and
    ``training`` (by the negative binomial fitted to all training counts, without an image).
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
    """List a tile's nuclei, the highest score first: number, centre (H&E px), area, what is known of them, score."""
    frame = explanation.segments
    table = pd.DataFrame(frame.drop(columns="geometry"))
    table.insert(2, "x", frame.geometry.centroid.x.round(1).to_numpy())
    table.insert(3, "y", frame.geometry.centroid.y.round(1).to_numpy())
    score = next(name for name in table.columns if name.startswith("lime_"))
    return table.sort_values(score, ascending=False, kind="stable").reset_index(drop=True)


def own_copy(sdata: SpatialData) -> SpatialData:
    """Return a section with the same pixels and shapes, to which elements are added without the other seeing them."""
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
    """Raise where an image without spots is too large for the app, or too small for the model, before it is tiled."""
    from stimage_sd import contract

    size, mpp = model.tiles.size_um, contract.info(sdata)["mpp"]
    if contract.TILES in sdata.tables or contract.has_units(sdata) or size is None or mpp is None:
        return
    height, width = contract.levels(sdata, contract.image_name(sdata))[0].shape[1:]
    shown = f"The image shows {width * mpp:,.0f} x {height * mpp:,.0f} µm at {mpp:g} µm a pixel"
    # as `pp.tile` counts them; a tile that was cut by the same size is one in spite of rounding
    if min(width, height) * mpp < size:
        raise UploadError(
            f"{shown}, less than one of the model's tiles of {size:g} µm. Upload a larger piece, or correct the "
            "micrometres a pixel."
        )
    n_tiles = int(width * mpp // size) * int(height * mpp // size)
    if n_tiles > MOST_TILES:
        raise UploadError(
            f"{shown}, which is {n_tiles:,} of the model's tiles; the app takes {MOST_TILES:,} at most. Crop it, "
            "correct the micrometres a pixel, or run `stimage-sd predict` and show what it writes with "
            "`stimage-sd app --data`."
        )
    _check_number(n_tiles, model)


def _check_number(n_tiles: int, model: Any) -> None:
    """Raise where tiles are too few for a model that standardises every section by itself."""
    from stimage_sd.models._features import LEAST_TILES

    if model.features.standardize == "section" and n_tiles < LEAST_TILES:
        raise UploadError(
            f"The image is {n_tiles} of the model's tiles. This model standardises every section by its own tiles, to "
            f"take out what staining and scanner add, and that takes at least {LEAST_TILES}: a tile alone cannot be "
            "predicted by it. Upload a larger piece of the slide, or choose a model that was trained with "
            "`--standardize cohort`, such as that of the bundled example."
        )


def _normalize(sdata: SpatialData, model: Any) -> None:
    """Make the stain-normalised image again, where the section was embedded before and stored without it."""
    from stimage_sd import contract, pp

    stain = model.tiles.stain
    if stain is not None and contract.info(sdata).get("normalized_image") not in sdata.images:
        pp.stain_normalize(sdata, stain["reference"], method=stain["method"], concentrations=stain["concentrations"])


def _find_nuclei(sdata: SpatialData, tile: int) -> bool:
    """Find a tile's nuclei where the section has none; tell whether there are any."""
    from stimage_sd import contract, pp

    if contract.NUCLEI in sdata.shapes:
        square = contract.tile_squares(sdata, [tile])[0]
        return bool(len(contract.nuclei(sdata).cx[square[0] : square[2], square[1] : square[3]]))
    try:
        pp.segment_nuclei(sdata, tiles=[tile])
    except ValueError:
        return False  # a tile of stroma or fat may have none: superpixels then
    return True
