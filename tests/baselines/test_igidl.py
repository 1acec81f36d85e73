"""IGI-DL: it learns from pictures and nuclei, stops by what it holds out, and survives the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.sparse as sp
from flax import nnx

from stimage_sd import baselines, models
from stimage_sd.baselines._micro_batches import Batching
from stimage_sd.baselines.networks.igidl import IGIDLNetwork
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._recipe import SectionData, TrainingSection, recipes

SMALL = baselines.IGIDL(
    channels=(8,), graph_width=16, fusion=(16,), n_nuclei=12, dropout=0.1, epochs=25, patience=25,
    learning_rate=1e-2, weight_decay=0.0, batch_size=32, micro_batch_size=16, pixels_px=48, target="log1p",
)  # fmt: skip


def section(seed: int, n_tiles: int = 120) -> tuple[TrainingSection, np.ndarray]:
    """Tiles whose number of nuclei decides their counts."""
    random = np.random.default_rng(seed)
    number = random.integers(0, 7, n_tiles)
    pixels = np.full((n_tiles, 48, 48, 3), (240, 200, 225), np.uint8)
    for tile, wanted in zip(pixels, number, strict=True):
        for place in random.permutation(9)[:wanted]:
            x, y = (int(8 + 16 * step + random.integers(-1, 2)) for step in divmod(int(place), 3))
            cv2.circle(tile, (x, y), 5, (90, 60, 150), -1)
    pixels = np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    counts = random.poisson(np.exp(0.5 * number)[:, None] * np.array([1.0, 2.0, 4.0]))
    places = np.stack(np.divmod(np.arange(n_tiles), 12), axis=1) * 100.0
    made = TrainingSection(
        (), places, np.arange(n_tiles), sp.csr_matrix(counts), counts.sum(axis=1) + 100.0, pixels=pixels
    )
    return made, number


@pytest.fixture(scope="module")
def learned() -> dict[str, np.ndarray]:
    return SMALL.fit([section(1)[0], section(2)[0]], seed=0)


@pytest.mark.slow
def test_a_planted_truth_is_found_on_another_section(learned: dict[str, np.ndarray]) -> None:
    test, number = section(3)
    mean = SMALL.mean(learned, test)
    assert mean.shape == (120, 3)
    assert mean.dtype == np.float32
    assert (mean > 0).all()
    correlation = [np.corrcoef(np.log(mean[:, gene]), number)[0, 1] for gene in range(3)]
    assert min(correlation) > 0.9
    floor = baselines.MeanOnly().mean(baselines.MeanOnly().fit([section(1)[0], section(2)[0]], seed=0), test)
    observed = np.log1p(test.counts.toarray())
    error, of_mean = (((np.log1p(predicted) - observed) ** 2).mean() for predicted in (mean, floor))
    assert error < 0.3 * of_mean
    unseen = SectionData(test.embeddings, test.positions, pixels=test.pixels)
    np.testing.assert_array_equal(SMALL.mean(learned, unseen), mean)
    with pytest.raises(ValueError, match="Expected the tiles' pixels"):
        SMALL.mean(learned, replace(unseen, pixels=None))


@pytest.mark.slow
def test_more_epochs_err_less_and_the_same_seed_gives_the_same(learned: dict[str, np.ndarray]) -> None:
    train = section(1)[0]
    observed = np.log1p(train.counts.toarray())
    short = replace(SMALL, epochs=2)
    first, again, other = (short.fit([train], seed=seed) for seed in (4, 4, 5))
    assert all((first[key] == again[key]).all() for key in first)
    assert any((first[key] != other[key]).any() for key in first)
    errors = [((np.log1p(SMALL.mean(each, train)) - observed) ** 2).mean() for each in (first, learned)]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_it_survives_the_disk(learned: dict[str, np.ndarray], tmp_path: Path) -> None:
    space = FeatureSpace.fit({"a": np.eye(4, dtype=np.float32)}, n_components=1, standardize="cohort", seed=0)
    ones = np.ones(3, np.float32)
    model = models.BaselineModel(
        genes=("A", "B", "C"), recipe=SMALL, tiles=(), learned=learned, scale=ones, dispersion=ones, familiarity=space,
        floor=np.ones((2, 3), np.float32),
    )  # fmt: skip
    loaded = models.load(model.save(tmp_path / "model.stimage"))
    assert loaded.recipe == SMALL
    test = section(3)[0]
    np.testing.assert_array_equal(loaded.recipe.mean(loaded.learned, test), SMALL.mean(learned, test))


@pytest.mark.slow
def test_training_stops_when_held_out_tiles_gain_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    # a rate that leads nowhere: the first epoch's network is the best, and two more are waited for
    recipe = replace(SMALL, learning_rate=0.0, patience=2, epochs=30)
    recipe.fit([section(1, n_tiles=30)[0]], seed=0)
    assert "3/30" in capsys.readouterr().err


def test_micro_batches_make_whole_steps() -> None:
    for n_tiles in (2, 5, 31, 32, 33, 511, 513, 1025):
        batching = Batching(step=512, micro=32)
        steps, per_step = batching.steps(n_tiles), batching.per_step(n_tiles)
        parts = np.array_split(np.arange(n_tiles), steps * per_step)
        assert max(map(len, parts)) <= 32
        assert min(map(len, parts)) >= 1
        assert steps == int(np.ceil(n_tiles / 512))


def test_published_sizes_and_refusals() -> None:
    """Parameters of ResNet-18 without its classifier are torchvision's 11,176,512."""
    network = nnx.eval_shape(lambda: IGIDLNetwork(785, 18, rngs=nnx.Rngs(0)))
    picture = nnx.to_flat_state(nnx.state(network.picture, nnx.Param))
    assert sum(int(np.prod(value.shape)) for _, value in picture) == 11_176_512
    assert network.genes.kernel.shape == (256, 785)
    assert network.layers[0].kernel.shape == (512 + 128, 512)
    assert recipes()["igidl"](channels=[8, 16]).channels == (8, 16)  # as JSON has them
    with pytest.raises(ValueError, match="`micro_batch_size` of IGIDL to be 2 or more"):
        baselines.IGIDL(micro_batch_size=1)
    with pytest.raises(ValueError, match="`target` of IGIDL"):
        baselines.IGIDL(target="raw")
    with pytest.raises(ValueError, match="`patience` of IGIDL"):
        baselines.IGIDL(patience=0)
    one = section(1, n_tiles=1)[0]
    with pytest.raises(ValueError, match="two measured tiles or more to learn from, found 1"):
        SMALL.fit([one], seed=0)
