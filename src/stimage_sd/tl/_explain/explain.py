"""LIME over the nuclei of a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._progress import tqdm
from stimage_sd._settings import n_threads
from stimage_sd.image import lime
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._resolve import as_model
from stimage_sd.models._stand_ins import Explainable, StandIns
from stimage_sd.tl._explain.explained import TileResult, top_tiles, write_results
from stimage_sd.tl._explain.segments import (
    Segments,
    SegmentTile,
    background_color,
    check_segments,
    present,
    segment_tile,
)
from stimage_sd.tl._explain.tile_views import OpenedTiles, Views, embed_blocks, open_tiles

Of = Literal["mean", "epistemic", "aleatoric", "total_variance"]
HideColor = int | tuple[int, int, int] | Literal["background"] | None
#: perturbed tiles per call of the heads
_HEADS = 256
#: allowed difference between new and stored embeddings of a tile, as a fraction of the largest stored value
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
    model: Explainable | str | Path,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    method: Literal["lime"] = "lime",
    of: Of | Sequence[Of] = "mean",
    n_samples: int = 1000,
    segments: str | SegmentTile = "nuclei",
    hide_color: HideColor = "background",
    n_seeds: int = 1,
    extractors: Sequence[Extractor] = (),
    shapes_key: str | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> None:
    """Score the contribution of each nucleus to a prediction with LIME.

    The model predicts copies of a tile with random nuclei hidden. A linear model of the visible nuclei is then fitted
    to these predictions. One set of perturbed tiles serves all genes and both mean and uncertainty.

    A nucleus is hidden in every field of view that shows it. The tissue around the tile is unchanged. The neighbors'
    embeddings (context) and the section's mean and standard deviation are the stored ones. The unperturbed tile gets
    the same prediction as from `stimage_sd.tl.predict` (without measured size factors).

    Parameters
    ----------
    data
        A section or a cohort with nuclei, otherwise as for `stimage_sd.tl.predict`.
    model
        A fitted model, or the path of one: a count model, a gene classifier (its mean is the probability of High) or a
        fine-tuned model.
    gene
        One or several genes.
    tiles
        ``obs["instance_id"]`` of the tiles to explain. For a cohort, a mapping from section name to tiles. By default
        the five tiles with the highest prediction of each gene.
    method
        ``"lime"``. For gradients, see `stimage_sd.tl.saliency`.
    of
        One or several outputs to explain: ``"mean"``, ``"epistemic"``, ``"aleatoric"`` or ``"total_variance"``. The
        variances show the nuclei that make the model uncertain.
    n_samples
        Number of perturbed tiles, including the unperturbed tile.
    segments
        ``"nuclei"``, ``"slic"`` (superpixels), the name of labels (0 is background), or a function. The function takes
        a tile, ``uint8 (y, x, 3)``, and returns segments, ``int (y, x)``, 0 for background. The background is one
        segment.
    hide_color
        Color of hidden segments: ``"background"`` (the mean color of the tile's background), a gray level, a color, or
        `None` (each segment's mean). The published color is black (0).
    n_seeds
        Number of explanations with different seeds, starting at `seed`. Scores are the mean over seeds.
    extractors
        Extractors of the model's embeddings, where they are not registered.
    shapes_key
        Name of the nuclei's shapes. Default: ``"nuclei"``.
    n_jobs
        Number of threads. Default: all cores. Results do not depend on the number of threads.
    seed
        Seed of the perturbations.

    Returns
    -------
    Nothing. Two elements are written and replace earlier ones.

    ``shapes["nuclei_explained"]`` (``"segments_explained"`` for segments other than nuclei) holds the polygons of the
    nuclei on explained tiles. Columns: those of the nuclei, ``tile`` (`instance_id`), ``nucleus`` (index of the
    nucleus), ``area_px``, ``area_um2`` where the resolution is known, ``lime_<gene>`` (in units of the prediction), and
    ``lime_<gene>_sd`` with several seeds. Outputs other than the mean are named ``lime_<gene>_<of>``.

    ``tables["explanations"]`` holds explained tiles x genes. ``X`` and layer ``prediction`` are the prediction of the
    tile. Layer ``r2`` is R² of the linear model, ``background`` is the score of the background, ``intercept`` is the
    intercept. Layer ``stability`` is the mean correlation of the nuclei's scores between seeds. With one seed,
    ``stability`` compares even and odd samples. Layers of outputs other than the mean end in ``_<of>``.
    ``obs["n_segments"]`` is the number of segments, and ``obs["reason"]`` says why a tile was not explained.

    Raises
    ------
    KeyError
        If the section lacks a step, nuclei or the embedded image, or has no such tile or gene.
    TypeError
        If the model does not predict from a tile's embeddings.
    ValueError
        If options or the section are not as expected, or no tile has a segment.

    Notes
    -----
    Paper, section 2.5; Ribeiro et al. 2016. With one field of view, scores equal those of the package `lime`,
    ``LimeImageExplainer(random_state=seed).explain_instance(..., hide_color=hide_color)``, over the same segments.

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
    model = as_model(model)
    options = _options(model, gene, of, n_samples, n_seeds, seed, segments, hide_color)
    if method != "lime":
        raise ValueError(f'Expected `method` "lime", found {method!r}. For gradients, see `stimage_sd.tl.saliency`.')
    genes = [gene] if isinstance(gene, str) else list(gene)
    cohort = contract.sections(data)
    # check all sections before the slow part starts
    nuclei = {name: check_segments(sdata, segments, shapes_key) for name, sdata in cohort.items()}
    opened = {
        name: open_tiles(sdata, model, tiles_of(tiles, sdata, name, genes), section=name, extractors=extractors)
        for name, sdata in cohort.items()
    }
    for name, section in opened.items():
        _check_of(options.of, section.stand_ins)
        results = []
        bar = tqdm(section.read(), total=len(section.rows), desc=f"{name}: explaining", unit="tile")
        with ThreadPoolExecutor(n_threads(n_jobs)) as pool:
            for (row, views, area), tile in zip(bar, section.tiles, strict=True):
                segmented = segment_tile(section.sdata, area, segments, nuclei[name])
                result = TileResult(int(tile), segmented)
                results.append(result if segmented is None else _explained(section, row, views, result, options, pool))
        write_results(section.sdata, results, genes=genes, of=options.of, nuclei=nuclei[name], prefix="lime")
        contract.record(
            section.sdata, "tl.explain", genes=genes, of=options.of, n_samples=n_samples, n_seeds=n_seeds, seed=seed,
            segments=segments if isinstance(segments, str) else "function", hide_color=hide_color,
        )  # fmt: skip


def tiles_of(
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None, sdata: SpatialData, name: str, genes: Sequence[str]
) -> list[int]:
    """Return the tiles of a section to explain."""
    if tiles is None:
        return list(dict.fromkeys(tile for gene in genes for tile in top_tiles(sdata, gene)))
    if isinstance(tiles, Mapping):
        if name not in tiles:
            raise KeyError(f"Expected `tiles` of section {name!r}, found those of {sorted(tiles)}.")
        tiles = tiles[name]
    return [int(tile) for tile in tiles]


def gene_columns(model: Explainable, gene: str | Sequence[str]) -> np.ndarray:
    """Return the columns of genes in a model's output, ``int (n_genes,)``."""
    genes = [gene] if isinstance(gene, str) else list(gene)
    place = {name: column for column, name in enumerate(model.genes)}
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
            f'Expected `hide_color` to be a gray level, a color, "background" or None, found {hide_color!r}.'
        )
    columns = gene_columns(model, gene) if isinstance(model, Explainable) else np.zeros(0, int)
    return _Options(names, columns, n_samples, tuple(range(seed, seed + n_seeds)), segments, hide_color)


def _check_of(of: Sequence[str], stand_ins: StandIns) -> None:
    missing = [name for name in of if name not in stand_ins.names]
    if missing:
        raise ValueError(f"The model predicts only {list(stand_ins.names)}. It has no output `of={missing[0]!r}`.")


def _explained(
    section: OpenedTiles, row: int, views: Sequence[Views], result: TileResult, options: _Options, pool: Executor
) -> TileResult:
    """Explain one tile with LIME."""
    cut = result.segments
    assert cut is not None
    n_segments = len(cut.numbers)
    shown = np.stack([lime.perturbations(options.n_samples, n_segments, seed=seed) for seed in options.seeds])
    embeddings = _embeddings(section, views, cut, shown.reshape(-1, n_segments), options.hide_color, pool)
    _check_embeddings(section, row, embeddings)
    outputs = _outputs(section.stand_ins, row, embeddings, options)
    by_seed = outputs.reshape(len(shown), options.n_samples, -1)
    surrogates = [lime.fit_surrogate(*pair) for pair in zip(shown, by_seed, strict=True)]
    weights = np.stack([surrogate.weights for surrogate in surrogates])
    first = int(cut.has_background)
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
    """Compute scores from every second sample and the unperturbed tile."""
    rows = np.concatenate([[0], np.arange(start, len(shown), 2)])
    return lime.fit_surrogate(shown[rows], outputs[rows]).weights


def _embeddings(
    section: OpenedTiles,
    views: Sequence[Views],
    cut: Segments,
    shown: np.ndarray,
    hide_color: HideColor,
    pool: Executor,
) -> list[np.ndarray]:
    """Embed all perturbed tiles with each extractor, ``float32 (n_samples, n_fields * n_features)``."""
    known: dict[Any, np.ndarray] = {}
    together = []
    for stored, extractor, one in zip(section.stand_ins.embedded, section.extractors, views, strict=True):
        key = (extractor.name, extractor.weights_hash, stored.tiles.fields_of_view, stored.tiles.input_px, stored.image)
        if key not in known:
            seen = np.stack([cut.seen_at(positions) for positions in one.positions])
            color = background_color(one.pixels, seen) if hide_color == "background" else hide_color
            hidden = lime.hidden_image(one.pixels, seen, color)
            fields = [_of_field(extractor, *field, shown, pool) for field in zip(one.pixels, hidden, seen, strict=True)]
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
    """Embed one field of view of all perturbed tiles, identical images once."""
    numbers = present(segments)
    distinct, which = np.unique(shown[:, numbers], axis=0, return_inverse=True)
    # number the segments of this field of view from 0
    renumbered = np.where(segments >= 0, np.searchsorted(numbers, segments), -1)

    def build(start: int, stop: int) -> np.ndarray:
        return lime.perturbed_images(pixels, hidden, renumbered, distinct[start:stop])

    return embed_blocks(extractor, build, len(distinct), pool)[which.ravel()]


def _outputs(stand_ins: StandIns, row: int, embeddings: Sequence[np.ndarray], options: _Options) -> np.ndarray:
    """Predict all perturbed tiles, ``float64 (n_samples, n_of * n_genes)``."""
    blocks = []
    for start in range(0, len(embeddings[0]), _HEADS):
        block = [values[start : start + _HEADS] for values in embeddings]
        n = len(block[0])
        # pad to a fixed batch size so JAX compiles the heads once
        filled = [np.concatenate([values, np.repeat(values[-1:], _HEADS - n, axis=0)]) for values in block]
        outputs = stand_ins.outputs(row, filled, options.columns)
        blocks.append(np.concatenate([np.asarray(outputs[name])[:n] for name in options.of], axis=1))
    return np.concatenate(blocks).astype(np.float64)


def _check_embeddings(section: OpenedTiles, row: int, embeddings: Sequence[np.ndarray]) -> None:
    """Raise `ValueError` if the unperturbed tile's embedding differs from the stored one."""
    for stored, values in zip(section.stand_ins.embedded, embeddings, strict=True):
        expected = stored.own[row]
        difference = np.abs(values[0] - expected).max() / max(np.abs(expected).max(), 1e-12)
        if difference > _TOLERANCE:
            raise ValueError(
                f"The stored embeddings by {stored.tiles.extractor!r} do not match the current image {stored.image!r} "
                f"(they differ by {difference:.1%} of the largest value). Run `stimage_sd.pp.embed` again."
            )
