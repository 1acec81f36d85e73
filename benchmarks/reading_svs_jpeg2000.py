"""Reading tiles of a slide: an Aperio SVS, JPEG 2000, otherwise as `benchmarks.reading`."""

from __future__ import annotations

from benchmarks.reading import comparison

WORK = comparison("svs_jpeg2000", title="Reading tiles of an Aperio SVS, JPEG 2000, 224 px")
