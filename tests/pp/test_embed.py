"""Embeddings: known numbers through known pixels, resumed where a killed run stopped."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from spatialdata import SpatialData

from stimage_sd import contract, models, pp
from stimage_sd.pp._embed import _batch_size
from stimage_sd.stream.cutting import cut_tile


def corner_and_mean(tiles: np.ndarray) -> np.ndarray:
    """Mean of each channel and the red of one corner, so that orientation shows too."""
    return np.concatenate([tiles.mean(axis=(1, 2)), tiles[:, 0, -1, :1]], axis=1).astype(np.float32)


@pytest.fixture(autouse=True)
def _toy() -> None:
    models.register_extractor("toy", corner_and_mean, input_size=32, embedding_size=4, weights_hash="abc")


def tissue_picture(height: int, width: int, picture: Callable) -> np.ndarray:
    return np.clip(PINK + 0.25 * (picture(height, width).astype(float) - 128), 0, 255).astype(np.uint8)


PINK = np.array([190.0, 110.0, 175.0])


def test_known_numbers_through_fields_of_view(make_slide: Callable, picture: Callable) -> None:
    image = tissue_picture(300, 400, picture)
    sdata = make_slide(image, mpp=1.0)
    pp.tile(sdata, size_um=32.0, stride_um=50.0)
    pp.embed(sdata, "toy", fields_of_view=(1.0, 2.5), context_rings=0, batch_size=5)
    tiles = contract.tiles(sdata)
    values = tiles.obsm["X_toy"]
    assert values.dtype == np.float32
    assert values.shape == (tiles.n_obs, 8)
    chw = np.moveaxis(image, -1, 0)
    for number, (x, y) in enumerate(tiles.obsm["spatial"]):
        for view, side in enumerate((32, 80)):
            top, left = (int(np.floor(value - side / 2 + 0.5)) for value in (y, x))
            tile = cut_tile(chw, top=top, left=left, side=side, target=32)
            expected = corner_and_mean(tile[None])[0]
            np.testing.assert_allclose(values[number, 4 * view : 4 * view + 4], expected, rtol=1e-6)
    assert tiles.uns["embeddings"]["toy"] == {
        "image": "he",
        "weights_hash": "abc",
        "fields_of_view": [1.0, 2.5],
        "wide_fields": "separate",
        "input_px": 32,
        "context_rings": 0,
        "stain": "",
    }


def test_tiles_come_from_the_normalized_image_unless_told(make_slide: Callable, picture: Callable) -> None:
    image = tissue_picture(300, 300, picture)
    sdata = make_slide(image, mpp=1.0)
    pp.tile(sdata, size_um=32.0)
    pp.embed(sdata, "toy", fields_of_view=(1.0,), context_rings=0)
    plain = contract.embeddings(sdata, "toy").copy()
    sdata.images["inverted"] = contract.build_image([255 - contract.levels(sdata, "he")[0].data])
    contract.remember(sdata, normalized_image="inverted", stain={"method": "made up"})
    pp.embed(sdata, "toy", fields_of_view=(1.0,), context_rings=0)
    np.testing.assert_allclose(contract.embeddings(sdata, "toy"), 255 - plain, atol=1e-3)
    assert contract.tiles(sdata).uns["embeddings"]["toy"]["stain"] == '{"method": "made up"}'
    pp.embed(sdata, "toy", fields_of_view=(1.0,), context_rings=0, image_key="he")
    np.testing.assert_array_equal(contract.embeddings(sdata, "toy"), plain)
    assert contract.tiles(sdata).uns["embeddings"]["toy"]["stain"] == ""


def test_context_is_added_and_never_left_stale(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    pp.embed(sdata, "toy", fields_of_view=(1.0,), context_rings=2)
    tiles = contract.tiles(sdata)
    assert tiles.obsm["X_toy_context"].shape == (25, 8)
    assert tiles.uns["embeddings"]["toy"]["context_rings"] == 2
    pp.embed(sdata, "toy", fields_of_view=(1.0, 2.0), context_rings=0)
    assert "X_toy_context" not in tiles.obsm
    assert tiles.uns["embeddings"]["toy"]["context_rings"] == 0


def test_the_default_extractor_and_an_object(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=4)
    pp.embed(sdata, fields_of_view=(1.0,), context_rings=0)
    by_name = contract.embeddings(sdata, "efficientnet_lite0_stages").copy()
    assert by_name.shape == (16, 176)
    assert by_name.dtype == np.float32
    assert np.isfinite(by_name).all()
    # every tile is the same pink
    np.testing.assert_allclose(by_name, by_name[:1].repeat(16, axis=0), atol=1e-4)
    pp.embed(sdata, models.get_extractor("efficientnet_lite0_stages"), fields_of_view=(1.0,), context_rings=0)
    np.testing.assert_array_equal(contract.embeddings(sdata, "efficientnet_lite0_stages"), by_name)


def test_refusals_leave_the_section_as_it_was(make_spots: Callable, make_slide: Callable) -> None:
    with pytest.raises(KeyError, match=r"'bare' has no tiles. Run `stimage_sd.pp.tile\(sdata\)` first"):
        pp.embed(make_slide(np.zeros((9, 9, 3), np.uint8), sample="bare"), "toy")
    sdata = make_spots(n_side=4)
    for error, match, arguments in [
        (ValueError, r"`fields_of_view` as positive .* found \[\]", {"fields_of_view": ()}),
        (ValueError, r"`fields_of_view` as positive .* found \[1.0, -2.0\]", {"fields_of_view": (1, -2)}),
        (ValueError, "`batch_size` of at least 1, found 0", {"batch_size": 0}),
        (ValueError, "`context_rings` .* found -1", {"context_rings": -1}),
        (KeyError, "No image 'other'", {"image_key": "other"}),
        (KeyError, "no extractor 'nothing'", {"extractor": "nothing"}),
    ]:
        with pytest.raises(error, match=match):
            pp.embed(sdata, **{"extractor": "toy", **arguments})
        assert "X_toy" not in contract.tiles(sdata).obsm
        assert "embeddings" not in contract.tiles(sdata).uns


KILLED = """
    import sys, time
    import cv2, numpy as np
    import stimage_sd as sti

    def slow(tiles):
        with open({log!r}, "a") as log:
            log.write(f"{{len(tiles)}}\\n")
        time.sleep({delay})
        return tiles.mean(axis=(1, 2))

    sti.models.register_extractor("slow", slow, input_size=16, embedding_size=3, weights_hash="1")
    section = sti.io.slide({image!r}, mpp=1.0)
    sti.pp.tile(section, size_um=16.0)
    sti.pp.embed(section, "slow", fields_of_view=(1.0,), context_rings=0, batch_size=16, n_jobs=2)
    np.save({out!r}, section.tables["tiles"].obsm["X_slow"])
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path: Path, picture: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process: this one, which has imported all that takes long."""
    image, log, script = tissue_picture(320, 320, picture), tmp_path / "log", tmp_path / "run.py"
    assert cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])

    def write(*, delay: float, cache: str) -> None:
        log.write_text("")
        names = {"log": str(log), "image": str(tmp_path / "image.png"), "out": str(tmp_path / f"{cache}.npy")}
        script.write_text(textwrap.dedent(KILLED).format(delay=delay, **names))
        monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / cache))

    def calls() -> list[int]:
        return [int(line) for line in log.read_text().split()]

    write(delay=0.4, cache="killed")
    with (tmp_path / "stderr").open("w") as errors:
        killed = subprocess.Popen([sys.executable, str(script)], stderr=errors)
    deadline = time.monotonic() + 90
    while len(calls()) < 12 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    assert killed.poll() is None, (tmp_path / "stderr").read_text()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    begun = len(calls())
    assert not (tmp_path / "killed.npy").exists()

    write(delay=0.0, cache="killed")
    runpy.run_path(str(script))
    # 25 batches, and no blank tile; the two in flight when it was killed are done again
    resumed = len(calls())
    assert 25 - begun <= resumed <= 25 - begun + 2

    write(delay=0.0, cache="whole")
    runpy.run_path(str(script))
    assert len(calls()) == 25
    np.testing.assert_array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


def test_few_tiles_run_in_small_even_batches_and_give_the_same(make_slide: Callable, picture: Callable) -> None:
    sdata = make_slide(tissue_picture(300, 400, picture), mpp=1.0)
    pp.tile(sdata, size_um=32.0, stride_um=60.0)
    results = []
    for batch_size in (None, 32):
        pp.embed(sdata, fields_of_view=(1.0,), context_rings=0, batch_size=batch_size)
        results.append(contract.tiles(sdata).obsm["X_efficientnet_lite0_stages"])
    np.testing.assert_array_equal(results[0], results[1])
    recorded, plain = models.get_extractor("efficientnet_lite0"), models.get_extractor("toy")
    sizes = [_batch_size(recorded, n_tiles) for n_tiles in (1, 49, 256, 2048, 100_000)]
    assert sizes == [2, 2, 4, 32, 32]
    assert _batch_size(plain, 49) == 32
