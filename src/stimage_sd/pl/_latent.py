"""Tiles in the space of their predictions or embeddings, in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._features import Standardize
from stimage_sd.models._latent_space import Use, components, kept_table
from stimage_sd.pl._canvas import add_colour_bar, check_gene, column, finish, panels, robust_norm

Basis = Literal["pca", "umap", "tsne"]
_AXES = {"pca": "component", "umap": "UMAP", "tsne": "t-SNE"}
_GREY = "#c8c8c8"
#: entries of a legend in one column
_TALLEST = 14


def latent(
    data: SpatialData | contract.Cohort,
    color: str | Sequence[str] = "section",
    *,
    basis: Basis = "umap",
    use: Use = "predictions",
    observed: bool = False,
    extractor: str = "efficientnet_lite0",
    standardize: Standardize = "section",
    n_components: int = 50,
    n_neighbors: int = 15,
    cmap: str = "viridis",
    table_key: str | None = None,
    seed: int = 0,
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw tiles as points, near each other where they are alike.

    Parameters
    ----------
    data
        A section, or a cohort of them, in one space.
    color
        What points are coloured by: a gene, a column of the tiles or predictions such as ``"leiden"`` or
        ``"ood_score"``, or ``"section"``; or several, a panel each.
    basis
        ``"pca"``: the first two principal components. ``"umap"``, ``"tsne"``: a layout of all of them, in which
        only nearness means something.
    use
        Which space: ``"predictions"`` (log1p of the predicted means) or ``"embeddings"``, as in
        `stimage_sd.tl.cluster`; or ``"cells"``: predicted cells, and places without any, in the features that their
        types are told by (5,000 a section at most), to be coloured by ``"cell_type"`` or ``"entropy"``.
    observed
        Colour genes by their counts rather than by their predicted mean; tiles without are grey.
    extractor
        Whose embeddings.
    standardize
        ``"section"``: genes, or embeddings, by each section's own mean and deviation, which takes out what stain,
        scanner, or the model of a fold add to all its tiles alike. ``"cohort"``: by those of all tiles.
    n_components, n_neighbors
        Principal components, and neighbours of UMAP; t-SNE takes the latter as its perplexity.
    cmap
        Name of a matplotlib colour map, for numbers.
    table_key
        Name of the table of counts, for `observed`.
    seed
        Seed of components and layout.
    ax
        Axes to draw on, one a colour; a new figure by default.

    Returns
    -------
    The axes, an array of them where `color` is a list.

    Raises
    ------
    KeyError
        If a section has no predictions or embeddings, or there is nothing of the name `color`.
    ValueError
        If there are no more tiles than neighbours, or an option is out of range.

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
    cohort = contract.sections(data)
    if basis not in _AXES:
        raise ValueError(f"Expected `basis` to be one of {list(_AXES)}, found {basis!r}.")
    colours = [color] if isinstance(color, str) else list(color)
    placed = components(
        cohort, use=use, extractor=extractor, n_components=max(n_components, 2), standardize=standardize, seed=seed
    )
    values = {
        name: pd.concat(
            [_values(sdata, section, name, use, observed, table_key) for section, sdata in cohort.items()],
            ignore_index=True,
        )
        for name in colours
    }
    points = _layout(np.concatenate(list(placed.values())), basis, n_neighbors, seed)
    axes = panels(ax, len(colours), size=(4.6, 4.0), columns=3)
    for panel, name in zip(axes, colours, strict=True):
        _draw(panel, points, values[name], name, cmap=cmap)
        panel.set_xlabel(f"{_AXES[basis]} 1", fontsize=9)
        panel.set_ylabel(f"{_AXES[basis]} 2", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        finish(panel)
    return axes[0] if isinstance(color, str) else axes


def _layout(values: np.ndarray, basis: Basis, n_neighbors: int, seed: int) -> np.ndarray:
    if basis == "pca":
        return values[:, :2]
    if not 2 <= n_neighbors < len(values):
        raise ValueError(
            f"Expected `n_neighbors` from 2 to below the number of tiles, {len(values)}, found {n_neighbors}."
        )
    if basis == "tsne":
        return TSNE(perplexity=n_neighbors, init="pca", random_state=seed).fit_transform(values)
    table = ad.AnnData(values, obs=pd.DataFrame(index=[str(number) for number in range(len(values))]))
    sc.pp.neighbors(table, n_neighbors=n_neighbors, use_rep="X", random_state=seed)
    sc.tl.umap(table, random_state=seed)
    return np.asarray(table.obsm["X_umap"])


def _values(sdata: SpatialData, section: str, name: str, use: Use, observed: bool, table_key: str | None) -> pd.Series:
    """What a section's points are coloured by: numbers, or a category each."""
    table = kept_table(sdata, use)
    if name == "section":
        return pd.Series([section] * table.n_obs, dtype=object)
    tables = [table, *([contract.predictions(sdata)] if use == "embeddings" and _is_predicted(sdata) else [])]
    for annotated in tables:
        if name in annotated.obs:
            own = annotated.obs[name]
            return own.astype(object if isinstance(own.dtype, pd.CategoricalDtype) else own.dtype).reset_index(
                drop=True
            )
    if observed:
        rows, counts = contract.align_to_spots(sdata, table, table_key)
        check_gene(counts, name, what="measured")
        values = np.full(table.n_obs, np.nan)
        values[rows] = column(counts, name)
        return pd.Series(values, name="counts")
    predictions = contract.predictions(sdata)
    check_gene(predictions, name)
    return pd.Series(column(predictions, name), name="predicted mean")


def _is_predicted(sdata: SpatialData) -> bool:
    return contract.PREDICTIONS in sdata.tables


def _draw(ax: Axes, points: np.ndarray, values: pd.Series, name: str, *, cmap: str) -> None:
    """Points in a random order, so that none of the sections lies on top."""
    order = np.random.default_rng(0).permutation(len(points))
    size = float(np.clip(6000 / len(points), 2, 22))
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(dtype=float)
        known = np.isfinite(numbers)
        ax.scatter(points[~known, 0], points[~known, 1], s=size, color=_GREY, linewidth=0, rasterized=True)
        order = order[known[order]]
        drawn = ax.scatter(
            points[order, 0], points[order, 1], s=size, c=numbers[order],
            cmap=cmap, norm=robust_norm(numbers), linewidth=0,
            rasterized=True,
        )  # fmt: skip
        add_colour_bar(ax, drawn, str(values.name), location="right")
        ax.set_title(name, fontsize=11)
        return
    names = sorted(values.dropna().astype(str).unique(), key=lambda entry: (len(entry), entry))
    palette = {entry: mpl.colormaps["tab20" if len(names) > 10 else "tab10"](n % 20) for n, entry in enumerate(names)}
    shown = values.astype(str).where(values.notna())
    colours = [palette.get(entry, _GREY) for entry in shown]
    ax.scatter(
        points[order, 0], points[order, 1], s=size, color=[colours[n] for n in order], linewidth=0, rasterized=True
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=entry)
        for entry, colour in palette.items()
    ]
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title_fontsize=8,
        ncols=-(-len(handles) // _TALLEST), handletextpad=0.1,
    )  # fmt: skip
    ax.set_title(name, fontsize=11)
