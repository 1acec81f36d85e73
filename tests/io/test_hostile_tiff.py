"""TIFFs that are damaged, or ask for another file or the whole machine, are refused before anything is allocated."""

from __future__ import annotations

import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from stimage_sd import contract
from stimage_sd.io import _jpeg_check as jpeg_check
from stimage_sd.io import codex, slide
from stimage_sd.io._jpeg_check import check_jpeg
from stimage_sd.io._multichannel import open_multichannel
from stimage_sd.io._raster import open_raster

READERS = [open_raster, open_multichannel]


def picture(height: int = 300, width: int = 400, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(40, 250, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + np.random.default_rng(seed).integers(-6, 7, smooth.shape), 1, 255).astype(np.uint8)


def pixels(reader: Callable[..., Any], path: Path) -> np.ndarray:
    opened = reader(path)
    return np.asarray((opened[0] if isinstance(opened, tuple) else opened.levels)[0])


def write_ome(
    path: Path, sizes: str, inner: str = "<TiffData/>", root: str = "", image: np.ndarray | None = None
) -> Path:
    stored = np.full((32, 40, 3), 200, np.uint8) if image is None else image
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeX="40" SizeY="32" {sizes} Type="uint8">{inner}</Pixels>'
        f"</Image>{root}</OME>"
    )
    tifffile.imwrite(path, stored, description=text, metadata=None, photometric="rgb")
    return path


# --------------------------------------------------------------------------------------------------
# other files


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    (tmp_path / "sent").mkdir()
    tifffile.imwrite(tmp_path / "secret" / "s.tif", np.full((32, 40, 3), 99, np.uint8), photometric="rgb")
    shutil.copy(tmp_path / "secret" / "s.tif", tmp_path / "sent" / "beside.tif")
    return tmp_path / "secret" / "s.tif"


@pytest.mark.parametrize("kind", ["absolute", "above", "backslash", "beside"])
def test_a_file_does_not_decide_which_other_file_is_read(secret: Path, kind: str) -> None:
    name = {"absolute": str(secret), "above": "../secret/s.tif", "backslash": r"..\s.tif", "beside": "beside.tif"}[kind]
    part = f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:1</UUID></TiffData>'
    path = write_ome(secret.parent.parent / "sent" / "a.ome.tif", 'SizeC="3" SizeT="1" SizeZ="1"', part)
    for reader in (slide, codex):
        argument = {"path": path} if reader is slide else {"image": path, "mpp": 0.5}
        with pytest.raises(ValueError, match=r"found that .*a.ome.tif keeps planes in .*only on request"):
            reader(**argument)
    if kind != "beside":
        with pytest.raises(ValueError, match=r"Expected the files of an image in one folder, found that .*a.ome.tif"):
            codex(image=path, mpp=0.5, several_files=True)


@pytest.mark.parametrize("name", ["../secret/s.jpg", r"..\s.jpg", "/etc/s.jpg"])
def test_slides_of_several_files_name_none_elsewhere(tmp_path: Path, name: str) -> None:
    vms, mrxs = tmp_path / "a.vms", tmp_path / "b.mrxs"
    vms.write_text(f"[Virtual Microscope Specimen]\nNoJpegColumns=1\nNoJpegRows=1\nImageFile={name}\n")
    assert cv2.imwrite(str(tmp_path / "b.jpg"), picture())
    (tmp_path / "b.jpg").rename(mrxs)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Slidedat.ini").write_text(f"[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = {name}\n")
    for path, index in ((vms, "a.vms"), (mrxs, "Slidedat.ini")):
        with pytest.raises(ValueError, match=rf"files of a slide in one folder, found that .*{index} refers to"):
            slide(path)


def test_the_files_of_one_image_are_read_on_request(tmp_path: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 200, (2, 32, 40), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", planes[1], metadata=None)
    parts = "".join(
        f'<TiffData IFD="0" FirstC="{n}" PlaneCount="1"><UUID FileName="{name}.tif">urn:uuid:{n}</UUID></TiffData>'
        for n, name in enumerate("ab")
    )
    sizes = 'SizeC="2" SizeT="1" SizeZ="1"'
    text = write_ome(tmp_path / "a.tif", sizes, parts)
    with tifffile.TiffFile(text) as tiff:
        description = tiff.ome_metadata
    tifffile.imwrite(tmp_path / "a.tif", planes[0], description=description, metadata=None)
    sdata = codex(image=tmp_path / "a.tif", mpp=0.5, several_files=True)
    np.testing.assert_array_equal(contract.levels(sdata, "multiplex")[0].data.compute(), planes)


# --------------------------------------------------------------------------------------------------
# small files that ask for much


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("sizes", "inner"),
    [
        ('SizeC="100000000" SizeT="1" SizeZ="1"', "<TiffData/>"),
        ('SizeC="3" SizeT="1000000000" SizeZ="1"', "<TiffData/>"),
        ('SizeC="30000" SizeT="1000" SizeZ="1000"', "<TiffData/>"),
        ('SizeC="3" SizeT="1" SizeZ="1"', '<TiffData IFD="0" PlaneCount="1000000000"/>'),
        ('SizeC="3" SizeT="1" SizeZ="1"', '<TiffData IFD="0" FirstT="1000000000" PlaneCount="1"/>'),
    ],
)
def test_descriptions_of_a_hundred_million_planes(
    tmp_path: Path, sizes: str, inner: str, reader: Callable[..., Any]
) -> None:
    path = write_ome(tmp_path / "a.ome.tif", sizes, inner)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a.ome.tif .*description speaks of [\d,]+ planes; at most 20,000"):
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text",
    [
        "ImageJ=1.11a\nimages=2000000000\nchannels=2000000000\nhyperstack=true\n",
        '{"shape": [1000000000, 32, 40]}',
    ],
)
def test_other_descriptions_of_many_planes(tmp_path: Path, text: str, reader: Callable[..., Any]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.ones((32, 40), np.uint8), description=text, metadata=None)
    with pytest.raises(ValueError, match=r"a.tif .*description speaks of"):
        reader(tmp_path / "a.tif")


def test_labels_of_a_stepped_axis(tmp_path: Path) -> None:
    annotation = (
        '<StructuredAnnotations><XMLAnnotation ID="A" Namespace="openmicroscopy.org/omero/dimension/modulo"><Value>'
        '<Modulo><ModuloAlongT Type="lifetime" Start="0" End="1000000000000" Step="0.001"/></Modulo></Value>'
        "</XMLAnnotation></StructuredAnnotations>"
    )
    path = write_ome(tmp_path / "a.ome.tif", 'SizeC="3" SizeT="1" SizeZ="1"', root=annotation)
    with pytest.raises(ValueError, match=r"a.ome.tif .*description speaks of"):
        open_multichannel(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("sizes", ['SizeC="3" SizeT="1 SizeZ="1"', 'SizeC="x" SizeT="1" SizeZ="1"', 'SizeC="3"'])
def test_malformed_descriptions_are_errors_with_the_files_name(
    tmp_path: Path, sizes: str, reader: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"a.ome.tif is truncated, damaged or no (image|TIFF) \("):
        reader(write_ome(tmp_path / "a.ome.tif", sizes))


def set_value(path: Path, code: int, value: int) -> None:
    """Overwrite the first number of a tag."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[code]
        form, place = {3: "H", 4: "I", 13: "I", 16: "Q"}[int(tag.dtype)], tag.valueoffset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack(f"<{form}", value))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("code", "layout"),
    [
        *((code, {"tile": (64, 64)}) for code in (256, 257, 322, 323)),
        *((code, {"rowsperstrip": 16}) for code in (256, 257)),
    ],
)
def test_sizes_that_no_machine_has(
    tmp_path: Path, code: int, layout: dict[str, Any], reader: Callable[..., Any]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", compression="zlib", **layout)
    set_value(path, code, 1 << 30)
    with pytest.raises(ValueError, match=r"a.tif"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
def test_directories_that_lead_back_to_themselves(tmp_path: Path, reader: Callable[..., Any]) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        common: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
        writer.write(picture(), subifds=1, **common)
        writer.write(picture()[::2, ::2], subfiletype=1, **common)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages.first.offset
    set_value(path, 330, first)
    with pytest.raises(ValueError, match=r"a.tif .*its directories lead back to byte"):
        reader(path)
    n_tags = struct.unpack_from("<H", whole, first)[0]
    path.write_bytes(whole[: first + 2 + 12 * n_tags] + struct.pack("<I", first) + whole[first + 6 + 12 * n_tags :])
    with pytest.raises(ValueError, match=r"a.tif .*its directories lead back to byte"):
        reader(path)


def test_too_many_pages(tmp_path: Path) -> None:
    values = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    tags = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in values)
    length, start, n = 2 + len(tags) + 4, 72, 30_000
    pages = (struct.pack("<H", len(values)) + tags + struct.pack("<I", start + length * (i + 1)) for i in range(n))
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHI", b"II", 42, start) + bytes(64) + b"".join(pages) + bytes(4))
    with pytest.raises(ValueError, match=r"a.tif .*more than 20,000 directories"):
        open_raster(tmp_path / "a.tif")


# --------------------------------------------------------------------------------------------------
# damage

LAYOUTS: dict[str, dict[str, Any]] = {
    "JPEG tiles": {"tile": (128, 128), "compression": "jpeg"},
    "deflate tiles": {"tile": (128, 128), "compression": "zlib"},
    "deflate strips": {"rowsperstrip": 40, "compression": "zlib"},
    "LZW tiles": {"tile": (128, 128), "compression": "lzw"},
    "LZW strips": {"rowsperstrip": 40, "compression": "lzw", "predictor": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixty_four_bytes_of_something_else(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", **LAYOUTS[layout])
    whole = path.read_bytes()
    intact = pixels(open_raster, path)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        parts = [(offset, count) for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    for number in range(len(parts)):
        random = np.random.default_rng(number)
        offset, count = parts[number]
        place = offset + int(random.integers(count // 8, count - 80))
        path.write_bytes(whole[:place] + random.bytes(64) + whole[place + 64 :])
        os.utime(path, ns=(number, number))
        with pytest.raises(ValueError, match=r"a.tif"):
            pixels(open_raster, path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(pixels(open_raster, path), intact)


def test_damage_in_jpeg_and_png_files(tmp_path: Path) -> None:
    for ending in ("jpg", "png"):
        path = tmp_path / f"a.{ending}"
        assert cv2.imwrite(str(path), picture())
        whole = path.read_bytes()
        for number in range(6):
            random = np.random.default_rng(number)
            place = int(random.integers(900, len(whole) - 80))
            path.write_bytes(whole[:place] + random.bytes(64) + whole[place + 64 :])
            os.utime(path, ns=(number, number))
            with pytest.raises(ValueError, match=rf"a.{ending} is truncated, damaged or no image"):
                pixels(open_raster, path)


@pytest.mark.parametrize(
    "options",
    [
        [cv2.IMWRITE_JPEG_QUALITY, 95],
        [cv2.IMWRITE_JPEG_QUALITY, 30],
        [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
        [cv2.IMWRITE_JPEG_RST_INTERVAL, 3],
        [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422],
    ],
)
def test_whole_jpegs_pass(options: list[int]) -> None:
    extremes = np.random.default_rng(0).choice([0, 255], (61, 83, 3)).astype(np.uint8)
    for image in (picture(127, 211), picture(64, 64)[..., 0], np.zeros((33, 9, 3), np.uint8), extremes):
        assert check_jpeg(cv2.imencode(".jpg", image, options)[1].tobytes()) is None


def test_codes_followed_at_once_are_those_followed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with all their coefficients have no code for their end; damage is found in the same place."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (61, 83, 3)).astype(np.uint8)
    for image, quality, more in product(
        (picture(90, 70), noise), (30, 100), ([], [cv2.IMWRITE_JPEG_RST_INTERVAL, 3], [cv2.IMWRITE_JPEG_OPTIMIZE, 1])
    ):
        whole = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality, *more])[1].tobytes()
        damaged = [whole]
        for change in range(24):
            place = int(random.integers(len(whole) // 3, len(whole) - 2))
            cut = place + int(random.integers(1, 9)) if change % 3 else len(whole)
            damaged.append(whole[:place] + (random.bytes(3) if change % 2 else b"") + whole[cut:])
        at_once = [_found(data) for data in damaged]
        with monkeypatch.context() as alone:
            alone.setattr(
                jpeg_check, "_runs", lambda codes, most: np.zeros((len(codes), 1 << jpeg_check.RUN), np.uint16)
            )
            jpeg_check._known.clear()
            one_by_one = [_found(data) for data in damaged]
        jpeg_check._known.clear()
        assert at_once == one_by_one
        assert at_once[0] is None
        assert sum(found is not None for found in at_once) > 10


def _found(data: bytes) -> str | None:
    try:
        check_jpeg(data)
    except ValueError as error:
        return str(error)
    return None


def test_a_header_that_is_cut_is_not_taken_for_that_of_the_next_image() -> None:
    whole = cv2.imencode(".jpg", picture(64, 64))[1].tobytes()
    scan = whole.index(b"\xff\xda") + 2 + int.from_bytes(whole[whole.index(b"\xff\xda") + 2 :][:2])
    jpeg_check._known.clear()
    with pytest.raises(ValueError, match="the JPEG data ends too early"):
        check_jpeg(whole[: scan - 2])
    check_jpeg(whole)


@pytest.mark.parametrize("layout", [{}, {"tile": (64, 64)}, *LAYOUTS.values()])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_download_with_a_tail_of_zeros(tmp_path: Path, layout: dict[str, Any], levels: int) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for number in range(levels):
            image = np.ascontiguousarray(picture()[:: 2**number, :: 2**number])
            writer.write(image, photometric="rgb", metadata=None, subfiletype=int(number > 0), **layout)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[levels - 1].aspage()
        middle = page.dataoffsets[0] + (max(page.dataoffsets) + page.databytecounts[-1] - page.dataoffsets[0]) // 2
    path.write_bytes(whole[:middle] + bytes(len(whole) - middle))
    with pytest.raises(ValueError, match=r"a.tif .*the last \d+ of its \d+ (rows|tiles|strips) are all zeros"):
        open_raster(path)


def test_a_tail_of_zeros_of_fluorescence(tmp_path: Path) -> None:
    """Uncompressed, it may be dark; compressed, it is no data."""
    for options, kind in (({}, None), ({"compression": "zlib", "rowsperstrip": 20}, ValueError)):
        path = tmp_path / f"{kind}.tif"
        tifffile.imwrite(path, picture()[..., 0], metadata=None, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        if kind is None:
            with pytest.warns(UserWarning, match=r"The last 1\d\d of 300 rows or tiles of None.tif are zeros"):
                open_multichannel(path)
        else:
            with pytest.raises(ValueError, match=r"the last \d+ of 15 strips or tiles are zeros alone"):
                open_multichannel(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("code", "layout"),
    [(273, {"rowsperstrip": 20}), (279, {"rowsperstrip": 20}), (324, {"tile": (64, 64)}), (325, {"tile": (64, 64)})],
)
def test_strips_and_tiles_that_the_directory_lacks_are_counted(
    tmp_path: Path, code: int, layout: dict[str, Any], reader: Callable[..., Any]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", compression="zlib", **layout)
    set_value(path, code, 0)
    with pytest.raises(ValueError, match=r"a.tif .*[12] of its \d+ (strips|tiles) are missing from its directory"):
        reader(path)


# --------------------------------------------------------------------------------------------------
# the file that was opened


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layout", [{}, {"tile": (64, 64)}], ids=["in one piece", "tiles"])
def test_a_relative_path_holds_after_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], reader: Callable[..., Any]
) -> None:
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "x.tif", picture(seed=seed), photometric="rgb", **layout)
        os.utime(tmp_path / folder / "x.tif", (1e9, 1e9))
    monkeypatch.setenv("STIMAGE_SD_CACHE", "cache")
    monkeypatch.chdir(tmp_path / "a")
    opened = reader("x.tif")
    monkeypatch.chdir(tmp_path / "b")
    level = (opened[0] if isinstance(opened, tuple) else opened.levels)[0]
    np.testing.assert_array_equal(level.compute(), np.moveaxis(picture(seed=0), -1, 0))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layout", [{}, {"tile": (64, 64)}], ids=["in one piece", "tiles"])
def test_a_file_that_was_replaced_is_noticed(
    tmp_path: Path, layout: dict[str, Any], reader: Callable[..., Any]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(seed=0), photometric="rgb", **layout)
    opened = reader(path)
    level = (opened[0] if isinstance(opened, tuple) else opened.levels)[0]
    level[:, :10, :10].compute()
    tifffile.imwrite(path, picture(seed=1), photometric="rgb", **layout)
    os.utime(path, (1e9, 1e9))
    if reader is open_raster and not layout:  # its pixels are in the cache
        np.testing.assert_array_equal(level.compute(), np.moveaxis(picture(seed=0), -1, 0))
        return
    with pytest.raises(ValueError, match=r"a.tif .*was replaced since it was opened"):
        level.compute()
