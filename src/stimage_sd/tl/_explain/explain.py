"""LIME over the nuclei of a tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._settings import n_threads
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._resolve import as_model
from stimage_sd.models._stand_ins import Explainable, StandIns
from stimage_sd.tl._explain.copies import Copies, HideColor
from stimage_sd.tl._explain.explained import TileResult, top_tiles, write_results
from stimage_sd.tl._explain.sampling import Expected, Sampling, explain_tile
from stimage_sd.tl._explain.segments import SegmentTile, check_segments, segment_tile
from stimage_sd.tl._explain.tile_views import open_tiles

Of = Literal["mean", "epistemic", "aleatoric", "total_variance"]


def explain(
    data: SpatialData | contract.Cohort,
    model: Explainable | str | Path,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    method: Literal["lime"] = "lime",
    of: Of | Sequence[Of] = "mean",
    n_samples: int = 1000,
    stability: float | None = 0.96,
    segments: str | SegmentTile = "nuclei",
    hide_color: HideColor = "background",
    hide_background: bool = False,
    n_seeds: int = 1,
    extractors: Sequence[Extractor] = (),
    shapes_key: str | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> None:
    """Score the contribution of each nucleus to a prediction with LIME.

    The model predicts copies of a tile with random nuclei hidden. A linear model of the visible nuclei is then fitted
    to these predictions. One set of copies serves all genes and both mean and uncertainty. Copies are added until the
    scores are stable, in pairs of which each shows the nuclei that the other hides. The logger ``stimage_sd`` reports
    the longest expected time after the first copies.

    A nucleus is hidden in every field of view that shows it. Fields of view are embedded anew only where nuclei change
    them. The tissue around the tile is unchanged. The neighbors' embeddings (context) and the section's mean and
    standard deviation are the stored ones. The unperturbed tile gets the same prediction as from
    `stimage_sd.tl.predict` (without measured size factors).

    Parameters
    ----------
    data
        A section or a cohort with nuclei, otherwise as for `stimage_sd.tl.predict`.
    model
        A fitted model, or the path of one: a count model, a gene classifier (its mean is the probability of High) or a
        fine-tuned model. A model of nuclei needs no explanation of its tiles. `stimage_sd.tl.predict` with
        ``on="nuclei"`` gives the contribution of each nucleus.
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
        Largest number of copies per tile and seed, including the unperturbed tile.
    stability
        Stability of all genes and outputs at which no more copies are added, a correlation. `None` always takes
        `n_samples` copies, which are drawn independently, as published.
    segments
        ``"nuclei"``, ``"slic"`` (superpixels), the name of labels (0 is background), or a function. The function takes
        a tile, ``uint8 (y, x, 3)``, and returns segments, ``int (y, x)``, 0 for background.
    hide_color
        Color of hidden segments: ``"background"`` (the mean color of the tile's background), a gray level, a color, or
        `None` (each segment's mean). The published color is black (0).
    hide_background
        Whether the background is one more segment that copies hide, as published. Its effect is larger than that of all
        nuclei, and needs many more copies.
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
    tile. Layer ``stability`` is the estimated correlation of the nuclei's scores with those from infinitely many
    copies. It is NaN for fewer than three nuclei. Layer ``r2`` is R² of the linear model on copies that it was not
    fitted to. Layer ``intercept`` is the intercept, and ``background`` the score of the background, NaN if the
    background is not hidden. Layers of outputs other than the mean end in ``_<of>``. ``obs["n_segments"]`` and
    ``obs["n_samples"]`` are the numbers of segments and copies, and ``obs["reason"]`` says why a tile was not
    explained.

    `stimage_sd.pl.explanation` and the functions after it take scores with a low stability or R² as not readable.

    Raises
    ------
    KeyError
        If the section lacks a step, nuclei or the embedded image, or has no such tile or gene.
    TypeError
        If the model does not predict from a tile's embeddings, such as a model of nuclei.
    ValueError
        If options or the section are not as expected, or no tile has a segment.

    Notes
    -----
    Paper, section 2.5; Ribeiro et al. 2016. With one field of view, ``hide_background=True`` and ``stability=None``,
    scores equal those of the package `lime`,
    ``LimeImageExplainer(random_state=seed).explain_instance(..., hide_color=hide_color)``, over the same segments.

    Stability compares the variance of each score over draws of copies with the variance between nuclei. R² leaves out
    one pair of copies at a time, or one copy. It is weighted as the linear model. Scores of fewer pairs than 1.25 times
    the nuclei have stability 0.

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
    sampling = _sampling(model, gene, of, n_samples, stability, n_seeds, seed)
    _check_color(hide_color)
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
    for section in opened.values():
        _check_of(sampling.of, section.stand_ins)
    n_tiles = sum(len(section.rows) for section in opened.values())
    with ThreadPoolExecutor(n_threads(n_jobs)) as pool, Expected(n_tiles, n_samples * n_seeds) as expected:
        for name, section in opened.items():
            results = []
            for (row, views, area), tile in zip(section.read(), section.tiles, strict=True):
                cut = segment_tile(section.sdata, area, segments, nuclei[name])
                if cut is not None and not hide_background:
                    cut = cut.without_background()
                result = TileResult(int(tile), cut)
                if cut is not None:
                    copies = Copies(section, row, views, cut, hide_color)
                    result = explain_tile(copies, result, sampling, pool, report=expected.add)
                expected.finish_tile()
                results.append(result)
            write_results(section.sdata, results, genes=genes, of=sampling.of, nuclei=nuclei[name], prefix="lime")
            contract.record(
                section.sdata, "tl.explain", genes=genes, of=sampling.of, n_samples=n_samples, stability=stability,
                n_seeds=n_seeds, seed=seed, segments=segments if isinstance(segments, str) else "function",
                hide_color=hide_color, hide_background=hide_background,
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


def _sampling(
    model: Explainable, gene: str | Sequence[str], of: Of | Sequence[Of], n_samples: int, stability: float | None,
    n_seeds: int, seed: int,
) -> Sampling:  # fmt: skip
    names = (of,) if isinstance(of, str) else tuple(of)
    if not names or any(name not in get_args(Of) for name in names):
        raise ValueError(f"Expected `of` among {get_args(Of)}, found {of!r}.")
    if n_samples < 10 or n_seeds < 1:
        raise ValueError(f"Expected at least 10 samples and one seed, found {n_samples} and {n_seeds}.")
    if stability is not None and not 0 < stability <= 1:
        raise ValueError(f"Expected `stability` as a correlation above 0 and up to 1, or None, found {stability!r}.")
    columns = gene_columns(model, gene) if isinstance(model, Explainable) else np.zeros(0, int)
    return Sampling(names, columns, n_samples, stability, tuple(range(seed, seed + n_seeds)))


def _check_color(hide_color: HideColor) -> None:
    if isinstance(hide_color, str) and hide_color != "background":
        raise ValueError(
            f'Expected `hide_color` to be a gray level, a color, "background" or None, found {hide_color!r}.'
        )


def _check_of(of: Sequence[str], stand_ins: StandIns) -> None:
    missing = [name for name in of if name not in stand_ins.names]
    if missing:
        raise ValueError(f"The model predicts only {list(stand_ins.names)}. It has no output `of={missing[0]!r}`.")
