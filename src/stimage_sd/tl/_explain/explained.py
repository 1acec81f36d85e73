"""Write explanations, and summarize them as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.tl._explain.segments import Segments

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: columns that explanations add to the nuclei
_OWN = ("tile", "nucleus", "area_px", "area_um2")
_PREFIXES = ("lime_", "saliency_")


@dataclass(frozen=True)
class TileResult:
    """Explanation of one tile.

    Attributes
    ----------
    tile
        The tile's `instance_id`.
    segments
        The tile's segments, or `None` if there are none.
    prediction
        ``float64 (n_outputs,)``: prediction of the unperturbed tile.
    scores
        ``float64 (n_segments, n_outputs)``, without the background.
    deviations
        Standard deviation of the scores over several seeds, of the same shape. `None` for one seed.
    about
        Layer values, ``float64 (n_outputs,)``, keyed by layer name.
    n_samples
        Number of perturbed tiles.
    """

    tile: int
    segments: Segments | None
    prediction: np.ndarray | None = None
    scores: np.ndarray | None = None
    deviations: np.ndarray | None = None
    about: Mapping[str, np.ndarray] = field(default_factory=dict)
    n_samples: int = 0


def top_tiles(
    data: SpatialData,
    gene: str,
    *,
    n_tiles: int = 5,
    among: Sequence[int] | contract.Labeled | None = None,
    key: str | None = None,
) -> list[int]:
    """List the tiles with the highest prediction of a gene.

    Parameters
    ----------
    data
        A section with predicted counts or predicted classes.
    gene
        The gene.
    n_tiles
        Number of tiles to list.
    among
        Candidate tiles. A mapping: tiles with these labels, such as ``{"annotation": "Tumor"}``, in a column of the
        spots, the predictions or the tiles. A sequence: ``obs["instance_id"]`` of the tiles. Default: all tiles.
    key
        Name of the table of predictions or classes. By default predictions, or classes if there are no predictions.

    Returns
    -------
    ``obs["instance_id"]`` of the tiles, highest prediction first.

    Raises
    ------
    KeyError
        If the section has no predictions, or none of this gene, or there is no such column.
    ValueError
        If `n_tiles` is not positive, or no tile has such a label.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_top_tiles", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> len(sti.tl.top_tiles(section, model.genes[0], n_tiles=3))
    3
    """
    sdata = contract.section(data)
    if n_tiles < 1:
        raise ValueError(f"Expected `n_tiles` of at least 1, found {n_tiles}.")
    by_class = key is None and contract.PREDICTIONS not in sdata.tables and contract.GENE_CLASSES in sdata.tables
    table = contract.gene_classes(sdata) if by_class else contract.predictions(sdata, key or contract.PREDICTIONS)
    if gene not in table.var_names:
        raise KeyError(f"No gene {gene!r} among the predicted ones, such as {table.var_names[:3].tolist()}.")
    values = np.asarray(table[:, gene].X, dtype=np.float64).ravel()
    ids = table.obs[contract.INSTANCE_KEY].to_numpy()
    if isinstance(among, Mapping):
        rows = contract.labeled_rows(sdata, table.obs, among)
    else:
        rows = np.arange(len(ids)) if among is None else np.flatnonzero(np.isin(ids, np.asarray(among)))
    order = rows[np.argsort(-values[rows], kind="stable")]
    return [int(tile_id) for tile_id in ids[order[:n_tiles]]]


def explained_nuclei(
    data: SpatialData,
    gene: str | Sequence[str],
    *,
    method: str = "lime",
    by: str | None = None,
    min_stability: float | None = contract.MIN_STABILITY,
    min_r2: float | None = contract.MIN_R2,
) -> pd.DataFrame:
    """List explained nuclei with their scores, one row per nucleus and gene.

    Parameters
    ----------
    data
        A section with explanations.
    gene
        One or several genes.
    method
        Method of the scores, ``"lime"`` or ``"saliency"``.
    by
        Column with a class. It is looked up in the explained nuclei (such as a cell type), then in the tiles' ``obs``
        (such as a pathologist's annotation).
    min_stability, min_r2
        Lowest stability and held-out R² of readable scores. `None`: no limit. Scores by other methods than LIME are
        always readable.

    Returns
    -------
    Columns ``tile``, ``nucleus``, ``gene``, ``score``, ``readable``, ``area_um2`` (``area_px`` where the resolution is
    unknown) and, with `by`, ``class``. `stimage_sd.pl.explanation_scores` draws this table. Nuclei without a score are
    left out.

    Raises
    ------
    KeyError
        If the section has no explanations, or none of this gene, or there is no such class column.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.explained_nuclei(section, "ERBB2", by="annotation")  # doctest: +SKIP
    """
    sdata = contract.section(data)
    frame = contract.explained(sdata)
    genes = [gene] if isinstance(gene, str) else list(gene)
    classes = None if by is None else _classes(sdata, frame, by)
    area = "area_um2" if "area_um2" in frame else "area_px"
    parts = []
    for name in genes:
        column = f"{method}_{name}"
        if column not in frame:
            known = sorted(known_column for known_column in frame.columns if known_column.startswith(_PREFIXES))
            raise KeyError(f"No scores {column!r} among the explained nuclei's {known}.")
        unstable = contract.unstable_tiles(sdata, name, method=method, min_stability=min_stability, min_r2=min_r2)
        part = pd.DataFrame(
            {
                "tile": frame["tile"].to_numpy(),
                "nucleus": frame["nucleus"].to_numpy(),
                "gene": name,
                "score": frame[column].to_numpy(dtype=np.float64),
                "readable": ~frame["tile"].isin(list(unstable)).to_numpy(),
                area: frame[area].to_numpy(dtype=np.float64),
            }
        )
        if classes is not None:
            part["class"] = classes
        parts.append(part)
    return pd.concat(parts, ignore_index=True).dropna(subset="score").reset_index(drop=True)


def compare_explanations(
    data: SpatialData,
    first: str,
    second: str,
    *,
    method: str = "lime",
    by: str | None = None,
    min_stability: float | None = contract.MIN_STABILITY,
    min_r2: float | None = contract.MIN_R2,
) -> pd.DataFrame:
    """Compare the nuclei that raise the prediction of two genes.

    Only tiles whose scores are readable for both genes are compared.

    Parameters
    ----------
    data
        A section with explanations of both genes.
    first, second
        The genes.
    method
        Method of the scores, ``"lime"`` or ``"saliency"``.
    by
        Column with a class, as in `explained_nuclei`.
    min_stability, min_r2
        Lowest stability and held-out R² of readable scores, as in `explained_nuclei`.

    Returns
    -------
    One row for all nuclei and one row per class, with columns ``class`` and ``n_nuclei``. For the nuclei with a
    positive score of a gene: ``n_<gene>``, their fraction ``share_<gene>`` and median area ``area_<gene>`` (µm², or
    px²). ``p_area`` is the two-sided Mann-Whitney test of both genes' areas. ``correlation`` is Pearson's, between
    both genes' scores.

    Raises
    ------
    KeyError
        If the section has no explanations, or none of these genes, or there is no such class column.
    ValueError
        If no tile has readable scores of both genes.

    Notes
    -----
    Paper, section 3.11 and figure S12.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.tl.compare_explanations(section, "VEGFA", "CD52", by="annotation")  # doctest: +SKIP
    """
    sdata = contract.section(data)
    every = [
        explained_nuclei(sdata, gene, method=method, by=by, min_stability=min_stability, min_r2=min_r2)
        for gene in (first, second)
    ]
    frames = [frame[frame["readable"]].set_index(["tile", "nucleus"]) for frame in every]
    area = "area_um2" if "area_um2" in frames[0] else "area_px"
    both = frames[0].join(frames[1][["score"]], how="inner", rsuffix="_second")
    if both.empty:
        raise ValueError(
            f"Expected a tile with readable scores of {first!r} and {second!r}, found none among "
            f"{every[0]['tile'].nunique()}. Run `stimage_sd.tl.explain` on more tiles or with more `n_samples`, or "
            "lower `min_stability` and `min_r2`."
        )
    groups = [("all", both)]
    if by is not None:
        groups += [(str(name), group) for name, group in both.groupby("class", observed=True)]
    rows = []
    for name, group in groups:
        positive = {gene: group[group[column] > 0][area] for gene, column in
                    ((first, "score"), (second, "score_second"))}  # fmt: skip
        row: dict[str, object] = {"class": name, "n_nuclei": len(group)}
        for gene, areas in positive.items():
            row |= {f"n_{gene}": len(areas), f"share_{gene}": len(areas) / len(group), f"area_{gene}": areas.median()}
        enough = all(len(areas) for areas in positive.values())
        row["p_area"] = mannwhitneyu(*positive.values()).pvalue if enough else np.nan
        row["correlation"] = group["score"].corr(group["score_second"])
        rows.append(row)
    return pd.DataFrame(rows)


def _classes(sdata: SpatialData, frame: GeoDataFrame, by: str) -> np.ndarray:
    if by in frame.columns:
        return frame[by].to_numpy()
    tiles = contract.tiles(sdata).obs
    if by not in tiles:
        raise KeyError(
            f"No class {by!r} among the nuclei's columns {sorted(set(frame.columns) - {'geometry'})} or the tiles' "
            f"{sorted(tiles.columns)}."
        )
    return tiles.set_index(contract.INSTANCE_KEY)[by].reindex(frame["tile"]).to_numpy()


# --------------------------------------------------------------------------------------------------
# writing


def write_results(
    sdata: SpatialData,
    results: Sequence[TileResult],
    *,
    genes: Sequence[str],
    of: Sequence[str],
    nuclei: GeoDataFrame | None,
    prefix: str,
) -> None:
    """Write the explained nuclei and the table of the explained tiles.

    Raises
    ------
    ValueError
        If no tile has a segment. Nothing is written then.
    """
    if all(result.segments is None for result in results):
        raise ValueError(
            f"None of the {len(results)} tiles of section {contract.sample(sdata)!r} has a segment. Nothing was "
            'written. Choose other tiles, or `segments="slic"`.'
        )
    contract.write_explained(
        sdata, explained_frame(sdata, results, genes=genes, of=of, nuclei=nuclei, prefix=prefix),
        of_nuclei=nuclei is not None,
    )  # fmt: skip
    contract.write_explanations(sdata, _table(sdata, results, genes, of))


def explained_frame(
    sdata: SpatialData,
    results: Sequence[TileResult],
    *,
    genes: Sequence[str],
    of: Sequence[str],
    nuclei: GeoDataFrame | None,
    prefix: str,
) -> GeoDataFrame:
    """Lay out scores, one row per tile and nucleus."""
    import geopandas

    parts = []
    for result in results:
        if result.segments is None or result.scores is None:
            continue
        part = geopandas.GeoDataFrame(
            {"tile": result.tile, "nucleus": result.segments.names}, geometry=result.segments.geometries
        )
        for index, (name, gene) in enumerate(product(of, genes)):
            part[_column(prefix, gene, name)] = result.scores[:, index]
            if result.deviations is not None:
                part[_column(prefix, gene, name) + "_sd"] = result.deviations[:, index]
        parts.append(part)
    frame = geopandas.GeoDataFrame(pd.concat(parts, ignore_index=True), geometry="geometry")
    frame.insert(2, "area_px", frame.geometry.area)
    mpp = contract.mpp(sdata)
    if mpp is not None:
        frame.insert(3, "area_um2", frame["area_px"] * float(mpp) ** 2)
    if nuclei is not None:
        new = [name for name in nuclei.columns if name not in (*frame.columns, "geometry", "radius")]
        for name in new:
            frame[name] = nuclei.loc[frame["nucleus"], name].to_numpy()
    return frame


def _column(prefix: str, gene: str, of: str) -> str:
    return f"{prefix}_{gene}" if of == "mean" else f"{prefix}_{gene}_{of}"


def _table(sdata: SpatialData, results: Sequence[TileResult], genes: Sequence[str], of: Sequence[str]) -> ad.AnnData:
    tiles = contract.tiles(sdata)
    rows = pd.Index(tiles.obs[contract.INSTANCE_KEY]).get_indexer([result.tile for result in results])
    chosen = tiles[rows]
    names = ("prediction", *next(result.about for result in results if result.segments is not None))
    layers = {}
    for index, kind in enumerate(of):
        place = slice(index * len(genes), (index + 1) * len(genes))
        for name in names:
            values = np.full((len(results), len(genes)), np.nan, dtype=np.float32)
            for row, result in enumerate(results):
                scores = result.prediction if name == "prediction" else result.about.get(name)
                if scores is not None:
                    values[row] = scores[place]
            layers[name if kind == "mean" else f"{name}_{kind}"] = values
    table = ad.AnnData(
        X=next(iter(layers.values())).copy(),
        obs=chosen.obs.drop(columns=contract.REGION_KEY).copy(),
        var=pd.DataFrame(index=list(genes)),
        layers=layers,
        obsm={"spatial": contract.tile_geometry(sdata, chosen).centers},
    )
    table.obs["n_segments"] = [0 if result.segments is None else len(result.segments.names) for result in results]
    table.obs["n_samples"] = [result.n_samples for result in results]
    table.obs["reason"] = ["no segment on the tile" if result.segments is None else "" for result in results]
    return table
