"""Synthetic Xenium sections: the vendor's files, a truth that can be found again, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile

from stimage_sd.datasets import synthetic_visium, synthetic_xenium
from stimage_sd.datasets._synthetic_xenium import REACH
from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import SPOT_UM, log_mean

CONTROLS = ("NegControlProbe_", "NegControlCodeword_", "UnassignedCodeword_")


def make(path: Path, **options: object) -> Path:
    return synthetic_xenium(path, **{"size_um": 250.0, "n_genes": 9, "seed": 1, "pixel_um": 0.85, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("xenium") / "run", size_um=900.0, n_genes=30, pixel_um=1.7)


def on_he(run: Path) -> pd.DataFrame:
    """The transcripts, with their place in pixels of the H&E."""
    frame = pd.read_parquet(run / "transcripts.parquet")
    pixel_um = json.loads((run / "experiment.xenium").read_text())["pixel_size"]
    back = np.linalg.inv(np.diag([pixel_um, pixel_um, 1.0]) @ np.loadtxt(run / "truth_alignment.csv", delimiter=","))
    points = frame[["x_location", "y_location"]].to_numpy() @ back[:2, :2].T + back[:2, 2]
    return frame.assign(x=points[:, 0], y=points[:, 1])


def test_means_follow_the_truth(run: Path) -> None:
    """Within circles of 55 µm, transcripts of good quality are as many as the closed form says."""
    about = json.loads((run / "truth_tissue.json").read_text())
    tissue = Tissue(about["size"], about["mpp"], about["seed"])
    genes = pd.read_csv(run / "truth_genes.csv", index_col=0)
    radius = SPOT_UM / 2.0 / about["mpp"]
    grid = np.arange(radius, tissue.size - radius, 2.0 * radius)
    centers = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    turns = np.arange(16) * np.pi / 8.0
    rim = centers[:, None] + 1.05 * radius * np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    centers = centers[(tissue.eccentricity(rim.reshape(-1, 2)).reshape(-1, 16) < REACH).all(axis=1)]
    assert len(centers) > 60
    frame = on_he(run)
    good = frame[frame["qv"] >= 20]
    places, names = good[["x", "y"]].to_numpy(), good["feature_name"].to_numpy()
    near = np.linalg.norm(places[:, None] - centers[None], axis=-1) < radius
    found = np.stack([near[names == gene].sum(axis=0) for gene in genes.index], axis=1)
    # The mean over a circle of the field, by points evenly spread over it.
    spread = np.sqrt((np.arange(40) + 0.5) / 40.0) * radius
    golden = np.arange(40) * np.pi * (3.0 - np.sqrt(5.0))
    offsets = spread[:, None] * np.column_stack([np.cos(golden), np.sin(golden)])
    expected = np.mean([np.exp(log_mean(tissue, centers + offset, genes)) for offset in offsets], axis=0)
    ratio = found.sum(axis=0) / expected.sum(axis=0)
    # Of each gene some hundreds or thousands; a standard error is about 4 % a gene, 1 % over all.
    assert np.abs(ratio - 1.0).max() < 0.2
    assert ratio.mean() == pytest.approx(1.0, abs=0.03)
    # Place by place as well: signal is found again, and spread is that of NB(r, p).
    dispersion = genes["dispersion"].to_numpy()
    surplus = ((found - expected) ** 2).sum() / (expected + expected**2 / dispersion).sum()
    assert 0.6 < surplus < 1.5
    signal = genes.index.str.startswith("SIGNAL")
    correlation = [
        np.corrcoef(np.log1p(found[:, gene]), np.log(expected[:, gene]))[0, 1] for gene in np.flatnonzero(signal)
    ]
    assert np.median(correlation) > 0.7


def test_low_quality_comes_on_top(run: Path) -> None:
    quality = pd.read_parquet(run / "transcripts.parquet", columns=["qv"])["qv"]
    low = (quality < 20).sum()
    assert low / (len(quality) - low) == pytest.approx(0.15, abs=0.01)
    assert quality.min() >= 0.0
    assert quality.max() == 40.0


def test_controls_are_there(run: Path) -> None:
    frame = pd.read_parquet(run / "transcripts.parquet")
    names = frame["feature_name"]
    for prefix in CONTROLS:
        own = frame[names.str.startswith(prefix)]
        assert own["feature_name"].nunique() == 4
        assert own["codeword_category"].nunique() == 1
        assert not own["is_gene"].any()
    genes = frame[~names.str.startswith(CONTROLS)]
    assert (genes["codeword_category"] == "predesigned_gene").all()
    assert 0 < 1 - len(genes) / len(frame) < 0.1
    cells = pd.read_parquet(run / "cells.parquet")
    sums = cells[["control_probe_counts", "control_codeword_counts", "unassigned_codeword_counts"]].sum(axis=1)
    assert (sums + cells["transcript_counts"] == cells["total_counts"]).all()
    assert sums.sum() > 0


@pytest.mark.slow
def test_transcripts_lie_in_their_cells(run: Path) -> None:
    """Independently of how cells were looked up: by the polygons that were written."""
    frame = pd.read_parquet(run / "transcripts.parquet")
    outlines = pd.read_parquet(run / "cell_boundaries.parquet")
    cells = pd.read_parquet(run / "cells.parquet").set_index("cell_id")
    polygons = shapely.polygons(outlines[["vertex_x", "vertex_y"]].to_numpy().reshape(-1, 13, 2))
    assert shapely.is_valid(polygons).all()
    order = outlines["cell_id"].to_numpy()[::13]
    np.testing.assert_allclose(shapely.area(polygons), cells.loc[order, "cell_area"], rtol=1e-4)
    points = shapely.points(frame[["x_location", "y_location"]].to_numpy(dtype=float))
    inside, owner = shapely.STRtree(polygons).query(points, predicate="intersects")
    hits = pd.Series(order[owner]).groupby(inside).agg(set).reindex(range(len(frame)))
    agree = [
        (cell == "UNASSIGNED") if isinstance(found, float) else (cell in found)
        for cell, found in zip(frame["cell_id"], hits, strict=True)
    ]
    assert np.mean(agree) > 0.999
    nuclei = pd.read_parquet(run / "nucleus_boundaries.parquet")[["vertex_x", "vertex_y"]].to_numpy().reshape(-1, 13, 2)
    # Cells do not overlap but where a nucleus reaches into the next cell.
    beyond = shapely.difference(polygons, shapely.union_all(shapely.polygons(nuclei)))
    assert shapely.union_all(beyond).area > 0.99 * shapely.area(beyond).sum()
    within = frame["overlaps_nucleus"].to_numpy() == 1
    own = pd.Index(order).get_indexer(frame["cell_id"][within])
    distance = shapely.distance(points[within], shapely.polygons(nuclei)[own])
    # An ellipse reaches a little beyond its twelve corners' outline.
    assert distance.max() < 0.6


def digests(run: Path) -> dict[str, str]:
    """What the files hold; an OME-TIFF has an identifier of its own, so its pixels are taken."""
    found = {}
    for path in sorted(entry for entry in run.rglob("*") if entry.is_file()):
        if path.suffix == ".zip":
            continue
        content = tifffile.imread(path).tobytes() if path.suffix == ".tif" else path.read_bytes()
        found[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


def test_the_same_seed_gives_the_same_section(tmp_path: Path) -> None:
    first, second = (digests(make(tmp_path / name / "run")) for name in "ab")
    assert first == second
    other = digests(make(tmp_path / "c" / "run", seed=2))
    changed = {name for name in first if first[name] != other[name]}
    assert changed >= {"transcripts.parquet", "cells.parquet", "he_image.ome.tif", "truth_alignment.csv"}
    assert "truth_genes.csv" not in changed, "genes are those of `gene_seed`"
    stained = digests(make(tmp_path / "d" / "run", stain_seed=5))
    assert {name for name in first if first[name] != stained[name]} == {"he_image.ome.tif"}


def test_genes_are_those_of_visium(tmp_path: Path) -> None:
    visium = synthetic_visium(tmp_path / "visium", n_spots=20, n_genes=9)
    run = make(tmp_path / "xenium")
    ours, theirs = (pd.read_csv(path / "truth_genes.csv", index_col=0) for path in (run, visium))
    pd.testing.assert_frame_equal(ours, theirs)


def test_images_are_pyramidal_ome_tiff(run: Path) -> None:
    for name in ("he_image.ome.tif", "morphology_focus/morphology_focus_0000.ome.tif"):
        with tifffile.TiffFile(run / name) as tiff:
            assert tiff.is_ome
            assert tiff.series[0].keyframe.is_tiled
            if name.startswith("he"):
                assert len(tiff.series[0].levels) > 1
                finest, second = (level.asarray().astype(float) for level in tiff.series[0].levels[:2])
                blocks = finest[: 2 * second.shape[0], : 2 * second.shape[1]]
                mean = blocks.reshape(second.shape[0], 2, second.shape[1], 2, 3).mean(axis=(1, 3))
                assert np.abs(mean - second).mean() < 4.0


def test_arguments(tmp_path: Path) -> None:
    for options in ({"n_genes": 2}, {"size_um": 50.0}, {"pixel_um": 0.0}):
        with pytest.raises(ValueError, match="Expected `n_genes` >= 3"):
            make(tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"`version` to be one of \['1.0', .*found '5.0'"):
        make(tmp_path / "run", version="5.0")
    assert not (tmp_path / "run").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        make(tmp_path / "full")
    assert not (make(tmp_path / "run", align=False) / "he_imagealignment.csv").exists()
