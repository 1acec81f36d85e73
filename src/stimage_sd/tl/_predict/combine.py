"""Combine fitted models into one mixture, as in the FSTImage ensemble over extractors."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood import negative_binomial
from stimage_sd.models._combined import CombinedModel
from stimage_sd.models._predictor import Predictor, gene_shifts
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._fit.seen import check_unseen, fingerprints, remembered
from stimage_sd.tl._predict.held_out import HeldOut, held_out_blocks

#: gain in validation log-likelihood that multiplies a weight by e, in nats per count
_TEMPERATURE = 0.01
#: stacking stops when no weight changes by more than this
_TOLERANCE = 1e-6


def combine(
    models: Sequence[Predictor | str | Path],
    *,
    weights: Literal["equal", "validation"] | Sequence[float] = "equal",
    validation: SpatialData | contract.Cohort | None = None,
    table_key: str | None = None,
    layer: str | None = None,
) -> CombinedModel:
    """Combine models over the same or different extractors into one mixture model.

    Whole distributions are averaged, not only means. The mixture is wider where models disagree. Its epistemic
    variance includes the disagreement between models and within models.

    Parameters
    ----------
    models
        Fitted models of any kind, or their paths. Sections to predict need the embeddings of every extractor.
    weights
        ``"equal"``: equal weights. A sequence: one weight per model, scaled to sum to 1. ``"validation"`` with
        `validation`: the weights with the highest mixture likelihood on those sections. ``"validation"`` without
        `validation`: weights from the models' validation likelihoods, which must be of the same held-out tiles and
        genes.
    validation
        Sections with counts that no model was trained on.
    table_key
        Name of the count table, for `validation`.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    The combined model. It predicts the genes that all models have in common. Its ``interval_level`` is the weighted
    mean of the models' levels. A mixture is wider and covers too much at this level, so set the level by
    `stimage_sd.tl.calibrate`.

    Raises
    ------
    KeyError
        If a section of `validation` lacks genes, or the embeddings of an extractor.
    ValueError
        If the models have no gene in common, their size factors differ, weights are out of range, or validation
        likelihoods cannot be compared.

    Warns
    -----
    UserWarning
        If models predict different genes.

    Notes
    -----
    Paper, section 2.4 (FSTImage). Without `validation`, weight k is proportional to exp(−ℓ_k / 0.01), with ℓ_k the
    mean over members of the validation negative log-likelihood per count. A model that is 0.01 nats better gets 2.7
    times the weight. These weights judge models one by one. With `validation`, weights maximize the mean of
    log Σ_k w_k f_k(y) over the held-out counts (stacking of predictive distributions: Yao, Vehtari, Simpson and
    Gelman 2018), by expectation maximization of a concave function. These weights judge the mixture. Of two similar
    models one is enough, and a weaker model counts if it adds information. Prefer `validation` if a section can
    be left out for it.

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
    source = contract.Source(table_key, layer)
    parts = [as_model(model) for model in models]
    if not parts:
        raise ValueError("Expected at least one model to combine, found none.")
    if validation is not None and not (isinstance(weights, str) and weights == "validation"):
        raise ValueError(f'`validation` finds weights only with `weights="validation"`, found {weights!r}.')
    total = _common_total(parts)
    equal = np.full(len(parts), 1 / len(parts))
    combined = CombinedModel(
        genes=_common_genes(parts),
        parts=tuple(parts),
        weights=tuple(equal.tolist()),
        floor=np.empty((2, 0)),
        total=total,
    )
    seen: list[dict[str, Any]] = []
    how: dict[str, Any] = {"weights": weights if isinstance(weights, str) else "given"}
    if not isinstance(weights, str):
        chosen = _given(weights, len(parts))
    elif weights == "equal":
        chosen = equal
    elif weights != "validation":
        raise ValueError(f'Expected `weights` to be "equal", "validation" or one number per model, found {weights!r}.')
    elif validation is None:
        chosen = _softmax([_own_validation(model) for model in _comparable(parts)])
    else:
        cohort = contract.sections(validation)
        for model in parts:
            check_unseen(model, cohort, source, purpose="find weights on")
        chosen, how["validation"] = _stacked(combined, cohort, source), list(cohort)
        # the combination has seen the sections used to find weights
        seen = fingerprints(cohort, combined.genes, source)
    return _weighted(combined, chosen, how, seen)


def _weighted(
    combined: CombinedModel, weights: np.ndarray, how: dict[str, Any], seen: list[dict[str, Any]]
) -> CombinedModel:
    """Return the combined model with its weights and the values derived from them."""
    parts = combined.parts
    columns = [[part.genes.index(gene) for gene in combined.genes] for part in parts]
    floors = np.stack([np.asarray(part.floor, np.float64)[:, own] for part, own in zip(parts, columns, strict=True)])
    sections = dict.fromkeys(name for part in parts for name in part.training.get("sections", []))
    sections |= dict.fromkeys(how.get("validation", []))
    return CombinedModel(
        genes=combined.genes,
        parts=parts,
        weights=tuple(weights.tolist()),
        floor=_floor(floors, weights),
        total=combined.total,
        interval_level=float(weights @ [part.interval_level for part in parts]),
        training={
            "sections": list(sections),
            "fingerprints": seen,
            "combination": {**how, "n_models": len(parts)},
        },
    )


def _floor(floors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return mean and dispersion of the negative binomial with the moments of the mixture."""
    means, dispersions = floors[:, 0], floors[:, 1]
    mean = weights @ means
    # law of total variance minus the mean: the variance of a negative binomial beyond Poisson
    excess = weights @ (means**2 / dispersions + (means - mean) ** 2)
    return np.stack([mean, mean**2 / np.maximum(excess, 1e-12)]).astype(np.float32)


def _common_genes(models: list[Predictor]) -> tuple[str, ...]:
    common = [gene for gene in models[0].genes if all(gene in set(model.genes) for model in models[1:])]
    if not common:
        raise ValueError(
            f"The models have no gene in common. The first predicts {list(models[0].genes[:3])} and others. Fit "
            "all models on the same genes."
        )
    most = max(len(model.genes) for model in models)
    if len(common) < most:
        warnings.warn(
            f"The models predict different genes, {[len(model.genes) for model in models]} of them. The combination "
            f"predicts the {len(common)} genes in common.",
            stacklevel=3,
        )
    return tuple(common)


def _common_total(models: list[Predictor]) -> float | None:
    totals = [model.total for model in models]
    known = [total for total in totals if total is not None]
    kinds = {gene_shifts(model) is None for model in models}
    if len(known) not in (0, len(totals)) or len(kinds) > 1 or (known and not np.allclose(known, known[0], rtol=1e-6)):
        raise ValueError(
            f"The models have depths relative to different totals, {totals}, or some have a depth per spot and others "
            "one per section, so their counts cannot be compared. Fit all models on the same sections with the same "
            "`size_factors` and `exposure` (a model without exposure goes with `exposure=None`)."
        )
    return totals[0]


def _given(weights: Sequence[float], n_models: int) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n_models,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise ValueError(f"Expected {n_models} `weights`, none negative and not all 0, found {weights}.")
    return values / values.sum()


def _comparable(models: list[Predictor]) -> list[Predictor]:
    """Raise `ValueError` if validation likelihoods of the models are not of the same counts."""
    mend = 'Pass `validation=` a section that no model was trained on, or `weights="equal"`.'
    for index, model in enumerate(models):
        if not np.size(model.training.get("metrics", {}).get("validation_nll", [])):
            raise ValueError(f"Model {index} ({type(model).__name__}) has no validation likelihood. {mend}")
    first = models[0]
    for index, model in enumerate(models[1:], start=1):
        for what, stated, expected in (
            ("genes", set(model.genes), set(first.genes)),
            ("sections", set(_contents(model).values()), set(_contents(first).values())),
            ("held-out tiles", _held_out(model), _held_out(first)),
        ):
            if stated != expected:
                raise ValueError(
                    f"The validation likelihoods of models 0 and {index} are of different {what}, so they cannot be "
                    f"compared. {mend}"
                )
    return models


def _held_out(model: Predictor) -> dict[Any, float]:
    """Return how often each set of sections was held out, or the seed for a single section."""
    contents = _contents(model)
    patterns = [
        tuple(sorted(contents.get(name, name) for name in names)) for names in model.training.get("validation", [])
    ]
    shares = {pattern: round(count / len(patterns), 6) for pattern, count in Counter(patterns).items()}
    if len(model.training["sections"]) == 1:
        return {(len(patterns), model.training.get("seed")): 1.0}
    return shares


def _contents(model: Predictor) -> dict[str, str]:
    """Return the identity of training sections: their spots, or their names if spots are unknown."""
    return {
        entry["section"]: "".join(entry.get("spots", [])) or entry["section"]
        for group in remembered(model)
        for entry in group["sections"]
    }


def _own_validation(model: Predictor) -> float:
    return float(np.mean(model.training["metrics"]["validation_nll"]))


def _softmax(losses: Sequence[float]) -> np.ndarray:
    relative = np.exp(-(np.asarray(losses) - min(losses)) / _TEMPERATURE)
    return relative / relative.sum()


def _stacked(combined: CombinedModel, cohort: dict[str, SpatialData], source: contract.Source) -> np.ndarray:
    """Find the weights with the highest likelihood of held-out counts, with equal weight per section."""
    bounds = np.cumsum([0, *(len(part.member_weights) for part in combined.parts)])
    densities, shares = [], []
    for _, blocks in held_out_blocks(cast(Predictor, combined), cohort, source):
        section = np.concatenate([_log_densities(block, bounds) for block in blocks], axis=1)
        densities.append(section)
        shares.append(np.full(section.shape[1], 1 / section.shape[1] / len(cohort)))
    log_density, share = np.concatenate(densities, axis=1), np.concatenate(shares)
    # relative to the best model per count, to avoid underflow
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
    """Compute the log probability per model and count, ``float64 (n_models, n_counts)``."""
    log_prob = np.asarray(
        negative_binomial.log_prob(
            block.counts[None].astype(np.float32), r=block.r.astype(np.float32), p=block.p.astype(np.float32)
        ),
        dtype=np.float64,
    )
    out = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        share = block.weights[start:stop] / block.weights[start:stop].sum()
        with np.errstate(divide="ignore"):  # log(0) = −∞ is correct for a member of weight 0
            log_share = np.log(share)[:, None, None]
        out.append(np.logaddexp.reduce(log_prob[start:stop] + log_share, axis=0).ravel())
    return np.stack(out)
