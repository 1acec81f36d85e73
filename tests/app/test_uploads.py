"""Files that visitors send: what is taken, what is refused and in which words, and that nothing of it is left."""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from stimage_sd.app import _sections, _uploads
from stimage_sd.app._uploads import UploadError, check_image, check_model, display_name, store_image, store_model

MEGABYTE = 1 << 20


def zipped(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


@given(st.text())
def test_a_name_that_is_shown_holds_nothing_that_a_page_or_path_could_act_on(name: str) -> None:
    shown = display_name(name)
    assert 0 < len(shown) <= 60
    assert not set(shown) & set("/\\<>[]()!`*&\"' \n")
    assert shown.strip("._-") == shown
    assert display_name(shown) == shown


@given(st.binary(max_size=400))
def test_any_bytes_are_a_picture_or_refused_and_gone(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    with pytest.raises(UploadError):
        store_image(content, folder, most_bytes=MEGABYTE)
    with pytest.raises(UploadError):
        store_model(content, folder, most_bytes=MEGABYTE)
    assert list(folder.iterdir()) == []


@given(st.integers(0, 199), st.binary(min_size=1, max_size=8))
def test_a_damaged_tiff_is_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, position: int, damage: bytes
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    tifffile.imwrite(folder / "a.tif", np.zeros((64, 64, 3), np.uint8), tile=(32, 32))
    content = bytearray((folder / "a.tif").read_bytes())
    content[position : position + len(damage)] = damage
    try:
        header = check_image(_written(folder / "image.tif", bytes(content)))
    except UploadError as error:
        said = str(error)
    else:
        said = f"{header.width} x {header.height}"
        assert header.width * header.height <= _uploads.MOST_IN_TILES
    assert said
    assert str(folder) not in said


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_pictures_are_kept_under_our_own_name(tmp_path: Path, ending: str) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / f"a{ending}"), picture)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = store_image((tmp_path / f"a{ending}").read_bytes(), folder, most_bytes=MEGABYTE)
    assert path == folder / f"image{ending}"
    assert check_image(path) == _uploads.ImageHeader(60, 40)


def test_a_bomb_is_told_by_its_header(tmp_path: Path, flat_png: Callable[[Path, int, int], Path]) -> None:
    small = flat_png(tmp_path / "flat.png", 8, 8).read_bytes()
    # the header alone says how large it is: width and height are the bytes after IHDR
    at = small.index(b"IHDR") + 4
    content = small[:at] + struct.pack(">II", 30_000, 30_000) + small[at + 8 :]
    with pytest.raises(UploadError, match=r"30,000 x 30,000 px \(900 megapixels\).*It was not decoded.*Crop it"):
        store_image(content, tmp_path, most_bytes=MEGABYTE)
    assert not (tmp_path / "image.png").exists()


def test_tiffs_that_would_be_decoded_whole_or_in_huge_tiles_are_refused(tmp_path: Path) -> None:
    # what the tags say is enough
    tifffile.imwrite(tmp_path / "striped.tif", np.zeros((20, 20, 3), np.uint8))
    with tifffile.TiffFile(tmp_path / "striped.tif", mode="r+") as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[name].overwrite(20_000)
    with pytest.raises(UploadError, match="20,000 x 20,000 px"):
        check_image(tmp_path / "striped.tif")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((1001, 4, 4), np.uint8), photometric="minisblack")
    with pytest.raises(UploadError, match="1001 pages; at most 1000"):
        check_image(tmp_path / "pages.tif")


OWN, OTHER = (f"urn:uuid:00000000-0000-0000-0000-00000000000{number}" for number in (1, 2))
PIXELS = (
    '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="3" '
    'SizeZ="1" SizeT="1"><Channel ID="Channel:0" SamplesPerPixel="3"/><TiffData IFD="0">{}</TiffData></Pixels></Image>'
)


def ome_tiff(path: Path, root: str, inner: str) -> bytes:
    """Write an OME-TIFF of one white page with metadata as given."""
    ome = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"{root}>{inner}</OME>'
    tifffile.imwrite(path, np.full((64, 64, 3), 255, np.uint8), photometric="rgb", description=ome, metadata=None)
    return path.read_bytes()


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """Names of the files that this process opens; a hook cannot be taken out again, so that it is told to rest."""
    names: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, given: names.append(str(given[0])) if watching and event == "open" else None)
    yield names
    watching.clear()


@pytest.mark.parametrize(
    ("root", "inner"),
    [
        (f' UUID="{OWN}"', PIXELS.format(f'<UUID FileName="SECRET">{OTHER}</UUID>')),
        (f' UUID="{OWN}"', PIXELS.format('<UUID FileName="SECRET"/>')),
        ("", PIXELS.format(f'<UUID FileName="SECRET">{OTHER}</UUID>')),
        ("", PIXELS.format(f'<UUID FileName="../secret.tif">{OTHER}</UUID>')),
    ],
)
def test_an_upload_never_names_another_file(tmp_path: Path, opened: list[str], root: str, inner: str) -> None:
    secret, folder = tmp_path / "secret.tif", tmp_path / "session"
    folder.mkdir()
    tifffile.imwrite(secret, np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    opened.clear()
    content = ome_tiff(tmp_path / "sent.tif", root, inner.replace("SECRET", str(secret)))
    with pytest.raises(UploadError, match="metadata of this OME-TIFF name other files"):
        store_image(content, folder, most_bytes=MEGABYTE)
    assert list(folder.iterdir()) == []
    assert any(path.endswith("image.tif") for path in opened)
    assert not any(path.endswith("secret.tif") for path in opened)


def test_metadata_in_another_file_are_not_looked_for(tmp_path: Path, opened: list[str]) -> None:
    companion = tmp_path / "secret.companion.ome"
    companion.write_text("<OME/>")
    content = ome_tiff(tmp_path / "sent.tif", "", f'<BinaryOnly MetadataFile="{companion}" UUID="a"/>')
    opened.clear()
    path = store_image(content, tmp_path, most_bytes=MEGABYTE)
    assert _sections.open_image(path, mpp=0.5, name="a", all_tissue=True).images["he"]
    assert any(path.endswith("image.tif") for path in opened)
    assert not any(path.endswith(companion.name) for path in opened)


def test_ome_tiffs_of_one_file_are_taken_and_malformed_ones_refused(tmp_path: Path) -> None:
    inner = PIXELS.format(f'<UUID FileName="exported.ome.tif">{OWN}</UUID>')
    path = store_image(ome_tiff(tmp_path / "a.tif", f' UUID="{OWN}"', inner), tmp_path, most_bytes=MEGABYTE)
    assert _sections.open_image(path, mpp=0.5, name="a", all_tissue=True).images["he"]
    with pytest.raises(UploadError, match="truncated, damaged or no image"):
        store_image(ome_tiff(tmp_path / "b.tif", "", "<Image>"), tmp_path, most_bytes=MEGABYTE)


def test_sizes_are_limited(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match=r"3 MB; at most 1 MB are taken.*--data"):
        store_image(bytes(3 * MEGABYTE), tmp_path, most_bytes=MEGABYTE)
    with pytest.raises(UploadError, match="The file is empty"):
        store_model(b"", tmp_path, most_bytes=MEGABYTE)


def test_a_model_is_json_and_arrays_and_nothing_else(tmp_path: Path, pickled_model: Path) -> None:
    with pytest.raises(UploadError, match=r"this is no zip\. Files that can run code"):
        store_model(pickled_model.read_bytes(), tmp_path, most_bytes=MEGABYTE)
    parts = {"config.json": b"{}", "model.safetensors": b""}
    with pytest.raises(UploadError, match=r"this one holds .*evil\.pkl"):
        check_model(zipped(tmp_path / "more.stimage", {"evil.pkl": b"", **parts}))
    with pytest.raises(UploadError, match="this one holds nothing"):
        check_model(zipped(tmp_path / "none.stimage", {}))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "bomb.stimage", {"config.json": bytes(65 * MEGABYTE), "model.safetensors": b""})
    assert path.stat().st_size < MEGABYTE
    with pytest.raises(UploadError, match=r"config\.json"):
        check_model(path)


def test_a_model_of_another_version_or_kind_says_so(tmp_path: Path) -> None:
    config = json.dumps({"format": 99, "kind": "nb"}).encode()
    path = zipped(tmp_path / "new.stimage", {"config.json": config, "model.safetensors": b"\0" * 8})
    with pytest.raises(UploadError, match="The model cannot be read"):
        _uploads.load_model(path)
