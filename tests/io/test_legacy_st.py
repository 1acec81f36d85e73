"""Legacy ST: her2st's files in, a section out, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import spatialdata
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.io import legacy_st

PITCH, SIZE = 60, 500


class Files:
    """A 6 x 5 array of spots on a drawn image; each spot's place is a square of a color of its own."""

    def __init__(self, folder: Path) -> None:
        self.counts, self.image, self.spots = folder / "P1.counts.tsv.gz", folder / "he.png", folder / "spots.tsv"
        places = [(x, y) for x in range(6) for y in range(5)]
        self.names = [f"{x}x{y}" for x, y in places]
        self.centers = np.array([(70.0 + PITCH * x, 90.0 + PITCH * y) for x, y in places])
        self.colors = np.random.default_rng(0).integers(0, 200, (len(places), 3), dtype=np.uint8)
        image = np.full((SIZE, SIZE + 40, 3), 240, np.uint8)
        for (x, y), color in zip(self.centers.astype(int), self.colors, strict=True):
            image[y - 5 : y + 6, x - 5 : x + 6] = color
        cv2.imwrite(str(self.image), image[..., ::-1])
        self.table = pd.DataFrame(
            {
                "x": [x for x, _ in places],
                "y": [y for _, y in places],
                "new_x": 0.0,
                "new_y": 0.0,
                "pixel_x": self.centers[:, 0],
                "pixel_y": self.centers[:, 1],
                "selected": 1,
            }
        )
        self.values = pd.DataFrame(
            np.random.default_rng(1).poisson(1.5, (len(places), 7)),
            index=self.names,
            columns=[f"G{number}" for number in range(7)],
        )
        self.write()

    def write(self, **formatting: str) -> None:
        self.table.to_csv(self.spots, sep="\t", index=False)
        self.values.to_csv(self.counts, sep="\t", **formatting)

    def read(self, **parameters: float) -> spatialdata.SpatialData:
        return legacy_st(self.counts, self.image, self.spots, **parameters)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_section_follows_the_contract(files: Files) -> None:
    sdata = files.read()
    table = contract.counts(sdata)
    assert sdata.attrs["stimage_sd"]["sample"] == "P1"
    assert sdata.attrs["stimage_sd"]["platform"] == "legacy_st"
    assert sdata.attrs["stimage_sd"]["mpp"] == pytest.approx(200.0 / PITCH)
    assert list(table.obs_names) == files.names
    assert isinstance(table.X, sp.csr_matrix)
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), files.values.to_numpy())
    np.testing.assert_array_equal(table.obs["array_col"], files.table["x"])
    np.testing.assert_array_equal(table.obs["array_row"], files.table["y"])
    assert table.obsm["spatial"].dtype == np.float64
    assert contract.units_name(sdata) == contract.SPOTS
    np.testing.assert_array_equal(table.obs["instance_id"], sdata.shapes["spots"].index)
    np.testing.assert_allclose(sdata.shapes["spots"].radius, PITCH / 4.0)
    assert [step["step"] for step in sdata.attrs["stimage_sd"]["history"]] == ["io.legacy_st"]


def test_image_is_lazy_and_spots_land_on_their_pixels(files: Files) -> None:
    sdata = files.read()
    finest = contract.levels(sdata, "he")[0]
    assert isinstance(finest.data, da.Array)
    pixels = finest.data.compute()
    for (x, y), color in zip(contract.counts(sdata).obsm["spatial"].astype(int), files.colors, strict=True):
        np.testing.assert_array_equal(pixels[:, y, x], color)
    points = np.column_stack([sdata.shapes["spots"].geometry.x, sdata.shapes["spots"].geometry.y])
    np.testing.assert_array_equal(points, files.centers)
    to_microns = get_transformation(sdata.shapes["spots"], "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(np.diag(to_microns), [200.0 / PITCH, 200.0 / PITCH, 1.0])


def test_round_trip_keeps_everything(files: Files, tmp_path: Path) -> None:
    sdata = files.read()
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert back.attrs == sdata.attrs
    before, after = contract.counts(sdata), contract.counts(back)
    np.testing.assert_array_equal(after.X.toarray(), before.X.toarray())
    assert after.X.dtype == before.X.dtype
    pd.testing.assert_frame_equal(after.obs, before.obs, check_dtype=False)
    np.testing.assert_array_equal(after.obsm["spatial"], before.obsm["spatial"])
    np.testing.assert_array_equal(
        after.uns["spatial"]["P1"]["images"]["hires"], before.uns["spatial"]["P1"]["images"]["hires"]
    )
    for was, now in zip(contract.levels(sdata, "he"), contract.levels(back, "he"), strict=True):
        np.testing.assert_array_equal(was.data.compute(), now.data.compute())
    assert set(back.coordinate_systems) == {"global", "microns"}
    assert contract.units_name(back) == contract.SPOTS


def test_selected_spots_with_counts_are_kept_in_the_order_of_the_counts(files: Files) -> None:
    files.table.loc[files.table["x"] == 5, "selected"] = 0
    files.values = files.values.iloc[::-1].drop(index="0x0")
    files.write()
    table = contract.counts(files.read())
    assert list(table.obs_names) == [name for name in files.values.index if not name.startswith("5x")]
    np.testing.assert_array_equal(table.X.toarray(), files.values.loc[table.obs_names].to_numpy())
    where = [files.names.index(name) for name in table.obs_names]
    np.testing.assert_array_equal(table.obsm["spatial"], files.centers[where])


def test_misplaced_spots_do_not_move_the_resolution(files: Files) -> None:
    files.table.loc[[3, 17], "pixel_x"] += 25.0
    files.write()
    assert files.read().attrs["stimage_sd"]["mpp"] == pytest.approx(200.0 / PITCH, rel=1e-3)


def test_given_resolution_and_spot_size(files: Files) -> None:
    sdata = files.read(mpp=0.5, spot_um=55.0)
    assert sdata.attrs["stimage_sd"]["mpp"] == 0.5
    np.testing.assert_allclose(sdata.shapes["spots"].radius, 55.0)


def test_counts_written_as_decimals_without_corner_or_gzip(files: Files, tmp_path: Path) -> None:
    expected = files.values.to_numpy()
    lines = ["\t".join(files.values.columns)]
    lines += [
        f"{name}\t" + "\t".join(f"{value:.1f}" for value in row)
        for name, row in zip(files.names, expected, strict=True)
    ]
    files.counts = tmp_path / "plain.tsv"
    files.counts.write_text("\n".join(lines) + "\n")
    table = contract.counts(files.read())
    np.testing.assert_array_equal(table.X.toarray(), expected)
    assert list(table.var_names) == list(files.values.columns)


def test_repeated_genes_get_a_suffix_and_a_warning(files: Files) -> None:
    files.values.columns = ["G0", "G1", "G0", "G3", "G4", "G5", "G6"]
    files.write()
    with pytest.warns(UserWarning, match="appear more than once"):
        sdata = files.read()
    assert list(contract.counts(sdata).var_names[:3]) == ["G0", "G1", "G0-1"]


def test_squidpy_draws_it_as_it_is(files: Files) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import squidpy

    table = contract.counts(files.read())
    ax = squidpy.pl.spatial_scatter(table, color="G0", return_ax=True)
    assert ax.get_images()[0].get_array().shape[:2] == (SIZE, SIZE + 40)
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# what is refused


def test_missing_files(files: Files, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a table of counts at .*none"):
        legacy_st(tmp_path / "none", files.image, files.spots)
    with pytest.raises(FileNotFoundError, match=r"an H&E image at .*none"):
        legacy_st(files.counts, tmp_path / "none", files.spots)
    with pytest.raises(FileNotFoundError, match=r"a table of spots at .*none"):
        legacy_st(files.counts, files.image, tmp_path / "none")


def test_no_shared_barcode(files: Files) -> None:
    files.values.index = [f"{name}0" for name in files.names]
    files.write()
    with pytest.raises(ValueError, match=r"share no barcode: .*'0x00'.*'0x0'"):
        files.read()


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "found negative values"), (0.5, "Expected raw counts .*0.5"), ("NA", "found text in row '0x1'")],
)
def test_values_that_are_no_counts(files: Files, value: object, message: str) -> None:
    files.values = files.values.astype(object)
    files.values.iloc[1, 2] = value
    files.write()
    with pytest.raises(ValueError, match=message):
        files.read()


def test_missing_value(files: Files) -> None:
    files.values = files.values.astype(object)
    files.values.iloc[1, 2] = ""
    files.write()
    with pytest.raises(ValueError, match="found text in row '0x1'"):
        files.read()


def test_ragged_or_empty_counts(files: Files) -> None:
    with gzip.open(files.counts, "at") as lines:
        lines.write("9x9\t1\t2\n")
    with pytest.raises(ValueError, match=r"found 31 spot\(s\) with \[2, 7\] values under a header of 8"):
        files.read()
    with gzip.open(files.counts, "wt") as lines:
        lines.write("")
    with pytest.raises(ValueError, match=r"found 0 spot\(s\)"):
        files.read()


def test_repeated_spots(files: Files) -> None:
    files.values = pd.concat([files.values, files.values.iloc[:1]])
    files.write()
    with pytest.raises(ValueError, match=r"Expected every spot once in .*'0x0'"):
        files.read()


def test_spot_table_without_a_column(files: Files) -> None:
    files.table = files.table.drop(columns=["pixel_y", "selected"])
    files.write()
    with pytest.raises(ValueError, match=r"Expected columns .* Add \['pixel_y', 'selected'\]"):
        files.read()


def test_spot_table_with_text_or_nothing_selected(files: Files) -> None:
    files.table["selected"] = 0
    files.write()
    with pytest.raises(ValueError, match="Expected spots with `selected` = 1"):
        files.read()
    files.table["pixel_x"] = "left"
    files.write()
    with pytest.raises(ValueError, match=r"found text in \['pixel_x'\]"):
        files.read()


def test_spots_outside_the_image(files: Files) -> None:
    whole = contract.counts(files.read())
    files.table["pixel_x"] += 200.0
    files.write()
    with pytest.warns(
        UserWarning, match=r"inside its image of 540 x 500 px \(x, y\), found 5 of 30 outside.* left out"
    ):
        table = contract.counts(files.read())
    assert table.n_obs == 25
    np.testing.assert_array_equal(table.X.toarray(), whole[table.obs_names].X.toarray())
    np.testing.assert_array_equal(table.obsm["spatial"], whole[table.obs_names].obsm["spatial"] + [200.0, 0.0])
    files.table["pixel_x"] += 400.0
    files.write()
    with pytest.raises(ValueError, match=r"found 30 of 30 outside.*Pass the image"):
        files.read()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("compressed", [True, False])
def test_tables_of_other_programs(files: Files, encoding: str, compressed: bool) -> None:
    files.values.columns = ["Gµ", *files.values.columns[1:]]
    for path, table, index in ((files.spots, files.table, False), (files.counts, files.values, True)):
        data = table.to_csv(sep="\t", index=index).encode(encoding)
        path.write_bytes(gzip.compress(data) if compressed else data)
    table = contract.counts(files.read())
    assert table.var_names.tolist() == files.values.columns.tolist()
    np.testing.assert_array_equal(table.X.toarray(), files.values)
    assert table.obs_names.tolist() == files.names


def test_spots_that_are_not_selected_are_spoken_of(files: Files) -> None:
    files.table.loc[files.table.index[:4], "selected"] = 0
    files.write()
    with pytest.warns(UserWarning, match=r"4 of 30 spots of .* are not among the 26 selected spots of .*one section"):
        assert contract.counts(files.read()).n_obs == 26


def test_resolution_that_cannot_be_estimated(files: Files) -> None:
    files.table[["x", "y"]] *= 3
    files.values.index = [f"{3 * int(x)}x{3 * int(y)}" for x, y in (name.split("x") for name in files.names)]
    files.write()
    with pytest.raises(ValueError, match=r"found none. Pass `mpp=`"):
        files.read()
    assert files.read(mpp=0.7).attrs["stimage_sd"]["mpp"] == 0.7


def test_numbers_that_make_no_sense(files: Files) -> None:
    with pytest.raises(ValueError, match="positive `spot_um` and `pitch_um`"):
        files.read(pitch_um=0.0)
    with pytest.raises(ValueError, match="Expected `mpp` to be a positive number"):
        files.read(mpp=-1.0)


def test_real_section(data_dir: Path) -> None:
    folder = data_dir / "her2st" / "C5"
    sdata = legacy_st(folder / "counts.tsv.gz", folder / "image.jpg", folder / "spots.tsv", sample="C5")
    table = contract.counts(sdata)
    assert table.shape == (181, 15_721)
    assert sdata.attrs["stimage_sd"]["mpp"] == pytest.approx(0.69, abs=0.02)
    frame = pd.read_csv(folder / "counts.tsv.gz", sep="\t", index_col=0)
    assert list(table.var_names) == list(frame.columns)
    np.testing.assert_array_equal(table.X.toarray(), frame.loc[table.obs_names].to_numpy())
    assert contract.levels(sdata, "he")[0].shape == (3, 9901, 9272)
