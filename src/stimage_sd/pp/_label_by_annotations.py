"""Label tiles, spots or nuclei with the class of the annotation that they lie in."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract

Onto = Literal["tiles", "spots", "nuclei"]


def label_by_annotations(
    data: SpatialData | contract.Cohort,
    *,
    onto: Onto = "tiles",
    key: str = "annotations",
    class_key: str = "classification",
    key_added: str = "annotation",
    shapes_key: str | None = None,
    table_key: str | None = None,
) -> None:
    """Label tiles, spots or nuclei with the class of the annotation that their center lies in.

    Where annotations overlap, the smallest one wins, as for nested annotations in QuPath. Among annotations of equal
    area the first one wins. A center on the border lies inside. Annotations without a class are left out.

    Parameters
    ----------
    data
        A section with annotations (`stimage_sd.io.read_geojson`), or a cohort of such sections.
    onto
        ``"tiles"``, ``"spots"`` (the measured spots, bins or cells) or ``"nuclei"``.
    key
        Name of the annotations' shapes. If they have a column ``object_type``, only its annotations count.
    class_key
        Column of the annotations with the classes.
    key_added
        Name of the column to write. An existing column is replaced.
    shapes_key
        Name of the nuclei, if not ``"nuclei"``, or of the spots.
    table_key
        Name of the table of counts, if the section has several.

    Returns
    -------
    Nothing. Writes the column to ``tables["tiles"].obs``, to ``obs`` of the table of counts, or to the nuclei's shapes
    and the table of predicted cells that annotates them. The column is categorical. Its categories are the classes of
    the annotations in their order. The value is missing where a center lies in no annotation.

    Raises
    ------
    KeyError
        If the annotations, the column of classes or the elements to label do not exist.
    ValueError
        If no annotation has a class, or no center lies in an annotation.

    Examples
    --------
    >>> import geopandas, shapely
    >>> import numpy as np, stimage_sd as sti
    >>> from anndata import AnnData
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> pink = np.full((200, 200, 3), (200, 120, 180), np.uint8)
    >>> section = sti.io.from_anndata(adata, pink, sample="tiny", spot_diameter_px=55.0)
    >>> left = geopandas.GeoDataFrame({"classification": ["Tumor"]}, geometry=[shapely.box(0, 0, 100, 200)])
    >>> contract.write_shapes(section, left, name="annotations")
    >>> label_by_annotations(section, onto="spots")
    >>> section.tables["counts"].obs["annotation"].tolist()
    ['Tumor', nan]
    """
    if onto not in ("tiles", "spots", "nuclei"):
        raise ValueError(f'Expected `onto` to be "tiles", "spots" or "nuclei", found {onto!r}.')
    cohort = contract.sections(data)
    # check all sections before writing to any
    labels = {
        name: _labels(sdata, onto, key=key, class_key=class_key, shapes_key=shapes_key, table_key=table_key)
        for name, sdata in cohort.items()
    }
    for name, sdata in cohort.items():
        _write(sdata, onto, labels[name], key_added=key_added, shapes_key=shapes_key, table_key=table_key)
        contract.record(
            sdata, "pp.label_by_annotations", onto=onto, key=key, key_added=key_added,
            n_labeled=int(labels[name].notna().sum()), n=len(labels[name]),
        )  # fmt: skip


def smallest_around(points: NDArray[np.float64], areas: NDArray[np.object_]) -> NDArray[np.intp]:
    """Return the smallest area that each point lies in, or -1 if the point lies in none.

    - `points`: ``(n_points, 2)``, x and y.
    - `areas`: ``(n_areas,)`` polygons.

    >>> around = np.array([shapely.box(0, 0, 9, 9), shapely.box(0, 0, 3, 3)])
    >>> smallest_around(np.array([[1.0, 1.0], [5.0, 5.0], [20.0, 5.0]]), around)
    array([ 1,  0, -1])
    """
    point, area = shapely.STRtree(areas).query(shapely.points(points), predicate="intersects")
    order = np.argsort(shapely.area(areas), kind="stable")
    rank = np.empty(len(areas), dtype=np.intp)
    rank[order] = np.arange(len(areas))
    smallest = np.full(len(points), len(areas), dtype=np.intp)
    np.minimum.at(smallest, point, rank[area])
    return np.append(order, -1)[smallest]


def _labels(
    sdata: SpatialData, onto: Onto, *, key: str, class_key: str, shapes_key: str | None, table_key: str | None
) -> pd.Series:
    """Return the classes by ``instance_id``."""
    if key not in sdata.shapes:
        raise KeyError(
            f"Section {contract.sample(sdata)!r} has no annotations {key!r}; its shapes: {sorted(sdata.shapes)}. Read "
            "them with `stimage_sd.io.read_geojson`, or name others with `key=`."
        )
    annotations = contract.nuclei(sdata, key)
    if class_key not in annotations:
        raise KeyError(
            f"No column {class_key!r} in the annotations {key!r}, found {list(annotations.columns)}. Name the classes "
            "with `class_key=`."
        )
    if "object_type" in annotations:
        annotations = annotations[annotations["object_type"] == "annotation"]
    annotations = annotations[annotations[class_key].notna()]
    if annotations.empty:
        raise ValueError(
            f"No annotation of {key!r} in section {contract.sample(sdata)!r} has a class. Classify them in QuPath."
        )
    instances, centers = _centers(sdata, onto, shapes_key, table_key)
    around = smallest_around(centers, np.asarray(annotations.geometry.array, dtype=object))
    if (around < 0).all():
        left, top, right, bottom = annotations.total_bounds
        raise ValueError(
            f"None of {len(around)} {onto} of section {contract.sample(sdata)!r} lies in an annotation. The "
            f"annotations span x {left:.0f} to {right:.0f} and y {top:.0f} to {bottom:.0f} px. Do they belong to "
            "another image?"
        )
    column = annotations[class_key]
    names = np.array([*column.astype(str), None], dtype=object)
    present = list(dict.fromkeys(names[:-1]))
    order = list(map(str, column.cat.categories)) if isinstance(column.dtype, pd.CategoricalDtype) else present
    return pd.Series(pd.Categorical(names[around], categories=[name for name in order if name in present]), instances)


def _centers(
    sdata: SpatialData, onto: Onto, shapes_key: str | None, table_key: str | None
) -> tuple[pd.Index, NDArray[np.float64]]:
    """Return the instances and their centers, H&E px."""
    if onto == "tiles":
        squares = contract.tile_squares(sdata)
        instances = pd.Index(contract.tiles(sdata).obs[contract.INSTANCE_KEY])
        return instances, (squares[:, :2] + squares[:, 2:]) / 2
    if onto == "spots":
        units = contract.find_units(sdata, shapes_key=shapes_key, table_key=table_key)
        return units.names, units.positions(sdata)
    frame = contract.nuclei(sdata, shapes_key)
    return frame.index, shapely.get_coordinates(shapely.centroid(frame.geometry.array))


def _write(
    sdata: SpatialData, onto: Onto, labels: pd.Series, *, key_added: str, shapes_key: str | None, table_key: str | None
) -> None:
    if onto == "nuclei":
        name = contract.nuclei_name(sdata, shapes_key)
        sdata.shapes[name][key_added] = labels
        if contract.CELL_TYPES not in sdata.tables or contract.cell_shapes(sdata) != name:
            return
        table = contract.cell_types(sdata)
        instances = table.obs[contract.INSTANCE_KEY]
    elif onto == "tiles":
        table = contract.tiles(sdata)
        instances = table.obs[contract.INSTANCE_KEY]
    else:
        units = contract.find_units(sdata, shapes_key=shapes_key, table_key=table_key)
        if units.table is None:
            sdata.shapes[units.shapes][key_added] = labels.array
            return
        table = sdata.tables[units.table]
        instances = table.obs_names
    table.obs[key_added] = labels.reindex(instances).array
