"""Members on several devices: the same model and the same predictions as on one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from stimage_sd.nn.sharding import member_devices, shard_members

RUN = """
    import sys
    import jax, numpy as np, scipy.sparse as sp
    from stimage_sd.models._features import FeatureSpace
    from stimage_sd.models._nb import NBModel
    from stimage_sd.likelihood.heads import HEADS
    from stimage_sd.nn.sharding import member_devices, shard_members
    from stimage_sd.tl._fit.training import TrainingData, train

    random = np.random.default_rng(0)
    out = {"n_devices": len(jax.devices())}
    for head, own, n_members in (("paper", True, 6), ("dispersion", False, 8)):
        n_tiles, n_genes, n_features = 120, 31, 12
        features = random.normal(size=((n_members, n_tiles, n_features) if own else (n_tiles, n_features)))
        counts = sp.csr_matrix(random.negative_binomial(2, 0.3, (n_tiles, n_genes)))
        held_out = np.arange(n_tiles)[None] % n_members == np.arange(n_members)[:, None]
        weight = np.where(held_out, 0, random.integers(0, 3, held_out.shape)).astype(np.float32)
        data = TrainingData(features.astype(np.float32), counts, np.ones(n_tiles, np.float32), weight, held_out)
        initial = HEADS[head].initial(jax.random.key(0), np.full(n_genes, 4.0), np.full(n_genes, 2.0), n_members,
                                      n_features)
        placed = shard_members(initial)
        assert len(placed["weight"].sharding.device_set) == len(member_devices(n_members))
        fitted, history = train(head, placed, data, max_epochs=3, batch_size=32, learning_rate=0.03,
                                weight_decay=10.0, patience=4, seed=0)
        name = f"{head}-{n_members}"
        out[f"{name}-devices"] = len(fitted["weight"].sharding.device_set)
        parameters = {key: np.asarray(value) for key, value in fitted.items()}
        out |= {f"{name}-{key}": value for key, value in parameters.items()}
        out[f"{name}-loss"] = np.array([row["validation_nll"] for row in history])
        model = NBModel(tuple("g%d" % i for i in range(n_genes)), None, None, head, parameters, None)
        if not own:
            for members in (None, [0, 2]):
                r, p = model.r_and_p(features.astype(np.float32), members=members)
                out |= {f"{name}-{members}-r": r, f"{name}-{members}-p": p}
    np.savez(sys.argv[1], **out)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "run.py").write_text(textwrap.dedent(RUN))
    processes = {}
    for n_devices in (1, 4):
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}"}
        arguments = [sys.executable, str(folder / "run.py"), str(folder / f"{n_devices}.npz")]
        processes[n_devices] = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    for process in processes.values():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return {n_devices: dict(np.load(Path(folder) / f"{n_devices}.npz")) for n_devices in processes}


@pytest.mark.slow
def test_members_are_spread_over_the_devices(runs: dict[int, dict[str, np.ndarray]]) -> None:
    assert (int(runs[1]["n_devices"]), int(runs[4]["n_devices"])) == (1, 4)
    for name, n_devices in (("paper-6", 3), ("dispersion-8", 4)):  # the largest divisor
        assert int(runs[1][f"{name}-devices"]) == 1
        assert int(runs[4][f"{name}-devices"]) == n_devices


@pytest.mark.slow
def test_models_and_predictions_are_those_of_one_device(runs: dict[int, dict[str, np.ndarray]]) -> None:
    one, four = runs[1], runs[4]
    assert one.keys() == four.keys()
    compared = [name for name in one if not name.endswith("devices")]
    assert len(compared) == 3 + 4 + 4
    for name in compared:
        # a device's share is a smaller matrix product, whose terms the compiler adds up in another order
        np.testing.assert_allclose(four[name], one[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_one_device_is_left_alone() -> None:
    arrays = {"weight": np.ones((10, 2, 3)), "bias": np.ones((10, 3))}
    if len(jax.local_devices()) == 1:
        assert all(shard_members(arrays)[name] is array for name, array in arrays.items())
    assert 10 % len(member_devices(10)) == 0
