"""Predictors of other packages as models: their values, linked to counts by a negative binomial regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, counted, listed, shown
from stimage_sd.likelihood.link import Link
from stimage_sd.models._certificate import Certified
from stimage_sd.models._facts import certificate_facts, interval_facts, training_facts
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import SavedModel, under
from stimage_sd.models._members import Members

Scale = Literal["means", "logs"]
#: what a function may return, or the name of a table
Predicting = Callable[[SpatialData], np.ndarray | pd.DataFrame | AnnData] | str
#: share of a gene's mean that is added before the logarithm
_LITTLE = 0.01


@shown
@dataclass(frozen=True)
class Wrapped:
    """Any predictor of genes, before its values are linked to counts.

    Made by `stimage_sd.models.wrap`. `stimage_sd.tl.calibrate` turns it into a `WrappedModel`.

    Attributes
    ----------
    predict
        Function of a section that returns values, or the name of a table with them.
    genes
        Names of the genes.
    scale
        ``"means"`` or ``"logs"``.
    trained_on
        Names of the sections that the predictor was trained on.
    """

    predict: Predicting
    genes: tuple[str, ...]
    scale: Scale
    trained_on: tuple[str, ...] = ()

    def facts(self) -> Facts:
        """Names and values that describe the predictor, as notebooks show them."""
        return {
            "predictor": f"{_name(self.predict)}, values are {self.scale}",
            "genes": counted(self.genes),
            "trained on": listed(self.trained_on) or "not stated",
            "next": "stimage_sd.tl.calibrate(sections, wrapped) links the values to counts",
        }

    def values(self, sdata: SpatialData, *, section: str) -> np.ndarray:
        """Return the predictor's values of the kept tiles, ``float64 (n_tiles, n_genes)``.

        Raises
        ------
        KeyError
            If the table, a gene or a tile is missing.
        ValueError
            If the values have another shape, or are not finite, or are negative means.
        """
        kept = contract.tiles(sdata).obs["keep"].to_numpy()
        result = self._found(sdata, section)
        if isinstance(result, np.ndarray):
            values = self._of_array(result, kept, section)
        else:
            values = self._of_rows(result, contract.tiles(sdata)[kept].obs, section)
        if not np.isfinite(values).all():
            raise ValueError(
                f"The predictor's values of section {section!r} are not finite for "
                f"{int((~np.isfinite(values)).sum())} of {values.size} tiles and genes."
            )
        if self.scale == "means" and (values < 0).any():
            raise ValueError(
                f"The predictor's values of section {section!r} are negative, down to {values.min():.3g}, so they are "
                'no means. Pass `scale="logs"` to `stimage_sd.models.wrap` if they are logarithms or z-scores.'
            )
        return values

    def _found(self, sdata: SpatialData, section: str) -> np.ndarray | pd.DataFrame | AnnData:
        if not isinstance(self.predict, str):
            result = self.predict(sdata)
            return result if isinstance(result, pd.DataFrame | AnnData) else np.asarray(result, dtype=np.float64)
        if self.predict not in sdata.tables:
            raise KeyError(f"Section {section!r} has no table {self.predict!r}, but {sorted(sdata.tables)}.")
        return sdata.tables[self.predict]

    def _of_array(self, found: np.ndarray, kept: np.ndarray, section: str) -> np.ndarray:
        n_kept, n_genes = int(kept.sum()), len(self.genes)
        if found.shape == (len(kept), n_genes):
            return found[kept]
        if found.shape != (n_kept, n_genes):
            raise ValueError(
                f"Expected the predictor to return values of {n_kept} kept tiles, or of all {len(kept)} tiles, times "
                f"{n_genes} genes for section {section!r}, found an array of shape {found.shape}."
            )
        return found

    def _of_rows(self, found: pd.DataFrame | AnnData, obs: pd.DataFrame, section: str) -> np.ndarray:
        columns = found.var_names if isinstance(found, AnnData) else found.columns
        absent = [gene for gene in self.genes if gene not in columns]
        if absent:
            raise KeyError(f"The predictor's values of section {section!r} lack the genes {absent[:10]}.")
        tiles = [pd.Index(obs[name].astype(str)) for name in ("spot_id", contract.INSTANCE_KEY) if name in obs]
        named = [index for index in _row_names(found) if not index.has_duplicates]
        tried = [index.get_indexer(names) for index in named for names in tiles]
        rows = max(tried, key=lambda each: int((each >= 0).sum()), default=np.full(len(obs), -1))
        if (rows < 0).any():
            raise KeyError(
                f"Expected one row of values for every kept tile of section {section!r}, named by its spot or number "
                f"(such as {' or '.join(each[0] for each in tiles)}), found rows "
                f"{_row_names(found)[0][:3].tolist()}, for {int((rows >= 0).sum())} of {len(rows)} tiles."
            )
        if isinstance(found, pd.DataFrame):
            return found[list(self.genes)].to_numpy(dtype=np.float64)[rows]
        values = found[rows, list(self.genes)].X
        return np.asarray(values.toarray() if sp.issparse(values) else values, dtype=np.float64)


def wrap(
    predict: Predicting, *, genes: Sequence[str], scale: Scale = "means", trained_on: Sequence[str] = ()
) -> Wrapped:
    """Wrap any predictor of genes, so that it can become a model of this package.

    Parameters
    ----------
    predict
        Function that takes a section and returns its values: an array with one row per kept tile (or per tile) and one
        column per gene, or a `pandas.DataFrame` or `anndata.AnnData` with rows named by spots or by the tiles'
        ``instance_id``. Or the name of a table in every section with such rows.
    genes
        Names of the genes.
    scale
        ``"means"``: values are in proportion to expected counts, for instance means of another model. ``"logs"``:
        equal differences mean equal ratios of counts, for instance predicted log-normalized expression or z-scores.
    trained_on
        Names of the sections that the predictor was trained on. `stimage_sd.tl.certify` refuses them.

    Returns
    -------
    The wrapped predictor. ``stimage_sd.tl.calibrate(sections, wrapped)`` learns from sections with counts how its
    values become distributions of counts, and returns a `stimage_sd.models.WrappedModel`. That model predicts, and
    can be evaluated, certified and combined. It can be saved if `predict` is the name of a table.

    Raises
    ------
    ValueError
        If `genes` is empty or repeats a name, or `scale` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> import stimage_sd as sti
    >>> def brightness(section):
    ...     tiles = section.tables["tiles"]
    ...     return np.asarray(tiles.obsm["X_efficientnet_lite0_stages"])[:, :2]
    >>> sti.models.wrap(brightness, genes=["ERBB2", "CD74"], scale="logs").genes
    ('ERBB2', 'CD74')
    """
    names = tuple(map(str, genes))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected `genes` as a list of different names, found {list(names)[:10]}.")
    if scale not in get_args(Scale):
        raise ValueError(f"Expected `scale` to be one of {list(get_args(Scale))}, found {scale!r}.")
    return Wrapped(predict, names, scale, tuple(map(str, trained_on)))


@shown
@dataclass(frozen=True)
class WrappedModel(Certified, SavedModel, kind="wrapped"):
    """A predictor of another package whose values were linked to counts.

    Made by `stimage_sd.tl.calibrate` from `stimage_sd.models.wrap`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    wrapped
        The predictor.
    link
        Regression of the counts of every gene on the predictor's values.
    little
        ``float64 (n_genes,)``: added to means before the logarithm.
    familiarity
        Space of the predictor's values, from which strangeness is computed.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit.
    total
        Median total count of a spot, which has depth 1.
    interval_level
        Nominal level at which intervals covered 90 % of left-out counts.
    training
        Record of the calibration, as of `stimage_sd.tl.fit_nb`.
    shifts, r_scale, spot_sd
        As of `NBModel`.
    """

    wrapped: Wrapped
    link: Link
    little: np.ndarray
    familiarity: FeatureSpace
    floor: np.ndarray
    total: float | None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)
    shifts: np.ndarray | None = None
    r_scale: float = 1.0
    spot_sd: float = 0.0

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the genes."""
        return self.wrapped.genes

    @property
    def members(self) -> Members[WrappedModel]:
        """The one member, which is the model itself."""
        return Members(1, lambda _: self)

    @property
    def member_weights(self) -> np.ndarray:
        """Weights of the members: one member of weight 1."""
        return np.ones(1)

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        return {"extractor": "none", "head": f"wrapped {_name(self.wrapped.predict)}", "n_members": 1}

    def open(self, sdata: SpatialData, *, section: str) -> WrappedSection:
        """Read the predictor's values of a section and predict its counts.

        Raises
        ------
        KeyError, ValueError
            If the section was not tiled, or the predictor's values are missing or have another form.
        """
        values = logarithms(self.wrapped.values(sdata, section=section), self.wrapped.scale, self.little)
        r = np.maximum(self.r_scale * self.link.dispersion, 1e-6)
        return WrappedSection(
            self.link.means(values).astype(np.float32), r.astype(np.float32),
            self.familiarity.strangeness(values.astype(np.float32)),
        )  # fmt: skip

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays of the model, or raise `ValueError` for a function, as files hold no code."""
        if not isinstance(self.wrapped.predict, str):
            raise ValueError(
                "A wrapped function cannot be saved, since model files hold no code. Write its values to a table of "
                "every section and wrap the name of the table: `stimage_sd.models.wrap('values', genes=...)`."
            )
        config = {
            "genes": list(self.genes),
            "table": self.wrapped.predict,
            "scale": self.wrapped.scale,
            "trained_on": list(self.wrapped.trained_on),
            "total": self.total,
            "interval_level": self.interval_level,
            "r_scale": self.r_scale,
            "spot_sd": self.spot_sd,
            "training": self.training,
        }
        arrays = {f"link.{name}": array for name, array in self.link._asdict().items()}
        arrays |= {**self.familiarity.arrays(), "little": self.little, "floor": self.floor}
        if self.shifts is not None:
            arrays["shifts"] = self.shifts
        return config, arrays

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> WrappedModel:
        """Build a model from the config and arrays that `save` wrote."""
        link = Link(**under("link.", arrays))
        genes = tuple(config["genes"])
        if config["scale"] not in get_args(Scale) or any(array.shape != (len(genes),) for array in link):
            raise KeyError(f"scale {config['scale']!r} with links of shapes {[array.shape for array in link]}")
        return cls(
            wrapped=Wrapped(config["table"], genes, config["scale"], tuple(config["trained_on"])),
            link=link,
            little=arrays["little"],
            familiarity=FeatureSpace.from_arrays(arrays, standardize="cohort"),
            floor=arrays["floor"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
            shifts=arrays.get("shifts"),
            r_scale=config["r_scale"],
            spot_sd=config["spot_sd"],
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        return {
            "genes": counted(self.genes),
            "predictor": _name(self.wrapped.predict),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training, name="calibrated on"),
        }


def _name(predict: Predicting) -> str:
    return predict if isinstance(predict, str) else getattr(predict, "__name__", type(predict).__name__)


@dataclass(frozen=True)
class WrappedSection:
    """A section with the means of a wrapped predictor.

    - `means`: ``float32 (n_tiles, n_genes)`` at a depth of 1.
    - `dispersion`: r, ``float32 (n_genes,)``.
    - `strangeness`: distance from the values of the calibration tiles, ``float32 (n_tiles,)``.
    """

    means: np.ndarray
    dispersion: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some tiles, each ``float32 (1, n_rows, n_genes)``."""
        means = self.means[rows]
        r = np.broadcast_to(self.dispersion, means.shape)
        return r[None], (r / (r + means))[None]


def logarithms(values: np.ndarray, scale: Scale, little: np.ndarray) -> np.ndarray:
    """Return values on a scale where equal differences mean equal ratios of counts."""
    return np.log(values + little) if scale == "means" else values


def little_of(values: np.ndarray) -> np.ndarray:
    """Return what is added to means before the logarithm, ``float64 (n_genes,)``."""
    return np.maximum(_LITTLE * values.mean(axis=0), 1e-12)


def _row_names(found: pd.DataFrame | AnnData) -> list[pd.Index]:
    """Return the names of rows: the index, and what the rows of an annotating table annotate."""
    if isinstance(found, pd.DataFrame):
        return [found.index.astype(str)]
    key = contract.keys_of(found).get("instance_key")
    return [found.obs_names, *([pd.Index(found.obs[key].astype(str))] if key in found.obs else [])]
