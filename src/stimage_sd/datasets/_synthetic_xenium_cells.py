"""Cells of a synthetic Xenium section: painted nuclei, expanded as in the onboard analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import shapely
import zarr
from scipy.spatial import cKDTree

from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import log_mean

#: largest expansion of a cell beyond its nucleus, µm
EXPANSION_UM = 5.0
#: directions of the vertices of an outline; the first vertex is repeated at the end
DIRECTIONS = np.arange(12) * 2.0 * np.pi / 12
#: number of neighbors that limit a cell, and of candidate cells per transcript
NEIGHBORS, NEAREST = 8, 4

GENE, PROTEIN = "Gene Expression", "Protein Expression"
#: factor from intensities to the stored whole numbers
PROTEIN_SCALE = 10.0
#: shape of the gamma distribution, with mean 1, of a protein across cells with equal mean
PROTEIN_SHAPE = 8.0
#: feature types, and their names in the table of transcripts
CATEGORIES = {
    GENE: "predesigned_gene",
    "Negative Control Probe": "negative_control_probe",
    "Negative Control Codeword": "negative_control_codeword",
    "Unassigned Codeword": "unassigned_codeword",
}


class Cells:
    """Nuclei expanded to cells, in instrument micrometers.

    Nuclei are expanded by up to `EXPANSION_UM`, or up to half the distance to the next nucleus.

    - `nuclei`: ``(n, 6)`` nuclei from `scatter_nuclei`, pixels of the H&E.
    - `to_um`: ``(3, 3)`` similarity from pixels of the H&E to instrument micrometers.
    - `version`: version of the format.
    """

    def __init__(self, nuclei: np.ndarray, to_um: np.ndarray, version: str) -> None:
        self.version = version
        self.to_um = to_um
        scale = float(np.sqrt(np.linalg.det(to_um[:2, :2])))
        self.centers = nuclei[:, :2] @ to_um[:2, :2].T + to_um[:2, 2]
        self.angles = np.radians(nuclei[:, 4]) + np.arctan2(to_um[1, 0], to_um[0, 0])
        self.axes = nuclei[:, 2:4] * scale
        self.tree = cKDTree(self.centers)
        self.radii = self._radii()
        numbers = np.arange(1, len(nuclei) + 1)
        self.ids = numbers.astype(np.int32)
        if version != "1.0":
            self.ids = np.array([_cell_id(int(value)) for value in numbers])
        self.barcodes = pd.Index(self.ids.astype(str), name="cell_id")

    def _radii(self) -> np.ndarray:
        """Return the radius of each cell from the center of its nucleus in `DIRECTIONS`, µm."""
        turned = DIRECTIONS - self.angles[:, None]
        long, short = self.axes[:, :1], self.axes[:, 1:]
        nucleus = long * short / np.hypot(short * np.cos(turned), long * np.sin(turned))
        distances, neighbors = self.tree.query(self.centers, k=range(2, NEIGHBORS + 2))
        away = self.centers[np.minimum(neighbors, len(self.centers) - 1)] - self.centers[:, None]
        toward = np.arctan2(away[..., 1], away[..., 0])
        facing = np.cos(DIRECTIONS - toward[..., None])
        # Distance to the line halfway to a neighbor. It is very large for neighbors behind, infinite for missing ones.
        halfway = distances[..., None] / 2.0 / np.maximum(facing, 1e-6)
        return np.maximum(nucleus, np.minimum(nucleus + EXPANSION_UM, halfway.min(axis=1)))

    def owners(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cell of each point, -1 if none, and whether the point lies in the nucleus."""
        owners = np.full(len(points), -1)
        _, candidates = self.tree.query(points, k=range(1, NEAREST + 1), distance_upper_bound=40.0)
        for nth in range(NEAREST):
            open_ = np.flatnonzero((owners < 0) & (candidates[:, nth] < len(self.centers)))
            cells = candidates[open_, nth]
            inside = self._inside(points[open_] - self.centers[cells], cells)
            owners[open_[inside]] = cells[inside]
        away = points - self.centers[owners]
        cosine, sine = np.cos(self.angles[owners]), np.sin(self.angles[owners])
        along = np.column_stack([away[:, 0] * cosine + away[:, 1] * sine, away[:, 1] * cosine - away[:, 0] * sine])
        in_nucleus = ((along / self.axes[owners]) ** 2).sum(axis=1) <= 1.0
        return owners, in_nucleus & (owners >= 0)

    def _inside(self, away: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Return whether points, relative to the nucleus of their cell, lie within the outline of the cell."""
        step = 2.0 * np.pi / len(DIRECTIONS)
        sector = (np.arctan2(away[:, 1], away[:, 0]) % (2.0 * np.pi) // step).astype(int) % len(DIRECTIONS)
        following = (sector + 1) % len(DIRECTIONS)
        start, end = (
            self.radii[cells, corner, None] * np.column_stack([np.cos(DIRECTIONS[corner]), np.sin(DIRECTIONS[corner])])
            for corner in (sector, following)
        )
        edge, to_point = end - start, away - start
        return edge[:, 0] * to_point[:, 1] - edge[:, 1] * to_point[:, 0] >= 0.0

    def write(self, path: Path, counts: sp.csr_matrix, features: pd.Series) -> None:
        """Write the table of cells, the outlines, and ``cells.zarr.zip``."""
        sums = {
            kind: np.asarray(counts[:, np.flatnonzero(features == kind)].sum(axis=1)).ravel() for kind in CATEGORIES
        }
        waves = np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)], axis=-1)
        outlines = self.centers[:, None] + self.radii[..., None] * waves
        polygons = shapely.polygons(outlines)
        middles = shapely.get_coordinates(shapely.centroid(polygons))
        columns: dict[str, np.ndarray] = {
            "cell_id": self.ids,
            "x_centroid": middles[:, 0],
            "y_centroid": middles[:, 1],
            "transcript_counts": sums[GENE],
            "control_probe_counts": sums["Negative Control Probe"],
            "control_codeword_counts": sums["Negative Control Codeword"],
            "unassigned_codeword_counts": sums["Unassigned Codeword"],
            "total_counts": np.asarray(counts.sum(axis=1)).ravel(),
            "cell_area": shapely.area(polygons),
            "nucleus_area": np.pi * self.axes.prod(axis=1),
        }
        if self.version != "1.0":
            columns["nucleus_count"] = np.ones(len(self.ids), dtype=np.int64)
            columns["segmentation_method"] = np.full(len(self.ids), "Segmented by nucleus expansion of 5.0µm")
        pq.write_table(pa.table(columns), path / "cells.parquet")
        self._write_zarr(path / "cells.zarr.zip", columns)
        self._write_outlines(path / "cell_boundaries.parquet", outlines)
        cosine, sine = np.cos(self.angles)[:, None], np.sin(self.angles)[:, None]
        along = self.axes[:, None] * waves
        turned = [along[..., 0] * cosine - along[..., 1] * sine, along[..., 0] * sine + along[..., 1] * cosine]
        self._write_outlines(path / "nucleus_boundaries.parquet", self.centers[:, None] + np.stack(turned, axis=-1))

    def _write_zarr(self, path: Path, columns: dict[str, np.ndarray]) -> None:
        """Write the parts of ``cells.zarr.zip`` that other readers use: cell ids and owners of outlines, no masks."""
        summary = {
            "cell_centroid_x": columns["x_centroid"],
            "cell_centroid_y": columns["y_centroid"],
            "cell_area": columns["cell_area"],
            "nucleus_centroid_x": self.centers[:, 0],
            "nucleus_centroid_y": self.centers[:, 1],
            "nucleus_area": columns["nucleus_area"],
            "z_level": np.zeros(len(self.ids)),
        }
        numbers = np.arange(1, len(self.ids) + 1, dtype=np.uint32)
        ids = numbers
        if self.version != "1.0":
            summary["nucleus_count"] = columns["nucleus_count"]
            ids = np.column_stack([numbers, np.ones_like(numbers)])
        with zarr.storage.ZipStore(path, mode="w") as store:
            group = zarr.create_group(store, zarr_format=2)
            group.create_array("cell_id", data=ids)
            about = {"column_names": list(summary)}
            group.create_array("cell_summary", data=np.column_stack(list(summary.values())), attributes=about)
            if self.version != "1.0":
                for kind in ("0", "1"):
                    outlines = group.create_group(f"polygon_sets/{kind}")
                    outlines.create_array("cell_index", data=numbers - 1)

    def _write_outlines(self, path: Path, outlines: np.ndarray) -> None:
        closed = np.concatenate([outlines, outlines[:, :1]], axis=1).astype(np.float32)
        n_vertices = closed.shape[1]
        columns = {
            "cell_id": np.repeat(self.ids, n_vertices),
            "vertex_x": closed[..., 0].ravel(),
            "vertex_y": closed[..., 1].ravel(),
        }
        if self.version != "1.0":
            columns["label_id"] = np.repeat(np.arange(1, len(self.ids) + 1, dtype=np.uint32), n_vertices)
        pq.write_table(pa.table(columns), path)


def _cell_id(value: int) -> str:
    """Return a cell id in the 10x Genomics form: eight letters, a for 0 to p for 15, and data set 1."""
    return "".join(chr(ord("a") + int(digit, 16)) for digit in f"{value:08x}") + "-1"


def draw_proteins(tissue: Tissue, nuclei: np.ndarray, genes: pd.DataFrame, barcodes: pd.Index) -> pd.DataFrame:
    """Draw intensities of one protein per gene, cells × proteins, in steps of ``1 / PROTEIN_SCALE``."""
    mean = np.exp(log_mean(tissue, nuclei[:, :2], genes))
    generator = np.random.default_rng([tissue.seed, 35])
    drawn = mean * generator.gamma(PROTEIN_SHAPE, 1.0 / PROTEIN_SHAPE, mean.shape)
    names = [f"AG{protein:02d}" for protein in range(1, len(genes) + 1)]
    return pd.DataFrame(np.rint(drawn * PROTEIN_SCALE) / PROTEIN_SCALE, index=barcodes, columns=names)
