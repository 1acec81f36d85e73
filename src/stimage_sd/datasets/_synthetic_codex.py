"""Synthetic CODEX section in the format of the CODEX Processor, with an H&E and known truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import cv2
import numpy as np
import pandas as pd
import tifffile

from stimage_sd.datasets._pyramid_writer import STRIP, write_pyramid
from stimage_sd.datasets._tissue_painter import SHIFT, Tissue, make_stain, paint, scatter_nuclei
from stimage_sd.datasets._truth import FIELDS, check_folder, draw_genes, log_mean

#: micrometers per pixel of the H&E, and of the multiplex image
MPP, PIXEL_UM = 0.5, 0.8
#: area per spot of a Visium array, µm², so that `n_spots` means the same area on all platforms
SPOT_UM2 = 100.0**2 * np.sqrt(3.0) / 2.0
#: smallest free margin around the tissue, as a share of the distance from center to border
MARGIN = 0.04
#: width of the ring of cytoplasm around a nucleus, µm
CYTOPLASM_UM = 2.0
#: mean intensity of a protein at one mean count per spot of its gene
GAIN = 40.0
#: shape of the gamma distribution of a protein across cells with equal mean
SHAPE = 4.0
#: offset and noise of the camera, and the highest intensity
OFFSET, NOISE, BRIGHTEST = 100.0, 6.0, 60_000.0
#: blur of the microscope, and rows needed beyond a strip for the blur, px
BLUR, HALO = 0.9, 8
#: side of the tiles of the multiplex image, and rows drawn per block, px
TILE = 512
#: longest side of the coarsest level of the pyramid, px
COARSEST = 1024
#: field of view of the microscope (x, y), px; ``tile_num`` is its number
FIELD_OF_VIEW = (1344, 1008)
#: markers per cycle, beside the nuclear stain
MARKERS = 3
#: largest offset that fits into the header of an FCS file
FCS_LIMIT = 99_999_999


def synthetic_codex(
    path: str | Path,
    *,
    n_spots: int = 120,
    n_genes: int = 60,
    n_proteins: int = 12,
    table_format: Literal["csv", "fcs"] = "csv",
    seed: int = 0,
    gene_seed: int = 0,
    stain_seed: int | None = None,
) -> Path:
    """Write a synthetic CODEX section: a table of cells, a multiplex image and a rotated H&E.

    Tissue, nuclei and genes are the same as in `synthetic_visium`. The intensity of a protein in a cell is gamma
    distributed. Its mean is proportional to the exponential of the log mean of the gene at the cell. A gene model
    trained on Visium can therefore predict the proteins, up to their correlation with the genes.

    Parameters
    ----------
    path
        Folder to write. Created if missing, otherwise it has to be empty.
    n_spots
        Size of the tissue, as the number of Visium spots that fit on the tissue.
    n_genes
        Genes of the truth. Sections with the same number have the same genes.
    n_proteins
        Number of genes with a measured protein. About a third of the genes and proteins are noise.
    table_format
        ``"csv"`` or ``"fcs"``.
    seed
        Seed of the tissue, the proteins and the position of the H&E.
    gene_seed
        Seed of the dependence of genes on the tissue.
    stain_seed
        Seed of the staining of the H&E. By default the standard staining.

    Returns
    -------
    The folder, with these files:

    - ``cells.csv`` or ``cells.fcs``: columns of the CODEX Processor, with a cycle of blanks and then cycles of a
      nuclear stain and three markers;
    - ``multiplex.ome.tif``: ``DAPI`` and the proteins, uint16, pyramidal, 0.8 µm per pixel;
    - ``he.tif``: pyramidal, 0.5 µm per pixel;
    - ``he_alignment.csv``: 3 × 3, pixels of the H&E to pixels of the multiplex image;
    - ``truth_names.csv``: ``gene`` and ``channel``;
    - ``truth_genes.csv``: as in `synthetic_visium`;
    - ``truth_cells.csv``: one row per cell, with ``x`` and ``y`` in pixels of the H&E, and the three fields.

    Raises
    ------
    ValueError
        If there is less than one spot or protein, fewer than three genes, more proteins than genes, or the format is
        unknown.
    FileExistsError
        If `path` is not empty.

    Examples
    --------
    >>> import tempfile
    >>> run = synthetic_codex(Path(tempfile.mkdtemp()) / "run", n_spots=5, n_proteins=3)
    >>> sorted(entry.name for entry in run.iterdir())[:4]
    ['cells.csv', 'he.tif', 'he_alignment.csv', 'multiplex.ome.tif']
    """
    if n_spots < 1 or n_genes < 3 or not 1 <= n_proteins <= n_genes:
        raise ValueError(
            f"Expected `n_spots` >= 1, `n_genes` >= 3 and `n_proteins` from 1 to `n_genes`, found {n_spots}, {n_genes} "
            f"and {n_proteins}."
        )
    if table_format not in ("csv", "fcs"):
        raise ValueError(f'Expected `table_format` to be "csv" or "fcs", found {table_format!r}.')
    path = check_folder(path)
    tissue, reach = _make_tissue(n_spots, seed)
    scene = _place(tissue, scatter_nuclei(tissue, reach), seed)
    genes = draw_genes(n_genes, gene_seed)
    panel = genes.iloc[np.linspace(0, n_genes - 1, n_proteins).round().astype(int)]
    channels = [f"AG{marker:02d}" for marker in range(1, n_proteins + 1)]
    generator = np.random.default_rng([seed, 40])
    mean = GAIN * np.exp(log_mean(tissue, scene.nuclei[:, :2], panel))
    proteins = np.minimum(mean * generator.gamma(SHAPE, 1.0 / SHAPE, mean.shape), BRIGHTEST).round(3)

    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        cells, nuclei = (_draw(scene, Path(scratch) / name, ring) for name, ring in (("c", CYTOPLASM_UM), ("n", 0.0)))
        sizes = np.zeros(len(proteins) + 1, dtype=np.int64)
        for top in range(0, scene.side, TILE):
            sizes += np.bincount(cells[top : top + TILE].ravel(), minlength=len(sizes))
        sizes = sizes[1:]
        planes = [(nuclei, 60.0 * scene.nuclei[:, 5]), *((cells, protein) for protein in proteins.T)]
        _write_multiplex(path / "multiplex.ome.tif", planes, ["DAPI", *channels], seed, Path(scratch))
        del cells, nuclei, planes
    # Cells fully covered by other cells are left out, as no segmentation finds them.
    seen = sizes > 0
    table = _cell_table(scene, sizes, proteins, channels, generator)[seen]
    if table_format == "fcs":
        _write_fcs(path / "cells.fcs", table)
    else:
        table.to_csv(path / "cells.csv", index=False)
    strips = paint(tissue, reach=reach, stain=make_stain(stain_seed), strip=STRIP)
    write_pyramid(path / "he.tif", strips, size=tissue.size, mpp=MPP)
    np.savetxt(path / "he_alignment.csv", scene.matrix, delimiter=",", fmt="%.12g")

    places = scene.nuclei[:, :2]
    truth = pd.DataFrame({"x": places[:, 0], "y": places[:, 1], **{name: tissue.at(name, places) for name in FIELDS}})
    truth.index = pd.Index(np.arange(1, len(truth) + 1), name="cell_id")
    truth[seen].to_csv(path / "truth_cells.csv")
    genes.to_csv(path / "truth_genes.csv")
    pd.DataFrame({"gene": panel.index, "channel": channels}).to_csv(path / "truth_names.csv", index=False)
    return path


# --------------------------------------------------------------------------------------------------
# positions


@dataclass(frozen=True)
class _Scene:
    """Nuclei and their position on the multiplex image."""

    #: ``(n, 6)`` nuclei from `scatter_nuclei`, pixels of the H&E
    nuclei: np.ndarray
    #: ``(3, 3)``, pixels of the H&E to pixels of the multiplex image
    matrix: np.ndarray
    #: rotation of the H&E, degrees
    turn: float
    #: side of the multiplex image, px
    side: int

    @property
    def centers(self) -> np.ndarray:
        """Centers ``(n, 2)`` x, y in pixels of the multiplex image."""
        return self.nuclei[:, :2] @ self.matrix[:2, :2].T + self.matrix[:2, 2]


def _make_tissue(n_spots: int, seed: int) -> tuple[Tissue, float]:
    """Return a tissue, and the eccentricity of an outline with the area of `n_spots` spots."""
    wanted = n_spots * SPOT_UM2 / MPP**2
    size = int(np.sqrt(wanted)) // TILE * TILE + 2 * TILE
    while True:
        tissue = Tissue(size, MPP, seed)
        grid = (np.arange(128) + 0.5) * size / 128.0
        out = np.sort(tissue.eccentricity(np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)))
        reach = float(out[min(int(wanted / size**2 * len(out)), len(out) - 1)])
        if reach < 1.0 - MARGIN:
            return tissue, reach
        size += TILE


def _place(tissue: Tissue, nuclei: np.ndarray, seed: int) -> _Scene:
    """Rotate the section by up to 30 degrees, and shift it slightly from the center of the multiplex image."""
    generator = np.random.default_rng([seed, 41])
    turn, scale = generator.uniform(-30.0, 30.0), MPP / PIXEL_UM
    side = -(-int(tissue.size * scale + 64) // 16) * 16
    angle = np.deg2rad(turn)
    matrix = np.eye(3)
    matrix[:2, :2] = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = side / 2.0 + generator.uniform(-24.0, 24.0, 2)
    matrix[:2, 2] = middle - matrix[:2, :2] @ np.full(2, tissue.size / 2.0)
    return _Scene(nuclei, matrix, float(turn), side)


def _draw(scene: _Scene, path: Path, ring_um: float) -> np.ndarray:
    """Draw nuclei, or cells with a ring of cytoplasm, as labels from 1: ``int32 (side, side)`` on disk."""
    labels = np.asarray(np.memmap(path, dtype=np.int32, mode="w+", shape=(scene.side, scene.side)))
    unit = 1 << SHIFT
    axes = np.rint((scene.nuclei[:, 2:4] * MPP + ring_um) / PIXEL_UM * unit).astype(int).tolist()
    centers = np.rint(scene.centers * unit).astype(int).tolist()
    for nucleus, (center, half_axes, angle) in enumerate(zip(centers, axes, scene.nuclei[:, 4], strict=True), 1):
        cv2.ellipse(labels, center, half_axes, float(angle) + scene.turn, 0, 360, nucleus, -1, cv2.LINE_8, SHIFT)
    return labels


# --------------------------------------------------------------------------------------------------
# the image


def _write_multiplex(
    path: Path, planes: list[tuple[np.ndarray, np.ndarray]], channels: list[str], seed: int, scratch: Path
) -> None:
    """Write a pyramidal OME-TIFF, one plane per channel, from labels and one intensity per label."""
    side = planes[0][0].shape[0]
    sides = [side]
    while sides[-1] > COARSEST:
        sides.append(sides[-1] // 2)
    # All planes of a level come before the next level, so the next level is kept on disk.
    halves = np.memmap(scratch / "halves", dtype=np.uint16, mode="w+", shape=(len(planes), side // 2, side // 2))
    common: dict[str, Any] = {"dtype": np.uint16, "tile": (TILE, TILE), "photometric": "minisblack", "predictor": True}
    common |= {"compression": "zlib", "compressionargs": {"level": 1}}
    about = {
        "axes": "CYX",
        "Channel": {"Name": channels},
        "PhysicalSizeX": PIXEL_UM,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": PIXEL_UM,
        "PhysicalSizeYUnit": "µm",
        # A random UUID would make each file different.
        "UUID": f"urn:uuid:{UUID(int=seed % 2**128)}",
    }
    with tifffile.TiffWriter(path, ome=True, bigtiff=len(planes) * side**2 > 2**30) as writer:
        shape = (len(planes), side, side)
        writer.write(_finest(planes, halves, seed), shape=shape, subifds=len(sides) - 1, metadata=about, **common)
        for level, level_side in enumerate(sides[1:]):
            shape = (len(planes), level_side, level_side)
            writer.write(_coarser(halves, level_side, 1 << level), shape=shape, subfiletype=1, metadata=None, **common)


def _finest(planes: list[tuple[np.ndarray, np.ndarray]], halves: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield the tiles of the finest level, and collect the next level."""
    side = planes[0][0].shape[0]
    noise = NOISE * np.random.default_rng([seed, 42]).standard_normal((TILE, side), dtype=np.float32)
    for plane, (labels, values) in enumerate(planes):
        intensities = np.concatenate([[0.0], values]).astype(np.float32)
        for top in range(0, side, TILE):
            above = max(top - HALO, 0)
            sharp = intensities[labels[above : top + TILE + HALO]]
            height = min(TILE, side - top)
            rows = cv2.GaussianBlur(sharp, (0, 0), BLUR)[top - above : top - above + height]
            rows = rows + OFFSET + np.roll(noise[:height], 37 * plane, axis=1)
            rows = np.clip(np.rint(rows), 0, 65_535).astype(np.uint16)
            halves[plane, top // 2 : (top + height) // 2] = _halve(rows)
            yield from _cut(rows)


def _coarser(halves: np.ndarray, side: int, factor: int) -> Iterator[np.ndarray]:
    """Yield the tiles of a coarser level, reduced from the second level."""
    for plane in halves:
        reduced = np.asarray(plane)
        for _ in range(factor.bit_length() - 1):
            reduced = _halve(reduced)
        for top in range(0, side, TILE):
            yield from _cut(reduced[top : min(top + TILE, side), :side])


def _halve(rows: np.ndarray) -> np.ndarray:
    even = rows[: rows.shape[0] // 2 * 2, : rows.shape[1] // 2 * 2]
    return cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)


def _cut(rows: np.ndarray) -> Iterator[np.ndarray]:
    for left in range(0, rows.shape[1], TILE):
        yield np.ascontiguousarray(rows[:, left : left + TILE])


# --------------------------------------------------------------------------------------------------
# the table


def _cell_table(
    scene: _Scene, sizes: np.ndarray, proteins: np.ndarray, channels: list[str], generator: np.random.Generator
) -> pd.DataFrame:
    """Return the table of cells in the layout of the CODEX Processor, with column names ``short:long``."""
    n_cells = len(sizes)
    x, y = np.rint(scene.centers).astype(int).T
    across = -(-scene.side // FIELD_OF_VIEW[0])
    tile = y // FIELD_OF_VIEW[1] * across + x // FIELD_OF_VIEW[0] + 1
    columns: dict[str, np.ndarray] = {"cell_id": np.arange(1, n_cells + 1), "region": np.ones(n_cells, dtype=int)}
    columns |= {"tile_num": tile, "x": x, "y": y, "z": np.zeros(n_cells, dtype=int)}
    columns |= {"x_tile": x % FIELD_OF_VIEW[0], "y_tile": y % FIELD_OF_VIEW[1], "size": sizes}
    columns = {f"{name}:{name}": values for name, values in columns.items()}
    # The first cycle is blank, to measure autofluorescence.
    measured = dict(zip(channels, proteins.T, strict=True))
    slots: list[str | None] = [*[None] * MARKERS, *channels, *[None] * (-len(channels) % MARKERS)]
    for cycle in range(len(slots) // MARKERS):
        stain = 60.0 * scene.nuclei[:, 5] * generator.normal(1.0, 0.05, n_cells)
        columns[f"cyc{cycle + 1:03d}_ch001:DAPI{cycle + 1}"] = stain.round(3)
        for channel, name in enumerate(slots[cycle * MARKERS : (cycle + 1) * MARKERS], 2):
            values = OFFSET * generator.gamma(20.0, 0.05, n_cells) if name is None else measured[name]
            columns[f"cyc{cycle + 1:03d}_ch{channel:03d}:{name or 'Blank'}"] = np.round(values, 3)
    return pd.DataFrame(columns)


def _write_fcs(path: Path, table: pd.DataFrame) -> None:
    """Write a table as an FCS 3.1 file with one data set of little-endian float32.

    Source: Spidlen et al. 2010, Data File Standard for Flow Cytometry, version FCS 3.1.
    """
    values = np.ascontiguousarray(table.to_numpy(), dtype="<f4")
    text = {"$BEGINANALYSIS": "0", "$ENDANALYSIS": "0", "$BEGINSTEXT": "0", "$ENDSTEXT": "0", "$NEXTDATA": "0"}
    text |= {"$BYTEORD": "1,2,3,4", "$DATATYPE": "F", "$MODE": "L"}
    text |= {"$PAR": str(values.shape[1]), "$TOT": str(values.shape[0])}
    for column, name in enumerate(table.columns, 1):
        short, _, long = name.partition(":")
        text |= {f"$P{column}N": short, f"$P{column}S": long, f"$P{column}B": "32", f"$P{column}E": "0,0"}
        text[f"$P{column}R"] = str(int(np.ceil(values[:, column - 1].max(initial=1.0))) + 1)
    # The text states the offset of the data, which follow the text. 20 digits are reserved for each offset.
    start = len("FCS3.1    ") + 6 * 8
    begin = start + len(_fcs_text(text | {"$BEGINDATA": "0" * 20, "$ENDDATA": "0" * 20}))
    end = begin + values.nbytes - 1
    segment = _fcs_text(text | {"$BEGINDATA": str(begin), "$ENDDATA": str(end)})
    places = [start, start + len(segment) - 1, *((begin, end) if end <= FCS_LIMIT else (0, 0)), 0, 0]
    header = "FCS3.1    " + "".join(f"{place:>8}" for place in places)
    path.write_bytes((header.encode() + segment).ljust(begin) + values.tobytes())


def _fcs_text(keywords: dict[str, str]) -> bytes:
    return ("|" + "".join(f"{key}|{value}|" for key, value in keywords.items())).encode()
