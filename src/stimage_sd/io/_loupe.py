"""Read spot categories from Loupe Browser and other CSV files of 10x Genomics."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._section import check_unique, require_file
from stimage_sd.io._text import open_text

#: header of the barcode column, in lower case
BARCODE = "barcode"
#: number of the GEM well that Space Ranger and Loupe append to a barcode
_WELL = re.compile(r"-\d+$")


def read_loupe(data: SpatialData, path: str | Path, *, table_key: str | None = None) -> None:
    r"""Read spot categories from Loupe Browser into the table of counts.

    Parameters
    ----------
    data
        The section.
    path
        CSV with a column ``Barcode`` and one column per category, such as an export of Loupe Browser or Space Ranger's
        ``clusters.csv``.
    table_key
        Name of the table of counts. Needed where the section has several.

    Returns
    -------
    Nothing. One categorical column per category is written to ``obs`` of the table of counts, under the name of the
    category. Characters that SpatialData does not allow become ``_``. Spots without an entry become missing values. An
    existing column of that name is replaced.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    KeyError
        If the file lacks barcodes or categories, or the section lacks counts.
    ValueError
        If the file is not CSV, a barcode is repeated, no barcode is in the section, or a category has the name of a
        column that the section reserves.

    Warns
    -----
    UserWarning
        If the file has barcodes that are not in the section.

    Notes
    -----
    Barcodes are first compared in full. If no barcode matches, they are compared without the number of the GEM well
    (``-1``), provided that all shortened barcodes stay unique in the file and in the section.

    Examples
    --------
    >>> import tempfile
    >>> from anndata import AnnData
    >>> from stimage_sd.io import from_anndata
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> adata.obs_names = ["AAAC-1", "AAAG-1"]
    >>> sdata = from_anndata(adata, np.full((200, 200, 3), 230, np.uint8), sample="tiny", spot_diameter_px=55.0)
    >>> path = Path(tempfile.mkdtemp()) / "Pathology.csv"
    >>> _ = path.write_text("Barcode,Pathology\nAAAC-1,Tumor\nAAAG-1,Stroma\n")
    >>> read_loupe(sdata, path)
    >>> sdata.tables["counts"].obs["Pathology"].tolist()
    ['Tumor', 'Stroma']
    """
    sdata = contract.section(data)
    path = require_file(path, what="a CSV file of categories")
    categories = _read(path)
    table = sdata.tables[contract.counts_name(sdata, table_key)]
    columns = _column_names(categories.columns, table.obs.columns, path)
    rows = _match(categories.index, table.obs_names, path, section=contract.sample(sdata))
    n_unknown = int((rows < 0).sum())
    if n_unknown:
        warnings.warn(
            f"{n_unknown} of {len(rows)} barcodes in {path.name} are not in section {contract.sample(sdata)!r}, such "
            f"as {categories.index[rows < 0][0]!r}. They are left out.",
            UserWarning,
            stacklevel=2,
        )
    for name, column in columns.items():
        labels = np.full(table.n_obs, None, dtype=object)
        labels[rows[rows >= 0]] = [value or None for value in categories[name][rows >= 0]]
        present = sorted({label for label in labels if label is not None}, key=_natural)
        table.obs[column] = pd.Categorical(labels, categories=present)
    contract.record(
        sdata, "io.read_loupe", path=path, columns=list(columns.values()), n_matched=len(rows) - n_unknown,
        n_unknown=n_unknown,
    )  # fmt: skip


def _read(path: Path) -> pd.DataFrame:
    """Return the categories as ``str``, indexed by barcode."""
    try:
        with open_text(path) as lines:
            frame = pd.read_csv(lines, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a CSV file at {path}, found one that cannot be read ({error}).") from error
    barcodes = [name for name in frame.columns if name.strip().lower() == BARCODE]
    if not barcodes or frame.shape[1] < 2:
        raise KeyError(
            f"Expected a column `Barcode` and one per category in {path}, found {list(frame.columns)}. Export the "
            "category from Loupe Browser as CSV."
        )
    frame = frame.set_index(barcodes[0])
    check_unique(frame.index, what="barcode", where=str(path))
    return frame


def _column_names(categories: pd.Index, taken: pd.Index, path: Path) -> dict[str, str]:
    """Return the column name of each category, with characters that SpatialData can write."""
    columns = {name: re.sub(r"[^\w.-]", "_", name.strip()).lstrip("_") or "category" for name in categories}
    lower = {name.lower(): name for name in taken}
    for name, column in columns.items():
        same = lower.get(column.lower())
        if column in (contract.REGION_KEY, contract.INSTANCE_KEY) or (same is not None and same != column):
            raise ValueError(
                f"Expected categories with new names in {path}, found {name!r}, while the table of counts has a column "
                f"{same or column!r}. Rename the category in the file."
            )
        lower[column.lower()] = column
    if len(set(columns.values())) < len(columns):
        raise ValueError(
            f"Expected categories whose names differ in letters and digits in {path}, found {list(columns)}."
        )
    return columns


def _match(barcodes: pd.Index, spots: pd.Index, path: Path, *, section: str) -> np.ndarray:
    """Return the spot number of each barcode, or -1 for an unknown barcode."""
    rows = spots.get_indexer(barcodes)
    if (rows >= 0).any():
        return rows
    bare, bare_spots = (names.str.replace(_WELL, "", regex=True) for names in (barcodes, spots))
    if bare.is_unique and bare_spots.is_unique:
        rows = bare_spots.get_indexer(bare)
    if (rows < 0).all():
        raise ValueError(
            f"Expected barcodes of section {section!r}, such as {spots[0]!r}, in {path}, found none; its barcodes are "
            f"such as {barcodes[0] if len(barcodes) else None!r}. Check that the file belongs to this section."
        )
    return rows


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts "Cluster 10" after "Cluster 9"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
