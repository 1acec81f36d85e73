"""Areas that polygons share, for scores of objects that are no label maps."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from stimage_sd.nn.instance_scores import Overlaps


def polygon_overlaps(truth: NDArray[np.object_], found: NDArray[np.object_]) -> Overlaps:
    """Compute the areas that true and found polygons share, as `stimage_sd.nn.instance_scores.overlaps` does of pixels.

    Parameters
    ----------
    truth, found
        Object arrays of polygons.

    Returns
    -------
    The objects, numbered from 1, their areas, and every pair that shares an area.

    Examples
    --------
    >>> import numpy as np, shapely
    >>> squares = np.array([shapely.box(0, 0, 2, 2)])
    >>> polygon_overlaps(squares, np.array([shapely.box(1, 0, 3, 2)])).iou.round(2)
    array([0.33])
    """
    truth, found = shapely.make_valid(truth), shapely.make_valid(found)
    rows, columns = shapely.STRtree(found).query(truth, predicate="intersects")
    shared = shapely.area(shapely.intersection(truth[rows], found[columns]))
    some = shared > 0
    order = np.lexsort((columns[some], rows[some]))
    return Overlaps(
        truth_labels=np.arange(1, len(truth) + 1),
        found_labels=np.arange(1, len(found) + 1),
        truth_areas=shapely.area(truth),
        found_areas=shapely.area(found),
        truth_rows=rows[some][order],
        found_rows=columns[some][order],
        shared=shared[some][order],
    )
