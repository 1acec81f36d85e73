"""Draw the overview figure of the documentation and the README.

``python tools/overview_figure.py`` trains on sections C2, C3 and C4 of her2st, predicts C5, and writes
``docs/_static/overview.svg``. The H&E, the tiles, the distributions and the table of the figure are those of C5. It
takes about a minute of one core.
"""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from stimage_sd import datasets, pp, tl

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "_static" / "overview.svg"
GENE = "ERBB2"
N_GENES, N_MEMBERS, N_DRAWS = 100, 10, 4000
INK, MUTED, LOW, HIGH = "#1a1a1a", "#555555", "#1f6fb4", "#c8471f"
#: width of the figure in points, so that text of 14 points is 9.7 px high where the figure is 400 px wide
WIDTH, HEIGHT = 576, 470
#: width of thumbnails, pixels, and the quality of their JPEGs
THUMBNAIL, QUALITY = 380, 76

Window = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panels:
    """What the panels show. Positions and lengths are in pixels of the H&E.

    Attributes
    ----------
    slide, slide_px
        Thumbnail of the section, and the width and height of the H&E.
    zoomed, window
        Part of the normalized H&E, and where it lies (x0, y0, x1, y1).
    tiles, side
        One row per tile: place, measured count, mean and interval of the gene. And the side of a tile.
    draws
        Counts of the gene, samples × tiles.
    chosen
        Rows of the two tiles whose distributions are drawn, by color.
    """

    slide: np.ndarray
    slide_px: tuple[int, int]
    zoomed: np.ndarray
    window: Window
    tiles: pd.DataFrame
    side: float
    draws: np.ndarray
    chosen: dict[str, int]


def predict() -> Panels:
    """Train on three sections, predict the fourth, and return what the panels show of it."""
    train = {name: datasets.her2st(name) for name in ("C2", "C3", "C4")}
    test = datasets.her2st("C5")
    for section in (*train.values(), test):
        pp.stain_normalize(section, train["C2"])
        pp.tile(section)
        pp.embed(section)
    genes = pp.select_genes(train, n_top=N_GENES, include=[GENE])
    model = tl.fit_nb(train, genes=genes, n_members=N_MEMBERS)
    tl.predict(test, model)
    draws = tl.sample(test, model, N_DRAWS)[:, :, list(model.genes).index(GENE)].compute()

    predictions = test["predictions"]
    tiles = pd.DataFrame(predictions.obsm["spatial"], predictions.obs_names, ["x", "y"])
    tiles["counts"] = test["counts"][predictions.obs["spot_id"]].to_df()[GENE].to_numpy()
    for name in ("mean", "lower", "upper"):
        tiles[name] = predictions.to_df(layer=None if name == "mean" else name)[GENE]
    x0, _, x1, _ = test["tile_squares"].bounds.iloc[0]
    chosen, window = two_neighbors(tiles, side=x1 - x0)
    levels = [level["image"] for level in test["he"].children.values()]
    small = min(levels, key=lambda level: abs(level.sizes["x"] - 4 * THUMBNAIL))
    full = test["he_normalized"]["scale0"]["image"]
    part = full.isel(x=slice(int(window[0]), int(window[2])), y=slice(int(window[1]), int(window[3])))
    return Panels(
        slide=resized(small.transpose("y", "x", "c").to_numpy(), 1.5),
        slide_px=(full.sizes["x"], full.sizes["y"]),
        zoomed=resized(part.transpose("y", "x", "c").to_numpy()),
        window=window,
        tiles=tiles,
        side=float(x1 - x0),
        draws=draws,
        chosen=chosen,
    )


def resized(pixels: np.ndarray, thumbnails: float = 1.0) -> np.ndarray:
    """Return an image that is so many thumbnails wide."""
    width = round(THUMBNAIL * thumbnails)
    return cv2.resize(pixels, (width, round(width * pixels.shape[0] / pixels.shape[1])), interpolation=cv2.INTER_AREA)


def two_neighbors(tiles: pd.DataFrame, *, side: float) -> tuple[dict[str, int], Window]:
    """Return two near tiles of unlike means by color, and a window with both and their neighbors.

    Means over 90 counts are left out. Their distributions are so wide that the other one would be a line.
    """
    places, mean = tiles[["x", "y"]].to_numpy(), tiles["mean"].to_numpy()
    apart = np.abs(places[:, None] - places[None]).max(axis=2)
    gain = np.where((apart < 4.5 * side) & (mean[None] < 90), mean[None] - mean[:, None], -np.inf)
    low, high = (int(row) for row in np.unravel_index(np.argmax(gain), gain.shape))
    x, y = (places[low] + places[high]) / 2
    return {LOW: low, HIGH: high}, (x - 5 * side, y - 3.5 * side, x + 5 * side, y + 3.5 * side)


def draw_slide(ax: Axes, panels: Panels) -> None:
    """Draw the whole section, with the window of the next panel."""
    width, height = panels.slide_px
    ax.imshow(panels.slide, extent=(0, width, height, 0))
    low, high = panels.tiles[["x", "y"]].min() - 6 * panels.side, panels.tiles[["x", "y"]].max() + 6 * panels.side
    ax.set(xlim=(max(low["x"], 0), high["x"]), ylim=(high["y"], low["y"]))
    x0, y0, x1, y1 = panels.window
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=INK, linewidth=2))
    ax.axis("off")


def draw_tiles(ax: Axes, panels: Panels) -> None:
    """Draw the squares of the tiles in the window, the chosen ones in color."""
    x0, y0, x1, y1 = panels.window
    ax.imshow(panels.zoomed, extent=(x0, x1, y1, y0))
    colors = {row: color for color, row in panels.chosen.items()}
    half = panels.side / 2
    for row, (x, y) in enumerate(panels.tiles[["x", "y"]].to_numpy()):
        if x0 < x - half and x + half < x1 and y0 < y - half and y + half < y1:
            square = Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=colors.get(row, INK))
            square.set_linewidth(4 if row in colors else 1.2)
            ax.add_patch(square)
    ax.axis("off")


def draw_distributions(ax: Axes, panels: Panels) -> None:
    """Draw the distribution of the count in the chosen tiles, its interval and the measured count."""
    rows = list(panels.chosen.values())
    last = 1.25 * panels.tiles["upper"].iloc[rows].max()
    edges = np.arange(0, last + 4, 4)
    for number, (color, row) in enumerate(panels.chosen.items()):
        tile = panels.tiles.iloc[row]
        share, _ = np.histogram(panels.draws[:, row], bins=edges)
        share = share / share.max()
        ax.stairs(share, edges, fill=True, color=color, alpha=0.45)
        ax.stairs(share, edges, color=color, linewidth=1.5)
        height = 1.16 + 0.2 * number
        ax.plot([tile["lower"], tile["upper"]], [height, height], color=color, linewidth=4, solid_capstyle="butt")
        ax.plot(tile["counts"], height, "o", color="white", markeredgecolor=INK, markeredgewidth=1.6, markersize=9)
    ax.set(xlim=(0, last), ylim=(0, 1.5), yticks=[], xlabel=f"counts of {GENE}")
    ax.spines[["top", "left", "right"]].set_visible(False)
    ax.text(last, 0.86, "bar: 90 % interval\ncircle: measured", ha="right", va="top", fontsize=12, color=MUTED)


def draw_table(ax: Axes, panels: Panels) -> None:
    """Draw the map of the means, and rows of the table of predictions."""
    ax.axis("off")
    drawn = ax.inset_axes((0.0, 0.1, 0.46, 0.9))
    places = panels.tiles[["x", "y"]].to_numpy()
    drawn.scatter(
        places[:, 0], places[:, 1], c=np.log1p(panels.tiles["mean"]), s=14, marker="s", cmap="magma", linewidths=0
    )
    drawn.set_aspect("equal")
    drawn.invert_yaxis()
    drawn.axis("off")
    rows = list(panels.chosen.items())
    others = [row for row in range(len(panels.tiles)) if row not in panels.chosen.values()][:2]
    lines = [*rows, *((INK, row) for row in others)]
    for column, (x, title) in enumerate(((0.66, GENE), (1.0, "90 %"))):
        ax.text(x, 0.93, title, ha="right", va="center", fontsize=13, color=MUTED, transform=ax.transAxes)
        for number, (color, row) in enumerate(lines):
            tile = panels.tiles.iloc[row]
            text = f"{tile['mean']:.1f}" if column == 0 else f"{tile['lower']:.0f}–{tile['upper']:.0f}"
            y = 0.78 - 0.15 * number
            ax.text(x, y, text, ha="right", va="center", fontsize=13, color=color, transform=ax.transAxes)
    ax.plot([0.5, 1.0], [0.86, 0.86], color=MUTED, linewidth=1, transform=ax.transAxes)
    ax.text(
        1.0, 0.1, "with the variance of\ncounts and of the model", ha="right", va="center", fontsize=12, color=MUTED,
        transform=ax.transAxes,
    )  # fmt: skip


def draw(panels: Panels) -> Figure:
    """Draw the four panels on a white card, which is legible on light and dark pages."""
    plt.rcParams.update({"font.size": 13, "axes.labelcolor": INK, "svg.hashsalt": "overview", "text.color": INK})
    figure = plt.figure(figsize=(WIDTH / 72, HEIGHT / 72))
    card = FancyBboxPatch(
        (0.006, 0.006), 0.988, 0.988, boxstyle="round,pad=0,rounding_size=0.02", transform=figure.transFigure,
        facecolor="white", edgecolor="#cccccc", linewidth=1.2, zorder=-1,
    )  # fmt: skip
    figure.add_artist(card)
    steps = (
        ("1  H&E of a section", draw_slide, (0.04, 0.535, 0.42, 0.385)),
        ("2  tiles, embedded", draw_tiles, (0.54, 0.535, 0.42, 0.385)),
        ("3  distribution per tile", draw_distributions, (0.05, 0.125, 0.40, 0.31)),
        ("4  tables in SpatialData", draw_table, (0.54, 0.045, 0.42, 0.39)),
    )
    for title, function, (left, bottom, width, height) in steps:
        function(figure.add_axes((left, bottom, width, height)), panels)
        figure.text(left, bottom + height + 0.028, title, fontsize=16, fontweight="bold", va="center")
    for x, y in ((0.5, 0.73), (0.5, 0.27)):
        figure.text(x, y, "→", fontsize=26, ha="center", va="center", color=MUTED)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write an SVG whose images are JPEGs, a fraction of matplotlib's PNGs."""
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")

    def smaller(match: re.Match[str]) -> str:
        encoded = np.frombuffer(base64.b64decode(match[1]), np.uint8)
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()

    path.write_text(re.sub(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", smaller, text), encoding="utf-8")


if __name__ == "__main__":
    write(draw(predict()), OUTPUT)
    sys.stdout.write(f"{OUTPUT}: {OUTPUT.stat().st_size:,} bytes\n")
