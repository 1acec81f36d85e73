"""Files of several images, turned ones, and levels of no exact fraction: pixels as they are stored."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from spatialdata.models import get_channel_names

from stimage_sd import contract
from stimage_sd.io import codex, slide
from stimage_sd.io._lazy_levels import openslide_levels
from stimage_sd.io._multichannel import open_multichannel
from stimage_sd.io._raster import open_raster

LAYOUTS: list[dict[str, Any]] = [{"tile": (64, 64)}, {"rowsperstrip": 32, "compression": "zlib"}]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(40, 250, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


LARGE, MIDDLE, SMALL = picture(300, 420, 1), picture(160, 200, 2), picture(70, 90, 3)


def finest(path: Path, **options: Any) -> np.ndarray:
    return np.moveaxis(open_raster(path, **options)[0][0].compute(), 0, -1)


# --------------------------------------------------------------------------------------------------
# several images


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tiles", "strips"])
@pytest.mark.parametrize("order", [(SMALL, LARGE), (SMALL, MIDDLE, LARGE), (LARGE, MIDDLE, SMALL)])
def test_the_largest_of_several_images_is_taken_and_said(
    tmp_path: Path, order: tuple[np.ndarray, ...], layout: dict[str, Any]
) -> None:
    path = tmp_path / "several.tif"
    with tifffile.TiffWriter(path) as writer:
        for image in order:
            writer.write(image, photometric="rgb", metadata=None, **layout)
    number = len(order) - 1 if order[0] is SMALL else 0
    with pytest.warns(
        UserWarning, match=rf"several.tif holds {len(order)} images: .*420 x 300.* Image {number} was taken"
    ):
        np.testing.assert_array_equal(finest(path), LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chosen, image in enumerate(order):
            np.testing.assert_array_equal(finest(path, series=chosen), image)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tiles", "strips"])
def test_fields_of_view_of_one_size_are_told_apart(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = tmp_path / "fields.tif"
    fields = np.stack([picture(130, 150, seed) for seed in range(3)])
    tifffile.imwrite(path, fields, photometric="rgb", **layout)
    with pytest.warns(UserWarning, match="holds 3 images"):
        np.testing.assert_array_equal(finest(path), fields[0])
    np.testing.assert_array_equal(finest(path, series=2), fields[2])


def write_scenes(path: Path, images: dict[str, tuple[np.ndarray, float]], **options: Any) -> Path:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name, (image, mpp) in images.items():
            axes = "YXS" if image.shape[-1] == 3 else "CYX"
            about = {"axes": axes, "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            if axes == "CYX":
                about["Channel"] = {"Name": [f"{name}-{number}" for number in range(len(image))]}
            writer.write(image, photometric="rgb" if axes == "YXS" else "minisblack", metadata=about, **options)
    return path


def test_a_slide_has_the_pixel_size_of_the_image_that_is_taken(tmp_path: Path) -> None:
    path = write_scenes(
        tmp_path / "scenes.ome.tif", {"macro": (SMALL, 9.0), "left": (LARGE, 0.5), "right": (MIDDLE, 0.25)}
    )
    with pytest.warns(UserWarning, match=r"0 \(macro, 90 x 70 px\), 1 \(left, 420 x 300 px\), 2 \(right"):
        sdata = slide(path)
    assert contract.info(sdata)["mpp"] == 0.5
    np.testing.assert_array_equal(contract.levels(sdata, "he")[0].data.compute(), np.moveaxis(LARGE, -1, 0))
    right = slide(path, series="right")
    assert contract.info(right)["mpp"] == 0.25
    np.testing.assert_array_equal(contract.levels(right, "he")[0].data.compute(), np.moveaxis(MIDDLE, -1, 0))
    for wrong in ("none", 3, -1):
        with pytest.raises(ValueError, match=r"Expected `series` to be one of the images in .*right, 200 x 160 px"):
            slide(path, series=wrong)


def test_labels_and_macro_pictures_need_no_mention(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "a.ome.tif", {"label": (LARGE, 9.0), "scan": (MIDDLE, 0.5), "Macro": (SMALL, 9.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(finest(path), MIDDLE)


def test_codex_takes_the_largest_scene_with_its_own_names_and_pixel_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    overview = random.integers(0, 9000, (2, 40, 50), dtype=np.uint16)
    first = random.integers(0, 9000, (3, 140, 150), dtype=np.uint16)
    second = random.integers(0, 9000, (3, 240, 250), dtype=np.uint16)
    path = write_scenes(tmp_path / "a.ome.tif", {"overview": (overview, 8.0), "A": (first, 0.4), "B": (second, 0.5)})
    with pytest.warns(UserWarning, match=r"holds 3 images: .*Image 2 was taken"):
        sdata = codex(image=path)
    image = sdata.images["multiplex"]
    assert get_channel_names(image) == ["B-0", "B-1", "B-2"]
    assert contract.info(sdata)["mpp"] == 0.5
    np.testing.assert_array_equal(image["scale0"]["image"].data.compute(), second)
    chosen = codex(image=path, series="A")
    assert get_channel_names(chosen.images["multiplex"]) == ["A-0", "A-1", "A-2"]
    assert contract.info(chosen)["mpp"] == 0.4
    np.testing.assert_array_equal(chosen.images["multiplex"]["scale0"]["image"].data.compute(), first)
    with pytest.raises(ValueError, match="Expected `series` to be one of the images"):
        codex(image=path, series=5)


def test_images_without_a_choice_refuse_one(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "a.png"), SMALL)
    with pytest.raises(ValueError, match=r"Expected `series` only for a TIFF, found 1 for .*a.png"):
        slide(tmp_path / "a.png", series=1)


def test_moving_pictures_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(picture(40, 50, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"Expected one image, found 3 in .*a.webp"):
        open_raster(tmp_path / "a.webp")


# --------------------------------------------------------------------------------------------------
# pixels as they are stored


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tiles", "strips"])
def test_orientation_of_tiles_is_not_applied_and_said(tmp_path: Path, orientation: int, layout: dict[str, Any]) -> None:
    path = tmp_path / "turned.tif"
    turned = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(path, LARGE, photometric="rgb", extratags=turned, **layout)
    with pytest.warns(UserWarning, match=f"turned.tif states orientation {orientation}, which is not applied"):
        np.testing.assert_array_equal(finest(path), LARGE)
    channels = np.moveaxis(LARGE, -1, 0)
    tifffile.imwrite(path, channels, photometric="minisblack", extratags=turned, **layout)
    with pytest.warns(UserWarning, match=f"states orientation {orientation}"):
        np.testing.assert_array_equal(open_multichannel(path).levels[0].compute(), channels)


def write_pyramid(path: Path, shapes: list[tuple[int, int]], *, aperio: bool) -> list[np.ndarray]:
    images = [np.random.default_rng(n).integers(0, 256, (*shape, 3), dtype=np.uint8) for n, shape in enumerate(shapes)]
    height, width = shapes[0]
    about = f"Aperio Image Library v12.0.5 \r\n{width}x{height} [0,0 {width}x{height}] (64x64) RAW|MPP = 0.4990"
    with tifffile.TiffWriter(path) as writer:
        for number, image in enumerate(images):
            options: dict[str, Any] = {"description": about} if aperio else {"subfiletype": int(number > 0)}
            writer.write(image, photometric="rgb", tile=(64, 64), metadata=None, **options)
    return images


@pytest.mark.parametrize("aperio", [True, False])
def test_levels_of_no_exact_fraction_are_read_as_stored(tmp_path: Path, aperio: bool) -> None:
    path = tmp_path / ("a.svs" if aperio else "a.tif")
    images = write_pyramid(path, [(4403, 4801), (1100, 1200)], aperio=aperio)
    levels, mpp = open_raster(path)
    assert mpp == (0.499 if aperio else None)
    assert len(levels[1].chunks[2]) == 2
    for level, image in zip(levels, images, strict=False):
        np.testing.assert_array_equal(np.moveaxis(level[:, -150:, -300:].compute(), 0, -1), image[-150:, -300:])


def test_openslide_does_not_interpolate(tmp_path: Path) -> None:
    images = write_pyramid(tmp_path / "a.tif", [(803, 1001), (200, 250), (100, 125)], aperio=False)
    levels, _ = openslide_levels(tmp_path / "a.tif")
    for level, image in zip(levels, images, strict=True):
        np.testing.assert_array_equal(np.moveaxis(level[:, 33:77, 51:99].compute(), 0, -1), image[33:77, 51:99])


def test_large_levels_that_openslide_would_interpolate_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stimage_sd.io._lazy_levels.WHOLE", 150)
    write_pyramid(tmp_path / "a.tif", [(803, 1001), (200, 250), (100, 125)], aperio=False)
    levels, _ = openslide_levels(tmp_path / "a.tif")
    assert [level.shape for level in levels] == [(3, 803, 1001), (3, 100, 125)]


@pytest.mark.parametrize("multiplied", [False, True])
def test_alpha_of_tiles_is_laid_on_white(tmp_path: Path, multiplied: bool) -> None:
    image = np.dstack([SMALL, np.full(SMALL.shape[:2], 128, np.uint8)])
    opacity = 128 / 255
    expected = SMALL * opacity + 255 * (1 - opacity)
    if multiplied:
        image[..., :3] = np.rint(SMALL * opacity)
    kind = "assocalpha" if multiplied else "unassalpha"
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(64, 64), extrasamples=[kind])
    with pytest.warns(UserWarning, match="alpha channel"):
        found = finest(tmp_path / "a.tif")
    assert np.abs(found - expected).max() <= 1.0
