"""Moments of ensembles: mean, aleatoric and epistemic variance of negative binomial mixtures in one pass."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np

from stimage_sd._settings import n_threads

#: cells per block, for which the means of all members are held
_WIDTH = 128
#: number of values below which threads do not pay off
_FEW = 1 << 16


class MixtureMoments(NamedTuple):
    """Moments of a mixture, each ``float32`` of the shape of one member.

    Attributes
    ----------
    mean
        Mean of the members' means.
    aleatoric
        Mean of the members' variances.
    epistemic
        Variance of the members' means.
    """

    mean: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray


def mixture_moments(r: np.ndarray, p: np.ndarray, *, weights: np.ndarray) -> MixtureMoments:
    """Compute the moments of the mixture of the members' negative binomials.

    Parameters
    ----------
    r
        Number of successes, positive, ``float32 (n_members, ...)``.
    p
        Probability of success, in (0, 1]; same shape as `r`.
    weights
        Weight per member, ``(n_members,)``, with sum 1.

    Returns
    -------
    The moments, computed in double precision.

    Notes
    -----
    Equation 7 of the paper, with variances on both sides.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.likelihood.mixture_moments import mixture_moments
    >>> r, p = np.array([[2.0], [6.0]], np.float32), np.array([[0.5], [0.5]], np.float32)
    >>> [float(moment[0]) for moment in mixture_moments(r, p, weights=np.array([0.5, 0.5]))]
    [4.0, 8.0, 4.0]
    """
    shape = r.shape[1:]
    successes, probability = r.reshape(len(r), -1), p.reshape(len(p), -1)
    found = np.empty((3, successes.shape[1]), dtype=np.float32)
    share = np.asarray(weights, dtype=np.float64)
    workers = min(8, n_threads()) if successes.size > _FEW else 1
    edges = np.linspace(0, found.shape[1], workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        for run in [pool.submit(_moments, successes[:, i], probability[:, i], share, found[:, i]) for i in parts]:
            run.result()
    return MixtureMoments(*(moment.reshape(shape) for moment in found))


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
