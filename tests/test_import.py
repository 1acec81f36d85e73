"""The package is light to import, has the names it promises, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import stimage_sd

#: what the first release promises
PUBLIC = {
    "io": ["visium", "legacy_st", "slide", "from_anndata"],
    "pp": ["tissue_mask", "stain_normalize", "tile", "augment", "embed", "spatial_context", "select_genes"],
    "tl": ["fit_nb", "predict", "evaluate"],
    "pl": ["prediction", "uncertainty", "scores", "training", "tiles", "calibration"],
    "models": ["NBModel", "load", "extractors", "get_extractor", "register_extractor"],
    "datasets": ["her2st", "synthetic_visium"],
    "likelihood.negative_binomial": ["log_prob", "log_prob_from_logits", "mean", "variance"],
    "stats.spatial": ["morans_i", "pattern_iou"],
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]
HEAVY = ("jax", "squidpy", "spatialdata", "matplotlib", "torch", "scanpy", "dask", "pandas", "numpy")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(stimage_sd.__path__, "stimage_sd.")
    if not module.name.endswith("__main__")
)


def public(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"stimage_sd.{module}"), name)


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_light() -> None:
    code = (
        "import json, sys, time; start = time.perf_counter(); import stimage_sd as sti; "
        "took = time.perf_counter() - start; print(json.dumps([took, sti.__version__, sorted(sys.modules)]))"
    )
    took, version, loaded = min((run(code) for _ in range(3)), key=lambda found: found[0])
    assert took < 1.0
    assert version == stimage_sd.__version__
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


def test_help_is_quick() -> None:
    command = [sys.executable, "-m", "stimage_sd", "--help"]

    def processor_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "predict" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of the processor, since tests run side by side; `benchmarks/startup.py` measures what a user waits.
    taken = min(processor_seconds() for _ in range(3))
    assert 0 < taken < 1.5


def test_submodules_load_on_first_use() -> None:
    code = (
        "import json, stimage_sd as sti; before = dir(sti); sti.contract.plain; "
        "print(json.dumps([before, [hasattr(sti, name) for name in before]]))"
    )
    names, present = run(code)
    assert {"io", "pp", "tl", "pl", "models", "likelihood", "stats", "datasets"} <= set(names)
    assert all(present)
    with pytest.raises(AttributeError, match="nothing"):
        _ = stimage_sd.nothing


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(name) for name in NAMES])
def test_public_names_are_there_and_documented(module: str, name: str) -> None:
    found = public(module, name)
    text = inspect.getdoc(found) or ""
    summary = text.partition("\n")[0]
    assert summary.endswith("."), f"{module}.{name} has no one-line summary"
    if inspect.isfunction(found):
        for section in ("Parameters", "Returns", "Examples"):
            signature = inspect.signature(found)
            if section == "Parameters" and not signature.parameters:
                continue
            if section == "Returns" and signature.return_annotation in (None, "None"):
                continue
            assert f"\n{section}\n---" in text, f"{module}.{name} has no section {section}"
        for parameter in signature.parameters:
            assert parameter in text, f"{module}.{name} does not document {parameter}"


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(name) for name in NAMES])
def test_public_functions_are_typed_and_take_few_positional_arguments(module: str, name: str) -> None:
    found = public(module, name)
    if not inspect.isfunction(found):
        return
    parameters = inspect.signature(found).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert len(positional) <= 3, positional
    assert all(p.annotation is not p.empty for p in parameters)
    assert inspect.signature(found).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("module", sorted({module.partition(".")[0] for module in PUBLIC}))
def test_subpackages_list_their_names(module: str) -> None:
    package = importlib.import_module(f"stimage_sd.{module}")
    promised = PUBLIC.get(module, [])
    assert set(promised) <= set(package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    results = doctest.testmod(importlib.import_module(module), optionflags=options)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples fail; see the captured output"
