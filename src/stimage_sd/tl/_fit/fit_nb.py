"""Fit an ensemble of negative-binomial heads to the embeddings and counts of a cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import keep_compiled
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._instance_model import InstanceModel
from stimage_sd.models._nb import HeadName, NBModel
from stimage_sd.models._shared_patterns import find_patterns
from stimage_sd.models._specification import common_specification, extractor_names, features
from stimage_sd.nn.sharding import shard_members
from stimage_sd.tl._fit.fit_instances import fit_on_instances
from stimage_sd.tl._fit.held_out_level import with_interval_level
from stimage_sd.tl._fit.seen import check_different
from stimage_sd.tl._fit.training import TrainingData, train
from stimage_sd.tl._fit.training_set import Spots, bootstrap, checked_genes, held_out_tiles


def fit_nb(
    data: SpatialData | contract.Cohort,
    *,
    genes: Sequence[str],
    on: contract.On = "tiles",
    extractor: str | Sequence[str] = "efficientnet_lite0_stages",
    head: HeadName = "paper",
    n_members: int = 10,
    size_factors: Literal["total"] | None = None,
    exposure: Literal["section"] | None = "section",
    validation: float | Sequence[str] = 0.3,
    patients: Mapping[str, str] | None = None,
    n_components: int = 256,
    rank: int | None = 16,
    standardize: Standardize = "section",
    max_epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 0.03,
    weight_decay: float = 10.0,
    patience: int = 10,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> NBModel | InstanceModel:
    """Fit a negative binomial per gene to the embeddings of tiles on spots, or of the nuclei in them.

    Each member of the ensemble trains on a bootstrap sample of the training tiles. Early stopping uses sections
    held out from that member. The held-out sections rotate among members, so the whole ensemble learns from all
    sections.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts. All sections must be tiled and embedded in the same way.
    genes
        Genes to learn. Every section must have measured all of them (`stimage_sd.pp.select_genes`).
    on
        ``"tiles"``: one distribution per tile. ``"nuclei"`` or ``"grid"``: one per nucleus, or square of a fine grid,
        learned from spots: a spot's counts have the distribution of the sum over its nuclei, and of the background that
        no nucleus covers. Both tiles and nuclei must be embedded (``pp.embed(on=)``). Where tiles are not on spots but
        a grid, the counts of cells or bins are learned directly. A cohort may hold sections of both kinds.
    extractor
        Extractor whose embeddings are used. The embeddings of several extractors are concatenated with equal weight.
        Neighbor embeddings (`pp.spatial_context`) are used where they were computed.
    head
        ``"paper"``: r and p per gene and tile, as published. ``"dispersion"``: one mean per gene and tile and one
        dispersion per gene. The dispersion head is four times faster and slightly worse in likelihood.
    n_members
        Number of members. With several JAX devices, members are spread over as many devices as divide them evenly.
    size_factors
        `None`: fit raw counts, so predictions include the depth of a spot. ``"total"``: the size factor of a tile is
        its total count divided by the cohort's median. The size factor multiplies the mean and keeps r, which is how
        shallower sequencing changes counts. Predictions are then for a tile of median depth.
    exposure
        ``"section"``: every section has a depth of its own, the median total count of its spots over the cohort's
        median. It multiplies the mean and keeps r. How the spots of a section differ is still learned from the image.
        Predictive distributions then also contain the shift of each gene between sections and between patients.
        `None`: all sections have the same depth and genes do not shift, as published. With size factors, which contain
        the depth of the section, the exposure is `None`.
    validation
        Share of the patients to hold out per member (at least one), or names of the sections to hold out for all
        members. With a single section, a contiguous part of the section is held out.
    patients
        Patient by section. Default: the patients that sections know (``sdata.attrs["stimage_sd"]["patient"]``). All
        sections of a patient are held out together. With one patient only, sections are held out.
    n_components
        Number of principal components that embeddings are reduced to.
    rank
        Number of expression patterns that all genes share. Predictions vary along these patterns only. The patterns
        are directions of the components, found per member by ridge regression of log counts on its training tiles.
        `None`: no shared patterns, the heads see all components, as published.
    standardize
        ``"section"``: standardize embeddings by the mean and standard deviation of each section. ``"cohort"``: by
        the mean and standard deviation of the training tiles.
    max_epochs, batch_size, learning_rate
        Settings of the Adam optimizer.
    weight_decay
        Precision of the Gaussian prior on the head weights. Larger values give smoother predictions.
    patience
        Number of epochs without a better validation loss after which a member stops. The best epoch is kept.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Random seed. On one machine, the same seed gives the same model bit for bit.

    Returns
    -------
    The fitted model. With ``on="nuclei"`` or ``"grid"``, it predicts tiles as every model, and also nuclei or squares
    (``tl.predict(on=)``), which add up to the tiles.

    Raises
    ------
    KeyError
        If a section was not embedded or lacks some of the genes.
    ValueError
        If sections were prepared differently, or an option is out of range. With nuclei or squares, also if `extractor`
        is not one name, `rank` is `None`, `head` is not ``"paper"``, size factors are given, or most spots of a section
        hold no nucleus.

    Notes
    -----
    Paper, sections 2.3 (Eq. 2 to 6) and 2.4. The sum of independent NB(r_i, p) is NB(sum of r_i, p), so nuclei that
    share the p of their spot are learned from spots by the exact likelihood. The docs ("Design decisions") list the
    defaults that were chosen on held-out training sections, with the gain of each.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_fit", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> sti.tl.fit_nb(section, genes=genes, n_members=2, max_epochs=2).n_members
    2
    """
    source = contract.Source(table_key, layer)
    cohort = contract.sections(data)
    check_options(
        head=head, standardize=standardize, size_factors=size_factors, exposure=exposure, n_members=n_members,
        max_epochs=max_epochs, batch_size=batch_size, n_components=n_components, patience=patience,
        rank=1 if rank is None else rank,
    )  # fmt: skip
    if not learning_rate > 0 or not weight_decay >= 0:
        raise ValueError(
            "Expected `learning_rate` to be positive and `weight_decay` to be no less than 0, found "
            f"{learning_rate} and {weight_decay}."
        )
    genes = checked_genes(cohort, genes, source)
    check_different(cohort, source)
    known = contract.patients(cohort, patients)
    options: dict[str, Any] = {
        "size_factors": size_factors, "exposure": None if size_factors is not None else exposure,
        "n_components": n_components, "rank": rank, "max_epochs": max_epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "weight_decay": weight_decay, "patience": patience,
    }  # fmt: skip
    if on != "tiles":
        return fit_on_instances(
            cohort, on=on, genes=genes, extractor=extractor, head=head, n_members=n_members, validation=validation,
            patients=known, standardize=standardize, source=source, seed=seed, options=options,
        )  # fmt: skip
    embeddings = [common_specification(cohort, name) for name in extractor_names(extractor)]
    blocks = {name: [features(sdata, tiles) for tiles in embeddings] for name, sdata in cohort.items()}
    widths = [block.shape[1] for block in next(iter(blocks.values()))]
    embedded = {name: np.concatenate(parts, axis=1) for name, parts in blocks.items()}
    del blocks
    space = FeatureSpace.fit(embedded, n_components=n_components, standardize=standardize, seed=seed, widths=widths)
    spots = Spots.read(cohort, genes, size_factors, options["exposure"], source)
    reduced = np.concatenate([space.reduce(embedded[name])[rows] for name, rows in spots.rows.items()])
    del embedded
    held_out = held_out_tiles(
        spots.sections, spots.positions, validation, n_members=n_members, seed=seed, patients=known
    )
    patterns = find_patterns(reduced, spots.counts, spots.factors, held_out, rank=rank) if rank is not None else None
    options["rank"] = None if patterns is None else patterns.rank
    inputs = reduced if patterns is None else patterns.project(reduced)
    training_data = TrainingData(inputs, spots.counts, spots.factors, bootstrap(~held_out, seed=seed), held_out)
    keep_compiled()
    initial = HEADS[head].initial(jax.random.key(seed), spots.floor[0], spots.floor[1], n_members, inputs.shape[-1])
    parameters, history = train(
        head, shard_members(initial), training_data, max_epochs=max_epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, patience=patience, seed=seed,
    )  # fmt: skip
    model = NBModel(
        genes=tuple(genes),
        tiles=embeddings[0],
        beside=tuple(embeddings[1:]),
        features=space,
        head=head,
        parameters={name: np.asarray(array) for name, array in parameters.items()},
        floor=spots.floor,
        total=spots.total,
        patterns=patterns,
        training=spots.record(cohort, held_out, history, patients=known, source=source, seed=seed, options=options),
    )

    def r_and_p(rows: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return model.r_and_p(reduced[rows], members=members)

    return with_interval_level(model, r_and_p, training_data, spots.sections, known)


def check_options(
    *, head: str, standardize: str, size_factors: str | None, exposure: str | None, **positive: int
) -> None:
    """Raise `ValueError` if an option that all fits of negative binomials share is out of range."""
    if head not in HEADS:
        raise ValueError(f"Expected `head` to be one of {sorted(HEADS)}, found {head!r}.")
    if standardize not in ("section", "cohort"):
        raise ValueError(f'Expected `standardize` to be "section" or "cohort", found {standardize!r}.')
    if size_factors not in (None, "total"):
        raise ValueError(f'Expected `size_factors` to be None or "total", found {size_factors!r}.')
    if exposure not in (None, "section"):
        raise ValueError(f'Expected `exposure` to be None or "section", found {exposure!r}.')
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"Expected `{name}` of at least 1, found {value}.")
