"""Null correlations of two unrelated maps, by shifts over the lattice or by shuffled spots.

Expression and predictions are smooth in space, so few spots of a section are independent. Shuffled spots correlate far
less by chance than smooth maps do. Shifted maps keep their smoothness.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike

from stimage_sd.stats.lattice import find_lattice

__all__ = ["ShiftedMaps", "shuffled_correlations"]


class _Raster(NamedTuple):
    """Spectra of the maps on the lattice and of the tissue."""

    tissue: np.ndarray
    values: np.ndarray
    squares: np.ndarray


class ShiftedMaps:
    """Correlations of maps with shifted maps on the lattice, with and without a 180-degree rotation.

    Correlations are over the spots where both maps have tissue. The correlation over an overlap of m of n spots is
    multiplied by the square root of m / n, because fewer spots correlate more by chance (variance correction, Mrkvička
    et al. 2021). Maps are not wrapped around the border, because seams would break their smoothness.

    - `coordinates`: spot centers, x and y, (n_obs, 2), on a lattice (see `stimage_sd.stats.lattice`).
    - `least_overlap`: smallest share of spots in the overlap of a shift. With smaller overlaps the corrected
      correlations are still too wide. In simulated smooth fields a quarter gave 5 to 9 % of p-values below 0.05, a half
      gave 4 to 6 %.
    - `n_shifts`: number of shifts, without the identity.

    >>> import numpy as np
    >>> from stimage_sd.stats.permutation import ShiftedMaps
    >>> grid = np.array([[x, y] for x in range(6) for y in range(6)], dtype=float)
    >>> maps = ShiftedMaps(grid)
    >>> shifted = maps.correlations(grid, grid, np.arange(maps.n_shifts))
    >>> shifted.shape == (maps.n_shifts, 2), round(float(shifted.min()), 6)  # half a turn
    (True, -1.0)
    """

    def __init__(self, coordinates: ArrayLike, *, least_overlap: float = 0.5) -> None:
        spots = find_lattice(coordinates)
        self._row, self._column = spots.row, spots.column
        self._n_obs = len(spots.row)
        extent = (int(spots.row.max()) + 1, int(spots.column.max()) + 1)
        # pad to twice the extent, so that shifts do not wrap around
        self._shape = tuple(scipy.fft.next_fast_len(2 * length - 1, real=True) for length in extent)
        tissue = self._spectrum(np.ones((self._n_obs, 1)))
        overlaps = [self._inverse(tissue * np.conj(tissue)), self._inverse(tissue * tissue)]
        overlap = np.stack([np.rint(values[0]).ravel() for values in overlaps])
        allowed = overlap >= max(3.0, least_overlap * self._n_obs)
        allowed[0, 0] = False  # unturned and unshifted
        self._tissue = tissue
        self._place = np.flatnonzero(allowed)
        self._overlap = overlap.ravel()[self._place]
        self.n_shifts = len(self._place)

    def _spectrum(self, values: np.ndarray) -> np.ndarray:
        raster = np.zeros((values.shape[1], *self._shape))
        raster[:, self._row, self._column] = values.T
        return scipy.fft.rfft2(raster)

    def _inverse(self, spectrum: np.ndarray) -> np.ndarray:
        return scipy.fft.irfft2(spectrum, s=self._shape)

    def correlations(self, moving: np.ndarray, fixed: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Compute Pearson's correlation of each gene for some shifts, corrected for the overlap.

        - `moving`, `fixed`: values, (n_obs, n_genes).
        - `shifts`: numbers of the shifts, below `n_shifts`.
        - returns: float64 of shape (n_shifts, n_genes), 0 where a gene is constant over an overlap.
        """
        place = self._place[shifts]
        n = self._overlap[shifts][:, None]
        one, other = self._raster(moving), self._raster(fixed)

        def over(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            """Return sums of products over the overlap of each requested shift, (n_shifts, n_genes)."""
            shifted, turned = self._inverse(second * np.conj(first)), self._inverse(second * first)
            both = np.concatenate([shifted.reshape(len(shifted), -1), turned.reshape(len(turned), -1)], axis=1)
            return both[:, place].T

        x, y = over(one.values, self._tissue), over(self._tissue, other.values)
        covariance = over(one.values, other.values) - x * y / n
        variances = [over(one.squares, self._tissue) - x**2 / n, over(self._tissue, other.squares) - y**2 / n]
        # values have unit variance, so tiny variances in an overlap are rounding of constant genes
        known = (variances[0] > 1e-9 * n) & (variances[1] > 1e-9 * n)
        scale = np.sqrt(np.where(known, variances[0] * variances[1], 1.0))
        return np.where(known, np.clip(covariance / scale, -1, 1), 0.0) * np.sqrt(n / self._n_obs)

    def _raster(self, values: np.ndarray) -> _Raster:
        scaled = _standardized(values)
        return _Raster(self._tissue, self._spectrum(scaled), self._spectrum(scaled**2))


def shuffled_correlations(
    moving: np.ndarray, fixed: np.ndarray, *, n_permutations: int, random: np.random.Generator
) -> np.ndarray:
    """Compute Pearson's correlation of each gene after shuffling the spots of one map.

    - `moving`, `fixed`: values, (n_obs, n_genes).
    - `n_permutations`: number of shuffles. All genes share the same shuffles.
    - `random`: random generator of the shuffles.
    - returns: float64 of shape (n_permutations, n_genes), 0 for constant genes.

    >>> import numpy as np
    >>> from stimage_sd.stats.permutation import shuffled_correlations
    >>> values = np.arange(10.0)[:, None]
    >>> shuffled_correlations(values, values, n_permutations=3, random=np.random.default_rng(0)).shape
    (3, 1)
    """
    one, other = _standardized(moving), _standardized(fixed)
    orders = [random.permutation(len(one)) for _ in range(n_permutations)]
    return np.stack([np.einsum("ij,ij->j", one[order], other) for order in orders]) / len(one)


def _standardized(values: np.ndarray) -> np.ndarray:
    """Scale genes to mean 0 and standard deviation 1, and constant genes to 0."""
    values = np.asarray(values, dtype=np.float64)
    constant = values.max(axis=0) == values.min(axis=0)
    centered = values - values.mean(axis=0)
    return np.where(constant, 0.0, centered / np.where(constant, 1.0, values.std(axis=0)))
