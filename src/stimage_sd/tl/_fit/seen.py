"""Guard against leakage by recognizing the sections a model has seen from their spots and counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.shifts import shift_of
from stimage_sd.models._adapted import AdaptedModel
from stimage_sd.models._combined import CombinedModel
from stimage_sd.models._predictor import Predictor, gene_shifts, known_patients


def fingerprints(
    cohort: Mapping[str, SpatialData], genes: Sequence[str], source: contract.Source
) -> list[dict[str, Any]]:
    """Return the fingerprints of sections that a model stores when fitted."""
    return [contract.fingerprint(sdata, name, genes=genes, source=source) for name, sdata in cohort.items()]


def remembered(model: Predictor) -> list[dict[str, Any]]:
    """Return the sections a model has seen, as ``{"genes": ..., "sections": fingerprints}``.

    The list has one entry per model of a combination. Models of earlier versions store section names only.
    """
    named = [{"section": name} for name in model.training.get("sections", [])]
    of_parts = [group for part in _inner(model) for group in remembered(part)]
    return [*of_parts, {"genes": list(model.genes), "sections": model.training.get("fingerprints", named)}]


def _inner(model: Predictor) -> tuple[Predictor, ...]:
    """Return the models that a model was made of."""
    made: Any = model
    if isinstance(made, CombinedModel):
        return made.parts
    return (made.base,) if isinstance(made, AdaptedModel) else ()


def seen_sections(
    groups: Sequence[Mapping[str, Any]], cohort: Mapping[str, SpatialData], source: contract.Source
) -> list[str]:
    """Return the names of the cohort's sections that match a fingerprint."""
    return [
        name
        for name, sdata in cohort.items()
        if any(
            contract.is_seen(sdata, name, known=group["sections"], genes=group["genes"], source=source)
            for group in groups
        )
    ]


def trained_patients(model: Predictor) -> set[str] | None:
    """Return the patients a model was trained on, or `None` if the patient of a training section is unknown."""
    parts = _inner(model)
    if not parts:
        return known_patients(model.training)
    patients: set[str] = set()
    for part in parts:
        known = trained_patients(part)
        if known is None:
            return None
        patients |= known
    return patients


def shift_sd(model: Predictor, sdata: SpatialData) -> np.ndarray | None:
    """Return the standard deviation of the log of each gene's shift in a section, `None` for models without shifts.

    It is that of another section of a training patient, or of another patient. Where the patients of the section or of
    the model are unknown, the variance is the mean of both.
    """
    shifts = gene_shifts(model)
    if shifts is None:
        return None
    trained, patients = trained_patients(model), contract.patients({"": sdata})
    known = None if trained is None or not patients else patients[""] in trained
    return shift_of(shifts, known)


def warn_of_other_patients(model: Predictor, cohort: Mapping[str, SpatialData]) -> None:
    """Warn if a model of one patient predicts sections of others, on which it was not calibrated either."""
    known = trained_patients(model)
    if known is None or len(known) != 1:
        return
    learned = (model.training.get(step, {}).get("patients", []) for step in ("calibration", "adaptation"))
    familiar = known.union(*learned)
    others = {name: patient for name, patient in contract.patients(cohort).items() if patient not in familiar}
    if others:
        warnings.warn(
            f"The model was trained on one patient, {next(iter(known))!r}, and {list(others)} are of "
            f"{sorted(set(others.values()))}. Its means follow the sequencing depth of that patient, and its intervals "
            "can cover fewer counts than stated. Train on several patients, or calibrate on a section of the new one "
            "(`stimage_sd.tl.calibrate`), or adapt to some of its spots (`stimage_sd.tl.adapt`).",
            stacklevel=3,
        )


def check_unseen(model: Predictor, cohort: dict[str, SpatialData], source: contract.Source, *, purpose: str) -> None:
    """Raise `ValueError` if a model was trained or validated on a section under any name.

    Warn if a section is of a patient that the model was trained on, where there are several.
    """
    if seen := seen_sections(remembered(model), cohort, source):
        raise ValueError(
            f"The model was trained on {sorted(model.training.get('sections', []))}, so {seen} cannot show how it does "
            "on new sections. They hold the same spots and counts, or the same names where the model stores names "
            f"only. Leave a section out of the fit to {purpose}."
        )
    known = trained_patients(model) or set()
    same = [name for name, patient in contract.patients(cohort).items() if patient in known]
    if same and len(known) > 1:
        warnings.warn(
            f"The model was trained on other sections of the patients of {same}, so the result need not hold for new "
            f"patients. Leave a patient out of the fit to {purpose}.",
            stacklevel=3,
        )


def check_different(cohort: Mapping[str, SpatialData], source: contract.Source) -> None:
    """Raise `ValueError` if a cohort contains the same section twice."""
    if pairs := contract.repeated_sections(cohort, source):
        first, second = pairs[0]
        raise ValueError(
            f"Sections {first!r} and {second!r} hold the same spots with the same counts. One would be used to "
            "validate what was learned from the other. Leave one of them out of the cohort."
        )
