"""A section predicted by an ensemble of 30 members of 1,522 genes, from embeddings of 2,048 features in memory.

Every side gives, for every tile and gene, the mixture's mean, the members' mean variance, the variance of their means,
and the central 90 % interval of the mixture (at the model's own level: that which covered 90 % of held-out
counts); ours gives the variances' sum, and how strange a tile is, beside them.

- Ours is `stimage_sd.tl.predict`: embeddings standardized and reduced, and the results in the section's table.
- Ours with ``out=``, the layers on disk: they are dask arrays then, and the mean is read back from there.
- The peer runs the same members in torch, one after the other on batches of 256 tiles: a linear layer of 2,048 features
  each, which is ours multiplied out, on embeddings that were standardized beforehand; moments are added up from member
  to member. Its interval is the recurrence of the probabilities from zero upwards, in double precision, over all
  members and cells of the batch at once; cells that are done are left out whenever half of the rest are.
- The same without the interval, for scale.

Tiles have nothing in common, so the peers are run on one batch, of the smallest section, and their
seconds scaled. `mean_off` and its like are the peer's largest difference from ours on that batch, over the sum of
ours there and its mean over all genes and tiles; `bounds_off` is the share of bounds that differ.
`results_mb` and `embeddings_mb` are what our peak memory has to hold: the table's six layers, and what is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import nb_cohort
from benchmarks.compare import OURS, Comparison
from benchmarks.slides import made, needs_bench

N_MEMBERS, BATCH = 30, 256
SIZES = (1_000, 10_000, 100_000)
MOMENTS, BOUNDS = ("mean", "aleatoric", "epistemic"), ("lower", "upper")
TORCH, WITHOUT = "torch, a member at a time", "torch, without the interval"
ON_DISK = "stimage-sd, out="
#: the cohort that the model is fitted on
_FITTED_ON = 2_000
Job = Callable[[], Mapping[str, Any]]


def ours(n_tiles: int, *, on_disk: bool = False) -> Job:
    """Prepare ours: the section in memory, and the model; a few tiles are predicted first, so that it is compiled."""
    from stimage_sd import contract, models, tl

    model = models.load(made("nb_predict.stimage", _write_model))
    embedded = np.array(nb_cohort.features(n_tiles))
    sdata = nb_cohort.section(embedded, None, "slide")
    tl.predict(nb_cohort.section(embedded[:512].copy(), None, "few"), model)

    def job() -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            tl.predict(sdata, model, out=Path(folder) / "layers" if on_disk else None)
            table = contract.predictions(sdata)
            mean = float(table.X.mean(dtype=np.float64))
        return {
            "mean": mean,
            "results_mb": round(sum(values.nbytes for values in (table.X, *table.layers.values())) / 1e6),
            "embeddings_mb": round(embedded.nbytes / 1e6),
        }

    return job


def by_torch(n_tiles: int, *, interval: bool) -> Job:
    """Prepare torch's: a batch standardized as its section is, and the members' layers."""
    try:
        import torch
    except ImportError as error:
        raise needs_bench("torch") from error
    with np.load(made("nb_predict_reference.npz", _write_reference)) as kept:
        reference = dict(kept)
    x = torch.from_numpy(reference.pop("standardized"))
    level = float(reference.pop("level"))
    with np.load(made("nb_predict_layers.npz", _write_layers)) as kept:
        weight, bias = (torch.from_numpy(kept[name]) for name in ("weight", "bias"))

    def job() -> Mapping[str, Any]:
        found = _members(torch, x, weight, bias, level=level if interval else None)
        off = {
            f"{name}_off": float((np.abs(found[name].numpy() - expected) / (expected + expected.mean())).max())
            for name, expected in reference.items()
            if name in MOMENTS
        }
        figures = {**off, "times": n_tiles / len(x)}
        if interval:
            figures["bounds_off"] = float(np.mean([found[name].numpy() != reference[name] for name in BOUNDS]))
        return figures

    return job


def _members(torch: Any, x: Any, weight: Any, bias: Any, *, level: float | None) -> dict[str, Any]:
    """Moments, and the interval where a level is given."""
    n_members = len(weight)
    shape = (len(x), weight.shape[2] // 2)
    mean, square, aleatoric = torch.zeros(3, *shape, dtype=torch.float64)
    kept = []
    for member in range(n_members):
        r_logits, p_logits = torch.addmm(bias[member], x, weight[member]).chunk(2, dim=1)
        r, p = torch.nn.functional.softplus(r_logits), torch.sigmoid(p_logits)
        own = r * (1 - p) / p
        mean += own
        square += own.double() ** 2
        aleatoric += own / p
        if level is not None:
            kept.append((r, p))
    mean, square, aleatoric = mean / n_members, square / n_members, aleatoric / n_members
    found = {"mean": mean, "aleatoric": aleatoric, "epistemic": (square - mean**2).clamp(min=0)}
    if level is not None:
        r, p = (torch.stack(each).double().reshape(n_members, -1) for each in zip(*kept, strict=True))
        lower, upper = _interval(torch, r, p, (1 - level) / 2)
        found |= {"lower": lower.reshape(shape), "upper": upper.reshape(shape)}
    return found


def _interval(torch: Any, r: Any, p: Any, tail: float) -> tuple[Any, Any]:
    """Bounds of the mixtures, by the recurrence from zero upwards."""
    term = torch.exp(r * torch.log(p)) / len(r)
    total = term.sum(dim=0)
    lower, upper = torch.zeros(2, r.shape[1])
    cells, q, count = torch.arange(r.shape[1]), 1 - p, 0
    while True:
        lower[cells[total < tail]] = count + 1
        going = total < 1 - tail
        upper[cells[going]] = count + 1
        left = int(going.sum())
        if left == 0:
            return lower, upper
        if left < 0.5 * len(cells):
            term, total, r, q, cells = term[:, going], total[going], r[:, going], q[:, going], cells[going]
        count += 1
        term = term * (q * (r + (count - 1)) / count)
        total = total + term.sum(dim=0)


def _write_model(path: Path) -> None:
    from stimage_sd import tl

    model = tl.fit_nb(
        nb_cohort.cohort(_FITTED_ON), genes=nb_cohort.GENES, extractor=nb_cohort.EXTRACTOR, n_members=N_MEMBERS,
        max_epochs=6, exposure=None,
    )  # fmt: skip
    model.save(path)


def _write_layers(path: Path) -> None:
    """Each member as one layer from standardized embeddings to its logits."""
    from stimage_sd import models

    model = models.load(made("nb_predict.stimage", _write_model))
    basis, weight = model.patterns.basis.astype(np.float64), model.parameters["weight"].astype(np.float64)
    weight = np.matmul(basis, weight)
    bias = model.parameters["bias"] - np.matmul(model.patterns.center[:, None, :], weight)[:, 0]
    weight = np.matmul(model.features.components.astype(np.float64), weight)
    np.savez(path, weight=weight.astype(np.float32), bias=bias.astype(np.float32))


def _write_reference(path: Path) -> None:
    """Ours on the first batch of the smallest section, and its embeddings as that section standardizes them."""
    from stimage_sd import contract, models, tl

    model = models.load(made("nb_predict.stimage", _write_model))
    embedded = np.array(nb_cohort.features(SIZES[0]))
    sdata = nb_cohort.section(embedded, None, "slide")
    tl.predict(sdata, model)
    table = contract.predictions(sdata)[:BATCH]
    layers = {"mean": table.X, **{name: table.layers[name] for name in table.layers}}
    standardized = model.features.standardized(embedded)[:BATCH]
    np.savez(path, standardized=standardized, level=model.interval_level, **layers)


WORK = Comparison(
    title="Predicting with 30 members, 1,522 genes",
    unit="tiles",
    sizes=SIZES,
    sides={
        OURS: ours,
        ON_DISK: partial(ours, on_disk=True),
        TORCH: partial(by_torch, interval=True),
        WITHOUT: partial(by_torch, interval=False),
    },
    reach={TORCH: 3.0},
    target=SIZES[-1],
)
