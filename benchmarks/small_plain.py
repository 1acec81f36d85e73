"""The simplest correct version of each step of `benchmarks/small.py`: loops over tiles or genes."""

from __future__ import annotations

import json
from collections.abc import Callable

import cv2
import numpy as np
import scipy.sparse as sp
import scipy.stats
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from scipy.special import expit

from benchmarks.small_section import EXTRACTOR, columns, fitted, reference, section
from benchmarks.spots import by_hand
from stimage_sd import contract

#: of a normalized tile, one pixel in so many is kept along both axes
KEPT = 23
LAYERS = ("aleatoric", "epistemic", "total_variance", "lower", "upper")
SCORES = (
    "pearson",
    "spearman",
    "morans_i_observed",
    "morans_i_predicted",
    "bivariate_morans_i",
    "iou",
    "coverage",
    "nll",
)
Work = Callable[[], np.ndarray]


def kept(tiles: np.ndarray) -> np.ndarray:
    """Keep a few pixels of tiles, ``(n, y, x, 3)``."""
    return tiles[:, ::KEPT, ::KEPT]


def kept_shape(side: int) -> tuple[int, int, int]:
    """Shape of what is kept of a tile."""
    return (-(-side // KEPT),) * 2 + (3,)


# --------------------------------------------------------------------------------------------------
# tiles


def _cut() -> tuple[Callable[[int], np.ndarray], int]:
    """Give a function that reads a tile from the store and resamples it, ``uint8 (y, x, 3)``, and their number."""
    sdata = section("raw")
    tiles, tiling = contract.tiles(sdata), contract.tiling(sdata)
    level = contract.levels(sdata, contract.IMAGE)[0].data
    centers, target = np.asarray(tiles.obsm["spatial"]), tiling["target_px"]
    side = round(tiling["side_px"])

    def read(number: int) -> np.ndarray:
        left, top = (int(np.floor(value - side / 2 + 0.5)) for value in centers[number])
        before = [max(0, -top), max(0, -left)]
        after = [max(0, start + side - size) for start, size in zip((top, left), level.shape[1:], strict=True)]
        part = level[:, max(0, top) : top + side, max(0, left) : left + side].compute()
        part = np.pad(part, ((0, 0), *zip(before, after, strict=True)), mode="reflect")
        how = cv2.INTER_AREA if side > target else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(np.moveaxis(part, 0, -1)), (target, target), interpolation=how)

    return read, len(tiles)


def embed() -> Work:
    """Tile by tile from the store; all at once through ONNX Runtime as it comes, the graph that ours runs."""
    import onnxruntime

    from stimage_sd.models import get_extractor
    from stimage_sd.nn import onnx_graph

    read, n_tiles = _cut()
    extractor = get_extractor(EXTRACTOR)
    model = onnx_graph.record(
        extractor.module(), mean=extractor.mean, std=extractor.std, embedding_size=extractor.embedding_size
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(["embedding"], {"tiles": np.stack([read(number) for number in range(n_tiles)])})[0]


def stain() -> Work:
    """Tile by tile: optical density, a matrix product, and back; stains are fitted beforehand, as ours are.

    Tiles are normalized after they are resampled, which rounds differently.
    """
    from stimage_sd.pp._stain import fit_section

    read, n_tiles = _cut()
    own, target = fit_section(section("raw"), method="vahadane"), json.loads(reference().read_text())
    scale = np.array(target["concentrations"]) / own.concentrations
    matrix = np.array(target["stain_matrix"]) @ np.diag([*scale, 1.0]) @ np.linalg.inv(np.array(own.stain_matrix))
    white, target_white = np.array(own.white_point) + 1, np.array(target["white_point"]) + 1

    def normalize(tile: np.ndarray) -> np.ndarray:
        density = -np.log((tile + 1.0) / white)
        return np.clip(np.rint(target_white * np.exp(-density @ matrix.T) - 1), 0, 255)

    return lambda: np.stack([kept(normalize(read(number))[None])[0] for number in range(n_tiles)])


# --------------------------------------------------------------------------------------------------
# a model, and its scores


def predict() -> Work:
    """The heads in numpy; quantiles of the mixture by adding up probabilities of scipy's, gene by gene."""
    sdata, model = section("predicted"), fitted()
    embeddings = np.asarray(contract.embeddings(sdata, EXTRACTOR))
    space, patterns, head = model.features, model.patterns, model.parameters
    tail = (1 - model.interval_level) / 2

    def work() -> np.ndarray:
        values = (embeddings - embeddings.mean(axis=0)) / np.maximum(embeddings.std(axis=0), 1e-6)
        reduced = (values * space.weight) @ space.components
        seen = (reduced - patterns.center[:, None]) @ patterns.basis
        r_logits, p_logits = np.split(seen @ head["weight"] + head["bias"][:, None], 2, axis=-1)
        r, p = np.logaddexp(0, r_logits.clip(-15, 100)), expit(p_logits.clip(-15, 15))
        means = r * (1 - p) / p
        aleatoric, epistemic = (means / p).mean(axis=0), means.var(axis=0)
        bounds = np.stack([_interval(r[..., gene], p[..., gene], tail) for gene in range(r.shape[2])], axis=-1)
        return np.stack([means.mean(axis=0), aleatoric, epistemic, aleatoric + epistemic, *bounds])

    return work


def _interval(r: np.ndarray, p: np.ndarray, tail: float) -> np.ndarray:
    """Bounds of a gene's interval, ``(2, n_tiles)``."""
    most = scipy.stats.nbinom.ppf(1 - tail, r, p).max()
    below = scipy.stats.nbinom.cdf(np.arange(most + 1)[:, None, None], r, p).mean(axis=1)
    return np.stack([(below < tail).sum(axis=0), (below < 1 - tail).sum(axis=0)])


def evaluate() -> Work:
    """Gene by gene: scipy's correlations, Moran's I, IoU, coverage and likelihood."""
    sdata = section("predicted")
    predictions = contract.predictions(sdata)
    rows, units = contract.align_to_spots(sdata, predictions)
    genes, positions = list(predictions.var_names), np.asarray(predictions.obsm["spatial"])[rows]

    def work() -> np.ndarray:
        table, counts = predictions[rows], np.asarray(units[:, genes].X.todense(), dtype=np.float64)
        mean, variance = np.asarray(table.X, np.float64), np.asarray(table.layers["total_variance"], np.float64)
        inside = (counts >= table.layers["lower"]) & (counts <= table.layers["upper"])
        weights = _neighbors(positions)
        places = _places(positions)
        scores = []
        for gene in range(len(genes)):
            one, other = np.log1p(mean[:, gene]), np.log1p(counts[:, gene])
            p = mean[:, gene] / variance[:, gene]
            scores.append(
                (
                    scipy.stats.pearsonr(one, other).statistic,
                    scipy.stats.spearmanr(one, other).statistic,
                    by_hand(other, other, weights),
                    by_hand(one, one, weights),
                    by_hand(one, other, weights),
                    _overlap(one, other, places),
                    inside[:, gene].mean(),
                    -scipy.stats.nbinom.logpmf(counts[:, gene], mean[:, gene] * p / (1 - p), p).mean(),
                )
            )
        return np.array(scores)

    return work


def morans_i() -> Work:
    """Gene by gene, neighbors given."""
    _, measured, positions = columns()
    weights = _neighbors(positions)
    return lambda: np.array([by_hand(values, values, weights) for values in measured.T])


def pearson() -> Work:
    """Gene by gene by its formula."""
    predicted, measured, _ = columns()
    return lambda: np.array([_correlation(one, other) for one, other in zip(predicted.T, measured.T, strict=True)])


def iou() -> Work:
    """Gene by gene, from coordinates on."""
    predicted, measured, positions = columns()

    def work() -> np.ndarray:
        places = _places(positions)
        return np.array([_overlap(one, other, places) for one, other in zip(predicted.T, measured.T, strict=True)])

    return work


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float((one @ other) / np.sqrt((one @ one) * (other @ other)))


def _pitch(positions: np.ndarray) -> float:
    return float(np.median(cKDTree(positions).query(positions, k=2)[0][:, 1]))


def _neighbors(positions: np.ndarray) -> sp.csr_matrix:
    """Weights of hexagonal neighbors, rows summing to one; every spot has some."""
    graph = sp.csr_matrix(cKDTree(positions).sparse_distance_matrix(cKDTree(positions), 1.25 * _pitch(positions)))
    graph.eliminate_zeros()  # a spot and itself
    graph.data[:] = 1
    return sp.csr_matrix(sp.diags(1 / graph.sum(axis=1).A1) @ graph)


def _places(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns on a hexagonal lattice that lies straight, as Visium's do."""
    x, y = (positions - positions.min(axis=0)).T / _pitch(positions)
    row, column = np.rint(y / np.sqrt(0.75)).astype(int), np.rint(2 * x).astype(int)
    return row, column


def _overlap(one: np.ndarray, other: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> float:
    raster = np.zeros((places[0].max() + 1, places[1].max() + 1))
    # a pitch is 1.15 rows and two columns
    sigma = (2 / np.sqrt(3), 2.0)
    raster[places] = 1
    tissue = gaussian_filter(raster, sigma, mode="constant")[places]
    patterns = []
    for values in (one, other):
        raster[places] = values > values.mean()
        patterns.append(gaussian_filter(raster, sigma, mode="constant")[places] / tissue >= 0.5 - 1e-9)
    return float((patterns[0] & patterns[1]).sum() / (patterns[0] | patterns[1]).sum())
