"""HisToGene, Hist2ST and THItoGene learn a planted truth from pixels, alike every time, and say what they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp
import scipy.stats
from flax import nnx

from stimage_sd import baselines, models
from stimage_sd.baselines._section_network import batches_of
from stimage_sd.baselines._training import arrays_of
from stimage_sd.baselines._training import train as trained
from stimage_sd.baselines._windows import Places
from stimage_sd.baselines.networks.hist2st import Hist2STNetwork, Hist2STOutput, NeighborMean, zinb_loss
from stimage_sd.baselines.networks.histogene import HisToGeneNetwork
from stimage_sd.baselines.networks.thitogene import THItoGeneNetwork
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._recipe import SectionData, TrainingSection, count_arrays, recipes

SMALL = {"heads": 1, "dropout": 0.0, "learning_rate": 1e-3, "pixels_px": 14, "target": "log1p"}
RECIPES = {
    "histogene": baselines.HisToGene(width=32, depth=1, epochs=120, **SMALL),
    "hist2st": baselines.Hist2ST(
        channels=8, depths=(1, 1, 1), copies=1, epochs=250, **{**SMALL, "learning_rate": 3e-3}
    ),
    "thitogene": baselines.THItoGene(
        capsules=4, capsule_width=8, depth=1, hidden=32, epochs=40,
        **{**SMALL, "heads": (1, 2), "learning_rate": 3e-3, "pixels_px": 44},
    ),
}  # fmt: skip


SLOW = pytest.mark.slow
PLACES = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2) * 100.0


def section(seed: int, side: int = 14) -> tuple[TrainingSection, np.ndarray]:
    """Spots whose brightness decides their counts, each its own."""
    random = np.random.default_rng(seed)
    return lit(random.uniform(0, 1, len(PLACES)), random, side)


def waves(seed: int, side: int) -> tuple[TrainingSection, np.ndarray]:
    """Spots whose brightness decides their counts, and changes slowly over the section."""
    random = np.random.default_rng(seed)
    steps = random.uniform(0.3, 0.8) * np.array([np.cos(angle := random.uniform(0, 2 * np.pi)), np.sin(angle)])
    return lit(0.5 + 0.5 * np.sin(PLACES @ steps / 100 + random.uniform(0, 2 * np.pi)), random, side)


def lit(light: np.ndarray, random: np.random.Generator, side: int) -> tuple[TrainingSection, np.ndarray]:
    places = PLACES
    pixels = np.clip(255 * light[:, None, None, None] + random.normal(0, 8, (len(places), side, side, 3)), 0, 255)
    counts = random.poisson(np.exp(3 * light)[:, None] * np.array([1.0, 2.0, 4.0]))
    made = TrainingSection(
        (), places, np.arange(len(places)), sp.csr_matrix(counts), counts.sum(axis=1) + 100.0,
        pixels=pixels.astype(np.uint8),
    )  # fmt: skip
    return made, light


#: THItoGene hears of a spot through its neighbors alone
PLANTED = {"histogene": (section, 2), "hist2st": (section, 2), "thitogene": (waves, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["histogene", *(pytest.param(name, marks=SLOW) for name in ("hist2st", "thitogene"))])
def test_a_planted_truth_is_found_on_another_section(name: str) -> None:
    recipe = RECIPES[name]
    planted, n_train = PLANTED[name]
    train = [planted(seed, recipe.pixels_px)[0] for seed in range(1, n_train + 1)]
    test, light = planted(n_train + 1, recipe.pixels_px)
    learned = recipe.fit(train, seed=0)
    mean = recipe.mean(learned, test)
    assert mean.shape == (36, 3)
    assert mean.dtype == np.float32
    assert (mean > 0).all()
    correlation = [np.corrcoef(np.log(mean[:, gene]), light)[0, 1] for gene in range(3)]
    assert np.mean(correlation) > 0.75
    floor = baselines.MeanOnly().mean(baselines.MeanOnly().fit(train, seed=0), test)
    observed = np.log1p(test.counts.toarray())
    error, of_mean = (((np.log1p(predicted) - observed) ** 2).mean() for predicted in (mean, floor))
    assert error < 0.6 * of_mean
    # counts of the section to predict are no part of what it is predicted by
    unseen = SectionData(test.embeddings, test.positions, pixels=test.pixels)
    np.testing.assert_array_equal(recipe.mean(learned, unseen), mean)
    with pytest.raises(ValueError, match="Expected the tiles' pixels"):
        recipe.mean(learned, replace(unseen, pixels=None))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_network() -> None:
    """Of one network: all three are trained by the same loop."""
    recipe = replace(RECIPES["histogene"], epochs=3, dropout=0.2)
    train = [section(1, recipe.pixels_px)[0]]
    first, again, other = (recipe.fit(train, seed=seed) for seed in (4, 4, 5))
    assert all((first[key] == again[key]).all() for key in first)
    assert any((first[key] != other[key]).any() for key in first)


@pytest.mark.slow
def test_a_network_survives_the_disk(tmp_path: Path) -> None:
    recipe = replace(RECIPES["thitogene"], epochs=2)
    train = section(1, recipe.pixels_px)[0]
    space = FeatureSpace.fit({"a": np.eye(4, dtype=np.float32)}, n_components=1, standardize="cohort", seed=0)
    model = models.BaselineModel(
        genes=("A", "B", "C"), recipe=recipe, tiles=(), learned=recipe.fit([train], seed=0),
        scale=np.ones(3, np.float32), dispersion=np.ones(3, np.float32), familiarity=space,
        floor=np.ones((2, 3), np.float32),
    )  # fmt: skip
    loaded = models.load(model.save(tmp_path / "model.stimage"))
    assert loaded.recipe == recipe
    np.testing.assert_array_equal(loaded.recipe.mean(loaded.learned, train), recipe.mean(model.learned, train))


def test_windows_cover_a_section_once_and_are_not_larger_than_asked() -> None:
    random = np.random.default_rng(0)
    square = np.stack(np.meshgrid(np.arange(53), np.arange(40)), axis=-1).reshape(-1, 2)
    # hexagonal: successive rows are shifted by half a pitch
    hexagonal = np.stack([square[:, 0] + 0.5 * (square[:, 1] % 2), square[:, 1] * np.sqrt(3) / 2], axis=1)
    for positions in (square * 100.0, hexagonal * 100.0, random.uniform(0, 4000, (300, 2))):
        tissue = np.sort(random.permutation(len(positions))[: int(0.9 * len(positions))])
        places = Places.of(SectionData((), positions[tissue]))
        windows = places.windows(25)
        assert sorted(np.concatenate(windows).tolist()) == list(range(len(tissue)))
        for window in windows:
            within = places.column_row[window]
            width, height = np.ptp(within, axis=0) // (places.step, 1) + 1
            assert max(width, height) <= 25
        assert len(places.windows(None)) == 1
    assert len(Places.of(SectionData((), square * 100.0)).windows(25)) == 3 * 2
    assert len(Places.of(SectionData((), hexagonal * 100.0)).windows(25)) == 3 * 2


def test_a_window_is_a_section_of_its_own() -> None:
    """Sections cut into windows, and a cohort of these windows, give the same batches and predictions."""
    whole, _ = section(1)
    measured = np.arange(3, 30)
    whole = replace(whole.only(measured), rows=np.flatnonzero(np.isin(np.arange(36), measured)))
    tiles = Places.of(whole).windows(3)
    assert [len(window) for window in tiles] == [9] * 4
    target, factors = np.arange(81.0).reshape(27, 3), np.arange(27.0)
    found = batches_of(whole, target, factors, window=3)
    recipe = replace(RECIPES["histogene"], window=3)
    learned = {**arrays_of(recipe._make(3, nnx.Rngs(0))), **count_arrays([whole], "log1p")}
    mean = recipe.mean(learned, whole)
    for window, batch in zip(tiles, found, strict=True):
        inside = np.isin(whole.rows, window)
        part = whole.only(np.flatnonzero(inside))
        part = replace(part, positions=whole.positions[window], pixels=whole.pixels[window])
        part = replace(part, rows=np.searchsorted(window, part.rows))
        (expected,) = batches_of(part, target[inside], factors[inside], window=None)
        for name, array in vars(expected).items():
            np.testing.assert_allclose(getattr(batch, name), array, err_msg=name)
        alone = replace(recipe, window=None).mean(learned, part)
        np.testing.assert_allclose(mean[window], alone, rtol=1e-5)
    assert np.abs(mean - replace(recipe, window=None).mean(learned, whole)).max() > 1e-6
    # a window without a measured tile is not trained on
    assert len(batches_of(whole.only(np.flatnonzero(np.isin(whole.rows, tiles[0]))), target, factors, window=3)) == 1


@pytest.mark.parametrize("name", ["HisToGene", "Hist2ST", "THItoGene"])
def test_windows_of_a_spot_are_refused(name: str) -> None:
    for window in (1, 2.5, True):
        with pytest.raises(ValueError, match=f"`window` of {name} to be None or an integer of 2 or more"):
            getattr(baselines, name)(window=window)


def test_training_gives_the_network_after_each_epoch_and_its_loss_falls() -> None:
    given = {"x": jnp.arange(4.0)[:, None], "y": 2 * jnp.arange(4.0)[:, None]}
    losses, drawn = [], []

    def draw(random: np.random.Generator) -> list[dict[str, jnp.ndarray]]:
        drawn.append(random.random())
        return [given]

    def loss(network: nnx.Linear, batch: dict[str, jnp.ndarray], key: object) -> jnp.ndarray:
        return jnp.mean((network(batch["x"]) - batch["y"]) ** 2)

    for network in trained(
        lambda rngs: nnx.Linear(1, 1, rngs=rngs), draw, loss, optimizer=optax.adam(0.1), epochs=50, seed=0, label="line"
    ):
        losses.append(float(loss(network, given, None)))
        if losses[-1] < 0.5:
            break
    assert 2 < len(losses) == len(set(drawn)) < 50
    assert losses == sorted(losses, reverse=True)


def test_all_are_known_by_name_and_refuse_what_they_cannot_be() -> None:
    assert recipes()["histogene"] is baselines.HisToGene
    assert recipes()["thitogene"](heads=[2, 3]).heads == (2, 3)
    assert recipes()["hist2st"](depths=[1, 2, 3]).depths == (1, 2, 3)  # as JSON has them
    with pytest.raises(ValueError, match="`epochs` of HisToGene"):
        baselines.HisToGene(epochs=0)
    with pytest.raises(ValueError, match="`target` of Hist2ST"):
        baselines.Hist2ST(target="raw")
    with pytest.raises(ValueError, match="`pixels_px` of THItoGene to be 44 or more"):
        baselines.THItoGene(pixels_px=40)


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
    thitogene = nnx.eval_shape(lambda: THItoGeneNetwork(785, rngs=nnx.Rngs(0)))
    # 28 px after the dynamic convolution, 9 px before the capsules' kernel
    assert thitogene.capsules.whole.shape == (9, 9, 128)
    assert thitogene.capsules.routing.votes.shape == (20, 16, 8, 64)
    assert thitogene.neighbors.map.shape == (22 * 64, 8, 1024)
    assert thitogene.together.map.shape == (8 * 1024, 1, 512)
    squeeze = 3 * 16 + 2 * 16
    dynamic = squeeze + sum(16 * n + n for n in (3, 16, 16, 4)) + 4 * 16 * 3 * 16
    convolutions = sum(k * k * a * b + 3 * b for k, a, b in ((5, 16, 32), (3, 32, 64), (3, 64, 64), (3, 64, 128)))
    capsules = convolutions + 9 * 9 * 128 + 128 + 20 * 16 * 8 * 64 + 20 * 16
    width = 22 * 64
    block = 2 * width + 3 * width * 1024 + 1024 * width + width + 2 * width + 2 * width * 2048 + 2048 + width
    attention = width * 8 * 1024 + 2 * 8 * 1024 + 8 * 1024 * 512 + 2 * 512
    head = 512 * 1024 + 1024 + 2 * 1024 + 1024 * 785 + 785
    assert count(thitogene) == dynamic + capsules + 2 * 64 * 64 + 4 * block + attention + head


def test_the_zinb_is_scipys() -> None:
    random = np.random.default_rng(0)
    mean, r, extra = random.uniform(0.5, 9, (3, 4)), random.uniform(0.3, 5, (3, 4)), random.uniform(0.05, 0.6, (3, 4))
    counts, factors = random.integers(0, 6, (3, 4)).astype(np.float32), np.array([0.5, 1.0, 2.0], np.float32)
    scaled = mean * factors[:, None]
    pmf = (1 - extra) * scipy.stats.nbinom.pmf(counts, r, r / (r + scaled)) + extra * (counts == 0)
    output = Hist2STOutput(*(np.float32(value) for value in (mean, mean, r, extra)), np.ones((3, 1), np.float32))
    assert float(zinb_loss(counts, output, factors)) == pytest.approx(-np.log(pmf).mean(), rel=1e-4)


def test_a_graph_layer_is_its_formula() -> None:
    layer = NeighborMean(3, rngs=nnx.Rngs(0))
    tokens, graph = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.full((4, 4), 0.25, np.float32)
    joined = np.concatenate([tokens, graph @ tokens], axis=1) @ np.asarray(layer.weight.kernel[...])
    mapped = np.maximum(joined, 0)
    expected = mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(layer(tokens, graph), expected, rtol=1e-5, atol=1e-6)
