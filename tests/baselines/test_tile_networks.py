"""STnet and ViTNB: they learn a planted truth from pixels, alike every time, and say what they need."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse as sp
from flax import nnx
from scipy.stats import nbinom

from stimage_sd import baselines, contract, models, pp, tl
from stimage_sd.baselines import _tile_network
from stimage_sd.baselines._stnet import _square
from stimage_sd.baselines._tile_network import RegisteredNetwork, Training, learn
from stimage_sd.baselines.networks.patch_transformer import PatchTransformer, drop_some
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models import _extractors
from stimage_sd.models._recipe import Recipe, SectionData, TrainingSection, recipes
from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean, relu
from stimage_sd.nn.parts import Part, parts_of, run_parts, training_parts_of

PX = 16


class Small(nnx.Module):
    """Two convolutions, each a part."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = ConvNorm(3, 8, 3, stride=2, padding=1, epsilon=1e-3, rngs=rngs)
        self.second = ConvNorm(8, 12, 3, stride=2, padding=1, epsilon=1e-3, rngs=rngs)

    def parts(self) -> list[Part]:
        return [
            Part((self.first,), lambda tiles: relu(conv_norm(tiles, self.first))),
            Part((self.second,), lambda value: global_mean(relu(conv_norm(value, self.second)))),
        ]

    def __call__(self, tiles: Any) -> Any:
        return run_parts(self.parts(), tiles)


def register(name: str, network: Any, **changes: Any) -> None:
    settings = {"input_size": PX, "embedding_size": 12, "mean": (0.5,) * 3, "std": (0.3,) * 3}
    models.register_extractor(name, network, **(settings | changes))


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extractors, "_entries", dict(_extractors._entries))
    monkeypatch.setattr(_extractors, "_built", {})
    register("small", Small())


STNET = baselines.STnet(
    backbone="small", epochs=40, batch_size=16, learning_rate=3e-3, pixels_px=PX, micro_batch_size=8, target="log1p"
)
VIT = baselines.ViTNB(
    patch_px=8, width=8, depth=1, heads=2, hidden=(12, 8), epochs=40, batch_size=16, learning_rate=5e-3, pixels_px=PX,
    micro_batch_size=8, dropout=0.05,
)  # fmt: skip
RECIPES = {
    "stnet": STNET,
    "stnet, last stage": replace(STNET, unfreeze="last_stage"),
    "vit_nb": VIT,
    "vit_nb, lognorm": replace(VIT, target="lognorm"),
    "vit_nb, small": replace(VIT, backbone="small"),
}


def section(seed: int) -> tuple[TrainingSection, np.ndarray]:
    """Spots whose brightness decides their counts; one tile in six is not measured."""
    random = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2) * 100.0
    light = random.uniform(0, 1, len(places))
    pixels = np.clip(255 * light[:, None, None, None] + random.normal(0, 8, (len(places), PX, PX, 3)), 0, 255)
    rows = np.flatnonzero(np.arange(len(places)) % 6 != 5)
    counts = random.poisson(np.exp(3 * light)[:, None] * np.array([1.0, 2.0, 4.0]))[rows]
    made = TrainingSection(
        (), places, rows, sp.csr_matrix(counts), np.full(len(rows), 200.0), pixels=pixels.astype(np.uint8)
    )
    return made, light


#: what compiles a transformer by itself
SLOW = {"vit_nb", "vit_nb, lognorm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
)
def test_a_planted_truth_is_found_on_another_section(name: str) -> None:
    recipe = RECIPES[name]
    train = [section(seed)[0] for seed in (1, 2)]
    test, light = section(3)
    learned = recipe.fit(train, seed=0)
    assert learned["loss"].shape == (40,)
    assert learned["loss"][-5:].mean() < learned["loss"][0]
    mean = recipe.mean(learned, test)
    assert mean.shape == (36, 3)
    assert mean.dtype == np.float32
    assert (mean > 0).all()
    assert np.mean([np.corrcoef(np.log(mean[:, gene]), light)[0, 1] for gene in range(3)]) > 0.8
    observed, of = np.log1p(test.counts.toarray()), np.log1p(mean[test.rows])
    floor = np.log1p(baselines.MeanOnly().mean(baselines.MeanOnly().fit(train, seed=0), test)[test.rows])
    assert ((of - observed) ** 2).mean() < 0.7 * ((floor - observed) ** 2).mean()
    # counts of the section to predict are no part of what it is predicted by
    unseen = SectionData(test.embeddings, test.positions, pixels=test.pixels)
    np.testing.assert_array_equal(recipe.mean(learned, unseen), mean)
    with pytest.raises(ValueError, match="Expected the tiles' pixels"):
        recipe.mean(learned, replace(unseen, pixels=None))


@pytest.mark.parametrize("name", ["stnet", "vit_nb"])
def test_the_same_seed_gives_the_same_network(name: str) -> None:
    recipe = replace(RECIPES[name], epochs=2)
    train = [section(1)[0]]
    first, again, other = (recipe.fit(train, seed=seed) for seed in (4, 4, 5))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any((first[key] != other[key]).any() for key in first if key.startswith("network."))


def test_frozen_parts_and_statistics_stay() -> None:
    learned = replace(STNET, epochs=2, unfreeze="last_stage").fit([section(1)[0]], seed=0)
    before = Small()
    np.testing.assert_array_equal(learned["network.first/kernel"], before.first.kernel[...])
    np.testing.assert_array_equal(learned["network.second/mean"], before.second.mean[...])
    assert np.abs(learned["network.second/kernel"] - before.second.kernel[...]).max() > 1e-6


def test_stnet_begins_at_the_mean_of_log_expression() -> None:
    train, _ = section(1)
    recipe = replace(STNET, epochs=1, learning_rate=1e-30)
    expected = np.expm1(np.log1p(train.counts.toarray()).mean(axis=0))
    np.testing.assert_allclose(recipe.mean(recipe.fit([train], seed=0), train), np.tile(expected, (36, 1)), rtol=1e-5)


def test_vit_nb_begins_at_the_mean_only_fit() -> None:
    train, _ = section(1)
    recipe = replace(VIT, epochs=1, learning_rate=1e-30)
    mean = recipe.mean(recipe.fit([train], seed=0), train)
    np.testing.assert_allclose(mean, np.tile(train.counts.toarray().mean(axis=0), (36, 1)), rtol=0.05)


def test_stnet_predicts_alike_for_all_symmetries_of_a_tile() -> None:
    train, _ = section(1)
    learned = replace(STNET, epochs=3).fit([train], seed=0)
    turned = replace(train, pixels=np.ascontiguousarray(np.rot90(train.pixels[:, :, ::-1], 3, axes=(1, 2))))
    np.testing.assert_allclose(STNET.mean(learned, turned), STNET.mean(learned, train), rtol=1e-4)


@pytest.mark.slow
def test_micro_batches_make_the_steps_of_plain_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of SGD with momentum as torch defines them, on the sum over a batch, its gradient taken at once."""
    monkeypatch.setattr(_tile_network, "augment", lambda tiles, **_: tiles)
    train, _ = section(1)
    expression = np.log1p(train.counts.toarray()).astype(np.float32)
    head = {"weight": jnp.full((12, 3), 0.1), "bias": jnp.asarray(expression.mean(axis=0))}
    optimizer = optax.sgd(2e-3, momentum=0.9)
    learned = learn(
        RegisteredNetwork("small", None).initial(seed=0, side_px=PX),
        head,
        [train],
        {"expression": expression},
        _square,
        Training("all", optimizer, 1, 13, 4, 0, "test"),
    )

    def plain(parameters: tuple[Any, dict], chosen: np.ndarray) -> jax.Array:
        tiles = (jnp.asarray(train.pixels[train.rows[chosen]], jnp.float32) / 255 - 0.5) / 0.3
        predicted = nnx.merge(graph, parameters[0], rest)(tiles) @ parameters[1]["weight"] + parameters[1]["bias"]
        return ((predicted - expression[chosen]) ** 2).mean(axis=1).sum()

    graph, start, rest = nnx.split(Small(), nnx.Param, ...)
    parameters = (start, head)
    speed = jax.tree.map(jnp.zeros_like, parameters)
    order = np.random.default_rng([0, 3, 0]).permutation(len(train.rows))
    for first in range(0, len(order), 13):
        slope = jax.grad(plain)(parameters, order[first : first + 13])
        speed = jax.tree.map(lambda old, new: 0.9 * old + new, speed, slope)
        parameters = jax.tree.map(lambda old, change: old - 2e-3 * change, parameters, speed)
    np.testing.assert_allclose(learned["head.weight"], parameters[1]["weight"], rtol=1e-4, atol=1e-6)
    found = dict(nnx.to_flat_state(parameters[0]))
    for path, variable in found.items():
        name = "network." + "/".join(map(str, path))
        np.testing.assert_allclose(learned[name], variable[...], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_dropout_is_drawn_by_its_key_in_training_alone() -> None:
    network = PatchTransformer(image_px=PX, patch_px=8, width=8, depth=2, heads=2, dropout=0.5, rngs=nnx.Rngs(0))
    tiles = jnp.asarray(np.random.default_rng(0).normal(size=(3, PX, PX, 3)), jnp.float32)
    one, again, other = (run_parts(training_parts_of(network, jax.random.key(key)), tiles) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(run_parts(parts_of(network), tiles), network(tiles))
    dropped = drop_some(jnp.ones(100_000), 3, key=jax.random.key(0), share=0.1)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((dropped == 0).mean()) == pytest.approx(0.1, abs=0.01)


def test_published_sizes() -> None:
    """Parameters of the published transformer, counted from its layers' sizes by hand."""
    network = nnx.eval_shape(lambda: PatchTransformer(rngs=nnx.Rngs(0)))
    found = sum(int(np.prod(value.shape)) for _, value in nnx.to_flat_state(nnx.state(network, nnx.Param)))
    width, tokens = 64, 23 * 23
    attention = 2 * width + 3 * (width * 256 + 256) + 256 * width + width
    layers = 2 * width + (width * 128 + 128) + (128 * width + width)
    begin, dense = 3 * 13**2 * width + width + tokens * width, tokens * width * 256 + 256 + 256 * 128 + 128
    assert found == begin + 8 * (attention + layers) + 2 * width + dense
    assert baselines.ViTNB().pixels_px == 299
    assert baselines.STnet().backbone == "densenet121"


@pytest.mark.slow
def test_a_block_of_the_transformer_is_its_formula() -> None:
    network = PatchTransformer(image_px=PX, patch_px=8, width=4, depth=1, heads=1, rngs=nnx.Rngs(1))
    block, tokens = network.blocks[0], np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)

    def normed(values: np.ndarray) -> np.ndarray:
        return (values - values.mean(axis=1, keepdims=True)) / np.sqrt(values.var(axis=1, keepdims=True) + 1e-6)

    def dense(layer: nnx.Linear, values: np.ndarray) -> np.ndarray:
        return values @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    queries, keys, values = np.split(dense(block.queries_keys_values, normed(tokens)), 3, axis=1)
    weights = np.exp(queries @ keys.T / 2)
    after = tokens + dense(block.project, weights / weights.sum(axis=1, keepdims=True) @ values)
    gelu = partial(jax.nn.gelu, approximate=False)
    expected = after + gelu(dense(block.contract, gelu(dense(block.expand, normed(after)))))
    np.testing.assert_allclose(block(tokens[None], lambda value, place: value, 0)[0], expected, rtol=1e-4, atol=1e-5)


# --- as models of sections ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(synthetic: Any) -> dict[str, Any]:
    sections = {name: synthetic(n_spots=45, n_genes=12, seed=seed) for seed, name in enumerate("ab")}
    pp.tile(sections)
    pp.embed(sections, "tissue_statistics", fields_of_view=(1.0,))
    return sections


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(replace(STNET, epochs=2), id="stnet"),
        pytest.param(replace(VIT, epochs=2), id="vit_nb", marks=pytest.mark.slow),
    ],
)
def test_fitted_predicted_saved_and_loaded(recipe: Any, cohort: Any, tmp_path: Path) -> None:
    genes = pp.select_genes(cohort, n_top=4)
    model = tl.fit_baseline(cohort, recipe, genes=genes, extractor="tissue_statistics")
    train = cohort["a"]
    tl.predict(train, model)
    before = contract.predictions(train).copy()
    assert np.isfinite(tl.evaluate(train)["nll"]).all()
    loaded = models.load(model.save(tmp_path / "model.stimage"))
    assert loaded.recipe == recipe
    tl.predict(train, loaded)
    np.testing.assert_array_equal(contract.predictions(train).X, before.X)
    assert before.uns["prediction"]["recipe"] == repr(recipe)
    assert before.uns["prediction"]["head"] == recipe.name


@pytest.mark.slow
def test_a_tile_network_is_cross_validated(cohort: Any) -> None:
    fit = partial(tl.fit_baseline, recipe=replace(STNET, epochs=1), extractor="tissue_statistics")
    table = tl.cross_validate(cohort, {"stnet": fit}, genes=pp.select_genes(cohort, n_top=3))
    assert np.isfinite(table.loc[table["metric"] == "nll", "value"]).all()


# --- what is refused ----------------------------------------------------------------------------------


def test_missing_weights_say_where_they_were_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STIMAGE_SD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("stimage_sd.models._weights.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"Found no weights of densenet121.*densenet121\.safetensors"):
        baselines.STnet().fit([section(1)[0]], seed=0)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        baselines.STnet(weights=tmp_path / "none.safetensors").fit([section(1)[0]], seed=0)


def test_networks_that_do_not_fit_are_refused() -> None:
    train, _ = section(1)
    learned = replace(STNET, epochs=1).fit([train], seed=0)
    register("small", Small(), mean=(0.4,) * 3)
    with pytest.raises(ValueError, match=r"normalized by mean and deviation .*'small' that is registered here"):
        STNET.mean(learned, train)
    register("small", Small(), input_size=32)
    with pytest.raises(ValueError, match=r"takes tiles of 32 px, found `pixels_px` of 16.*`pixels_px=32`"):
        STNET.fit([train], seed=0)
    register("color", lambda tiles: tiles.mean(axis=(1, 2)), embedding_size=3)
    with pytest.raises(TypeError, match="'color' is a plain function"):
        replace(STNET, backbone="color").fit([train], seed=0)
    with pytest.raises(KeyError, match="Found no extractor 'densenet'"):
        replace(STNET, backbone="densenet").fit([train], seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(baselines.STnet, epochs=0), "`epochs` of STnet to be an integer of 1 or more"),
        (partial(baselines.STnet, momentum=1.0), "`momentum` of STnet to be at least 0 and under 1, got 1.0"),
        (partial(baselines.STnet, unfreeze="first"), "`unfreeze` of STnet to be one of"),
        (partial(baselines.STnet, learning_rate=0.0), "`learning_rate` of STnet to be above 0, found 0.0"),
        (partial(baselines.ViTNB, target="raw"), "`target` of ViTNB to be one of"),
        (partial(baselines.ViTNB, pixels_px=224), r"multiple of `patch_px`, got 224 and 13.*`pixels_px=221`"),
        (partial(baselines.ViTNB, weights="vit.safetensors"), "Without a `backbone` ViTNB is a network from random"),
        (partial(baselines.ViTNB, dropout=1.0), "`dropout` of ViTNB to be at least 0 and under 1"),
        (partial(baselines.ViTNB, hidden=()), "`hidden` of ViTNB as one positive width or more"),
    ],
)
def test_hyperparameters_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_both_are_known_by_name_and_plain_values(tmp_path: Path) -> None:
    assert recipes()["stnet"] is baselines.STnet
    assert recipes()["vit_nb"](hidden=[6, 5]).hidden == (6, 5)  # as JSON has them
    assert baselines.STnet(weights=tmp_path).weights == str(tmp_path)
    assert all(isinstance(recipe(), Recipe) for recipe in (baselines.STnet, baselines.ViTNB))


@pytest.mark.slow
def test_the_likelihood_of_vit_nb_is_the_heads() -> None:
    train, _ = section(1)
    learned = replace(VIT, epochs=1, learning_rate=1e-30, dropout=0.0).fit([train], seed=0)
    head = {key.removeprefix("head."): jnp.asarray(value) for key, value in learned.items() if key.startswith("head.")}
    r, p = HEADS["paper"].r_and_p(head, jnp.zeros((1, VIT.hidden[-1])))
    expected = -nbinom.logpmf(train.counts.toarray(), np.asarray(r[0], float), np.asarray(p[0], float)).mean()
    assert learned["loss"][0] == pytest.approx(expected, rel=1e-2)
