"""Copies of a tile until the scores of its segments are stable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.image import lime
from stimage_sd.tl._explain.copies import Copies
from stimage_sd.tl._explain.explained import TileResult

#: copies that are added before the scores are judged again
BLOCK = 64
#: expected seconds from which the message is a warning
_LONG = 300


@dataclass(frozen=True)
class Sampling:
    """Which copies are predicted, and when there are enough.

    - `of`, `columns`: outputs and genes to explain.
    - `n_samples`: largest number of copies per seed.
    - `stability`: stability of all genes and outputs at which no more copies are added. `None`: always `n_samples`
      copies.
    - `seeds`: seeds of the perturbations.
    """

    of: tuple[str, ...]
    columns: np.ndarray
    n_samples: int
    stability: float | None
    seeds: tuple[int, ...]

    @property
    def draw(self) -> Callable[..., np.ndarray]:
        """Function that draws the copies: those of the package `lime` if their number is fixed, else pairs."""
        return lime.perturbations if self.stability is None else lime.paired_perturbations

    @property
    def fit(self) -> Callable[[np.ndarray, np.ndarray], lime.LeftOut]:
        """Function that fits the linear models to such copies."""
        return lime.leave_one_out if self.stability is None else lime.leave_pairs_out


class Expected:
    """Progress bar over the copies of all tiles. The first block tells how long they take.

    - `n_tiles`: number of tiles to explain.
    - `n_copies`: largest number of copies per tile.
    """

    def __init__(self, n_tiles: int, n_copies: int) -> None:
        self._n_tiles, self._n_copies = n_tiles, n_copies
        self._n_of_tile = 0
        self._n_left_out = 0
        self._is_said = False
        self._bar = tqdm(total=n_tiles * n_copies, desc="explaining, at most", unit="copy")

    def __enter__(self) -> Expected:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self._bar.close()

    def add(self, n_copies: int, seconds: float) -> None:
        """Count the copies of a block, and the seconds that its networks took."""
        if not self._is_said:
            self._is_said = True
            self._say(seconds / n_copies * self._n_tiles * self._n_copies)
        self._n_of_tile += n_copies
        self._bar.update(n_copies)

    def finish_tile(self) -> None:
        """Take the copies that a tile did not need from the total."""
        self._n_left_out += self._n_copies - self._n_of_tile
        self._bar.total = self._n_tiles * self._n_copies - self._n_left_out
        self._bar.refresh()
        self._n_of_tile = 0

    def _say(self, seconds: float) -> None:
        say = logger.info if seconds < _LONG else logger.warning
        length = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        say(
            "LIME takes at most %s (%d tiles, %d copies each). Tiles with stable scores need fewer copies.",
            length, self._n_tiles, self._n_copies,
        )  # fmt: skip


def explain_tile(
    copies: Copies, result: TileResult, sampling: Sampling, pool: Executor, *, report: Callable[[int, float], object]
) -> TileResult:
    """Add copies in blocks, fit LIME's linear models, and stop when the scores are stable.

    - `copies`: the tile's copies.
    - `result`: the tile's result with its segments.
    - `sampling`: which copies are predicted.
    - `pool`: threads of the networks.
    - `report`: called with the number of copies of each block, and the seconds that its networks took.
    - returns: the result with scores.
    """
    cut = result.segments
    assert cut is not None
    n_segments, first = len(cut.numbers), int(cut.has_background)
    shown = np.stack([sampling.draw(sampling.n_samples, n_segments, seed=seed) for seed in sampling.seeds])
    n_samples = shown.shape[1]
    outputs: list[np.ndarray] = []
    for start in [0, *range(1 + BLOCK, n_samples, BLOCK)]:
        stop = min(start + BLOCK + (start == 0), n_samples)
        block = shown[:, start:stop].reshape(-1, n_segments)
        predicted = copies.outputs(block, sampling.of, sampling.columns, pool)
        outputs.append(predicted.reshape(len(shown), stop - start, -1))
        report(len(block), copies.seconds)
        if sampling.stability is None and stop < n_samples:
            continue
        every = [sampling.fit(*pair) for pair in zip(shown[:, :stop], np.concatenate(outputs, axis=1), strict=True)]
        stability, r2 = _judge(every, first)
        if sampling.stability is not None and (stability >= sampling.stability).all():
            break
    weights = np.stack([fit.weights for fit in every])
    return replace(
        result,
        prediction=outputs[0][0, 0],
        n_samples=stop * len(shown),
        scores=weights.mean(axis=0)[first:],
        deviations=weights.std(axis=0)[first:] if len(shown) > 1 else None,
        about={
            "r2": r2,
            "stability": stability,
            "background": weights.mean(axis=0)[0] if first else np.full(weights.shape[2], np.nan),
            "intercept": np.mean([fit.intercepts for fit in every], axis=0),
        },
    )


def _judge(every: Sequence[lime.LeftOut], first: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute stability and held-out R² of the mean over seeds, each ``float64 (n_outputs,)``."""
    weights, r2 = (np.mean([getattr(one, name) for one in every], axis=0) for name in ("weights", "r2"))
    variances = np.sum([one.variances for one in every], axis=0) / len(every) ** 2
    return lime.stability(weights[first:], variances[first:]), r2
