"""Gene shifts: by how much a gene's share of all counts differs between sections and between patients.

The image does not tell how much of a gene a new patient makes. The log of a gene's share of all counts differs between
patients by a standard deviation of about one half. A shift is log-normal with mean 1 and multiplies the mean of a gene
on all tiles of a section. Its standard deviation per gene is learned from held-out sections and shrunk across genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
#: number of held-out patients or sections that weigh as much as the prior in the typical standard deviation
_PRIOR_WEIGHT = 4.0
#: number of genes with enough counts below which a cohort does not show how genes shift
_FEWEST_GENES = 2
#: number of parts of equal probability that a shift's distribution is divided into
N_STRATA = 5


class HeldOutSums(NamedTuple):
    """Sums over the held-out tiles of each section, ``float64 (n_sections, n_genes)``.

    Attributes
    ----------
    counts
        Sum of the counts.
    expected
        Sum of the predicted means, at the section's exposure.
    variance
        Sum of the predicted variances without shifts.
    """

    counts: np.ndarray
    expected: np.ndarray
    variance: np.ndarray

    def log_ratio(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the log of observed over expected, and the variance it has from counting alone."""
        return np.log((self.counts + 0.5) / (self.expected + 0.5)), self.variance / (self.expected + 0.5) ** 2


def prior_sd(n_patients: int, n_sections: int) -> tuple[float, float]:
    """Return the typical standard deviations of shifts for a model of some patients and sections.

    Parameters
    ----------
    n_patients
        Number of patients that the model was trained on.
    n_sections
        Mean number of training sections of a patient.

    Returns
    -------
    For another section of a training patient, and for another patient. The mean of the training sections is uncertain
    too, which adds one over their number to the variance.

    Examples
    --------
    >>> from stimage_sd.likelihood.shifts import prior_sd
    >>> section, patient = prior_sd(1, 4)
    >>> round(section, 2), round(patient, 2)
    (0.19, 0.69)
    """
    section = SECTION.sd * np.sqrt(1 + 1 / n_sections)
    return float(section), float(np.sqrt(PATIENT.sd**2 * (1 + 1 / n_patients) + SECTION.sd**2))


def learn_shifts(sums: HeldOutSums, patients: Sequence[str] | None) -> np.ndarray:
    """Learn the standard deviation of each gene's shift from sections that were held out.

    Parameters
    ----------
    sums
        Sums over held-out tiles. Where `patients` names several, all sections of a patient were held out together.
    patients
        Patient of each section, `None` if unknown.

    Returns
    -------
    ``float32 (2, n_genes)``: standard deviation of the log of the shift, for another section of a training patient,
    and for another patient. Without held-out sections of a kind, the prior stands in (`PATIENT`, `SECTION`).

    Notes
    -----
    Per gene, the variance is the mean squared log ratio of observed and expected counts, less what counting explains.
    It is shrunk towards the typical variance of all genes (empirical Bayes with a scaled inverse chi-square), which is
    itself shrunk towards the prior.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.likelihood.shifts import HeldOutSums, learn_shifts
    >>> counts = np.array([[200.0, 900.0], [50.0, 1100.0], [100.0, 1000.0]])
    >>> expected = np.tile([100.0, 1000.0], (3, 1))
    >>> section, patient = learn_shifts(HeldOutSums(counts, expected, expected), ["a", "b", "c"])
    >>> bool(patient[0] > patient[1])
    True
    """
    ratio, noise = sums.log_ratio()
    n_sections, n_genes = ratio.shape
    groups = _groups(patients, n_sections)
    typical = prior_sd(len(groups), max(1, round(n_sections / len(groups))))
    if len(groups) > 1:
        means = np.stack([ratio[rows].mean(axis=0) for rows in groups])
        of_means = np.stack([noise[rows].mean(axis=0) / len(rows) for rows in groups])
        other = _shrunken((means**2).mean(axis=0), of_means.mean(axis=0), len(groups), typical[1], PATIENT.df)
        spread = [((ratio[rows] - mean) ** 2).sum(axis=0) for rows, mean in zip(groups, means, strict=True)]
        counting = [(len(rows) - 1) * noise[rows].mean(axis=0) for rows in groups]
        df = n_sections - len(groups)
        # the mean of the training sections is uncertain too
        about, from_counting = (np.sum(parts, axis=0) / max(df, 1) * (1 + len(groups) / n_sections)
                                for parts in (spread, counting))  # fmt: skip
        same = _shrunken(about, from_counting, df, typical[0], SECTION.df)
    else:
        df = n_sections if n_sections > 1 else 0  # a part of the only section is no other section
        same = _shrunken((ratio**2).mean(axis=0), noise.mean(axis=0), df, typical[0], SECTION.df)
        other = np.full(n_genes, typical[1])
    return np.stack([same, np.maximum(other, same)]).astype(np.float32)


def _groups(patients: Sequence[str] | None, n_sections: int) -> list[np.ndarray]:
    """Return the rows of each patient, of all sections together if patients are unknown."""
    if patients is None:
        return [np.arange(n_sections)]
    return [np.flatnonzero(np.asarray(patients) == patient) for patient in dict.fromkeys(patients)]


def _shrunken(total: np.ndarray, noise: np.ndarray, df: int, prior: float, prior_df: float) -> np.ndarray:
    """Shrink variances of `df` degrees of freedom, noise of counting included, and return standard deviations."""
    informative = noise < prior**2
    if df == 0 or informative.sum() < _FEWEST_GENES:
        return np.full(len(total), prior)
    # the median gene, since a few genes differ much more than the others
    median = max(float(np.median((total - noise)[informative])), 0.0) / float(scipy.stats.f.median(df, prior_df))
    typical = (_PRIOR_WEIGHT * prior**2 + df * median) / (_PRIOR_WEIGHT + df)
    # the noise of counting leaves so many degrees of freedom, by the variance of the difference
    weight = df * (typical / (typical + noise)) ** 2
    return np.asarray(np.sqrt((prior_df * typical + weight * np.maximum(total - noise, 0)) / (prior_df + weight)))


def shift_of(shifts: np.ndarray, known: bool | None) -> np.ndarray:
    """Return the standard deviation of a gene's shift for one section, ``float64 (n_genes,)``.

    Parameters
    ----------
    shifts
        ``(2, n_genes)`` from `learn_shifts`.
    known
        Whether the model was trained on the section's patient. `None` if nobody knows: the variance is then the mean
        of both.
    """
    if known is None:
        return np.asarray(np.sqrt((np.asarray(shifts, np.float64) ** 2).mean(axis=0)))
    return np.asarray(shifts[0 if known else 1], np.float64)


def posterior(log_ratio: np.ndarray, noise: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Update log-normal shifts of mean 1 by observed log ratios.

    Parameters
    ----------
    log_ratio
        Log of observed over expected counts, ``(n_genes,)``.
    noise
        Variance of the log ratio from measuring, ``(n_genes,)``.
    sd
        Standard deviation of the log of the shift before.

    Returns
    -------
    Mean of the shift after, and the standard deviation of its log.

    Examples
    --------
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

    Parameters
    ----------
    sd
        Standard deviation of the log of the shift, ``(n_genes,)``.

    Returns
    -------
    Mean of each part, and its variance over its squared mean, each ``float64 (N_STRATA, n_genes)``. Together they have
    mean 1 and variance ``exp(sd²) - 1``.

    Examples
    --------
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


def spot_sd(totals: HeldOutSums, sections: np.ndarray) -> float:
    """Return the standard deviation of the log of what all genes of a spot share, given the image.

    Parameters
    ----------
    totals
        Sums over genes instead of tiles: observed, expected and variance if genes were independent, ``(n_tiles,)``.
    sections
        Section of each tile. What all tiles of a section share is its exposure and is left out.
    """
    ratio, noise = totals.log_ratio()
    names, of_tile = np.unique(sections, return_inverse=True)
    means = np.bincount(of_tile, ratio) / np.bincount(of_tile)
    free = max(len(ratio) - len(names), 1)
    return float(np.sqrt(max(((ratio - means[of_tile]) ** 2).sum() / free - noise.mean(), 0.0)))


def patients_of(sections: Sequence[str], patients: Mapping[str, str]) -> list[str] | None:
    """Return the patient of each section, or `None` if one is unknown."""
    return [patients[name] for name in sections] if all(name in patients for name in sections) else None
