"""The rows of `benchmarks.gpu`, each side in a process of its own: ``python -m benchmarks.gpu_rows ROW SIDE GIVEN``.

A side prints one line of JSON: ``seconds`` by case, and ``figures`` that are compared with the other side's.

- ``parity``: the tests of `tests/parity`, our networks on the card against torch's on the CPU, with the same weights.
- ``embedding``: a tile, from bytes on the host to embeddings on the host, in float32 and bfloat16. Ours is the
  extractor as `pp.embed` runs it, from four threads. Torch's is the eager network, channels last, from pinned memory.
- ``fit_nb``: an ensemble to the same validation loss, as in `benchmarks.nb_fit`: ours is the whole call, torch's one
  member times their number, without preparation.
- ``finetune_nb``: an epoch of ResNet-50's last stage and the head, with its validation, on the same number of tiles.
- ``hovernet``: the published network on tiles of 270 px: maps in float32 and bfloat16, and a training step.
- ``hist2st``, ``igidl``: an epoch at the authors' sizes, on random pixels of three sections and 785 genes.

Times are those of steps after the first two, which compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_networks as networks
from benchmarks.gpu import OURS, TORCH
from benchmarks.gpu_timing import Found, device, host, median_seconds

# --------------------------------------------------------------------------------------------------
# what was run on, and parity


def about(tiny: bool, given: Found) -> Found:
    """Return versions and cards."""
    import platform
    from importlib.metadata import version

    import jax
    import torch

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    versions = {"card": " + ".join(names) or "none", "JAX's devices": ", ".join(map(str, jax.devices()))}
    versions |= {"CUDA of torch": str(torch.version.cuda), "Python": platform.python_version()}
    return {"versions": versions | {name: version(name) for name in ("stimage-sd", "jax", "jaxlib", "flax", "torch")}}


def parity(tiny: bool, given: Found) -> Found:
    """Run the parity tests; a failed test fails the row."""
    import pytest

    class Count:
        passed = 0

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.passed += report.when == "call" and report.passed

    os.environ |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "STIMAGE_SD_TORCH_PYTHON": sys.executable}
    count, only = Count(), ["-k", "hovernet"] if tiny else []
    with tempfile.TemporaryDirectory() as folder:
        code = pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/t", *only, "tests/parity"], [count])
    if code:
        raise SystemExit(f"The parity tests ended with {code}.")
    return {"seconds": {}, "figures": {"tests passed": count.passed}}


# --------------------------------------------------------------------------------------------------
# embedding


def _tiles(tiny: bool) -> tuple[np.ndarray, int]:
    """Return tiles and the batch size."""
    count, side, batch = (4, 32, 2) if tiny else (2048, 224, 128)
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8), batch


def _networks() -> Any:
    from benchmarks import embedding, embedding_resnet50

    return {
        "EfficientNet-Lite0": (embedding.Network("efficientnet_lite0", lambda: None, embedding.lite0_in_torch)),
        "ResNet-50": embedding.Network("resnet50", embedding_resnet50.weights, embedding_resnet50.resnet50_in_torch),
    }


def _all(pool: ThreadPoolExecutor, run: Any, parts: list[np.ndarray]) -> list[np.ndarray]:
    return list(pool.map(run, parts))


def embedding_ours(tiny: bool, given: Found) -> Found:
    """Embed tiles by our extractors."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from stimage_sd.models import get_extractor
    from stimage_sd.nn.accelerator import Queue

    tiles, batch = _tiles(tiny)
    parts = [tiles[start : start + batch] for start in range(0, len(tiles), batch)]
    seconds, figures = {}, {}
    for label, network in _networks().items():
        extractor = get_extractor(network.name, weights=network.weights())
        graph, state = nnx.split(extractor.module())
        half = jax.device_put(jax.tree.map(lambda array: array.astype(jnp.bfloat16), state))

        @jax.jit
        def in_half(state: Any, batch: Any, graph: Any = graph, extractor: Any = extractor) -> Any:
            normalized = extractor.normalize(batch).astype(jnp.bfloat16)
            return nnx.merge(graph, state)(normalized).astype(jnp.float32)

        runs: dict[str, Any] = {"float32": extractor, "bfloat16": Queue(partial(in_half, half))}
        for name, run in runs.items():
            with ThreadPoolExecutor(4) as pool:
                took = median_seconds(partial(_all, pool, run, parts), repeats=1 if tiny else 3)
            seconds[f"{label}, {name}, one tile"] = took / len(tiles)
            figures[f"mean of {label}, {name}"] = float(np.mean(run(parts[0])))
    return {"seconds": seconds, "figures": figures}


def embedding_torch(tiny: bool, given: Found) -> Found:
    """Embed tiles by the same networks in torch."""
    import torch

    from stimage_sd.models._extractors import settings

    tiles, batch = _tiles(tiny)
    on = device()
    given_tiles = torch.from_numpy(tiles)
    pixels = given_tiles.pin_memory() if on.type == "cuda" else given_tiles
    seconds, figures = {}, {}
    for label, network in _networks().items():
        about_it = settings(network.name)
        levels, scale = (
            torch.tensor(values, dtype=torch.float32, device=on)
            for values in (255 * np.asarray(about_it["mean"]), 1 / (255 * np.asarray(about_it["std"])))
        )
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            module = network.build().eval().to(on, kind, memory_format=torch.channels_last)

            def embed(start: int, parts: Any = (module, kind, levels, scale)) -> Any:
                module, kind, levels, scale = parts
                part = pixels[start : start + batch].to(on, non_blocking=True)
                normalized = ((part.float() - levels) * scale).to(kind).permute(0, 3, 1, 2)
                return module(normalized).float()

            def everything(embed: Any = embed) -> Any:
                with torch.inference_mode():
                    return torch.cat([embed(start) for start in range(0, len(tiles), batch)]).cpu()

            seconds[f"{label}, {name}, one tile"] = median_seconds(everything, repeats=1 if tiny else 3) / len(tiles)
            figures[f"mean of {label}, {name}"] = float(everything()[:batch].mean())
    return {"seconds": seconds, "figures": figures}


# --------------------------------------------------------------------------------------------------
# heads and fine-tuning


def _nb_size(tiny: bool) -> tuple[int, int]:
    """Return the number of tiles and of members."""
    return (200, 2) if tiny else (2_000, 30)


def fit_nb_ours(tiny: bool, given: Found) -> Found:
    """Fit the ensemble twice; the first compiles."""
    from benchmarks import nb_fit

    n_tiles, nb_fit.N_MEMBERS = _nb_size(tiny)
    job = nb_fit.ours(n_tiles)
    job()
    begin = time.perf_counter()
    found = job()
    seconds = time.perf_counter() - begin
    return {"seconds": {"ensemble": seconds}, "figures": {"validation NLL": found["validation_nll"]}}


def fit_nb_torch(tiny: bool, given: Found) -> Found:
    """Train one member until it is as good as ours, or stops by itself."""
    from benchmarks import nb_fit

    n_tiles, n_members = _nb_size(tiny)
    nb_fit._Loop(n_tiles, device=device()).learn(2)
    loop = nb_fit._Loop(n_tiles, device=device())
    losses: list[float] = []
    begin = time.perf_counter()
    while len(losses) < nb_fit.MAX_EPOCHS:
        loop.learn(loop.n_steps)
        losses.append(loop.validation_loss(1.0))
        if losses[-1] <= given.get("validation NLL", -np.inf) or len(losses) - np.argmin(losses) > nb_fit.PATIENCE:
            break
    seconds = n_members * (time.perf_counter() - begin)
    return {"seconds": {"ensemble": seconds}, "figures": {"validation NLL": min(losses)}}


def _tuning_size(tiny: bool) -> tuple[int, int, int, int]:
    """Return the number of spots and genes, the side of tiles and the batch size."""
    return (40, 5, 32, 8) if tiny else (600, 100, 224, 64)


def finetune_nb_ours(tiny: bool, given: Found) -> Found:
    """Take the difference of runs of one and three epochs, both compiled before."""
    import stimage_sd as sti
    from benchmarks import embedding_resnet50

    n_spots, n_genes, side, batch = _tuning_size(tiny)
    with tempfile.TemporaryDirectory() as folder:
        path = sti.datasets.synthetic_visium(Path(folder) / "run", n_spots=n_spots, n_genes=n_genes)
        section = sti.io.visium(path, image=path / "image.tif")
        sti.pp.tile(section)
        genes = list(sti.pp.select_genes(section, n_top=n_genes))

        def epochs(number: int) -> float:
            begin = time.perf_counter()
            sti.tl.finetune_nb(
                section, genes=genes, extractor="resnet50", weights=embedding_resnet50.weights(), input_px=side,
                augment=False, validation=0.3, batch_size=batch, max_epochs=number,
            )  # fmt: skip
            return time.perf_counter() - begin

        epochs(1)
        one, three = epochs(1), epochs(3)
        n_tiles = section.tables["tiles"].n_obs
    return {"seconds": {"epoch of ResNet-50": (three - one) / 2}, "figures": {"tiles": n_tiles}}


def finetune_nb_torch(tiny: bool, given: Found) -> Found:
    """Train the last stage and a head; all tiles go through the network once more, for the section's means."""
    import torch
    from torch import nn

    from benchmarks import embedding_resnet50

    _, n_genes, side, batch = _tuning_size(tiny)
    n_tiles, on = int(given.get("tiles", 600)), device()
    network = embedding_resnet50.resnet50_in_torch().eval().to(on, memory_format=torch.channels_last)
    network.requires_grad_(False)
    network.layer4.requires_grad_(True)
    head = nn.Linear(2048, 2 * n_genes).to(on)
    optimizer = torch.optim.Adam([*network.layer4.parameters(), *head.parameters()], lr=1e-4)
    pixels = torch.randint(0, 256, (n_tiles, side, side, 3), dtype=torch.uint8)
    counts = torch.poisson(torch.full((n_tiles, n_genes), 2.0)).to(on)
    n_training = int(0.7 * n_tiles)

    def features(rows: Any) -> Any:
        return network(pixels[rows].to(on).permute(0, 3, 1, 2).float() / 255)

    def nll(rows: Any) -> Any:
        r, p = head(features(rows)).chunk(2, dim=1)
        r, y = nn.functional.softplus(r) + 1e-6, counts[rows]
        gammas = torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1)
        return -(gammas + r * nn.functional.logsigmoid(p) + y * nn.functional.logsigmoid(-p)).mean()

    def epoch() -> None:
        for rows in torch.randperm(n_training).split(batch):
            optimizer.zero_grad()
            nll(rows).backward()
            optimizer.step()
        with torch.no_grad():
            host(sum(features(rows).sum() for rows in torch.arange(n_tiles).split(batch)))

    seconds = median_seconds(epoch, repeats=1 if tiny else 2)
    return {"seconds": {"epoch of ResNet-50": seconds}, "figures": {"tiles": n_tiles}}


SIDES: dict[tuple[str, str], Callable[[bool, Found], Found]] = {
    ("about", OURS): about,
    ("parity", OURS): parity,
    ("embedding", OURS): embedding_ours,
    ("embedding", TORCH): embedding_torch,
    ("fit_nb", OURS): fit_nb_ours,
    ("fit_nb", TORCH): fit_nb_torch,
    ("finetune_nb", OURS): finetune_nb_ours,
    ("finetune_nb", TORCH): finetune_nb_torch,
    ("hovernet", OURS): networks.hovernet_ours,
    ("hovernet", TORCH): networks.hovernet_torch,
    ("hist2st", OURS): networks.hist2st_ours,
    ("hist2st", TORCH): networks.hist2st_torch,
    ("igidl", OURS): networks.igidl_ours,
    ("igidl", TORCH): networks.igidl_torch,
}


def main() -> None:
    """Run one side of a row, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("side")
    parser.add_argument("given", type=json.loads)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    found = SIDES[options.row, options.side](options.tiny, options.given)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
