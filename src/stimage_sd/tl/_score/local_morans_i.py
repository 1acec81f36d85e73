"""Maps of local Moran's I: where predictions and their neighbors are high or low together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats.local_moran import QUADRANTS, LocalMoran
from stimage_sd.stats.local_moran import local_morans_i as local_moran_of
from stimage_sd.stats.spatial import morans_i
from stimage_sd.tl._score.evaluate import dense, transformed
from stimage_sd.tl._score.graphs import Graph, weights_of

Of = Literal["bivariate", "predicted", "observed"]
Correction = Literal["fdr", "none"]
NOT_SIGNIFICANT = "not significant"
#: colors of the categories, as in maps of local Moran's I by GeoDa and splot
_COLORS = ("#d7191c", "#2c7bb6", "#fdae61", "#abd9e9", "#d3d3d3")


def local_morans_i(
    data: SpatialData | contract.Cohort,
    gene: str | Sequence[str],
    *,
    of: Of = "bivariate",
    transform: Literal["log1p", "raw"] = "log1p",
    graph: Graph | None = None,
    level: float = 0.05,
    correction: Correction = "fdr",
    n_permutations: int = 999,
    key: str = contract.PREDICTIONS,
    key_added: str = "local_moran",
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Map local Moran's I: tiles that are high among high neighbors, low among low ones, or unlike them.

    Parameters
    ----------
    data
        A section or a cohort of sections, with tiles.
    gene
        One or several genes.
    of
        ``"bivariate"``: the predicted mean of a tile against the counts of its neighbors. ``"predicted"`` or
        ``"observed"``: predicted means or counts against themselves.
    transform
        ``"log1p"`` of means and counts, or ``"raw"``.
    graph
        Spatial weights between the compared tiles, as in `stimage_sd.tl.evaluate`. With ``of="predicted"`` these are
        all predicted tiles.
    level
        Significance level of the map.
    correction
        ``"fdr"``: tiles are significant at a false discovery rate of `level`, by Benjamini and Hochberg, per section
        and gene. ``"none"``: at a p-value of `level`.
    n_permutations
        Number of permutations. The smallest possible p-value is ``2 / (n_permutations + 1)``.
    key
        Name of the prediction table.
    key_added
        Prefix of the columns to write.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed of the permutations.

    Returns
    -------
    A table with one row per section and gene: ``section``, ``gene``, ``n_tiles``, ``morans_i`` (of the whole map, as in
    `stimage_sd.tl.evaluate`), and the number of tiles in each category: ``high-high``, ``low-low``, ``high-low``,
    ``low-high``, ``not significant``.

    The columns ``local_moran_<gene>`` (the category), ``local_moran_i_<gene>`` (the statistic) and
    ``local_moran_p_<gene>`` (two-sided p-value) are written to ``tables["tiles"].obs``, with colors in ``uns``. Values
    are missing for tiles that are not compared, tiles without neighbors, and constant genes.

    Raises
    ------
    KeyError
        If a section has no predictions or counts, or a gene was not predicted or measured.
    ValueError
        If an option is out of range, or predictions are of nuclei or squares.

    Notes
    -----
    Paper, section 3.2 and figure S2a. Anselin 1995, "Local indicators of spatial association". Equal to
    ``esda.Moran_Local`` and ``esda.Moran_Local_BV``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_local_moran", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> gene = section.tables["counts"].var_names[0]
    >>> table = sti.tl.local_morans_i(section, gene, of="observed")
    >>> section.tables["tiles"].obs[f"local_moran_{gene}"].cat.categories.tolist()
    ['high-high', 'low-low', 'high-low', 'low-high', 'not significant']
    """
    _check(
        of=(of, get_args(Of)), transform=(transform, ("log1p", "raw")), correction=(correction, get_args(Correction))
    )
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` between 0 and 1, found {level}.")
    genes = [gene] if isinstance(gene, str) else list(dict.fromkeys(gene))
    source = contract.Source(table_key, layer)
    made, tables = {}, []
    cohort = contract.sections(data)
    for name, sdata in cohort.items():
        maps = _maps(sdata, genes, of, source, key, section=name)
        values = transformed(maps.values, transform)
        other = None if maps.other is None else transformed(maps.other, transform)
        weights = weights_of(graph, maps.places, section=name)
        found = local_moran_of(values, weights, other, n_permutations=n_permutations, seed=seed)
        columns = _columns(found, genes, key_added, level, correction)
        made[name] = columns.set_axis(maps.instances, axis=0)
        counted = [columns[f"{key_added}_{one}"].value_counts().reindex([*QUADRANTS, NOT_SIGNIFICANT]) for one in genes]
        about = {"section": name, "gene": genes, "n_tiles": len(values), "morans_i": morans_i(values, weights, other)}
        tables.append(pd.concat([pd.DataFrame(about), pd.DataFrame(counted).reset_index(drop=True)], axis=1))
    how: dict[str, Any] = {"of": of, "transform": transform, "level": level, "correction": correction}
    how |= {"n_permutations": n_permutations, "seed": seed}
    for name, sdata in cohort.items():
        _write(sdata, made[name], genes, key_added)
        contract.record(sdata, "tl.local_morans_i", genes=genes, key_added=key_added, **how)
    return pd.concat(tables, ignore_index=True)


def _check(**options: tuple[Any, Sequence[str]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"Expected `{name}` to be one of {list(allowed)}, found {value!r}.")


class _Maps(NamedTuple):
    """Values to map.

    Attributes
    ----------
    values, other
        ``float64 (n_tiles, n_genes)``. `other` has the neighbors' values of the bivariate statistic.
    places
        Centers of the tiles, ``(n_tiles, 2)``.
    instances
        Instance of each tile in the table of tiles.
    """

    values: np.ndarray
    other: np.ndarray | None
    places: np.ndarray
    instances: np.ndarray


def _maps(sdata: SpatialData, genes: list[str], of: Of, source: contract.Source, key: str, *, section: str) -> _Maps:
    tiles = contract.tiles(sdata)
    table = tiles[tiles.obs["keep"].to_numpy()] if of == "observed" else contract.predictions(sdata, key)
    if contract.about_instances(table) is not None:
        raise ValueError(
            f"The predictions {key!r} of section {section!r} are of nuclei or squares. Map those of tiles: "
            "`stimage_sd.tl.predict(sdata, model)`."
        )
    if of != "observed":
        _require(genes, table.var_names, f"were not predicted in section {section!r}")
    rows, counts, exposure = np.arange(table.n_obs), None, None
    if of != "predicted":
        rows, units = contract.align_to_spots(sdata, table, source)
        _require(genes, units.var_names, f"were not measured in section {section!r}")
        counts = dense(units[:, genes])
        exposure = None if of == "observed" else contract.measured_exposure(table, rows, units)
    predicted = None if of == "observed" else contract.at_depth_of(table, rows, genes, exposure).mean
    values = counts if predicted is None else predicted
    assert values is not None
    other = counts if of == "bivariate" else None
    instances = table.obs[contract.INSTANCE_KEY].to_numpy()[rows]
    return _Maps(values, other, contract.places(sdata, table)[rows], instances)


def _require(genes: list[str], known: pd.Index, problem: str) -> None:
    missing = [gene for gene in genes if gene not in known]
    if missing or not genes:
        raise KeyError(
            f"Genes {missing} {problem}. It has {list(known[:5])} and others." if missing else "Expected a gene."
        )


def _columns(found: LocalMoran, genes: list[str], prefix: str, level: float, correction: Correction) -> pd.DataFrame:
    """Return category, statistic and p-value per gene."""
    columns: dict[str, Any] = {}
    names = np.array([*QUADRANTS, NOT_SIGNIFICANT], dtype=object)
    for number, gene in enumerate(genes):
        quadrant, p_value = found.quadrant[:, number], found.p_value[:, number]
        known = quadrant >= 0
        judged = p_value.copy()
        if correction == "fdr" and known.any():
            judged[known] = false_discovery_control(p_value[known])
        category = np.where(judged <= level, quadrant, len(QUADRANTS))
        labels = names[category]
        labels[~known] = None
        columns[f"{prefix}_{gene}"] = pd.Categorical(labels, categories=list(names))
        columns[f"{prefix}_i_{gene}"] = found.statistic[:, number]
        columns[f"{prefix}_p_{gene}"] = p_value
    return pd.DataFrame(columns)


def _write(sdata: SpatialData, columns: pd.DataFrame, genes: list[str], prefix: str) -> None:
    table: ad.AnnData = contract.tiles(sdata)
    placed = columns.reindex(table.obs[contract.INSTANCE_KEY])
    for name in placed:
        table.obs[name] = placed[name].array
    for gene in genes:
        table.uns[f"{prefix}_{gene}_colors"] = list(_COLORS)
