"""What a model predicts for tiles that stand in the place of one of a section's: what explanations are made by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._extractors import Extractor
from stimage_sd.models._specification import TileSpecification
from stimage_sd.nn import negative_binomial

#: numpy's or JAX's: JAX's where a gradient is asked for
Values = Any


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of a section's kept tiles by one extractor, and how they came about.

    Attributes
    ----------
    tiles
        How tiles were cut and embedded.
    image
        Name of the image that they were cut from.
    own
        ``float32 (n_tiles, n_fields * n_features)``: the tiles' own embeddings.
    context
        ``float32 (n_tiles, n_context)``: the neighbours', without columns where there are none.
    extractor
        The extractor, where the model brings its own; `None`: the registered one of that name.
    """

    tiles: TileSpecification
    image: str
    own: np.ndarray
    context: np.ndarray
    extractor: Extractor | None = None


class StandIns(Protocol):
    """A section in which other tiles can stand in the place of one.

    Attributes
    ----------
    embedded
        Whose embeddings of the other tiles are needed, in this order.
    names
        What `outputs` gives.
    """

    embedded: tuple[Embedded, ...]
    names: tuple[str, ...]

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """What the model predicts for tiles in the place of one of the kept ones.

        All else stays as it is in the section: the neighbours' embeddings, and the mean and deviation that the section
        is standardised by.

        Parameters
        ----------
        row
            Number of the kept tile.
        own
            Embeddings of the tiles, ``float32 (n_stand_ins, n_fields * n_features)`` for each of `embedded`; JAX's
            arrays where the prediction is to be differentiated.
        columns
            Numbers of the genes.

        Returns
        -------
        ``float32 (n_stand_ins, n_columns)`` under each of `names`.
        """
        ...


@runtime_checkable
class Explainable(Protocol):
    """A model that predicts from the pixels of a tile, by way of its embeddings."""

    genes: tuple[str, ...]

    def stand_ins(self, sdata: SpatialData, *, section: str) -> StandIns:
        """Check that a section is as the model expects, and open it for tiles in the place of its own."""
        ...


@dataclass(frozen=True, eq=False)
class MixtureStandIns:
    """`StandIns` of a mixture of negative binomials.

    Attributes
    ----------
    weights
        ``float32 (n_members,)``.
    r_and_p
        From the row and the embeddings to r and p, each ``float32 (n_members, n_stand_ins, n_genes)``.
    """

    names: ClassVar[tuple[str, ...]] = ("mean", "aleatoric", "epistemic", "total_variance")
    embedded: tuple[Embedded, ...]
    weights: np.ndarray
    r_and_p: Callable[[int, Sequence[Values]], tuple[Values, Values]] = field(repr=False)

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """Moments of the mixture, as `stimage_sd.tl.predict` writes them."""
        r, p = self.r_and_p(row, own)
        return _moments(r[..., columns], p[..., columns], self.weights, numpy=_numpy_of(own))


@dataclass(frozen=True, eq=False)
class ClassStandIns:
    """`StandIns` of a classifier of genes.

    Attributes
    ----------
    margins
        From the row and the embeddings to the log odds of High, ``float32 (n_stand_ins, n_genes)``.
    """

    names: ClassVar[tuple[str, ...]] = ("mean",)
    embedded: tuple[Embedded, ...]
    margins: Callable[[int, Sequence[Values]], Values] = field(repr=False)

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """``"mean"``: the probability of High."""
        probability = jax.nn.sigmoid(self.margins(row, own)[:, columns])
        return {"mean": _numpy_of(own).asarray(probability)}


def _moments(r: Values, p: Values, weights: np.ndarray, *, numpy: Any = np) -> dict[str, Values]:
    """Mean and variances of a mixture of negative binomials.

    Parameters
    ----------
    r, p
        ``float32 (n_members, n_tiles, n_genes)``.
    weights
        ``float32 (n_members,)``, their sum 1.
    numpy
        The module to compute by: numpy, or `jax.numpy` where it is to be differentiated.

    Returns
    -------
    ``mean``; ``aleatoric``, the mean of the members' variances; ``epistemic``, the variance of the members' means;
    ``total_variance``, their sum; each ``float32 (n_tiles, n_genes)``.
    """
    means = numpy.asarray(negative_binomial.mean(r=r, p=p))
    mean = numpy.tensordot(weights, means, axes=1)
    aleatoric = numpy.tensordot(weights, numpy.asarray(negative_binomial.variance(r=r, p=p)), axes=1)
    epistemic = numpy.tensordot(weights, (means - mean) ** 2, axes=1)
    return {"mean": mean, "aleatoric": aleatoric, "epistemic": epistemic, "total_variance": aleatoric + epistemic}


def embedded(sdata: SpatialData, tiles: TileSpecification) -> Embedded:
    """Read a section's embeddings of the kept tiles, as `features` does, with the neighbours' apart."""
    table = contract.tiles(sdata)
    keep = table.obs["keep"].to_numpy()
    own = contract.embeddings(sdata, tiles.extractor)[keep]
    context = np.zeros((len(own), 0), np.float32)
    if tiles.context_rings:
        context = np.asarray(table.obsm[contract.context_key(tiles.extractor)])[keep]
    how: Mapping[str, Any] = table.uns.get("embeddings", {}).get(tiles.extractor, {})
    return Embedded(tiles, str(how.get("image", contract.working_image_name(sdata))), own, context)


def in_place(section: Sequence[Embedded], row: int, own: Sequence[Values]) -> Values:
    """Features of tiles in the place of one: their own embeddings, and the context of that place.

    Parameters
    ----------
    section
        The section's embeddings.
    row
        Number of the kept tile.
    own
        The tiles' embeddings by each extractor.

    Returns
    -------
    ``float32 (n_stand_ins, n_features)``.
    """
    numpy = _numpy_of(own)
    blocks = []
    for stored, values in zip(section, own, strict=True):
        context = numpy.asarray(stored.context[row])
        blocks += [values, numpy.broadcast_to(context, (len(values), len(context)))]
    return numpy.concatenate(blocks, axis=1)


def _numpy_of(values: Sequence[Values]) -> Any:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np
