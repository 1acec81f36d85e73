"""Sections that cannot be used: a cohort goes on without them where it can, and the error names section and mend."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from spatialdata import SpatialData

import stimage_sd as sti
from stimage_sd import contract


class DarkDiscs:
    """Finds what is dark; everything is of one type."""

    classes, mpp, n_values, key = ("immune", "stromal"), 0.5, 2, "dark-discs"

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.stack([cv2.connectedComponents((image[..., 0] < 120).astype(np.uint8))[1] for image in images])
        values = np.broadcast_to(np.float32([0.8, 0.2]), (*labels.shape, 2))
        return labels.astype(np.int32), values


@pytest.fixture
def section(make_slide: Callable[..., SpatialData]) -> Callable[..., SpatialData]:
    def make(n_discs: int, *, mpp: float | None = 0.5, sample: str = "slide") -> SpatialData:
        image = np.full((192, 192, 3), 243, np.uint8)
        image[12:180, 12:180] = (215, 150, 200)
        for number in range(n_discs):
            cv2.circle(image, (40 + 40 * number, 90), 8, (80, 40, 120), -1)
        sdata = make_slide(image, mpp=mpp, sample=sample)
        if mpp is not None:
            sti.pp.tile(sdata, layout="grid", size_um=90, min_tissue=0.0)
        return sdata

    return make


def test_cells_of_the_other_sections_are_predicted(section: Callable[..., SpatialData]) -> None:
    cohort = {
        "good": section(3),
        "blank": section(0, sample="blank"),
        "unknown": section(2, mpp=None),
        "last": section(2),
    }
    with pytest.warns(UserWarning, match="2 of 4 sections failed") as said:
        sti.tl.predict_cells(cohort, DarkDiscs())
    text = str(said[-1].message)
    assert "'blank': ValueError: Found no nuclei on section 'blank'" in text
    assert "'unknown': ValueError" in text
    assert {name: len(sdata["cell_types"]) for name, sdata in cohort.items() if "cell_types" in sdata.tables} == {
        "good": 3,
        "last": 2,
    }


def test_a_section_by_itself_and_a_cohort_that_fails_raise(section: Callable[..., SpatialData]) -> None:
    with pytest.raises(ValueError, match="Found no nuclei on section 'blank'"):
        sti.tl.predict_cells(section(0, sample="blank"), DarkDiscs())
    with pytest.raises(ValueError, match="Found no nuclei on section 'one'") as raised:
        sti.tl.predict_cells({"a": section(0, sample="one"), "b": section(0, sample="two")}, DarkDiscs())
    assert "All 2 sections failed" in raised.value.__notes__[0]
    assert "'two'" in raised.value.__notes__[0]


@pytest.fixture
def cohort(make_spots: Callable[..., SpatialData]) -> dict[str, SpatialData]:
    random = np.random.default_rng(0)
    return {
        name: make_spots(n_side=5, counts=random.poisson(3, (25, 4)), features=random.normal(size=(25, 4)), sample=name)
        for name in ("a", "b")
    }


Fit = Callable[[dict[str, SpatialData]], object]
FITS: dict[str, Fit] = {
    "nb": lambda cohort: sti.tl.fit_nb(cohort, genes=["G0", "G1"], extractor="toy"),
    "classifier": lambda cohort: sti.tl.fit_gene_classifier(cohort, genes=["G0", "G1"], extractor="toy"),
    "baseline": lambda cohort: sti.tl.fit_baseline(cohort, sti.baselines.Ridge(), genes=["G0", "G1"], extractor="toy"),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_section_without_a_tile_is_named(cohort: dict[str, SpatialData], fit: Fit) -> None:
    contract.tiles(cohort["b"]).obs["keep"] = False
    with pytest.raises(ValueError, match=r"Section 'b' is empty: none of its 25 tiles is kept\. Leave the section out"):
        fit(cohort)
