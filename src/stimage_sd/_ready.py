"""Recipes of the ready models: public sections, and the fit with the package's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spatialdata import SpatialData

from stimage_sd import datasets, pp, tl
from stimage_sd._settings import logger
from stimage_sd.pp._prepare import prepare_cohort

#: breast cancer genes with predictions in the paper
BREAST_MARKERS = (
    "COX6C", "TTLL12", "PABPC1", "GNAS", "HSP90AB1", "TFF3", "ATP1A1", "B2M", "FASN", "SPARC", "CD74", "CD63",
    "CD24", "CD81",
)  # fmt: skip
DEFAULT_EXTRACTOR = "efficientnet_lite0_stages"


@dataclass(frozen=True)
class ReadyModel:
    """How a ready model is made.

    - `name`, `tissue`, `platform`: what it is of.
    - `read`: function that reads a public section by its name.
    - `training`, `test`: names of the sections that it is fitted to, and certified on.
    - `markers`: genes that it has beside the most variable ones.
    - `minutes`, `download_mb`: what the first use costs on two cores.
    - `revision`: to be increased with every change of a recipe or of the defaults of a fit, so that models are made
      anew.
    - `options`: options of `stimage_sd.tl.fit_nb`.
    """

    name: str
    tissue: str
    platform: str
    read: Callable[[str], SpatialData]
    training: tuple[str, ...]
    test: tuple[str, ...]
    markers: tuple[str, ...]
    minutes: int
    download_mb: int
    revision: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: {"n_members": 10})

    def about(self) -> dict[str, Any]:
        """Return the row of the list of ready models."""
        return {
            "name": self.name,
            "tissue": self.tissue,
            "platform": self.platform,
            "trained_on": ", ".join(self.training),
            "tested_on": ", ".join(self.test),
            "minutes": self.minutes,
            "download_mb": self.download_mb,
        }

    def fit(self) -> Any:
        """Download and prepare the sections, fit the model and certify it."""
        cohort = {name: self.read(name) for name in (*self.training, *self.test)}
        prepare_cohort(cohort, extractor=DEFAULT_EXTRACTOR, stain="vahadane", weights=None, say=logger.info)
        training = {name: cohort[name] for name in self.training}
        genes = pp.select_genes(training, n_top=1000, include=self.markers)
        model = tl.fit_nb(training, genes=genes, **self.options)
        return tl.certify({name: cohort[name] for name in self.test}, model)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        ReadyModel(
            "breast_her2st", "HER2-positive breast tumor, one patient", "legacy Spatial Transcriptomics",
            datasets.her2st, ("C2", "C3", "C4"), ("C5",), BREAST_MARKERS, minutes=2, download_mb=20,
        ),
        ReadyModel(
            "breast_visium", "breast cancer, fresh frozen, one patient", "Visium", datasets.visium,
            ("V1_Breast_Cancer_Block_A_Section_1", "V1_Breast_Cancer_Block_A_Section_2"),
            ("Parent_Visium_Human_BreastCancer",), BREAST_MARKERS, minutes=30, download_mb=5000,
        ),
        ReadyModel(
            "prostate_visium", "prostate cancer, FFPE, one patient", "Visium", datasets.visium,
            ("Visium_FFPE_Human_Prostate_Cancer",), ("Visium_FFPE_Human_Prostate_Acinar_Cell_Carcinoma",), (),
            minutes=15, download_mb=3000,
        ),
    )
}  # fmt: skip
