"""What is done differently on a GPU, run on a CPU: batches of few shapes, two at a time, and steps read one behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stimage_sd.models import _cell_classifier, _extractor, get_extractor, register_extractor
from stimage_sd.models._cell_classifier import CellClassifier
from stimage_sd.nn.accelerator import Queue, one_behind
from stimage_sd.nn.hovernet import HoVerNet, HoVerNetSize
from stimage_sd.pp import _embed


def test_batches_are_padded_to_few_shapes_and_two_are_on_the_device() -> None:
    shapes, now, most, lock = set(), 0, 0, threading.Lock()

    def means(batch: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            shapes.add(batch.shape)
        time.sleep(0.01)
        with lock:
            now -= 1
        return jnp.mean(batch.astype(jnp.float32), axis=1)

    queue = Queue(means)
    batches = [np.random.default_rng(n).integers(0, 256, (n, 7), dtype=np.uint8) for n in range(1, 20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(queue, batches))
    for batch, values in zip(batches, found, strict=True):
        np.testing.assert_allclose(values, batch.mean(axis=1), rtol=1e-6)
    assert shapes == {(n, 7) for n in (1, 2, 4, 8, 16, 32)}
    assert most == 2


def test_a_step_is_read_after_the_next_has_begun() -> None:
    events = []

    def steps() -> Any:
        for number in range(3):
            events.append(f"begin {number}")
            yield number

    for number in one_behind(steps()):
        events.append(f"read {number}")
    assert events == ["begin 0", "begin 1", "read 0", "begin 2", "read 1", "read 2"]
    assert list(one_behind([])) == []


def test_extractor_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, tiles: Any) -> Any:
            return self.layer(tiles).mean(axis=(1, 2))

    tiles = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    register_extractor("small", Small(), input_size=8, embedding_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    here = get_extractor("small")
    assert not here.is_on_accelerator
    assert _embed._batch_size(here, 1000) == 32
    monkeypatch.setattr(_extractor, "on_accelerator", lambda: True)
    register_extractor("small", Small(), input_size=8, embedding_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    there = get_extractor("small")
    assert there.is_on_accelerator
    assert _embed._batch_size(there, 1000) == 128
    assert isinstance(there._run, Queue)
    np.testing.assert_allclose(there(tiles), here(tiles), rtol=1e-5, atol=1e-6)
    register_extractor("function", lambda tiles: tiles.mean(axis=(1, 2)), input_size=8, embedding_size=3)
    assert not get_extractor("function").is_on_accelerator


def test_cells_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    size = HoVerNetSize(width=8, depths=(1, 1, 1, 1), dense=(1, 1), kernel_size=3)
    network = HoVerNet(2, size=size, rngs=nnx.Rngs(0))
    about = {"classes": ("a", "b"), "size": size, "mpp": 0.5, "tile_px": 32}
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 37, 3), dtype=np.uint8)
    expected = CellClassifier.of(network, **about).maps(images)
    monkeypatch.setattr(_cell_classifier, "on_accelerator", lambda: True)
    there = CellClassifier.of(network, **about)
    assert isinstance(there._run, Queue)
    found = there.maps(images)
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * np.abs(two).max())


def test_networks_run_in_bfloat16() -> None:
    extractor = get_extractor("efficientnet_lite0")
    graph, state = nnx.split(extractor.module())
    half = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, jnp.bfloat16), state)
    tiles = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.bfloat16)
    made = jax.eval_shape(lambda state, tiles: nnx.merge(graph, state)(tiles), half, tiles)
    assert made.dtype == jnp.bfloat16


def test_memory_of_a_gpu_is_left_to_others_unless_the_user_says_so() -> None:
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    code = f"import os, stimage_sd; print(os.environ[{name!r}])"
    others = {key: value for key, value in os.environ.items() if key != name}
    for given, expected in (({}, "false"), ({name: "true"}, "true")):
        done = subprocess.run([sys.executable, "-c", code], env=others | given, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
