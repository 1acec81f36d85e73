"""Which pixels, and so which nuclei, a prediction rests on by its gradients: the second opinion beside LIME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stimage_sd import contract
from stimage_sd.models._extractors import Extractor
from stimage_sd.models._stand_ins import Explainable
from stimage_sd.nn.saliency import Differentiable, grad_cam, integrated_gradients
from stimage_sd.tl._explain import gene_columns, tiles_of
from stimage_sd.tl._explained import TileResult, explained_frame
from stimage_sd.tl._segments import Segments, check_segments, segment_tile
from stimage_sd.tl._tile_views import OpenedTiles, Views, open_tiles

Method = Literal["integrated_gradients", "grad_cam"]


def saliency(
    data: SpatialData | contract.Cohort,
    model: Explainable,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    method: Method = "integrated_gradients",
    baseline: int | tuple[int, int, int] = 255,
    n_steps: int = 16,
    shapes_key: str | None = None,
    extractors: Sequence[Extractor] = (),
) -> dict[str, dict[int, np.ndarray]]:
    """Score nuclei by how much of a prediction the gradients of their pixels carry.

    Parameters
    ----------
    data
        A section, or a cohort of them, as in `stimage_sd.tl.explain`.
    model
        A model whose extractors are Flax modules.
    gene
        One gene, or several.
    tiles
        As in `stimage_sd.tl.explain`.
    method
        ``"integrated_gradients"``: what the pixels add on the way from the baseline to the tile; or ``"grad_cam"``,
        which is coarse, and tells no nucleus from its neighbour.
    baseline
        Grey level or colour of a tile without content: white by default, as glass is.
    n_steps
        Gradients along the way, for integrated gradients.
    shapes_key
        Name of the nuclei's shapes; ``"nuclei"`` by default.
    extractors
        As in `stimage_sd.tl.explain`.

    Returns
    -------
    By section and tile the map of its pixels in the smallest field of view, ``float32 (n_genes, y, x)``. Column
    ``saliency_<gene>`` of ``shapes["nuclei_explained"]`` is written: the map, of every field of view, summed over the
    nucleus (integrated gradients), or its mean over the nucleus (Grad-CAM). Nuclei of tiles that `explain` explained
    keep their other columns; those of other tiles are added.

    Raises
    ------
    KeyError
        If the section lacks a step, nuclei or the image that it was embedded from; or has no such tile or gene.
    TypeError
        If the model does not predict by a tile's embeddings, or an extractor is no Flax module.
    ValueError
        If options or the section are not as expected.

    Notes
    -----
    Integrated gradients of all fields of view add up to the difference between the predictions of the tile and of the
    baseline. Grad-CAM weighs the map that the last part of the network gets.

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
        networks = [Differentiable(one.module(), one.normalise) for one in section.extractors]
        results, maps[name] = [], {}
        bar = tqdm(section.read(), total=len(section.rows), desc=f"{name}: gradients", unit="tile")
        for (row, views, area), tile in zip(bar, section.tiles, strict=True):
            every = _maps(section, networks, row, views, columns, method, baseline, n_steps)
            maps[name][int(tile)] = _of_area(every, views, area.pixels)
            found = segment_tile(section.sdata, area, "nuclei", nuclei[name])
            scores = None if found is None else _by_nucleus(every, views, found, mean=method == "grad_cam")
            results.append(TileResult(int(tile), found, scores=scores))
        _join(section.sdata, results, genes, nuclei[name])
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
    """Map of every field of view of each extractor, ``float32 (n_genes, n_fields, y, x)``."""

    def predict(own: Sequence[np.ndarray]) -> np.ndarray:
        return section.stand_ins.outputs(row, own, columns)["mean"]

    pixels = [one.pixels for one in views]
    if method == "grad_cam":
        return grad_cam(networks, pixels, predict)
    empty = [np.asarray(baseline, np.float32)] * len(pixels)
    return integrated_gradients(networks, pixels, predict, baseline=empty, n_steps=n_steps)


def _of_area(maps: Sequence[np.ndarray], views: Sequence[Views], pixels: np.ndarray) -> np.ndarray:
    """The map of the explained square, which is one of the fields of view; of all extractors that see it."""
    seen = [
        each[:, number]
        for each, one in zip(maps, views, strict=True)
        for number, field in enumerate(one.pixels)
        if field.shape == pixels.shape and np.array_equal(field, pixels)
    ]
    return np.sum(seen, axis=0)


def _by_nucleus(maps: Sequence[np.ndarray], views: Sequence[Views], found: Segments, *, mean: bool) -> np.ndarray:
    """Sum, or mean, over the pixels of each nucleus, ``float64 (n_nuclei, n_genes)``."""
    n_segments, n_genes = len(found.numbers), maps[0].shape[0]
    sums, counts = np.zeros((n_segments, n_genes)), np.zeros(n_segments)
    for each, one in zip(maps, views, strict=True):
        for number, positions in enumerate(one.positions):
            seen = found.seen_at(positions)
            inside = seen >= 0
            counts += np.bincount(seen[inside], minlength=n_segments)
            for gene in range(n_genes):
                sums[:, gene] += np.bincount(seen[inside], each[gene, number][inside], minlength=n_segments)
    scores = sums / counts[:, None] if mean else sums
    return scores[int(found.has_background) :]


def _join(sdata: SpatialData, results: Sequence[TileResult], genes: Sequence[str], nuclei: Any) -> None:
    """Put the scores beside those of nuclei that are explained already, and add the others."""
    import geopandas

    if all(result.segments is None for result in results):
        raise ValueError(
            f"None of the {len(results)} tiles of section {contract.sample(sdata)!r} has a nucleus, so nothing was "
            "written. Choose other tiles."
        )
    new = explained_frame(sdata, results, genes=genes, of=("mean",), nuclei=nuclei, prefix="saliency")
    if contract.NUCLEI_EXPLAINED in sdata.shapes:
        old = geopandas.GeoDataFrame(sdata.shapes[contract.NUCLEI_EXPLAINED]).reset_index(drop=True)
        columns = [f"saliency_{gene}" for gene in genes]
        old = old.drop(columns=[name for name in columns if name in old])
        keys = ["tile", "nucleus"]
        beside = old.merge(pd.DataFrame(new[[*keys, *columns]]), on=keys, how="left")
        known = pd.MultiIndex.from_frame(pd.DataFrame(old[keys]))
        others = new[~pd.MultiIndex.from_frame(pd.DataFrame(new[keys])).isin(known)]
        new = geopandas.GeoDataFrame(pd.concat([beside, others], ignore_index=True), geometry="geometry")
    contract.write_explained(sdata, new)
