"""Synthetic Visium HD section in the format of Space Ranger, with known truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from stimage_sd.datasets._pyramid_writer import STRIP, write_pyramid
from stimage_sd.datasets._synthetic_xenium import BLOCK_DISPERSION, BLOCK_UM
from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint
from stimage_sd.datasets._truth import check_folder, draw_genes, log_mean

#: micrometers per pixel of the H&E
MPP = 0.5
#: `Tissue.eccentricity` of the outline of the tissue
REACH = 0.92
#: pitch of the barcode squares on the slide, µm; all bins are made of these squares
SLIDE_UM = 2
#: longest side of the high- and low-resolution images, px
HIRES, LOWRES = 6000, 600
FIDUCIAL_UM = 330.0
#: counts drawn per block
BATCH = 2_000_000
VERSION = "4.0.1"


def synthetic_visium_hd(
    path: str | Path,
    *,
    size_um: float = 1000.0,
    n_genes: int = 60,
    rotation_degrees: float = 3.0,
    bins: Sequence[int] = (8, 16),
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
) -> Path:
    """Write a synthetic Visium HD section in the format of Space Ranger, with its full-resolution H&E.

    Tissue and genes are the same as in `stimage_sd.datasets.synthetic_visium`. Genes with the same `gene_seed` depend
    on the tissue in the same way. Within any circle of 55 µm, the counts of the bins have the mean of a Visium spot at
    the same position, and about the same variance. With equal `seed` and `size_um`, tissue and H&E are the same as in
    `synthetic_xenium`.

    Parameters
    ----------
    path
        Folder to write. Created if missing, otherwise it has to be empty.
    size_um
        Side of the square H&E, µm, rounded up to whole tiles. The array of the slide has about the same size.
    n_genes
        Number of genes. A third of the genes, ``NOISE...``, do not depend on the tissue.
    rotation_degrees
        Rotation of the array around the center of the H&E, from x toward y, degrees.
    bins
        Sides of the bins, µm. All sides are even, and multiples of the smallest side.
    seed
        Seed of the tissue and the counts.
    gene_seed
        Seed of the dependence of genes on the tissue.
    stain_seed
        Seed of the staining of the H&E. By default the standard staining.

    Returns
    -------
    The folder, with these files:

    - ``binned_outputs/square_008um`` and so on: ``filtered_feature_bc_matrix.h5``, ``raw_feature_bc_matrix.h5`` and
      ``spatial/``;
    - ``feature_slice.h5``: description, features and masks, without the slices;
    - ``image.tif``: full resolution, 0.5 µm per pixel;
    - ``truth_genes.csv``: as in `synthetic_visium`;
    - ``truth_tissue.json``: ``size``, ``mpp``, ``seed``, ``reach`` and ``rotation_degrees``.

    Raises
    ------
    ValueError
        If there are fewer than three genes, the section is smaller than 100 µm, the rotation is not finite, or a side
        in `bins` is odd or not a multiple of the smallest side.
    FileExistsError
        If `path` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> run = synthetic_visium_hd(Path(tempfile.mkdtemp()) / "run", size_um=250.0, n_genes=9)
    >>> sorted(entry.name for entry in (run / "binned_outputs").iterdir())
    ['square_008um', 'square_016um']
    """
    if n_genes < 3 or not size_um >= 100.0 or not np.isfinite(rotation_degrees):
        raise ValueError(
            f"Expected `n_genes` >= 3, `size_um` >= 100 and a finite `rotation_degrees`, found {n_genes}, {size_um} "
            f"and {rotation_degrees}."
        )
    sides = sorted(set(bins))
    if not sides or any(side < SLIDE_UM or side % SLIDE_UM or side % sides[0] for side in sides):
        raise ValueError(
            f"Expected `bins` to be even and multiples of the smallest, such as (8, 16), found {tuple(bins)}."
        )
    path = check_folder(path)
    tissue = Tissue(int(np.ceil(size_um / MPP / STRIP)) * STRIP, MPP, seed)
    array = _Array.cover(tissue, np.lcm.reduce(sides), rotation_degrees)
    genes = draw_genes(n_genes, gene_seed)

    path.mkdir(parents=True, exist_ok=True)
    in_tissue, counts = _draw_bins(tissue, genes, array, sides[0])
    hires = write_pyramid(
        path / "image.tif",
        paint(tissue, reach=REACH, stain=make_stain(stain_seed), strip=STRIP),
        size=tissue.size,
        mpp=MPP,
    )
    for side in sides:
        parents = _parents(array, sides[0], side)
        inside = np.asarray(parents @ in_tissue > 0)
        _write_bins(path, array, side, inside, sp.csr_matrix(parents @ counts), genes.index, hires, tissue.size)
    _write_slide(path / "feature_slice.h5", array, genes.index, in_tissue, sides[0])
    genes.to_csv(path / "truth_genes.csv")
    about = {"size": tissue.size, "mpp": MPP, "seed": seed, "reach": REACH, "rotation_degrees": rotation_degrees}
    (path / "truth_tissue.json").write_text(json.dumps(about))
    return path


@dataclass(frozen=True)
class _Array:
    """Square array of barcodes on the slide, and its position on the H&E.

    - `um`: side of the array, µm.
    - `to_image`: ``(3, 3)`` matrix from micrometers along columns and rows to pixels of the H&E.
    """

    um: int
    to_image: np.ndarray

    @classmethod
    def cover(cls, tissue: Tissue, whole: int, rotation_degrees: float) -> _Array:
        """Return an array centered on the H&E, with the size of the H&E rounded up to whole bins."""
        um = int(np.ceil(tissue.size * tissue.mpp / whole)) * int(whole)
        angle = np.radians(rotation_degrees)
        linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / tissue.mpp
        shift = tissue.size / 2.0 - linear @ np.full(2, um / 2.0)
        return cls(um, np.vstack([np.column_stack([linear, shift]), [0.0, 0.0, 1.0]]))

    def lattice(self, side: int) -> np.ndarray:
        """Return row and column of all bins, ``(n, 2)``."""
        return np.indices((self.um // side, self.um // side)).reshape(2, -1).T

    def centers(self, side: int, lattice: np.ndarray) -> np.ndarray:
        """Return the centers of bins, ``(n, 2)`` x, y, px."""
        return (lattice[:, ::-1] + 0.5) * side @ self.to_image[:2, :2].T + self.to_image[:2, 2]


def _draw_bins(tissue: Tissue, genes: pd.DataFrame, array: _Array, side: int) -> tuple[np.ndarray, sp.csr_matrix]:
    """Return which of the smallest bins are in tissue, and draw their counts in bands of rows."""
    generator = np.random.default_rng([tissue.seed, 34])
    n_blocks = int(np.ceil(tissue.size * tissue.mpp / BLOCK_UM))
    # A gamma mixture of Poisson counts is negative binomial. Bins in a block of the area of a spot share one gamma.
    shape = BLOCK_DISPERSION * genes["dispersion"].to_numpy()
    gammas = generator.gamma(shape, 1.0 / shape, (n_blocks**2, len(genes)))
    lattice = array.lattice(side)
    inside = np.zeros(len(lattice), dtype=bool)
    parts: list[sp.csr_matrix] = []
    for band in np.array_split(np.arange(len(lattice)), len(lattice) * len(genes) // BATCH + 1):
        centers = array.centers(side, lattice[band])
        inside[band] = (tissue.eccentricity(centers) < REACH) & ((centers >= 0) & (centers < tissue.size)).all(axis=1)
        chosen = np.flatnonzero(inside[band])
        columns, rows = (centers[chosen] * tissue.mpp // BLOCK_UM).astype(int).T
        # A block has the area of a spot, so a bin gets its share of the block area of the mean.
        means = np.exp(log_mean(tissue, centers[chosen], genes)) * side**2 / BLOCK_UM**2
        drawn = sp.csr_matrix(generator.poisson(means * gammas[rows * n_blocks + columns]), dtype=np.int32)
        # Bins outside tissue have no counts, so their rows are empty.
        filled = np.zeros(len(band) + 1, dtype=np.int64)
        filled[chosen + 1] = np.diff(drawn.indptr)
        drawn = sp.csr_matrix((drawn.data, drawn.indices, filled.cumsum()), shape=(len(band), len(genes)))
        parts.append(drawn)
    return inside, sp.vstack(parts, format="csr")


def _parents(array: _Array, smallest: int, side: int) -> sp.csr_matrix:
    """Return a matrix with 1 where a smallest bin belongs to a bin of a larger side."""
    lattice = array.lattice(smallest) // (side // smallest)
    parent = lattice[:, 0] * (array.um // side) + lattice[:, 1]
    shape = ((array.um // side) ** 2, len(parent))
    return sp.csr_matrix((np.ones(len(parent), np.int32), (parent, np.arange(len(parent)))), shape=shape)


# --------------------------------------------------------------------------------------------------
# files


def _write_bins(
    path: Path,
    array: _Array,
    side: int,
    inside: np.ndarray,
    counts: sp.csr_matrix,
    genes: pd.Index,
    picture: np.ndarray,
    size: int,
) -> None:
    folder = path / "binned_outputs" / f"square_{side:03d}um"
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    lattice = array.lattice(side)
    centers = array.centers(side, lattice)
    barcodes = pd.Index([f"s_{side:03d}um_{row:05d}_{column:05d}-1" for row, column in lattice.tolist()])
    about = {
        "chemistry_description": "Visium HD v1",
        "software_version": f"spaceranger-{VERSION}",
        "library_ids": np.array([b"synthetic"]),
        "original_gem_groups": np.array([1]),
    }
    write_10x_h5(folder / "raw_feature_bc_matrix.h5", counts, barcodes, genes, attributes=about)
    write_10x_h5(folder / "filtered_feature_bc_matrix.h5", counts[inside], barcodes[inside], genes, attributes=about)
    columns = {
        "barcode": barcodes.to_list(),
        "in_tissue": inside.astype(np.int64),
        "array_row": lattice[:, 0],
        "array_col": lattice[:, 1],
        "pxl_row_in_fullres": centers[:, 1],
        "pxl_col_in_fullres": centers[:, 0],
    }
    pq.write_table(pa.table(columns), spatial / "tissue_positions.parquet")
    scales: dict[str, float] = {}
    for name, longest in (("hires", HIRES), ("lowres", LOWRES)):
        reduced = min(longest, picture.shape[0])
        small = cv2.resize(picture, (reduced, reduced), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(spatial / f"tissue_{name}_image.png"), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        scales[f"tissue_{name}_scalef"] = reduced / size
    scales |= {
        "spot_diameter_fullres": side / MPP,
        "bin_size_um": float(side),
        "microns_per_pixel": MPP,
        "regist_target_img_scalef": scales["tissue_hires_scalef"],
        "fiducial_diameter_fullres": FIDUCIAL_UM / MPP,
    }
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales))


def _write_slide(path: Path, array: _Array, genes: pd.Index, in_tissue: np.ndarray, smallest: int) -> None:
    """Write ``feature_slice.h5``: the array of 2 µm squares, and its position on the images."""
    # Whole numbers are the centers of the squares. Number 0 is half a pitch from the corner of the array.
    centered = np.array([[SLIDE_UM, 0.0, SLIDE_UM / 2.0], [0.0, SLIDE_UM, SLIDE_UM / 2.0], [0.0, 0.0, 1.0]])
    to_microscope = array.to_image @ centered
    inverse = np.linalg.inv(to_microscope)
    n_squares = array.um // SLIDE_UM
    layout = {
        "file_format": "1.0",
        "slide_uid": "synthetic",
        "transform": centered.tolist(),
        "spot_pitch": float(SLIDE_UM),
    }
    about = {
        "sample_id": "synthetic",
        "sample_desc": "",
        "nrows": n_squares,
        "ncols": n_squares,
        "slide_name": "synthetic",
        "spot_pitch": float(SLIDE_UM),
        "hd_layout_json": json.dumps(layout),
        # A synthetic section uses the microscope image as the CytAssist image.
        "transform_matrices": {
            "spot_colrow_to_microscope_colrow": to_microscope.tolist(),
            "microscope_colrow_to_spot_colrow": inverse.tolist(),
            "spot_colrow_to_cytassist_colrow": to_microscope.tolist(),
            "cytassist_colrow_to_spot_colrow": inverse.tolist(),
        },
    }
    lattice = array.lattice(smallest)[in_tissue]
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "feature_slice"
        file.attrs["version"] = "0.1.0"
        file.attrs["software_version"] = f"spaceranger-{VERSION}"
        file.attrs["metadata_json"] = json.dumps(about)
        file["features/name"] = genes.to_numpy().astype("S")
        mask = file.create_group(f"masks/square_{smallest:03d}um")
        for name, values in (("row", lattice[:, 0]), ("col", lattice[:, 1]), ("data", np.ones(len(lattice)))):
            mask[name] = values.astype(np.uint32)
