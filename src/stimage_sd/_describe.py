"""Describe anything that the package reads or writes: what it is, and which call comes next."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._report import model_report, section_report
from stimage_sd._shown import Facts, counted, lines, listed
from stimage_sd._store import attributes_of, is_spatialdata, is_store, read_section
from stimage_sd.io._from_spatialdata import from_spatialdata
from stimage_sd.io._recognize import KNOWN, anndata_facts, recognize, slides_in
from stimage_sd.io._wsidata import is_wsi
from stimage_sd.models._ready import is_ready
from stimage_sd.models._resolve import as_model

_COHORT, _SLIDES = "cohort.h5ad", "slides.csv"


def describe(path: Path) -> str:
    """Describe a file, folder, store or ready model in a few lines. No pixels are read.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    ValueError
        If the file is of no known kind, or is damaged.
    """
    if not path.exists():
        if is_ready(path):
            return model_report(as_model(path))
        raise FileNotFoundError(f"Nothing at {path}. Expected {KNOWN}.")
    if is_store(path):
        return _store(path)
    if _is_model(path):
        return model_report(as_model(path))
    facts = recognize(path)
    if path.is_dir():
        facts = _cohort(path) or facts or _stores(path) or slides_in(path)
    if facts is None:
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        held = f" It holds {listed(names)}." if names else ""
        raise ValueError(f"{path} is of no known kind.{held} Known are {KNOWN}.")
    return "\n".join(lines(facts))


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "config.json").is_file()
    if path.suffix == ".stimage":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "config.json" in archive.namelist()


def _store(path: Path) -> str:
    if not is_spatialdata(path) and attributes_of(path).get("encoding-type") == "anndata":
        import anndata

        call = f'anndata.read_zarr("{path}")'
        return "\n".join(lines(anndata_facts(anndata.read_zarr(path), call)))
    sdata = read_section(path)
    if contract.info(sdata)["history"]:
        return section_report(sdata, path)
    return "\n".join(lines(_foreign(sdata, path)))


def _foreign(sdata: SpatialData, path: Path) -> Facts:
    """Describe an object of another tool, and what `from_spatialdata` makes of it."""
    facts = {"SpatialData": "of LazySlide" if is_wsi(sdata) else "of another tool"}
    for kind in ("images", "labels", "points", "shapes"):
        if names := list(getattr(sdata, kind)):
            facts[kind] = listed(names)
    if sdata.tables:
        sizes = (f"{name} ({table.n_obs:,} x {table.n_vars:,})" for name, table in sdata.tables.items())
        facts["tables"] = ", ".join(sizes)
    facts["systems"] = listed(sdata.coordinate_systems)
    call = f'stimage_sd.io.from_spatialdata(spatialdata.read_zarr("{path}")'
    if is_wsi(sdata):
        return facts | {"next": f'{call}, slide="slide.svs")'}
    try:
        adopted = from_spatialdata(sdata)
    except (KeyError, ValueError) as error:
        return facts | {"to settle": str(error.args[0]), "next": f"{call}, ...)"}
    if isinstance(adopted, dict):
        return facts | {"samples": counted(list(adopted)), "next": f"{call})"}
    mpp = contract.mpp(adopted)
    resolution = "resolution unknown: pass `mpp=`" if mpp is None else f"{mpp:.4g} µm per pixel"
    return facts | {"adopted as": f"{_image(adopted)}, {resolution}", "next": f"{call})"}


def _image(sdata: SpatialData) -> str:
    try:
        return f"H&E {contract.image_name(sdata)!r}"
    except KeyError:
        return "no H&E"


def _cohort(path: Path) -> Facts | None:
    """Describe the results of `stimage_sd.tl.predict_cohort`."""
    if not ((path / _COHORT).is_file() and (path / _SLIDES).is_file()):
        return None
    status = pd.read_csv(path / _SLIDES)["status"].value_counts()
    return {
        "folder": "results of stimage-sd cohort",
        "slides": ", ".join(f"{number:,} {name}" for name, number in status.items()),
        "files": f"{_COHORT} (slides x genes), {_SLIDES} (status and reason per slide)",
        "next": f'anndata.read_h5ad("{path / _COHORT}"), for stimage_sd.tl.risk_groups and bulk_correlation',
    }


def _stores(path: Path) -> Facts | None:
    """Describe a folder of stores, models and reports."""
    stores = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and is_store(entry))
    models = sorted(entry.name for entry in path.glob("*.stimage"))
    if not stores and not models:
        return None
    reports = sorted(entry.name for entry in path.glob("*.html"))
    facts = {"folder": "results of this package" if reports or models else "zarr stores"}
    for name, names in (("stores", stores), ("models", models), ("reports", reports)):
        if names:
            facts[name] = counted(names)
    return facts | {"next": f"stimage-sd info {path / (stores or models)[0]}"}
