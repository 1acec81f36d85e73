"""Synthetic Visium HD sections: the vendor's format, a truth that can be found again, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import tifffile
from scipy.spatial import cKDTree

from stimage_sd import contract, pp
from stimage_sd.datasets import synthetic_visium, synthetic_visium_hd, synthetic_xenium
from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import SPOT_UM, log_mean
from stimage_sd.io import visium_hd


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_visium_hd(tmp_path_factory.mktemp("synthetic") / "run", size_um=1000.0, n_genes=30, seed=3)


def read_bins(run: Path, side: int, *, which: str = "filtered") -> tuple[sp.csr_matrix, pd.DataFrame]:
    folder = run / "binned_outputs" / f"square_{side:03d}um"
    table = scanpy.read_10x_h5(folder / f"{which}_feature_bc_matrix.h5")
    positions = pd.read_parquet(folder / "spatial" / "tissue_positions.parquet").set_index("barcode")
    return sp.csr_matrix(table.X), positions.loc[table.obs_names]


def truth(run: Path) -> tuple[Tissue, pd.DataFrame]:
    about = json.loads((run / "truth_tissue.json").read_text())
    return Tissue(about["size"], about["mpp"], about["seed"]), pd.read_csv(run / "truth_genes.csv", index_col="gene")


def test_the_folder_has_the_files_of_space_ranger(run: Path) -> None:
    files = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    in_bin = ["filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5"]
    names = ["tissue_positions.parquet", "scalefactors_json.json", "tissue_hires_image.png", "tissue_lowres_image.png"]
    in_bin += [f"spatial/{name}" for name in names]
    expected = {f"binned_outputs/square_{side}um/{name}" for side in ("008", "016") for name in in_bin}
    assert files == expected | {"feature_slice.h5", "image.tif", "truth_genes.csv", "truth_tissue.json"}


def test_the_raw_matrix_has_every_bin_of_the_array_and_the_filtered_one_those_in_tissue(run: Path) -> None:
    raw, everywhere = read_bins(run, 8, which="raw")
    filtered, inside = read_bins(run, 8)
    assert len(everywhere) == raw.shape[0] == 128**2
    np.testing.assert_array_equal(inside.index, everywhere.index[everywhere["in_tissue"] == 1])
    assert raw.sum() == filtered.sum()
    tissue, _ = truth(run)
    out = tissue.eccentricity(everywhere[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy())
    np.testing.assert_array_equal(out < 0.92, everywhere["in_tissue"] == 1)


def test_bins_of_16_um_are_the_sums_of_those_of_8_um(run: Path) -> None:
    fine, fine_at = read_bins(run, 8, which="raw")
    coarse, coarse_at = read_bins(run, 16, which="raw")
    sums = np.zeros((64, 64, 30))
    np.add.at(sums, (fine_at["array_row"] // 2, fine_at["array_col"] // 2), fine.toarray())
    np.testing.assert_array_equal(coarse.toarray(), sums[coarse_at["array_row"], coarse_at["array_col"]])
    middles = fine_at.groupby([fine_at["array_row"] // 2, fine_at["array_col"] // 2]).mean()
    pixels = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    ordered = coarse_at.set_index(["array_row", "array_col"]).loc[list(middles.index), pixels]
    np.testing.assert_allclose(ordered, middles[pixels], atol=1e-9)


def test_the_slides_transformation_maps_its_squares_to_the_bins(run: Path) -> None:
    _, positions = read_bins(run, 8, which="raw")
    with h5py.File(run / "feature_slice.h5") as file:
        about = json.loads(file.attrs["metadata_json"])
        mask = file["masks/square_008um"]
        covered = set(zip(mask["row"][:].tolist(), mask["col"][:].tolist(), strict=True))
    matrix = np.array(about["transform_matrices"]["spot_colrow_to_microscope_colrow"])
    # A bin of 8 µm is 4 x 4 squares of 2 µm, of which the second and third are 1.5 from the first's center.
    at = 4 * positions[["array_col", "array_row"]].to_numpy() + 1.5
    mapped = np.column_stack([at, np.ones(len(at))]) @ matrix.T
    np.testing.assert_allclose(mapped[:, :2], positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]], atol=1e-9)
    inside = positions[positions["in_tissue"] == 1]
    assert covered == set(zip(inside["array_row"], inside["array_col"], strict=True))


def test_the_array_is_turned_by_the_angle_that_was_asked_for(tmp_path: Path) -> None:
    turned = synthetic_visium_hd(tmp_path / "run", size_um=250.0, n_genes=3, rotation_degrees=100.0, bins=[16])
    _, positions = read_bins(turned, 16, which="raw")
    by_place = positions.set_index(["array_row", "array_col"])[["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    step = (by_place.loc[(0, 1)] - by_place.loc[(0, 0)]).to_numpy()
    assert np.degrees(np.arctan2(step[1], step[0])) == pytest.approx(100.0)
    assert np.hypot(*step) == pytest.approx(16 / 0.5)
    np.testing.assert_allclose(by_place.mean(), 256.0)


@pytest.mark.slow
def test_image_is_that_of_the_synthetic_xenium(run: Path, tmp_path: Path) -> None:
    xenium = synthetic_xenium(tmp_path / "xenium", size_um=1000.0, n_genes=3, seed=3, pixel_um=1.7)
    ours, theirs = (tifffile.imread(file).astype(float) for file in (run / "image.tif", xenium / "he_image.ome.tif"))
    assert ours.shape == theirs.shape == (2048, 2048, 3)
    # Both went through JPEG.
    assert np.abs(ours - theirs).mean() < 4.0
    with tifffile.TiffFile(run / "image.tif") as tiff:
        assert tiff.pages[0].is_tiled
        resolution = tiff.pages[0].tags["XResolution"].value
    assert 1e4 * resolution[1] / resolution[0] == pytest.approx(0.5)


def test_bins_in_a_spot_sum_to_the_mean_of_a_spot(run: Path) -> None:
    """Closed form: the mean is the intercept and slopes, and a sum over many spots has the variance of its parts."""
    tissue, genes = truth(run)
    counts, positions = read_bins(run, 8)
    centers = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    # One total a gene over the whole tissue: what is expected is the mean of a spot, times the part that a bin is.
    expected = np.exp(log_mean(tissue, centers, genes)) * 8**2 / (np.pi * SPOT_UM**2 / 4.0)
    blocks = (centers * 0.5 // (SPOT_UM * np.sqrt(np.pi) / 2.0)).astype(int)
    _, block = np.unique(blocks, axis=0, return_inverse=True)
    in_block = np.zeros((block.max() + 1, expected.shape[1]))
    np.add.at(in_block, block.ravel(), expected)
    variance = expected.sum(axis=0) + (in_block**2 / (0.45 * genes["dispersion"].to_numpy())).sum(axis=0)
    z = (np.asarray(counts.sum(axis=0)).ravel() - expected.sum(axis=0)) / np.sqrt(variance)
    assert np.abs(z).max() < 4.0
    assert 0.5 < z.std() < 1.6


@pytest.mark.slow
def test_spots_vary_about_as_much_as_those_of_visium(tmp_path: Path) -> None:
    """Pearson residuals of spots have the variance 1 where they are distributed as the truth says."""
    ratios = []
    for seed in range(3):
        folder = synthetic_visium_hd(tmp_path / str(seed), size_um=1500.0, n_genes=30, seed=seed, bins=[8])
        tissue, genes = truth(folder)
        counts, positions = read_bins(folder, 8)
        centers = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
        spots = np.random.default_rng(seed).uniform(0.0, tissue.size, (600, 2))
        spots = spots[tissue.eccentricity(spots) < 0.85]
        members = cKDTree(centers).query_ball_point(spots, SPOT_UM / 2.0 / 0.5)
        means = np.exp(log_mean(tissue, centers, genes)) * 8**2 / (np.pi * SPOT_UM**2 / 4.0)
        mean, sums = (
            np.stack([of_bins[rows].sum(axis=0) for rows in members]) for of_bins in (means, counts.toarray())
        )
        residual = (sums - mean) ** 2 / (mean + mean**2 / genes["dispersion"].to_numpy())
        ratios.append(residual.mean())
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_spots_made_of_bins_follow_the_fields_as_those_of_visium(run: Path) -> None:
    tissue, genes = truth(run)
    sdata = visium_hd(run, image=run / "image.tif")
    pp.aggregate(sdata, "cells", onto="grid")
    table = contract.counts(sdata)
    assert table.n_obs > 30
    # A circle of 55 µm has the area of 37 bins.
    assert table.obs["n_cells"].between(25, 45).mean() > 0.8
    whole = table[table.obs["n_cells"] >= 34]
    expected = np.exp(log_mean(tissue, np.asarray(whole.obsm["spatial"]), genes))
    signal = genes.index.str.startswith("SIGNAL")
    observed = whole.X.toarray()
    correlations = [np.corrcoef(observed[:, gene], expected[:, gene])[0, 1] for gene in np.flatnonzero(signal)]
    assert np.median(correlations) > 0.6
    assert observed.mean() == pytest.approx(expected.mean(), rel=0.1)


def test_genes_of_one_seed_are_those_of_the_synthetic_visium(run: Path, tmp_path: Path) -> None:
    spots = synthetic_visium(tmp_path / "visium", n_spots=10, n_genes=30)
    assert (spots / "truth_genes.csv").read_bytes() == (run / "truth_genes.csv").read_bytes()


def test_the_same_seed_gives_the_same_counts_and_another_one_others(tmp_path: Path) -> None:
    first, again, other = (
        synthetic_visium_hd(tmp_path / name, size_um=250.0, n_genes=6, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    counts = [read_bins(folder, 8, which="raw")[0].toarray() for folder in (first, again, other)]
    np.testing.assert_array_equal(counts[0], counts[1])
    assert (counts[0] != counts[2]).any()
    assert (first / "image.tif").read_bytes() == (again / "image.tif").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_genes": 2}, "n_genes"),
        ({"size_um": 10.0}, "size_um"),
        ({"rotation_degrees": np.nan}, "rotation_degrees"),
        ({"bins": (8, 12)}, "multiples of the smallest"),
        ({"bins": (3,)}, "even"),
        ({"bins": ()}, "multiples of the smallest"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_visium_hd(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="empty"):
        synthetic_visium_hd(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]
