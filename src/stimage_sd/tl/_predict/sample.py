"""Draw sections from a model: members, gene shifts and counts together."""

from __future__ import annotations

import uuid
from pathlib import Path

import dask.array as da
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._predictor import OpenedSection, Predictor, spot_sd
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._fit.seen import shift_sd
from stimage_sd.tl._predict.predict import check_depth

#: elements of a chunk (tiles x genes)
_CHUNK = 1_000_000


def sample(
    data: SpatialData,
    model: Predictor | str | Path,
    n: int = 100,
    *,
    exposure: float | None = None,
    seed: int = 0,
) -> da.Array:
    """Draw counts of a section from the joint predictive distribution.

    Each draw is a section that could have been measured. It has one member of the ensemble, one shift per gene for all
    tiles, one factor per tile for all genes (the depth of a spot, which the image shows in part), and counts. Whatever
    is computed on every draw (a signature, a pseudobulk, clusters) has an interval between the quantiles of its
    results. Intervals of sums over tiles or genes cannot be had from the intervals of single counts.

    Parameters
    ----------
    data
        A section, tiled and embedded as the model expects. Counts are not needed.
    model
        A fitted model, or the path of a saved model.
    n
        Number of draws.
    exposure
        Depth of the section relative to the training sections, for a model fitted with exposure. Default: 1.
    seed
        Random seed. The same seed gives the same draws, in any order and on any number of workers.

    Returns
    -------
    Counts, ``float32 (n, n_tiles, n_genes)``, lazy. Tiles are the kept tiles and genes those of the model, in the order
    of ``tables["predictions"]``. Mean and variance over draws are those of that table at the same exposure.

    Raises
    ------
    KeyError
        If the section was not tiled or embedded.
    ValueError
        If tiles, embeddings or staining differ from the training data, or an option is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_sample", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> draws = sti.tl.sample(section, model, 20)
    >>> signature = np.log1p(draws[:, :, :3]).mean(axis=(1, 2)).compute()
    >>> signature.shape
    (20,)
    """
    fitted = as_model(model)
    sdata = contract.section(data)
    if n < 1:
        raise ValueError(f"Expected `n` of at least 1, found {n}.")
    check_depth(fitted, None, exposure)
    opened, sd = fitted.open(sdata, section=contract.sample(sdata)), shift_sd(fitted, sdata)
    n_tiles, n_genes = len(opened.strangeness), len(fitted.genes)
    # a power of two, since blocks of tiles are padded to one
    step = 1 << max((_CHUNK // n_genes).bit_length() - 1, 0)
    starts = list(range(0, n_tiles, step))
    shared = spot_sd(fitted)
    weights, depth = np.asarray(fitted.member_weights), 1.0 if exposure is None else float(exposure)

    def draw(block_info: dict[int | None, dict[str, list[tuple[int, int]]]]) -> np.ndarray:
        (index, _), (start, stop), _ = block_info[None]["array-location"]
        rows, key = slice(start, stop), [seed, index]
        return _draw(opened, rows, weights, sd, depth, n_genes, shared=shared, seed=key)[None]

    chunks = ((1,) * n, tuple(min(step, n_tiles - start) for start in starts), (n_genes,))
    # a name of its own, since dask would hash the whole section for one
    name, meta = f"sample-{uuid.uuid4().hex}", np.empty((0, 0, 0), np.float32)
    return da.map_blocks(draw, name=name, chunks=chunks, dtype=np.float32, meta=meta)


def _draw(
    opened: OpenedSection, rows: slice, weights: np.ndarray, sd: np.ndarray | None, depth: float, n_genes: int,
    *, shared: float, seed: list[int],
) -> np.ndarray:  # fmt: skip
    """Draw the counts of some tiles. Member and shifts depend on the draw only, counts also on the tiles.

    What the genes of a spot share is a part of each gene's dispersion, so the distribution of single counts keeps its
    mean and its variance.
    """
    whole, tiles = np.random.default_rng(seed), np.random.default_rng([*seed, 1 + rows.start])
    member = whole.choice(len(weights), p=weights)
    factors = np.full(n_genes, depth)
    if sd is not None:
        factors *= np.exp(sd * whole.standard_normal(n_genes) - sd**2 / 2)
    r, p = (part[member].astype(np.float64) for part in opened.r_and_p(rows))
    common = np.minimum(shared, np.sqrt(np.log1p(1 / r)))
    rest = 1 / np.maximum((1 + 1 / r) * np.exp(-(common**2)) - 1, 1e-9)
    rate = tiles.standard_gamma(rest) / rest * (factors * r * (1 - p) / p)
    rate *= np.exp(common * tiles.standard_normal((len(r), 1)) - common**2 / 2)
    return tiles.poisson(rate).astype(np.float32)
