"""Gene shifts: by how much a gene's share of all counts differs between sections and between patients.

The image does not tell how much of a gene a new patient makes. The log of a gene's share of all counts differs between
patients by a standard deviation of about one half. A shift is log-normal with mean 1 and multiplies the mean of a gene
on all tiles of a section. Fits learn its standard deviation per gene from held-out sections.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats


class Prior(NamedTuple):
    """Distribution of the standard deviations of genes: scale and degrees of freedom of a scaled inverse chi-square."""

    sd: float
    df: float


#: measured on the 1,000 most expressed genes in the counts of 28 sections of seven patients (her2st, Andersson et al.
#: 2021): standard deviation of the log of a gene's share between patients, and between sections of a patient
PATIENT, SECTION = Prior(0.47, 3.5), Prior(0.17, 7.4)
#: number of parts of equal probability that a shift's distribution is divided into
N_STRATA = 5


def shift_of(shifts: np.ndarray, known: bool | None) -> np.ndarray:
    """Return the standard deviation of a gene's shift for one section, ``float64 (n_genes,)``.

    - `shifts`: ``(2, n_genes)`` from `learn_shifts`.
    - `known`: whether the model was trained on the section's patient. `None` if nobody knows: the variance is then the
      mean of both.
    """
    if known is None:
        return np.asarray(np.sqrt((np.asarray(shifts, np.float64) ** 2).mean(axis=0)))
    return np.asarray(shifts[0 if known else 1], np.float64)


def posterior(log_ratio: np.ndarray, noise: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Update log-normal shifts of mean 1 by observed log ratios.

    - `log_ratio`: log of observed over expected counts, ``(n_genes,)``.
    - `noise`: variance of the log ratio from measuring, ``(n_genes,)``.
    - `sd`: standard deviation of the log of the shift before.
    - returns: mean of the shift after, and the standard deviation of its log.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.shifts import posterior
    >>> mean, sd = posterior(np.log([2.0, 2.0]), np.array([1e-9, 1e9]), np.array([0.5, 0.5]))
    >>> mean.round(3).tolist(), sd.round(3).tolist()
    ([2.0, 1.0], [0.0, 0.5])
    """
    before = np.maximum(np.asarray(sd, np.float64), 1e-6) ** 2
    after = 1 / (1 / before + 1 / noise)
    # a shift of mean 1 has a log of mean -sd²/2
    return np.exp(after * (log_ratio / noise - 0.5) + after / 2), np.sqrt(after)


def strata(sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the shifts of each gene into parts of equal probability.

    - `sd`: standard deviation of the log of the shift, ``(n_genes,)``.
    - returns: mean of each part, and its variance over its squared mean, each ``float64 (N_STRATA, n_genes)``. Together
      they have mean 1 and variance ``exp(sd²) - 1``.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.shifts import strata
    >>> means, variances = strata(np.array([0.5]))
    >>> round(float(means.mean()), 6), round(float((means**2 * (1 + variances)).mean()), 6)
    (1.0, 1.284025)
    """
    sd = np.asarray(sd, dtype=np.float64)
    edges = scipy.stats.norm.ppf(np.linspace(0, 1, N_STRATA + 1))[:, None]
    # moments of a log-normal between quantiles are those of a normal distribution moved by the power times sd
    first, second = (
        N_STRATA * np.diff(scipy.stats.norm.cdf(edges - power * sd), axis=0) * np.exp(power * (power - 1) / 2 * sd**2)
        for power in (1, 2)
    )
    return first, np.maximum(second / first**2 - 1, 0)
