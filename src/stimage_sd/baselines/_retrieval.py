"""Retrieval: embed image and expression in one space, and predict from the nearest training spots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from stimage_sd.baselines._space import Standardize, fit_space, reduce, reduce_measured
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    count_arrays,
    targets,
)

#: number of principal components of expression
_EXPRESSION_COMPONENTS = 64
#: number of tiles per lookup
_BLOCK = 4096


class _Projection(nnx.Module):
    """Projection head of either side: a linear layer and a residual block, normalized."""

    def __init__(self, n_inputs: int, n_outputs: int, *, dropout: float, rngs: nnx.Rngs) -> None:
        self.project = nnx.Linear(n_inputs, n_outputs, rngs=rngs)
        self.mix = nnx.Linear(n_outputs, n_outputs, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.normalize = nnx.LayerNorm(n_outputs, rngs=rngs)

    def __call__(self, values: Array) -> Array:
        projected = self.project(values)
        mixed = self.normalize(projected + self.drop(self.mix(nnx.gelu(projected))))
        return mixed / jnp.linalg.norm(mixed, axis=-1, keepdims=True)


class _Pair(nnx.Module):
    """Both projection heads and the temperature of their match."""

    def __init__(self, n_features: int, n_expression: int, n_shared: int, *, dropout: float, rngs: nnx.Rngs) -> None:
        self.image = _Projection(n_features, n_shared, dropout=dropout, rngs=rngs)
        self.expression = _Projection(n_expression, n_shared, dropout=dropout, rngs=rngs)
        self.log_sharpness = nnx.Param(jnp.log(jnp.asarray(10.0)))


@dataclass(frozen=True)
class Retrieval:
    """Contrastive matching of image and expression, as in BLEEP and mclSTExp.

    Two heads project a tile's embedding and its spot's expression into one space. Training with the CLIP loss tells a
    tile's spot from the other spots of the batch. A new tile is predicted by the nearest training spots, weighted by
    their similarity.

    Attributes
    ----------
    k
        Number of spots to average.
    n_shared
        Dimensions of the shared space.
    n_epochs, batch_size, learning_rate, weight_decay
        Settings of AdamW.
    dropout
        Share of a head's units that training drops.
    n_components, standardize, target
        As in `Ridge`.

    Notes
    -----
    Xie et al. 2023, "Spatially resolved gene expression prediction from histology images via bi-modal contrastive
    learning" (BLEEP); Min et al. 2024, mclSTExp. Same as published: heads, loss, retrieval. Different: embeddings come
    from a frozen extractor, expression enters as principal components, and spot positions are not used.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.Retrieval(k=20).n_shared
    256
    """

    k: int = 50
    n_shared: int = 256
    n_epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    dropout: float = 0.1
    n_components: int = 256
    standardize: Standardize = "section"
    target: Target = "log1p"

    name: ClassVar[str] = "retrieval"
    needs: ClassVar[frozenset[Need]] = frozenset({"embeddings"})

    def __post_init__(self) -> None:
        check_positive(self, "k", "n_shared", "n_epochs", "batch_size", "n_components")
        check_choice(self, "standardize", ["section", "cohort"])
        check_choice(self, "target", ["log1p", "lognorm"])
        if not self.learning_rate > 0 or not self.weight_decay >= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "Expected a positive `learning_rate`, a `weight_decay` of 0 or more and a `dropout` between 0 and 1, "
                f"got {self.learning_rate}, {self.weight_decay} and {self.dropout}."
            )

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train both heads (see `Recipe`)."""
        space = fit_space(sections, n_components=self.n_components, standardize=self.standardize, seed=seed)
        images = reduce_measured(space, sections, self.standardize)
        unit = np.array([max(float(images.std(axis=0).max()), 1e-6)], dtype=np.float32)
        values = targets(sections, self.target)
        expression = _components(values)
        rngs = nnx.Rngs(seed)
        pair = _Pair(images.shape[1], expression.shape[1], self.n_shared, dropout=self.dropout, rngs=rngs)
        _train(pair, (images / unit).astype(np.float32), expression, self, seed)
        pair.eval()
        return {
            **space,
            **{f"head.{'.'.join(path)}": np.asarray(value) for path, value in _weights(pair.image).items()},
            "unit": unit,
            "keys": np.asarray(pair.expression(jnp.asarray(expression))),
            "sharpness": np.exp(np.asarray(pair.log_sharpness.get_value())).reshape(1),
            "values": values,
            **count_arrays(sections, self.target),
        }

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Average over the retrieved spots (see `Recipe`)."""
        images = (reduce(learned, section, self.standardize) / learned["unit"]).astype(np.float32)
        head = _image_head(learned)
        average = [
            _retrieved(np.asarray(head(jnp.asarray(images[start : start + _BLOCK]))), learned, self.k)
            for start in range(0, len(images), _BLOCK)
        ]
        return as_counts(np.concatenate(average), learned)


def _components(values: np.ndarray) -> np.ndarray:
    """Return principal components of expression, scaled so that the first has deviation 1."""
    centered = values - values.mean(axis=0)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    chosen = slice(min(_EXPRESSION_COMPONENTS, len(singular)))
    scores = left[:, chosen] * singular[chosen] * np.sqrt(len(values)) / max(singular[0], 1e-12)
    return scores.astype(np.float32)


def _loss(pair: _Pair, images: Array, expression: Array) -> Array:
    """Compute the CLIP loss, from tiles to spots and from spots to tiles."""
    match = jnp.exp(pair.log_sharpness[...]) * pair.image(images) @ pair.expression(expression).T
    diagonal = jnp.arange(len(match))
    both = optax.softmax_cross_entropy_with_integer_labels
    return (both(match, diagonal).mean() + both(match.T, diagonal).mean()) / 2


@nnx.jit
def _step(pair: _Pair, optimizer: nnx.Optimizer, images: Array, expression: Array) -> None:
    gradients = nnx.grad(_loss)(pair, images, expression)
    optimizer.update(pair, gradients)


def _train(pair: _Pair, images: np.ndarray, expression: np.ndarray, recipe: Retrieval, seed: int) -> None:
    """Train in batches of equal size. An incomplete last batch of an epoch is left out."""
    random = np.random.default_rng([seed, 4])
    size = min(recipe.batch_size, len(images))
    optimizer = nnx.Optimizer(pair, optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay), wrt=nnx.Param)
    pair.train()
    for _ in range(recipe.n_epochs):
        order = random.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            _step(pair, optimizer, jnp.asarray(images[rows]), jnp.asarray(expression[rows]))


def _weights(head: _Projection) -> dict[tuple[str, ...], Array]:
    return {tuple(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(head, nnx.Param))}


def _image_head(learned: Arrays) -> _Projection:
    """Rebuild the image head from the arrays of `fit`."""
    weights = {name.removeprefix("head."): array for name, array in learned.items() if name.startswith("head.")}
    n_inputs, n_outputs = weights["project.kernel"].shape
    make = partial(_Projection, n_inputs, n_outputs, dropout=0.0)
    head = make(rngs=nnx.Rngs(0))
    state = nnx.state(head, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(weights[".".join(map(str, path))]))
    nnx.update(head, state)
    head.eval()
    return head


def _retrieved(images: np.ndarray, learned: Arrays, k: int) -> np.ndarray:
    """Return the mean of the nearest spots' values, weighted by the softmax of their similarities."""
    keys = learned["keys"]
    similarity = learned["sharpness"][0] * images @ keys.T
    k = min(k, len(keys))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    chosen = np.take_along_axis(similarity, nearest, axis=1)
    weights = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("tk,tkg->tg", weights, learned["values"][nearest])
