"""Combine fitted models into one mixture: FSTImage's ensemble over extractors."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._combined import CombinedModel
from stimage_sd.models._predictor import Predictor
from stimage_sd.nn import negative_binomial
from stimage_sd.tl._held_out import HeldOut, check_unseen, held_out_blocks

#: nats a count by which one model's validation likelihood has to be better for e times the weight
_TEMPERATURE = 0.01
#: stacking ends when no weight moves by more
_TOLERANCE = 1e-6


def combine(
    models: Sequence[Predictor],
    *,
    weights: Literal["equal", "validation"] | Sequence[float] = "equal",
    validation: SpatialData | contract.Cohort | None = None,
    table_key: str | None = None,
) -> CombinedModel:
    """Combine models, over different extractors or the same, into one whose distribution is their mixture.

    Distributions are averaged, not only means: where models disagree the mixture is wider, and its epistemic variance
    holds the disagreement between models as well as that within each.

    Parameters
    ----------
    models
        Fitted models of any kind. A section to predict needs the embeddings of every extractor.
    weights
        ``"equal"``; a weight for each model, which are brought to the sum 1; or ``"validation"``: with `validation`,
        those under which the mixture is most likely there; without, by the models' own validation likelihoods, which
        have to be of the same held-out tiles and genes.
    validation
        Sections with counts that no model was trained on, to find weights on.
    table_key
        Name of the table of counts, for `validation`.

    Returns
    -------
    The combination. It predicts the genes that all models do. Its ``interval_level`` is the weighted mean of the
    models' levels, at which a mixture, being wider, covers too much: `stimage_sd.tl.calibrate` sets it.

    Raises
    ------
    KeyError
        If a section of `validation` was not embedded by every extractor, or lacks genes.
    ValueError
        If no gene is common to the models, their size factors differ, weights are out of range, or their validation
        likelihoods cannot be compared.

    Warns
    -----
    UserWarning
        If models predict different genes.

    Notes
    -----
    Paper, section 2.4 (FSTImage). Without `validation`, weight k is proportional to exp(−ℓ_k / 0.01), with ℓ_k the
    mean over members of the validation negative log-likelihood a count: a model that is a hundredth of a nat better
    gets 2.7 times the weight. That judges each model alone. With `validation`, weights maximise the mean of
    log Σ_k w_k f_k(y) over the held-out counts (stacking of predictive distributions: Yao, Vehtari, Simpson and
    Gelman 2018), by expectation maximisation of a concave function. That judges the mixture: of two models that are
    alike one is enough, and a weaker one counts where it knows what the others do not. So prefer it where you can
    leave a section out for it.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_combine", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> options = {"genes": genes, "n_members": 2, "max_epochs": 2}
    >>> each = [sti.tl.fit_nb(section, head=head, **options) for head in ("paper", "dispersion")]
    >>> both = sti.tl.combine(each)
    >>> sti.tl.predict(section, both)
    >>> both.member_weights.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    models = list(models)
    if not models:
        raise ValueError("Expected at least one model to combine, found none.")
    if validation is not None and not (isinstance(weights, str) and weights == "validation"):
        raise ValueError(f'`validation` finds weights only with `weights="validation"`, found {weights!r}.')
    total = _common_total(models)
    equal = np.full(len(models), 1 / len(models))
    combined = CombinedModel(
        genes=_common_genes(models),
        parts=tuple(models),
        weights=tuple(equal.tolist()),
        floor=np.empty((2, 0)),
        total=total,
    )
    how: dict[str, Any] = {"weights": weights if isinstance(weights, str) else "given"}
    if not isinstance(weights, str):
        chosen = _given(weights, len(models))
    elif weights == "equal":
        chosen = equal
    elif weights != "validation":
        raise ValueError(f'Expected `weights` to be "equal", "validation" or a number a model, found {weights!r}.')
    elif validation is None:
        chosen = _softmax([_own_validation(model) for model in _comparable(models)])
    else:
        cohort = contract.sections(validation)
        for model in models:
            check_unseen(model, cohort, purpose="find weights on")
        chosen, how["validation"] = _stacked(combined, cohort, table_key), list(cohort)
    return _weighted(combined, chosen, how)


def _weighted(combined: CombinedModel, weights: np.ndarray, how: dict[str, Any]) -> CombinedModel:
    """The combination with its weights, and what follows from them."""
    parts = combined.parts
    columns = [[part.genes.index(gene) for gene in combined.genes] for part in parts]
    floors = np.stack([np.asarray(part.floor, np.float64)[:, own] for part, own in zip(parts, columns, strict=True)])
    sections = dict.fromkeys(name for part in parts for name in part.training.get("sections", []))
    # sections that weights were found on are not new to the combination
    sections |= dict.fromkeys(how.get("validation", []))
    return CombinedModel(
        genes=combined.genes,
        parts=parts,
        weights=tuple(weights.tolist()),
        floor=_floor(floors, weights),
        total=combined.total,
        interval_level=float(weights @ [part.interval_level for part in parts]),
        training={"sections": list(sections), "combination": {**how, "n_models": len(parts)}},
    )


def _floor(floors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean and dispersion of the negative binomial with the mixture's mean and variance."""
    means, dispersions = floors[:, 0], floors[:, 1]
    mean = weights @ means
    # law of total variance, less the mean: what a negative binomial has beyond a Poisson
    excess = weights @ (means**2 / dispersions + (means - mean) ** 2)
    return np.stack([mean, mean**2 / np.maximum(excess, 1e-12)]).astype(np.float32)


def _common_genes(models: list[Predictor]) -> tuple[str, ...]:
    common = [gene for gene in models[0].genes if all(gene in set(model.genes) for model in models[1:])]
    if not common:
        raise ValueError(
            f"The models have no gene in common: the first predicts {list(models[0].genes[:3])} and others, another "
            "one none of these. Fit them on the same genes."
        )
    most = max(len(model.genes) for model in models)
    if len(common) < most:
        warnings.warn(
            f"The models predict different genes, {[len(model.genes) for model in models]}; the combination predicts "
            f"the {len(common)} that all do.",
            stacklevel=3,
        )
    return tuple(common)


def _common_total(models: list[Predictor]) -> float | None:
    totals = [model.total for model in models]
    known = [total for total in totals if total is not None]
    if len(known) not in (0, len(totals)) or (known and not np.allclose(known, known[0], rtol=1e-6)):
        raise ValueError(
            f"The models have size factors relative to different totals, {totals}, so their counts do not compare. "
            "Fit all on the same sections with the same `size_factors`."
        )
    return totals[0]


def _given(weights: Sequence[float], n_models: int) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n_models,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise ValueError(f"Expected {n_models} `weights`, none negative and not all 0, found {weights}.")
    return values / values.sum()


def _comparable(models: list[Predictor]) -> list[Predictor]:
    """Raise `ValueError` where the models' validation likelihoods are not of the same counts."""
    mend = 'Pass `validation=` a section that no model was trained on, or `weights="equal"`.'
    for number, model in enumerate(models):
        if not np.size(model.training.get("metrics", {}).get("validation_nll", [])):
            raise ValueError(f"Model {number} ({type(model).__name__}) has no validation likelihood. {mend}")
    first = models[0]
    for number, model in enumerate(models[1:], start=1):
        for what, found, expected in (
            ("genes", set(model.genes), set(first.genes)),
            ("sections", set(model.training["sections"]), set(first.training["sections"])),
            ("held-out tiles", _held_out(model), _held_out(first)),
        ):
            if found != expected:
                raise ValueError(
                    f"The validation likelihoods of models 0 and {number} are of different {what}, so they do not "
                    f"compare. {mend}"
                )
    return models


def _held_out(model: Predictor) -> dict[Any, float]:
    """How often each set of sections was held out; with a single section, parts of it, which the seed decides."""
    patterns = [tuple(sorted(names)) for names in model.training.get("validation", [])]
    shares = {pattern: round(count / len(patterns), 6) for pattern, count in Counter(patterns).items()}
    if len(model.training["sections"]) == 1:
        return {(len(patterns), model.training.get("seed")): 1.0}
    return shares


def _own_validation(model: Predictor) -> float:
    return float(np.mean(model.training["metrics"]["validation_nll"]))


def _softmax(losses: Sequence[float]) -> np.ndarray:
    relative = np.exp(-(np.asarray(losses) - min(losses)) / _TEMPERATURE)
    return relative / relative.sum()


def _stacked(combined: CombinedModel, cohort: dict[str, SpatialData], table_key: str | None) -> np.ndarray:
    """Weights under which held-out counts are most likely; of several sections, each counts alike."""
    bounds = np.cumsum([0, *(len(part.member_weights) for part in combined.parts)])
    densities, shares = [], []
    for _, blocks in held_out_blocks(cast(Predictor, combined), cohort, table_key):
        section = np.concatenate([_log_densities(block, bounds) for block in blocks], axis=1)
        densities.append(section)
        shares.append(np.full(section.shape[1], 1 / section.shape[1] / len(cohort)))
    log_density, share = np.concatenate(densities, axis=1), np.concatenate(shares)
    # relative to the best model of each count: nothing underflows where it matters
    density = np.exp(log_density - log_density.max(axis=0))
    weights = np.full(len(density), 1 / len(density))
    for _ in range(10_000):
        before = weights
        weights = weights * (density @ (share / (weights @ density)))
        weights /= weights.sum()
        if np.abs(weights - before).max() < _TOLERANCE:
            break
    return weights


def _log_densities(block: HeldOut, bounds: np.ndarray) -> np.ndarray:
    """Log probability of each count under each model alone, ``float64 (n_models, n_counts)``."""
    log_prob = np.asarray(
        negative_binomial.log_prob(
            block.counts[None].astype(np.float32), r=block.r.astype(np.float32), p=block.p.astype(np.float32)
        ),
        dtype=np.float64,
    )
    out = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        share = block.weights[start:stop] / block.weights[start:stop].sum()
        with np.errstate(divide="ignore"):  # a member of no weight has the logarithm −∞, and no part
            log_share = np.log(share)[:, None, None]
        out.append(np.logaddexp.reduce(log_prob[start:stop] + log_share, axis=0).ravel())
    return np.stack(out)
