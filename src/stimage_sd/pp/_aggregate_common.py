"""Result type and batched task runner that all aggregation sources share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import dask
import numpy as np
import pandas as pd
import scipy.sparse as sp
from dask.delayed import Delayed

from stimage_sd._progress import tqdm
from stimage_sd._settings import n_threads, settings
from stimage_sd.stream.driver import active_client


@dataclass(frozen=True)
class Measured:
    """Measurements per spot.

    - `values`: counts, sparse ``int32 (n_spots, n_genes)``, or mean intensities, ``float32 (n_spots, n_channels)``.
    - `var`: one row per gene or channel.
    - `n_units`: number of transcripts, cells or pixels per spot, ``int64 (n_spots,)``.
    - `notes`: further values to record in the section's history.
    """

    values: sp.csr_matrix | np.ndarray
    var: pd.DataFrame
    n_units: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)


def in_batches(tasks: list[Delayed], *, description: str, n_jobs: int | None) -> Iterator[Any]:
    """Compute tasks in batches and yield their results in order, to limit memory.

    Tasks run on threads, or on the active `dask.distributed` client.
    """
    size = max(16, 4 * n_threads(n_jobs))
    how = {} if active_client() is not None else {"scheduler": "threads", "num_workers": n_jobs or settings.n_jobs}
    with tqdm(total=len(tasks), desc=description) as bar:
        for start in range(0, len(tasks), size):
            results = dask.compute(*tasks[start : start + size], **how)
            bar.update(len(results))
            yield from results
