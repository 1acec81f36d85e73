"""Recognize files and folders of other programs: what they are, and which call reads them."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py

from stimage_sd._damaged_files import reading
from stimage_sd._shown import Facts, counted, listed
from stimage_sd.io._cell_tables import AKOYA, POSITIONS
from stimage_sd.io._geojson_features import OBJECT_TYPE, read_features, rows_of
from stimage_sd.io._image_header import ImageHeader, read_header
from stimage_sd.io._legacy_st import SPOT_COLUMNS
from stimage_sd.io._loupe import BARCODE
from stimage_sd.io._space_ranger import SCALEFACTORS
from stimage_sd.io._text import open_text, punctuation
from stimage_sd.io._visium import find_files
from stimage_sd.io._visium_hd import BINNED, SEGMENTED
from stimage_sd.io._xenium import EXPERIMENT, Bundle, read_experiment

#: what is recognized, for the error on anything else
KNOWN = (
    "zarr stores of SpatialData or AnnData, h5ad, models, whole slides and images, GeoJSON, tables (slides, cells, "
    "spots, categories), features of TRIDENT or CLAM, results of predict and cohort, and folders of Visium, Visium HD, "
    "Xenium, HEST-1k or slides"
)
#: suffixes of whole slides and images in a folder of slides
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".tif", ".tiff", ".jpg", ".jpeg", ".png")
_GEOJSON = (".geojson", ".geojson.gz", ".geojson.zip", ".json", ".json.gz")
_TABLES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_ON_ARRAY = re.compile(r"\d+(\.\d+)?x\d+(\.\d+)?")


def recognize(path: Path) -> Facts | None:
    """Describe a file or folder of another program, with the call that reads it as ``next``. `None` if unknown."""
    name = path.name.lower()
    if path.is_dir():
        return next((facts for about in _FOLDERS if (facts := about(path)) is not None), None)
    if name.endswith(_GEOJSON):
        return _geojson(path)
    if name.endswith((".h5ad", ".h5")):
        return _h5ad(path) if name.endswith(".h5ad") else _h5(path)
    if name.endswith(_TABLES):
        return _table(path)
    if name == EXPERIMENT:
        return recognize(path.resolve().parent)
    if name.endswith(".fcs"):
        return {
            "file": "cells of cytometry (FCS)",
            "next": _call("codex", f'"{path}", "image.ome.tif"'),
        }
    header = read_header(path)
    return None if header is None else _image(path, header)


def _call(reader: str, arguments: str) -> str:
    return f"stimage_sd.io.{reader}({arguments})"


# --------------------------------------------------------------------------------------------------
# folders


def _xenium(path: Path) -> Facts | None:
    bundle = Bundle.find(path)
    if bundle.entry(EXPERIMENT) is None:
        return None
    about = read_experiment(bundle)
    version = about.get("analysis_sw_version", about.get("version", "not stated"))
    stated = {"panel": "panel_name", "tissue": "panel_tissue_type", "cells": "num_cells", "pixel size": "pixel_size"}
    return {
        "folder": f"Xenium run {bundle.sample!r}, version {version}",
        **{name: str(about[key]) for name, key in stated.items() if key in about},
        "parts": listed(stem for stem in ("cells", "cell_boundaries", "nucleus_boundaries", "transcripts")
                        if bundle.find_part(stem) is not None),
        "next": _call("xenium", f'"{path}", he_image="he.ome.tif"'),
    }  # fmt: skip


def _visium_hd(path: Path) -> Facts | None:
    outs = path / "outs" if (path / "outs").is_dir() else path
    bins, cells = outs / BINNED, outs / SEGMENTED
    if not bins.is_dir() and not cells.is_dir():
        return None
    sizes = [int(entry.name[7:-2]) for entry in sorted(bins.glob("square_*um")) if entry.name[7:-2].isdigit()]
    option = "" if not sizes or 8 in sizes else f", bin_um={sizes[-1]}"
    return {
        "folder": "Visium HD run of Space Ranger",
        "bins": f"{listed(sizes)} µm" if sizes else "none",
        "cells": "segmented" if cells.is_dir() else "none",
        "next": _call("visium_hd", f'"{path}"{option}, image="he.tif"'),
    }


def _visium(path: Path) -> Facts | None:
    outs = path / "outs" if (path / "outs").is_dir() else path
    if not (outs / "spatial").is_dir() and not any(outs.glob(f"*{SCALEFACTORS}")):
        return None
    files = find_files(path)
    return {
        "folder": f"Visium run {files.sample!r} of Space Ranger",
        "matrix": files.matrix.name,
        "positions": files.positions.name,
        "image": "full resolution not in the run; hires image" + (" is" if files.hires else " is not") + " there",
        "next": _call("visium", f'"{path}", image="he.tif"'),
    }


def _hest(path: Path) -> Facts | None:
    samples = sorted(file.stem for file in (path / "st").glob("*.h5ad")) if (path / "wsis").is_dir() else []
    if not samples:
        return None
    return {
        "folder": "samples of HEST-1k",
        "samples": counted(samples),
        "next": _call("hest", f'"{path}", "{samples[0]}"'),
    }


def slides_in(path: Path) -> Facts | None:
    """Describe the images of a folder, with the call that predicts a cohort. `None` if there are none."""
    suffixes = Counter(file.suffix.lower() for file in path.iterdir() if file.suffix.lower() in SLIDES)
    if not suffixes:
        return None
    suffix = suffixes.most_common(1)[0][0]
    return {
        "folder": "images or whole slides",
        "files": ", ".join(f"{number:,} {kind}" for kind, number in suffixes.most_common()),
        "next": f'stimage_sd.tl.predict_cohort(sorted(Path("{path}").glob("*{suffix}")), model, out="cohort")',
    }


_FOLDERS: tuple[Callable[[Path], Facts | None], ...] = (_xenium, _visium_hd, _visium, _hest)


# --------------------------------------------------------------------------------------------------
# files


def _image(path: Path, header: ImageHeader) -> Facts:
    power = "" if header.power is None else f", objective {header.power:g}x"
    mpp = "not stated" if header.mpp is None else f"{header.mpp:.4g} µm per pixel"
    option = "" if header.mpp is not None else ", mpp=MPP"
    colors = "RGB" if header.is_color else f"{header.n_channels} channel(s), no 8-bit RGB"
    reader = _call("slide", f'"{path}"{option}') if header.is_color else _call("codex", f'cells, "{path}"')
    return {
        "image": f"{header.kind}{power}",
        "size": f"{header.width:,} x {header.height:,} px, {header.n_levels} level(s)",
        **({"images": f"{header.n_images}, the largest is described"} if header.n_images > 1 else {}),
        "colors": colors,
        "resolution": mpp,
        "next": reader,
    }


def _geojson(path: Path) -> Facts | None:
    with reading(path, what="GeoJSON"):
        features = read_features(path)
        rows = rows_of(features, outline="cell")
    types = Counter(str(row[OBJECT_TYPE]) for row in rows)
    classes = Counter(str(row["classification"]) for row in rows if row.get("classification"))
    return {
        "file": "GeoJSON of QuPath or another program",
        "objects": ", ".join(f"{number:,} {kind}" for kind, number in types.most_common()) or "none with an area",
        **({"classes": listed(f"{name} ({number:,})" for name, number in classes.most_common())} if classes else {}),
        "next": _call("read_geojson", f'section, "{path}"'),
    }


def _h5ad(path: Path) -> Facts:
    with reading(path, what="an AnnData object (h5ad)"):
        adata = ad.read_h5ad(path, backed="r")
    try:
        return anndata_facts(adata, f'anndata.read_h5ad("{path}")')
    finally:
        adata.file.close()


def anndata_facts(adata: ad.AnnData, call: str) -> Facts:
    """Describe an AnnData object, given the call that reads it."""
    facts = {"AnnData": f"{adata.n_obs:,} x {adata.n_vars:,}"}
    for name in ("layers", "obsm", "uns"):
        if keys := [key for key in getattr(adata, name) if key is not None]:
            facts[name] = listed(keys)
    if "slides" in adata.uns and "prediction" in adata.uns:
        return facts | {
            "holds": "slides x genes, predicted by stimage_sd.tl.predict_cohort",
            "next": f'stimage_sd.tl.risk_groups({call}, time_key="months", event_key="died")',
        }
    if "prediction" in adata.uns:
        plot = f'squidpy.pl.spatial_scatter({call}, color="GENE")'
        return facts | {"holds": "predictions of this package", "next": plot}
    if "spatial" not in adata.obsm:
        return facts | {
            "positions": 'none in obsm["spatial"]',
            "next": f"stimage_sd.pp.annotate_cells(section, {call}) for single cells of known types",
        }
    libraries = adata.uns.get("spatial", {})
    images = [
        f"{name} ({', '.join(library['images'])}: reduced, the H&E file has finer tiles)"
        for name, library in (libraries.items() if hasattr(libraries, "items") else ())
        if "images" in library
    ]
    return facts | {
        "images": listed(images) if images else "none inside",
        "next": _call("from_anndata", call if images else f'{call}, "he.tif"'),
    }


def _h5(path: Path) -> Facts | None:
    with reading(path, what="HDF5"), h5py.File(path) as file:
        if {"features", "coords"} <= set(file):
            n_patches, width = file["features"].shape[-2:]
            facts = {
                "file": "features of TRIDENT or CLAM",
                "features": f"{n_patches:,} patches x {width:,}",
            }
            return facts | {"next": _call("read_tile_features", f'section, "{path}", extractor="NAME"')}
        if "matrix" in file and "shape" in file["matrix"]:
            n_features, n_barcodes = file["matrix"]["shape"][:2]
            facts = {"file": "counts of Space Ranger or Xenium", "counts": f"{n_barcodes:,} x {n_features:,}"}
            return facts | {"next": f"stimage-sd info {path.resolve().parent}, the folder of the run"}
    return None


def _table(path: Path) -> Facts | None:
    with reading(path, what="a table"), open_text(path) as lines:
        marks = punctuation(lines, "," if ".csv" in path.name.lower() else "\t")
        rows = csv.reader(lines, delimiter=marks["sep"])
        header = next(rows, [])
        first = next(rows, [])
        if len(header) == 1 and len(first) < 2 and " " not in header[0].strip():
            genes = [header[0], *first, *(row[0] for row in rows if row)]
            command = f"stimage-sd train SECTION.zarr --genes {path} --out MODEL"
            return {"file": "list of genes, one per line", "genes": counted(genes), "next": command}
        facts = next((found for about in _HEADERS if (found := about(path, header, first)) is not None), None)
        if facts is None:
            return None
        n_rows = bool(first) + sum(1 for row in rows if row)
    columns = [name for name in header if name]
    return {"file": facts.pop("file"), "rows": f"{n_rows:,}", "columns": counted(columns), **facts}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_slides(path: Path, header: list[str], first: list[str]) -> Facts | None:
    if "path" not in header:
        return None
    given = first[header.index("path")] if len(first) == len(header) else ""
    there = "is there" if given and Path(given).expanduser().exists() else "is not there"
    return {
        "file": "table of slides", "first": f"{given!r} {there}",
        "next": f"stimage-sd cohort {path} --model MODEL --out DIR",
    }  # fmt: skip


def _of_legacy_st(path: Path, header: list[str], first: list[str]) -> Facts | None:
    if set(SPOT_COLUMNS) <= set(header):
        kind, arguments = "spots", f'counts, image, "{path}"'
    elif first and _ON_ARRAY.fullmatch(first[0].strip('"')) and all(map(_NUMBER.fullmatch, first[1:])):
        kind, arguments = "counts", f'"{path}", image, spots'
    else:
        return None
    return {"file": f"{kind} of legacy Spatial Transcriptomics", "next": _call("legacy_st", arguments)}


def _of_barcodes(path: Path, header: list[str], first: list[str]) -> Facts | None:
    if BARCODE not in [name.lower() for name in header]:
        return None
    return {"file": "categories of spots", "next": _call("read_loupe", f'section, "{path}"')}


def _of_scores(path: Path, header: list[str], first: list[str]) -> Facts | None:
    if not {"section", "gene", "pearson"} <= set(header):
        return None
    return {"file": "scores of stimage_sd.tl.evaluate", "next": f'pandas.read_csv("{path}")'}


def _of_cells(path: Path, header: list[str], first: list[str]) -> Facts | None:
    names = {_plain(name) for name in header}
    # plain x and y are in tables of all kinds
    has_positions = any({_plain(x), _plain(y)} <= names for x, y, _ in POSITIONS if x != "x")
    if not has_positions and not any(AKOYA.fullmatch(name) for name in header):
        return None
    return {"file": "cells with positions", "next": _call("codex", f'"{path}", "image.ome.tif"')}


_HEADERS: tuple[Callable[[Path, list[str], list[str]], Facts | None], ...] = (
    _of_slides, _of_legacy_st, _of_barcodes, _of_scores, _of_cells,
)  # fmt: skip
