"""Add the entries that squidpy's and scanpy's spatial plots need to tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stimage_sd import contract

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: longest side of the image in a table, px
THUMBNAIL = 1000


def spatial_uns(sdata: SpatialData, *, spot_diameter_px: float, image_key: str | None = None) -> dict[str, Any]:
    """Build ``uns["spatial"]`` of a table for `squidpy.pl.spatial_scatter`.

    - `sdata`: the section.
    - `spot_diameter_px`: drawn diameter of an observation, pixels of the image at full resolution.
    - `image_key`: the image whose pixels the table's positions are in. The section's H&E by default.
    - returns: the section's sample id, mapped to ``images`` (``hires``: ``uint8 (y, x, 3)``, at most 1,000 px per side)
      and ``scalefactors`` (``tissue_hires_scalef``, ``spot_diameter_fullres``).

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
    image, downsample = contract.thumbnail(sdata, contract.image_name(sdata, image_key), max_side=THUMBNAIL)
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
    """Fill a missing ``uns["spatial"]`` in the tables of measured units that are placed on the H&E.

    - `sdata`: the section. A section without an H&E is not changed.
    """
    if contract.info(sdata)["image"] is None:
        return
    for name, table in sdata.tables.items():
        if "spatial" not in table.obsm or "spatial" in table.uns or contract.is_result(name, table):
            continue
        if any(region in sdata.shapes for region in contract.regions_of(table)):
            diameter = contract.units_of(sdata, name).diameter(sdata)
            table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=diameter)
