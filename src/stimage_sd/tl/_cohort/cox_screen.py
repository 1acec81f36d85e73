"""Cox regression of survival on one gene at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control

from stimage_sd.stats.cox import concordances, cox_regressions, varying
from stimage_sd.tl._cohort.patients import Patients, groups_of, patients_of, survival_of


def cox_screen(
    data: AnnData,
    *,
    time_key: str,
    event_key: str,
    by: str | None = None,
    genes: Sequence[str] | None = None,
    patient_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Fit a Cox regression of survival on each gene separately.

    Parameters
    ----------
    data
        A cohort, slides x genes, predicted (`stimage_sd.tl.predict_cohort`) or measured.
    time_key, event_key
        Columns of ``obs``. `time_key` holds the positive time to event or censoring. `event_key` holds 1 for an
        observed event and 0 for censoring.
    by
        Column of ``obs`` with groups, such as subtypes, that are screened separately.
    genes
        Genes to screen. Default: all genes.
    patient_key
        Column of ``obs`` with the patient. Slides of a patient are averaged. By default every row is a patient.
    layer
        Layer of the values. Default: ``X``.

    Returns
    -------
    One row per group and gene, sorted within the group by p-value: ``group`` (``"all"`` without `by`), ``gene``,
    ``coef`` (log hazard ratio per standard deviation of the gene), ``hazard_ratio`` with ``lower`` and ``upper``
    (95 % interval), ``z``, ``p_value``, ``q_value`` (Benjamini and Hochberg, within the group), ``c_index`` (on the
    training patients), ``firth``, ``n_patients``, ``n_events``. Constant genes get NaN and come last.

    A gene that orders the patients perfectly has no finite hazard ratio in Cox's partial likelihood. With few events
    there are many such genes. Such genes have ``firth`` `True`. Then ``coef`` is Firth's penalized estimate, and ``z``,
    ``p_value`` and the interval are from the penalized likelihood ratio. For all other genes these are Wald's.

    Raises
    ------
    KeyError
        If a column, gene or layer is missing.
    ValueError
        If an outcome is missing or not as expected, or a group has no event.

    Notes
    -----
    Paper, section 2.10. The likelihood is Efron's, as in R's ``survival::coxph``, and the c-index is as in R's
    ``concordance``. Fit and c-index use the same patients, so the best of many genes looks too good.
    `stimage_sd.tl.risk_groups` selects and tests on different patients. Firth's penalty after Heinze and Schemper 2001.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, stimage_sd as sti
    >>> random = np.random.default_rng(0)
    >>> expression = random.normal(size=(80, 3)).astype("float32")
    >>> months = random.exponential(np.exp(-expression[:, 0]))
    >>> obs = pd.DataFrame({"months": months, "dead": 1}, index=[f"P{i}" for i in range(80)])
    >>> cohort = ad.AnnData(expression, obs, pd.DataFrame(index=["RISKY", "OTHER", "THIRD"]))
    >>> sti.tl.cox_screen(cohort, time_key="months", event_key="dead")["gene"].iloc[0]
    'RISKY'
    """
    columns = [time_key, event_key, *([by] if by is not None else [])]
    patients = patients_of(data, columns, patient=patient_key, genes=genes, layer=layer)
    survival_of(patients, time_key, event_key)
    parts = [_screen(patients.of(rows), time_key, event_key, group) for group, rows in groups_of(patients, by).items()]
    return pd.concat(parts, ignore_index=True)


def _screen(patients: Patients, time: str, event: str, group: str) -> pd.DataFrame:
    try:
        times, events = survival_of(patients, time, event)
    except ValueError as error:
        raise ValueError(f"Group {group!r}: {error}") from error
    varies = varying(patients.values)
    deviation = patients.values.std(axis=0, ddof=1 if len(times) > 1 else 0)
    fitted = cox_regressions(patients.values / np.where(varies, deviation, 1), times, events)
    # the sign of the coefficient gives the direction of the risk
    c_index = concordances(patients.values * np.where(fitted.coef < 0, -1, 1), times, events)
    known = np.isfinite(fitted.p_value)
    q_value = np.full(len(known), np.nan)
    if known.any():
        q_value[known] = false_discovery_control(fitted.p_value[known])
    with np.errstate(over="ignore"):  # the upper bound is infinite for genes of few patients
        upper = np.exp(fitted.upper)
    frame = pd.DataFrame(
        {
            "group": group,
            "gene": patients.genes,
            "coef": fitted.coef,
            "hazard_ratio": np.exp(fitted.coef),
            "lower": np.exp(fitted.lower),
            "upper": upper,
            "z": fitted.z,
            "p_value": fitted.p_value,
            "q_value": q_value,
            "c_index": np.where(known, c_index, np.nan),
            "firth": fitted.firth,
            "n_patients": len(times),
            "n_events": int(events.sum()),
        }
    )
    return frame.sort_values("p_value", kind="stable", na_position="last")
