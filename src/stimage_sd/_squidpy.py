"""What squidpy's and scanpy's spatial plots look for in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata.models import TableModel
from spatialdata.transformations import get_transformation

from stimage_sd import contract

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: longest side of the image that travels in a table, px
THUMBNAIL = 1000


def spatial_uns(sdata: SpatialData, *, spot_diameter_px: float) -> dict[str, Any]:
    """Build ``uns["spatial"]`` of a table, so that `squidpy.pl.spatial_scatter` draws it as it is.

    Parameters
    ----------
    sdata
        The section.
    spot_diameter_px
        Diameter to draw an observation with, pixels of the H&E at full resolution.

    Returns
    -------
    The section's sample id, mapped to ``images`` (``hires``: ``uint8 (y, x, 3)``, at most 1,000 px a
    side) and ``scalefactors`` (``tissue_hires_scalef``, ``spot_diameter_fullres``).

    Examples
    --------
    >>> import numpy as np
    >>> from spatialdata import SpatialData
    >>> from stimage_sd import contract
    >>> from stimage_sd.io._raster import raster_from_array
    >>> image = np.full((2000, 2000, 3), 255, np.uint8)
    >>> sdata = SpatialData(images={"he": contract.build_image(raster_from_array(image))})
    >>> _ = contract.register(sdata, sample="blank", platform="slide", image="he", mpp=None)
    >>> spatial_uns(sdata, spot_diameter_px=100.0)["blank"]["scalefactors"]["tissue_hires_scalef"]
    0.5
    """
    image, downsample = contract.thumbnail(sdata, contract.image_name(sdata), max_side=THUMBNAIL)
    return {
        contract.sample(sdata): {
            "images": {"hires": image},
            "scalefactors": {
                "tissue_hires_scalef": 1.0 / downsample,
                "spot_diameter_fullres": float(spot_diameter_px),
            },
        }
    }


def attach_spatial(sdata: SpatialData) -> None:
    """Fill ``uns["spatial"]`` of the tables of measured units that are placed on the H&E and lack it.

    Parameters
    ----------
    sdata
        The section; without an H&E nothing is done, since there is no picture to draw on.
    """
    if contract.info(sdata)["image"] is None:
        return
    for table in sdata.tables.values():
        region = table.uns.get(TableModel.ATTRS_KEY, {}).get(TableModel.REGION_KEY)
        if "spatial" in table.obsm and "spatial" not in table.uns and region in sdata.shapes:
            table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=_diameter_px(sdata, region))


def _diameter_px(sdata: SpatialData, region: str) -> float:
    """Median diameter of the units, global pixels; of polygons that of the circle of their area."""
    shapes = sdata.shapes[region]
    to_global = get_transformation(shapes, to_coordinate_system="global").to_affine_matrix(("x", "y"), ("x", "y"))
    scale = float(np.sqrt(abs(np.linalg.det(to_global[:2, :2]))))
    if "radius" in shapes:
        return 2.0 * scale * float(shapes["radius"].median())
    return 2.0 * scale * float(np.sqrt(shapes.geometry.area.median() / np.pi))
