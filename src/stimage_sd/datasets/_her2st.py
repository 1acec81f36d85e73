"""HER2-positive breast tumors of Andersson et al. 2021, legacy Spatial Transcriptomics."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pooch
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import cache_dir
from stimage_sd.io import legacy_st

#: public repository of the authors; all files are checked by sha256
BASE_URL = "https://raw.githubusercontent.com/almaan/her2st/master/"
SECTIONS = tuple(
    f"{patient}{section}"
    for patient, count in zip("ABCDEFGH", (6, 6, 6, 6, 3, 3, 3, 3), strict=True)
    for section in range(1, count + 1)
)
FILES = ("image.jpg", "counts.tsv.gz", "spots.tsv", "clusters.tsv.gz")
#: published image of each section, and the sha256 of its `FILES`
REGISTRY: dict[str, tuple[str, tuple[str, str, str, str]]] = {
    "C2": (
        "5714_HE_BT_C2.jpg",
        (
            "26e2f73ae840cdd46c5bba405aae181f13a56a376b9848dff23f7a9c5de7f19e",
            "c1c59ea6cffae36b9ecb561b8e2a97e3aa5f4085f748e991a0e330ed9d09773d",
            "235b5f4306b3b57c628ffc82c98c7109602474fbcc79a917b9c50517f99b6b1c",
            "3211500325b1be1cd2be7480f2b094a48647fc25df4d8fe6afb8c48c15650ece",
        ),
    ),
    "C3": (
        "5714_HE_BT_D1.jpg",
        (
            "0005a92674014d473040a28f0afca89ce5fa5c44019b479b638ceb3272ceb568",
            "e00c55a3eb9caac5d9c71b8906aae8be8b38f93e23938f4a0ebee17683ef6a2a",
            "7fd76c13370b7804ac3bb377b846d22485cf9223f9dd8dfc25be06e5aaf65755",
            "a1522a14855bc2022ccbb9ea9cbae59837cbcd310bc4c02727ae6bfa37e6d369",
        ),
    ),
    "C4": (
        "5714_HE_BT_D2.jpg",
        (
            "f40607eb1d5f0d125decd71c48b0c5d29cf6776ad92297fd185631208c82d6f2",
            "33201f76d41d7131dc600a0f87d9a70383af3503e81698b4d11e6f2e8d73e9da",
            "47e79f3b9dbfa3a8c18af9e948ba7ba4bf0a75ea1b4c292bc714ced7d0917d4c",
            "a5cc7a3a40983a21ea8400145c80a7dc5b13e7468b987ec0610f4c2123978c71",
        ),
    ),
    "C5": (
        "5714_HE_BT_E1.jpg",
        (
            "34028ea41e376396b50c42b0a11a7e689c85be4a8022e668d0a09cc128c04c65",
            "c0f310315ca6110d74dbdf7011e5b42432ba0b8eb5f001824764911988f39338",
            "2114cc3b4da759772112897f1e247d5443c9f8c808e6a9a952eb4fda379a194c",
            "5929e9183e09717891fce94a71ec94551a86d5267ebb085067ac1d71894bc4ea",
        ),
    ),
}


def her2st(section: str) -> SpatialData:
    """Read a section of a HER2-positive breast tumor.

    If the folder ``$STIMAGE_SD_DATA/her2st/<section>`` exists, the section is read from there. The folder holds
    ``image.jpg``, ``counts.tsv.gz``, ``spots.tsv`` and optionally ``clusters.tsv.gz``. Otherwise the files are
    downloaded once from the public repository of the authors into the cache folder, and checked by sha256.

    Parameters
    ----------
    section
        Published name: a patient ``A`` to ``H`` and a number, such as ``"C2"``. Sections ``C2`` to ``C5`` can be
        downloaded.

    Returns
    -------
    A section as returned by `stimage_sd.io.legacy_st`, with about 180 spots × 15,700 genes and an H&E of about 9,900 ×
    9,300 px. The published expression clusters are in ``tables["counts"].obs["cluster"]``, categorical.

    Raises
    ------
    ValueError
        If no section with this name was published, if the section is not in the data folder and cannot be downloaded,
        or if a downloaded file differs from the published file.

    Notes
    -----
    Andersson et al. 2021, "Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated
    cell type interactions", Nature Communications 12:6012; data at github.com/almaan/her2st.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sdata = sti.datasets.her2st("C5")  # doctest: +SKIP
    """
    if section not in SECTIONS:
        raise ValueError(f"Expected a section of her2st, one of {', '.join(SECTIONS)}; found {section!r}.")
    image, counts, spots, clusters = _locate(section)
    sdata = legacy_st(counts, image, spots, sample=section)
    if clusters.is_file():
        _add_clusters(sdata, clusters)
    contract.remember(sdata, patient=section[0])
    contract.record(sdata, "datasets.her2st", section=section)
    return sdata


def _locate(section: str) -> list[Path]:
    """Return the paths of the `FILES` of a section. Download files that are not in the data folder."""
    data = os.environ.get("STIMAGE_SD_DATA")
    local = Path(data).expanduser() / "her2st" / section if data else None
    if local is not None and local.is_dir():
        return [local / name for name in FILES]
    if section not in REGISTRY:
        raise ValueError(
            f"Section {section!r} of her2st cannot be fetched, as its sha256 is not known. Sections that can be "
            f"fetched: {', '.join(REGISTRY)}. Or put its files ({', '.join(FILES)}) into the folder her2st/{section} "
            f"of $STIMAGE_SD_DATA, which is {data or 'not set'}."
        )
    image, hashes = REGISTRY[section]
    published = (
        f"data/ST-imgs/{section[0]}/{section}/{image}",
        f"data/ST-cnts/{section}.tsv.gz",
        f"data/ST-spotfiles/{section}_selection.tsv",
        f"res/ST-cluster/lbl/{section}-cluster-annotation.tsv.gz",
    )
    return [
        Path(
            pooch.retrieve(
                BASE_URL + remote, known_hash=f"sha256:{known}", fname=name, path=cache_dir() / "her2st" / section
            )
        )
        for name, remote, known in zip(FILES, published, hashes, strict=True)
    ]


def _add_clusters(sdata: SpatialData, path: Path) -> None:
    frame = pd.read_csv(path, sep="\t", index_col=0)
    names = frame["x"].astype(str) + "x" + frame["y"].astype(str)
    labels = pd.Series(frame["label"].astype(str).to_numpy(), index=names)
    table = sdata.tables[contract.COUNTS]
    table.obs["cluster"] = pd.Categorical(labels.reindex(table.obs_names))
