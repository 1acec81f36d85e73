"""A synthetic Visium section in Space Ranger's own format, whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import tifffile

from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint

#: micrometres a pixel
MPP = 0.5
SPOT_UM = 55.0
PITCH_UM = 100.0
#: what Space Ranger's ``spot_diameter_fullres`` stands for, µm
NOMINAL_SPOT_UM = 65.0
FIDUCIAL_UM = 105.0
#: longest side of Space Ranger's two small images, px
HIRES, LOWRES = 2000, 600
#: side of the tiles of the full-resolution TIFF, and rows painted at a time, px
TILE = 512
FIELDS = ("density", "size", "stroma")
#: the largest tissue leaves this part of the way to the image's border free
MARGIN = 0.04


def synthetic_visium(
    path: str | Path,
    *,
    n_spots: int = 300,
    n_genes: int = 60,
    image_size: int | None = None,
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
    sample: str = "synthetic",
) -> Path:
    """Write a synthetic Visium section, as Space Ranger writes one, with its full-resolution H&E.

    Three smooth random fields, the density of nuclei, their size and the share of stroma, are what the
    tissue is drawn from and what drives the counts. Genes ``SIGNAL...`` have negative binomial counts whose
    log mean is linear in the fields at the spot's centre; a third of the genes, ``NOISE...``, do not depend
    on them. Two sections of one `gene_seed` and different `seed` are two tissues with the same genes.

    Parameters
    ----------
    path
        Folder to write; made where it is not there, and then to be empty.
    n_spots
        Spots in tissue.
    n_genes
        Genes, a third of them noise.
    image_size
        Side of the square image, px; as large as `n_spots` need unless given.
    seed
        Decides tissue and counts.
    gene_seed
        Decides how genes depend on the tissue.
    stain_seed
        Decides the staining; the standard one unless given.
    sample
        Library id in the matrix.

    Returns
    -------
    The folder, with ``filtered_feature_bc_matrix.h5``, ``spatial/`` (``tissue_positions.csv``,
    ``scalefactors_json.json``, ``tissue_hires_image.png``, ``tissue_lowres_image.png``), the
    full-resolution ``image.tif`` (0.5 µm a pixel; spots of 55 µm at a hexagonal pitch of 100 µm) and the
    truth: ``truth_spots.csv`` (a row a spot in tissue: the three fields, 0 to 1, and ``size_factor``) and
    ``truth_genes.csv`` (a row a gene: ``intercept``, a coefficient a field, as of its deviation from 0.5
    in standard deviations, and ``dispersion``, the r of NB(r, p)).

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
    path = Path(path).expanduser()
    if n_spots < 1 or n_genes < 3:
        raise ValueError(f"Expected `n_spots` >= 1 and `n_genes` >= 3, found {n_spots} and {n_genes}.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"Expected an empty or new folder, found something at {path}. Choose another, or empty it."
        )
    tissue, positions, reach = _place(n_spots, image_size, seed)
    genes = _draw_genes(n_genes, gene_seed)
    spots, counts = _draw_counts(tissue, positions[positions["in_tissue"] == 1], genes, seed)

    spatial = path / "spatial"
    spatial.mkdir(parents=True, exist_ok=True)
    _write_matrix(path / "filtered_feature_bc_matrix.h5", counts, spots.index, genes.index, sample)
    positions.to_csv(spatial / "tissue_positions.csv")
    spots.to_csv(path / "truth_spots.csv")
    genes.to_csv(path / "truth_genes.csv")
    _write_images(path, tissue, reach, stain_seed)
    return path


def _place(n_spots: int, image_size: int | None, seed: int) -> tuple[Tissue, pd.DataFrame, float]:
    """Return the tissue, the array's positions, and the eccentricity inside of which `n_spots` of them lie."""
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
                "one, fewer spots, or leave it out."
            )
        size += TILE


def _array_positions(size: int, pitch: float) -> pd.DataFrame:
    """Return the hexagonal array that covers an image: odd rows sit half a pitch to the right."""
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


def _barcodes(number: int) -> list[str]:
    """Make distinct 16-base barcodes, the same ones always, as the array's are."""
    generator = np.random.default_rng(10)
    codes: dict[str, None] = {}
    while len(codes) < number:
        letters = generator.integers(0, 4, 16)
        codes["".join("ACGT"[letter] for letter in letters) + "-1"] = None
    return list(codes)


def _draw_genes(n_genes: int, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng([seed, 20])
    n_noise = n_genes // 3
    n_signal = n_genes - n_noise
    # One field leads in each gene, in turn, and the others have a minor part.
    coefficients = generator.normal(0.0, 0.15, (n_signal, len(FIELDS)))
    leading = np.arange(n_signal) % len(FIELDS)
    signs = generator.choice([-1.0, 1.0], n_signal)
    coefficients[np.arange(n_signal), leading] = signs * generator.uniform(0.5, 1.0, n_signal)
    names = [f"SIGNAL{number:03d}" for number in range(1, n_signal + 1)]
    names += [f"NOISE{number:03d}" for number in range(1, n_noise + 1)]
    frame = pd.DataFrame(
        np.vstack([coefficients, np.zeros((n_noise, len(FIELDS)))]),
        columns=list(FIELDS),
        index=pd.Index(names, name="gene"),
    )
    frame.insert(0, "intercept", generator.uniform(1.0, 3.5, n_genes))
    frame["dispersion"] = generator.uniform(4.0, 20.0, n_genes)
    return frame


def _draw_counts(
    tissue: Tissue, positions: pd.DataFrame, genes: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, sp.csr_matrix]:
    """Return the truth a spot, and its counts, spots × genes."""
    generator = np.random.default_rng([seed, 21])
    centres = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=float)
    spots = pd.DataFrame({name: tissue.at(name, centres) for name in FIELDS}, index=positions.index)
    spots["size_factor"] = np.exp(generator.normal(0.0, 0.15, len(spots)))
    # A field is uniform on 0 to 1: its standard deviation is the root of 1 / 12.
    standardised = (spots[list(FIELDS)].to_numpy() - 0.5) * np.sqrt(12.0)
    log_mean = genes["intercept"].to_numpy() + standardised @ genes[list(FIELDS)].to_numpy().T
    mean = spots["size_factor"].to_numpy()[:, None] * np.exp(log_mean)
    dispersion = genes["dispersion"].to_numpy()
    return spots, sp.csr_matrix(
        generator.negative_binomial(dispersion, dispersion / (dispersion + mean)), dtype=np.int32
    )


def _write_matrix(path: Path, counts: sp.csr_matrix, barcodes: pd.Index, genes: pd.Index, sample: str) -> None:
    """Write a feature-barcode matrix of version 3: genes × spots by columns, which is spots × genes by rows."""
    counts.sort_indices()
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["chemistry_description"] = "Spatial 3' v1"
        file.attrs["software_version"] = "spaceranger-2.0.0"
        file.attrs["library_ids"] = np.array([sample.encode()])
        file.attrs["original_gem_groups"] = np.array([1])
        matrix = file.create_group("matrix")
        matrix["barcodes"] = barcodes.to_numpy().astype("S")
        matrix["data"] = counts.data.astype(np.int32)
        matrix["indices"] = counts.indices.astype(np.int64)
        matrix["indptr"] = counts.indptr.astype(np.int64)
        matrix["shape"] = np.array([counts.shape[1], counts.shape[0]], dtype=np.int32)
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["feature_type"] = np.full(len(genes), b"Gene Expression")
        features["genome"] = np.full(len(genes), b"synthetic")
        features["id"] = np.array([f"SYNG{number:011d}".encode() for number in range(1, len(genes) + 1)])
        features["name"] = genes.to_numpy().astype("S")


def _write_images(path: Path, tissue: Tissue, reach: float, stain_seed: int | None) -> None:
    """Paint the tissue once, into a tiled TIFF, and gather the two small images as it passes by."""
    # A power of two, which divides a strip: strips are reduced by themselves. Space Ranger's are 2,000 px exactly.
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
