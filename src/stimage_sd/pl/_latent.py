"""Two-dimensional plots of tiles in the space of their predictions or embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._features import Standardize
from stimage_sd.models._latent_space import Use, components, kept_table
from stimage_sd.pl._canvas import Colors, add_color_bar, check_gene, column, finish
from stimage_sd.pl._categories import GRAY, add_legend, categories_of, colors_of
from stimage_sd.pl._compared import HIGH
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import names_of

Basis = Literal["pca", "umap", "tsne"]
_AXES = {"pca": "component", "umap": "UMAP", "tsne": "t-SNE"}


def latent(
    data: SpatialData | contract.Cohort,
    color: str | Sequence[str] = "section",
    *,
    basis: Basis = "umap",
    use: Use = "predictions",
    observed: bool = False,
    extractor: str = "efficientnet_lite0_stages",
    standardize: Standardize = "section",
    n_components: int = 50,
    n_neighbors: int = 15,
    palette: Mapping[str, str] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | np.ndarray | Figure:
    """Draw tiles as points in two dimensions, similar tiles close together.

    Parameters
    ----------
    data
        A section or a cohort. All sections share one space.
    color
        One or several colorings: a gene, a column of the tiles or predictions such as ``"leiden"`` or ``"ood_score"``,
        or ``"section"``. Each coloring gets a panel. With ``key="gene_classes"`` genes are colored by the probability
        of High.
    basis
        ``"pca"`` draws the first two principal components. ``"umap"`` and ``"tsne"`` lay out all components. In these
        layouts only short distances have a meaning.
    use
        ``"predictions"`` (log1p of the predicted means) or ``"embeddings"``, as in `stimage_sd.tl.cluster`, or
        ``"cells"``. ``"cells"`` draws predicted cells, and places without cells, by the features that predict their
        types (at most 5,000 per section). Color cells by ``"cell_type"`` or ``"entropy"``.
    observed
        Color genes by counts instead of the predicted mean. Tiles without counts are gray.
    extractor
        Extractor of the embeddings.
    standardize
        ``"section"`` standardizes genes or embeddings within each section. This removes shifts from stain, scanner or
        the model of a fold. ``"cohort"`` standardizes over all tiles.
    n_components, n_neighbors
        Number of principal components, and number of neighbors for UMAP. For t-SNE `n_neighbors` is the perplexity.
    palette
        Colors, keyed by category. By default categories have the colors that they have in `cells` and `tiles`.
    cmap, vmin, vmax, alpha
        Colormap of numbers. Ends of the color range, by default the 1st and 99th percentile. Opacity of the points.
    key
        Name of the table of predictions.
    table_key
        Name of the table of counts, for `observed`.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed of components and layout.
    ax
        Axes to draw on, one per panel. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes, or an array of axes if `color` is a list.

    Raises
    ------
    KeyError
        If a section has no predictions or embeddings, or `color` is unknown.
    ValueError
        If there are not more tiles than neighbors, or an option is out of range.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_latent", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> sti.tl.predict(section, sti.tl.fit_nb(section, genes=genes, n_members=2, max_epochs=2))
    >>> sti.pl.latent(section, genes[0], basis="pca").get_xlabel()
    'component 1'
    """
    source = contract.Source(table_key, layer)
    cohort = contract.sections(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    if basis not in _AXES:
        raise ValueError(f"Expected `basis` to be one of {list(_AXES)}, found {basis!r}.")
    names = names_of(color)
    placed = components(
        cohort, use=use, extractor=extractor, n_components=max(n_components, 2), standardize=standardize, seed=seed,
        key=key,
    )  # fmt: skip
    values = {
        name: _joined([_values(sdata, section, name, use, observed, source, key) for section, sdata in cohort.items()])
        for name in names
    }
    points = _layout(np.concatenate(list(placed.values())), basis, n_neighbors, seed)
    axes = sheet.panels(len(names), size=(4.6, 4.0), columns=3)
    for panel, name in zip(axes, names, strict=True):
        _draw(panel, points, values[name], name, colors, palette)
        panel.set_xlabel(f"{_AXES[basis]} 1", fontsize=9)
        panel.set_ylabel(f"{_AXES[basis]} 2", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        finish(panel)
    return sheet.done(axes[0] if isinstance(color, str) else axes)


def _layout(values: np.ndarray, basis: Basis, n_neighbors: int, seed: int) -> np.ndarray:
    if basis == "pca":
        return values[:, :2]
    if not 2 <= n_neighbors < len(values):
        raise ValueError(
            f"Expected `n_neighbors` from 2 to below the number of tiles, {len(values)}, found {n_neighbors}."
        )
    if basis == "tsne":
        return TSNE(perplexity=n_neighbors, init="pca", random_state=seed).fit_transform(values)
    table = ad.AnnData(values, obs=pd.DataFrame(index=[str(row) for row in range(len(values))]))
    sc.pp.neighbors(table, n_neighbors=n_neighbors, use_rep="X", random_state=seed)
    sc.tl.umap(table, random_state=seed)
    return np.asarray(table.obsm["X_umap"])


def _values(
    sdata: SpatialData, section: str, name: str, use: Use, observed: bool, source: contract.Source, key: str
) -> pd.Series:
    """Return the color values of a section's points, numbers or categories."""
    table = kept_table(sdata, use, key)
    if name == "section":
        return pd.Series([section] * table.n_obs, dtype=object)
    tables = [table, *([sdata.tables[key]] if use == "embeddings" and key in sdata.tables else [])]
    for annotated in tables:
        if name in annotated.obs:
            return annotated.obs[name].reset_index(drop=True)
    if observed:
        rows, counts = contract.align_to_spots(sdata, table, source)
        check_gene(counts, name, what="measured")
        values = np.full(table.n_obs, np.nan)
        values[rows] = column(counts, name)
        return pd.Series(values, name="counts")
    predictions = contract.predictions(sdata, key)
    check_gene(predictions, name)
    return pd.Series(
        column(predictions, name), name="probability of High" if HIGH in predictions.layers else "predicted mean"
    )


def _joined(parts: Sequence[pd.Series]) -> pd.Series:
    """Return the values of all sections. Categories that do not occur keep their place."""
    if not any(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
        return pd.concat(parts, ignore_index=True)
    names = categories_of(parts)
    text = pd.concat([part.astype("string") for part in parts], ignore_index=True)
    return pd.Series(pd.Categorical(text, categories=names))


def _draw(
    ax: Axes,
    points: np.ndarray,
    values: pd.Series,
    name: str,
    colors: Colors,
    palette: Mapping[str, str] | None,
) -> None:
    """Draw points in random order, so that no section covers another."""
    order = np.random.default_rng(0).permutation(len(points))
    size = float(np.clip(6000 / len(points), 2, 22))
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(dtype=float)
        known = np.isfinite(numbers)
        ax.scatter(points[~known, 0], points[~known, 1], s=size, color=GRAY, linewidth=0, alpha=colors.alpha,
                   rasterized=True)  # fmt: skip
        order = order[known[order]]
        drawn = ax.scatter(
            points[order, 0], points[order, 1], s=size, c=numbers[order],
            cmap=colors.cmap, norm=colors.norm(numbers), alpha=colors.alpha, linewidth=0,
            rasterized=True,
        )  # fmt: skip
        add_color_bar(ax, drawn, str(values.name), location="right")
        ax.set_title(name, fontsize=11)
        return
    drawn_in = colors_of(categories_of([values]), palette)
    shown = [
        drawn_in.get(str(entry), GRAY) if known else GRAY for entry, known in zip(values, values.notna(), strict=True)
    ]
    ax.scatter(
        points[order, 0], points[order, 1], s=size, color=[shown[n] for n in order], alpha=colors.alpha, linewidth=0,
        rasterized=True,
    )  # fmt: skip
    present = set(values.dropna().astype(str))
    add_legend(ax, {entry: color for entry, color in drawn_in.items() if entry in present})
    ax.set_title(name, fontsize=11)
