"""Fine-tune a network and its negative-binomial layers on tiles with measured counts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import cache_dir, keep_compiled
from stimage_sd._files import scratch
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import get_extractor
from stimage_sd.models._features import Standardize
from stimage_sd.models._finetuned import FinetunedModel, tile_specification
from stimage_sd.models._nb import HeadName, NBModel
from stimage_sd.models._specification import TileSpecification, check_specification
from stimage_sd.models._split_network import Unfreeze
from stimage_sd.nn.accelerator import on_accelerator
from stimage_sd.tl._fit.finetune_run import Run
from stimage_sd.tl._fit.finetuning import PixelData, Settings
from stimage_sd.tl._fit.fit_nb import check_options
from stimage_sd.tl._fit.held_out_level import with_interval_level
from stimage_sd.tl._fit.seen import check_different
from stimage_sd.tl._fit.tile_store import TileStore
from stimage_sd.tl._fit.training import TrainingData
from stimage_sd.tl._fit.training_set import Spots, checked_genes, held_out_tiles

#: default tiles in memory at a time; a GPU needs more to be busy, and has its own memory
_MICRO_BATCH, _ACCELERATOR_MICRO_BATCH = 8, 64


def finetune_nb(
    data: SpatialData | contract.Cohort,
    *,
    genes: Sequence[str],
    extractor: str | Extractor = "resnet50",
    weights: str | Path | None = None,
    unfreeze: Unfreeze = "last_stage",
    head: HeadName = "paper",
    size_factors: Literal["total"] | None = None,
    exposure: Literal["section"] | None = "section",
    validation: float | Sequence[str] = 0.3,
    patients: Mapping[str, str] | None = None,
    n_components: int = 128,
    standardize: Standardize = "section",
    input_px: int | None = None,
    augment: bool = True,
    max_epochs: int = 10,
    batch_size: int = 64,
    micro_batch_size: int | None = None,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 1e-3,
    weight_decay: float = 30.0,
    patience: int = 3,
    checkpoint: str | Path | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> FinetunedModel:
    """Train a network and its negative-binomial layers end to end on the pixels of tiles on spots.

    First, the head is fitted to the features of the pretrained network, which takes seconds. Then network and head are
    trained together in small steps. Gradients from an untrained head would destroy the pretrained weights. The
    returned model is the epoch with the best validation loss. If no epoch improves it, the network stays pretrained.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts, all tiled in the same way. Embeddings are not needed.
    genes
        Genes to learn. Every section must have measured all of them (`stimage_sd.pp.select_genes`).
    extractor
        Name of a registered extractor whose network is a Flax module, or an `Extractor`.
    weights
        A safetensors file with torchvision or timm names, if the weights are not found automatically.
    unfreeze
        ``"last_stage"``: train the last part of the network (`stimage_sd.nn.parts`), such as the ResNet blocks at the
        lowest resolution. ``"all"``: train the whole network. `None`: train the head only, with augmentation.
    head
        ``"paper"``: r and p per gene and tile, as published. ``"dispersion"``: one mean per gene and tile and one
        dispersion per gene.
    size_factors, exposure, validation, patients, weight_decay, table_key, layer
        As in `fit_nb`. All tiles of a held-out section are used for validation. For an ensemble, fit one model per
        seed and combine them (`stimage_sd.tl.combine`).
    n_components
        Number of principal components of the pretrained network's features. The projection stays fixed during
        training.
    standardize
        ``"section"``: standardize features by the mean and standard deviation of each section. ``"cohort"``: by those
        of all sections together. They are recomputed after each epoch, from at most 512 tiles per section.
    input_px
        Side that tiles are resampled to, px. Default: the input size of the network, or else the size set at tiling.
    augment
        Draw a new variant of every tile in each epoch (`stimage_sd.pp.augment`). Validation uses the original tiles.
        New variants mean that activations of frozen stages are also recomputed in each epoch.
    max_epochs
        Maximum number of epochs.
    batch_size, micro_batch_size
        Tiles per Adam step, and tiles in memory at a time, by default 8, or 64 on a GPU. Gradients are summed over the
        micro-batches of a step.
    learning_rate, head_learning_rate
        Learning rates of Adam for the network and for the head.
    patience
        Number of epochs without a better validation loss after which training stops.
    checkpoint
        Folder for the state, which is written after each epoch. A later call with the same folder resumes after the
        last complete epoch. The result is the same, bit for bit on one machine. `max_epochs` and `patience` may change.
    seed
        Random seed.

    Returns
    -------
    The fitted model.

    Raises
    ------
    KeyError
        If the extractor is unknown, or a section was not tiled or lacks some of the genes.
    TypeError
        If the extractor is a plain function.
    ValueError
        If sections were tiled or stained differently, an option is out of range, or the checkpoint belongs to
        another run.

    Notes
    -----
    Paper, section 2.3: convolutional and negative-binomial layers trained together. Here, batch-normalization
    statistics stay at their pretrained values, since tiles of one section are too similar to estimate them. Scales
    and biases of batch normalization are trained. Activations of trained parts are recomputed for the gradient
    (`jax.checkpoint`), so memory hardly grows with depth. Tiles are cut to a file once (150 kB per tile at 224 px) and
    read one micro-batch at a time.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_finetune", n_spots=40, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> model = sti.tl.finetune_nb(section, genes=genes, extractor="efficientnet_lite0", input_px=32, max_epochs=1)
    >>> len(model.history)
    2
    """
    source = contract.Source(table_key, layer)
    keep_compiled()
    cohort = contract.sections(data)
    if micro_batch_size is None:
        micro_batch_size = _ACCELERATOR_MICRO_BATCH if on_accelerator() else _MICRO_BATCH
    check_options(
        head=head, standardize=standardize, size_factors=size_factors, exposure=exposure,
        n_components=n_components, max_epochs=max_epochs, batch_size=batch_size, micro_batch_size=micro_batch_size,
        patience=patience,
    )  # fmt: skip
    _check_more(unfreeze, learning_rate=learning_rate, head_learning_rate=head_learning_rate, weight_decay=weight_decay)
    network = get_extractor(extractor, weights=weights) if isinstance(extractor, str) else extractor
    network.module()  # raises for a plain function before any data are read
    tiles = _common_tiles(cohort, network, input_px)
    settings = Settings(
        head=head, unfreeze=unfreeze, augment=augment, batch_size=batch_size,
        micro_batch_size=min(micro_batch_size, batch_size), learning_rate=learning_rate,
        head_learning_rate=head_learning_rate, weight_decay=weight_decay, seed=seed,
    )  # fmt: skip
    check_different(cohort, source)
    known = contract.patients(cohort, patients)
    exposure = None if size_factors is not None else exposure
    spots = Spots.read(cohort, checked_genes(cohort, genes, source), size_factors, exposure, source)
    held_out = held_out_tiles(spots.sections, spots.positions, validation, n_members=1, seed=seed, patients=known)
    with scratch(cache_dir() / "finetune") as folder:
        pixels = PixelData(
            tiles=_cut(cohort, spots, tiles, folder / "tiles"),
            section=np.unique(spots.sections, return_inverse=True)[1],
            counts=spots.counts,
            size_factors=spots.factors,
            held_out=held_out[0],
        )
        run = Run(
            network, pixels, settings, n_components, standardize, None if checkpoint is None else Path(checkpoint)
        )
        run.start(_fingerprint(network, tiles, spots, pixels, settings, n_components, standardize))
        run.train(max_epochs=max_epochs, patience=patience)
        reduced, space = run.final_features()
    heads = NBModel(
        genes=spots.genes, tiles=tiles, features=space, head=head,
        parameters={name: np.asarray(array) for name, array in run.best.head.items()}, floor=spots.floor,
        total=spots.total,
        training=spots.record(
            cohort, held_out, run.history, patients=known, source=source, seed=seed,
            options={
                **asdict(settings), "size_factors": size_factors, "exposure": exposure,
                "n_components": n_components, "max_epochs": max_epochs, "patience": patience,
            },
        ),
    )  # fmt: skip
    data_again = TrainingData(reduced, spots.counts, spots.factors, np.zeros(0), held_out)

    def r_and_p(rows: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return heads.r_and_p(reduced[rows], members=members)

    leveled = with_interval_level(heads, r_and_p, data_again, spots.sections, known)
    return FinetunedModel.of(leveled, run.tuning.module(run.best.network))


def _check_more(unfreeze: str | None, **rates: float) -> None:
    if unfreeze not in (None, "last_stage", "all"):
        raise ValueError(f'Expected `unfreeze` to be "last_stage", "all" or None, found {unfreeze!r}.')
    for name, value in rates.items():
        if not (value > 0 or (name == "weight_decay" and value == 0)):
            raise ValueError(f"Expected `{name}` to be positive, found {value}.")


def _common_tiles(cohort: Mapping[str, SpatialData], network: Extractor, input_px: int | None) -> TileSpecification:
    """Return the tile specification shared by all sections, after checking that they agree."""
    if input_px is not None and (input_px < 1 or network.input_size not in (None, input_px)):
        raise ValueError(
            f"Expected `input_px` to be positive and the network's input size ({network.input_size or 'any'}), found "
            f"{input_px}."
        )
    specifications = {}
    for name, sdata in cohort.items():
        contract.check_rgb(sdata, contract.working_image_name(sdata))
        px = input_px or network.input_size or int(contract.tiling(sdata)["target_px"])
        specifications[name] = tile_specification(
            sdata, extractor=network.name, weights_hash=network.weights_hash, input_px=px
        )
    first = next(iter(specifications.values()))
    for name, stated in specifications.items():
        check_specification(stated, first, section=name)
    sizes = [tiles.size_um for tiles in specifications.values() if tiles.size_um is not None]
    return replace(
        first,
        side_px=float(np.mean([tiles.side_px for tiles in specifications.values()])),
        size_um=float(np.mean(sizes)) if len(sizes) == len(specifications) else None,
    )


def _cut(cohort: Mapping[str, SpatialData], spots: Spots, tiles: TileSpecification, path: Path) -> TileStore:
    store = TileStore(path, n_tiles=len(spots.sections), side_px=tiles.input_px)
    first = 0
    for name, sdata in cohort.items():
        here = spots.positions[first : first + len(spots.rows[name])]
        image = contract.working_image_name(sdata)
        store.cut(
            contract.levels(sdata, image),
            here,
            side=contract.tile_geometry(sdata, image_key=image).side,
            first=first,
            label=f"{contract.sample(sdata)}: cutting tiles",
        )
        first += len(here)
    return store


def _fingerprint(
    network: Extractor, tiles: TileSpecification, spots: Spots, pixels: PixelData, settings: Settings,
    n_components: int, standardize: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings that a resumed run must share with the first."""
    counts = hashlib.sha256()
    for array in (spots.counts.data, spots.counts.indices, spots.counts.indptr, spots.factors):
        counts.update(np.ascontiguousarray(array).tobytes())
    return {
        **asdict(settings),
        "extractor": network.name,
        "weights": network.weights_hash,
        "input_px": tiles.input_px,
        "n_components": n_components,
        "standardize": standardize,
        "genes": list(spots.genes),
        "sections": {name: len(rows) for name, rows in spots.rows.items()},
        "validation": hashlib.sha256(pixels.held_out.tobytes()).hexdigest(),
        "counts": counts.hexdigest(),
        "tiles": pixels.tiles.digest(),
    }
