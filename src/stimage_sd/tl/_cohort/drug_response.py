"""Prediction of drug response from expression, with nested cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from joblib import Parallel, delayed
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from stimage_sd._progress import tqdm
from stimage_sd._shown import Facts, frames, shown
from stimage_sd.tl._cohort.patients import patients_of

Scale = Literal["log1p", "cpm", "none"]
#: grid of the inner folds: C, and gamma times the number of genes
_C, _GAMMA = (0.1, 1.0, 10.0, 100.0), (0.1, 1.0, 10.0)
#: bootstrap samples of patients for the interval
_RESAMPLED = 2000


@shown
class DrugResponse(NamedTuple):
    """Result of `drug_response`.

    Attributes
    ----------
    folds
        One row per outer fold: ``fold``, ``auc``, ``C``, ``gamma``, ``n_test``, ``n_positive``.
    patients
        One row per patient: ``patient``, ``response`` (0 or 1), ``score`` (decision value of a model trained without
        the patient), ``fold``.
    auc
        Mean area under the ROC curve over outer folds.
    interval
        95 % interval of `auc`, from 2,000 bootstrap samples of patients within fold and class.
    p_value
        Fraction of permutations with at least this `auc`, or `None` without permutations.
    positive
        Response that counts as 1.
    """

    folds: pd.DataFrame
    patients: pd.DataFrame
    auc: float
    interval: tuple[float, float]
    p_value: float | None
    positive: str

    def facts(self) -> Facts:
        """Names and values that describe the result, as notebooks show them."""
        p_value = "not computed" if self.p_value is None else f"{self.p_value:.3g}"
        return {
            "AUC": f"{self.auc:.3f}, 95% interval [{self.interval[0]:.3f}, {self.interval[1]:.3f}]",
            "p-value": p_value,
            "patients": f"{len(self.patients)}, {int(self.patients['response'].sum())} of response {self.positive!r}",
            "tables": frames(self),
        }


def drug_response(
    data: AnnData,
    *,
    response_key: str,
    positive: str | int | bool | None = None,
    genes: Sequence[str] | None = None,
    scale: Scale = "log1p",
    n_folds: int = 5,
    n_permutations: int = 100,
    patient_key: str | None = None,
    layer: str | None = None,
    n_jobs: int = 1,
    seed: int = 0,
) -> DrugResponse:
    """Predict drug response with a support-vector machine in nested cross-validation.

    Parameters
    ----------
    data
        A cohort, slides x genes, predicted (`stimage_sd.tl.predict_cohort`) or measured.
    response_key
        Column of ``obs`` with two values.
    positive
        Value of a responder, such as ``"pCR"``. Default: the value that sorts last (1, `True`).
    genes
        Genes of the model. Default: all genes.
    scale
        ``"log1p"`` for predicted means, ``"cpm"`` (log1p of counts per million) for raw counts, or ``"none"``. Genes
        are then standardized with mean and standard deviation of the training patients.
    n_folds
        Number of outer folds, stratified by response. The same number of inner folds chooses C and gamma on the
        training patients.
    n_permutations
        Number of nested cross-validations with shuffled responses. 0: none.
    patient_key
        Column of ``obs`` with the patient. Slides of a patient are averaged. By default every row is a patient.
    layer
        Layer of the values. Default: ``X``.
    n_jobs
        Number of processes for the permutations. Results do not depend on the number of processes.
    seed
        Seed of splits, permutations and bootstrap.

    Returns
    -------
    Folds, patients, and the mean AUC with its interval and p-value.

    Raises
    ------
    KeyError
        If a column, gene or layer is missing.
    ValueError
        If there are not two responses, a response has fewer patients than folds, or an option is out of range.

    Notes
    -----
    Paper, section 2.10: radial basis functions, nested stratified 5-fold cross-validation, mean AUC over outer folds.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, stimage_sd as sti
    >>> random = np.random.default_rng(0)
    >>> expression = random.gamma(2.0, size=(40, 4)).astype("float32")
    >>> obs = pd.DataFrame({"pcr": (expression[:, 0] > 1.8).astype(int)}, index=[f"P{i}" for i in range(40)])
    >>> cohort = ad.AnnData(expression, obs, pd.DataFrame(index=list("ABCD")))
    >>> sti.tl.drug_response(cohort, response_key="pcr", n_folds=3, n_permutations=0).auc > 0.8
    True
    """
    if scale not in get_args(Scale):
        raise ValueError(f"Expected `scale` to be one of {list(get_args(Scale))}, found {scale!r}.")
    if n_folds < 2 or n_permutations < 0:
        raise ValueError(f"Expected `n_folds` of 2 or more and `n_permutations` of 0 or more, found {n_folds} and "
                         f"{n_permutations}.")  # fmt: skip
    responders = patients_of(data, [response_key], patient=patient_key, genes=genes, layer=layer)
    labels, name = _labels(responders.obs[response_key], response_key, positive, n_folds)
    if scale != "none" and responders.values.min() < 0:
        raise ValueError(f'Expected values of 0 or more for `scale="{scale}"`, found {responders.values.min():g}. '
                         'Values that are logs or z-scores already take `scale="none"`.')  # fmt: skip
    folds, scores, fold_of = _nested(responders.values, labels, scale, n_folds, seed)
    auc = float(folds["auc"].mean())
    by_chance = _permuted(responders.values, labels, scale, n_folds, n_permutations, seed, n_jobs)
    p_value = (1 + int((by_chance >= auc).sum())) / (1 + n_permutations) if n_permutations else None
    patients = pd.DataFrame({"patient": responders.names, "response": labels, "score": scores, "fold": fold_of})
    return DrugResponse(folds, patients, auc, _interval(labels, scores, fold_of, seed), p_value, name)


def _labels(values: pd.Series, column: str, positive: object, n_folds: int) -> tuple[np.ndarray, str]:
    kinds = sorted(values.unique(), key=lambda value: (str(type(value)), value))
    if len(kinds) != 2:
        raise ValueError(
            f"Expected two responses in {column!r}, found {len(kinds)}: {kinds[:5]}. Select the rows of two responses, "
            "or merge them into two."
        )
    if positive is not None and positive not in kinds:
        raise ValueError(f"No response {positive!r} in {column!r}, found {kinds}.")
    chosen = kinds[1] if positive is None else positive
    labels = (values == chosen).to_numpy().astype(int)
    least = int(min(labels.sum(), len(labels) - labels.sum()))
    if least < n_folds:
        raise ValueError(f"Expected at least {n_folds} patients of either response, one per fold, found {least}.")
    return labels, str(chosen)


def _pipeline(scale: Scale) -> Pipeline:
    before = {"log1p": [FunctionTransformer(np.log1p)], "cpm": [FunctionTransformer(_log_cpm)], "none": []}[scale]
    return make_pipeline(*before, StandardScaler(), SVC(kernel="rbf", class_weight="balanced"))


def _log_cpm(values: np.ndarray) -> np.ndarray:
    totals = values.sum(axis=1, keepdims=True)
    scaled: np.ndarray = np.log1p(values / np.where(totals > 0, totals, 1) * 1e6)
    return scaled


def _nested(
    values: np.ndarray, labels: np.ndarray, scale: Scale, n_folds: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Score each patient with a model whose scaling and parameters come from other patients."""
    scores, fold_of = np.empty(len(labels)), np.empty(len(labels), dtype=int)
    rows = []
    grid = {"svc__C": list(_C), "svc__gamma": [gamma / values.shape[1] for gamma in _GAMMA]}
    outer = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for fold, (train, test) in enumerate(outer.split(values, labels)):
        n_inner = min(n_folds, int(np.bincount(labels[train]).min()))
        inner = StratifiedKFold(max(2, n_inner), shuffle=True, random_state=seed)
        search = GridSearchCV(_pipeline(scale), grid, scoring="roc_auc", cv=inner).fit(values[train], labels[train])
        scores[test], fold_of[test] = search.decision_function(values[test]), fold
        auc = float(roc_auc_score(labels[test], scores[test]))
        best = search.best_params_
        rows.append((fold, auc, best["svc__C"], best["svc__gamma"], len(test), int(labels[test].sum())))
    return pd.DataFrame(rows, columns=["fold", "auc", "C", "gamma", "n_test", "n_positive"]), scores, fold_of


def _permuted(
    values: np.ndarray, labels: np.ndarray, scale: Scale, n_folds: int, n_permutations: int, seed: int, n_jobs: int
) -> np.ndarray:
    def one(permutation: int) -> float:
        shuffled = np.random.default_rng([seed, permutation]).permutation(labels)
        return float(_nested(values, shuffled, scale, n_folds, seed)[0]["auc"].mean())

    runs = Parallel(n_jobs=n_jobs, return_as="generator")(delayed(one)(index) for index in range(n_permutations))
    return np.array(list(tqdm(runs, total=n_permutations, desc="permutations", disable=not n_permutations)))


def _interval(labels: np.ndarray, scores: np.ndarray, fold_of: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap the mean AUC over folds, with patients drawn within fold and class."""
    random = np.random.default_rng(seed)
    total = np.zeros(_RESAMPLED)
    folds = np.unique(fold_of)
    for fold in folds:
        higher, lower = (scores[(fold_of == fold) & (labels == kind)] for kind in (1, 0))
        better = (higher[:, None] > lower) + 0.5 * (higher[:, None] == lower)
        drawn = [random.integers(len(scored), size=(_RESAMPLED, len(scored))) for scored in (higher, lower)]
        for repeat in range(_RESAMPLED):
            total[repeat] += better[np.ix_(drawn[0][repeat], drawn[1][repeat])].mean()
    low, high = np.quantile(total / len(folds), [0.025, 0.975])
    return float(low), float(high)
