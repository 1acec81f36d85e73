"""Gene classifier: all genes at once by proximal steps, against scikit-learn's SAGA a gene.

100 genes, 20,000 tiles, 2,048 features by default. SAGA takes minutes a gene at that size, so it is run on a few genes
with twice as many passes each time until its objective is within 1e-3 of the proximal solver's (or lower); the seconds
of that last run, a gene, times the genes and over the cores, are what all genes would take. Features are made: a
rectified mixture of directions whose variances fall as those of EfficientNet-Lite0's embeddings of her2st do.

Run as ``python -m benchmarks.gene_classifier``; writes ``benchmarks/results/gene_classifier.json``.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from benchmarks.measure import Steps, machine, report
from stimage_sd.stats import elastic_net
from stimage_sd.tl._fit.fit_gene_classifier import _saga


def made(n_tiles: int, n_features: int, n_genes: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardized features with a spectrum that falls as 1 / rank, and noisy labels, 8 to 50 % of them High."""
    random = np.random.default_rng(seed)
    variances = 1 / (np.arange(n_features) + 2.0) ** 1.1
    variances *= n_features / variances.sum()
    hidden = random.standard_normal((n_tiles, n_features), dtype=np.float32) * np.sqrt(variances).astype(np.float32)
    mixing = np.linalg.qr(random.standard_normal((n_features, n_features)).astype(np.float32))[0]
    features = np.maximum(hidden @ mixing + 0.5, 0)
    features = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float32)
    truth = random.standard_normal((n_features, n_genes)) * (random.random((n_features, n_genes)) < 0.05)
    margins = features @ truth.astype(np.float32)
    margins = margins / margins.std(axis=0) + 1.35 * random.standard_normal(margins.shape)
    shares = random.uniform(0.08, 0.5, n_genes)
    cuts = np.array([np.quantile(margins[:, gene], 1 - share) for gene, share in enumerate(shares)])
    return features, margins > cuts


def by_saga(features: np.ndarray, labels: np.ndarray, goal: float) -> dict[str, float]:
    """One gene by scikit-learn, to within 1e-3 of the goal; the last run alone is timed."""
    passes = 10
    while True:
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            coefficients, intercept, _ = _saga(features, labels, C=0.1, l1_ratio=0.5, max_iter=passes, seed=0)
        seconds = time.perf_counter() - begin
        reached = elastic_net.objective(features, labels[:, None], coefficients[None], np.array([intercept]))[0]
        if reached <= goal * (1 + 1e-3) or passes >= 640:
            return {"passes": passes, "seconds": round(seconds, 2), "objective": float(reached), "proximal": goal}
        passes *= 2


def main() -> None:
    """Time both solvers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--saga-genes", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the proximal solver")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gene_classifier.json"))
    options = parser.parse_args()
    features, labels = made(options.tiles, options.features, options.genes, seed=0)
    steps = Steps()
    with steps.step("proximal, all genes"):
        fit = elastic_net.fit(features, labels, tolerance=options.tolerance)
    proximal = steps.rows[0]["seconds"]
    saga = []
    for gene in range(options.saga_genes):
        with steps.step(f"saga, gene {gene}, all runs"):
            saga.append(by_saga(features, labels[:, gene], float(fit.objective[gene])))
        print(saga[-1], flush=True)
    cores = os.cpu_count() or 1
    each = float(np.mean([row["seconds"] for row in saga]))
    report(
        options.out,
        {
            "machine": machine(),
            "load": os.getloadavg(),
            "size": {"tiles": options.tiles, "features": options.features, "genes": options.genes},
            "proximal": {
                "seconds": proximal,
                "steps": fit.n_iterations,
                "converged": int(fit.converged.sum()),
                "non-zero": round(float((fit.coefficients != 0).mean()), 3),
            },
            "saga, a gene": saga,
            "saga, all genes, seconds, scaled": {
                "one core": each * options.genes,
                "cores": each * options.genes / cores,
            },
            "times faster": {
                "one core": round(each * options.genes / proximal, 1),
                "cores": round(each * options.genes / cores / proximal, 1),
            },
            "steps": steps.rows,
        },
    )


if __name__ == "__main__":
    main()
