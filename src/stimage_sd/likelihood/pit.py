"""Probability integral transform: where counts lie in their predicted distributions."""

from __future__ import annotations

import numpy as np

from stimage_sd.likelihood import negative_binomial, predictive

#: counts per block of predictive distributions with shifts
_BLOCK = 200_000
#: bins of the histogram
N_BINS = 10


def cumulative(
    counts: np.ndarray, mean: np.ndarray, variance: np.ndarray, shift_sd: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted probabilities of at most a count, and of less.

    - `counts`, `mean`, `variance`: arrays of one shape. Without shifts, a variance not above the mean gives the Poisson
      distribution.
    - `shift_sd`: standard deviation of the log of each gene's shift, `None` without shifts.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.pit import cumulative
    >>> upto, below = cumulative(np.array([0.0, 1.0]), np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    >>> upto.tolist(), below.tolist()
    ([0.5, 0.75], [0.0, 0.5])
    """
    if shift_sd is not None:
        # block by block, as a shift takes several negative binomials
        parts = np.array_split(np.arange(len(counts)), max(1, counts.size // _BLOCK))
        blocks = [(counts[rows], mean[rows], variance[rows], shift_sd) for rows in parts]
        upto = np.concatenate([predictive.cdf(*block) for block in blocks])
        return upto, np.concatenate([predictive.cdf(block[0] - 1, *block[1:]) for block in blocks])
    excess = np.maximum(variance - mean, 1e-6 * mean)
    r, p = mean**2 / excess, mean / (mean + excess)
    upto, below = (np.asarray(negative_binomial.cdf(values, r=r, p=p)) for values in (counts, counts - 1))
    return upto, below


def coverage(upto: np.ndarray, below: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the fraction of counts inside central intervals.

    - `upto`, `below`: predicted probability of at most the count, and of less.
    - `levels`: nominal coverage between 0 and 1, ``(n_levels,)``.
    - returns: two fractions per level. The first is the fraction of counts from the lower to the upper quantile, both
      included. In the second, a count at either end counts by the part of its probability inside the interval. The
      second fraction equals the level if the distributions are correct.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.pit import coverage
    >>> whole, part = coverage(np.array([0.5, 0.75]), np.array([0.0, 0.5]), np.array([0.5]))
    >>> whole.tolist(), part.tolist()
    ([1.0], [0.75])
    """
    width = np.maximum(upto - below, 1e-12)
    whole, part = [], []
    for level in levels:
        low, high = (1 - level) / 2, (1 + level) / 2
        # a count is at or above the lower quantile if its cumulative probability reaches `low`, and at or below the
        # upper quantile if the cumulative probability of the next lower count is below `high`
        whole.append(((upto >= low) & (below < high)).mean())
        part.append((np.clip(np.minimum(upto, high) - np.maximum(below, low), 0, None) / width).mean())
    return np.array(whole), np.array(part)


def pit_histogram(upto: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the density of the probability integral transform in ten bins, ``(10,)``, with mean 1.

    A count spreads its weight evenly from the probability of less to the probability of at most the count, which is
    the expectation over randomized transforms (Czado, Gneiting and Held 2009).

    >>> import numpy as np
    >>> from stimage_sd.likelihood.pit import pit_histogram
    >>> pit_histogram(np.array([0.5, 1.0]), np.array([0.0, 0.5])).round(6).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    edges = np.linspace(0, 1, N_BINS + 1)
    width = np.maximum(upto - below, 1e-12)
    reached = np.array([np.clip((edge - below) / width, 0, 1).mean() for edge in edges])
    return np.asarray(np.diff(reached) * N_BINS)
