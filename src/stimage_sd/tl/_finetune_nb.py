"""Fine-tune a network and its negative-binomial layers from tiles with measured counts."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import cache_dir, keep_compiled
from stimage_sd.models._extractors import Extractor, get_extractor
from stimage_sd.models._features import Standardize
from stimage_sd.models._finetuned import FinetunedModel, tile_specification
from stimage_sd.models._nb import HeadName, NBModel
from stimage_sd.models._specification import TileSpecification, check_specification
from stimage_sd.models._split_network import Unfreeze
from stimage_sd.tl._finetune_run import Run
from stimage_sd.tl._finetuning import PixelData, Settings
from stimage_sd.tl._fit_nb import (
    _check_options,
    _checked_genes,
    _floor,
    _measured,
    _positions,
    _validation_sections,
    _versions,
    _with_interval_level,
)
from stimage_sd.tl._split import held_out_tiles
from stimage_sd.tl._tile_store import TileStore
from stimage_sd.tl._training import TrainingData


def finetune_nb(
    data: SpatialData | contract.Cohort,
    *,
    genes: Sequence[str],
    extractor: str | Extractor = "resnet50",
    weights: str | Path | None = None,
    unfreeze: Unfreeze = "last_stage",
    head: HeadName = "paper",
    size_factors: Literal["total"] | None = None,
    validation: float | Sequence[str] = 0.3,
    n_components: int = 128,
    standardize: Standardize = "section",
    input_px: int | None = None,
    augment: bool = True,
    max_epochs: int = 10,
    batch_size: int = 64,
    micro_batch_size: int = 8,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 1e-3,
    weight_decay: float = 30.0,
    patience: int = 3,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    table_key: str | None = None,
) -> FinetunedModel:
    """Train a network and its negative-binomial layers end to end, from the pixels of tiles that sit on spots.

    The head is first fitted to the features of the network as it is, which takes seconds. Training goes on from there
    in small steps: a head that knows nothing would send the network gradients that undo what it was pretrained to.
    The model is that of the epoch with the best validation loss; where none is better, the network as it was.

    Parameters
    ----------
    data
        A cohort of sections with counts, tiled alike; a single section does too. They need no embeddings.
    genes
        Genes to learn; every section must have measured them (`stimage_sd.pp.select_genes`).
    extractor
        Name of a registered extractor whose network is a Flax module, or an `Extractor`.
    weights
        A safetensors file in torchvision's or timm's naming, where the weights are not found by themselves.
    unfreeze
        ``"last_stage"``: the last of the network's parts (`stimage_sd.nn.parts`), such as ResNet's blocks of the
        lowest resolution; ``"all"``: the whole network; `None`: the head alone, with augmentation.
    head
        ``"paper"``: r and p for every gene and tile, as published. ``"dispersion"``: a mean for every gene and tile
        and one dispersion a gene.
    size_factors, validation, weight_decay, table_key
        As in `fit_nb`. All of a held-out section is validated on. An ensemble is several models, of one seed each
        (`stimage_sd.tl.combine`).
    n_components
        Principal components of the network's features at the start; the map to them stays as it is, and what the
        network learns goes through it.
    standardize
        ``"section"``: each section's features by their own mean and deviation; ``"cohort"``: by those of all
        sections' tiles. They are computed anew after each epoch, from 512 tiles of a section at most.
    input_px
        Side that tiles are resampled to, px; by default the network's input size, or what they were tiled for.
    augment
        Draw a new variant of every tile in each epoch (`stimage_sd.pp.augment`); validation sees tiles as they are.
        Since variants are drawn anew, activations of frozen stages are computed in each epoch as well.
    max_epochs
        Epochs at most.
    batch_size, micro_batch_size
        Tiles a step of Adam, and tiles that are in memory at a time: their gradients are added up.
    learning_rate, head_learning_rate
        Of Adam, for the network and for the head.
    patience
        Training ends when the validation loss has not improved for so many epochs.
    checkpoint
        A folder that the state is written to after each epoch. Called again with it, training goes on after the last
        whole epoch, to the same result, bit for bit on one machine; `max_epochs` and `patience` may be others.
    seed
        Seed of everything random.

    Returns
    -------
    The model.

    Raises
    ------
    KeyError
        If there is no such extractor, or a section was not tiled or lacks some of the genes.
    TypeError
        If the extractor is a plain function.
    ValueError
        If sections were tiled or stained unlike each other, an option is out of range, or the checkpoint is of
        another run.

    Notes
    -----
    Paper, section 2.3: convolutional and negative-binomial layers trained together. Here the statistics of batch
    normalisation stay those of the pretrained network, since tiles of one section are too alike to estimate them
    from; its scales and biases are trained. Activations of the parts that are trained are computed again for the
    gradient (`jax.checkpoint`), so that memory hardly grows with depth. Tiles are cut to a file once (150 kB each at
    224 px) and read from there a micro-batch at a time.

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
    keep_compiled()
    cohort = contract.sections(data)
    _check_options(
        head=head, standardize=standardize, size_factors=size_factors, n_components=n_components,
        max_epochs=max_epochs, batch_size=batch_size, micro_batch_size=micro_batch_size, patience=patience,
    )  # fmt: skip
    _check_more(unfreeze, learning_rate=learning_rate, head_learning_rate=head_learning_rate, weight_decay=weight_decay)
    network = get_extractor(extractor, weights=weights) if isinstance(extractor, str) else extractor
    network.module()  # raises where it is a plain function, before anything is read
    tiles = _common_tiles(cohort, network, input_px)
    settings = Settings(
        head=head, unfreeze=unfreeze, augment=augment, batch_size=batch_size,
        micro_batch_size=min(micro_batch_size, batch_size), learning_rate=learning_rate,
        head_learning_rate=head_learning_rate, weight_decay=weight_decay, seed=seed,
    )  # fmt: skip
    spots = _Spots.read(cohort, _checked_genes(cohort, genes, table_key), size_factors, table_key)
    held_out = held_out_tiles(spots.sections, spots.positions, validation, n_members=1, seed=seed)
    scratch = cache_dir() / "finetune"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        pixels = PixelData(
            tiles=_cut(cohort, spots, tiles, Path(folder) / "tiles"),
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
        training={
            "sections": list(spots.rows),
            "n_tiles": len(spots.sections),
            "validation": _validation_sections(spots.sections, held_out),
            "seed": seed,
            "options": {
                **asdict(settings), "n_components": n_components, "max_epochs": max_epochs, "patience": patience,
            },
            "metrics": {"validation_nll": [run.best_loss], "best_epoch": [run.best_epoch]},
            "versions": _versions(),
            "history": {key: [row[key] for row in run.history] for key in run.history[0]},
        },
    )  # fmt: skip
    heads = _with_interval_level(
        heads, reduced, TrainingData(reduced, spots.counts, spots.factors, np.zeros(0), held_out)
    )
    return FinetunedModel.of(heads, run.tuning.module(run.best.network))


def _check_more(unfreeze: str | None, **rates: float) -> None:
    if unfreeze not in (None, "last_stage", "all"):
        raise ValueError(f'Expected `unfreeze` to be "last_stage", "all" or None, found {unfreeze!r}.')
    for name, value in rates.items():
        if not (value > 0 or (name == "weight_decay" and value == 0)):
            raise ValueError(f"Expected `{name}` to be positive, found {value}.")


def _common_tiles(cohort: Mapping[str, SpatialData], network: Extractor, input_px: int | None) -> TileSpecification:
    """How the cohort's tiles are cut, each section's alike."""
    if input_px is not None and (input_px < 1 or network.input_size not in (None, input_px)):
        raise ValueError(
            f"Expected `input_px` to be positive and what the network takes ({network.input_size or 'any'}), found "
            f"{input_px}."
        )
    each = {}
    for name, sdata in cohort.items():
        contract.check_rgb(sdata, contract.working_image_name(sdata))
        px = input_px or network.input_size or int(contract.tiling(sdata)["target_px"])
        each[name] = tile_specification(sdata, extractor=network.name, weights_hash=network.weights_hash, input_px=px)
    first = next(iter(each.values()))
    for name, found in each.items():
        check_specification(found, first, section=name)
    sizes = [found.size_um for found in each.values() if found.size_um is not None]
    return replace(
        first,
        side_px=float(np.mean([found.side_px for found in each.values()])),
        size_um=float(np.mean(sizes)) if len(sizes) == len(each) else None,
    )


@dataclass(frozen=True)
class _Spots:
    """What was measured on the cohort's tiles, section after section."""

    genes: tuple[str, ...]
    rows: dict[str, np.ndarray]
    sections: np.ndarray
    positions: np.ndarray
    counts: sp.csr_matrix
    factors: np.ndarray
    floor: np.ndarray
    total: float | None

    @classmethod
    def read(
        cls, cohort: Mapping[str, SpatialData], genes: list[str], size_factors: str | None, table_key: str | None
    ) -> _Spots:
        measured = {name: _measured(sdata, genes, table_key) for name, sdata in cohort.items()}
        counts = sp.vstack([block for _, block, _ in measured.values()]).tocsr()
        totals = np.concatenate([total for _, _, total in measured.values()])
        median = float(np.median(totals)) if size_factors == "total" else None
        factors = np.ones_like(totals) if median is None else np.maximum(totals / median, 1e-3)
        return cls(
            genes=tuple(genes),
            rows={name: rows for name, (rows, _, _) in measured.items()},
            sections=np.repeat(list(measured), [len(rows) for rows, _, _ in measured.values()]),
            positions=np.concatenate([_positions(cohort[name])[rows] for name, (rows, _, _) in measured.items()]),
            counts=counts,
            factors=factors.astype(np.float32),
            floor=_floor(counts, factors if median is not None else None),
            total=median,
        )


def _cut(cohort: Mapping[str, SpatialData], spots: _Spots, tiles: TileSpecification, path: Path) -> TileStore:
    store = TileStore(path, n_tiles=len(spots.sections), side_px=tiles.input_px)
    first = 0
    for name, sdata in cohort.items():
        here = spots.positions[first : first + len(spots.rows[name])]
        store.cut(
            contract.levels(sdata, contract.working_image_name(sdata)),
            here,
            side=float(contract.tiling(sdata)["side_px"]),
            first=first,
            label=f"{contract.sample(sdata)}: cutting tiles",
        )
        first += len(here)
    return store


def _fingerprint(
    network: Extractor, tiles: TileSpecification, spots: _Spots, pixels: PixelData, settings: Settings,
    n_components: int, standardize: str,
) -> dict[str, Any]:  # fmt: skip
    """What two runs must share for one to go on where the other stopped."""
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
