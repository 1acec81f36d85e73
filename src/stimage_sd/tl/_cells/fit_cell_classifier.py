"""Fit a network that finds nuclei on H&E and predicts their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flax import nnx
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import cache_dir, keep_compiled
from stimage_sd._files import scratch
from stimage_sd.models._cell_classifier import CellClassifier
from stimage_sd.models._hovernet_weights import load_hovernet
from stimage_sd.nn.hovernet import SIZES, HoVerNet, HoVerNetSize
from stimage_sd.nn.hovernet_loss import IGNORED, balanced_weights
from stimage_sd.tl._cells.cell_tiles import CELL_TYPE, CellTiles, TypedNuclei, labels_of, typed_nuclei
from stimage_sd.tl._cells.cell_training import CellRun, CellSettings
from stimage_sd.tl._fit.training_set import versions

#: the network's input side is divisible by this
_STEP = 8


def fit_cell_classifier(
    data: SpatialData | contract.Cohort,
    *,
    classes: Sequence[str] | None = None,
    validation: str | Sequence[str] | None = None,
    size: str | HoVerNetSize = "small",
    weights: str | Path | None = None,
    mpp: float = 0.5,
    tile_px: int = 256,
    min_nuclei: int = 2,
    min_confidence: float = 0.0,
    n_epochs: int = 50,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    augment: bool = True,
    checkpoint: str | Path | None = None,
    shapes_key: str | None = None,
    label_key: str = CELL_TYPE,
    image_key: str | None = None,
    seed: int = 0,
) -> CellClassifier:
    """Fit a network that finds nuclei on H&E and predicts their types.

    Parameters
    ----------
    data
        A section or a cohort with nuclei on the H&E (such as a registered Xenium run) and their types
        (`stimage_sd.pp.annotate_cells`).
    classes
        Names of the types, in the order of the probabilities. Default: all types that occur, sorted. Nuclei of another
        type count as unknown type.
    validation
        Sections for validation. The network of the epoch with the smallest validation loss is kept. By default all
        sections are for training, and the last epoch's network is kept. Whole sections are held out, not tiles.
    size
        ``"small"`` (trains on two cores), ``"published"`` (as in the paper), or a `HoVerNetSize`.
    weights
        File of initial weights (safetensors), of HoVer-Net in its authors' naming or of ResNet-50 in torchvision's
        naming. From ResNet-50, the encoder takes the convolutions and the normalizations in the same place.
    mpp
        Resolution of the network's input, µm per pixel. Usual values are 0.25 to 0.5.
    tile_px
        Side of the training tiles, px at `mpp`, divisible by 8.
    min_nuclei
        Tiles with fewer nuclei are left out.
    min_confidence
        Nuclei with a smaller confidence of their type count as unknown type. They train detection, but their pixels are
        left out of the loss of types.
    n_epochs, batch_size, learning_rate, weight_decay
        Settings of AdamW. The learning rate follows a cosine to 0.
    augment
        Whether tiles are randomly mirrored, rotated and changed in stain.
    checkpoint
        Folder of the training state, written after each epoch. An interrupted call resumes from this folder and gives
        the same result.
    shapes_key, label_key, image_key
        Names of the shapes (default ``"nuclei"``), of their column of types, and of the H&E.
    seed
        Seed of the initial network, the order of tiles and the augmentation.

    Returns
    -------
    The fitted model. ``training`` holds the history: training and validation loss per epoch, and their terms.

    Raises
    ------
    KeyError
        If a section has no nuclei or no types, or `validation` names an unknown section.
    ValueError
        If nuclei are not on the H&E or not on its dark areas, a class has no training nuclei, a section is coarser than
        `mpp`, or an option is out of range.

    Notes
    -----
    Paper, section 2.7, after Graham et al. 2019. Losses are as published, with classes weighted by the square root of
    the rarity of their pixels. Distance maps and types are drawn from the outlines per batch.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> model = sti.tl.fit_cell_classifier(cohort, validation="B", checkpoint="run")  # doctest: +SKIP
    """
    keep_compiled()
    cohort = contract.sections(data)
    network_size = _size(size)
    _check(mpp=mpp, tile_px=tile_px, min_nuclei=min_nuclei, n_epochs=n_epochs, batch_size=batch_size,
           learning_rate=learning_rate, weight_decay=weight_decay)  # fmt: skip
    held_out = _validation(list(cohort), validation)
    training = [name for name in cohort if name not in held_out]
    names = _classes(cohort, training, classes, shapes_key, label_key)
    nuclei = {
        name: typed_nuclei(
            sdata, names, shapes_key=shapes_key, label_key=label_key, image_key=image_key, min_confidence=min_confidence
        )
        for name, sdata in cohort.items()
    }  # fmt: skip
    counts = _count(nuclei, training, names)
    settings = CellSettings(network_size, n_epochs, batch_size, learning_rate, weight_decay, augment, seed)
    network = HoVerNet(len(names), size=network_size, rngs=nnx.Rngs(seed))
    loaded = None if weights is None else load_hovernet(network, Path(weights))
    with scratch(cache_dir() / "cells") as folder:
        tiles = CellTiles.cut(
            cohort, nuclei, folder / "tiles", mpp=mpp, tile_px=tile_px, min_nuclei=min_nuclei, image_key=image_key
        )
        to_validate = np.isin(tiles.section, [index for index, name in enumerate(cohort) if name in held_out])
        pixels = _pixels(tiles, np.flatnonzero(~to_validate), len(names), tile_px)
        run = CellRun(
            network, tiles, to_validate, balanced_weights(pixels), settings,
            None if checkpoint is None else Path(checkpoint),
        )  # fmt: skip
        run.start({**asdict(settings), "classes": names, "weights": loaded, "mpp": mpp, "tiles": tiles.digest()})
        run.train()
    history = {key: [row[key] for row in run.history] for key in run.history[0]}
    return CellClassifier.of(
        run.network(), classes=tuple(names), size=network_size, mpp=mpp, tile_px=tile_px,
        training={
            "sections": list(cohort), "validation": held_out, "n_tiles": len(tiles), "n_nuclei": counts,
            "pixels": pixels.tolist(), "weights": loaded, "best_epoch": run.best_epoch, "history": history,
            "options": {**asdict(settings), "min_nuclei": min_nuclei, "min_confidence": min_confidence},
            "versions": versions(),
        },
    )  # fmt: skip


def _size(size: str | HoVerNetSize) -> HoVerNetSize:
    if isinstance(size, HoVerNetSize):
        if size.padding != "same" or not size.pad_stem:
            raise ValueError('Expected `size` with `padding="same"` and `pad_stem=True`: maps as large as the tile.')
        return size
    if size not in SIZES:
        raise ValueError(f"Expected `size` to be one of {sorted(SIZES)} or a HoVerNetSize, found {size!r}.")
    return SIZES[size]


def _check(
    *, mpp: float, tile_px: int, min_nuclei: int, n_epochs: int, batch_size: int, learning_rate: float,
    weight_decay: float,
) -> None:  # fmt: skip
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` as a positive number of µm per pixel, found {mpp!r}.")
    if tile_px < _STEP or tile_px % _STEP:
        raise ValueError(f"Expected `tile_px` divisible by {_STEP}, found {tile_px}.")
    for name, value, least in (("min_nuclei", min_nuclei, 1), ("n_epochs", n_epochs, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"Expected `{name}` of at least {least}, found {value}.")
    if not learning_rate > 0 or not weight_decay >= 0:
        raise ValueError(
            f"Expected `learning_rate` above 0 and `weight_decay` of at least 0, found {learning_rate}, {weight_decay}."
        )


def _validation(sections: list[str], validation: str | Sequence[str] | None) -> list[str]:
    chosen = [validation] if isinstance(validation, str) else list(validation or [])
    unknown = [name for name in chosen if name not in sections]
    if unknown:
        raise KeyError(f"Expected `validation` to name sections of {sections}, found {unknown}.")
    if len(set(chosen)) == len(sections):
        raise ValueError(f"Expected `validation` to leave a section to train on, found all of {sections}.")
    return chosen


def _classes(
    cohort: Mapping[str, SpatialData], training: Sequence[str], classes: Sequence[str] | None, shapes_key: str | None,
    label_key: str,
) -> list[str]:  # fmt: skip
    if classes is not None:
        if isinstance(classes, str) or len(set(classes)) < len(list(classes)) or not list(classes):
            raise ValueError(f"Expected `classes` as a list of different names, found {classes!r}.")
        return list(classes)
    names: set[str] = set()
    for name in training:
        frame = contract.nuclei(cohort[name], shapes_key)
        types = labels_of(cohort[name], frame, label_key, contract.nuclei_name(cohort[name], shapes_key))
        names |= set(types.dropna().unique())
    if not names:
        raise ValueError(f"Expected nuclei with a type in the sections {list(training)}, found none.")
    return sorted(names)


def _count(nuclei: Mapping[str, TypedNuclei], training: Sequence[str], classes: list[str]) -> dict[str, int]:
    """Count the training nuclei per class."""
    types = np.concatenate([nuclei[name].types for name in training])
    counts = np.bincount(types[types != IGNORED], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"Expected nuclei of every class in the sections {list(training)}, found none of {empty} (nuclei per "
            f"class: {dict(zip(classes, counts.tolist(), strict=True))}). Leave the class out of `classes=`, or merge "
            "it with another by `stimage_sd.pp.annotate_cells(..., merge=...)`."
        )
    return dict(zip(classes, counts.tolist(), strict=True))


def _pixels(tiles: CellTiles, rows: np.ndarray, n_classes: int, side: int) -> np.ndarray:
    """Count the pixels of background and of each class."""
    counts = np.zeros(n_classes + 1, dtype=np.int64)
    for row in rows:
        types = tiles.labels(int(row), side)[1]
        counts += np.bincount(types[types != IGNORED], minlength=n_classes + 1)
    return counts
