"""Gradient-based explanations of predictions, by pixel and by nucleus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._progress import tqdm
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._resolve import as_model
from stimage_sd.models._stand_ins import Explainable
from stimage_sd.nn.saliency import Differentiable, grad_cam, integrated_gradients
from stimage_sd.tl._explain.explain import gene_columns, tiles_of
from stimage_sd.tl._explain.explained import TileResult, explained_frame
from stimage_sd.tl._explain.segments import Segments, check_segments, segment_tile
from stimage_sd.tl._explain.tile_views import OpenedTiles, Views, open_tiles, pooled_shift

Method = Literal["integrated_gradients", "grad_cam"]


def saliency(
    data: SpatialData | contract.Cohort,
    model: Explainable | str | Path,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    method: Method = "integrated_gradients",
    baseline: int | tuple[int, int, int] = 255,
    n_steps: int = 16,
    extractors: Sequence[Extractor] = (),
    shapes_key: str | None = None,
) -> dict[str, dict[int, np.ndarray]]:
    """Score the contribution of nuclei to a prediction by the gradients of their pixels.

    Parameters
    ----------
    data
        A section or a cohort, as in `stimage_sd.tl.explain`.
    model
        A model whose extractors are Flax modules, or the path of one.
    gene
        One or several genes.
    tiles
        As in `stimage_sd.tl.explain`.
    method
        ``"integrated_gradients"`` integrates the gradients from the baseline to the tile. ``"grad_cam"`` is coarser
        and does not resolve neighboring nuclei.
    baseline
        Gray level or color of an empty tile. Default: white, as glass.
    n_steps
        Number of steps from baseline to tile, for integrated gradients.
    extractors
        As in `stimage_sd.tl.explain`.
    shapes_key
        Name of the nuclei's shapes. Default: ``"nuclei"``.

    Returns
    -------
    Pixel maps in the smallest field of view, ``float32 (n_genes, y, x)``, keyed by section and tile. Column
    ``saliency_<gene>`` of ``shapes["nuclei_explained"]`` is written. It is the sum (integrated gradients) or mean
    (Grad-CAM) of the maps of all fields of view over the nucleus. Nuclei that `explain` has written keep their other
    columns. Other nuclei are added. The maps are also written as images ``saliency_<tile>`` with one channel per gene,
    placed on the tile. They replace the maps of an earlier call. `stimage_sd.pl.saliency` draws them.

    Raises
    ------
    KeyError
        If the section lacks a step, nuclei or the embedded image, or has no such tile or gene.
    TypeError
        If the model does not predict from a tile's embeddings, or an extractor is not a Flax module.
    ValueError
        If options or the section are not as expected.

    Notes
    -----
    Integrated gradients of all fields of view add up to the prediction of the tile minus that of the baseline.
    Grad-CAM weighs the feature map that enters the last part of the network.

    Examples
    --------
    >>> import numpy as np, shapely, stimage_sd as sti
    >>> from geopandas import GeoDataFrame
    >>> path = sti.datasets.synthetic_visium("bundle_saliency", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,), context_rings=0)
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> x, y = section.tables["tiles"].obsm["spatial"][0]
    >>> nuclei = GeoDataFrame(geometry=[shapely.Point(x, y).buffer(8)])
    >>> section.shapes["nuclei"] = sti.contract.build_shapes(nuclei, mpp=None)
    >>> maps = sti.tl.saliency(section, model, model.genes[0], tiles=[0], n_steps=2)
    >>> maps["bundle_saliency"][0].shape
    (1, 299, 299)
    """
    if method not in ("integrated_gradients", "grad_cam"):
        raise ValueError(f'Expected `method` "integrated_gradients" or "grad_cam", found {method!r}.')
    model = as_model(model)
    genes = [gene] if isinstance(gene, str) else list(gene)
    cohort = contract.sections(data)
    nuclei = {name: check_segments(sdata, "nuclei", shapes_key) for name, sdata in cohort.items()}
    opened = {
        name: open_tiles(sdata, model, tiles_of(tiles, sdata, name, genes), section=name, extractors=extractors)
        for name, sdata in cohort.items()
    }
    columns = gene_columns(model, gene)
    maps: dict[str, dict[int, np.ndarray]] = {}
    for name, section in opened.items():
        networks = [Differentiable(one.module(), one.normalize) for one in section.extractors]
        results, maps[name], placed = [], {}, {}
        bar = tqdm(section.read(), total=len(section.rows), desc=f"{name}: gradients", unit="tile")
        for (row, views, area), tile in zip(bar, section.tiles, strict=True):
            every = _maps(section, networks, row, views, columns, method, baseline, n_steps)
            maps[name][int(tile)] = _of_area(every, views, area.pixels)
            left, top, right, bottom = area.box
            extent = (left, right, bottom, top)
            placed[int(tile)] = contract.TileMap(tuple(genes), maps[name][int(tile)], extent)
            segmented = segment_tile(section.sdata, area, "nuclei", nuclei[name])
            scores = None if segmented is None else _by_nucleus(every, views, segmented, mean=method == "grad_cam")
            results.append(TileResult(int(tile), segmented, scores=scores))
        _join(section.sdata, results, genes, nuclei[name])
        contract.write_tile_maps(section.sdata, placed)
        contract.record(section.sdata, "tl.saliency", genes=genes, method=method, baseline=baseline, n_steps=n_steps)
    return maps


def _maps(
    section: OpenedTiles,
    networks: Sequence[Differentiable],
    row: int,
    views: Sequence[Views],
    columns: np.ndarray,
    method: Method,
    baseline: int | tuple[int, int, int],
    n_steps: int,
) -> list[np.ndarray]:
    """Compute the maps of all fields of view for each extractor, ``float32 (n_genes, n_fields, y, x)``."""
    pixels = [one.pixels for one in views]
    shifts = [
        pooled_shift(stored, row, np.asarray(network.embed(one)).ravel())
        if stored.tiles.wide_fields == "pooled"
        else 0.0
        for stored, network, one in zip(section.stand_ins.embedded, networks, pixels, strict=True)
    ]

    def predict(embeddings: Sequence[np.ndarray]) -> np.ndarray:
        shifted = [values + shift for values, shift in zip(embeddings, shifts, strict=True)]
        return section.stand_ins.outputs(row, shifted, columns)["mean"]

    if method == "grad_cam":
        return grad_cam(networks, pixels, predict)
    empty = [np.asarray(baseline, np.float32)] * len(pixels)
    return integrated_gradients(networks, pixels, predict, baseline=empty, n_steps=n_steps)


def _of_area(maps: Sequence[np.ndarray], views: Sequence[Views], pixels: np.ndarray) -> np.ndarray:
    """Sum the maps of the explained square over all extractors that have this field of view."""
    seen = [
        scores[:, index]
        for scores, one in zip(maps, views, strict=True)
        for index, field in enumerate(one.pixels)
        if field.shape == pixels.shape and np.array_equal(field, pixels)
    ]
    return np.sum(seen, axis=0)


def _by_nucleus(maps: Sequence[np.ndarray], views: Sequence[Views], cut: Segments, *, mean: bool) -> np.ndarray:
    """Sum or average the maps over the pixels of each nucleus, ``float64 (n_nuclei, n_genes)``."""
    n_segments, n_genes = len(cut.numbers), maps[0].shape[0]
    sums, counts = np.zeros((n_segments, n_genes)), np.zeros(n_segments)
    for pixel_scores, one in zip(maps, views, strict=True):
        for index, positions in enumerate(one.positions):
            seen = cut.seen_at(positions)
            inside = seen >= 0
            counts += np.bincount(seen[inside], minlength=n_segments)
            for gene in range(n_genes):
                sums[:, gene] += np.bincount(seen[inside], pixel_scores[gene, index][inside], minlength=n_segments)
    scores = sums / counts[:, None] if mean else sums
    return scores[int(cut.has_background) :]


def _join(sdata: SpatialData, results: Sequence[TileResult], genes: Sequence[str], nuclei: Any) -> None:
    """Add the scores to nuclei that are explained already, and append the other nuclei."""
    import geopandas

    if all(result.segments is None for result in results):
        raise ValueError(
            f"None of the {len(results)} tiles of section {contract.sample(sdata)!r} has a nucleus. Nothing was "
            "written. Choose other tiles."
        )
    new = explained_frame(sdata, results, genes=genes, of=("mean",), nuclei=nuclei, prefix="saliency")
    if contract.NUCLEI_EXPLAINED in sdata.shapes:
        old = geopandas.GeoDataFrame(contract.explained(sdata)).reset_index(drop=True)
        columns = [f"saliency_{gene}" for gene in genes]
        old = old.drop(columns=[name for name in columns if name in old])
        keys = ["tile", "nucleus"]
        beside = old.merge(pd.DataFrame(new[[*keys, *columns]]), on=keys, how="left")
        known = pd.MultiIndex.from_frame(pd.DataFrame(old[keys]))
        others = new[~pd.MultiIndex.from_frame(pd.DataFrame(new[keys])).isin(known)]
        new = geopandas.GeoDataFrame(pd.concat([beside, others], ignore_index=True), geometry="geometry")
    contract.write_explained(sdata, new)
