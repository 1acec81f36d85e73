"""Reading tiles of a slide: an OME-TIFF, JPEG, otherwise as `benchmarks.reading`."""

from __future__ import annotations

from benchmarks.reading import comparison

WORK = comparison("ome_jpeg", title="Reading tiles of an OME-TIFF, JPEG, 224 px")
