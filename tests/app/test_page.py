"""A visitor in a browser: the example, a click on a tile, uploads good and bad, two visitors side by side."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pandas as pd
import pytest
import spatialdata
from spatialdata.transformations import remove_transformation

from stimage_sd import contract, models
from stimage_sd.app._example import MODEL

pytestmark = pytest.mark.slow
#: calculations on a shared machine take several times as long as on one's own, ms
LONG = 400_000


def test_a_tile_that_is_clicked_is_explained(visit: Callable[..., Any], example: Path, tmp_path: Path) -> None:
    visitor = visit()
    visitor.see("Click on a tile to see")
    visitor.until_done()
    visitor.page.screenshot(path=tmp_path / "1280-section.png", full_page=True)
    visitor.page.locator(".st-key-gene input").click()
    genes = visitor.page.get_by_role("option").all_inner_texts()
    visitor.page.get_by_role("option", name=genes[2]).click()
    gene = genes[2].split(" ")[0]
    visitor.until_done()
    began = time.monotonic()
    visitor.click_tile(example, 20)
    visitor.see(f"Tile 20, {gene}")
    # a shared machine takes several times as long as one's own
    assert time.monotonic() - began < float(os.environ.get("STIMAGE_SD_TEST_EXPLANATION", "60"))
    visitor.until_done()
    visitor.page.screenshot(path=tmp_path / "1280-tile.png", full_page=True)
    assert visitor.overlaps() == []
    # another one, on the other map
    visitor.click_tile(example, 33, map_number=1)
    visitor.see(f"Tile 33, {gene}")
    visitor.until_done()
    # the pictures are parts of the page, and have no address that others could ask for
    pictures = visitor.page.locator(".st-key-pictures img").evaluate_all("all => all.map(one => one.src.slice(0, 15))")
    assert pictures == ["data:image/png;"] * 2
    assert not any(urlsplit(url).path.startswith("/media/") for url in visitor.asked)
    with visitor.page.expect_download(timeout=LONG) as download:
        visitor.page.get_by_role("button", name="Nuclei of the tile (CSV)").click()
    nuclei = pd.read_csv(download.value.path())
    assert (nuclei["tile"] == 33).all()
    assert nuclei[f"lime_{gene}"].is_monotonic_decreasing
    with visitor.page.expect_download(timeout=LONG) as download:
        visitor.page.get_by_role("button", name="Tiles of the section (CSV)").click()
    assert {"tile", "mean", "sd", "lower", "upper", "ood_score"} <= set(pd.read_csv(download.value.path()).columns)
    with visitor.page.expect_download(timeout=LONG) as download:
        visitor.page.get_by_role("button", name="Figure (PNG)").click()
    figure = cv2.imread(str(download.value.path()))
    assert min(figure.shape[:2]) > 1000
    cv2.imwrite(str(tmp_path / "figure.png"), figure)
    # nothing but the server itself is ever asked for anything
    outside = [url for url in visitor.asked if not re.match(r"(https?|wss?)://localhost[:/]|data:|blob:", url)]
    assert outside == []


def test_the_page_fits_a_narrow_window(visit: Callable[..., Any], example: Path, tmp_path: Path) -> None:
    visitor = visit(width=800)
    visitor.see("Click on a tile to see")
    visitor.until_done()
    visitor.click_tile(example, 40)
    visitor.see("Tile 40, ")
    visitor.until_done()
    visitor.page.screenshot(path=tmp_path / "800-tile.png", full_page=True)
    assert visitor.overlaps() == []


def test_a_tile_that_is_uploaded_is_predicted_and_seen_by_nobody_else(
    visit: Callable[..., Any], server: Any, pieces: dict[str, Path], tmp_path: Path
) -> None:
    one, other = visit(), visit()
    for visitor in (one, other):
        visitor.see("Click on a tile to see")
        visitor.choose("Upload an image")
    one.send(pieces["tile"], label="A tile")
    one.see("tile.png: 120 x 120 px")
    # asked for, not guessed
    one.see("How large is a pixel?")
    one.page.get_by_test_id("stNumberInputField").fill("0.5")
    one.page.keyboard.press("Tab")
    one.choose("It is tissue all over")
    one.see(re.compile("Tile 0, "))
    one.until_done()
    one.page.screenshot(path=tmp_path / "1280-upload.png", full_page=True)
    other.until_done()
    assert "tile.png" not in other.page.content()
    assert other.page.get_by_text("Tile 0,").count() == 0
    other.see("Choose a slide and a model")
    # each has a folder of its own; only one holds a picture
    folders = list(server.temporary.glob("stimage-sd-app-*/session-*"))
    assert len(folders) >= 2
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    holders = {path.relative_to(server.temporary).parts[1] for path in server.temporary.rglob("image.png")}
    assert len(holders) == 1


def test_a_model_that_standardizes_by_section_says_so_of_a_tile(
    visit: Callable[..., Any], example: Path, pieces: dict[str, Path], tmp_path: Path
) -> None:
    other = by_section(MODEL, tmp_path / "by_section.stimage")
    visitor = visit()
    visitor.see("Click on a tile to see")
    visitor.choose("Upload an image")
    visitor.choose("Upload a model")
    visitor.send(pieces["tile"], label="A tile")
    visitor.see("How large is a pixel?")
    visitor.send(other, label="A model")
    # the page is drawn anew once the model is there, and would lose what is typed meanwhile
    visitor.page.get_by_test_id("stCaptionContainer").get_by_text("by_section.stimage").wait_for(timeout=LONG)
    visitor.until_done()
    visitor.page.get_by_test_id("stNumberInputField").fill("0.5")
    visitor.page.keyboard.press("Tab")
    visitor.see(re.compile("a tile alone cannot be predicted"))
    assert visitor.page.get_by_text("Tile 0,").count() == 0


def by_section(model: Path, path: Path) -> Path:
    """Write a model that is the same but for what it standardizes embeddings by."""
    loaded = models.load(model)
    return replace(loaded, features=replace(loaded.features, standardize="section")).save(path)


def test_bad_files_get_a_message_and_the_app_stays_up(
    visit: Callable[..., Any],
    example: Path,
    server: Any,
    pieces: dict[str, Path],
    pickled_model: Path,
    flat_png: Callable[..., Path],
    tmp_path: Path,
) -> None:
    visitor = visit()
    visitor.see("Click on a tile to see")
    visitor.choose("Upload an image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(pieces["piece"].read_bytes()[:9000])
    visitor.send(cut, label="A tile")
    visitor.see("How large is a pixel?")
    visitor.page.get_by_test_id("stNumberInputField").fill("0.5")
    visitor.page.keyboard.press("Tab")
    visitor.see(re.compile("truncated, damaged or no image"))
    noise = tmp_path / "noise.png"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    visitor.send(noise, label="A tile")
    visitor.see(re.compile("This is no image that the app reads"))
    bomb = flat_png(tmp_path / "bomb.png", 30_000, 30_000)
    visitor.send(bomb, label="A tile")
    visitor.see(re.compile("30,000 x 30,000 px .* It was not decoded"))
    visitor.page.screenshot(path=tmp_path / "1280-bomb.png", full_page=True)
    visitor.choose("Bundled example")
    visitor.choose("Upload a model")
    visitor.send(pickled_model, label="A model")
    visitor.see(re.compile("this is no zip"))
    # the same visitor goes on with what is good
    visitor.choose("Example's model")
    visitor.see("Click on a tile to see")
    assert server.process.poll() is None


def test_nothing_is_left_when_the_server_stops(
    serve: Callable[..., Any],
    visit: Callable[..., Any],
    example: Path,
    server: Any,
    tmp_path: Path,
    flat_png: Callable[..., Path],
) -> None:
    (tmp_path / "cache").symlink_to(server.cache)
    section = spatialdata.read_zarr(example)
    contract.remember(section, mpp=None)
    remove_transformation(section.images["he"], "microns")
    section.write(tmp_path / "section.zarr")
    with serve(tmp_path, "--data", str(tmp_path / "section.zarr"), "--model", str(MODEL)) as running:
        visitor = visit(running)
        visitor.see("Chosen by whoever started the app: section.zarr")
        visitor.see("Click on a tile to see")
        # how long a micrometer is, is not guessed
        visitor.see(re.compile("There is no scale bar"))
        visitor.until_drawn()
        assert not any(bar.is_visible() for bar in visitor.page.locator(".viewer .bar").all())
        visitor.choose("Upload an image")
        visitor.send(flat_png(tmp_path / "flat.png", 50, 50), label="A tile")
        visitor.see("How large is a pixel?")
        assert list(running.temporary.rglob("image.png"))
        visitor.context.close()
        assert running.stop() == 0
    assert list(running.temporary.glob("stimage-sd-app-*")) == []


def test_an_upload_is_gone_soon_after_its_visitor(
    visit: Callable[..., Any], server: Any, example: Path, tmp_path: Path, flat_png: Callable[..., Path]
) -> None:
    visitor = visit()
    visitor.see("Click on a tile to see")
    visitor.choose("Upload an image")
    before = set(server.temporary.rglob("image.png"))
    visitor.send(flat_png(tmp_path / "flat.png", 40, 40), label="A tile")
    visitor.see("How large is a pixel?")
    (mine,) = set(server.temporary.rglob("image.png")) - before
    visitor.context.close()
    # sessions without a browser are ended after a minute
    end = time.monotonic() + 240
    while mine.exists() and time.monotonic() < end:
        time.sleep(2)
    assert not mine.exists()
