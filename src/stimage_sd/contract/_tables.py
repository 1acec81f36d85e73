"""Find the tables of a section that hold measured counts or proteins, of spots or of cells."""

from __future__ import annotations

from typing import Literal

from spatialdata import SpatialData

from stimage_sd.contract._elements import is_result, looks_like_counts
from stimage_sd.contract._names import COUNTS, PROTEINS, SPOT_COUNTS, SPOT_PROTEINS, single
from stimage_sd.contract._section import info, remember

#: kind of measurement
Against = Literal["counts", "proteins"]
_PROTEIN_TABLES = (PROTEINS, SPOT_PROTEINS)


def _counted(sdata: SpatialData) -> list[str]:
    """Return the names of the tables that may hold counts."""
    return [name for name, table in sdata.tables.items() if name not in _PROTEIN_TABLES and not is_result(name, table)]


def holds_counts(sdata: SpatialData, name: str) -> bool:
    """Return whether a table, or one of its layers, holds measured counts."""
    return name in _counted(sdata) and looks_like_counts(sdata.tables[name])


def has_counts(sdata: SpatialData) -> bool:
    """Return whether the section has at least one table of raw counts."""
    return bool(_counted(sdata))


def has_units(sdata: SpatialData) -> bool:
    """Return whether the section has units with measured counts or proteins."""
    return has_counts(sdata) or any(name in sdata.tables for name in _PROTEIN_TABLES)


def activate(sdata: SpatialData, against: Against, name: str | None) -> None:
    """Set the table that later steps use for the section's counts or proteins. `None` unsets it."""
    remember(sdata, **{against: name})


def counts_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the active table of raw counts, else the platform's own."""
    mend = "Read the section with a reader that has molecules, such as `stimage_sd.io.visium`."
    return _table_name(sdata, "counts", _counted(sdata), table_key, mend=mend)


def proteins_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the active table of protein intensities, else the platform's own."""
    candidates = [name for name in _PROTEIN_TABLES if name in sdata.tables]
    mend = "Read the section with a reader that has proteins, such as `stimage_sd.io.codex`."
    return _table_name(sdata, "proteins", candidates, table_key, mend=mend)


def _table_name(sdata: SpatialData, against: Against, candidates: list[str], table_key: str | None, mend: str) -> str:
    what = f"table of {against}"
    if table_key is not None:
        candidates = [name for name in sdata.tables if name == table_key]
        return single(candidates, what=what, argument="table_key", found=sorted(sdata.tables), mend=mend)
    stated, usual = info(sdata).get(against), COUNTS if against == "counts" else PROTEINS
    if stated in sdata.tables:
        return str(stated)
    # beside other tables, a table named "counts" may hold something else
    if usual in sdata.tables and (
        len(candidates) < 2 or against == "proteins" or looks_like_counts(sdata.tables[usual])
    ):
        return usual
    if against == "counts" and len(candidates) > 1:
        # objects from other software may also have tables of features or scores
        candidates = [name for name in candidates if looks_like_counts(sdata.tables[name])] or candidates
    return single(candidates, what=what, argument="table_key", found=sorted(sdata.tables), mend=mend)


def default_against(sdata: SpatialData) -> Against:
    """Return ``"proteins"`` if the section has only proteins, else ``"counts"``."""
    return "counts" if has_counts(sdata) or not has_units(sdata) else "proteins"


def cell_table_names(sdata: SpatialData) -> list[str]:
    """Return the names of the tables that may be of cells or bins, without aggregated spots and results."""
    made = (SPOT_COUNTS, SPOT_PROTEINS)
    return sorted(name for name, table in sdata.tables.items() if name not in made and not is_result(name, table))


def cell_table_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the table of a section's own units, not of spots aggregated from these."""
    if table_key is not None:
        if table_key not in sdata.tables:
            raise KeyError(f"No table {table_key!r}; this section's tables: {sorted(sdata.tables)}.")
        return table_key
    names, about = cell_table_names(sdata), info(sdata)
    for candidate in (about.get("units"), COUNTS, PROTEINS, about.get("counts"), about.get("proteins")):
        if candidate in names:
            return str(candidate)
    if len(names) > 1:
        names = [name for name in names if looks_like_counts(sdata.tables[name])] or names
    return single(names, what="table of cells", argument="table_key", found=sorted(sdata.tables))
