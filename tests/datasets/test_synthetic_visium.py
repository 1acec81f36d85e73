"""Synthetic sections: the vendor's format, a truth that can be found again, the same for the same seed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import spatialdata_io
from scipy import ndimage

from stimage_sd import contract
from stimage_sd.datasets import synthetic_visium
from stimage_sd.datasets._tissue_painter import Tissue, make_stain, paint
from stimage_sd.io import visium

FIELDS = ["density", "size", "stroma"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_visium(tmp_path_factory.mktemp("synthetic") / "run", n_spots=200, n_genes=30, seed=1)


def picture_of(run: Path) -> np.ndarray:
    levels = contract.levels(visium(run, image=run / "image.tif"), "he")
    return np.moveaxis(levels[0].data.compute(), 0, -1)


def test_own_reader(run: Path) -> None:
    sdata = visium(run, image=run / "image.tif")
    table = contract.counts(sdata)
    assert table.shape == (200, 30)
    assert sum(name.startswith("NOISE") for name in table.var_names) == 10
    assert contract.info(sdata)["mpp"] == pytest.approx(0.5, rel=0.005)
    positions = pd.read_csv(run / "spatial" / "tissue_positions.csv")
    assert (positions["in_tissue"] == 0).any()


def test_the_vendors_format_as_spatialdata_io_reads_it(run: Path) -> None:
    theirs = spatialdata_io.visium(run, dataset_id="synthetic", fullres_image_file=run / "image.tif")
    ours = contract.counts(visium(run, image=run / "image.tif"))
    table = theirs.tables["table"][ours.obs_names]
    np.testing.assert_array_equal(table.X.toarray(), ours.X.toarray())
    full = theirs.images["synthetic_full_image"]["scale0"]["image"].data.compute()
    np.testing.assert_array_equal(np.moveaxis(full, 0, -1), picture_of(run))


def test_small_images_are_the_full_one_reduced(run: Path) -> None:
    picture = picture_of(run)
    for name in ("hires", "lowres"):
        small = cv2.imread(str(run / "spatial" / f"tissue_{name}_image.png"))[..., ::-1]
        expected = cv2.resize(picture, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(float) - expected).mean() < 2.0
    assert max(cv2.imread(str(run / "spatial" / "tissue_hires_image.png")).shape) <= 2000


def test_counts_follow_the_true_fields(run: Path) -> None:
    """A linear regression on the fields predicts signal genes and cannot predict noise."""
    truth, genes = pd.read_csv(run / "truth_spots.csv", index_col=0), pd.read_csv(run / "truth_genes.csv", index_col=0)
    table = contract.counts(visium(run, image=run / "image.tif"))
    outcome = np.log1p(table.X.toarray() / truth.loc[table.obs_names, ["size_factor"]].to_numpy())
    inputs = np.column_stack([np.ones(table.n_obs), truth.loc[table.obs_names, FIELDS]])
    fitted = inputs @ np.linalg.lstsq(inputs, outcome, rcond=None)[0]
    correlation = pd.Series(
        [np.corrcoef(fitted[:, gene], outcome[:, gene])[0, 1] for gene in range(table.n_vars)], table.var_names
    )
    signal = correlation[correlation.index.str.startswith("SIGNAL")]
    noise = correlation[correlation.index.str.startswith("NOISE")]
    assert signal.median() > 0.75
    assert signal.min() > 0.4
    assert noise.median() < 0.25
    assert (genes.loc[noise.index, FIELDS] == 0).all().all()


def test_counts_have_the_stated_mean_and_variance(tmp_path: Path) -> None:
    """Over many spots, NB(r, p) with the mean and dispersion of the truth: mean μ, variance μ + μ² / r."""
    run = synthetic_visium(tmp_path / "run", n_spots=600, n_genes=12, seed=5)
    truth, genes = pd.read_csv(run / "truth_spots.csv", index_col=0), pd.read_csv(run / "truth_genes.csv", index_col=0)
    table = contract.counts(visium(run, image=run / "image.tif"))
    standardized = (truth.loc[table.obs_names, FIELDS].to_numpy() - 0.5) * np.sqrt(12.0)
    mean = truth.loc[table.obs_names, ["size_factor"]].to_numpy() * np.exp(
        genes["intercept"].to_numpy() + standardized @ genes[FIELDS].to_numpy().T
    )
    variance = mean + mean**2 / genes["dispersion"].to_numpy()
    residual = (table.X.toarray() - mean) / np.sqrt(variance)
    assert abs(residual.mean()) < 0.05
    assert residual.var() == pytest.approx(1.0, abs=0.1)


def test_the_picture_shows_what_drives_the_counts(run: Path) -> None:
    """Darkness under a spot goes with the nuclei drawn there: density times area."""
    table = contract.counts(visium(run, image=run / "image.tif"))
    truth = pd.read_csv(run / "truth_spots.csv", index_col=0).loc[table.obs_names]
    nuclear = ndimage.uniform_filter((picture_of(run)[..., 0] < 140).astype(np.float32), 221)
    x, y = table.obsm["spatial"].astype(int).T
    covered = (900.0 + 8600.0 * truth["density"]) * (2.3 + 2.6 * truth["size"]) ** 2
    assert np.corrcoef(nuclear[y, x], covered)[0, 1] > 0.8


def test_picture_looks_like_tissue_on_white(run: Path) -> None:
    picture = picture_of(run)
    corner = picture[:60, :60].reshape(-1, 3)
    assert (corner > 230).all()
    positions = contract.counts(visium(run, image=run / "image.tif")).obsm["spatial"].astype(int)
    under = np.concatenate([picture[y - 20 : y + 20, x - 20 : x + 20].reshape(-1, 3) for x, y in positions])
    red, green, blue = under.mean(axis=0)
    assert red > blue > green
    assert (under.mean(axis=1) < 220).mean() > 0.95


@pytest.mark.parametrize("strip", [200, 333, 700])
def test_strips_join_without_a_seam(strip: int) -> None:
    tissue, stain = Tissue(700, 0.5, 0), make_stain(None)
    whole = np.concatenate(list(paint(tissue, reach=0.9, stain=stain, strip=700)))
    joined = np.concatenate(list(paint(tissue, reach=0.9, stain=stain, strip=strip)))
    assert joined.shape == whole.shape == (700, 700, 3)
    # Interpolation by OpenCV rounds differently at another offset.
    assert np.abs(joined.astype(int) - whole).max() <= 3


def digests(run: Path) -> dict[str, str]:
    # HDF5 files carry no dates, so that they too are the same byte for byte.
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        digests(synthetic_visium(tmp_path / name, n_spots=20, n_genes=6, seed=seed))
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert first == second
    same = {name for name in first if first[name] == other[name]}
    assert same <= {"truth_genes.csv", "spatial/scalefactors_json.json"}


def test_stain_changes_the_picture_and_nothing_else(tmp_path: Path) -> None:
    plain = synthetic_visium(tmp_path / "a", n_spots=20, n_genes=6)
    stained = synthetic_visium(tmp_path / "b", n_spots=20, n_genes=6, stain_seed=3)
    before, after = digests(plain), digests(stained)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"image.tif", "spatial/tissue_hires_image.png", "spatial/tissue_lowres_image.png"}
    tissue = picture_of(plain).min(axis=2) < 200
    assert np.abs(picture_of(plain)[tissue].mean(axis=0) - picture_of(stained)[tissue].mean(axis=0)).max() > 5.0


def test_genes_of_another_seed(tmp_path: Path) -> None:
    tables = [
        pd.read_csv(synthetic_visium(tmp_path / str(seed), n_spots=5, n_genes=6, gene_seed=seed) / "truth_genes.csv")
        for seed in (0, 1)
    ]
    assert (tables[0]["gene"] == tables[1]["gene"]).all()
    assert (tables[0]["density"][:4] != tables[1]["density"][:4]).all()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`n_spots` >= 1 and `n_genes` >= 3, found 0 and 9"):
        synthetic_visium(tmp_path / "a", n_spots=0, n_genes=9)
    with pytest.raises(ValueError, match="large enough for 300 spots, found `image_size=1000`"):
        synthetic_visium(tmp_path / "a", n_spots=300, image_size=1000)
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="Expected an empty or new folder"):
        synthetic_visium(tmp_path / "full")
