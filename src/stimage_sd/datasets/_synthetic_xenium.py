"""Synthetic Xenium section in the format of 10x Genomics, with known truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from stimage_sd.datasets._cell_types import TYPES, draw_markers, give_types, marker_names
from stimage_sd.datasets._synthetic_xenium_cells import (
    CATEGORIES,
    GENE,
    PROTEIN,
    PROTEIN_SCALE,
    Cells,
    draw_proteins,
)
from stimage_sd.datasets._synthetic_xenium_images import TILE, DapiPainter, write_ome_pyramid
from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint, scatter_nuclei
from stimage_sd.datasets._truth import SPOT_UM, check_folder, draw_genes, log_mean

#: micrometers per pixel of the H&E
MPP = 0.5
#: `Tissue.eccentricity` of the outline of the tissue
REACH = 0.92
#: width of the glass around the H&E in the morphology image, µm
BORDER_UM = 20.0
#: side of a block with the area of a spot of 55 µm; transcripts of a gene in a block share one gamma factor
BLOCK_UM = SPOT_UM * np.sqrt(np.pi) / 2.0
#: r of a block divided by r of a spot; a spot covers parts of several blocks and varies less than a block
BLOCK_DISPERSION = 0.45
#: pieces per side of a block; the fields are constant within a piece
PIECES = 4
#: transcripts of low quality (qv < 20) per good transcript, in addition to the counts of the truth
LOW_QUALITY = 0.15
QUALITY = 20.0
#: number of controls per kind, and mean count per control in a spot of 55 µm
N_CONTROLS, CONTROL_MEAN = 4, 0.5
#: number of proteins in version 4; each protein follows a gene
N_PROTEINS = 3
#: transcripts per row group
ROW_GROUP = 500_000

CONTROLS = {
    "NegControlProbe_": "Negative Control Probe",
    "NegControlCodeword_": "Negative Control Codeword",
    "UnassignedCodeword_": "Unassigned Codeword",
}
VERSIONS = ("1.0", "2.0", "3.0", "4.0")


def synthetic_xenium(
    path: str | Path,
    *,
    size_um: float = 1000.0,
    n_genes: int = 60,
    version: str = "3.0",
    align: bool = True,
    pixel_um: float = 0.2125,
    n_markers: int = 0,
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
) -> Path:
    """Write a synthetic Xenium section in the format of the instrument, with the H&E of the same tissue.

    Tissue, nuclei and genes are the same as in `stimage_sd.datasets.synthetic_visium`. Genes with the same `gene_seed`
    depend on the tissue in the same way. Within any circle of 55 µm, the transcripts of good quality (qv ≥ 20) have the
    mean of a Visium spot at the same position, and about the same variance. Cells are nuclei expanded by up to 5 µm, or
    up to half the distance to the next nucleus.

    Parameters
    ----------
    path
        Folder to write. Created if missing, otherwise it has to be empty.
    size_um
        Side of the square H&E, µm, rounded up to whole tiles.
    n_genes
        Number of genes. A third of the genes, ``NOISE...``, do not depend on the tissue.
    version
        Version of the onboard analysis, which decides the layout. ``"1.0"`` has the morphology image in one file,
        numbered cells, and names as bytes. ``"2.0"`` and ``"3.0"`` have the folder ``morphology_focus``. In ``"4.0"``,
        its files are named after their stain, and there are three proteins, ``AG01`` and so on, which follow the first
        genes.
    align
        Whether to write the alignment of the H&E, ``he_imagealignment.csv``.
    pixel_um
        Micrometers per pixel of the morphology image. The instrument has 0.2125. Larger pixels are faster.
    n_markers
        Number of marker genes per cell type, such as ``IMMUNE_01``. If positive, there are four cell types (cancer
        epithelial, endothelial, immune, stromal). Their nuclei differ in size, shape and darkness, and do not overlap.
    seed
        Seed of the tissue, the transcripts and the position of the H&E on the slide.
    gene_seed
        Seed of the dependence of genes on the tissue.
    stain_seed
        Seed of the staining of the H&E. By default the standard staining.

    Returns
    -------
    The folder, with these files:

    - ``experiment.xenium``, ``cells.parquet``, ``cell_boundaries.parquet``, ``nucleus_boundaries.parquet``,
      ``transcripts.parquet``, ``cell_feature_matrix.h5``, and ``cells.zarr.zip`` without masks;
    - the morphology image: DAPI, uint16;
    - ``he_image.ome.tif``: 0.5 µm per pixel;
    - ``truth_genes.csv``: as in `synthetic_visium`;
    - ``truth_alignment.csv``: 3 × 3, pixels of the H&E to pixels of the morphology image;
    - ``truth_cells.csv``: one row per cell, with ``x`` and ``y`` of the nucleus in pixels of the H&E, and ``cell_type``
      if there are types;
    - ``truth_proteins.csv`` of version 4: intensities, cells × proteins. The matrix holds the intensities times its
      ``protein_scaling_factor``;
    - ``truth_tissue.json``: ``size``, ``mpp``, ``seed`` and ``reach``.

    Raises
    ------
    ValueError
        If there are fewer than three genes, the section is smaller than 100 µm, `pixel_um` is not positive, or the
        version is unknown.
    FileExistsError
        If `path` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> run = synthetic_xenium(Path(tempfile.mkdtemp()) / "run", size_um=250.0, n_genes=9, pixel_um=0.85)
    >>> sorted(entry.name for entry in run.iterdir())[:3]
    ['cell_boundaries.parquet', 'cell_feature_matrix.h5', 'cells.parquet']
    """
    if n_genes < 3 or not size_um >= 100.0 or not pixel_um > 0:
        raise ValueError(
            f"Expected `n_genes` >= 3, `size_um` >= 100 and a positive `pixel_um`, found {n_genes}, {size_um} and "
            f"{pixel_um}."
        )
    if version not in VERSIONS:
        raise ValueError(f"Expected `version` to be one of {list(VERSIONS)}, found {version!r}.")
    path = check_folder(path)
    tissue = Tissue(int(np.ceil(size_um / MPP / TILE)) * TILE, MPP, seed)
    nuclei = scatter_nuclei(tissue, REACH)
    types = None
    if n_markers:
        nuclei, types = give_types(tissue, nuclei)
    to_dapi, side = _lay(tissue, pixel_um)
    genes = draw_genes(n_genes, gene_seed)
    cells = Cells(nuclei, np.diag([pixel_um, pixel_um, 1.0]) @ to_dapi, version)

    path.mkdir(parents=True, exist_ok=True)
    features = _features([*genes.index, *marker_names(n_markers)], version)
    drawn: Iterable[_Drawn] = _draw(
        tissue, genes, n_features=len(features) - n_markers * len(TYPES), n_markers=n_markers * len(TYPES)
    )
    if types is not None:
        drawn = chain(drawn, [_drawn_markers(nuclei, types, n_markers, first=len(genes), seed=seed)])
    counts = _write_transcripts(path / "transcripts.parquet", drawn, features, cells, seed)
    proteins = None
    if version == "4.0":
        proteins = draw_proteins(tissue, nuclei, genes.iloc[:N_PROTEINS], cells.barcodes)
        proteins.to_csv(path / "truth_proteins.csv")
    _write_matrix(path / "cell_feature_matrix.h5", counts, features, proteins, cells)
    cells.write(path, counts, features)
    _write_experiment(path, version, pixel_um, cells, int(counts.sum()))
    _write_images(path, DapiPainter(tissue, REACH, nuclei, to_dapi, side, pixel_um), version, stain_seed)
    genes.to_csv(path / "truth_genes.csv")
    truth = pd.DataFrame(nuclei[:, :2], columns=["x", "y"], index=cells.barcodes)
    if types is not None:
        truth["cell_type"] = np.array(TYPES)[types]
    truth.to_csv(path / "truth_cells.csv")
    (path / "truth_tissue.json").write_text(json.dumps({"size": tissue.size, "mpp": MPP, "seed": seed, "reach": REACH}))
    for name in ["truth_alignment.csv", *(["he_imagealignment.csv"] if align else [])]:
        pd.DataFrame(to_dapi).to_csv(path / name, header=False, index=False)
    return path


def _lay(tissue: Tissue, pixel_um: float) -> tuple[np.ndarray, int]:
    """Return the matrix from H&E pixels to pixels of the morphology image, and the side of the morphology image."""
    generator = np.random.default_rng([tissue.seed, 30])
    angle = np.pi / 2.0 * generator.integers(4) + np.radians(generator.uniform(-8.0, 8.0))
    cosine, sine = np.cos(angle), np.sin(angle)
    spanned = tissue.size * tissue.mpp * (abs(cosine) + abs(sine)) + 2.0 * BORDER_UM
    side = int(np.ceil(spanned / pixel_um / 64)) * 64
    linear = np.array([[cosine, -sine], [sine, cosine]]) * tissue.mpp / pixel_um
    shift = (
        side / 2.0 - linear @ np.full(2, tissue.size / 2.0) + generator.uniform(-0.25, 0.25, 2) * BORDER_UM / pixel_um
    )
    return np.vstack([np.column_stack([linear, shift]), [0.0, 0.0, 1.0]]), side


def _features(genes: Sequence[str], version: str) -> pd.Series:
    """Return the types of all features, genes before controls."""
    kinds = dict.fromkeys(genes, GENE)
    for prefix, kind in CONTROLS.items():
        prefix = "BLANK_" if version == "1.0" and prefix.startswith("Unassigned") else prefix
        kinds |= {f"{prefix}{control:05d}": kind for control in range(1, N_CONTROLS + 1)}
    return pd.Series(kinds)


# --------------------------------------------------------------------------------------------------
# transcripts


@dataclass(frozen=True)
class _Drawn:
    """Transcripts: positions in pixels of the H&E, feature numbers and qualities."""

    points: np.ndarray
    features: np.ndarray
    qualities: np.ndarray


def _draw(tissue: Tissue, genes: pd.DataFrame, *, n_features: int, n_markers: int) -> Iterator[_Drawn]:
    """Scatter transcripts over the tissue, in bands of blocks. Markers are numbered between genes and controls."""
    generator = np.random.default_rng([tissue.seed, 32])
    block = BLOCK_UM / tissue.mpp
    piece = block / PIECES
    n_blocks = int(np.ceil(tissue.size / block))
    n_controls = n_features - len(genes)
    dispersion = np.concatenate([genes["dispersion"].to_numpy(), np.full(n_controls, 20.0)])
    columns = (np.arange(n_blocks * PIECES) + 0.5) * piece
    for band in range(n_blocks):
        rows = (band * PIECES + np.arange(PIECES) + 0.5) * piece
        centers = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        means = np.full((len(centers), n_features), CONTROL_MEAN)
        means[:, : len(genes)] = np.exp(log_mean(tissue, centers, genes))
        # A gamma mixture of Poisson counts is negative binomial. A block has the area of a spot.
        shape = BLOCK_DISPERSION * dispersion
        gammas = generator.gamma(shape, 1.0 / shape, (n_blocks, n_features))
        means *= np.tile(np.repeat(gammas, PIECES, axis=0), (PIECES, 1)) * (1.0 + LOW_QUALITY) / PIECES**2
        counts = generator.poisson(means)
        pieces, features = (np.repeat(index, counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1))
        points = centers[pieces] + generator.uniform(-0.5, 0.5, (len(pieces), 2)) * piece
        good = generator.random(len(pieces)) < 1.0 / (1.0 + LOW_QUALITY)
        qualities = np.where(
            good,
            np.minimum(40.0, QUALITY + generator.exponential(25.0, len(pieces))),
            QUALITY * generator.beta(4.0, 1.5, len(pieces)),
        )
        inside = (tissue.eccentricity(points) < REACH) & ((points >= 0) & (points < tissue.size)).all(axis=1)
        features += n_markers * (features >= len(genes))
        yield _Drawn(points[inside], features[inside], qualities[inside].astype(np.float32))


def _drawn_markers(nuclei: np.ndarray, types: np.ndarray, n_markers: int, *, first: int, seed: int) -> _Drawn:
    points, markers = draw_markers(nuclei, types, n_markers=n_markers, seed=seed)
    return _Drawn(points, markers + first, np.full(len(points), 2 * QUALITY, dtype=np.float32))


def _write_transcripts(
    path: Path, transcripts: Iterable[_Drawn], features: pd.Series, cells: Cells, seed: int
) -> sp.csr_matrix:
    """Write the transcripts, and return the counts of transcripts of good quality, cells × features."""
    counts = sp.csr_matrix((len(cells.ids), len(features)), dtype=np.int32)
    generator = np.random.default_rng([seed, 33])
    waiting: list[pa.Table] = []
    writer: pq.ParquetWriter | None = None
    start = 0
    for drawn in transcripts:
        points = drawn.points @ cells.to_um[:2, :2].T + cells.to_um[:2, 2]
        owners, in_nucleus = cells.owners(points)
        counted = (owners >= 0) & (drawn.qualities >= QUALITY)
        ones = np.ones(int(counted.sum()), dtype=np.int32)
        counts += sp.csr_matrix((ones, (owners[counted], drawn.features[counted])), shape=counts.shape)
        depths = generator.normal(15.0, 2.5, len(points))
        waiting.append(_as_table(drawn, points, depths, owners, in_nucleus, features, cells, start))
        start += len(points)
        if writer is None:
            writer = pq.ParquetWriter(path, waiting[0].schema, compression="zstd")
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            writer.write_table(pa.concat_tables(waiting), row_group_size=2 * ROW_GROUP)
            waiting = []
    if writer is not None:
        with writer:
            if waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=2 * ROW_GROUP)
    return counts


def _as_table(
    drawn: _Drawn,
    points: np.ndarray,
    depths: np.ndarray,
    owners: np.ndarray,
    in_nucleus: np.ndarray,
    features: pd.Series,
    cells: Cells,
    start: int,
) -> pa.Table:
    first = cells.version == "1.0"
    names = pa.array(features.index.to_list(), pa.binary() if first else pa.string())
    nobody = np.array([-1], dtype=np.int32) if first else np.array(["UNASSIGNED"])
    ids = pa.array(np.concatenate([cells.ids, nobody]).tolist(), pa.int32() if first else pa.string())
    columns = {
        "transcript_id": pa.array(281_500_000_000_000 + start + np.arange(len(points)), pa.uint64()),
        "cell_id": ids.take(pa.array(np.where(owners < 0, len(cells.ids), owners))),
        "overlaps_nucleus": pa.array(in_nucleus.astype(np.uint8)),
        "feature_name": names.take(pa.array(drawn.features)),
        "x_location": pa.array(points[:, 0].astype(np.float32)),
        "y_location": pa.array(points[:, 1].astype(np.float32)),
        "z_location": pa.array(depths.astype(np.float32)),
        "qv": pa.array(drawn.qualities),
    }
    if cells.version in ("3.0", "4.0"):
        kinds = pa.array([CATEGORIES[kind] for kind in features])
        columns["codeword_category"] = kinds.take(pa.array(drawn.features))
        columns["is_gene"] = pa.array((features == GENE).to_numpy()[drawn.features])
    return pa.table(columns)


# --------------------------------------------------------------------------------------------------
# other files


def _write_matrix(
    path: Path, counts: sp.csr_matrix, features: pd.Series, proteins: pd.DataFrame | None, cells: Cells
) -> None:
    about: dict[str, Any] = {"software_version": f"xenium-{cells.version}.0", "chemistry_description": "Xenium"}
    if proteins is not None:
        about["protein_scaling_factor"] = PROTEIN_SCALE
        scaled = sp.csr_matrix(np.rint(proteins.to_numpy() * PROTEIN_SCALE).astype(np.int32))
        counts = sp.csr_matrix(sp.hstack([counts, scaled]))
        features = pd.concat([features, pd.Series(PROTEIN, index=proteins.columns)])
    kinds = features.to_list()
    write_10x_h5(path, counts, cells.barcodes, features.index, attributes=about, feature_types=kinds)


def _write_experiment(path: Path, version: str, pixel_um: float, cells: Cells, n_counts: int) -> None:
    experiment = {
        "run_name": "synthetic",
        "region_name": path.name,
        "num_cells": len(cells.ids),
        "transcripts_per_cell": n_counts // max(1, len(cells.ids)),
        "panel_name": "synthetic",
        "pixel_size": pixel_um,
        "z_step_size": 3.0,
        "analysis_sw_version": f"xenium-{version}.0.1",
        "images": {"morphology_focus_filepath": _morphology_name(version)},
    }
    (path / "experiment.xenium").write_text(json.dumps(experiment, indent=4))


def _morphology_name(version: str) -> str:
    if version == "1.0":
        return "morphology_focus.ome.tif"
    return f"morphology_focus/{'ch0000_dapi' if version == '4.0' else 'morphology_focus_0000'}.ome.tif"


def _write_images(path: Path, painter: DapiPainter, version: str, stain_seed: int | None) -> None:
    file = path / _morphology_name(version)
    file.parent.mkdir(exist_ok=True)
    sizes = {f"PhysicalSize{axis}": painter.pixel_um for axis in "XY"}
    units = {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    write_ome_pyramid(
        file,
        painter.strips(),
        shape=(painter.size, painter.size),
        dtype=np.uint16,
        metadata={"axes": "YX", **sizes, **units, **({} if version == "1.0" else {"Channel": {"Name": ["DAPI"]}})},
        options={"compression": "zlib", "compressionargs": {"level": 1}, "predictor": True},
    )
    tissue = painter.tissue
    write_ome_pyramid(
        path / "he_image.ome.tif",
        paint(tissue, reach=REACH, stain=make_stain(stain_seed), strip=TILE, nuclei=painter.nuclei),
        shape=(tissue.size, tissue.size, 3),
        dtype=np.uint8,
        metadata={"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP, **units},
        options={"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 92}},
    )
