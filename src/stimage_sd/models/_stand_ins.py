"""Stand-ins: predictions for other tiles in the place of one tile of a section, used by explanations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood import negative_binomial
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._specification import TileSpecification

#: numpy or JAX arrays; JAX if a gradient is needed
Values = Any


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of a section's kept tiles by one extractor, and how they were computed.

    - `tiles`: tiling and embedding of the section.
    - `image`: name of the tiled image.
    - `own`: ``float32 (n_tiles, n_fields * n_features)``: embeddings of the tiles.
    - `context`: ``float32 (n_tiles, n_context)``: embeddings of the neighbors. It has no columns without context.
    - `extractor`: the model's extractor. `None`: the registered extractor of that name.
    """

    tiles: TileSpecification
    image: str
    own: np.ndarray
    context: np.ndarray
    extractor: Extractor | None = None


class StandIns(Protocol):
    """A section in which other tiles (stand-ins) can replace a tile.

    - `embedded`: the section's embeddings. Stand-ins need embeddings by the same extractors, in this order.
    - `names`: names of the outputs.
    """

    embedded: tuple[Embedded, ...]
    names: tuple[str, ...]

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """Predict for tiles in the place of a kept tile.

        The rest of the section stays the same: the neighbors' embeddings, and the mean and deviation that standardize
        the section.

        - `row`: index of the kept tile.
        - `own`: embeddings of the stand-ins, ``float32 (n_stand_ins, n_fields * n_features)`` for each of `embedded`.
          JAX arrays if the prediction will be differentiated.
        - `columns`: indices of the genes.
        - returns: ``float32 (n_stand_ins, n_columns)`` under each of `names`.
        """
        ...


@runtime_checkable
class Explainable(Protocol):
    """A model that predicts from the embeddings of a tile's pixels."""

    genes: tuple[str, ...]

    def stand_ins(self, sdata: SpatialData, *, section: str) -> StandIns:
        """Check that a section matches the model, and open it so that other tiles can replace one of its tiles."""
        ...


@dataclass(frozen=True, eq=False)
class MixtureStandIns:
    """`StandIns` of a mixture of negative binomials.

    - `weights`: ``float32 (n_members,)``.
    - `r_and_p`: function from row and embeddings to r and p, each ``float32 (n_members, n_stand_ins, n_genes)``.
    """

    names: ClassVar[tuple[str, ...]] = ("mean", "aleatoric", "epistemic", "total_variance")
    embedded: tuple[Embedded, ...]
    weights: np.ndarray
    r_and_p: Callable[[int, Sequence[Values]], tuple[Values, Values]] = field(repr=False)

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """Compute the moments of the members' mixture. Shifts of genes, which no pixel changes, are left out."""
        r, p = self.r_and_p(row, own)
        return _moments(r[..., columns], p[..., columns], self.weights, numpy=_numpy_of(own))


@dataclass(frozen=True, eq=False)
class ClassStandIns:
    """`StandIns` of a classifier of genes.

    - `margins`: function from row and embeddings to the log odds of High, ``float32 (n_stand_ins, n_genes)``.
    """

    names: ClassVar[tuple[str, ...]] = ("mean",)
    embedded: tuple[Embedded, ...]
    margins: Callable[[int, Sequence[Values]], Values] = field(repr=False)

    def outputs(self, row: int, own: Sequence[Values], columns: np.ndarray) -> dict[str, Values]:
        """Compute the probability of High, named ``"mean"``."""
        probability = jax.nn.sigmoid(self.margins(row, own)[:, columns])
        return {"mean": _numpy_of(own).asarray(probability)}


def _moments(r: Values, p: Values, weights: np.ndarray, *, numpy: Any = np) -> dict[str, Values]:
    """Compute the mean and the aleatoric, epistemic and total variance of a mixture of negative binomials."""
    means = numpy.asarray(negative_binomial.mean(r=r, p=p))
    mean = numpy.tensordot(weights, means, axes=1)
    aleatoric = numpy.tensordot(weights, numpy.asarray(negative_binomial.variance(r=r, p=p)), axes=1)
    epistemic = numpy.tensordot(weights, (means - mean) ** 2, axes=1)
    return {"mean": mean, "aleatoric": aleatoric, "epistemic": epistemic, "total_variance": aleatoric + epistemic}


def embedded(sdata: SpatialData, tiles: TileSpecification) -> Embedded:
    """Read the embeddings of a section's kept tiles and, separately, of their neighbors."""
    table = contract.tiles(sdata)
    keep = table.obs["keep"].to_numpy()
    embeddings = contract.embeddings(sdata, tiles.extractor)[keep]
    context = np.zeros((len(embeddings), 0), np.float32)
    if tiles.context_rings:
        context = np.asarray(table.obsm[contract.context_key(tiles.extractor)])[keep]
    for values in (embeddings, context):
        contract.check_finite(sdata, values, tiles.extractor)
    how: Mapping[str, Any] = table.uns.get("embeddings", {}).get(tiles.extractor, {})
    return Embedded(tiles, str(how.get("image", contract.working_image_name(sdata))), embeddings, context)


def in_place(section: Sequence[Embedded], row: int, own: Sequence[Values]) -> Values:
    """Return the features of stand-ins: their embeddings, and the context of the replaced tile.

    - `section`: the section's embeddings.
    - `row`: index of the kept tile.
    - `own`: embeddings of the stand-ins for each extractor.
    - returns: ``float32 (n_stand_ins, n_features)``.
    """
    numpy = _numpy_of(own)
    blocks = []
    for stored, values in zip(section, own, strict=True):
        context = numpy.asarray(stored.context[row])
        blocks += [values, numpy.broadcast_to(context, (len(values), len(context)))]
    return numpy.concatenate(blocks, axis=1)


def _numpy_of(values: Sequence[Values]) -> Any:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np
