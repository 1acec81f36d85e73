"""Tables of scores, of one or several models, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import pandas as pd


class Folds(Protocol):
    """Attributes of `stimage_sd.tl.RiskGroups` that are drawn as scores."""

    @property
    def folds(self) -> pd.DataFrame:
        """Return ``group``, ``repeat``, ``fold`` and ``c_index`` of each fold."""
        ...


Scores: TypeAlias = pd.DataFrame | Folds


def table_of(data: Scores | Mapping[str, Scores]) -> pd.DataFrame:
    """Return scores with one column per metric and one row per section, gene and, for several models, ``model``.

    Raises
    ------
    ValueError
        If the table has several rows of one section, gene and model.
    """
    if isinstance(data, Mapping):
        if not data:
            raise ValueError("Expected tables of scores, keyed by the model's name, found none.")
        tables = {name: _of_one(scores) for name, scores in data.items()}
        several = [name for name, table in tables.items() if "model" in table and table["model"].nunique() > 1]
        if several:
            raise ValueError(
                f"Expected scores of one model under each name, found several models under {several[0]!r}."
            )
        table = pd.concat([table.assign(model=str(name)) for name, table in tables.items()], ignore_index=True)
    else:
        table = _of_one(data)
    keys = [name for name in ("section", "model", "gene") if name in table]
    repeated = table.duplicated(keys) if {"section", "gene"} <= set(keys) else pd.Series(False, index=table.index)
    if repeated.any():
        first = table.loc[repeated, keys].iloc[0].to_dict()
        raise ValueError(
            f"Expected one row per section and gene, found several of {first}. Pass tables of several models keyed by "
            'name, such as `{"first": scores, "second": others}`.'
        )
    return table


def _of_one(scores: Scores) -> pd.DataFrame:
    if not isinstance(scores, pd.DataFrame):
        folds = scores.folds
        names = folds["repeat"].astype(str) + "." + folds["fold"].astype(str)
        return folds.assign(section=folds["group"], gene=names)[["section", "gene", "c_index"]]
    if {"model", "metric", "value"} <= set(scores.columns):
        return wide(scores)
    if {"kind", "number", "members"} <= set(scores.columns):
        return _of_pools(scores)
    if "group" in scores.columns:
        return scores.rename(columns={"group": "section", "sample": "gene"})
    return scores


def _of_pools(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over genes of each member and pool (`stimage_sd.tl.pool_members`), as two models."""
    size = max((len(str(members).split()) for members in scores.loc[scores["kind"] == "pool", "members"]), default=0)
    names = {"member": "single members", "pool": f"pools of {size} members"}
    mean = scores.groupby(["section", "kind", "number"], sort=False)["pearson"].mean().reset_index()
    number = mean["kind"] + " " + mean["number"].astype(str)
    return mean.assign(model=mean["kind"].map(names), gene=number)[["section", "model", "gene", "pearson"]]


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Pivot the table of `stimage_sd.tl.cross_validate` to one column per metric, with models in their order."""
    keys = ["section", "model", "gene"]
    repeated = table.duplicated([*keys, "metric"])
    if repeated.any():
        first = table.loc[repeated, [*keys, "metric"]].iloc[0].to_dict()
        raise ValueError(f"Expected one row per section, model, gene and metric, found several of {first}.")
    pivoted = table.pivot(index=keys, columns="metric", values="value").rename_axis(columns=None).reset_index()
    order = {model: place for place, model in enumerate(dict.fromkeys(table["model"]))}
    return pivoted.sort_values("model", key=lambda models: models.map(order), kind="stable", ignore_index=True)


def with_gain(table: pd.DataFrame) -> pd.DataFrame:
    """Add the gain in log-likelihood over the mean-only model, if the table has its columns."""
    if not {"nll", "nll_floor"} <= set(table.columns):
        return table
    return table.assign(nll_gain=table["nll_floor"] - table["nll"])
