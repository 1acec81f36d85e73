"""Link the values of a wrapped predictor to the counts of a cohort."""

from __future__ import annotations

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.link import fit_link
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._wrapped import Wrapped, WrappedModel, little_of, logarithms
from stimage_sd.tl._fit.held_out_level import with_interval_level
from stimage_sd.tl._fit.seen import check_different
from stimage_sd.tl._fit.training import TrainingData
from stimage_sd.tl._fit.training_set import Spots, checked_genes, held_out_tiles

#: fits that each leave out a part, to learn how new sections differ
_N_FOLDS, _SHARE = 5, 0.3


def link_to_counts(cohort: dict[str, SpatialData], wrapped: Wrapped, source: contract.Source) -> WrappedModel:
    """Fit the link of every gene, then its shift and the interval level on sections that were left out.

    - `cohort`: sections with counts and tiles.
    - `wrapped`: the predictor.
    - `source`: table and layer of the counts.
    """
    genes = checked_genes(cohort, wrapped.genes, source)
    check_different(cohort, source)
    raw = {name: wrapped.values(sdata, section=name) for name, sdata in cohort.items()}
    little = little_of(np.concatenate(list(raw.values())))
    values = {name: logarithms(of_section, wrapped.scale, little) for name, of_section in raw.items()}
    spots = Spots.read(cohort, genes, None, "section", source)
    seen = np.concatenate([values[name][rows] for name, rows in spots.rows.items()])
    patients = contract.patients(cohort)
    held_out = held_out_tiles(spots.sections, spots.positions, _SHARE, n_members=_N_FOLDS, seed=0, patients=patients)
    folds = [fit_link(seen[~held], spots.counts[~held], spots.factors[~held]) for held in held_out]
    record = spots.record(
        cohort, held_out, [], patients=patients, source=source, seed=0, options={"exposure": "section"}
    )
    record["fingerprints"] += [{"section": name} for name in wrapped.trained_on]
    model = WrappedModel(
        wrapped=wrapped,
        link=fit_link(seen, spots.counts, spots.factors),
        little=little,
        familiarity=FeatureSpace.fit(
            {name: of_section.astype(np.float32) for name, of_section in values.items()},
            n_components=1, standardize="cohort", seed=0,
        ),
        floor=spots.floor,
        total=spots.total,
        training=record,
    )  # fmt: skip

    def r_and_p(rows: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        means = np.stack([folds[member].means(seen[rows]) for member in members])
        r = np.broadcast_to(np.stack([folds[member].dispersion for member in members])[:, None], means.shape)
        return r, r / (r + means)

    data = TrainingData(np.empty((len(seen), 0), np.float32), spots.counts, spots.factors, np.ones((1, 1)), held_out)
    return with_interval_level(model, r_and_p, data, spots.sections, patients)
