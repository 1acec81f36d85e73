"""Chunks that are read beside zarr: equal to zarr's own, whatever zarr was told to write."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import dask.threaded
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from stimage_sd._zarr_chunks import ChunkReader, WholeStore, guarded, is_whole
from stimage_sd.stream.graph import _LevelTasks

READ = [
    (3, "auto"), (3, ZstdCodec(level=9, checksum=True)), (3, BloscCodec()), (3, BloscCodec(cname="lz4")),
    (2, "auto"), (2, numcodecs.Blosc()), (2, numcodecs.Zstd(3)),
]  # fmt: skip
LEFT_TO_ZARR: list[dict[str, Any]] = [
    {"compressors": None},
    {"compressors": GzipCodec()},
    {"compressors": [ZstdCodec(), GzipCodec()]},
    {"shards": (3, 32, 32)},
    {"dtype": "uint16"},
    {"filters": [zarr.codecs.TransposeCodec(order=(2, 1, 0))]},
    {"zarr_format": 2, "compressors": numcodecs.LZ4()},
    {"zarr_format": 2, "order": "F"},
    {"zarr_format": 2, "filters": [numcodecs.Delta(dtype="u1")]},
]


def stored(path: Path, **options: Any) -> tuple[zarr.Array, np.ndarray]:
    """Write an array with chunks that its border cuts, one of them nothing but zeros."""
    values = np.random.default_rng(0).integers(1, 9, (3, 50, 41), dtype=np.uint8)
    values[:, :16, :16] = 0
    options = {"shape": values.shape, "chunks": (3, 16, 16), "dtype": "uint8", **options}
    array = zarr.create_array(path / "values.zarr", **options, fill_value=0, config={"write_empty_chunks": False})
    array[:] = values
    return array, values


def chunks() -> list[tuple[slice, ...]]:
    starts = product(range(0, 50, 16), range(0, 41, 16))
    return [(slice(0, 3), slice(y, min(y + 16, 50)), slice(x, min(x + 16, 41))) for y, x in starts]


@pytest.mark.parametrize(("zarr_format", "compressors"), READ)
def test_chunks_equal_zarrs(
    tmp_path: Path, zarr_format: int, compressors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, values = stored(tmp_path, zarr_format=zarr_format, compressors=compressors)
    reader = pickle.loads(pickle.dumps(ChunkReader.of(array)))
    empty, *others = chunks()
    np.testing.assert_array_equal(reader[empty], 0)
    odd = (slice(0, 3), slice(8, 24), slice(0, 41))
    np.testing.assert_array_equal(reader[odd], values[odd])
    np.testing.assert_array_equal(reader[1:2, 0:5, :], values[1:2, 0:5, :])
    monkeypatch.setattr(zarr.Array, "__getitem__", None)  # the rest is read without it
    for chunk in others:
        block = reader[chunk]
        np.testing.assert_array_equal(block, values[chunk])
        assert block.flags.writeable
        assert block.flags.c_contiguous


@pytest.mark.parametrize("options", LEFT_TO_ZARR)
def test_what_only_zarr_can_read_is_left_to_it(tmp_path: Path, options: dict[str, Any]) -> None:
    array, values = stored(tmp_path, **options)
    reader = ChunkReader.of(array)
    assert reader is not None
    assert reader.compression is None
    for chunk in chunks():
        np.testing.assert_array_equal(reader[chunk], values[chunk])


def test_arrays_in_memory_are_left_to_zarr() -> None:
    assert ChunkReader.of(zarr.array(np.zeros((3, 4, 4), np.uint8))) is None


@pytest.mark.parametrize("damage", [lambda content: content[:40], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_chunk_gets_zarrs_own_error(tmp_path: Path, damage: Any) -> None:
    array, _ = stored(tmp_path)
    path = tmp_path / "values.zarr" / "c" / "0" / "1" / "1"
    path.write_bytes(damage(path.read_bytes()))
    reader = ChunkReader.of(array)
    assert reader is not None
    chunk = slice(0, 3), slice(16, 32), slice(16, 32)
    assert (error := error_of(lambda: array[chunk])) is not None
    assert repr(error_of(lambda: reader[chunk])) == repr(error)


def error_of(read: Callable) -> Exception | None:
    try:
        read()
    except (RuntimeError, ValueError) as error:
        return error
    return None


@pytest.mark.parametrize("options", [{}, {"zarr_format": 2}, {"compressors": GzipCodec()}])
def test_an_array_that_is_not_there_is_an_error_and_not_zeros(tmp_path: Path, options: dict[str, Any]) -> None:
    array, values = stored(tmp_path, **options)
    level = da.from_zarr(array)
    plain, checked = level[:, ::3], guarded(level)[:, ::3]
    assert checked.name == plain.name
    np.testing.assert_array_equal(checked, values[:, ::3])  # also the chunk that is empty, and has no file
    (tmp_path / "values.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(FileNotFoundError, match="all workers see"):
        checked.compute()


def test_lost_chunks_of_a_store_that_has_all_are_told(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "group.zarr")
    array = group.create_array("0", shape=(6, 5), chunks=(2, 5), dtype="u1", config={"write_empty_chunks": True})
    array[:] = 0
    assert is_whole(tmp_path / "group.zarr", names=["0"])
    assert not is_whole(tmp_path / "group.zarr", names=["0", "1"])
    assert not is_whole(tmp_path / "no.zarr", names=["0"])
    chunk = tmp_path / "group.zarr" / "0" / "c" / "1" / "0"
    content = chunk.read_bytes()
    chunk.unlink()
    assert not is_whole(tmp_path / "group.zarr", names=["0"])
    lost = zarr.open_group(WholeStore(tmp_path / "group.zarr", read_only=True), mode="r")["0"]
    np.testing.assert_array_equal(lost[:2], 0)
    for read in (lost, pickle.loads(pickle.dumps(ChunkReader.of(lost)))):
        with pytest.raises(FileNotFoundError, match="0/c/1/0"):
            read[2:4, 0:5]
    chunk.write_bytes(content[:0])
    assert not is_whole(tmp_path / "group.zarr", names=["0"])


def test_a_chunk_of_another_size_is_not_taken_for_one(tmp_path: Path) -> None:
    array, _ = stored(tmp_path)
    path = tmp_path / "values.zarr" / "c" / "0" / "1" / "1"
    path.write_bytes(numcodecs.Zstd().encode(np.ones((3, 16, 15), np.uint8)))
    reader = ChunkReader.of(array)
    assert reader is not None
    with pytest.raises(ValueError, match="reshape"):
        reader[0:3, 16:32, 16:32]


@pytest.mark.parametrize("mapped", [False, True])
def test_the_tasks_of_a_lazy_image_read_that_way(tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    array, values = stored(tmp_path)
    lazy = da.from_zarr(array)
    if mapped:
        lazy, values = lazy.map_blocks(np.negative), np.negative(values)
    level = _LevelTasks(lazy)
    monkeypatch.setattr(zarr.Array, "__getitem__", None)
    pixels = dask.threaded.get(level.of(3, 2), level.key(3, 2))
    np.testing.assert_array_equal(pixels, np.moveaxis(values[:, 48:, 32:], 0, -1))
