"""HisToGene and Hist2ST: they learn a planted truth from pixels, alike every time, and say what they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
from flax import nnx

from stimage_sd.models import baselines
from stimage_sd.models.baselines._recipe import SectionData, TrainingSection, recipes
from stimage_sd.nn.hist2st import Hist2STNetwork, Hist2STOutput, NeighbourMean, zinb_loss
from stimage_sd.nn.histogene import HisToGeneNetwork

SMALL = {"heads": 1, "dropout": 0.0, "learning_rate": 1e-3, "pixels_px": 14, "target": "log1p"}
RECIPES = {
    "histogene": baselines.HisToGene(width=32, depth=1, epochs=120, **SMALL),
    "hist2st": baselines.Hist2ST(
        channels=8, depths=(1, 1, 1), copies=1, epochs=250, **{**SMALL, "learning_rate": 3e-3}
    ),
}


def section(seed: int) -> tuple[TrainingSection, np.ndarray]:
    """Spots whose brightness decides their counts."""
    random = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2) * 100.0
    light = random.uniform(0, 1, len(places))
    pixels = np.clip(255 * light[:, None, None, None] + random.normal(0, 8, (len(places), 14, 14, 3)), 0, 255)
    counts = random.poisson(np.exp(3 * light)[:, None] * np.array([1.0, 2.0, 4.0]))
    made = TrainingSection(
        (), places, np.arange(len(places)), sp.csr_matrix(counts), counts.sum(axis=1) + 100.0,
        pixels=pixels.astype(np.uint8),
    )  # fmt: skip
    return made, light


@pytest.mark.parametrize("name", RECIPES)
def test_a_planted_truth_is_found_on_another_section(name: str) -> None:
    recipe = RECIPES[name]
    train = [section(seed)[0] for seed in (1, 2)]
    test, light = section(3)
    learnt = recipe.fit(train, seed=0)
    mean = recipe.mean(learnt, test)
    assert mean.shape == (36, 3)
    assert mean.dtype == np.float32
    assert (mean > 0).all()
    correlation = [np.corrcoef(np.log(mean[:, gene]), light)[0, 1] for gene in range(3)]
    assert np.mean(correlation) > 0.75
    # counts of the section to predict are no part of what it is predicted by
    unseen = SectionData(test.embeddings, test.positions, pixels=test.pixels)
    np.testing.assert_array_equal(recipe.mean(learnt, unseen), mean)
    with pytest.raises(ValueError, match="Expected the tiles' pixels"):
        recipe.mean(learnt, replace(unseen, pixels=None))


def test_the_same_seed_gives_the_same_network() -> None:
    recipe = replace(RECIPES["histogene"], epochs=3, dropout=0.2)
    train = [section(1)[0]]
    first, again, other = (recipe.fit(train, seed=seed) for seed in (4, 4, 5))
    assert all((first[key] == again[key]).all() for key in first)
    assert any((first[key] != other[key]).any() for key in first)


def test_both_are_known_by_name_and_refuse_what_they_cannot_be() -> None:
    assert recipes()["histogene"] is baselines.HisToGene
    assert recipes()["hist2st"](depths=[1, 2, 3]).depths == (1, 2, 3)  # as JSON has them
    with pytest.raises(ValueError, match="`epochs` of HisToGene"):
        baselines.HisToGene(epochs=0)
    with pytest.raises(ValueError, match="`target` of Hist2ST"):
        baselines.Hist2ST(target="raw")


def test_published_sizes() -> None:
    """Parameters of the published networks for 785 genes, counted from their layers' sizes by hand."""

    def count(network: nnx.Module) -> int:
        return sum(int(np.prod(value.shape)) for _, value in nnx.to_flat_state(nnx.state(network, nnx.Param)))

    histogene = nnx.eval_shape(lambda: HisToGeneNetwork(785, rngs=nnx.Rngs(0)))
    width = 1024
    attention = 2 * width + 3 * width * width + width * width + width
    layers = 2 * width + (width * 2 * width + 2 * width) + (2 * width * width + width)
    patch, places, genes = 3 * 112**2 * width + width, 2 * 64 * width, 2 * width + width * 785 + 785
    assert count(histogene) == patch + places + 8 * (attention + layers) + genes
    hist2st = nnx.eval_shape(lambda: Hist2STNetwork(785, rngs=nnx.Rngs(0)))
    assert hist2st.genes.kernel.shape == (1024, 785)
    assert (len(hist2st.mixers), len(hist2st.blocks), len(hist2st.graph)) == (2, 8, 4)


def test_the_zinb_is_scipys() -> None:
    random = np.random.default_rng(0)
    mean, r, extra = random.uniform(0.5, 9, (3, 4)), random.uniform(0.3, 5, (3, 4)), random.uniform(0.05, 0.6, (3, 4))
    counts, factors = random.integers(0, 6, (3, 4)).astype(np.float32), np.array([0.5, 1.0, 2.0], np.float32)
    scaled = mean * factors[:, None]
    pmf = (1 - extra) * scipy.stats.nbinom.pmf(counts, r, r / (r + scaled)) + extra * (counts == 0)
    output = Hist2STOutput(*(np.float32(value) for value in (mean, mean, r, extra)), np.ones((3, 1), np.float32))
    assert float(zinb_loss(counts, output, factors)) == pytest.approx(-np.log(pmf).mean(), rel=1e-4)


def test_a_graph_layer_is_its_formula() -> None:
    layer = NeighbourMean(3, rngs=nnx.Rngs(0))
    tokens, graph = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.full((4, 4), 0.25, np.float32)
    joined = np.concatenate([tokens, graph @ tokens], axis=1) @ np.asarray(layer.weight.kernel[...])
    mapped = np.maximum(joined, 0)
    expected = mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(layer(tokens, graph), expected, rtol=1e-5, atol=1e-6)
