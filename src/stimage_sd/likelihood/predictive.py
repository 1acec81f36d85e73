"""Distribution of a count in a section that nobody has measured: an ensemble at a depth, with the gene's shift.

The distribution is a function of three numbers: the mean, the total variance, and the standard deviation of the log of
the gene's shift. The ensemble is first replaced by the negative binomial with its mean and variance. The shift is then
divided into parts of equal probability, each a negative binomial with that part's mean and variance. So the mixture has
the mean and variance of the whole exactly.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import scipy.special

from stimage_sd._settings import n_threads
from stimage_sd.likelihood.intervals import mixture_quantile
from stimage_sd.likelihood.shifts import N_STRATA, strata

#: smallest inverse of r: the variance is then the mean to eight digits
_LEAST = 1e-8
#: values per thread and step, so that their logarithms stay in the cache
_PART = 1 << 16


class Predictive(NamedTuple):
    """Distribution per tile and gene.

    - `mean`: mean, ``(n_tiles, n_genes)``.
    - `aleatoric`: variance that measuring the patient would not remove.
    - `epistemic`: variance of the members' means and of the shift.
    - `shift`: the part of `epistemic` that comes from the shift.
    - `sd`: standard deviation of the log of the shift, ``(n_genes,)``.
    """

    mean: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray
    shift: np.ndarray
    sd: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Total variance."""
        return np.asarray(self.aleatoric + self.epistemic)


def predictive(moments: MixtureMoments, sd: np.ndarray, *, exposure: float | np.ndarray = 1.0) -> Predictive:
    """Return the distribution of counts at a depth, with a shift per gene.

    - `moments`: moments of the ensemble at an exposure of 1, ``(n_tiles, n_genes)``.
    - `sd`: standard deviation of the log of the shift, ``(n_genes,)``.
    - `exposure`: depth of the section relative to an exposure of 1. Or of every gene, ``(n_genes,)``.
    - returns: the distribution, in double precision. Exposure multiplies means and keeps r. The shift S has mean 1 and
      variance v = exp(sd²) − 1, so the variance is that of S μ plus the mean of S μ + S² μ² / r.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.predictive import MixtureMoments
    >>> from stimage_sd.likelihood.predictive import predictive
    >>> made = predictive(MixtureMoments(*np.array([[[4.0]], [[8.0]], [[1.0]]])), np.array([0.0]), exposure=0.5)
    >>> [float(part[0, 0]) for part in (made.mean, made.aleatoric, made.epistemic, made.shift)]
    [2.0, 3.0, 0.25, 0.0]
    """
    mean, aleatoric, epistemic = (np.asarray(part, np.float64) for part in moments)
    excess = (aleatoric - mean) * exposure**2
    mean, epistemic = mean * exposure, epistemic * exposure**2
    extra = np.expm1(np.asarray(sd, np.float64) ** 2)
    shift = extra * (mean**2 + epistemic)
    return Predictive(mean, mean + (1 + extra) * excess, epistemic + shift, shift, np.asarray(sd, np.float64))


def components(mean: np.ndarray, variance: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mixture of negative binomials, of equal weight, with a mean, a variance and a shift.

    - `mean`, `variance`: mean and total variance, ``(n_tiles, n_genes)``.
    - `sd`: standard deviation of the log of the shift, ``(n_genes,)``.
    - returns: r and p, each ``float64 (N_STRATA, n_tiles, n_genes)``.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.predictive import components
    >>> r, p = components(np.array([[4.0]]), np.array([[12.0]]), np.array([0.3]))
    >>> means = r * (1 - p) / p
    >>> round(float(means.mean()), 6), round(float((means / p + means**2).mean() - means.mean() ** 2), 6)
    (4.0, 12.0)
    """
    means, spread = strata(sd)
    mean, without = _without_shift(mean, variance, sd)
    inverse = np.maximum((1 + without) * (1 + spread[:, None]) - 1, _LEAST)
    scaled = mean * means[:, None]
    return 1 / inverse, 1 / (1 + scaled * inverse)


def _without_shift(mean: np.ndarray, variance: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean, and one over r of the ensemble before its shift."""
    mean = np.maximum(np.asarray(mean, np.float64), 1e-12)
    relative = np.maximum(np.asarray(variance, np.float64) - mean, 0) / mean**2
    return mean, np.maximum((1 + relative) * np.exp(-(np.asarray(sd, np.float64) ** 2)) - 1, _LEAST)


def cdf(counts: np.ndarray, mean: np.ndarray, variance: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the probability of at most a count, ``float64 (n_tiles, n_genes)``; 0 below a count of 0."""
    r, p = components(mean, variance, sd)
    counts = np.asarray(counts, np.float64)
    upto = scipy.special.betainc(r, np.maximum(counts, 0) + 1, p).mean(axis=0)
    return np.where(counts < 0, 0.0, upto)


def log_prob(counts: np.ndarray, mean: np.ndarray, variance: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the log of the probability of counts, ``float64 (n_tiles, n_genes)``."""
    terms = log_pmf(counts, *components(mean, variance, sd))
    return np.asarray(scipy.special.logsumexp(terms, axis=0) - np.log(N_STRATA))


def log_pmf(counts: np.ndarray, r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the log of the probability of counts under NB(r, p), in double precision and without JAX.

    >>> round(float(log_pmf(np.array(3), np.array(2.0), np.array(0.5))), 4)
    -2.0794
    """
    counts, r, p = (np.asarray(values, np.float64) for values in (counts, r, p))
    return np.asarray(
        scipy.special.gammaln(counts + r)
        - scipy.special.gammaln(r)
        - scipy.special.gammaln(counts + 1)
        + r * np.log(p)
        + scipy.special.xlog1py(counts, -p)
    )


def nearest_interval(
    mean: np.ndarray, variance: np.ndarray, sd: np.ndarray, *, coverage: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the interval of whole counts whose probability is nearest to a coverage.

    - `mean`, `variance`: mean and total variance, ``(n_tiles, n_genes)``.
    - `sd`: standard deviation of the log of the shift, ``(n_genes,)``.
    - `coverage`: wanted probability, in (0, 1).
    - returns: lower and upper bound, whole numbers in ``float32 (n_tiles, n_genes)``. Both belong to the interval. The
      probability below it is as near as possible to ``(1 - coverage) / 2``, and the probability of the interval is then
      as near as possible to `coverage`.

    An interval from the 5 % to the 95 % quantile contains at least 90 %. Where counts are low it contains 97 % and
    more, and what it contains changes with depth. The nearest interval contains less than `coverage` about as often as
    more, so that coverage over all genes is near `coverage` at every depth. A count of 0 that is likelier than
    `coverage` is still contained.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.predictive import nearest_interval
    >>> lower, upper = nearest_interval(np.array([[4.0]]), np.array([[12.0]]), np.array([0.3]))
    >>> float(lower[0, 0]), float(upper[0, 0])
    (0.0, 8.0)
    """
    if not 0 < coverage < 1:
        raise ValueError(f"Expected `coverage` to lie between 0 and 1, found {coverage}.")
    centers, without = _without_shift(mean, variance, sd)
    means, spread = strata(np.broadcast_to(np.asarray(sd, np.float64), centers.shape[1:]))
    bounds = np.empty((2, *centers.shape), dtype=np.float32)
    kernel, workers = _nearest_kernel(), min(8, n_threads())
    step = max(1, _PART // max(1, means.size))

    def part(start: int) -> None:
        rows = slice(start, start + step)
        inverse = (1 + without[rows]) * (1 + spread[:, None]) - 1
        ratio = centers[rows] * means[:, None]
        ratio *= inverse
        log_zero = np.log1p(ratio)
        log_zero /= -inverse
        kernel(inverse, ratio, log_zero, np.exp(log_zero), coverage, bounds[:, rows])

    with ThreadPoolExecutor(workers) as pool:
        for run in [pool.submit(part, start) for start in range(0, len(centers), step)]:
            run.result()
    tiles, genes = np.nonzero(np.isnan(bounds[1]))
    if tiles.size:
        at = np.asarray(mean)[tiles, genes][None], np.asarray(variance)[tiles, genes][None], np.asarray(sd)[genes]
        r, p = (array[:, 0] for array in components(*at))
        share = np.full(N_STRATA, 1 / N_STRATA)
        for bound, probability in enumerate(((1 - coverage) / 2, (1 + coverage) / 2)):
            bounds[bound, tiles, genes] = mixture_quantile(r, p, share, probability)
    return bounds[0], bounds[1]


@cache
def _nearest_kernel() -> Any:
    """Compile the recurrence on first use, because numba is slow to import."""
    import numba

    largest_count, smallest_log, n_strata = 10_000, -700.0, N_STRATA

    @numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
    def run(  # pragma: no cover
        inverse: Any, ratio: Any, log_zero: Any, zero: Any, coverage: float, bounds: Any
    ) -> None:
        term, slope, offset = np.empty(n_strata), np.empty(n_strata), np.empty(n_strata)
        tail = (1.0 - coverage) / 2.0
        for tile in range(bounds.shape[1]):
            for gene in range(bounds.shape[2]):
                reachable: Any = True
                for part in range(n_strata):
                    reachable &= log_zero[part, tile, gene] > smallest_log
                    term[part] = zero[part, tile, gene] / n_strata
                    # P(k) = P(k - 1) (k + r - 1) q / k = P(k - 1) (slope + offset / k)
                    slope[part] = ratio[part, tile, gene] / (1.0 + ratio[part, tile, gene])
                    offset[part] = (1.0 / inverse[part, tile, gene] - 1.0) * slope[part]
                below, total, count, lower, upper, left_out = 0.0, term.sum(), 0, -1, -1, 0.0
                while reachable and upper < 0:
                    if lower < 0 and total >= tail:
                        beyond = total - tail < tail - below
                        lower, left_out = (count + 1, total) if beyond else (count, below)
                    if lower >= 0 and total >= coverage + left_out:
                        before = coverage + left_out - below < total - coverage - left_out
                        upper = max(count - 1 if before else count, lower)
                    count += 1
                    inverse_count = 1.0 / count
                    below = total
                    for part in range(n_strata):
                        term[part] *= slope[part] + offset[part] * inverse_count
                    total += term.sum()
                    reachable = count < largest_count
                bounds[0, tile, gene] = lower if upper >= 0 else np.nan
                bounds[1, tile, gene] = upper if upper >= 0 else np.nan

    return run


#: cells per block, for which the means of all members are held
_WIDTH = 128
#: number of values below which threads do not pay off
_FEW = 1 << 16


class MixtureMoments(NamedTuple):
    """Moments of a mixture, each ``float32`` of the shape of one member.

    - `mean`: mean of the members' means.
    - `aleatoric`: mean of the members' variances.
    - `epistemic`: variance of the members' means.
    """

    mean: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray


def mixture_moments(r: np.ndarray, p: np.ndarray, *, weights: np.ndarray) -> MixtureMoments:
    """Compute the moments of the mixture of the members' negative binomials.

    - `r`: number of successes, positive, ``float32 (n_members, ...)``.
    - `p`: probability of success, in (0, 1]; same shape as `r`.
    - `weights`: weight per member, ``(n_members,)``, with sum 1.
    - returns: the moments, computed in double precision.

    Equation 7 of the paper, with variances on both sides.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.predictive import mixture_moments
    >>> r, p = np.array([[2.0], [6.0]], np.float32), np.array([[0.5], [0.5]], np.float32)
    >>> [float(moment[0]) for moment in mixture_moments(r, p, weights=np.array([0.5, 0.5]))]
    [4.0, 8.0, 4.0]
    """
    shape = r.shape[1:]
    successes, probability = r.reshape(len(r), -1), p.reshape(len(p), -1)
    result = np.empty((3, successes.shape[1]), dtype=np.float32)
    share = np.asarray(weights, dtype=np.float64)
    workers = min(8, n_threads()) if successes.size > _FEW else 1
    edges = np.linspace(0, result.shape[1], workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        for run in [pool.submit(_moments, successes[:, i], probability[:, i], share, result[:, i]) for i in parts]:
            run.result()
    return MixtureMoments(*(moment.reshape(shape) for moment in result))


@numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _moments(r: np.ndarray, p: np.ndarray, share: np.ndarray, found: np.ndarray) -> None:  # pragma: no cover
    n_members, n_cells = r.shape
    means = np.empty((n_members, _WIDTH))
    for start in range(0, n_cells, _WIDTH):
        width = min(_WIDTH, n_cells - start)
        mean, aleatoric, epistemic = np.zeros(width), np.zeros(width), np.zeros(width)
        for member in range(n_members):
            for cell in range(width):
                inverse = 1.0 / np.float64(p[member, start + cell])
                own = np.float64(r[member, start + cell]) * (inverse - 1.0)
                means[member, cell] = own
                mean[cell] += share[member] * own
                aleatoric[cell] += share[member] * own * inverse
        for member in range(n_members):
            for cell in range(width):
                away = means[member, cell] - mean[cell]
                epistemic[cell] += share[member] * away * away
        for cell in range(width):
            found[0, start + cell] = mean[cell]
            found[1, start + cell] = aleatoric[cell]
            found[2, start + cell] = epistemic[cell]
