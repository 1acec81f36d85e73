"""The size of a pixel, as image files state it: in any unit, and of square pixels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from stimage_sd import contract
from stimage_sd.io import codex, slide
from stimage_sd.io._multichannel import open_multichannel
from stimage_sd.io._raster import open_raster

COLORS = np.full((64, 80, 3), 200, np.uint8)
CHANNELS = np.zeros((2, 64, 80), np.uint16)


def ome(path: Path, x: float, y: float, unit: str = "µm", *, colors: bool) -> Path:
    about = {"PhysicalSizeX": x, "PhysicalSizeXUnit": unit, "PhysicalSizeY": y, "PhysicalSizeYUnit": unit}
    pixels, axes = (COLORS, "YXS") if colors else (CHANNELS, "CYX")
    tifffile.imwrite(path, pixels, ome=True, metadata={"axes": axes, **about}, photometric="rgb" if colors else None)
    return path


def tagged(path: Path, x: float, y: float, *, colors: bool, **options: Any) -> Path:
    """Resolutions as tags of a TIFF, pixels per centimeter."""
    pixels = COLORS if colors else CHANNELS
    options = {"resolutionunit": "CENTIMETER", "metadata": None, **options}
    photometric = "rgb" if colors else "minisblack"
    tifffile.imwrite(path, pixels, resolution=(1e4 / x, 1e4 / y), photometric=photometric, **options)
    return path


@pytest.mark.parametrize("unit", ["micron", "um", "\\u00B5m", "inch"])
def test_units_of_imagej_are_read_by_every_reader(tmp_path: Path, unit: str) -> None:
    side = 0.5 if unit != "inch" else 0.5 / 25_400.0
    about = {"resolution": (1 / side, 1 / side), "imagej": True, "metadata": {"unit": unit}}
    tifffile.imwrite(tmp_path / "colors.tif", COLORS[None], photometric="rgb", **about)
    tifffile.imwrite(tmp_path / "channels.tif", CHANNELS, **about)
    assert open_raster(tmp_path / "colors.tif")[1] == pytest.approx(0.5)
    assert open_multichannel(tmp_path / "channels.tif").pixel_um == pytest.approx(0.5)


@pytest.mark.parametrize("write", [ome, tagged])
def test_oblong_pixels_are_no_resolution(tmp_path: Path, write: Any) -> None:
    name = "a.ome.tif" if write is ome else "a.tif"
    colors = write(tmp_path / name, 0.25, 0.5, colors=True)
    channels = write(tmp_path / f"channels_{name}", 0.25, 0.5, colors=False)
    for given in (None, 0.3):
        with pytest.warns(UserWarning, match=r"pixels of 0\.2500 x 0\.5000 µm .*Resample"):
            assert contract.mpp(slide(colors, mpp=given)) == given
    with (
        pytest.warns(UserWarning, match=r"pixels of 0\.2500 x 0\.5000 µm .*Resample"),
        pytest.raises(ValueError, match="Pass `mpp=`"),
    ):
        codex(image=channels)


@pytest.mark.parametrize("write", [ome, tagged])
def test_sides_that_a_scanner_measured_are_one_size(tmp_path: Path, write: Any) -> None:
    name = "a.ome.tif" if write is ome else "a.tif"
    assert open_raster(write(tmp_path / name, 0.2520, 0.2522, colors=True))[1] == pytest.approx(0.2521)
    channels = open_multichannel(write(tmp_path / f"channels_{name}", 0.2520, 0.2522, colors=False))
    assert channels.pixel_um == pytest.approx(0.2521)
