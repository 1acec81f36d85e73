"""Files that are empty, cut off or something else: readers say which, and no raw error comes out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import cv2
import h5py
import numpy as np
import pytest
import spatialdata
import tifffile
from safetensors.numpy import save

from stimage_sd import cli, datasets, io, models, tl
from stimage_sd._store import read_section

GARBAGE = np.random.default_rng(0).bytes(2000)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> dict[str, Path]:
    """The smallest run of each platform."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "visium": datasets.synthetic_visium(root / "visium", n_spots=12, n_genes=6),
        "visium_hd": datasets.synthetic_visium_hd(root / "hd", size_um=120, n_genes=6, bins=(16,)),
        "xenium": datasets.synthetic_xenium(root / "xenium", size_um=120, n_genes=6),
        "codex": datasets.synthetic_codex(root / "codex", n_spots=12, n_proteins=3),
        "codex_fcs": datasets.synthetic_codex(root / "fcs", n_spots=12, n_proteins=3, table_format="fcs"),
    }


@pytest.fixture(scope="module")
def visium(runs: dict[str, Path]) -> spatialdata.SpatialData:
    """A section that annotations are read into."""
    return io.visium(runs["visium"], image=runs["visium"] / "image.tif")


RUNS: dict[str, Callable[[Path], Any]] = {
    "visium": lambda run: io.visium(run, image=run / "image.tif"),
    "visium_hd": lambda run: io.visium_hd(run, bin_um=16, image=run / "image.tif"),
    "xenium": lambda run: io.xenium(run, he_image=run / "he_image.ome.tif", alignment=run / "he_imagealignment.csv"),
    "codex": lambda run: io.codex(run / "cells.csv", run / "multiplex.ome.tif"),
    "codex_fcs": lambda run: io.codex(run / "cells.fcs"),
}
BINS = "binned_outputs/square_016um"
FILES = [
    ("visium", "filtered_feature_bc_matrix.h5"), ("visium", "spatial/scalefactors_json.json"),
    ("visium", "spatial/tissue_positions.csv"), ("visium", "image.tif"),
    ("visium_hd", f"{BINS}/filtered_feature_bc_matrix.h5"), ("visium_hd", f"{BINS}/spatial/scalefactors_json.json"),
    ("visium_hd", f"{BINS}/spatial/tissue_positions.parquet"), ("visium_hd", "image.tif"),
    ("visium_hd", "feature_slice.h5"),
    ("xenium", "experiment.xenium"), ("xenium", "cell_feature_matrix.h5"), ("xenium", "cells.parquet"),
    ("xenium", "cell_boundaries.parquet"), ("xenium", "nucleus_boundaries.parquet"), ("xenium", "transcripts.parquet"),
    ("xenium", "he_image.ome.tif"), ("xenium", "he_imagealignment.csv"),
    ("xenium", "morphology_focus/morphology_focus_0000.ome.tif"),
    ("codex", "cells.csv"), ("codex", "multiplex.ome.tif"), ("codex_fcs", "cells.fcs"),
]  # fmt: skip


def damaged(content: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Contents that a file may have in place of its own."""
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    yield "garbage", GARBAGE
    if name.endswith(("json", ".xenium")):
        yield "a list", b"[]"
        yield "an object", b'{"a": 1}'


def check_named(read: Callable[[], Any], path: Path, how: str) -> None:
    with pytest.raises((ValueError, KeyError, FileNotFoundError)) as caught:
        read()
    assert path.name in str(caught.value), how
    # errors of this package, and not of a library underneath
    assert type(caught.value).__module__.split(".")[0] in ("builtins", "stimage_sd"), how
    assert not isinstance(caught.value, UnicodeError), how


@pytest.mark.parametrize(("kind", "name"), FILES, ids=[f"{kind}-{Path(name).name}" for kind, name in FILES])
def test_a_damaged_file_of_a_run_is_named(runs: dict[str, Path], kind: str, name: str) -> None:
    path = runs[kind] / name
    content = path.read_bytes()
    try:
        for how, instead in damaged(content, name):
            path.write_bytes(instead)
            check_named(lambda: RUNS[kind](runs[kind]), path, how)
    finally:
        path.write_bytes(content)


def features(visium: Any, path: Path) -> None:
    io.read_tile_features(visium, path, extractor="mine")


#: files that are read alone: what a whole one begins with (its first half is read), and its reader
ALONE: dict[str, tuple[bytes, Callable[[Any, Path], Any]]] = {
    "a.geojson": (b'{"type": "FeatureCollection", "features": []}', lambda s, p: io.read_geojson(s, p, key_added="a")),
    "a.geojson.gz": (gzip.compress(b'{"features": []}' * 9), lambda s, p: io.read_geojson(s, p, key_added="a")),
    "labels.csv": (b"", lambda s, p: io.read_loupe(s, p)),
    "features.h5": (b"\x89HDF\r\n\x1a\n" + bytes(90), features),
    "model.stimage": (b"PK\x03\x04" + bytes(60), lambda _, p: models.load(p)),
    "weights.safetensors": (save({"a": np.zeros(9)}), lambda _, p: models.get_extractor("resnet50", weights=p)),
    "sets.gmt": (b"", lambda _, p: tl.enrichment(["A"], p, background=["A", "B"])),
    "he.png": (b"\x89PNG\r\n\x1a\n" + bytes(60), lambda _, p: io.slide(p, mpp=1)),
    "he.svs": (b"II*\x00\x08\x00\x00\x00\x03\x00", lambda _, p: io.slide(p, mpp=1)),
    "genes.txt": (b"", lambda _, p: cli._read_genes(p)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_damaged_file_is_named(visium: Any, tmp_path: Path, name: str) -> None:
    content, read = ALONE[name]
    for how, instead in damaged(content, ""):
        (tmp_path / name).write_bytes(instead)
        check_named(lambda: read(visium, tmp_path / name), tmp_path / name, how)


def test_damaged_tables_of_legacy_st_are_named(tmp_path: Path) -> None:
    image, spots, counts = (tmp_path / name for name in ("he.tif", "spots.tsv", "counts.tsv"))
    tifffile.imwrite(image, np.full((64, 64, 3), 200, np.uint8), photometric="rgb")
    whole = {spots: b"x\ty\tpixel_x\tpixel_y\tselected\n1\t1\t9\t9\t1\n", counts: b"\tA\tB\n1x1\t4\t0\n"}
    for path in whole:
        for how, instead in (("empty", b""), ("garbage", GARBAGE)):
            for other, content in whole.items():
                other.write_bytes(content)
            path.write_bytes(instead)
            check_named(lambda: io.legacy_st(counts, image, spots, mpp=1.0), path, f"{path.name} {how}")


@pytest.mark.parametrize("config", [b"", GARBAGE, b"[]", b"{}", b'{"format_version": 1}', b'{"format_version": "1"}',
                                    b'{"format_version": 1, "kind": "nb"}'])  # fmt: skip
def test_a_damaged_folder_of_a_model_is_named(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(save({"a": np.zeros(1)}))
    check_named(lambda: models.load(tmp_path), tmp_path, str(config))


@pytest.mark.parametrize("content", [b"", GARBAGE, b"[]", b'{"attributes": null}'])
def test_a_damaged_store_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "section.zarr").mkdir()
    (tmp_path / "section.zarr" / "zarr.json").write_bytes(content)
    check_named(lambda: read_section(tmp_path / "section.zarr"), tmp_path / "section.zarr", str(content))


def test_a_damaged_sample_of_hest_is_named(tmp_path: Path) -> None:
    for folder in ("st", "wsis", "metadata"):
        (tmp_path / folder).mkdir()
    tifffile.imwrite(tmp_path / "wsis" / "A.tif", np.full((64, 64, 3), 200, np.uint8), photometric="rgb")
    metadata = {"pixel_size_um_estimated": 1.0, "fullres_px_width": 64, "fullres_px_height": 64}
    (tmp_path / "metadata" / "A.json").write_text(json.dumps(metadata))
    path = tmp_path / "st" / "A.h5ad"
    ad.AnnData(np.ones((2, 2), np.float32)).write_h5ad(path)
    for how, instead in damaged(path.read_bytes(), ""):
        path.write_bytes(instead)
        check_named(lambda: io.hest(tmp_path, "A"), path, how)
    with h5py.File(path, "w") as file:  # HDF5 that holds something else
        file["data"] = np.zeros(3)
    check_named(lambda: io.hest(tmp_path, "A"), path, "something else")


def test_a_table_of_ten_million_columns_is_refused_before_it_is_parsed(visium: Any, tmp_path: Path) -> None:
    for name, read in (
        ("cells.csv", lambda path: io.codex(path, mpp=0.5)),
        ("labels.csv", lambda path: io.read_loupe(visium, path)),
        ("counts.tsv", lambda path: io.legacy_st(path, tmp_path / "he.png", tmp_path / "spots.tsv", mpp=1.0)),
    ):
        path = tmp_path / name
        mark = "\t" if name.endswith("tsv") else ","
        path.write_text(f"A{mark}" * 10**7 + "\n1\n")
        cv2.imwrite(str(tmp_path / "he.png"), np.full((9, 9, 3), 200, np.uint8))
        (tmp_path / "spots.tsv").write_text("x\ty\tpixel_x\tpixel_y\tselected\n1\t1\t5\t5\t1\n")
        with pytest.raises(ValueError, match=rf"{name}.*first line of more than 16,777,216 characters"):
            read(path)
