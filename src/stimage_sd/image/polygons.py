"""Shared areas of polygons, for scores of objects without label maps."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from stimage_sd.image.instance_scores import Overlaps


def polygon_overlaps(truth: NDArray[np.object_], found: NDArray[np.object_]) -> Overlaps:
    """Compute the areas shared by true and found polygons.

    For label maps use `stimage_sd.image.instance_scores.overlaps`.

    - `truth`, `found`: object arrays of polygons.
    - returns: the objects, numbered from 1, with their areas and all pairs with a shared area.

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


def covered_areas(truth: NDArray[np.object_], found: NDArray[np.object_]) -> tuple[float, float, float]:
    """Compute the areas covered by true polygons, by found polygons, and by both.

    - `truth`, `found`: object arrays of polygons.
    - returns: areas covered by true polygons, by found polygons, and by both. Overlaps within one set count once.

    >>> import numpy as np, shapely
    >>> squares = np.array([shapely.box(0, 0, 2, 2), shapely.box(1, 0, 3, 2)])
    >>> covered_areas(squares, squares[:1])
    (6.0, 4.0, 4.0)
    """
    pairs = polygon_overlaps(_disjoint(truth), _disjoint(found))
    return float(pairs.truth_areas.sum()), float(pairs.found_areas.sum()), float(pairs.shared.sum())


def _disjoint(polygons: NDArray[np.object_]) -> NDArray[np.object_]:
    """Subtract from every polygon the area covered by earlier polygons."""
    whole = shapely.make_valid(polygons)
    later, earlier = shapely.STRtree(whole).query(whole, predicate="intersects")
    before = earlier < later
    later, earlier = later[before], earlier[before]
    cut = whole.copy()
    for row in np.unique(later[shapely.area(shapely.intersection(whole[later], whole[earlier])) > 0]):
        cut[row] = shapely.difference(whole[row], shapely.union_all(whole[earlier[later == row]]))
    return np.asarray(cut)
