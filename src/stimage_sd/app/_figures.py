"""Draw the figures of the page: a tile, its explanation, its predicted distribution, and all of them as a PNG."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stimage_sd.app._sections import Explanation, Prediction

#: size of a picture, inches
WIDTH, HEIGHT = 4.0, 4.0
#: largest share of a tile that its scale bar takes
_BAR = 0.4


def data_url(content: bytes, kind: str) -> str:
    """Return an image as a data URL, which belongs to the page and has no address of its own."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def tile_figure(prediction: Prediction, explanation: Explanation, gene: str, tile: int) -> Figure:
    """Draw a tile as it is in the H&E, and beside it the tile with its nuclei colored by their scores."""
    figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
    # axes of one row have the same size, so that nuclei are found at the same place
    first, second = figure.subplots(1, 2)
    _draw_pixels(first, prediction, tile)
    _draw_explanation(second, explanation, gene, tile)
    return figure


def distribution_figure(frame: pd.DataFrame, row: pd.Series, gene: str) -> Figure:
    """Draw the predicted count distribution of a tile, that of the training tiles, and the measured count."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
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
    first, second, third = below.subplots(1, 3)
    _draw_pixels(first, prediction, tile)
    _draw_explanation(second, explanation, gene, tile)
    _draw_distribution(third, frame, row, gene)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, with names shown literally."""
    from stimage_sd.pl._literal_text import show_literally

    show_literally(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_pixels(ax: Axes, prediction: Prediction, tile: int) -> None:
    from stimage_sd import contract
    from stimage_sd.pl._canvas import cut_tiles

    sdata, side = prediction.sdata, prediction.side
    place = prediction.tiles.set_index("tile").loc[[tile], ["x", "y"]].to_numpy()
    (pixels,) = cut_tiles(sdata, place, side=side, target=480, image_key=contract.image_name(sdata))
    ax.imshow(pixels, extent=(0, side, side, 0))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(f"Tile {tile} as it is", fontsize=10)
    mpp = contract.mpp(sdata)
    if mpp is None:
        return
    most = _BAR * side * mpp
    power = 10 ** np.floor(np.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    ax.plot([0.05 * side, 0.05 * side + length / mpp], [0.95 * side] * 2, color="black", linewidth=3)
    ax.text(
        0.05 * side + length / mpp / 2, 0.93 * side, f"{length:g} µm", ha="center", va="bottom", fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _draw_explanation(ax: Axes, explanation: Explanation, gene: str, tile: int) -> None:
    from stimage_sd import contract, pl

    # the H&E as it is, so that both pictures have the same colors
    image = contract.image_name(explanation.sdata)
    pl.explanation(explanation.sdata, gene, tiles=[tile], image_key=image, ax=ax)
    kind = "nuclei" if explanation.of_nuclei else "superpixels: no nuclei were found"
    ax.set_title(f"Tile {tile}: {kind}, by LIME" + (", not readable" if explanation.doubt else ""), fontsize=10)


def _draw_distribution(ax: Axes, frame: pd.DataFrame, row: Any, gene: str) -> None:
    ax.fill_between(frame["count"], frame["training"], step="mid", color="0.8", label="all training tiles")
    ax.step(frame["count"], frame["predicted"], where="mid", color="#dd8452", linewidth=1.8, label="this tile")
    ax.axvspan(row["lower"], row["upper"], color="#dd8452", alpha=0.12, linewidth=0, label="90 % interval")
    ax.axvline(row["mean"], color="#dd8452", linestyle=":", linewidth=1.4, label="predicted mean")
    if np.isfinite(row.get("measured_at_depth", np.nan)):
        ax.axvline(row["measured_at_depth"], color="black", linewidth=1.6, label=_measured_words(row))
    ax.set(xlabel=f"count of {gene}", ylabel="probability", ylim=(0, None))
    ax.set_title("Predicted distribution", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)


def _measured_words(row: Any) -> str:
    if row["measured"] == row["measured_at_depth"]:
        return f"measured: {row['measured']:.0f}"
    return f"measured: {row['measured']:.0f}, at the predicted depth {row['measured_at_depth']:.3g}"


def _outline(ax: Axes, row: Any, prediction: Prediction) -> None:
    from matplotlib.patches import Rectangle

    side = prediction.side
    corner = (row["x"] - side / 2, row["y"] - side / 2)
    for color, width in (("black", 3.0), ("white", 1.4)):
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width, zorder=6))
