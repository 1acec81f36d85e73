"""Images of every kind open lazily, as they are, or are refused with a reason."""

from __future__ import annotations

import itertools
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import dask.array as da
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stimage_sd._cache import cache_dir
from stimage_sd.io import _pyramid
from stimage_sd.io._lazy_levels import on_white, openslide_levels
from stimage_sd.io._raster import open_raster, raster_from_array, raster_size
from stimage_sd.io._tiff_region import holds_rgb_in_jpeg_2000


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth color picture, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(40, 250, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path: Path, image: np.ndarray, *parameters: int) -> Path:
    colors = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 and image.shape[2] == 3 else image
    assert cv2.imwrite(str(path), colors, parameters)
    return path


def pixels(level: da.Array) -> np.ndarray:
    return np.moveaxis(level.compute(), 0, -1)


def area_mean(image: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels, the odd border repeated, in floating point."""
    padded = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge").astype(float)
    return (padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]) / 4.0


@pytest.mark.parametrize(("height", "width"), [(2501, 1999), (1024, 1024), (1, 3), (2049, 700)])
def test_streamed_png_is_bit_equal_at_every_size(tmp_path: Path, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    levels, mpp = open_raster(save(tmp_path / "a.png", image))
    assert mpp is None
    assert [level.shape[1:] for level in levels] == _pyramid.level_shapes(height, width)
    assert max(levels[-1].shape[1:]) <= 1024
    np.testing.assert_array_equal(pixels(levels[0]), image)


def test_levels_are_area_means_across_strip_borders(tmp_path: Path) -> None:
    image = picture(2501, 3001)
    levels, _ = open_raster(save(tmp_path / "a.png", image))
    assert len(levels) == 3
    for finer, coarser in itertools.pairwise(levels):
        assert np.abs(area_mean(pixels(finer)) - pixels(coarser)).max() <= 0.5


def test_jpeg_equals_opencv(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", picture(1500, 1300))
    np.testing.assert_array_equal(pixels(open_raster(path)[0][0]), cv2.imread(str(path))[..., ::-1])
    assert raster_size(path) == (1500, 1300)


def test_striped_tiff_streams_and_states_its_resolution(tmp_path: Path) -> None:
    image = picture(700, 900)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    levels, mpp = open_raster(path)
    np.testing.assert_array_equal(pixels(levels[0]), image)
    assert mpp == pytest.approx(0.5)


def test_a_printers_resolution_is_not_taken_for_a_microscopes(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(64, 64), photometric="rgb", resolution=(300, 300), resolutionunit="INCH")
    assert open_raster(path)[1] is None


def test_tiled_tiff_is_read_where_it_lies(tmp_path: Path) -> None:
    image = picture(1500, 2100)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256))
    levels, _ = open_raster(path)
    np.testing.assert_array_equal(pixels(levels[0]), image)
    assert [level.shape for level in levels] == [(3, 1500, 2100), (3, 750, 1050), (3, 375, 525)]
    assert np.abs(area_mean(image) - pixels(levels[1])).max() <= 0.5
    assert not any(path.name in str(found) for found in cache_dir().glob("images/*"))


def test_ome_tiff_pyramid_that_openslide_misses(tmp_path: Path) -> None:
    image = picture(1500, 2100)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm"}
        options = {"photometric": "rgb", "tile": (256, 256)}
        writer.write(image, subifds=2, metadata=metadata, **options)
        writer.write(image[::2, ::2], subfiletype=1, **options)
        writer.write(image[::4, ::4], subfiletype=1, **options)
    levels, mpp = open_raster(path)
    assert mpp == pytest.approx(0.25)
    for number, level in enumerate(levels[:3]):
        np.testing.assert_array_equal(pixels(level), image[:: 2**number, :: 2**number])
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(levels[1]))), image[::2, ::2])


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_chunks_lie_in_memory_as_the_file_stores_them(tmp_path: Path, planarconfig: str) -> None:
    """The stream takes pixels with their colors side by side without rearranging them."""
    image, path = picture(300, 500), tmp_path / "a.tif"
    stored = image if planarconfig == "contig" else np.ascontiguousarray(np.moveaxis(image, -1, 0))
    tifffile.imwrite(path, stored, photometric="rgb", planarconfig=planarconfig, tile=(128, 128))
    chunk = np.moveaxis(pixels_of_chunk(open_raster(path)[0][0]), 0, -1)
    np.testing.assert_array_equal(chunk, image)
    assert chunk.flags.c_contiguous == (planarconfig == "contig")


def pixels_of_chunk(level: da.Array) -> np.ndarray:
    (chunk,) = level.to_delayed().ravel()
    return np.asarray(chunk.compute())


def test_large_tiled_tiff_of_one_level_gets_a_pyramid(tmp_path: Path) -> None:
    image = picture(900, 5000)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256))
    levels, _ = open_raster(path)
    np.testing.assert_array_equal(pixels(levels[0]), image)
    assert [level.shape[2] for level in levels] == [5000, 2500, 1250, 625]


@pytest.mark.parametrize("compression", ["webp", "lzma", "jpeg2000", "png", "zstd", "packbits"])
def test_tiles_of_every_compression(tmp_path: Path, compression: str) -> None:
    """OpenSlide reads some, tifffile the others; all of these are without loss."""
    image = picture(600, 700)
    path = tmp_path / "a.tif"
    options = {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), compression=compression, **options)
    np.testing.assert_array_equal(pixels(open_raster(path)[0][0]), image)


def test_aperios_jpeg_2000(tmp_path: Path) -> None:
    image = picture(600, 700)
    path = tmp_path / "a.svs"
    about = "Aperio Image Library v12.0.5 \r\n700x600 [0,0 700x600] (256x256) J2K/KDU Q=70|AppMag = 20|MPP = 0.4990"
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(256, 256), compression=33005, description=about, metadata=None
    )
    levels, mpp = open_raster(path)
    assert mpp == pytest.approx(0.499)
    np.testing.assert_array_equal(pixels(levels[0]), image)


@pytest.mark.parametrize("tag", [33005, 33003])
def test_pixels_of_aperios_jpeg_2000_are_those_of_openslide(tmp_path: Path, tag: int) -> None:
    """tifffile reads tiles of red, green and blue, OpenSlide the others."""
    image, path = picture(512, 768), tmp_path / "a.svs"

    def tiles() -> Iterator[bytes]:
        for row, column in np.ndindex(2, 3):
            tile = np.ascontiguousarray(image[row * 256 :][:256, column * 256 :][:, :256])
            yield imagecodecs.jpeg2k_encode(tile, level=40, codecformat="J2K", mct=tag == 33005, reversible=False)

    about = "Aperio Image Library v12.0.5 \r\n768x512 [0,0 768x512] (256x256) J2K/KDU Q=70|AppMag = 20|MPP = 0.5"
    options = {"photometric": "rgb", "tile": (256, 256), "compression": tag, "metadata": None}
    tifffile.imwrite(path, tiles(), shape=image.shape, dtype=np.uint8, description=about, **options)
    with tifffile.TiffFile(path) as tiff:
        assert holds_rgb_in_jpeg_2000(tiff.pages[0].aspage()) == (tag == 33005)
    with openslide.OpenSlide(path) as opened:
        expected = on_white(np.asarray(opened.read_region((0, 0), 0, opened.dimensions)))
    np.testing.assert_array_equal(pixels(open_raster(path)[0][0]), expected)
    if tag == 33005:
        assert np.abs(expected.astype(int) - image).mean() < 4


# --------------------------------------------------------------------------------------------------
# colors that lie apart


def write_planes(path: Path, image: np.ndarray, *, names: list[str] | None = None, levels: int = 1, **options) -> Path:
    """Write three gray planes as an OME-TIFF, as converters write H&E and microscopes write three markers."""
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    if names is not None:
        metadata["Channel"] = {"Name": names}
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number in range(levels):
            planes = np.ascontiguousarray(np.moveaxis(image[:: 2**number, :: 2**number], -1, 0))
            first = {"metadata": metadata, "subifds": levels - 1} if number == 0 else {"subfiletype": 1}
            writer.write(planes, photometric="minisblack", **first, **options)
    return path


def test_planes_named_by_their_colors(tmp_path: Path) -> None:
    image = picture(1500, 2100) // 4  # dark, but named
    path = write_planes(tmp_path / "a.ome.tif", image, names=["Red", "Green", "Blue"], levels=3, tile=(256, 256))
    levels, mpp = open_raster(path)
    assert mpp == pytest.approx(0.25)
    for number, level in enumerate(levels[:3]):
        np.testing.assert_array_equal(pixels(level), image[:: 2**number, :: 2**number])


@pytest.mark.parametrize(
    "layout",
    [{"tile": (256, 256)}, {"rowsperstrip": 32, "compression": "zlib"}, {}],
    ids=["tiles", "strips", "one piece"],
)
def test_unnamed_planes_that_are_light_are_colors(tmp_path: Path, layout: dict) -> None:
    image = np.maximum(picture(1100, 1300), 90)
    path = write_planes(tmp_path / "a.ome.tif", image, **layout)
    with pytest.warns(UserWarning, match=r"a.ome.tif has three planes .* taken for red, green and blue"):
        levels, _ = open_raster(path)
    np.testing.assert_array_equal(pixels(levels[0]), image)


@pytest.mark.parametrize("names", [None, ["DAPI", "CD8", "PanCK"]])
def test_planes_of_markers_are_refused(tmp_path: Path, names: list[str] | None) -> None:
    image = picture(600, 700) // (4 if names is None else 1)
    path = write_planes(tmp_path / "a.ome.tif", image, names=names, tile=(256, 256))
    with pytest.raises(ValueError, match=r"found 3 channel\(s\) of uint8 .*a.ome.tif.*`stimage_sd.io.codex"):
        open_raster(path)


@pytest.mark.parametrize("layout", [{"tile": (256, 256)}, {}], ids=["tiles", "strips"])
def test_planar_samples(tmp_path: Path, layout: dict) -> None:
    image = picture(900, 1300)
    path = tmp_path / "a.tif"
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", **layout)
    np.testing.assert_array_equal(pixels(open_raster(path)[0][0]), image)


# --------------------------------------------------------------------------------------------------
# slides


def write_ndpi(path: Path, image: np.ndarray, *, mpp: float) -> Path:
    """Write a slide as Hamamatsu's scanners do: a TIFF with offsets of 64 bit, a level one JPEG."""
    jpeg = imagecodecs.jpeg_encode(image, level=95)
    body = bytearray(struct.pack("<2sHQ", b"II", 42, 0)) + jpeg + bytes(len(jpeg) % 2)
    places = {}
    values = {
        "bits": struct.pack("<HHH", 8, 8, 8),
        "make": b"Hamamatsu\0",
        "mpp": struct.pack("<II", int(1e4 / mpp), 1),
    }
    for name, value in values.items():
        places[name] = len(body)
        body += value
    height, width = image.shape[:2]
    lens = struct.unpack("<I", struct.pack("<f", 20.0))[0]
    tags = [
        (254, 4, 1, 0),
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, places["bits"]),
        (259, 3, 1, 7),
        (262, 3, 1, 6),
        (271, 2, 10, places["make"]),
        (273, 4, 1, 12),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, len(jpeg)),
        (282, 5, 1, places["mpp"]),
        (283, 5, 1, places["mpp"]),
        (296, 3, 1, 3),
        (65420, 4, 1, 1),
        (65421, 11, 1, lens),
        *((code, 9, 1, 0) for code in (65422, 65423, 65424)),
    ]
    struct.pack_into("<Q", body, 4, len(body))
    body += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(body + struct.pack("<Q", 0) + bytes(4 * len(tags)))
    return path


def test_ndpi_is_read_where_it_lies(tmp_path: Path) -> None:
    image = picture(1104, 1504)
    path = write_ndpi(tmp_path / "a.ndpi", image, mpp=0.46)
    levels, mpp = open_raster(path)
    assert mpp == pytest.approx(0.46, rel=1e-4)
    assert [level.shape for level in levels] == [(3, 1104, 1504), (3, 552, 752), (3, 276, 376), (3, 138, 188)]
    assert np.abs(pixels(levels[0]).astype(int) - image).mean() < 1.5
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a.ndpi is truncated, damaged or no image"):
        open_raster(path)


def test_mirax_without_its_folder(tmp_path: Path) -> None:
    """The file itself is a thumbnail, which would pass for the slide."""
    path = save(tmp_path / "a.jpg", picture(200, 300)).rename(tmp_path / "a.mrxs")
    with pytest.raises(ValueError, match=r"Expected the folder of a.mrxs beside it"):
        open_raster(path)


def test_damage_that_only_reading_finds(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(1500, 1500), photometric="rgb", tile=(256, 256), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[8]
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = bytes(400)
    path.write_bytes(data)
    levels, _ = open_raster(path)
    with pytest.raises(ValueError, match=r"level 0 of .*a.tif is damaged"):
        levels[0].compute()
    path.unlink()
    with pytest.raises(ValueError, match=r"level 0 of .*a.tif is damaged, or the file gone"):
        levels[0].compute()


def test_slide_regions_equal_openslide(data_dir: Path) -> None:
    path = data_dir / "slides" / "CMU-1-Small-Region.svs"
    levels, mpp = open_raster(path)
    assert mpp == pytest.approx(0.499)
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((900, 1100), 0, (300, 200)))[..., :3]
    np.testing.assert_array_equal(pixels(levels[0][:, 1100:1300, 900:1200]), expected)


def test_slide_levels_can_go_to_another_process(data_dir: Path) -> None:
    levels, _ = openslide_levels(data_dir / "slides" / "CropBreastSlide.tiff")
    sent = pickle.loads(pickle.dumps(levels[2]))
    np.testing.assert_array_equal(sent.compute(), levels[2].compute())


def test_pyramid_is_reused_and_made_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", picture(300, 300))
    streamed = []
    real = _pyramid._stream
    monkeypatch.setattr(_pyramid, "_stream", lambda *given, **named: (streamed.append(1), real(*given, **named)))
    open_raster(path)
    open_raster(path)
    assert len(streamed) == 1
    other = picture(310, 290, seed=1)
    np.testing.assert_array_equal(pixels(open_raster(save(path, other))[0][0]), other)
    assert len(streamed) == 2


def test_interrupted_pyramid_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / "cache"))
    image = picture(2500, 200)
    path = save(tmp_path / "a.png", image)
    real = _pyramid._LevelWriter.add

    def interrupted(writer: _pyramid._LevelWriter, rows: np.ndarray) -> None:
        if writer.start > 0:
            raise KeyboardInterrupt
        real(writer, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_pyramid._LevelWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_raster(path)
    assert list((tmp_path / "cache" / "images").iterdir()) == []
    np.testing.assert_array_equal(pixels(open_raster(path)[0][0]), image)


def test_purged_chunks_of_a_cached_pyramid_are_read_anew_and_never_black(tmp_path: Path) -> None:
    image = picture(2100, 1100)
    image[:1024, :1024] = 0  # black is no sign of a missing chunk
    path = save(tmp_path / "a.png", image)
    (level, *_), _ = open_raster(path)
    chunks = [chunk for chunk in cache_dir().glob("images/*.zarr/0/c/*/*/*") if chunk.is_file()]
    newest = max(chunks, key=lambda chunk: chunk.stat().st_mtime_ns).parents[4]
    for chunk in (newest / "0" / "c").rglob("1"):
        if chunk.is_file():
            chunk.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        level.compute()
    with pytest.warns(UserWarning, match=r"missing; a.png is read again"):
        (level, *_), _ = open_raster(path)
    np.testing.assert_array_equal(pixels(level), image)


# --------------------------------------------------------------------------------------------------
# refusals and warnings


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected an image file at .*none.png, found nothing"):
        open_raster(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        open_raster(tmp_path)


@pytest.mark.parametrize(
    ("name", "image", "found"),
    [
        ("gray.png", np.zeros((50, 50), np.uint8), r"1 channel\(s\) of uchar \(b-w\)"),
        ("gray.jpg", np.zeros((50, 50), np.uint8), r"1 channel\(s\) of uchar"),
        ("deep.png", np.zeros((50, 50, 3), np.uint16), r"3 channel\(s\) of ushort \(rgb16\)"),
        ("gray.tif", np.zeros((50, 50), np.uint8), r"1 channel\(s\) of uint8 \(MINISBLACK\)"),
        ("deep.tif", np.zeros((50, 50, 3), np.uint16), r"3 channel\(s\) of uint16 \(RGB\)"),
    ],
)
def test_not_8_bit_rgb(tmp_path: Path, name: str, image: np.ndarray, found: str) -> None:
    if name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, image)
    else:
        save(tmp_path / name, image)
    with pytest.raises(ValueError, match=f"Expected an 8-bit RGB H&E image, found {found}"):
        open_raster(tmp_path / name)


def test_fluorescence_is_not_taken_for_colors(data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"found 3 channel\(s\) of uint8 \(MINISBLACK\)"):
        open_raster(data_dir / "slides" / "small_vectra.qptiff")


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CropBreastSlide.tiff"])
def test_real_slides_cut_anywhere(data_dir: Path, tmp_path: Path, name: str) -> None:
    """Also where all pixels of the finest level are left and only a coarser one, or the label, is gone."""
    data = (data_dir / "slides" / name).read_bytes()
    path = tmp_path / name
    for size in {0, 4, 9, 300, *np.linspace(0, len(data), 12).astype(int)[1:-1].tolist(), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"{name} is truncated, damaged or no image"):
            open_raster(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "tiled.tif", "striped.tif"])
def test_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / name
    image = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    if name.endswith("tif"):
        tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256) if name == "tiled.tif" else None)
    else:
        save(path, image)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match="truncated, damaged or no image"):
        open_raster(path)
    left = tmp_path / "cache" / "images"
    assert not left.exists() or list(left.iterdir()) == []


def test_no_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("not an image at all")
    with pytest.raises(ValueError, match="truncated, damaged or no image"):
        open_raster(path)


def test_alpha_is_laid_on_white_with_a_warning(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 4), np.uint8)
    image[..., 0], image[..., 3] = 200, 255
    image[:, :30, 3] = 0
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), image)
    with pytest.warns(UserWarning, match="alpha channel"):
        levels, _ = open_raster(path)
    found = pixels(levels[0])
    assert (found[:, :30] == 255).all()
    assert (found[:, 30:] == [0, 0, 200]).all()


def test_orientation_is_not_applied_and_said(tmp_path: Path) -> None:
    image = picture(120, 200)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    with pytest.warns(UserWarning, match="states orientation 6"):
        levels, _ = open_raster(path)
    np.testing.assert_array_equal(pixels(levels[0]), image)


# --------------------------------------------------------------------------------------------------
# arrays


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_lazy_halving_equals_halving(image: np.ndarray) -> None:
    lazy = da.from_array(np.moveaxis(image, -1, 0), chunks=-1)
    np.testing.assert_array_equal(pixels(_pyramid.halve_lazily(lazy)), _pyramid.halve(image))


def test_arrays_of_either_layout(tmp_path: Path) -> None:
    image = picture(1500, 1100)
    for given_array in (image, np.moveaxis(image, -1, 0), da.from_array(image, chunks=(500, 500, 3))):
        levels = raster_from_array(given_array)
        np.testing.assert_array_equal(pixels(levels[0]), image)
        assert levels[0].chunks == ((3,), (1024, 476), (1024, 76))
        assert levels[1].shape == (3, 750, 550)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numbers_from_0_to_1_are_colors(dtype: str) -> None:
    image = picture(1100, 90)
    fraction = (image / 255.0).astype(dtype)
    for given_array in (fraction, np.moveaxis(fraction, -1, 0), da.from_array(fraction, chunks=(300, 90, 3))):
        levels = raster_from_array(given_array)
        assert levels[0].dtype == np.uint8
        np.testing.assert_array_equal(pixels(levels[0]), image)


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint16"])
def test_numbers_from_0_to_255_are_colors(dtype: str) -> None:
    image = picture(50, 90)
    np.testing.assert_array_equal(pixels(raster_from_array(image.astype(dtype))[0]), image)


def test_alpha_of_numbers_from_0_to_1() -> None:
    image = np.full((6, 6, 4), (0.2, 0.4, 0.6, 0.5))
    with pytest.warns(UserWarning, match="alpha channel"):
        levels = raster_from_array(image)
    # 0.5 is 128 of 255: colors as 51 * 128/255 + 255 * 127/255
    assert levels[0][:, 0, 0].compute().tolist() == [153, 178, 204]


def test_arrays_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found uint8 \(50, 50\)"):
        raster_from_array(np.zeros((50, 50), np.uint8))
    with pytest.raises(ValueError, match=r"found uint8 \(4, 50, 50\)"):
        raster_from_array(np.zeros((4, 50, 50), np.uint8))
    for values in (np.full((5, 5, 3), -0.1), np.full((5, 5, 3), 256.0), np.full((5, 5, 3), np.nan)):
        with pytest.raises(ValueError, match=r"numbers from 0 to 1 or from 0 to 255, found float64 from "):
            raster_from_array(values)
    with pytest.raises(ValueError, match="found uint16 from 256 to 256"):
        raster_from_array(np.full((5, 5, 3), 256, np.uint16))
    with pytest.raises(ValueError, match="found bool from nan"):
        raster_from_array(np.ones((5, 5, 3), bool))
    with pytest.warns(UserWarning, match="alpha channel"):
        assert (raster_from_array(np.zeros((5, 5, 4), np.uint8))[0].compute() == 255).all()


# --------------------------------------------------------------------------------------------------
# memory

MEASURE = """
import pathlib, sys, tempfile
import cv2, numpy as np
from stimage_sd.io._raster import open_raster

def peak():
    # Of this program alone: `resource.getrusage` would count the process that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

small = pathlib.Path(tempfile.mkdtemp()) / "small.jpg"  # of the same kind, so that all code is loaded
cv2.imwrite(str(small), np.zeros((9, 9, 3), np.uint8))
open_raster(small)
before = peak()
levels, _ = open_raster(sys.argv[1])
levels[-1].compute()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_streaming_needs_a_fraction_of_the_image(tmp_path: Path) -> None:
    height, width = 18_000, 8_000
    path = save(tmp_path / "a.jpg", cv2.resize(picture(600, 400), (width, height)))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    # Strips of a thousand rows, a few at a time: the height of the image does not matter.
    peak_mb = float(run.stdout.strip().splitlines()[-1])
    assert peak_mb < height * width * 3 / 2**20 / 2
