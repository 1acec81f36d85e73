"""Space Ranger's Visium HD outputs, and what can be wrong with them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import shapely
import spatialdata
import spatialdata_io
import squidpy
import tifffile
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.datasets import synthetic_visium, synthetic_visium_hd
from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.io import visium_hd

COARSE = "ignore:No full-resolution image:UserWarning"
BIN = "binned_outputs/square_008um"
MATRIX = f"{BIN}/filtered_feature_bc_matrix.h5"
POSITIONS = f"{BIN}/spatial/tissue_positions.parquet"
SCALEFACTORS = f"{BIN}/spatial/scalefactors_json.json"
HIRES = f"{BIN}/spatial/tissue_hires_image.png"
SLICE = "feature_slice.h5"
IMAGE = "image.tif"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hd") / "run7"
    return synthetic_visium_hd(folder, size_um=500.0, n_genes=9, seed=3, rotation_degrees=25.0, bins=(2, 8, 16, 48))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run7")
    return tmp_path / "run7"


def read_positions(run: Path, side: int = 8) -> pd.DataFrame:
    return pd.read_parquet(run / f"binned_outputs/square_{side:03d}um/spatial/tissue_positions.parquet")


# --------------------------------------------------------------------------------------------------
# what is read


@pytest.mark.parametrize("side", [2, 8, 16, 48])
def test_counts_and_positions_are_those_of_the_files(original: Path, side: int) -> None:
    sdata = visium_hd(original, bin_um=side, image=original / IMAGE)
    table = contract.counts(sdata)
    raw = scanpy.read_10x_h5(original / f"binned_outputs/square_{side:03d}um/filtered_feature_bc_matrix.h5")
    assert isinstance(table.X, sp.csr_matrix)
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), raw.X.toarray())
    assert table.obs_names.tolist() == raw.obs_names.tolist()
    assert table.var_names.tolist() == raw.var_names.tolist()
    assert table.var["gene_ids"].tolist() == raw.var["gene_ids"].tolist()
    positions = read_positions(original, side).set_index("barcode").loc[raw.obs_names]
    for name in ("in_tissue", "array_row", "array_col"):
        np.testing.assert_array_equal(table.obs[name], positions[name])
    np.testing.assert_array_equal(table.obsm["spatial"], positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]])
    assert table.obsm["spatial"].dtype == np.float64
    section = contract.info(sdata)
    assert (section["platform"], section["mpp"], section["sample"]) == ("visium_hd", 0.5, "run7")
    assert section["history"][0]["parameters"]["version"] == "spaceranger-4.0.1"


@pytest.mark.parametrize("side", [8, 48])
def test_bins_are_squares_turned_as_the_slide_lay(original: Path, side: int) -> None:
    sdata = visium_hd(original, bin_um=side, image=original / IMAGE)
    table, squares = contract.counts(sdata), sdata.shapes["bins"]
    assert table.obs["instance_id"].tolist() == squares.index.tolist()
    np.testing.assert_allclose(squares.area, (side / 0.5) ** 2)
    np.testing.assert_allclose(shapely.get_coordinates(squares.centroid), table.obsm["spatial"])
    corners = shapely.get_coordinates(squares.geometry).reshape(-1, 5, 2)
    sides = np.diff(corners, axis=1)
    np.testing.assert_allclose(np.linalg.norm(sides, axis=2), side / 0.5)
    np.testing.assert_allclose(np.degrees(np.arctan2(sides[:, 0, 1], sides[:, 0, 0])), 25.0)


def test_neighboring_bins_share_a_side_and_cover_no_place_twice(original: Path) -> None:
    sdata = visium_hd(original, bin_um=16, image=original / IMAGE)
    squares, obs = sdata.shapes["bins"].geometry.to_numpy(), contract.counts(sdata).obs
    where = {place: number for number, place in enumerate(zip(obs["array_row"], obs["array_col"], strict=True))}
    pairs = [(n, where[row, col + 1]) for (row, col), n in where.items() if (row, col + 1) in where]
    assert len(pairs) > 100
    for here, there in pairs[:50]:
        shared = squares[here].buffer(1e-6).intersection(squares[there].buffer(1e-6))
        assert shared.length / 2 == pytest.approx(32.0, rel=1e-3)
    assert shapely.union_all(squares).area == pytest.approx(shapely.area(squares).sum(), rel=1e-6)


def test_spatialdata_io_reads_the_same(tmp_path: Path) -> None:
    run = synthetic_visium_hd(tmp_path / "run", size_um=400.0, n_genes=9, seed=4, rotation_degrees=0.0)
    ours = visium_hd(run, image=run / IMAGE)
    theirs = spatialdata_io.visium_hd(
        run, dataset_id="hd", bin_size=8, load_segmentations_only=False, fullres_image_file=run / IMAGE
    )
    mine, table = contract.counts(ours), theirs.tables["square_008um"]
    assert mine.obs_names.tolist() == table.obs_names.tolist()
    assert mine.var_names.tolist() == table.var_names.tolist()
    np.testing.assert_array_equal(mine.X.toarray(), table.X.toarray())
    np.testing.assert_array_equal(mine.obsm["spatial"], table.obsm["spatial"])
    np.testing.assert_array_equal(mine.obs[["array_row", "array_col"]], table.obs[["array_row", "array_col"]])
    # A slide that is not turned: their squares, parallel to the image's sides, are right.
    squares = theirs.shapes["hd_square_008um"].geometry.to_numpy()
    overlap = shapely.area(shapely.intersection(ours.shapes["bins"].geometry.to_numpy(), squares))
    np.testing.assert_allclose(overlap, shapely.area(squares))
    to_fullres = get_transformation(theirs.images["hd_hires_image"], to_coordinate_system="hd")
    with pytest.warns(UserWarning, match="No full-resolution image"):
        coarse = visium_hd(run)
    homogeneous = np.column_stack([contract.counts(coarse).obsm["spatial"], np.ones(mine.n_obs)])
    placed = homogeneous @ to_fullres.to_affine_matrix(("x", "y"), ("x", "y")).T
    np.testing.assert_allclose(placed[:, :2], table.obsm["spatial"])


def test_without_the_full_image_the_hires_one_is_the_he(run: Path) -> None:
    scales = json.loads((run / SCALEFACTORS).read_text())
    picture = cv2.imread(str(run / HIRES))
    small = cv2.resize(picture, (256, 256), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(run / HIRES), small)
    (run / SCALEFACTORS).write_text(json.dumps(scales | {"tissue_hires_scalef": 0.25}))
    with pytest.warns(UserWarning, match=r"tissue_hires_image.png.*4.0 times.*image="):
        coarse = visium_hd(run)
    full = visium_hd(run, image=run / IMAGE)
    assert contract.info(coarse)["mpp"] == 2.0
    assert contract.levels(coarse, "he")[0].shape == (3, 256, 256)
    np.testing.assert_allclose(contract.counts(coarse).obsm["spatial"] * 4, contract.counts(full).obsm["spatial"])
    np.testing.assert_allclose(coarse.shapes["bins"].area, 16.0**2 / 4**2)
    shown = np.moveaxis(contract.levels(coarse, "he")[0].data.compute(), 0, -1)
    np.testing.assert_array_equal(shown, small[..., ::-1])


def test_the_folders_outs_and_binned_outputs_are_read_as_well(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "patient" / "outs")
    wanted = contract.counts(visium_hd(original, image=original / IMAGE)).obsm["spatial"]
    for path in ("patient", "patient/outs", "patient/outs/binned_outputs"):
        sdata = visium_hd(tmp_path / path, image=original / IMAGE)
        assert contract.sample(sdata) == "patient"
        np.testing.assert_array_equal(contract.counts(sdata).obsm["spatial"], wanted)
    assert contract.sample(visium_hd(original, image=original / IMAGE, sample="mine")) == "mine"


def test_a_feature_slice_with_a_prefix_is_found(run: Path) -> None:
    (run / SLICE).rename(run / f"Mouse_{SLICE}")
    assert contract.has_counts(visium_hd(run, image=run / IMAGE))


def test_the_raw_matrix_and_the_lowres_image_are_not_needed(run: Path) -> None:
    (run / BIN / "raw_feature_bc_matrix.h5").unlink()
    (run / BIN / "spatial/tissue_lowres_image.png").unlink()
    assert contract.counts(visium_hd(run, image=run / IMAGE)).n_obs > 100


def test_bins_off_the_tissue_are_left_out(run: Path) -> None:
    whole = contract.counts(visium_hd(run, image=run / IMAGE))
    shutil.copy(run / BIN / "raw_feature_bc_matrix.h5", run / MATRIX)
    kept = contract.counts(visium_hd(run, image=run / IMAGE))
    assert kept.obs_names.tolist() == whole.obs_names.tolist()
    np.testing.assert_array_equal(kept.X.toarray(), whole.X.toarray())
    assert read_positions(run)["in_tissue"].mean() < 0.8


def test_positions_in_another_order_make_no_difference(run: Path) -> None:
    before = contract.counts(visium_hd(run, image=run / IMAGE))
    read_positions(run).sample(frac=1.0, random_state=0).to_parquet(run / POSITIONS, index=False)
    after = contract.counts(visium_hd(run, image=run / IMAGE))
    np.testing.assert_array_equal(after.obsm["spatial"], before.obsm["spatial"])


def test_features_that_are_no_genes_are_left_out(run: Path) -> None:
    with h5py.File(run / MATRIX, "r+") as file:
        kinds = file["matrix/features/feature_type"][:].astype("S32")
        kinds[2] = b"Negative Control Probe"
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = kinds
    table = contract.counts(visium_hd(run, image=run / IMAGE))
    raw = scanpy.read_10x_h5(run / MATRIX, gex_only=False)
    assert table.var_names.tolist() == [name for number, name in enumerate(raw.var_names) if number != 2]
    np.testing.assert_array_equal(table.X.toarray(), np.delete(raw.X.toarray(), 2, axis=1))


def test_the_image_is_lazy(original: Path) -> None:
    levels = contract.levels(visium_hd(original, image=original / IMAGE), "he")
    assert levels[0].shape == (3, 1024, 1024)
    pixels = tifffile.imread(original / IMAGE)
    np.testing.assert_array_equal(levels[0].data[:, :64, :64].compute(), np.moveaxis(pixels[:64, :64], -1, 0))


def test_a_section_survives_writing_and_reading(original: Path, tmp_path: Path) -> None:
    sdata = visium_hd(original, bin_um=16, image=original / IMAGE)
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert contract.info(back) == contract.info(sdata)
    assert (back.shapes["bins"].geom_equals_exact(sdata.shapes["bins"], 1e-9)).all()
    np.testing.assert_array_equal(contract.counts(back).X.toarray(), contract.counts(sdata).X.toarray())


def test_squidpy_draws_the_table_as_it_is(original: Path) -> None:
    mpl.use("agg")
    table = contract.counts(visium_hd(original, bin_um=16, image=original / IMAGE))
    axes = squidpy.pl.spatial_scatter(table, color=table.var_names[0], shape="square", return_ax=True)
    assert len(axes.images) == 1
    drawn = axes.collections[0]
    assert len(drawn.get_paths()) == table.n_obs
    np.testing.assert_array_equal(drawn.get_array(), table.X[:, 0].toarray().ravel())
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# what is said


def test_a_newer_space_ranger_is_tried_with_a_warning(run: Path) -> None:
    with h5py.File(run / MATRIX, "r+") as file:
        file.attrs["software_version"] = "spaceranger-7.1.0"
    with pytest.warns(UserWarning, match=r"filtered_feature_bc_matrix.h5.*spaceranger-7.1.0.*up to version 4"):
        sdata = visium_hd(run, image=run / IMAGE)
    assert contract.counts(sdata).n_obs > 100


def test_a_matrix_without_a_version_is_read(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    with h5py.File(run / MATRIX, "r+") as file:
        del file.attrs["software_version"]
    assert contract.info(visium_hd(run, image=run / IMAGE))["history"][0]["parameters"]["version"] is None
    assert not [warning for warning in recwarn if "version" in str(warning.message)]


def test_an_image_of_another_resolution_is_spoken_of(run: Path) -> None:
    pixels = tifffile.imread(run / IMAGE)
    tifffile.imwrite(run / IMAGE, pixels, photometric="rgb", resolution=(1e4 / 0.25,) * 2, resolutionunit="CENTIMETER")
    with pytest.warns(UserWarning, match=r"image.tif states 0.2500 .*0.5000, which is used"):
        sdata = visium_hd(run, image=run / IMAGE)
    assert contract.info(sdata)["mpp"] == 0.5


def test_an_image_of_another_size_is_spoken_of(run: Path) -> None:
    pixels = tifffile.imread(run / IMAGE)
    wider = np.pad(pixels, ((0, 0), (0, 300), (0, 0)), constant_values=255)
    cv2.imwrite(str(run / "wider.png"), wider)
    with pytest.warns(UserWarning, match=r"wider.png has 1324 x 1024 px; .* about 1024 x 1024"):
        visium_hd(run, image=run / "wider.png")


# --------------------------------------------------------------------------------------------------
# what is refused


def test_a_size_that_is_not_there_is_refused_with_those_that_are(original: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bins of 4 µm.*\[2, 8, 16, 48\].*bin_um="):
        visium_hd(original, bin_um=4)


@pytest.mark.parametrize("wrong", [8.0, 0, "8"])
def test_a_size_that_is_no_whole_number_is_refused(original: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        visium_hd(original, bin_um=wrong)


@pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALEFACTORS, HIRES, SLICE])
def test_a_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / BIN / "raw_feature_bc_matrix.h5").unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        visium_hd(run)


@pytest.mark.filterwarnings(COARSE)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.98], ids=["empty", "half", "nearly whole"])
@pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALEFACTORS, HIRES, SLICE])
def test_a_truncated_or_empty_file_is_named(run: Path, name: str, part: float) -> None:
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=Path(name).name):
        visium_hd(run)


@pytest.mark.parametrize("part", [None, 0.0, 0.5], ids=["missing", "empty", "half"])
def test_an_incomplete_full_resolution_image_is_named(run: Path, part: float | None) -> None:
    whole = (run / IMAGE).read_bytes()
    (run / IMAGE).unlink()
    if part is not None:
        (run / IMAGE).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(FileNotFoundError if part is None else ValueError, match=IMAGE):
        visium_hd(run, image=run / IMAGE)


@pytest.mark.filterwarnings(COARSE)
@pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALEFACTORS, SLICE, HIRES])
def test_a_file_of_another_kind_is_named(run: Path, name: str) -> None:
    (run / name).write_bytes(b"this is text, and no part of a run\n" * 100)
    with pytest.raises(ValueError, match=Path(name).name):
        visium_hd(run)


@pytest.mark.filterwarnings(COARSE)
@pytest.mark.parametrize(
    ("name", "named"),
    [
        (MATRIX, [MATRIX, POSITIONS]),
        (POSITIONS, [MATRIX, POSITIONS]),
        (SCALEFACTORS, [SCALEFACTORS]),
    ],
)
def test_a_file_of_another_size_of_bins_is_named(run: Path, name: str, named: list[str]) -> None:
    shutil.copy(run / name.replace("008um", "016um"), run / name)
    with pytest.raises(ValueError, match="of one run") as error:
        visium_hd(run)
    assert all(str(run / file) in str(error.value) for file in named)


@pytest.mark.filterwarnings(COARSE)
def test_a_feature_slice_of_another_run_is_named(run: Path, tmp_path: Path) -> None:
    other = synthetic_visium_hd(tmp_path / "other", size_um=500.0, n_genes=3, seed=3, rotation_degrees=30.0)
    shutil.copy(other / SLICE, run / SLICE)
    with pytest.raises(ValueError, match=r"different runs.*away from where") as error:
        visium_hd(run)
    assert str(run / SLICE) in str(error.value)
    assert str(run / POSITIONS) in str(error.value)


def test_a_smaller_image_is_named(run: Path) -> None:
    cv2.imwrite(str(run / "small.png"), cv2.resize(tifffile.imread(run / IMAGE), (512, 512)))
    with (
        pytest.warns(UserWarning, match="small.png has 512 x 512"),
        pytest.raises(ValueError, match=r"tissue_positions.parquet inside .*small.png of 512 x 512 px.*outside"),
    ):
        visium_hd(run, image=run / "small.png")


def rewrite_positions(change: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        frame = read_positions(run)
        changed = change(frame)
        (frame if changed is None else changed).to_parquet(run / POSITIONS, index=False)

    return damage


def rewrite_scales(**changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        scales = json.loads((run / SCALEFACTORS).read_text()) | changes
        (run / SCALEFACTORS).write_text(json.dumps(scales))

    return damage


def rewrite_matrix(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        with h5py.File(run / MATRIX, "r+") as file:
            values = change(file[f"matrix/{name}"][:])
            del file[f"matrix/{name}"]
            file[f"matrix/{name}"] = values

    return damage


def rewrite_slide(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        with h5py.File(run / SLICE, "r+") as file:
            about = json.loads(file.attrs["metadata_json"])
            change(about)
            file.attrs["metadata_json"] = json.dumps(about)

    return damage


def repeat_first(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:1], values[:1], values[2:]])


@pytest.mark.filterwarnings(COARSE)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rewrite_positions(lambda f: f.drop(columns="array_row")),
            r"tissue_positions.parquet.*without \['array_row'\]",
        ),
        (rewrite_positions(lambda f: f.assign(in_tissue=0)), "in tissue.*tissue_positions.parquet, found none"),
        (rewrite_positions(lambda f: f.iloc[:0]), "in tissue.*tissue_positions.parquet, found none"),
        (rewrite_positions(lambda f: f.iloc[: len(f) // 2]), "Expected every bin.*tissue_positions.parquet.*without"),
        (rewrite_positions(lambda f: pd.concat([f, f])), "every bin once.*tissue_positions.parquet"),
        (rewrite_positions(lambda f: f.assign(pxl_row_in_fullres=np.inf)), "finite.*tissue_positions.parquet"),
        (rewrite_positions(lambda f: f.assign(pxl_row_in_fullres=np.nan)), "tissue_positions.parquet.*pxl_row"),
        (rewrite_positions(lambda f: f.assign(array_row=f["array_row"][::-1].to_numpy() % 7)), "on a lattice.*parquet"),
        (rewrite_positions(lambda f: f.assign(array_row=3)), "several rows and columns.*tissue_positions.parquet"),
        (rewrite_scales(microns_per_pixel=0.6, spot_diameter_fullres=8 / 0.6), "on a lattice.*scalefactors_json.json"),
        (rewrite_scales(microns_per_pixel=0.6), "8 µm in .*scalefactors_json.json"),
        (rewrite_scales(bin_size_um=16.0), "8 µm in .*scalefactors_json.json, found `bin_size_um` 16"),
        (rewrite_scales(microns_per_pixel=None), r"scalefactors_json.json.*\['microns_per_pixel'\]"),
        (rewrite_scales(tissue_hires_scalef=-1.0), r"scalefactors_json.json.*\['tissue_hires_scalef'\]"),
        (lambda run: (run / SCALEFACTORS).write_text("[1]"), "scalefactors_json.json"),
        (rewrite_matrix("barcodes", repeat_first), "every barcode once.*filtered_feature_bc_matrix.h5"),
        (rewrite_matrix("barcodes", lambda v: v[:-1]), "filtered_feature_bc_matrix.h5.*names of"),
        (rewrite_matrix("features/name", lambda v: v[:-1]), "filtered_feature_bc_matrix.h5"),
        (rewrite_matrix("data", lambda v: v[:-1]), "filtered_feature_bc_matrix.h5"),
        (rewrite_matrix("data", lambda v: -v), "filtered_feature_bc_matrix.h5.*negative"),
        (rewrite_matrix("indices", lambda v: v + 9), "filtered_feature_bc_matrix.h5"),
        (rewrite_matrix("indices", lambda v: v + 2**32), "filtered_feature_bc_matrix.h5"),
        (rewrite_matrix("features/feature_type", lambda v: np.full_like(v, b"Custom")), "Gene Expression.*matrix.h5"),
        (rewrite_slide(lambda about: about.pop("spot_pitch")), "feature_slice.h5.*spot_pitch"),
        (rewrite_slide(lambda about: about.update(spot_pitch=4.0)), "spot_pitch.*2.0 µm in .*feature_slice.h5"),
        (rewrite_slide(lambda about: about["transform_matrices"].clear()), None),
        (
            rewrite_slide(lambda about: about["transform_matrices"].update(spot_colrow_to_microscope_colrow=[1, 2])),
            "feature_slice.h5",
        ),
    ],
)
def test_an_inconsistent_file_is_named(run: Path, damage: Callable[[Path], None], message: str | None) -> None:
    damage(run)
    if message is None:
        # Space Ranger writes no transformation where it had no microscope image.
        assert contract.counts(visium_hd(run)).n_obs > 100
        return
    with pytest.raises(ValueError, match=message):
        visium_hd(run)


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no folder"):
        visium_hd(tmp_path / "nowhere")
    spots = synthetic_visium(tmp_path / "spots", n_spots=10, n_genes=3)
    with pytest.raises(FileNotFoundError, match=r"binned_outputs.*It holds.*stimage_sd.io.visium"):
        visium_hd(spots)


# --------------------------------------------------------------------------------------------------
# what people have


def test_a_raw_matrix_gives_the_bins_in_tissue(run: Path) -> None:
    expected = contract.counts(visium_hd(run, image=run / IMAGE))
    (run / MATRIX).unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not in tissue", category=UserWarning)
        found = contract.counts(visium_hd(run, image=run / IMAGE))
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())


def test_positions_with_a_boolean_in_tissue(run: Path) -> None:
    expected = contract.counts(visium_hd(run, image=run / IMAGE))
    read_positions(run).astype({"in_tissue": bool}).to_parquet(run / POSITIONS)
    assert contract.counts(visium_hd(run, image=run / IMAGE)).obs_names.equals(expected.obs_names)


def test_bins_off_the_image_are_left_out_and_counted(run: Path) -> None:
    whole = visium_hd(run, image=run / IMAGE)
    centers = contract.counts(whole).obsm["spatial"]
    width = int(np.quantile(centers[:, 0], 0.9))
    cv2.imwrite(str(run / "cut.png"), np.full((1024, width, 3), 255, np.uint8))
    n_off = int((centers[:, 0] >= width).sum())
    with pytest.warns(UserWarning, match=rf"bins of .* inside .*cut.png.*{n_off} of {len(centers)} outside.*left out"):
        sdata = visium_hd(run, image=run / "cut.png")
    table = contract.counts(sdata)
    assert table.n_obs == len(centers) - n_off
    np.testing.assert_array_equal(table.X.toarray(), contract.counts(whole)[table.obs_names].X.toarray())
    np.testing.assert_allclose(shapely.get_coordinates(sdata.shapes["bins"].centroid), table.obsm["spatial"])


def test_the_folder_of_one_size_is_referred_to_the_one_above(run: Path) -> None:
    with pytest.raises(ValueError, match=r"Pass the folder .*binned_outputs, and `bin_um=8`"):
        visium_hd(run / BIN)


CELLS = {1: (100, 100, 9), 2: (200, 100, 12), 3: (300, 250, 10), 7: (500, 400, 8)}


def outlines(path: Path, shrink: float, cells: dict[int, tuple[int, int, int]] = CELLS) -> None:
    """Squares as Space Ranger writes outlines: rings in full-resolution pixels, a number each."""
    features = []
    for number, (x, y, half) in cells.items():
        reach = half * shrink
        ring = [[x + dx * reach, y + dy * reach] for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "properties": {"cell_id": number}, "geometry": geometry})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def write_cells(run: Path, *, nuclei: bool = True) -> np.ndarray:
    """Add what Space Ranger 4 writes about cells; the filtered matrix has all but the first, in another order."""
    folder = run / "segmented_outputs"
    (folder / "spatial").mkdir(parents=True)
    counts = np.array([[0, 5, 1], [2, 0, 0], [9, 9, 9]])
    names = pd.Index([f"cellid_{number:09d}-1" for number in (7, 2, 3)])
    about = {"software_version": "spaceranger-4.0.1"}
    write_10x_h5(
        folder / "filtered_feature_cell_matrix.h5", sp.csr_matrix(counts), names, pd.Index(["A", "B", "C"]),
        attributes=about,
    )  # fmt: skip
    outlines(folder / "cell_segmentations.geojson", 1.0)
    if nuclei:
        outlines(folder / "nucleus_segmentations.geojson", 0.5)
    scales = {"microns_per_pixel": 0.5, "tissue_hires_scalef": 1.0, "tissue_lowres_scalef": 0.5}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    return counts


def test_cells_and_nuclei_of_space_ranger_4(run: Path, tmp_path: Path) -> None:
    counts = write_cells(run)
    assert list(visium_hd(run, image=run / IMAGE).shapes) == ["bins"]
    sdata = visium_hd(run, image=run / IMAGE, units="cells")
    table = contract.counts(sdata)
    assert table.obs_names.tolist() == ["cellid_000000007-1", "cellid_000000002-1", "cellid_000000003-1"]
    np.testing.assert_array_equal(table.X.toarray(), counts)
    np.testing.assert_allclose(table.obsm["spatial"], [CELLS[number][:2] for number in (7, 2, 3)])
    cells, nuclei = sdata.shapes["cells"], sdata.shapes["nuclei"]
    np.testing.assert_allclose(cells.area, [(2 * CELLS[number][2]) ** 2 for number in (7, 2, 3)])
    np.testing.assert_allclose(nuclei.area, [CELLS[number][2] ** 2 for number in CELLS])
    assert nuclei["cell_id"].tolist() == [f"cellid_{number:09d}-1" for number in CELLS]
    assert contract.find_units(sdata).shapes == "cells"
    assert contract.info(sdata)["mpp"] == 0.5
    sdata.write(tmp_path / "cells.zarr")
    back = spatialdata.read_zarr(tmp_path / "cells.zarr")
    np.testing.assert_allclose(contract.find_units(back).positions(back), table.obsm["spatial"])


def test_cells_as_spatialdata_io_reads_them(run: Path) -> None:
    write_cells(run)
    ours = visium_hd(run, image=run / IMAGE, units="cells")
    theirs = spatialdata_io.visium_hd(
        run, dataset_id="hd", load_segmentations_only=True, fullres_image_file=run / IMAGE
    )
    table, shapes = theirs.tables["cell_segmentations"], theirs.shapes["hd_cell_segmentations"]
    names = contract.counts(ours).obs_names
    np.testing.assert_array_equal(contract.counts(ours).X.toarray(), table[names].X.toarray())
    assert (ours.shapes["cells"].geometry.to_numpy() == shapes.loc[names].geometry.to_numpy()).all()


@pytest.mark.filterwarnings(COARSE)
def test_a_run_with_cells_alone(run: Path) -> None:
    write_cells(run, nuclei=False)
    shutil.copy(run / HIRES, run / "segmented_outputs" / "spatial")
    shutil.rmtree(run / "binned_outputs")
    for path in (run, run / "segmented_outputs"):
        sdata = visium_hd(path)
        assert list(sdata.shapes) == ["cells"]
        assert contract.sample(sdata) == "run7"


def test_cells_that_do_not_fit(run: Path) -> None:
    write_cells(run)
    folder = run / "segmented_outputs"
    outlines(folder / "cell_segmentations.geojson", 1.0, {7: CELLS[7], 3: (5000, 40, 9)})
    with (
        pytest.warns(UserWarning, match=r"1 of 3 cells .* have no outline"),
        pytest.warns(UserWarning, match=r"cells of .*cell_segmentations.geojson inside .*1 of 2 outside.*left out"),
    ):
        assert contract.counts(visium_hd(run, image=run / IMAGE, units="cells")).obs_names.tolist() == [
            "cellid_000000007-1"
        ]
    outlines(folder / "cell_segmentations.geojson", 1.0, {50: CELLS[7]})
    with pytest.raises(ValueError, match=r"share no cell. .*cell_matrix.h5 has cells such as 'cellid_000000007-1'"):
        visium_hd(run, image=run / IMAGE, units="cells")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"segmented_outputs.*from version 4 on"):
        visium_hd(run, units="cells")
    with pytest.raises(ValueError, match="'bins' or 'cells'"):
        visium_hd(run, units="nuclei")
