"""Slides without molecules."""

from __future__ import annotations

from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import openslide
import pytest
import spatialdata

from stimage_sd import contract
from stimage_sd.datasets import synthetic_slide
from stimage_sd.io import slide
from stimage_sd.stream.driver import run_over_tiles


def test_svs_states_its_resolution(data_dir: Path) -> None:
    sdata = slide(data_dir / "slides" / "CMU-1-Small-Region.svs")
    assert contract.sample(sdata) == "CMU-1-Small-Region"
    assert contract.info(sdata)["platform"] == "slide"
    assert contract.info(sdata)["mpp"] == pytest.approx(0.499)
    assert contract.levels(sdata, "he")[0].shape == (3, 2967, 2220)
    assert set(sdata.coordinate_systems) == {"global", "microns"}
    assert not sdata.tables
    recorded = contract.info(sdata)["history"][0]["parameters"]
    assert (recorded["vendor"], recorded["objective_power"], recorded["mpp_source"]) == ("aperio", 20.0, "file")


def test_pyramid_of_a_file_is_kept_as_it_is(data_dir: Path) -> None:
    sdata = slide(data_dir / "slides" / "CropBreastSlide.tiff")
    shapes = [level.shape for level in contract.levels(sdata, "he")]
    assert shapes == [(3, 1525, 2033), (3, 762, 1016), (3, 381, 508), (3, 190, 254), (3, 95, 127), (3, 47, 63)]
    assert all(isinstance(level.data, da.Array) for level in contract.levels(sdata, "he"))


def test_unknown_resolution_is_not_guessed(data_dir: Path) -> None:
    sdata = slide(data_dir / "slides" / "CropBreastSlide.tiff")
    assert contract.info(sdata)["mpp"] is None
    assert set(sdata.coordinate_systems) == {"global"}
    with pytest.raises(ValueError, match="no known resolution"):
        contract.require_mpp(sdata, purpose="this")
    given = slide(data_dir / "slides" / "CropBreastSlide.tiff", mpp=0.25, sample="crop")
    assert contract.info(given)["mpp"] == 0.25
    assert contract.sample(given) == "crop"


def test_fluorescence_is_sent_to_its_reader(data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"small_vectra.qptiff. Read a fluorescence image with `stimage_sd.io.codex"):
        slide(data_dir / "slides" / "small_vectra.qptiff")


def test_wide_fields_are_cut_from_the_level_that_suffices(tmp_path: Path) -> None:
    """Four tiles' sides of 256 px are 256 px of the level that is a fourth, and no pixel of the finest is read."""
    path = synthetic_slide(tmp_path / "slide", size=4096) / "slide.svs"
    center = np.array([[2200.0, 1900.0]])
    levels = contract.levels(slide(path), "he")
    assert [level.shape[2] for level in levels[:2]] == [4096, 1024]
    unreadable = levels[0].copy(
        data=da.map_blocks(refuse, levels[0].data, dtype=np.uint8, meta=np.empty((0, 0, 0), "u1"))
    )
    cut = run_over_tiles([unreadable, *levels[1:]], center, np.asarray, sides=[1024.0], target=256, key="pixels")
    with openslide.OpenSlide(path) as opened:
        expected = np.asarray(opened.read_region((2200 - 512, 1900 - 512), 1, (256, 256)))[..., :3]
    # OpenSlide resamples where a region does not begin at a pixel of the level; this one does.
    np.testing.assert_array_equal(cut[0, 0], expected)


def refuse(block: np.ndarray) -> np.ndarray:
    raise RuntimeError("the finest level was read")


def test_round_trip(data_dir: Path, tmp_path: Path) -> None:
    sdata = slide(data_dir / "slides" / "CropBreastSlide.tiff", mpp=0.25)
    sdata.write(tmp_path / "slide.zarr")
    back = spatialdata.read_zarr(tmp_path / "slide.zarr")
    assert back.attrs == sdata.attrs
    for was, now in zip(contract.levels(sdata, "he"), contract.levels(back, "he"), strict=True):
        np.testing.assert_array_equal(was.data.compute(), now.data.compute())


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected an image file"):
        slide(tmp_path / "none.svs")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="Expected `mpp` to be a positive number"):
        slide(tmp_path / "a.png", mpp=0.0)
