"""Facts that models have in common: tiles, embeddings, training, intervals and certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stimage_sd._shown import Facts, listed
from stimage_sd.models._predictor import known_patients
from stimage_sd.models._specification import TileSpecification

_STANDARDIZED = {
    "section": "standardized by each section's own tiles",
    "cohort": "standardized by the training tiles",
}


def facts_of(model: Any) -> Facts:
    """Return the facts of a model, or the description of one that another package made."""
    if hasattr(model, "facts"):
        return dict(model.facts())
    return {name.replace("_", " "): str(value) for name, value in model.description.items()}


def tile_facts(*embeddings: TileSpecification, standardize: str | None = None) -> Facts:
    """Describe the tiles and embeddings that a section must have."""
    first = embeddings[0]
    size = f"{first.size_um:.4g} µm" if first.size_um is not None else f"{first.side_px:.0f} px"
    stain = "image as it is" if first.stain is None else f"stain-normalized ({first.stain['method']})"
    facts = {"tiles": f"{size}, {stain}", "embeddings": "; ".join(_embedding(tiles) for tiles in embeddings)}
    return facts if standardize is None else facts | {"features": _STANDARDIZED[standardize]}


def _embedding(tiles: TileSpecification) -> str:
    fields = ", ".join(f"{value:g}" for value in tiles.fields_of_view)
    return f"{tiles.extractor}, fields of view {fields}, context rings {tiles.context_rings}"


def interval_facts(level: float) -> Facts:
    """Describe how the intervals were set."""
    return {"intervals": f"central {level:.1%}, which covered 90% of held-out counts"}


def training_facts(training: Mapping[str, Any], *, name: str = "trained on") -> Facts:
    """Describe the record of a fit: sections, patients, validation, seed and package versions."""
    facts = {}
    if sections := training.get("sections"):
        patients = sorted(map(str, known_patients(training) or ()))
        about = [f"one patient, {patients[0]}"] if len(patients) == 1 else []
        about += [f"{training['n_tiles']:,} tiles"] if "n_tiles" in training else []
        facts[name] = listed(sections) + (f" ({'; '.join(about)})" if about else "")
        if len(patients) > 1:
            facts["patients"] = listed(patients)
    if losses := training.get("metrics", {}).get("validation_nll"):
        facts["validation"] = f"NLL per count {sum(losses) / len(losses):.4f}, mean over members"
    if "seed" in training:
        facts["seed"] = str(training["seed"])
    if "versions" in training:
        facts["versions"] = ", ".join(f"{package} {text}" for package, text in training["versions"].items())
    return facts


def certificate_facts(model: Any) -> Facts:
    """Describe what the certificate says, or that there is none."""
    if model.certificate is None:
        return {"certificate": "none: stimage_sd.tl.certify(new_sections, model) measures one"}
    tested = listed(model.certificate.sections["section"])
    return {"certificate": f"on {tested}: {str(model.certificate).removeprefix('Certificate: ')}"}
