"""Draw the figures of the page: clickable maps, explained tile, predicted distribution, and all of them as a PNG."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import altair as alt
import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stimage_sd.app._sections import Explanation, Prediction

#: width and largest height of a map, and longest side of the H&E under it, px
MAP_WIDTH, MAP_HEIGHT, THUMBNAIL = 480, 640, 960
#: name of the selection on a click
CLICKED = "clicked"
LABELS = {
    "mean": "predicted mean count",
    "sd": "standard deviation: total",
    "aleatoric_sd": "standard deviation: count noise",
    "epistemic_sd": "standard deviation: disagreement of members",
}


class Background:
    """H&E under the maps.

    Attributes
    ----------
    url
        JPEG as a data URL. It belongs to the page and has no address of its own.
    left, top, right, bottom
        Bounds of the tiles with a margin, H&E px.
    """

    def __init__(self, prediction: Prediction) -> None:
        from stimage_sd import contract

        name = contract.image_name(prediction.sdata)
        height, width = contract.levels(prediction.sdata, name)[0].shape[1:]
        self.side = float(contract.tiling(prediction.sdata)["side_px"])
        places = prediction.tiles[["x", "y"]].to_numpy()
        low, high = places.min(axis=0) - 1.2 * self.side, places.max(axis=0) + 1.2 * self.side
        self.left, self.top = np.maximum(low, 0.0).tolist()
        self.right, self.bottom = np.minimum(high, [width, height]).tolist()
        self.url = self._cut(prediction, name, width)

    def _cut(self, prediction: Prediction, name: str, width: int) -> str:
        from stimage_sd import contract

        # enlarge the thumbnail if the section covers a small part of the slide
        wanted = int(THUMBNAIL * width / max(self.right - self.left, self.bottom - self.top))
        image, _ = contract.thumbnail(prediction.sdata, name, max_side=min(max(wanted, THUMBNAIL), 4000))
        scale = image.shape[1] / width
        part = image[round(self.top * scale) : round(self.bottom * scale), round(self.left * scale) : round(
            self.right * scale)]  # fmt: skip
        _, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(part[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
        return data_url(jpeg.tobytes(), "image/jpeg")


def data_url(content: bytes, kind: str) -> str:
    """Return an image as a data URL, which belongs to the page and has no address of its own."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def map_chart(background: Background, frame: pd.DataFrame, *, value: str, tile: int | None) -> alt.LayerChart:
    """Draw clickable tiles over the H&E, colored by a prediction.

    Parameters
    ----------
    background
        The H&E.
    frame
        One row per tile, as from `Prediction.of_gene`.
    value
        A key of `LABELS`.
    tile
        The selected tile, which gets an outline.
    """
    x = alt.Scale(domain=[background.left, background.right], nice=False, zero=False)
    y = alt.Scale(domain=[background.bottom, background.top], nice=False, zero=False)
    width, height = background.right - background.left, background.bottom - background.top
    shrink = min(1.0, MAP_HEIGHT / (MAP_WIDTH * height / width))
    half = background.side / 2
    squares = frame[["tile", "ood_score", *LABELS]].assign(
        left=frame["x"] - half, right=frame["x"] + half, top=frame["y"] - half, bottom=frame["y"] + half
    )
    low, high = (float(bound) for bound in np.nanpercentile(frame[value], [1, 99]))
    box = {
        "x": alt.X("left:Q", scale=x, axis=None),
        "x2": "right:Q",
        "y": alt.Y("top:Q", scale=y, axis=None),
        "y2": "bottom:Q",
    }
    image = pd.DataFrame({"left": [background.left], "right": [background.right], "top": [background.top],
                          "bottom": [background.bottom], "url": [background.url]})  # fmt: skip
    color = alt.Color(
        f"{value}:Q",
        scale=alt.Scale(
            scheme="magma" if value == "mean" else "viridis", domain=[low, high if high > low else low + 1], clamp=True
        ),
        legend=alt.Legend(title=LABELS[value], orient="bottom", gradientLength=240, titleLimit=400),
    )
    tiles = (
        alt.Chart(squares)
        .mark_rect(opacity=0.75, cursor="pointer")
        .encode(
            **box,
            color=color,
            tooltip=[
                alt.Tooltip("tile:Q", title="tile"),
                alt.Tooltip("mean:Q", format=".3g", title="mean"),
                alt.Tooltip("sd:Q", format=".3g", title="standard deviation"),
                alt.Tooltip("ood_score:Q", format=".2f", title="strangeness"),
            ],
        )
        .add_params(alt.selection_point(name=CLICKED, fields=["tile"], on="click", toggle=False, empty=False))
    )
    layers = [alt.Chart(image).mark_image(aspect=False).encode(**box, url="url:N"), tiles]
    if tile is not None:
        outlined = alt.Chart(squares[squares["tile"] == tile])
        for stroke, wide in (("black", 4), ("white", 2)):
            layers.append(outlined.mark_rect(fill=None, stroke=stroke, strokeWidth=wide).encode(**box))
    return (
        alt.layer(*layers)
        .properties(
            width=MAP_WIDTH * shrink,
            height=MAP_WIDTH * shrink * height / width,
            padding=0,
            # keeps tiles square; otherwise the legend takes its space from the map
            autosize=alt.AutoSizeParams(type="pad", contains="content"),
        )
        .configure_view(stroke=None)
    )


def tile_figure(explanation: Explanation, gene: str, tile: int) -> Figure:
    """Draw a tile with its nuclei colored by their scores."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    _draw_tile(figure.add_subplot(), explanation, gene, tile)
    return figure


def distribution_figure(frame: pd.DataFrame, row: pd.Series, gene: str) -> Figure:
    """Draw the predicted count distribution of a tile and that of the training tiles."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    _draw_distribution(figure.add_subplot(), frame, row, gene)
    return figure


def whole_figure(prediction: Prediction, gene: str, tile: int, explanation: Explanation, frame: pd.DataFrame) -> bytes:
    """Draw the section's prediction and uncertainty, the explained tile and its distribution in one PNG."""
    from stimage_sd import pl

    figure = Figure(figsize=(15, 8.6), layout="constrained")
    above, below = figure.subfigures(2, 1)  # type: ignore[misc]
    maps = above.subplots(1, 4)
    pl.uncertainty(prediction.sdata, gene, ax=maps)
    row = prediction.of_gene(gene).set_index("tile").loc[tile]
    for ax in maps:
        _outline(ax, row, prediction)
    first, second = below.subplots(1, 2)
    _draw_tile(first, explanation, gene, tile)
    _draw_distribution(second, frame, row, gene)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, with names shown literally."""
    from stimage_sd.pl._literal_text import show_literally

    show_literally(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_tile(ax: Axes, explanation: Explanation, gene: str, tile: int) -> None:
    from stimage_sd import pl

    pl.explanation(explanation.sdata, gene, tiles=[tile], ax=ax)
    kind = "nuclei" if explanation.of_nuclei else "superpixels: no nuclei were found"
    ax.set_title(f"Tile {tile}: {kind}, by LIME", fontsize=10)


def _draw_distribution(ax: Axes, frame: pd.DataFrame, row: Any, gene: str) -> None:
    ax.fill_between(frame["count"], frame["training"], step="mid", color="0.8", label="all training tiles")
    ax.step(frame["count"], frame["predicted"], where="mid", color="#dd8452", linewidth=1.8, label="this tile")
    ax.axvspan(row["lower"], row["upper"], color="#dd8452", alpha=0.12, linewidth=0, label="90 % interval")
    ax.axvline(row["mean"], color="#dd8452", linestyle=":", linewidth=1.4, label="predicted mean")
    ax.set(xlabel=f"count of {gene}", ylabel="probability", ylim=(0, None))
    ax.set_title("Predicted distribution", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def _outline(ax: Axes, row: Any, prediction: Prediction) -> None:
    from matplotlib.patches import Rectangle

    from stimage_sd import contract

    side = float(contract.tiling(prediction.sdata)["side_px"])
    corner = (row["x"] - side / 2, row["y"] - side / 2)
    for color, width in (("black", 3.0), ("white", 1.4)):
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width, zorder=6))
