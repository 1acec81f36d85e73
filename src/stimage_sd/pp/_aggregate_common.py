"""What the sources of aggregation share: their result, and tasks that run a few at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
import numpy as np
import pandas as pd
import scipy.sparse as sp
from dask.delayed import Delayed
from tqdm.auto import tqdm

from stimage_sd.stream import active_client


@dataclass(frozen=True)
class Measured:
    """What was measured in each spot.

    Attributes
    ----------
    values
        Counts, ``int32 (n_spots, n_genes)``, sparse; or mean intensities, ``float32 (n_spots, n_channels)``.
    var
        A row a gene or channel.
    n_units
        ``int64 (n_spots,)``: how many transcripts, cells or pixels a spot holds.
    notes
        What else is to be remembered.
    """

    values: sp.csr_matrix | np.ndarray
    var: pd.DataFrame
    n_units: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)


def in_batches(tasks: list[Delayed], *, description: str, n_workers: int | None) -> Iterator[Any]:
    """Compute tasks and yield their results in order, so that few stand in memory at a time.

    They run on threads, or on the active `dask.distributed` client.
    """
    size = max(16, 4 * (n_workers or os.cpu_count() or 1))
    how = {} if active_client() is not None else {"scheduler": "threads", "num_workers": n_workers}
    with tqdm(total=len(tasks), desc=description) as bar:
        for start in range(0, len(tasks), size):
            results = dask.compute(*tasks[start : start + size], **how)
            bar.update(len(results))
            yield from results
