"""Reading tiles of a slide: an OME-TIFF, JPEG 2000, otherwise as `benchmarks.reading`."""

from __future__ import annotations

from benchmarks.reading import comparison

WORK = comparison("ome_jpeg2000", title="Reading tiles of an OME-TIFF, JPEG 2000, 224 px")
