"""Genes one by one against survival."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control

from stimage_sd.nn.cox import concordances, cox_regressions
from stimage_sd.tl._patients import Patients, groups_of, patients_of, survival_of


def cox_screen(
    table: AnnData,
    *,
    time: str,
    event: str,
    patient: str | None = None,
    by: str | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Fit a Cox regression of survival to every gene by itself.

    Parameters
    ----------
    table
        A cohort, slides x genes: predicted (`stimage_sd.tl.predict_cohort`) or measured.
    time, event
        Columns of ``obs``: time to event or censoring, positive; 1 where the event was seen, 0 where not.
    patient
        Column of ``obs`` with the patient: slides of one are averaged. By default every row is a patient.
    by
        Column of ``obs`` with groups, such as subtypes, which are screened one by one.
    genes
        Which genes; all by default.
    layer
        Which layer; ``X`` by default.

    Returns
    -------
    A row a group and gene, the least p-value first: ``group`` (``"all"`` without `by`), ``gene``, ``coef`` (log hazard
    ratio of one standard deviation of the gene), ``hazard_ratio`` with ``lower`` and ``upper`` (95 %), ``z``,
    ``p_value`` (Wald), ``q_value`` (Benjamini and Hochberg, within the group), ``c_index`` (of the fitted regression,
    on the patients it was fitted to), ``n_patients``, ``n_events``. Genes that are constant are NaN and come last.

    Raises
    ------
    KeyError
        If a column, gene or layer is not there.
    ValueError
        If an outcome is missing or not as expected, or a group has no event.

    Notes
    -----
    Paper, section 2.10. Efron's likelihood, as R's ``survival::coxph``; c-index as its ``concordance``: both are of
    the same patients, so that the best of many genes looks better than it is. `stimage_sd.tl.risk_groups` selects and
    tests on different patients.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, stimage_sd as sti
    >>> random = np.random.default_rng(0)
    >>> expression = random.normal(size=(80, 3)).astype("float32")
    >>> months = random.exponential(np.exp(-expression[:, 0]))
    >>> obs = pd.DataFrame({"months": months, "dead": 1}, index=[f"P{i}" for i in range(80)])
    >>> cohort = ad.AnnData(expression, obs, pd.DataFrame(index=["RISKY", "OTHER", "THIRD"]))
    >>> sti.tl.cox_screen(cohort, time="months", event="dead")["gene"].iloc[0]
    'RISKY'
    """
    columns = [time, event, *([by] if by is not None else [])]
    found = patients_of(table, columns, patient=patient, genes=genes, layer=layer)
    survival_of(found, time, event)
    parts = [_screen(found.of(rows), time, event, group) for group, rows in groups_of(found, by).items()]
    return pd.concat(parts, ignore_index=True)


def _screen(found: Patients, time: str, event: str, group: str) -> pd.DataFrame:
    try:
        times, events = survival_of(found, time, event)
    except ValueError as error:
        raise ValueError(f"Group {group!r}: {error}") from error
    deviation = found.values.std(axis=0, ddof=1) if len(times) > 1 else np.zeros(len(found.genes))
    fitted = cox_regressions(found.values / np.where(deviation > 0, deviation, 1), times, events)
    # the risk rises with the gene or falls with it
    c_index = concordances(found.values * np.where(fitted.coef < 0, -1, 1), times, events)
    known = np.isfinite(fitted.p_value)
    q_value = np.full(len(known), np.nan)
    if known.any():
        q_value[known] = false_discovery_control(fitted.p_value[known])
    with np.errstate(over="ignore"):  # of a gene that a few patients have, the interval has no end
        upper = np.exp(fitted.coef + 1.959964 * fitted.se)
    frame = pd.DataFrame(
        {
            "group": group,
            "gene": found.genes,
            "coef": fitted.coef,
            "hazard_ratio": np.exp(fitted.coef),
            "lower": np.exp(fitted.coef - 1.959964 * fitted.se),
            "upper": upper,
            "z": fitted.coef / fitted.se,
            "p_value": fitted.p_value,
            "q_value": q_value,
            "c_index": np.where(known, c_index, np.nan),
            "n_patients": len(times),
            "n_events": int(events.sum()),
        }
    )
    return frame.sort_values("p_value", kind="stable", na_position="last")
