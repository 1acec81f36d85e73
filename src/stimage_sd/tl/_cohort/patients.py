"""Convert cohort tables (slides x genes) to one row per patient, for survival and response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData


@dataclass(frozen=True)
class Patients:
    """Expression and outcomes, one row per patient.

    - `names`: names of the patients, ``(n_patients,)``.
    - `values`: means over a patient's slides, ``float64 (n_patients, n_genes)``.
    - `genes`: names of the genes, ``(n_genes,)``.
    - `obs`: requested columns, one row per patient.
    """

    names: np.ndarray
    values: np.ndarray
    genes: np.ndarray
    obs: pd.DataFrame

    def of(self, rows: np.ndarray) -> Patients:
        """Return a subset of patients, by mask or row numbers."""
        return Patients(self.names[rows], self.values[rows], self.genes, self.obs[rows])


def patients_of(
    table: AnnData,
    columns: Sequence[str],
    *,
    patient: str | None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
) -> Patients:
    """Convert a table of slides to one row per patient.

    - `table`: slides x genes.
    - `columns`: required columns of ``obs``. Values must be present and equal for all slides of a patient.
    - `patient`: column of ``obs`` with the patient. `None`: every row is a patient.
    - `genes`: genes to keep. Default: all genes.
    - `layer`: layer of the values. Default: ``X``.
    - returns: the patients, in the order of their first slide.
    """
    wanted = [*columns, *([patient] if patient is not None else [])]
    missing = [name for name in wanted if name not in table.obs]
    if missing:
        raise KeyError(f"No column {missing[0]!r} in the table's obs, found {sorted(map(str, table.obs.columns))}.")
    if layer is not None and layer not in table.layers:
        raise KeyError(f"No layer {layer!r} in the table, found {sorted(table.layers)}.")
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()][:3].tolist()
        raise ValueError(f"Expected unique gene names, found {twice} twice. Sum or remove the duplicates.")
    chosen = table.var_names if genes is None else pd.Index(genes).unique()
    if not len(chosen) or not table.n_obs:
        raise ValueError(f"Expected at least one row and one gene, found {table.n_obs} rows and {len(chosen)} genes.")
    unknown = chosen[~chosen.isin(table.var_names)]
    if len(unknown):
        raise KeyError(f"{len(unknown)} genes are not in the table, such as {unknown[:3].tolist()}.")
    empty = table.obs[wanted].isna().any(axis=1)
    if empty.any():
        raise ValueError(
            f"{int(empty.sum())} of {table.n_obs} rows lack a value in {wanted}, such as "
            f"{table.obs_names[empty][0]!r}. Leave them out: `table[table.obs[{wanted}].notna().all(axis=1)]`."
        )
    part = table[:, chosen]
    matrix = part.X if layer is None else part.layers[layer]
    values = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float64)
    if not np.isfinite(values).all():
        gene = chosen[int(np.flatnonzero(~np.isfinite(values).all(axis=0))[0])]
        raise ValueError(f"Expected finite expression, found NaN or infinity, for instance of {gene!r}. Leave it out.")
    if patient is None:
        return Patients(np.asarray(table.obs_names), values, np.asarray(chosen), table.obs[list(columns)])
    return _averaged(table.obs, values, np.asarray(chosen), list(columns), patient)


def _averaged(obs: pd.DataFrame, values: np.ndarray, genes: np.ndarray, columns: list[str], patient: str) -> Patients:
    codes, names = pd.factorize(obs[patient].astype(str))
    grouped = obs[columns].groupby(codes)
    differ = (grouped.nunique() > 1).any(axis=1)
    if differ.any():
        which = names[int(np.flatnonzero(differ)[0])]
        raise ValueError(f"Slides of patient {which!r} differ in {columns}; expected one value per patient.")
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, codes, values)
    means = sums / np.bincount(codes)[:, None]
    return Patients(np.asarray(names), means, genes, grouped.first().set_axis(names))


def survival_of(patients: Patients, time: str, event: str) -> tuple[np.ndarray, np.ndarray]:
    """Check and return times and events of patients.

    - returns: times, ``float64 (n_patients,)``, and events, ``bool (n_patients,)``, `True` for an observed event.
    """
    times = patients.obs[time].to_numpy(dtype=np.float64)
    if not (times > 0).all():
        raise ValueError(f"Expected positive times in {time!r}, found {times.min():g}. Leave those rows out.")
    seen = pd.unique(patients.obs[event])
    if not set(seen) <= {0, 1}:
        raise ValueError(
            f"Expected 1 (seen) and 0 (censored) in {event!r}, found {list(seen)[:4]}. If a table holds "
            "censorship instead: `table.obs['event'] = table.obs['censorship'] == 0`."
        )
    events = patients.obs[event].to_numpy().astype(bool)
    if not events.any():
        raise ValueError(f"No event was seen in {event!r}: every patient is censored.")
    return times, events


def groups_of(patients: Patients, by: str | None) -> dict[str, np.ndarray]:
    """Return a row mask per group of patients, or one group ``"all"`` without `by`."""
    if by is None:
        return {"all": np.ones(len(patients.names), dtype=bool)}
    values = patients.obs[by].astype(str).to_numpy()
    return {name: values == name for name in dict.fromkeys(values)}
