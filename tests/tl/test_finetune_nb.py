from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse, stats

from stimage_sd import contract, models, pl, pp, tl
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models import _extractors
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._split_network import Trained
from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean, relu
from stimage_sd.nn.parts import Part, parts_of, run_parts
from stimage_sd.stream.driver import run_over_tiles
from stimage_sd.tl._fit import finetuning as _finetuning
from stimage_sd.tl._fit.checkpoint import read_named, write_state
from stimage_sd.tl._fit.finetuning import Batch, Finetuning, PixelData, Scales, Settings
from stimage_sd.tl._fit.tile_store import TileStore

PX = 16


class Small(nnx.Module):
    """Two convolutions, each a part."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.first = ConvNorm(3, 8, 3, stride=2, padding=1, epsilon=1e-3, rngs=rngs)
        self.second = ConvNorm(8, 24, 3, stride=2, padding=1, epsilon=1e-3, rngs=rngs)

    def parts(self) -> list[Part]:
        return [
            Part((self.first,), lambda tiles: relu(conv_norm(tiles, self.first))),
            Part((self.second,), lambda value: global_mean(relu(conv_norm(value, self.second)))),
        ]

    def __call__(self, tiles):
        return run_parts(self.parts(), tiles)


class Whole(nnx.Module):
    """A network that does not say what its parts are."""

    def __init__(self) -> None:
        self.layer = ConvNorm(3, 24, 3, padding=1, epsilon=1e-3, rngs=nnx.Rngs(0))

    def __call__(self, tiles):
        return global_mean(conv_norm(tiles, self.layer))


def register(name: str, network: nnx.Module, **changes: object) -> None:
    settings = {"input_size": PX, "embedding_size": 24, "mean": (0.7, 0.5, 0.7), "std": (0.2, 0.2, 0.2)}
    models.register_extractor(name, network, **(settings | changes))


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(_extractors, "_entries", dict(_extractors._entries))
    monkeypatch.setattr(_extractors, "_built", {})
    register("small", Small())


@pytest.fixture(scope="module")
def cohort(synthetic):
    sections = {}
    for seed, name in enumerate(("a", "b", "c")):
        sections[name] = synthetic(n_spots=45, n_genes=12, seed=seed)
        pp.tile(sections[name])
    return sections


@pytest.fixture(scope="module")
def genes(cohort):
    return pp.select_genes(cohort, n_top=4)


OPTIONS = {
    "extractor": "small", "n_components": 8, "batch_size": 32, "micro_batch_size": 8, "validation": ["c"],
    "learning_rate": 3e-3, "max_epochs": 3, "exposure": None,
}  # fmt: skip


def same(one: models.FinetunedModel, other: models.FinetunedModel) -> None:
    assert one.training["history"] == other.training["history"]
    assert one.interval_level == other.interval_level
    for key, array in one.parameters.items():
        np.testing.assert_array_equal(array, other.parameters[key])
    for key, array in one.features.arrays().items():
        np.testing.assert_array_equal(array, other.features.arrays()[key])
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(model.network))) for model in (one, other))
    for key, variable in ours.items():
        np.testing.assert_array_equal(variable[...], theirs[key][...])


@pytest.fixture(scope="module")
def fitted(cohort, genes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extractors, "_entries", dict(_extractors._entries))
        patch.setattr(_extractors, "_built", {})
        register("small", Small())
        return tl.finetune_nb(cohort, genes=genes, **OPTIONS)


def test_training_lowers_the_validation_loss(fitted):
    history = fitted.history
    assert history["epoch"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(history[["training_nll", "validation_nll"]]).all(axis=None)
    assert history["validation_nll"].min() < history["validation_nll"][0]
    assert fitted.training["metrics"]["validation_nll"] == [history["validation_nll"].min()]


def test_losses_of_fine_tuning_are_drawn(fitted):
    ax = pl.training(fitted)
    (mean,) = [drawn for drawn in ax.lines if drawn.get_label() == "validation, mean"]
    np.testing.assert_array_equal(mean.get_xydata(), fitted.history[["epoch", "validation_nll"]])
    assert ax.get_title() == f"1 member, {len(fitted.genes)} genes, head {fitted.head!r}"


def test_only_the_last_stage_changes(fitted):
    before = Small()
    for name in ("kernel", "scale", "bias"):
        np.testing.assert_array_equal(getattr(fitted.network.first, name)[...], getattr(before.first, name)[...])
        assert np.abs(getattr(fitted.network.second, name)[...] - getattr(before.second, name)[...]).max() > 1e-4
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(getattr(fitted.network.second, name)[...], getattr(before.second, name)[...])


@pytest.mark.parametrize("unfreeze", ["all", None])
def test_all_or_nothing_of_the_network_can_be_trained(unfreeze, cohort, genes):
    model = tl.finetune_nb(cohort, genes=genes, unfreeze=unfreeze, **(OPTIONS | {"max_epochs": 1, "patience": 5}))
    changed = [
        not np.array_equal(after[...], before[...])
        for (_, after), (_, before) in zip(
            *(nnx.to_flat_state(nnx.state(network, nnx.Param)) for network in (model.network, Small())), strict=True
        )
    ]
    best = model.training["metrics"]["best_epoch"] == [1]
    assert all(changed) if unfreeze == "all" and best else not any(changed)
    assert len(model.history) == 2


def test_interrupted_run_goes_on_to_the_same_result(fitted, cohort, genes, tmp_path, monkeypatch):
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 16:  # some 88 tiles are 11 micro-batches an epoch: in the middle of the second
            raise KeyboardInterrupt
        return _original(*args, **kwargs)

    _original = _finetuning.augment
    monkeypatch.setattr(_finetuning, "augment", stopping)
    with pytest.raises(KeyboardInterrupt):
        tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path / "run", **OPTIONS)
    monkeypatch.setattr(_finetuning, "augment", _original)
    assert len(calls) == 16
    trained = []
    monkeypatch.setattr(_finetuning.Finetuning, "run_epoch", _counted(_finetuning.Finetuning.run_epoch, trained))
    again = tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path / "run", **OPTIONS)
    assert trained == [2, 3]
    same(fitted, again)
    same(again, tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path / "run", **OPTIONS))
    assert trained == [2, 3]


def _counted(method, epochs):
    def counting(self, *args, epoch, **kwargs):
        epochs.append(epoch)
        return method(self, *args, epoch=epoch, **kwargs)

    return counting


def test_run_can_be_lengthened(fitted, cohort, genes, tmp_path):
    tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path, **(OPTIONS | {"max_epochs": 1}))
    longer = tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path, **OPTIONS)
    same(fitted, longer)
    with pytest.raises(ValueError, match=r"run that differs in seed\."):
        tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path, seed=1, **OPTIONS)
    (tmp_path / "state.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"state\.safetensors is damaged.*starts over"):
        same(fitted, tl.finetune_nb(cohort, genes=genes, checkpoint=tmp_path, **OPTIONS))


@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
def test_a_damaged_checkpoint_is_told_and_counts_as_none(damage, tmp_path):
    tree, named = {"a": np.arange(6.0, dtype=np.float32)}, {"b": np.ones((2, 3), np.float32)}
    write_state(tmp_path, tree, named=named, about={"epoch": 3}, run={"seed": 0})
    kept = read_named(tmp_path, run={"seed": 0})
    assert kept is not None
    np.testing.assert_array_equal(kept[0]["b"], named["b"])
    assert kept[1] == {"epoch": 3}
    file = tmp_path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes({"empty": b"", "cut": content[:-8], "changed": content}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert read_named(tmp_path, run={"seed": 0}) is None


def test_prediction_follows_from_pixels_and_weights(fitted, cohort, genes):
    section = cohort["c"]
    tl.predict(section, fitted)
    table = contract.tiles(section)
    keep = table.obs["keep"].to_numpy()
    pp.embed(section, fitted.extractor, fields_of_view=(1.0,), context_rings=0)
    values = contract.embeddings(section, fitted.extractor.name)[keep].astype(np.float64)
    standardized = (values - values.mean(axis=0)) / np.where(values.std(axis=0) > 1e-6, values.std(axis=0), np.inf)
    logits = standardized @ fitted.features.components @ fitted.parameters["weight"][0] + fitted.parameters["bias"][0]
    r_logits, p_logits = np.split(logits, 2, axis=1)
    r, p = np.log1p(np.exp(r_logits)), 1 / (1 + np.exp(-p_logits))
    predicted = section.tables["predictions"]
    np.testing.assert_allclose(predicted.X, stats.nbinom.mean(r, p), rtol=1e-3)
    np.testing.assert_allclose(predicted.layers["total_variance"], stats.nbinom.var(r, p), rtol=1e-3)
    assert predicted.uns["prediction"]["fine_tuned"] == "last_stage"


def test_network_predicts_as_its_validation_saw_it(fitted, cohort):
    section = cohort["c"]
    opened = fitted.open(section, section="c")
    r, p = opened.r_and_p(slice(None))
    rows, counts = contract.align_to_spots(section, contract.tiles(section)[contract.tiles(section).obs["keep"]])
    measured = counts[:, list(fitted.genes)].X.toarray()
    found = -stats.nbinom.logpmf(measured, r[0][rows].astype(float), p[0][rows].astype(float)).mean()
    assert found == pytest.approx(fitted.history["validation_nll"].min(), abs=2e-3)


def test_model_is_the_same_after_saving(fitted, cohort, tmp_path):
    loaded = models.load(fitted.save(tmp_path / "model.stimage"))
    same(fitted, loaded)
    assert loaded.tiles == fitted.tiles
    assert loaded.facts() == fitted.facts()
    assert "fine-tuned: " in loaded.facts()["network"]
    one, other = (model.open(cohort["a"], section="a") for model in (fitted, loaded))
    for ours, theirs in zip(one.r_and_p(slice(0, 9)), other.r_and_p(slice(0, 9)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(one.strangeness, other.strangeness)


def test_loading_needs_the_network_that_was_trained(fitted, tmp_path):
    path = fitted.save(tmp_path / "model")
    del _extractors._entries["small"]
    with pytest.raises(ValueError, match="extractor 'small', which is not registered here"):
        models.load(path)
    register("small", Whole())
    with pytest.raises(ValueError, match="do not fit the network of the extractor 'small': 15 arrays differ"):
        models.load(path)
    register("small", Small(), mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"with .*'mean': \[0.7, 0.5, 0.7\].*registered here has"):
        models.load(path)


def test_tiles_of_another_size_are_refused(fitted, synthetic):
    section = synthetic(n_spots=45, n_genes=12, seed=0)
    with pytest.raises(KeyError, match="tile"):
        fitted.open(section, section="new")
    pp.tile(section, size_um=2 * fitted.tiles.size_um)
    with pytest.raises(ValueError, match=r"Section 'new' does not match: tiles of .* µm, expected"):
        fitted.open(section, section="new")


# --- the step itself ----------------------------------------------------------------------------------


@pytest.fixture
def step(tmp_path):
    """A small problem in memory: a `Finetuning` of the whole network, its state and all tiles."""
    random = np.random.default_rng(0)
    store = TileStore(tmp_path / "tiles", n_tiles=10, side_px=PX)
    tiles = random.integers(0, 256, (10, PX, PX, 3), dtype=np.uint8)
    (tmp_path / "tiles").write_bytes(tiles.tobytes())
    counts = random.poisson(3, (10, 2))
    extractor = models.get_extractor("small")
    held_out = np.arange(10) >= 7
    data = PixelData(store, np.zeros(10, int), sparse.csr_matrix(counts), np.ones(10, np.float32), held_out)
    space = FeatureSpace.fit({"a": extractor(tiles)}, n_components=3, standardize="cohort", seed=0)
    settings = Settings("paper", "all", False, 7, 2, 1e-2, 1e-2, 5.0, 0)
    head = HEADS["paper"].initial(jax.random.key(0), counts.mean(axis=0), np.ones(2), 1, 3)
    return Finetuning(extractor, space, data, settings), head, tiles, counts, space, data


def test_micro_batches_with_checkpoints_add_up_to_the_plain_gradient(step):
    tuning, head, tiles, counts, space, data = step
    rows = np.flatnonzero(~data.held_out)
    scales = Scales(jnp.asarray(space.mean[None]), jnp.asarray(1 / space.deviation[None]))
    trained = Trained(tuning.initial_network, head)
    total = jax.tree.map(jnp.zeros_like, trained), jnp.zeros(())
    for batch in tuning._micro_batches(rows, epoch=1, number=0):
        assert isinstance(batch, Batch)
        assert len(batch.inputs) == 2
        total = tuning._add_gradient(total, trained, tuning._split.rest, scales, batch)

    def plain(network: nnx.Module, head: dict) -> jax.Array:
        normalized = (jnp.asarray(tiles[rows], jnp.float32) / 255 - jnp.array([0.7, 0.5, 0.7])) / 0.2
        inputs = ((network(normalized) - space.mean) / space.deviation) @ space.components
        return -HEADS["paper"].log_prob(head, inputs, jnp.asarray(counts[rows], jnp.float32), jnp.ones(len(rows))).sum()

    network = Small()
    np.testing.assert_allclose(total[1], plain(network, head), rtol=1e-5)
    expected = nnx.to_flat_state(nnx.jit(nnx.grad(plain))(network, head))
    for (path, found), (_, wanted) in zip(nnx.to_flat_state(total[0].network), expected, strict=True):
        scale = np.abs(wanted[...]).max()
        np.testing.assert_allclose(found[...], wanted[...], rtol=1e-3, atol=1e-4 * scale, err_msg=str(path))
    slopes = nnx.jit(nnx.grad(plain, argnums=1))(network, head)
    for name, slope in slopes.items():
        np.testing.assert_allclose(total[0].head[name], slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max())


@pytest.mark.parametrize(
    ("name", "n_parts"), [*(("efficientnet_lite0", n_parts) for n_parts in (0, 3, 4)), ("efficientnet_lite2", 3)]
)
def test_frozen_parts_run_as_the_extractor_does(name, n_parts):
    extractor = models.get_extractor(name)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    value = jnp.asarray(extractor.first_parts(n_parts)(tiles))
    rest = parts_of(extractor.module())[n_parts:]
    expected = extractor(tiles)
    np.testing.assert_allclose(run_parts(rest, value), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_store_gives_the_tiles_that_the_stream_cuts(cohort, tmp_path):
    section = cohort["a"]
    pyramid = contract.levels(section, contract.working_image_name(section))
    centers = np.asarray(contract.tiles(section).obsm["spatial"])
    side = float(contract.tiling(section)["side_px"])
    store = TileStore(tmp_path / "tiles", n_tiles=len(centers) + 2, side_px=PX)
    store.cut(pyramid, centers, side=side, first=2, label="a")
    expected = run_over_tiles(pyramid, centers, lambda tiles: tiles, sides=[side], target=PX, key="plain")[:, 0]
    chosen = np.random.default_rng(0).permutation(len(centers))[:20]
    np.testing.assert_array_equal(store.read(chosen + 2), expected[chosen])
    assert not store.read(np.array([0, 1])).any()


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"unfreeze": "first"}, ValueError, "`unfreeze` to be"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` to be positive"),
        ({"micro_batch_size": 0}, ValueError, "`micro_batch_size` of at least 1"),
        ({"input_px": 32}, ValueError, r"the network's input size \(16\), found 32"),
        ({"genes": ["none"]}, KeyError, "absent from section 'a'"),
        ({"extractor": "color"}, TypeError, "'color' is a plain function"),
        ({"extractor": "whole"}, ValueError, "defines no stages"),
    ],
)
def test_bad_options_are_refused(changes, error, message, cohort, genes):
    register("color", lambda tiles: tiles.mean(axis=(1, 2)), embedding_size=3)
    register("whole", Whole())
    with pytest.raises(error, match=message):
        tl.finetune_nb(cohort, **(OPTIONS | {"genes": genes} | changes))
