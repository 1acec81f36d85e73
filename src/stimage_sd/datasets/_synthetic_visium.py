"""Synthetic Visium section in the format of Space Ranger, with known truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import tifffile

from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint
from stimage_sd.datasets._truth import check_folder, draw_genes, draw_spot_counts

#: micrometers per pixel
MPP = 0.5
PITCH_UM = 100.0
#: diameter meant by ``spot_diameter_fullres`` of Space Ranger, µm
NOMINAL_SPOT_UM = 65.0
FIDUCIAL_UM = 105.0
#: longest side of the high- and low-resolution images, px
HIRES, LOWRES = 2000, 600
#: side of the tiles of the full-resolution TIFF, and rows painted per strip, px
TILE = 512
#: smallest free margin around the tissue, as a share of the distance from center to border
MARGIN = 0.04


def synthetic_visium(
    path: str | Path,
    *,
    n_spots: int = 300,
    n_genes: int = 60,
    image_size: int | None = None,
    sample: str = "synthetic",
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
) -> Path:
    """Write a synthetic Visium section in the format of Space Ranger, with its full-resolution H&E.

    Three smooth random fields drive the picture of the tissue and the counts: density of nuclei, size of nuclei, and
    share of stroma. Genes ``SIGNAL...`` have negative binomial counts. Their log mean is linear in the fields at the
    center of the spot. A third of the genes, ``NOISE...``, do not depend on the fields. Two sections with the same
    `gene_seed` and different `seed` are two tissues with the same genes.

    Parameters
    ----------
    path
        Folder to write. Created if missing, otherwise it has to be empty.
    n_spots
        Number of spots in tissue.
    n_genes
        Number of genes. A third of the genes are noise.
    image_size
        Side of the square image, px. By default large enough for `n_spots`.
    sample
        Library id in the matrix.
    seed
        Seed of the tissue and the counts.
    gene_seed
        Seed of the dependence of genes on the tissue.
    stain_seed
        Seed of the staining. By default the standard staining.

    Returns
    -------
    The folder, with these files:

    - ``filtered_feature_bc_matrix.h5``;
    - ``spatial/``: ``tissue_positions.csv``, ``scalefactors_json.json``, ``tissue_hires_image.png`` and
      ``tissue_lowres_image.png``;
    - ``image.tif``: full resolution, 0.5 µm per pixel, with spots of 55 µm at a hexagonal pitch of 100 µm;
    - ``truth_spots.csv``: one row per spot in tissue, with the three fields, 0 to 1, and ``size_factor``;
    - ``truth_genes.csv``: one row per gene, with ``intercept``, one coefficient per field, and ``dispersion``, the r of
      NB(r, p). A coefficient is per standard deviation of the field from 0.5.

    Raises
    ------
    ValueError
        If there is less than one spot or fewer than three genes, or `image_size` is too small for `n_spots`.
    FileExistsError
        If `path` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> run = synthetic_visium(Path(tempfile.mkdtemp()) / "run", n_spots=20, n_genes=9)
    >>> sorted(entry.name for entry in run.iterdir())[:3]
    ['filtered_feature_bc_matrix.h5', 'image.tif', 'spatial']
    """
    if n_spots < 1 or n_genes < 3:
        raise ValueError(f"Expected `n_spots` >= 1 and `n_genes` >= 3, found {n_spots} and {n_genes}.")
    path = check_folder(path)
    tissue, positions, reach = _place(n_spots, image_size, seed)
    genes = draw_genes(n_genes, gene_seed)
    inside = positions[positions["in_tissue"] == 1]
    centers = inside[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=float)
    spots, counts = draw_spot_counts(tissue, centers, inside.index, genes, seed)

    spatial = path / "spatial"
    spatial.mkdir(parents=True, exist_ok=True)
    about = {
        "chemistry_description": "Spatial 3' v1",
        "software_version": "spaceranger-2.0.0",
        "library_ids": np.array([sample.encode()]),
        "original_gem_groups": np.array([1]),
    }
    write_10x_h5(path / "filtered_feature_bc_matrix.h5", counts, spots.index, genes.index, attributes=about)
    positions.to_csv(spatial / "tissue_positions.csv")
    spots.to_csv(path / "truth_spots.csv")
    genes.to_csv(path / "truth_genes.csv")
    _write_images(path, tissue, reach, stain_seed)
    return path


def _place(n_spots: int, image_size: int | None, seed: int) -> tuple[Tissue, pd.DataFrame, float]:
    """Return the tissue, the positions of the array, and the eccentricity of an outline around `n_spots` spots."""
    pitch = PITCH_UM / MPP
    size = image_size if image_size is not None else int(np.sqrt(n_spots) * pitch + 2 * pitch) // TILE * TILE + TILE
    while True:
        tissue = Tissue(size, MPP, seed)
        positions = _array_positions(size, pitch)
        out = tissue.eccentricity(positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=float))
        if len(out) > n_spots:
            reach = float(np.sort(out)[n_spots - 1 : n_spots + 1].mean())
            if reach < 1.0 - MARGIN:
                positions["in_tissue"] = (out < reach).astype(int)
                return tissue, positions, reach
        if image_size is not None:
            raise ValueError(
                f"Expected an image large enough for {n_spots} spots, found `image_size={image_size}`. Pass a larger "
                "`image_size`, fewer spots, or leave `image_size` out."
            )
        size += TILE


def _array_positions(size: int, pitch: float) -> pd.DataFrame:
    """Return the hexagonal array that covers an image. Odd rows are shifted right by half a pitch."""
    step_y, step_x = pitch * np.sqrt(3.0) / 2.0, pitch / 2.0
    rows, columns = np.indices((int((size - pitch) // step_y) + 1, int((size - pitch) // step_x) + 1))
    staggered = rows % 2 == columns % 2
    row, column = rows[staggered], columns[staggered]
    frame = pd.DataFrame(
        {
            "in_tissue": 0,
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": np.rint(pitch / 2.0 + row * step_y).astype(int),
            "pxl_col_in_fullres": np.rint(pitch / 2.0 + column * step_x).astype(int),
        },
        index=pd.Index(_barcodes(len(row)), name="barcode"),
    )
    return frame.sort_index()


def _barcodes(n_barcodes: int) -> list[str]:
    """Return distinct 16-base barcodes, the same in all sections, as on real arrays."""
    generator = np.random.default_rng(10)
    codes: dict[str, None] = {}
    while len(codes) < n_barcodes:
        letters = generator.integers(0, 4, 16)
        codes["".join("ACGT"[letter] for letter in letters) + "-1"] = None
    return list(codes)


def _write_images(path: Path, tissue: Tissue, reach: float, stain_seed: int | None) -> None:
    """Paint the tissue once into a tiled TIFF, and collect the two small images from the same strips."""
    # A power of two divides the strip, so each strip is reduced on its own. Space Ranger uses exactly 2,000 px.
    factor = 1 << max(0, int(np.ceil(np.log2(tissue.size / HIRES))))
    reduced: list[np.ndarray] = []

    def tiles() -> Iterator[np.ndarray]:
        for rows in paint(tissue, reach=reach, stain=make_stain(stain_seed), strip=TILE):
            whole = rows[: rows.shape[0] // factor * factor, : tissue.size // factor * factor]
            reduced.append(
                cv2.resize(whole, (whole.shape[1] // factor, whole.shape[0] // factor), interpolation=cv2.INTER_AREA)
            )
            for top in range(0, rows.shape[0], TILE):
                for left in range(0, tissue.size, TILE):
                    yield np.ascontiguousarray(rows[top : top + TILE, left : left + TILE])

    tifffile.imwrite(
        path / "image.tif",
        tiles(),
        shape=(tissue.size, tissue.size, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 92},
        resolution=(1e4 / MPP, 1e4 / MPP),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    hires = np.concatenate(reduced)
    low_side = min(LOWRES, hires.shape[0])
    lowres = cv2.resize(hires, (low_side, low_side), interpolation=cv2.INTER_AREA)
    for name, picture in (("hires", hires), ("lowres", lowres)):
        cv2.imwrite(str(path / "spatial" / f"tissue_{name}_image.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    scalefactors = {
        "spot_diameter_fullres": NOMINAL_SPOT_UM / MPP,
        "tissue_hires_scalef": 1.0 / factor,
        "fiducial_diameter_fullres": FIDUCIAL_UM / MPP,
        "tissue_lowres_scalef": low_side / hires.shape[0] / factor,
    }
    (path / "spatial" / "scalefactors_json.json").write_text(json.dumps(scalefactors))
