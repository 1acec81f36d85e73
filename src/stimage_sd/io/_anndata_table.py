"""Find the counts of an AnnData object, and make the table of a section of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata.models import TableModel

from stimage_sd import contract
from stimage_sd.io._section import as_counts, unique_genes
from stimage_sd.io._tenx import PROTEINS

#: columns of ``obs`` that the section's table reserves
RESERVED = (contract.REGION_KEY, contract.INSTANCE_KEY)
#: keys of ``uns`` that the section's table writes itself
_OWN_UNS = ("spatial", TableModel.ATTRS_KEY)


@dataclass(frozen=True)
class Counts:
    """Location of the counts in an `AnnData`.

    - `where`: location in words.
    - `values`: the table's ``X``. `None` keeps the ``X`` of `adata`.
    - `layer`, `layer_values`: layer of counts where ``X`` holds other values, with its values if `adata` lacks the
      layer.
    - `of_raw`: whether the table has the genes of ``adata.raw`` because `adata` has other genes.
    """

    where: str
    values: Any = None
    layer: str | None = None
    layer_values: Any = None
    of_raw: bool = False


def find_counts(adata: AnnData, layer: str | None) -> Counts:
    layers = [name for name in adata.layers if name is not None]  # anndata 0.13 lists X as None
    if layer is not None:
        if layer not in layers:
            raise KeyError(f"No layer {layer!r} in `adata`; its layers: {sorted(layers)}.")
        return _in_layer(adata, layer)
    searches = (
        lambda: _in_layer(adata, "counts") if "counts" in layers else None,
        lambda: None if adata.X is None else Counts("`adata.X`", as_counts(adata.X, where="`adata.X`")),
        lambda: None if adata.raw is None else _in_raw(adata, layers),
    )
    refusals = []
    for search in searches:
        try:
            candidate = search()
        except ValueError as error:
            refusals.append(str(error))
            continue
        if candidate is not None:
            return candidate
    raise ValueError(
        f"Expected raw counts in `layers['counts']`, `X` or `raw.X` of `adata`, found none. {' '.join(refusals)} "
        "Name a layer with `layer=`."
    )


def part_proteins(adata: AnnData, layer: str | None) -> tuple[AnnData, AnnData | None]:
    """Split the antibodies of a 10x Genomics matrix from its genes; `None` without antibodies."""
    kinds = adata.var.get("feature_types")
    if kinds is None or not (of_proteins := kinds.isin(PROTEINS)).any() or of_proteins.all():
        return adata, None
    mask = of_proteins.to_numpy()
    genes, part = adata[:, ~mask].copy(), adata[:, mask].copy()
    if adata.raw is not None and "feature_types" in adata.raw.var:
        mask = adata.raw.var["feature_types"].isin(PROTEINS).to_numpy()
        genes.raw, part.raw = adata.raw[:, ~mask].to_adata(), adata.raw[:, mask].to_adata()
    values, var = _intensities(part, layer)
    dense = values.toarray() if sp.issparse(values) else np.asarray(values)
    return genes, AnnData(X=dense.astype(np.float32), var=var.rename(columns=_allowed_names(var.columns)))


def _intensities(part: AnnData, layer: str | None) -> tuple[Any, pd.DataFrame]:
    """Return the counts of antibodies, or else their ``X``, and their ``var``."""
    try:
        counts = find_counts(part, layer)
    except ValueError:
        return part.X, part.var
    if counts.of_raw:
        return counts.values, part.raw.var
    in_layer = counts.layer is not None and counts.layer_values is None
    values = counts.values if counts.values is not None else counts.layer_values
    return part.layers[layer or "counts"] if in_layer else values, part.var


def _in_layer(adata: AnnData, layer: str) -> Counts:
    where = f"`adata.layers[{layer!r}]`"
    contract.check_counts(adata.layers[layer], where=where)
    if adata.X is None:
        return Counts(where, as_counts(adata.layers[layer], where=where))
    return Counts(where, layer=_allowed(layer))


def _in_raw(adata: AnnData, layers: list[str]) -> Counts:
    where = "`adata.raw.X`"
    values = as_counts(adata.raw.X, where=where)
    if not adata.raw.var_names.equals(adata.var_names):
        return Counts(where, values, of_raw=True)
    if adata.X is None:
        return Counts(where, values)
    # a copy shares no memory with `adata`
    return Counts(where, layer="raw_counts" if "counts" in layers else "counts", layer_values=values.copy())


def table_of(adata: AnnData, counted: Counts) -> tuple[AnnData, dict[str, str]]:
    """Return the section's table, and the renamed columns of ``obs``: new name to original name."""
    obs_names = _allowed_names(adata.obs.columns, instead={name: f"{name}_original" for name in RESERVED})
    keyed: dict[str, Mapping[str, Any]] = {"obsm": adata.obsm, "obsp": adata.obsp}
    keyed["uns"] = {name: value for name, value in adata.uns.items() if name not in _OWN_UNS}
    if counted.of_raw:
        _warn_of_raw(adata)
        variables = adata.raw.var
    else:
        variables = adata.var
        keyed |= {"varm": adata.varm, "varp": adata.varp}
        keyed["layers"] = {name: value for name, value in adata.layers.items() if name is not None}
    var_names = _allowed_names(variables.columns)
    key_names = {part: _allowed_names(entries) for part, entries in keyed.items()}
    _warn_of_names(
        {"obs": {old: new for old, new in obs_names.items() if old not in RESERVED}, "var": var_names, **key_names}
    )
    table = AnnData(
        X=adata.X if counted.values is None else counted.values,
        obs=adata.obs.rename(columns=obs_names),
        var=variables.rename(columns=var_names).set_axis(unique_genes(variables.index, where="`adata`"), axis=0),
        **{part: {key_names[part][name]: value for name, value in entries.items()} for part, entries in keyed.items()},
    ).copy()
    # an index with the name of a column cannot be written
    table.obs.index.name = table.var.index.name = None
    if adata.raw is not None and not counted.of_raw:
        raw = adata.raw.to_adata()
        raw.var.index.name = None
        table.raw = raw
    if counted.layer_values is not None:
        table.layers[counted.layer] = counted.layer_values
    return table, {new: str(old) for old, new in obs_names.items() if new != old}


def _allowed(name: Any) -> str:
    allowed = re.sub(r"[^\w.-]", "_", str(name))
    while allowed.startswith("__"):
        allowed = allowed[1:]
    return "unnamed" if allowed in ("", ".", "..", "_index") else allowed


def _allowed_names(names: Iterable[Any], instead: Mapping[str, str] | None = None) -> dict[Any, str]:
    """Map names to names in the section. SpatialData needs names unique without regard to case."""
    instead = instead or {}
    allowed: dict[Any, str] = {}
    taken = {name.lower() for name in instead}
    for name in names:
        base = new = instead.get(name, _allowed(name))
        suffix = 0
        while new.lower() in taken:
            suffix += 1
            new = f"{base}_{suffix}"
        taken.add(new.lower())
        allowed[name] = new
    return allowed


def _warn_of_names(names: Mapping[str, Mapping[Any, str]]) -> None:
    changed = [f"{part}[{old!r}]: {new!r}" for part, of in names.items() for old, new in of.items() if new != old]
    if changed:
        warnings.warn(
            f"SpatialData does not allow {len(changed)} of the names in `adata`. They are renamed in the section: "
            f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}.",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_raw(adata: AnnData) -> None:
    # anndata 0.13 lists X among the layers as None
    parts = [name for name in ("layers", "varm", "varp") if any(key is not None for key in getattr(adata, name))]
    warnings.warn(
        f"Counts are only in `adata.raw`, with {adata.raw.n_vars} genes instead of the {adata.n_vars} of `adata`. The "
        f"section has the genes of `adata.raw`, without {', '.join(['`X`', *(f'`{name}`' for name in parts)])} of "
        "`adata`.",
        UserWarning,
        stacklevel=4,
    )
