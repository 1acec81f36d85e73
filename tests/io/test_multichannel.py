"""Fluorescence and multiplex TIFFs of every kind, and what can be wrong with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import tifffile

from stimage_sd.io._multichannel import open_multichannel


def planes(
    n_channels: int = 3, height: int = 700, width: int = 900, dtype: str = "uint16", seed: int = 0
) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, np.iinfo(dtype).max, (n_channels, height, width), dtype=dtype, endpoint=True)


def write_ome(path: Path, array: np.ndarray, *, names: list[str] | None = None, **options: Any) -> Path:
    about: dict[str, Any] = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    if names is not None:
        about["Channel"] = {"Name": names}
    tifffile.imwrite(path, array, metadata=about, ome=True, **options)
    return path


def write_parts(folder: Path, array: np.ndarray, names: list[str]) -> list[Path]:
    """An OME-TIFF of one file a channel, of which the first describes them all, as the instrument writes them."""
    files = [folder / f"morphology_focus_{number:04}.ome.tif" for number in range(len(array))]
    channels = "".join(f'<Channel ID="Channel:{n}" Name="{name}" SamplesPerPixel="1"/>' for n, name in enumerate(names))
    parts = "".join(
        f'<TiffData IFD="0" FirstC="{n}" FirstT="0" FirstZ="0" PlaneCount="1"><UUID FileName="{file.name}">'
        f"urn:uuid:0000000{n}-0000-0000-0000-000000000000</UUID></TiffData>"
        for n, file in enumerate(files)
    )
    for number, file in enumerate(files):
        description = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:0000000{number}-0000-0000-0000-000000000000"><Image ID="Image:0"><Pixels '
            f'DimensionOrder="XYCZT" ID="Pixels:0" SizeC="{len(array)}" SizeT="1" SizeX="{array.shape[2]}" '
            f'SizeY="{array.shape[1]}" SizeZ="1" Type="uint16" PhysicalSizeX="0.2125" PhysicalSizeY="0.2125">'
            f"{channels}{parts}</Pixels></Image></OME>"
        )
        with tifffile.TiffWriter(file, ome=False) as writer:
            common: dict[str, Any] = {"tile": (256, 256), "compression": "zlib", "metadata": None}
            writer.write(array[number], subifds=1, description=description.encode(), **common)
            writer.write(array[number, ::2, ::2], subfiletype=1, **common)
    return files


# --------------------------------------------------------------------------------------------------
# what comes out


def test_real_qptiff(data_dir: Path) -> None:
    path = data_dir / "slides" / "small_vectra.qptiff"
    image = open_multichannel(path)
    assert image.channels == ["DAPI", "FITC", "Cy3"]
    assert image.named
    # 4294967295 / 213260 pixels a centimeter, as its tags say
    assert image.pixel_um == pytest.approx(1e4 * 213260 / 4294967295)
    with tifffile.TiffFile(path) as tiff:
        expected = np.stack([tiff.pages[number].asarray() for number in range(3)])
    assert isinstance(image.levels[0], da.Array)
    np.testing.assert_array_equal(image.levels[0].compute(), expected)
    assert [level.shape for level in image.levels] == [(3, 1440, 1920), (3, 720, 960)]


def test_real_xenium_image_without_names_or_size(data_dir: Path) -> None:
    path = data_dir / "xenium_tiny" / "morphology_focus.ome.tif"
    image = open_multichannel(path)
    assert (image.channels, image.named, image.pixel_um) == (["channel_1"], False, None)
    np.testing.assert_array_equal(image.levels[0].compute()[0], tifffile.imread(path))


def forms() -> dict[str, Callable[[Path], np.ndarray]]:
    """Ways to write an image; each returns the channels that are to come out."""

    def plain(path: Path, **options: Any) -> np.ndarray:
        tifffile.imwrite(path, planes(), photometric="minisblack", metadata=None, **options)
        return planes()

    def ome(path: Path, array: np.ndarray, **options: Any) -> np.ndarray:
        write_ome(path, array, **options)
        return array

    def imagej(path: Path) -> np.ndarray:
        array = planes(6).reshape(2, 3, 700, 900)
        tifffile.imwrite(path, array, imagej=True, metadata={"axes": "TCYX"})
        return array.reshape(6, 700, 900)

    def samples(path: Path, **options: Any) -> np.ndarray:
        array = planes(3, dtype="uint8")
        layout = array if options.get("planarconfig") == "separate" else np.moveaxis(array, 0, -1)
        tifffile.imwrite(path, layout, photometric="rgb", metadata=None, **options)
        return array

    return {
        "one plane": lambda path: ome(path, planes(1)),
        "contiguous": plain,
        "big endian": lambda path: plain(path, byteorder=">"),
        "big endian, tiled": lambda path: plain(path, byteorder=">", tile=(128, 256), compression="zlib"),
        "strips": lambda path: plain(path, rowsperstrip=7, compression="lzw"),
        "tiles": lambda path: plain(path, tile=(256, 128)),
        "OME, contiguous": lambda path: ome(path, planes()),
        "OME, tiled": lambda path: ome(path, planes(), tile=(256, 256), compression="zlib", predictor=True),
        "OME, 32-bit float": lambda path: ome(path, planes().astype(np.float32) / 7),
        "ImageJ hyperstack": imagej,
        "interleaved": samples,
        "interleaved, tiled": lambda path: samples(path, tile=(256, 256), compression="zlib"),
        "separate": lambda path: samples(path, planarconfig="separate"),
        "separate, tiled": lambda path: samples(path, planarconfig="separate", tile=(256, 256), compression="zlib"),
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_gives_its_channels(tmp_path: Path, form: str) -> None:
    path = tmp_path / "image.tif"
    expected = forms()[form](path)
    level = open_multichannel(path).levels[0]
    assert level.dtype == expected.dtype
    assert level.dtype.isnative
    np.testing.assert_array_equal(level.compute(), expected)
    # Regions that no chunk ends at, of channels out of order.
    np.testing.assert_array_equal(level[::-1, 33:601, 250:777].compute(), expected[::-1, 33:601, 250:777])


def test_a_files_own_levels_are_read_and_missing_ones_averaged(tmp_path: Path) -> None:
    finest, coarser = planes(2, 2600, 2400), planes(2, 1300, 1200, seed=1)
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif", ome=True) as writer:
        writer.write(finest, subifds=1, tile=(256, 256), metadata={"axes": "CYX"})
        writer.write(coarser, subfiletype=1, tile=(256, 256))
    levels = open_multichannel(tmp_path / "pyramid.ome.tif").levels
    assert [level.shape for level in levels] == [(2, 2600, 2400), (2, 1300, 1200), (2, 650, 600)]
    np.testing.assert_array_equal(levels[1].compute(), coarser)
    mean = coarser.reshape(2, 650, 2, 600, 2).mean(axis=(2, 4))
    assert np.abs(levels[2].compute() - mean).max() <= 0.5


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_averaging_odd_sizes_of_any_type(tmp_path: Path, dtype: str) -> None:
    array = (planes(1, 1301, 1027, seed=2) / 3).astype(dtype)
    tifffile.imwrite(tmp_path / "odd.tif", array[0], metadata=None)
    levels = open_multichannel(tmp_path / "odd.tif").levels
    assert [(level.shape, level.dtype) for level in levels] == [
        ((1, 1301, 1027), np.dtype(dtype)),
        ((1, 651, 514), np.dtype(dtype)),
    ]
    even = np.pad(array[0].astype(float), [(0, 1), (0, 1)], mode="edge")
    mean = even.reshape(651, 2, 514, 2).mean(axis=(1, 3))
    assert np.abs(levels[1].compute()[0] - mean).max() <= (0.5 if np.dtype(dtype).kind in "iu" else 0.01)


def test_image_of_several_files(tmp_path: Path) -> None:
    array = planes(3, 1400, 1200)
    names = ["DAPI", "ATP1A1/CD45/E-Cadherin", "18S"]
    files = write_parts(tmp_path, array, names)
    image = open_multichannel(files[0], several_files=True)
    assert image.channels == names
    assert image.pixel_um == 0.2125
    np.testing.assert_array_equal(image.levels[0].compute(), array)
    np.testing.assert_array_equal(image.levels[1].compute(), array[:, ::2, ::2])


def test_image_of_several_files_that_lacks_one(tmp_path: Path) -> None:
    files = write_parts(tmp_path, planes(3), ["a", "b", "c"])
    whole = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected morphology_focus_0001.ome.tif beside .*_0000.ome.tif"):
        open_multichannel(files[0], several_files=True)
    for size in (0, 100, len(whole) // 2):
        files[1].write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"morphology_focus_0001.ome.tif"):
            open_multichannel(files[0], several_files=True)


# --------------------------------------------------------------------------------------------------
# laziness


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A damaged tile is met where it is read, named, and nowhere else; the graph can be sent to a worker."""
    array = planes(2, 2100, 2100)
    path = write_ome(tmp_path / "damaged.ome.tif", array, tile=(512, 512), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[1].dataoffsets[-1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    level = pickle.loads(pickle.dumps(open_multichannel(path).levels[0]))
    np.testing.assert_array_equal(level[0].compute(), array[0])
    np.testing.assert_array_equal(level[1, :1024, :1024].compute(), array[1, :1024, :1024])
    with pytest.raises(ValueError, match=r"damaged.ome.tif is truncated, damaged"):
        level[1, 2050:, 2050:].compute()


def test_many_threads_read_many_pages_of_one_file(tmp_path: Path) -> None:
    """All pages share one file handle: its position must not move between a thread's seek and its read."""
    array = planes(12, 1200, 1100)
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif", ome=True) as writer:
        common: dict[str, Any] = {"tile": (256, 256), "compression": "zlib"}
        writer.write(array, subifds=1, metadata={"axes": "CYX"}, **common)
        writer.write(array[:, ::2, ::2], subfiletype=1, **common)
    level = open_multichannel(tmp_path / "pyramid.ome.tif").levels[0]
    with dask.config.set(scheduler="threads", num_workers=8):
        np.testing.assert_array_equal(level.compute(), array)


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    for seed in (0, 1):
        path = write_ome(tmp_path / "image.ome.tif", planes(seed=seed), tile=(256, 256))
        np.testing.assert_array_equal(open_multichannel(path).levels[0].compute(), planes(seed=seed))


# --------------------------------------------------------------------------------------------------
# names and pixel size


def test_names(tmp_path: Path) -> None:
    small = planes(3, 32, 40)
    ome = write_ome(tmp_path / "ome.tif", small, names=["DAPI", "CD3", "DAPI"])
    assert open_multichannel(ome).channels == ["DAPI", "CD3", "DAPI-1"]
    tifffile.imwrite(tmp_path / "ij.tif", small, imagej=True, metadata={"axes": "CYX", "Labels": ["a", "b", "c"]})
    assert open_multichannel(tmp_path / "ij.tif").channels == ["a", "b", "c"]
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for name, plane in zip("xyz", small, strict=True):
            writer.write(plane, metadata=None, extratags=[(285, "s", 0, name, True)], contiguous=False)
    image = open_multichannel(tmp_path / "pages.tif")
    assert (image.channels, image.named) == (["x", "y", "z"], True)
    tifffile.imwrite(tmp_path / "none.tif", small, photometric="minisblack", metadata=None)
    image = open_multichannel(tmp_path / "none.tif")
    assert (image.channels, image.named) == (["channel_1", "channel_2", "channel_3"], False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ome": True, "metadata": {"axes": "CYX", "PhysicalSizeX": 325.0, "PhysicalSizeXUnit": "nm"}}, 0.325),
        ({"ome": True, "metadata": {"axes": "CYX", "PhysicalSizeX": 5e-4, "PhysicalSizeXUnit": "mm"}}, 0.5),
        ({"ome": True, "metadata": {"axes": "CYX", "PhysicalSizeX": 300.0, "PhysicalSizeXUnit": "µm"}}, None),
        ({"imagej": True, "metadata": {"axes": "CYX", "unit": "um"}, "resolution": (4.0, 4.0)}, 0.25),
        ({"imagej": True, "metadata": {"axes": "CYX", "unit": "micron"}, "resolution": (2.0, 2.0)}, 0.5),
        ({"metadata": None, "resolution": (20000.0, 20000.0), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"metadata": None, "resolution": (50800.0, 50800.0), "resolutionunit": "INCH"}, 0.5),
        ({"metadata": None, "resolution": (72.0, 72.0), "resolutionunit": "INCH"}, None),
        ({"metadata": None}, None),
    ],
)
def test_pixel_size(tmp_path: Path, options: dict[str, Any], expected: float | None) -> None:
    tifffile.imwrite(tmp_path / "image.tif", planes(2, 32, 40), photometric="minisblack", **options)
    found = open_multichannel(tmp_path / "image.tif").pixel_um
    assert found is None if expected is None else found == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# files that are wrong


@pytest.mark.parametrize("options", [{}, {"tile": (256, 256), "compression": "zlib"}], ids=["contiguous", "tiled"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, options: dict[str, Any], share: float) -> None:
    path = write_ome(tmp_path / "cut.ome.tif", planes(), **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut.ome.tif is truncated, damaged or no TIFF"):
        open_multichannel(path)


def test_truncated_qptiff(data_dir: Path, tmp_path: Path) -> None:
    content = (data_dir / "slides" / "small_vectra.qptiff").read_bytes()
    (tmp_path / "half.qptiff").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half.qptiff is truncated"):
        open_multichannel(tmp_path / "half.qptiff")


def test_files_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.tif is truncated, damaged or no TIFF"):
        open_multichannel(tmp_path / "text.tif")
    with pytest.raises(FileNotFoundError, match="found nothing"):
        open_multichannel(tmp_path / "none.tif")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        open_multichannel(tmp_path)
    tifffile.imwrite(tmp_path / "stack.ome.tif", planes(4, 32, 40), metadata={"axes": "ZYX"}, ome=True)
    with pytest.raises(ValueError, match=r"a stack of 4 focal planes in .*stack.ome.tif"):
        open_multichannel(tmp_path / "stack.ome.tif")
