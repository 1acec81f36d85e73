"""The arguments of public functions are one family."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SUBPACKAGES = ("io", "pp", "tl", "pl", "models", "datasets")
#: what pictures have, in the order in which it ends their signature
FIGURE = ("ax", "title", "figsize", "save", "return_fig")
COLORS = ("cmap", "vmin", "vmax", "alpha")
#: pictures of values by color, and those of them that are maps over the section
COLORED = {
    "cells", "confusion", "enrichment", "explanation", "latent", "prediction", "saliency", "tiles", "uncertainty",
}  # fmt: skip
ZOOMED = {"cells", "prediction", "tiles", "uncertainty"}
#: first arguments of functions that are given neither a section, a cohort of sections nor a table of one
OTHERS = {
    "io.from_anndata": "adata",
    "io.read": "technology",
    "io.read_geojson": "data",
    "io.write_geojson": "data",
    "io.read_tile_features": "data",
    "io.read_loupe": "data",
    "io.to_anndata": "data",
    "io.from_spatialdata": "data",
    "pp.augment": "tiles",
    "tl.adapt": "model",
    "tl.combine": "models",
    "tl.enrichment": "genes",
    "tl.predict_cohort": "slides",
    "pl.training": "model",
}
#: arguments that hold a column's name but are known by another word: the color of a picture, groups by which results
#: are split (as in pandas), and labels that may be given as values too
NOT_KEYS = {"by", "color", "labels"}


def public_functions(module: str) -> dict[str, Callable[..., Any]]:
    """Functions among the public names of a subpackage."""
    package = importlib.import_module(f"stimage_sd.{module}")
    values = {name: getattr(package, name) for name in package.__all__}
    return {name: value for name, value in values.items() if callable(value) and not inspect.isclass(value)}


FUNCTIONS = {f"{module}.{name}": value for module in SUBPACKAGES for name, value in public_functions(module).items()}
every = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(FUNCTIONS[name]).parameters)


def described(name: str) -> dict[str, str]:
    """By argument: the first words that the docstring says about it."""
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    match = re.search(r"Parameters\n-+\n(.*?)(?:\n\n\w[\w ]*\n-{3,}|\Z)", text, flags=re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (match[1] if match else "").splitlines():
        if line and not line.startswith(" "):
            names = [word.strip() for word in line.split(",")]
        for each in names if line.startswith(" ") else ():
            found[each] = f"{found.get(each, '')} {line.strip()}".strip()
    return found


def place(argument: inspect.Parameter) -> int:
    """Where an option stands among others: required, options, keys, jobs, seeds, copy, the figure's."""
    if argument.name in FIGURE:
        return 6 + FIGURE.index(argument.name)
    if argument.default is argument.empty:
        return 0
    if argument.name.endswith("_key") or argument.name in ("key", "key_added", "layer"):
        return 2
    return {"n_jobs": 3, "seed": 4, "copy": 5}.get(argument.name, 4 if argument.name.endswith("_seed") else 1)


@every
def test_at_most_three_arguments_are_positional(name: str) -> None:
    kinds = [argument.kind for argument in arguments(name).values()]
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith(("pp.", "tl.", "pl."))])
def test_data_come_first(name: str) -> None:
    first = next(iter(arguments(name)))
    assert first == OTHERS.get(name, "data")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("io.")])
def test_readers_take_the_path_first(name: str) -> None:
    first = next(iter(arguments(name).values()))
    assert first.name == OTHERS.get(name, first.name)
    assert name in OTHERS or "Path" in str(first.annotation)


@every
def test_jobs_randomness_and_keys_have_one_word_each(name: str) -> None:
    banned = {"n_workers", "num_workers", "workers", "n_threads", "n_cores", "threads", "random_state", "rng", "sdata"}
    assert not banned & set(arguments(name))
    assert not [each for each in arguments(name) if each.endswith(("_col", "_column", "_keys"))]
    named = re.compile(r"(Name of the (table|shapes|image|points)\b|Columns? of ``(obs|var|data\.obs)``)")
    unlike = [
        each
        for each, text in described(name).items()
        if named.match(text) and not each.endswith("_key") and each not in {"key", "key_added", "layer", *NOT_KEYS}
    ]
    assert unlike == []


@every
def test_a_model_may_be_a_path(name: str) -> None:
    for each in {"model", "models"} & set(arguments(name)):
        annotation = str(arguments(name)[each].annotation)
        # cross-validation is given recipes, which fit models
        assert "Recipe" in annotation or {"str", "Path"} <= set(re.findall(r"\w+", annotation)), annotation


@every
def test_options_stand_in_one_order(name: str) -> None:
    options = [each for each in arguments(name).values() if each.kind is each.KEYWORD_ONLY]
    assert [each.name for each in options] == [each.name for each in sorted(options, key=place)]


@every
def test_every_argument_is_described_in_the_order_of_the_signature(name: str) -> None:
    found = described(name)
    assert set(found) == set(arguments(name))
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    order = list(arguments(name))
    entries = re.findall(
        r"^(\w+(?:, \w+)*)\n    ", text.split("Parameters\n")[-1].split("\n\nR")[0], flags=re.MULTILINE
    )
    first = [min(order.index(word) for word in entry.split(", ")) for entry in entries if entry.split(", ")[0] in order]
    assert first == sorted(first)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("pl.")])
def test_pictures_have_their_family(name: str) -> None:
    found = arguments(name)
    assert tuple(found)[-len(FIGURE) :] == FIGURE
    assert "Figure" in str(inspect.signature(FUNCTIONS[name]).return_annotation)
    short = name.removeprefix("pl.")
    assert (short in COLORED) == set(COLORS).issubset(found)
    assert short in COLORED or not set(COLORS) & set(found)
    assert (short in ZOOMED) == ("zoom" in found) == ("img_alpha" in found)
    if "gene" in found:
        assert found["gene"].annotation == "str | Sequence[str]"


def test_the_page_of_signatures_has_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(REPOSITORY / "docs" / "_extensions")
    module = importlib.import_module("signature_table")
    page = (REPOSITORY / "docs" / "signatures.md").read_text(encoding="utf-8")
    assert re.findall(r"```\{signature-table\} (\w+)", page) == list(SUBPACKAGES)
    rows = {f"{part}.{row.name}": row for part in SUBPACKAGES for row in module.signature_rows(part)}
    assert set(rows) == set(FUNCTIONS)
    assert rows["tl.predict"].positional == ["data", "model"]
    assert rows["tl.predict"].options[0] == "on='tiles'"
