"""Patients of high and low risk, by a few genes that are chosen, and weighed, on other patients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.model_selection import StratifiedKFold
from tqdm.auto import tqdm

from stimage_sd.nn.cox import concordances, cox_regressions
from stimage_sd.tl._patients import Patients, groups_of, patients_of, survival_of


class RiskGroups(NamedTuple):
    """What `risk_groups` found.

    Attributes
    ----------
    folds
        A row a group, repeat and fold: ``group``, ``repeat``, ``fold``, ``c_index`` on the patients that were left
        out, ``n_test``, ``n_events``, ``genes`` (those that were chosen, joined by commas).
    patients
        A row a patient: ``group``, ``patient``, ``time``, ``event``, ``risk`` (mean over repeats of the log hazard by
        models that did not see the patient), ``risk_group`` (``"high"`` above the median of its group, else ``"low"``).
    summary
        A row a group: ``group``, ``n_patients``, ``n_events``, ``c_index`` (mean over folds and repeats), ``lower``,
        ``upper`` (2.5th and 97.5th percentile over repeats), ``c_index_of_risk`` (of the mean risk), ``log_rank_p``
        between the risk groups, ``hazard_ratio`` of high against low.
    genes
        A row a group and gene: ``group``, ``gene``, ``share`` of the folds that chose it.
    """

    folds: pd.DataFrame
    patients: pd.DataFrame
    summary: pd.DataFrame
    genes: pd.DataFrame


def risk_groups(
    table: AnnData,
    *,
    time: str,
    event: str,
    patient: str | None = None,
    by: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    n_genes: int = 5,
    n_folds: int = 3,
    n_repeats: int = 100,
    penalizer: float = 0.1,
    seed: int = 0,
) -> RiskGroups:
    """Split patients by their risk, predicted by Cox models of a few genes that never saw them.

    In every fold the genes are standardised, screened one by one and chosen by their c-index on the training patients
    alone, and a Cox model of the chosen ones, with a ridge penalty, is fitted to them; those left out are scored.

    Parameters
    ----------
    table, time, event, patient, by, genes, layer
        As in `stimage_sd.tl.cox_screen`. Folds split patients, never slides.
    n_genes
        How many genes a model has.
    n_folds, n_repeats
        Folds, stratified by event, and how often patients are split anew.
    penalizer
        Strength of the ridge penalty, as lifelines' ``CoxPHFitter(penalizer=..., l1_ratio=0)``, on standardised genes.
    seed
        Seed of the splits.

    Returns
    -------
    Folds, patients, a summary and the chosen genes.

    Raises
    ------
    KeyError
        If a column, gene or layer is not there.
    ValueError
        If an outcome is missing or not as expected, there are fewer genes than a model takes, or a group has fewer
        events than folds.

    Notes
    -----
    Paper, section 2.10: top five genes by c-index, 3-fold cross-validation, 100 repeats, risks split at their median.
    The paper chose the genes on all patients; that sees the test folds, and is not done here. The log-rank test takes
    the risk groups as given: risks of a cross-validation depend on each other, and its p-value is a little too small.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, stimage_sd as sti
    >>> random = np.random.default_rng(0)
    >>> expression = random.normal(size=(90, 6)).astype("float32")
    >>> months = random.exponential(np.exp(-2 * expression[:, 0]))
    >>> obs = pd.DataFrame({"months": months, "dead": 1}, index=[f"P{i}" for i in range(90)])
    >>> cohort = ad.AnnData(expression, obs, pd.DataFrame(index=[f"G{i}" for i in range(6)]))
    >>> found = sti.tl.risk_groups(cohort, time="months", event="dead", n_genes=2, n_repeats=2)
    >>> bool(found.summary["c_index"].iloc[0] > 0.75)
    True
    """
    for name, value, least in (("n_genes", n_genes, 1), ("n_folds", n_folds, 2), ("n_repeats", n_repeats, 1)):
        if value < least:
            raise ValueError(f"Expected `{name}` of at least {least}, found {value}.")
    columns = [time, event, *([by] if by is not None else [])]
    found = patients_of(table, columns, patient=patient, genes=genes, layer=layer)
    survival_of(found, time, event)
    if len(found.genes) < n_genes:
        raise ValueError(f"Expected at least {n_genes} genes, as many as a model takes, found {len(found.genes)}.")
    parts = []
    for group, rows in groups_of(found, by).items():
        members = found.of(rows)
        n_events = int(members.obs[event].astype(bool).sum())
        if n_events < n_folds or n_events > len(members.names):
            raise ValueError(
                f"Group {group!r} has {n_events} events, fewer than the {n_folds} folds. Leave it out, or take fewer."
            )
        parts.append(_of_group(members, time, event, group, n_genes, n_folds, n_repeats, penalizer, seed))
    return RiskGroups(*(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)))


def _of_group(
    found: Patients,
    time: str,
    event: str,
    group: str,
    n_genes: int,
    n_folds: int,
    n_repeats: int,
    penalizer: float,
    seed: int,
) -> RiskGroups:
    times, events = survival_of(found, time, event)
    risks = np.zeros((n_repeats, len(times)))
    folds = []
    bar = tqdm(total=n_repeats * n_folds, desc=f"{group}: risk", unit="fold")
    for repeat, fold, train, test in _splits(events, n_folds, n_repeats, seed):
        chosen, risk = _fit_and_score(found.values, times, events, train, test, n_genes, penalizer)
        risks[repeat, test] = risk
        c_index = np.nan
        if events[test].any():
            c_index = float(concordances(risk[:, None], times[test], events[test])[0])
        folds.append((group, repeat, fold, c_index, len(test), int(events[test].sum()), chosen))
        bar.update()
    bar.close()
    names = ["group", "repeat", "fold", "c_index", "n_test", "n_events", "chosen"]
    frame = pd.DataFrame(folds, columns=names)
    shares = pd.Series(np.concatenate(frame["chosen"].to_list())).value_counts() / len(frame)
    frame["genes"] = [",".join(map(str, found.genes[numbers])) for numbers in frame.pop("chosen")]
    patients = _patients(found, times, events, risks.mean(axis=0), group)
    chosen_genes = pd.DataFrame({"group": group, "gene": found.genes[shares.index], "share": shares.to_numpy()})
    return RiskGroups(frame, patients, _summary(frame, patients, group), chosen_genes)


def _splits(
    events: np.ndarray, n_folds: int, n_repeats: int, seed: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    for repeat in range(n_repeats):
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=np.random.RandomState([seed, repeat]))
        for fold, (train, test) in enumerate(folds.split(np.zeros(len(events)), events)):
            yield repeat, fold, train, test


def _fit_and_score(
    values: np.ndarray,
    times: np.ndarray,
    events: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    n_genes: int,
    penalizer: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose genes and fit on some patients; give the genes' numbers and the log hazards of the others."""
    seen = values[train]
    mean, deviation = seen.mean(axis=0), seen.std(axis=0)
    seen = (seen - mean) / np.where(deviation > 0, deviation, 1)
    screened = cox_regressions(seen, times[train], events[train])
    c_index = concordances(seen * np.where(screened.coef < 0, -1, 1), times[train], events[train])
    chosen = np.argsort(-np.where(np.isfinite(screened.coef), c_index, -1), kind="stable")[:n_genes]
    weights = _ridge_cox(seen[:, chosen], times[train], events[train], penalizer)
    left_out = (values[test][:, chosen] - mean[chosen]) / np.where(deviation[chosen] > 0, deviation[chosen], 1)
    return chosen, left_out @ weights


def _ridge_cox(values: np.ndarray, times: np.ndarray, events: np.ndarray, penalizer: float) -> np.ndarray:
    from lifelines import CoxPHFitter

    frame = pd.DataFrame(values).assign(time=times, event=events)
    with warnings.catch_warnings():
        # lifelines looks for values that separate events, which the penalty takes care of
        warnings.simplefilter("ignore")
        fitted = CoxPHFitter(penalizer=penalizer, l1_ratio=0.0).fit(
            frame, "time", "event", fit_options={"precision": 1e-9}
        )
    weights: np.ndarray = fitted.params_.to_numpy()
    return weights


def _patients(found: Patients, times: np.ndarray, events: np.ndarray, risk: np.ndarray, group: str) -> pd.DataFrame:
    high = np.where(risk > np.median(risk), "high", "low")
    return pd.DataFrame(
        {"group": group, "patient": found.names, "time": times, "event": events, "risk": risk, "risk_group": high}
    )


def _summary(folds: pd.DataFrame, patients: pd.DataFrame, group: str) -> pd.DataFrame:
    from lifelines.statistics import logrank_test

    high = (patients["risk_group"] == "high").to_numpy()
    times, events = patients["time"].to_numpy(), patients["event"].to_numpy()
    test = logrank_test(times[high], times[~high], events[high], events[~high])
    ratio = cox_regressions(high[:, None].astype(float), times, events)
    repeats = folds.groupby("repeat")["c_index"].mean()
    return pd.DataFrame(
        {
            "group": [group],
            "n_patients": len(patients),
            "n_events": int(events.sum()),
            "c_index": folds["c_index"].mean(),
            "lower": repeats.quantile(0.025),
            "upper": repeats.quantile(0.975),
            "c_index_of_risk": concordances(patients[["risk"]].to_numpy(), times, events)[0],
            "log_rank_p": test.p_value,
            "hazard_ratio": np.exp(ratio.coef[0]),
        }
    )
