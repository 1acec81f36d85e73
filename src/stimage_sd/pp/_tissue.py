"""Find the tissue of a section as a mask on a thumbnail."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract

TissueMethod = Literal["grabcut", "otsu"]
#: share of a slide below which tissue counts as dust
_SMALLEST_FRACTION = 1e-3
#: least optical density of tissue above glass (natural log, mean of channels)
_LEAST_DENSITY = 0.05


def tissue_mask(
    data: SpatialData | contract.Cohort,
    *,
    method: TissueMethod = "grabcut",
    max_side: int = 1500,
    image_key: str | None = None,
    key_added: str | None = None,
) -> None:
    """Find the tissue on a thumbnail of the H&E and write it as labels ``tissue``.

    Parameters
    ----------
    data
        A section, or a cohort of sections.
    method
        ``"otsu"`` uses Otsu's threshold on saturation and drops near-gray pixels and glass. ``"grabcut"`` refines the
        border of that mask with OpenCV's GrabCut, as in the paper's code.
    max_side
        Longest side of the thumbnail, px.
    image_key
        The H&E image, if not the section's default.
    key_added
        Name of the labels. By default ``"tissue"``, or ``"tissue_mask"`` if another element has that name.

    Returns
    -------
    Nothing. Writes ``labels["tissue"]``, ``uint8 (y, x)``, 1 on tissue, in every coordinate system of the H&E. Later
    steps use the labels under `key_added`.

    Raises
    ------
    ValueError
        If a section has no tissue, or its image is not 8-bit RGB.

    Notes
    -----
    Paper, section 2.2: "STImage uses OpenCV2 for tissue masking".

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> white = np.full((200, 200, 3), 255, np.uint8)
    >>> white[50:150, 50:150] = (180, 90, 160)
    >>> _ = cv2.imwrite("square.png", white)
    >>> section = sti.io.slide("square.png")
    >>> sti.pp.tissue_mask(section)
    >>> float(np.mean(section.labels["tissue"] == 1))
    0.25
    """
    find = {"grabcut": grabcut_mask, "otsu": otsu_mask}
    if method not in find:
        raise ValueError(f"Expected `method` to be one of {sorted(find)}, found {method!r}.")
    for sdata in contract.sections(data).values():
        name = contract.image_name(sdata, image_key)
        contract.check_rgb(sdata, name)
        thumbnail, _ = contract.thumbnail(sdata, name, max_side=max_side)
        mask = find[method](thumbnail)
        if mask.mean() < _SMALLEST_FRACTION:
            raise ValueError(
                f"Found no tissue on {name!r} of section {contract.sample(sdata)!r} "
                f"({mask.mean():.2%} of the slide stands out from glass). Is it the H&E image?"
            )
        height, width = contract.levels(sdata, name)[0].shape[1:]
        contract.write_tissue(
            sdata, mask, downsample=(height / mask.shape[0], width / mask.shape[1]), image_key=name, key_added=key_added
        )
        contract.record(sdata, "pp.tissue_mask", method=method, image=name, max_side=max_side)


def otsu_mask(thumbnail: np.ndarray) -> np.ndarray:
    """Return the tissue mask by Otsu's threshold on saturation.

    - `thumbnail`: ``uint8 (y, x, 3)`` RGB.
    - returns: ``bool (y, x)``.
    """
    smooth = cv2.GaussianBlur(thumbnail, (0, 0), 1.0)
    saturation = cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV)[..., 1]
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    glass = np.percentile(smooth.reshape(-1, 3), 99, axis=0)
    density = -np.log((smooth + 1.0) / (glass + 1.0)).mean(axis=2)
    gray = np.ptp(smooth.astype(np.int16), axis=2) < 8
    # an image without glass has no meaningful Otsu threshold, so saturation above 40 always counts as tissue
    candidate = (saturation > min(threshold, 40)) & ~gray
    absorbing = (density > _LEAST_DENSITY) | (saturation > 80)
    return _tidy(candidate & absorbing)


def grabcut_mask(thumbnail: np.ndarray) -> np.ndarray:
    """Return the tissue mask by Otsu's threshold, with its border refined by GrabCut.

    - `thumbnail`: ``uint8 (y, x, 3)`` RGB.
    - returns: ``bool (y, x)``.
    """
    first = otsu_mask(thumbnail)
    if not 0.001 < first.mean() < 0.999:
        return first
    scale = min(1.0, 600 / max(thumbnail.shape[:2]))
    size = (max(1, round(thumbnail.shape[1] * scale)), max(1, round(thumbnail.shape[0] * scale)))
    small = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    seed = cv2.resize(first.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    kernel = np.ones((5, 5), np.uint8)
    labels = np.where(seed > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[cv2.erode(seed, kernel) > 0] = cv2.GC_FGD
    labels[cv2.dilate(seed, kernel) == 0] = cv2.GC_BGD
    if not ((labels == cv2.GC_FGD).any() and (labels == cv2.GC_BGD).any()):
        return first
    cv2.setRNGSeed(0)
    cv2.grabCut(small[..., ::-1].copy(), labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    mask = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    return _tidy(cv2.resize(mask, first.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0)


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Close gaps between nuclei, drop dust and fill small holes. Large holes are lumen or tears and stay."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    smallest = max(16, round(2e-4 * closed.size))
    return ~_without_small(~_without_small(closed > 0, smallest), smallest)


def _without_small(mask: np.ndarray, smallest: int) -> np.ndarray:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = statistics[:, cv2.CC_STAT_AREA] >= smallest
    large[0] = False
    return large[labels]
