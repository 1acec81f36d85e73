"""Pieces of a slide: what they show, what is read for them, and how long they are served."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("streamlit")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Match, Route

from stimage_sd.app._slides import PIECE, SIDE, Slide, serve_piece


def assembled(slide: Slide, level: int) -> np.ndarray:
    """All pieces of a level, side by side."""
    step = SIDE * 2**level
    rows = [
        np.hstack([slide.piece(level, column, row) for column in range(-(-slide.width // step))])
        for row in range(-(-slide.height // step))
    ]
    return np.vstack(rows)


@pytest.mark.parametrize("n_levels", [1, 2, 4])
def test_pieces_are_the_slide(counted_image: Callable[..., Any], make_slide: Callable[..., Any], n_levels: int) -> None:
    image = counted_image(1100, 1537, n_levels=n_levels, chunk=256)
    slide = Slide(make_slide(image.levels, mpp=0.5))
    whole = np.moveaxis(image.arrays[0], 0, -1)
    assert (slide.width, slide.height, slide.mpp, slide.last_level) == (1537, 1100, 0.5, 2)
    assert np.array_equal(assembled(slide, 0), whole)
    for level in (1, 2):
        shown = assembled(slide, level)
        assert shown.shape[:2] == (-(-1100 // 2**level), -(-1537 // 2**level))
        expected = cv2.resize(whole, shown.shape[1::-1], interpolation=cv2.INTER_AREA)
        # half a pixel beside its place, where the picture changes by up to 11 per pixel
        assert np.abs(shown.astype(int) - expected).mean() < 3


def test_no_more_is_read_than_is_shown(counted_image: Callable[..., Any], make_slide: Callable[..., Any]) -> None:
    image = counted_image(4096, 4096, n_levels=4, chunk=512)
    slide = Slide(make_slide(image.levels))
    assert image.full_reads() == 0
    image.reads.clear()
    slide.piece(0, 3, 2)
    assert dict(image.reads) == {(0, 2, 3): 1}
    image.reads.clear()
    slide.piece(slide.last_level, 0, 0)
    assert set(image.reads) == {(3, 0, 0)}
    # without coarse levels, the whole slide is read once, in parts, for the coarsest pieces
    single = counted_image(6000, 6000, chunk=512)
    slide = Slide(make_slide(single.levels))
    single.reads.clear()
    assert slide.piece(slide.last_level, 0, 0).shape == (375, 375, 3)
    assert not single.reads


@pytest.mark.parametrize("place", [(-1, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, -1), (0, 0, 10**9)])
def test_what_lies_outside_is_no_piece(make_slide: Callable[..., Any], place: tuple[int, int, int]) -> None:
    slide = Slide(make_slide(np.zeros((1100, 1537, 3), np.uint8)))
    assert slide.piece(*place) is None


def answer(address: str) -> Any:
    """What the server's route answers."""
    app = Starlette(routes=[Route(PIECE, serve_piece)])
    scope = {"type": "http", "method": "GET", "path": address, "headers": [], "query_string": b"", "app": app}
    match, found = app.routes[0].matches(scope)
    assert match is Match.FULL
    return serve_piece(Request({**scope, **found}))


def test_pieces_are_served_as_long_as_the_session_holds_the_slide(
    picture: Callable[..., np.ndarray], make_slide: Callable[..., Any]
) -> None:
    image = picture(300, 400)
    slide = Slide(make_slide(image))
    address = slide.as_data()["address"]
    served = answer(f"{address}0/0_0.jpg")
    assert (served.status_code, served.media_type, served.headers["cache-control"]) == (200, "image/jpeg", "no-store")
    shown = cv2.imdecode(np.frombuffer(served.body, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(shown.astype(int) - image).mean() < 3
    assert answer(f"{address}0/1_0.jpg").status_code == 404
    assert answer(f"/slides/{'A' * 43}/0/0_0.jpg").status_code == 404
    other = Slide(make_slide(image))
    assert other.as_data()["address"] != address
    del slide
    gc.collect()
    assert answer(f"{address}0/0_0.jpg").status_code == 404
    assert answer(f"{other.as_data()['address']}0/0_0.jpg").status_code == 200
