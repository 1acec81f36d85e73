"""The viewer of the slide in a browser: zoom and pan, pieces in view, scale bar, opacity, layers, and who waits."""

from __future__ import annotations

import http.client
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import spatialdata

from stimage_sd.app._slides import SIDE

pytestmark = pytest.mark.slow
MPP = 0.5


def opened(visit: Callable[..., Any], **size: int) -> Any:
    visitor = visit(**size)
    visitor.see("Click on a tile to see")
    visitor.until_done()
    visitor.until_drawn()
    return visitor


def asked_pieces(visitor: Any) -> set[tuple[int, int, int]]:
    """Level, column and row of all pieces that the page has asked for."""
    paths = [urlsplit(url).path for url in visitor.asked]
    found = [re.fullmatch(r"/slides/[\w-]{43}/(\d+)/(\d+)_(\d+)\.jpg", path) for path in paths]
    return {tuple(map(int, one.groups())) for one in found if one}


def pixels_at(example: Path, x: float, y: float, side: int) -> np.ndarray:
    """H&E around a point, at full resolution."""
    image = np.asarray(spatialdata.read_zarr(example).images["he"]["scale0"]["image"].data)
    left, top = round(x - side / 2), round(y - side / 2)
    return np.moveaxis(image[:, top : top + side, left : left + side], 0, -1).astype(np.float64)


def test_the_slide_zooms_and_moves_and_only_what_is_in_view_is_sent(
    visit: Callable[..., Any], example: Path, tmp_path: Path
) -> None:
    visitor = opened(visit, height=1400)
    x, y, scale = first = visitor.view
    box = visitor.canvas().bounding_box()
    # a section of 2,500 px in a window of 550 px
    assert min(level for level, _, _ in asked_pieces(visitor)) > 0
    # the point under the pointer keeps its place
    visitor.canvas().hover(position={"x": 100, "y": 120})
    under = (100 - box["width"] / 2) / scale + x, (120 - box["height"] / 2) / scale + y
    visitor.page.mouse.wheel(0, -200)
    visitor.page.wait_for_timeout(300)
    assert visitor.view[2] > 1.5 * scale
    assert visitor.screen_of(*under) == pytest.approx((100, 120), abs=1)
    # and moves with it
    visitor.page.mouse.down()
    visitor.page.mouse.move(box["x"] + 160, box["y"] + 150, steps=4)
    visitor.page.mouse.up()
    visitor.page.wait_for_timeout(300)
    moved = visitor.screen_of(*under)
    assert np.hypot(moved[0] - 100, moved[1] - 120) > 40
    assert visitor.page.get_by_text("Click on a tile to see").count() == 1, "a drag is no click"
    for button, factor in (("Zoom in", 1.6), ("Zoom out", 1 / 1.6)):
        before = visitor.view
        visitor.page.get_by_role("button", name=button).click()
        visitor.page.wait_for_timeout(300)
        assert visitor.view == pytest.approx((before[0], before[1], before[2] * factor))
    visitor.canvas(1).press("ArrowRight")
    visitor.canvas(1).press("0")
    visitor.page.wait_for_timeout(300)
    assert visitor.view == pytest.approx(first)
    visitor.canvas(1).press("+")
    visitor.page.wait_for_timeout(300)
    assert visitor.view[2] == pytest.approx(first[2] * 1.6)
    visitor.page.get_by_role("button", name="Whole section").click()
    visitor.page.wait_for_timeout(300)
    assert visitor.view == pytest.approx(first)
    # at full resolution: the pieces in view, and what they show is what the section has there
    visitor.page.locator(".viewer input").fill("0")
    visitor.asked.clear()
    for _ in range(4):
        visitor.page.get_by_role("button", name="Zoom in").click()
    visitor.until_drawn()
    x, y, scale = visitor.view
    assert scale > 1
    sharp = {(column, row) for level, column, row in asked_pieces(visitor) if level == 0}
    # full resolution begins at a scale of 2 ** -0.7
    width, height = box["width"] / 0.61, box["height"] / 0.61
    in_view = {
        (column, row)
        for column in range(int((x - width / 2) // SIDE), int((x + width / 2) // SIDE) + 1)
        for row in range(int((y - height / 2) // SIDE), int((y + height / 2) // SIDE) + 1)
    }
    assert sharp <= in_view
    side = 24
    shown, there = visitor.colors(side=round(side * scale)), pixels_at(example, x, y, side)
    assert shown.mean(axis=(0, 1)) == pytest.approx(there.mean(axis=(0, 1)), abs=6)
    visitor.page.screenshot(path=tmp_path / "1280-full-resolution.png")


def test_the_scale_bar_is_as_long_as_it_says(visit: Callable[..., Any], example: Path) -> None:
    visitor = opened(visit)
    lengths = []
    for _ in range(5):
        bar = visitor.page.locator(".viewer .bar").first
        microns = float(re.fullmatch(r"([\d.]+) µm", bar.inner_text().strip()).group(1))
        assert bar.locator(".line").bounding_box()["width"] / visitor.view[2] * MPP == pytest.approx(microns, rel=0.02)
        lengths.append(microns)
        visitor.page.get_by_role("button", name="Zoom in").click()
        visitor.page.wait_for_timeout(300)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] / 4


def test_layers_have_colors_of_one_scale_that_can_be_taken_off(visit: Callable[..., Any], example: Path) -> None:
    visitor = opened(visit, height=1400)
    titles = visitor.page.locator(".viewer .title")
    assert titles.all_inner_texts()[1].endswith(": measured count")
    # counts have the colors of predictions
    ticks = [visitor.page.locator(".viewer .ticks").nth(number).inner_text() for number in (0, 1)]
    assert ticks[0] == ticks[1]
    assert "colors as on the left" in visitor.page.locator(".viewer .unit").nth(1).inner_text()
    for option, title in {
        "uncertainty: total": "uncertainty: total",
        "uncertainty: count noise": "count noise",
        "uncertainty: disagreement of members": "disagreement of members",
        "distance from the training tiles": "Distance from the training tiles",
    }.items():
        visitor.pick("layer", option)
        visitor.until(lambda title=title: titles.all_inner_texts()[1].endswith(title))
    # a tile in the middle of the view, which the button shows once it is chosen
    visitor.click_tile(example, 40)
    visitor.see("Tile 40, ")
    visitor.until_done()
    visitor.page.get_by_role("button", name="Chosen tile").click()
    colors = {}
    for opacity in ("0", "50", "100"):
        visitor.page.locator(".viewer input").fill(opacity)
        visitor.until_drawn()
        colors[opacity] = visitor.colors()
    x, y, _ = visitor.view
    assert colors["0"].mean(axis=(0, 1)) == pytest.approx(pixels_at(example, x, y, 8).mean(axis=(0, 1)), abs=20)
    # one color, which takes half of what lies under it
    assert colors["100"].std(axis=(0, 1)).max() == 0
    assert colors["50"] == pytest.approx((colors["0"] + colors["100"]) / 2, abs=1.5)


def test_genes_come_in_the_chosen_order_and_the_model_shows_its_training_and_certificate(
    visit: Callable[..., Any], example: Path
) -> None:
    visitor = opened(visit)
    visitor.page.locator(".st-key-gene input").click()
    genes = visitor.page.get_by_role("option").all_inner_texts()
    visitor.page.keyboard.press("Escape")
    # noise, which no image tells, comes last
    assert genes[-2:] == ["NOISE001 (not predictable)", "NOISE002 (not predictable)"]
    scores = [float(re.search(r"r = ([\d.]+) in new sections", gene).group(1)) for gene in genes[:-2]]
    assert scores == sorted(scores, reverse=True)
    chosen = visitor.page.locator(".st-key-gene input")
    title = visitor.page.locator(".viewer .title").first
    visitor.pick("gene", genes[3])
    visitor.until(lambda: title.inner_text().startswith(genes[3].split(" ")[0]))
    visitor.pick("order", "name")
    visitor.until(lambda: visitor.page.locator(".st-key-order input").input_value() == "name")
    assert chosen.input_value() == genes[3]
    visitor.until_done()  # the list of the order before stays until the page is drawn anew
    visitor.page.locator(".st-key-gene input").click()
    names = visitor.page.get_by_role("option").all_inner_texts()
    visitor.page.keyboard.press("Escape")
    assert names == sorted(genes)
    visitor.pick("gene", genes[-1])
    visitor.see(re.compile("By the model's certificate this gene is not predictable"))
    visitor.see(re.compile("16 of 18 genes are predictable"))
    visitor.page.get_by_text("About the model").click()
    visitor.see("training_1, training_2")
    visitor.see(re.compile("efficientnet_lite0"))
    visitor.until(lambda: visitor.page.get_by_test_id("stDataFrame").count() == 2)
    visitor.until_done()  # a click on a page that is drawn anew is lost
    with visitor.page.expect_download(timeout=120_000) as download:
        visitor.page.get_by_role("button", name="Certificate (HTML)").click()
    page = Path(download.value.path()).read_text()
    assert "Certificate of a model of 18 genes" in page
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page), "the page of a certificate asks for nothing"


def test_a_slide_that_is_strange_to_the_model_says_so_and_is_gray(
    visit: Callable[..., Any], pieces: dict[str, Path], tmp_path: Path
) -> None:
    visitor = opened(visit, height=1400)
    visitor.choose("Upload an image")
    visitor.send(pieces["strange"], label="A tile")
    visitor.see("How large is a pixel?")
    visitor.page.get_by_test_id("stNumberInputField").fill("0.5")
    visitor.page.keyboard.press("Tab")
    visitor.choose("It is tissue all over")
    said = visitor.see(re.compile(r"\d+ of \d+ tiles \(\d+%\) are unlike the training tiles")).inner_text()
    strange, n_tiles = map(int, re.match(r"(\d+) of (\d+)", said).groups())
    assert strange > 0.2 * n_tiles
    visitor.until_done()
    visitor.page.locator(".viewer input").fill("100")
    visitor.until_drawn()
    gray = visitor.colors(side=120)
    visitor.page.screenshot(path=tmp_path / "1280-strange.png")
    assert (gray == 150).all(axis=-1).mean() > 0.3
    visitor.choose("Show tiles unlike the training tiles in gray")
    visitor.until(lambda: not (visitor.colors(side=120) == 150).all(axis=-1).any())


def test_ones_own_calculation_is_not_another_visitors(visit: Callable[..., Any], example: Path) -> None:
    one = opened(visit, height=1400)
    # no number of copies makes the scores of a gene stable that no image tells, so that this takes a while
    one.pick("gene", "NOISE002 (not predictable)")
    one.click_tile(example, 20)
    one.see("Tile 20, NOISE002")
    one.page.locator(".st-key-n_samples input").first.press("End")
    one.see(re.compile("Explaining tile 20: up to 2000 perturbed copies"))
    one.click_tile(example, 41)

    def is_shown() -> bool:
        assert one.page.get_by_text("another visitor").count() == 0
        return one.page.get_by_text("Tile 41, NOISE002").count() > 0

    # how long it waits depends on the machine; what the page says meanwhile is tested with the sessions
    one.until(is_shown, seconds=300)
    # a run that was replaced still leaves its result
    one.pick("tile", "20 (mean")
    one.see("Tile 20, NOISE002")
    one.until(lambda: one.page.get_by_text("Waiting for").count() == 0)


def test_pieces_are_for_those_who_have_the_page_and_its_cookie(visit: Callable[..., Any], server: Any) -> None:
    visitor = opened(visit)
    path = next(urlsplit(url).path for url in visitor.asked if "/slides/" in url)
    cookies = "; ".join(f"{one['name']}={one['value']}" for one in visitor.context.cookies())

    def status(path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Cache-Control", "")

    assert status(path, Cookie=cookies) == (200, "no-store")
    assert status(path)[0] == 403
    assert status(path, Cookie=cookies, Host="rebound.example")[0] == 400
    token = path.split("/")[2]
    for wrong in (path.replace(token, "A" * 43), f"/slides/{token}/0/9999_0.jpg", f"/slides/{token}/99/0_0.jpg"):
        assert status(wrong, Cookie=cookies)[0] == 404
