"""Three fields of view of tiles on a lattice, where tiles have gaps; see `embedding_fields`."""

from __future__ import annotations

from benchmarks.embedding_fields import comparison

WORK = comparison(title="Three fields of view, tiles on a lattice", size_um=55.0, stride_um=93.0)
