"""Features of spots and of the nuclei in them, cut into minibatches for training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stimage_sd.likelihood.instances import Bags


@dataclass(frozen=True)
class BagFeatures:
    """Features of spots and of their nuclei, for each member.

    - `context`: ``float32 (n_members, n_spots, n_context)``.
    - `features`: ``float32 (n_members, n_nuclei, n_features)``, ordered by spot.
    - `starts`: first nucleus of each spot, and the number of nuclei, ``int64 (n_spots + 1,)``.
    - `background`: share of each spot that no nucleus covers, ``float32 (n_spots,)``.
    - `crowding`: log of the number of nuclei per area, relative to the training spots, ``float32 (n_spots,)``.
    """

    context: np.ndarray
    features: np.ndarray
    starts: np.ndarray
    background: np.ndarray
    crowding: np.ndarray

    def of_members(self, members: np.ndarray) -> BagFeatures:
        """Return the features that some members see."""
        return replace(self, context=self.context[members], features=self.features[members])

    def minibatches(self, spots: np.ndarray, counting: np.ndarray, members: np.ndarray | slice) -> Bags:
        """Cut out minibatches, with the steps as leading axis of every array.

        - `spots`: spots of each minibatch, ``int64 (n_steps, n_batch)``.
        - `counting`: whether a spot counts, or is padding.
        - `members`: the members whose features are used.
        """
        n_steps, n_batch = spots.shape
        sizes = np.where(counting, np.diff(self.starts)[spots], 0)
        capacity = _capacity(int(sizes.sum(axis=1).max()))
        nuclei, place = np.zeros((n_steps, capacity), np.int64), np.full((n_steps, capacity), n_batch, np.int32)
        for step, (own, size) in enumerate(zip(spots, sizes, strict=True)):
            total = int(size.sum())
            # the first nucleus of each spot, and the steps from there
            within = np.arange(total) - np.repeat(np.cumsum(size) - size, size)
            nuclei[step, :total] = np.repeat(self.starts[own], size) + within
            place[step, :total] = np.repeat(np.arange(n_batch), size)
        return Bags(
            np.moveaxis(self.context[members][:, spots], 0, 1),
            np.moveaxis(self.features[members][:, nuclei], 0, 1),
            place,
            self.background[spots],
            self.crowding[spots],
        )


def _capacity(n: int) -> int:
    """Round up to an eighth of a power of two, so that few shapes are compiled."""
    step = max(1, (1 << max(n - 1, 1).bit_length()) // 16)
    return max(step, -(-n // step) * step)
