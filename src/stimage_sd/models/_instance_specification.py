"""Embedding of nuclei, or of squares of a fine grid, and the check against that of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract


@dataclass(frozen=True)
class InstanceSpecification:
    """Embedding of nuclei or squares that a section must have for a model to predict on it.

    - `on`: ``"nuclei"`` or ``"grid"``.
    - `extractor`, `weights_hash`: name of the extractor and hash of its weights.
    - `fields_um`: sides of the embedded squares, µm.
    - `input_px`: side of the extractor's input, px.
    - `size_um`: side of the squares of a grid, µm. `None` for nuclei.
    - `stain`: settings of the stain normalization, as JSON. Empty without normalization.
    """

    on: Literal["nuclei", "grid"]
    extractor: str
    weights_hash: str
    fields_um: tuple[float, ...]
    input_px: int
    size_um: float | None
    stain: str

    @classmethod
    def of(cls, sdata: SpatialData, on: Any, extractor: str) -> InstanceSpecification:
        """Read the embedding of a section's nuclei or squares."""
        table = contract.instances(sdata, on)
        if extractor not in table.uns.get("embeddings", {}):
            raise KeyError(
                f"The {on} of section {contract.sample(sdata)!r} have no embeddings by {extractor!r} (found "
                f"{sorted(table.uns.get('embeddings', {}))}). Run `stimage_sd.pp.embed(sdata, {extractor!r}, "
                f'on="{on}")` first.'
            )
        how = table.uns["embeddings"][extractor]
        size = table.uns["instances"].get("size_um")
        return cls(
            on=on,
            extractor=extractor,
            weights_hash=str(how["weights_hash"]),
            fields_um=tuple(float(value) for value in np.atleast_1d(how["fields_um"])),
            input_px=int(how["input_px"]),
            size_um=None if size is None else float(size),
            stain=str(how["stain"]),
        )

    def check(self, other: InstanceSpecification, *, section: str) -> None:
        """Raise `ValueError` if the embedding of another section differs, with the step to run again."""
        same_stain = _without_rounding(self.stain) == _without_rounding(other.stain)
        if asdict(other) | {"stain": ""} == asdict(self) | {"stain": ""} and same_stain:
            return
        square = "" if self.size_um is None else f", square_um={self.size_um:g}"
        differs = {name: value for name, value in asdict(other).items() if value != asdict(self)[name]}
        raise ValueError(
            f"Section {section!r} does not match: its {self.on} were embedded with {differs}, expected "
            f"{ {name: asdict(self)[name] for name in differs} }. Run `stimage_sd.pp.embed(sdata, {self.extractor!r}, "
            f'on="{self.on}", fields_of_view={self.fields_um}{square})`, on an image of the same stain normalization.'
        )


def _without_rounding(stain: str) -> Any:
    return json.loads(stain, parse_float=lambda text: f"{float(text):.5g}") if stain else None


def instance_features(sdata: SpatialData, instances: InstanceSpecification) -> np.ndarray:
    """Return the embeddings of a section's nuclei or squares, ``float32 (n, n_features)``."""
    table = contract.instances(sdata, instances.on)
    values = np.asarray(table.obsm[contract.feature_key(instances.extractor)])
    if wrong := int((~np.isfinite(values.sum(axis=1, dtype=np.float64))).sum()):
        raise ValueError(
            f"{wrong} of {len(values)} {instances.on} of section {contract.sample(sdata)!r} have embeddings by "
            f"{instances.extractor!r} that are not finite. Embed them again."
        )
    return values
