"""Rows of `benchmarks.gpu`: HoVer-Net, and epochs of Hist2ST and IGI-DL; see `benchmarks.gpu_rows`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from benchmarks.gpu import ROOT
from benchmarks.gpu_timing import Found, device, host, median_seconds

N_TYPES = 5


# --------------------------------------------------------------------------------------------------
# HoVer-Net


def _hovernet_size(tiny: bool) -> tuple[int, tuple[int, ...], tuple[int, int], int]:
    """Return width, depths and units of a decoder, and tiles per batch."""
    return (8, (1, 1, 1, 1), (1, 1), 1) if tiny else (64, (3, 4, 6, 3), (8, 4), 8)


def hovernet_ours(tiny: bool, given: Found) -> Found:
    """Run and train our network."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from stimage_sd.nn.hovernet import HoVerNet, HoVerNetSize, as_trained, n_parameters

    width, depths, dense, batch = _hovernet_size(tiny)
    size: Any = HoVerNetSize(width, depths, dense, 5, "valid", pad_stem=False)  # type: ignore[arg-type]
    network = HoVerNet(N_TYPES, size=size, rngs=nnx.Rngs(0))
    split: Any = nnx.split(network, nnx.Param, ...)
    graph, parameters, statistics = split
    pictures = np.random.default_rng(0).random((batch, 270, 270, 3), dtype=np.float32)

    @jax.jit
    def maps(state: Any, pictures: Any) -> Any:
        return sum(jnp.abs(one.astype(jnp.float32)).mean() for one in nnx.merge(graph, *state)(pictures)[:3])

    @jax.jit
    def trained(parameters: Any, statistics: Any, pictures: Any) -> Any:
        def loss(parameters: Any) -> Any:
            made = nnx.merge(graph, parameters, statistics, copy=True)(pictures, as_trained)[:3]
            return sum((one**2).mean() for one in made)

        gradient = jax.grad(loss)(parameters)
        return jax.tree.map(lambda value, slope: value - 1e-4 * slope, parameters, gradient)

    seconds, repeats = {}, 1 if tiny else 5
    for name, kind in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        state = jax.device_put(jax.tree.map(lambda array, kind=kind: array.astype(kind), (parameters, statistics)))
        given_pictures = jax.device_put(pictures.astype(kind))
        run = lambda state=state, pictures=given_pictures: host(maps(state, pictures))
        seconds[f"maps, {name}, one tile"] = median_seconds(run, repeats=repeats) / batch
    state, given_pictures = jax.device_put((parameters, statistics)), jax.device_put(pictures)
    step = lambda: jax.block_until_ready(trained(*state, given_pictures))
    seconds["training step, float32, one tile"] = median_seconds(step, repeats=repeats) / batch
    return {"seconds": seconds, "figures": {"parameters": n_parameters(network)}}


def hovernet_torch(tiny: bool, given: Found) -> Found:
    """Run and train the network in torch that the parity tests compare with."""
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    hovernet_reference: Any = importlib.import_module("hovernet_reference")

    hovernet_reference.N_TYPES = N_TYPES
    width, depths, dense, batch = _hovernet_size(tiny)
    on, seconds, repeats = device(), {}, 1 if tiny else 5
    pictures = torch.rand(batch, 3, 270, 270)
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        network = hovernet_reference.HoVerNet(width, depths, dense, 5, False, False).eval()
        network = network.to(on, kind, memory_format=torch.channels_last)
        given_pictures = pictures.to(on, kind, memory_format=torch.channels_last)

        def maps(network: Any = network, pictures: Any = given_pictures) -> float:
            with torch.inference_mode():
                return host(sum(one.float().abs().mean() for one in network(pictures)))

        seconds[f"maps, {name}, one tile"] = median_seconds(maps, repeats=repeats) / batch
    network = hovernet_reference.HoVerNet(width, depths, dense, 5, False, False).train()
    network = network.to(on, memory_format=torch.channels_last)
    given_pictures = pictures.to(on, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss: Any = sum(one.square().mean() for one in network(given_pictures))
        loss.backward()
        optimizer.step()
        host(loss)

    seconds["training step, float32, one tile"] = median_seconds(step, repeats=repeats) / batch
    count = sum(parameter.numel() for parameter in network.parameters())
    return {"seconds": seconds, "figures": {"parameters": count}}


# --------------------------------------------------------------------------------------------------
# networks of the baselines


def _section_size(tiny: bool) -> tuple[int, int, int]:
    """Return the number of sections, of spots in each and of genes."""
    return (1, 12, 7) if tiny else (3, 180, 785)


def _sections(tiny: bool, side: int) -> Any:
    import scipy.sparse as sp

    from stimage_sd.models import TrainingSection

    n_sections, n_spots, n_genes = _section_size(tiny)
    random, made = np.random.default_rng(0), []
    for _ in range(n_sections):
        pixels = random.integers(0, 256, (n_spots, side, side, 3), dtype=np.uint8)
        places = np.stack(np.divmod(np.arange(n_spots), 14), axis=1) * 200.0
        counts = sp.csr_matrix(random.poisson(1.0, (n_spots, n_genes)).astype(np.float32))
        totals = np.asarray(counts.sum(axis=1)).ravel()
        made.append(TrainingSection((), places, np.arange(n_spots), counts, totals, pixels=pixels))
    return made


def _epoch_of(recipe: Any, tiny: bool) -> float:
    from benchmarks.epochs import time_epochs

    return time_epochs(recipe, _sections(tiny, recipe.pixels_px))[1]


def _n_parameters(network: Any) -> int:
    import jax
    from flax import nnx

    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def _hist2st(tiny: bool) -> Any:
    from stimage_sd.baselines import Hist2ST

    return Hist2ST(channels=8, depths=(1, 1, 2), heads=2, pixels_px=28, copies=2) if tiny else Hist2ST()


def hist2st_ours(tiny: bool, given: Found) -> Found:
    """Train our network."""
    from flax import nnx

    recipe = _hist2st(tiny)
    network = nnx.eval_shape(lambda: recipe._make(_section_size(tiny)[2], nnx.Rngs(0)))
    return {"seconds": {"epoch": _epoch_of(recipe, tiny)}, "figures": {"parameters": _n_parameters(network)}}


def hist2st_torch(tiny: bool, given: Found) -> Found:
    """Train the same layers in torch, a section per step."""
    import torch

    from benchmarks import gpu_torch

    recipe, (n_sections, n_spots, n_genes), on = _hist2st(tiny), _section_size(tiny), device()
    network = gpu_torch.Hist2ST(
        n_genes, patch_px=recipe.pixels_px, channels=recipe.channels, depths=recipe.depths, heads=recipe.heads,
        dropout=recipe.dropout,
    ).to(on)  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    pixels = torch.randint(0, 256, (n_sections, n_spots, 3, recipe.pixels_px, recipe.pixels_px), dtype=torch.uint8)
    places = torch.stack([torch.arange(n_spots) // 14, torch.arange(n_spots) % 14], dim=1).to(on)
    counts = torch.poisson(torch.ones(n_sections, n_spots, n_genes))
    graph = torch.softmax(torch.rand(n_spots, n_spots), dim=1)

    def epoch() -> None:
        for section in range(n_sections):
            batch = {
                "pixels": pixels[section].to(on).float() / 255, "places": places, "graph": graph.to(on),
                "counts": counts[section].to(on), "target": counts[section].to(on).log1p(),
            }  # fmt: skip
            optimizer.zero_grad()
            loss = gpu_torch.hist2st_loss(
                network, batch, copies=recipe.copies, zinb=recipe.zinb, distillation=recipe.distillation
            )
            loss.backward()
            optimizer.step()
            host(loss)

    seconds = median_seconds(epoch, repeats=1 if tiny else 3)
    # the second bias of the gates of the two recurrent layers
    twice = 2 * 4 * network.genes.in_features
    count = sum(parameter.numel() for parameter in network.parameters()) - twice
    return {"seconds": {"epoch": seconds}, "figures": {"parameters": count}}


def _igidl(tiny: bool) -> Any:
    from stimage_sd.baselines import IGIDL

    small = IGIDL(
        graph_width=8, fusion=(16, 8), n_nuclei=8, n_neighbors=2, batch_size=8, micro_batch_size=4, pixels_px=64
    )
    return small if tiny else IGIDL()


def igidl_ours(tiny: bool, given: Found) -> Found:
    """Train our network."""
    from flax import nnx

    recipe = _igidl(tiny)
    network = nnx.eval_shape(lambda: recipe._make(_section_size(tiny)[2], nnx.Rngs(0)))
    return {"seconds": {"epoch": _epoch_of(recipe, tiny)}, "figures": {"parameters": _n_parameters(network)}}


def igidl_torch(tiny: bool, given: Found) -> Found:
    """Train the same layers in torch, in the same micro-batches, and evaluate the held-out fifth."""
    import torch

    from benchmarks import gpu_torch

    recipe, (n_sections, n_spots, n_genes), on = _igidl(tiny), _section_size(tiny), device()
    network: Any = gpu_torch.IGIDL(
        n_genes, graph_width=recipe.graph_width, fusion=recipe.fusion, dropout=recipe.dropout
    )
    network = network.to(on, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    n_tiles, nodes = n_sections * n_spots, recipe.n_nuclei
    pixels = torch.randint(0, 256, (n_tiles, 3, recipe.pixels_px, recipe.pixels_px), dtype=torch.uint8)
    features = torch.randn(n_tiles, nodes, gpu_torch.N_FEATURES)
    present, edges = torch.rand(n_tiles, nodes) < 0.5, torch.rand(n_tiles, nodes, nodes) < 5 / nodes
    target = torch.randn(n_tiles, n_genes)
    n_training = int(0.8 * n_tiles)

    def predicted(rows: Any) -> Any:
        shown = pixels[rows].to(on, memory_format=torch.channels_last).float() / 255
        return network(shown, *(values[rows].to(on) for values in (features, present, edges)))

    def epoch() -> None:
        network.train()
        for step in torch.randperm(n_training).split(recipe.batch_size):
            optimizer.zero_grad()
            for rows in step.split(recipe.micro_batch_size):
                if len(rows) > 1:
                    loss = (predicted(rows) - target[rows].to(on)).square().mean()
                    (loss * len(rows) / len(step)).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            host(
                sum(predicted(rows).sum() for rows in torch.arange(n_training, n_tiles).split(recipe.micro_batch_size))
            )

    seconds = median_seconds(epoch, repeats=1 if tiny else 3)
    count = sum(parameter.numel() for parameter in network.parameters())
    return {"seconds": {"epoch": seconds}, "figures": {"parameters": count}}
