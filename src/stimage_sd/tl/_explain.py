"""Which nuclei a prediction rests on: LIME, over the nuclei of a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any, Literal, get_args

import numpy as np
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stimage_sd import contract
from stimage_sd.models._extractors import Extractor
from stimage_sd.models._stand_ins import Explainable, StandIns
from stimage_sd.nn import lime
from stimage_sd.tl._explained import TileResult, top_tiles, write_results
from stimage_sd.tl._segments import (
    Segments,
    SegmentTile,
    background_color,
    check_segments,
    present,
    segment_tile,
)
from stimage_sd.tl._tile_views import OpenedTiles, Views, embed_blocks, open_tiles

Of = Literal["mean", "epistemic", "aleatoric", "total_variance"]
HideColor = int | tuple[int, int, int] | Literal["background"] | None
#: perturbed tiles that the heads are given at a time
_HEADS = 256
#: by how much embeddings of a tile may differ from those that are stored, as a share of the largest
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class _Options:
    of: tuple[str, ...]
    columns: np.ndarray
    n_samples: int
    seeds: tuple[int, ...]
    segments: str | SegmentTile
    hide_color: HideColor


def explain(
    data: SpatialData | contract.Cohort,
    model: Explainable,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    method: Literal["lime"] = "lime",
    of: Of | Sequence[Of] = "mean",
    n_samples: int = 1000,
    segments: str | SegmentTile = "nuclei",
    hide_color: HideColor = "background",
    n_seeds: int = 1,
    seed: int = 0,
    shapes_key: str | None = None,
    extractors: Sequence[Extractor] = (),
    n_workers: int | None = None,
) -> None:
    """Score nuclei by how much of a prediction they carry, by LIME.

    Copies of a tile in which random nuclei are hidden are predicted, and a linear model of which nuclei they show is
    fitted to the predictions. One set of perturbed tiles serves all genes, and mean and uncertainty alike.

    A model sees a tile in several fields of view: a nucleus of the tile is hidden in all that show it. The tissue
    around the tile stays as it is, and so do the neighbours' embeddings (context) and the mean and deviation that the
    section is standardised by, which are the stored ones. The tile with nothing hidden has the prediction of
    `stimage_sd.tl.predict` (without measured size factors).

    Parameters
    ----------
    data
        A section, or a cohort of them, as the model expects them (`stimage_sd.tl.predict`), with nuclei.
    model
        A model of counts, a classifier of genes (its probability of High is the mean), or a fine-tuned model.
    gene
        One gene, or several.
    tiles
        ``obs["instance_id"]`` of the tiles to explain, for a cohort by name of the section; by default the five with
        the highest prediction of each gene.
    method
        ``"lime"``. The second opinion is `stimage_sd.tl.saliency`.
    of
        What is explained, one or several: the ``"mean"``, or the ``"epistemic"``, ``"aleatoric"`` or
        ``"total_variance"``: which nuclei make the model unsure.
    n_samples
        Perturbed tiles, the tile itself among them.
    segments
        ``"nuclei"``; ``"slic"`` (superpixels); the name of labels (0: background); or a function from a tile,
        ``uint8 (y, x, 3)``, to its segments, ``int (y, x)``, 0 for background. The background is one segment.
    hide_color
        What hidden segments look like: ``"background"`` (the mean colour of the tile's background), a grey level or a
        colour (black, 0, as published), or `None` (each segment's mean).
    n_seeds
        Explanations by as many seeds, from `seed` on; scores are their mean.
    seed
        Seed of the perturbations.
    shapes_key
        Name of the nuclei's shapes; ``"nuclei"`` by default.
    extractors
        Extractors that the model's embeddings were made by, where they are not the registered ones.
    n_workers
        Threads; all cores by default. Results do not depend on it.

    Returns
    -------
    Nothing. ``shapes["nuclei_explained"]`` is written, or ``"segments_explained"`` for segments of another kind, in
    place of an earlier one: the polygons of each explained tile's nuclei, with the columns that they have among the
    nuclei, ``tile`` (`instance_id`), ``nucleus`` (index among the nuclei), ``area_px``, ``area_um2`` where the
    resolution is known, ``lime_<gene>`` (in units of the prediction; ``lime_<gene>_<of>`` but for the mean), and with
    several seeds ``lime_<gene>_sd``. ``tables["explanations"]`` is written, explained tiles x genes: ``X`` and layer
    ``prediction`` = prediction of the tile; layers ``r2`` of the linear model, ``stability`` = mean correlation of the
    nuclei's scores between seeds, or, of one seed, between its even and its odd samples, ``background`` = the
    background's score, ``intercept``; each ``..._<of>`` but for the mean; ``obs["n_segments"]``, and ``obs["reason"]``
    for a tile that could not be explained.

    Raises
    ------
    KeyError
        If the section lacks a step, nuclei or the image that it was embedded from; or has no such tile or gene.
    TypeError
        If the model does not predict by a tile's embeddings.
    ValueError
        If options or the section are not as expected, or no tile has a segment.

    Notes
    -----
    Paper, section 2.5; Ribeiro et al. 2016. For one field of view, scores are those of the package `lime`'s
    ``LimeImageExplainer(random_state=seed).explain_instance(..., hide_color=hide_color)`` over the same segments.

    Examples
    --------
    >>> import numpy as np, shapely, stimage_sd as sti
    >>> from geopandas import GeoDataFrame
    >>> path = sti.datasets.synthetic_visium("bundle_explain", n_spots=30, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,), context_rings=0)
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> x, y = section.tables["tiles"].obsm["spatial"][0]
    >>> discs = shapely.points([x - 20, x, x + 20], [y, y + 15, y - 9]).tolist()
    >>> nuclei = GeoDataFrame(geometry=[disc.buffer(6) for disc in discs])
    >>> section.shapes["nuclei"] = sti.contract.build_shapes(nuclei, mpp=None)
    >>> sti.tl.explain(section, model, model.genes[0], tiles=[0], n_samples=50)
    >>> len(section.shapes["nuclei_explained"])
    3
    """
    options = _options(model, gene, of, n_samples, n_seeds, seed, segments, hide_color)
    if method != "lime":
        raise ValueError(f'Expected `method` "lime", found {method!r}. For gradients, see `stimage_sd.tl.saliency`.')
    genes = [gene] if isinstance(gene, str) else list(gene)
    cohort = contract.sections(data)
    # all are checked before any is explained
    nuclei = {name: check_segments(sdata, segments, shapes_key) for name, sdata in cohort.items()}
    opened = {
        name: open_tiles(sdata, model, tiles_of(tiles, sdata, name, genes), section=name, extractors=extractors)
        for name, sdata in cohort.items()
    }
    for name, section in opened.items():
        _check_of(options.of, section.stand_ins)
        results = []
        bar = tqdm(section.read(), total=len(section.rows), desc=f"{name}: explaining", unit="tile")
        with ThreadPoolExecutor(n_workers or cpu_count()) as pool:
            for (row, views, area), tile in zip(bar, section.tiles, strict=True):
                found = segment_tile(section.sdata, area, segments, nuclei[name])
                result = TileResult(int(tile), found)
                results.append(result if found is None else _explained(section, row, views, result, options, pool))
        write_results(section.sdata, results, genes=genes, of=options.of, nuclei=nuclei[name], prefix="lime")
        contract.record(
            section.sdata, "tl.explain", genes=genes, of=options.of, n_samples=n_samples, n_seeds=n_seeds, seed=seed,
            segments=segments if isinstance(segments, str) else "function", hide_color=hide_color,
        )  # fmt: skip


def tiles_of(
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None, sdata: SpatialData, name: str, genes: Sequence[str]
) -> list[int]:
    """Which tiles of a section are explained."""
    if tiles is None:
        return list(dict.fromkeys(tile for gene in genes for tile in top_tiles(sdata, gene)))
    if isinstance(tiles, Mapping):
        if name not in tiles:
            raise KeyError(f"Expected `tiles` of section {name!r}, found those of {sorted(tiles)}.")
        tiles = tiles[name]
    return [int(tile) for tile in tiles]


def gene_columns(model: Explainable, gene: str | Sequence[str]) -> np.ndarray:
    """Numbers of genes among a model's, ``int (n_genes,)``."""
    genes = [gene] if isinstance(gene, str) else list(gene)
    place = {name: number for number, name in enumerate(model.genes)}
    unknown = [name for name in genes if name not in place]
    if unknown or not genes or len(set(genes)) < len(genes):
        raise KeyError(f"Expected different genes of the model, such as {list(model.genes[:3])}, found {genes[:5]}.")
    return np.array([place[name] for name in genes])


def _options(
    model: Explainable, gene: str | Sequence[str], of: Of | Sequence[Of], n_samples: int, n_seeds: int, seed: int,
    segments: str | SegmentTile, hide_color: HideColor,
) -> _Options:  # fmt: skip
    names = (of,) if isinstance(of, str) else tuple(of)
    if not names or any(name not in get_args(Of) for name in names):
        raise ValueError(f"Expected `of` among {get_args(Of)}, found {of!r}.")
    if n_samples < 10 or n_seeds < 1:
        raise ValueError(f"Expected at least 10 samples and one seed, found {n_samples} and {n_seeds}.")
    if isinstance(hide_color, str) and hide_color != "background":
        raise ValueError(
            f'Expected `hide_color` to be a grey level, a colour, "background" or None, found {hide_color!r}.'
        )
    columns = gene_columns(model, gene) if isinstance(model, Explainable) else np.zeros(0, int)
    return _Options(names, columns, n_samples, tuple(range(seed, seed + n_seeds)), segments, hide_color)


def _check_of(of: Sequence[str], stand_ins: StandIns) -> None:
    missing = [name for name in of if name not in stand_ins.names]
    if missing:
        raise ValueError(
            f"The model predicts {list(stand_ins.names)} alone; `of={missing[0]!r}` has no meaning for it."
        )


def _explained(
    section: OpenedTiles, row: int, views: Sequence[Views], result: TileResult, options: _Options, pool: Executor
) -> TileResult:
    """Explain one tile."""
    found = result.segments
    assert found is not None
    n_segments = len(found.numbers)
    shown = np.stack([lime.perturbations(options.n_samples, n_segments, seed=seed) for seed in options.seeds])
    own = _embeddings(section, views, found, shown.reshape(-1, n_segments), options.hide_color, pool)
    _check_embeddings(section, row, own)
    outputs = _outputs(section.stand_ins, row, own, options)
    by_seed = outputs.reshape(len(shown), options.n_samples, -1)
    surrogates = [lime.fit_surrogate(*pair) for pair in zip(shown, by_seed, strict=True)]
    weights = np.stack([surrogate.weights for surrogate in surrogates])
    first = int(found.has_background)
    if len(shown) > 1:
        stability = lime.agreement(weights[:, first:])
    else:
        stability = lime.agreement(np.stack([_half(shown[0], by_seed[0], start) for start in (1, 2)])[:, first:])
    return replace(
        result,
        prediction=outputs[0],
        scores=weights.mean(axis=0)[first:],
        deviations=weights.std(axis=0)[first:] if len(shown) > 1 else None,
        about={
            "r2": np.mean([surrogate.scores for surrogate in surrogates], axis=0),
            "stability": stability,
            "background": weights.mean(axis=0)[0] if first else np.full(weights.shape[2], np.nan),
            "intercept": np.mean([surrogate.intercepts for surrogate in surrogates], axis=0),
        },
    )


def _half(shown: np.ndarray, outputs: np.ndarray, start: int) -> np.ndarray:
    """Scores by every other sample, and the tile itself."""
    rows = np.concatenate([[0], np.arange(start, len(shown), 2)])
    return lime.fit_surrogate(shown[rows], outputs[rows]).weights


def _embeddings(
    section: OpenedTiles,
    views: Sequence[Views],
    found: Segments,
    shown: np.ndarray,
    hide_color: HideColor,
    pool: Executor,
) -> list[np.ndarray]:
    """Embeddings of all perturbed tiles by each extractor, ``float32 (n_samples, n_fields * n_features)``."""
    known: dict[Any, np.ndarray] = {}
    together = []
    for stored, extractor, one in zip(section.stand_ins.embedded, section.extractors, views, strict=True):
        key = (extractor.name, extractor.weights_hash, stored.tiles.fields_of_view, stored.tiles.input_px, stored.image)
        if key not in known:
            seen = np.stack([found.seen_at(positions) for positions in one.positions])
            color = background_color(one.pixels, seen) if hide_color == "background" else hide_color
            hidden = lime.hidden_image(one.pixels, seen, color)
            fields = [_of_field(extractor, *each, shown, pool) for each in zip(one.pixels, hidden, seen, strict=True)]
            known[key] = np.concatenate(fields, axis=1)
        together.append(known[key])
    return together


def _of_field(
    extractor: Extractor,
    pixels: np.ndarray,
    hidden: np.ndarray,
    segments: np.ndarray,
    shown: np.ndarray,
    pool: Executor,
) -> np.ndarray:
    """Embeddings of one field of view of all perturbed tiles; those that look alike are embedded once."""
    numbers = present(segments)
    distinct, which = np.unique(shown[:, numbers], axis=0, return_inverse=True)
    # only what this field of view shows, numbered anew
    renumbered = np.where(segments >= 0, np.searchsorted(numbers, segments), -1)

    def build(start: int, stop: int) -> np.ndarray:
        return lime.perturbed_images(pixels, hidden, renumbered, distinct[start:stop])

    return embed_blocks(extractor, build, len(distinct), pool)[which.ravel()]


def _outputs(stand_ins: StandIns, row: int, own: Sequence[np.ndarray], options: _Options) -> np.ndarray:
    """Predictions of all perturbed tiles, ``float64 (n_samples, n_of * n_genes)``."""
    blocks = []
    for start in range(0, len(own[0]), _HEADS):
        block = [values[start : start + _HEADS] for values in own]
        n = len(block[0])
        # filled up, so that the heads are compiled once
        filled = [np.concatenate([values, np.repeat(values[-1:], _HEADS - n, axis=0)]) for values in block]
        found = stand_ins.outputs(row, filled, options.columns)
        blocks.append(np.concatenate([np.asarray(found[name])[:n] for name in options.of], axis=1))
    return np.concatenate(blocks).astype(np.float64)


def _check_embeddings(section: OpenedTiles, row: int, own: Sequence[np.ndarray]) -> None:
    """Raise `ValueError` where the tile with nothing hidden is not embedded as it was."""
    for stored, values in zip(section.stand_ins.embedded, own, strict=True):
        expected = stored.own[row]
        difference = np.abs(values[0] - expected).max() / max(np.abs(expected).max(), 1e-12)
        if difference > _TOLERANCE:
            raise ValueError(
                f"The stored embeddings by {stored.tiles.extractor!r} are not those of the image {stored.image!r} as "
                f"it is now (they differ by {difference:.1%} of the largest). Run `stimage_sd.pp.embed` again."
            )
