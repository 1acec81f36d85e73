"""Guards against leakage: a section is known by its spots and counts, under any name, whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import baselines, contract, models, tl
from stimage_sd.tl._fit.seen import check_unseen, remembered


@pytest.fixture(scope="module")
def fitted(planted: Callable) -> tuple:
    """A cohort, and a model of its first two sections that predicts 8 of the 14 genes."""
    cohort = planted(("a", "b", "c"), n_side=12, n_features=4, n_genes=14)
    train = {name: cohort.sections[name] for name in "ab"}
    return cohort, tl.fit_nb(train, genes=cohort.genes[:8], extractor="toy", n_members=2, max_epochs=2)


def with_counts(sdata: SpatialData, table: AnnData) -> SpatialData:
    """The section's counts alone, changed: what a guard looks at."""
    made = SpatialData(tables={"counts": table})
    made.attrs = {**sdata.attrs}
    contract.remember(made, sample="another")
    return made


def changed(sdata: SpatialData, change: str) -> AnnData:
    table = contract.counts(sdata)
    random = np.random.default_rng(0)
    if change == "as it is":
        chosen = table
    elif change == "spots and genes in another order":
        chosen = table[random.permutation(table.n_obs), random.permutation(table.n_vars)]
    elif change == "fewer genes":
        chosen = table[:, table.var_names[:9]]
    elif change == "a part":
        chosen = table[np.arange(table.n_obs) % 12 < 4]
    else:
        chosen = table[np.arange(table.n_obs) % 3 > 0, table.var_names[:9]]
    values = chosen.X.toarray() if change == "dense, of floats" else chosen.X.copy()
    obs = pd.DataFrame(index=[f"run2_{name}" for name in chosen.obs_names])
    return AnnData(values.astype(float) if change == "dense, of floats" else values, obs=obs, var=chosen.var)


CHANGES = ("as it is", "spots and genes in another order", "fewer genes", "a part", "both", "dense, of floats")


@pytest.mark.parametrize("change", CHANGES)
def test_a_section_is_known_under_any_name_and_changed(fitted: tuple, change: str) -> None:
    cohort, model = fitted
    source = contract.Source()
    again = with_counts(cohort.sections["b"], changed(cohort.sections["b"], change))
    new = with_counts(cohort.sections["c"], changed(cohort.sections["c"], change))
    check_unseen(model, {"a": new}, source, purpose="test")
    with pytest.raises(ValueError, match=r"trained on \['a', 'b'\], so \['x'\] cannot"):
        check_unseen(model, {"x": again, "y": new}, source, purpose="test")


def test_every_guard_goes_by_content(fitted: tuple) -> None:
    cohort, model = fitted
    same, new = cohort.sections["a"], cohort.sections["c"]
    named = contract.sample(same)
    contract.remember(same, sample="renamed")
    contract.remember(new, sample="a")  # another section of a name that the model knows
    try:
        both = tl.combine([model, model])
        for guard in (
            partial(tl.calibrate, model=model),
            partial(tl.calibrate, model=both),
            lambda data: tl.combine([model, model], weights="validation", validation=data),
        ):
            with pytest.raises(ValueError, match=r"so \['renamed'\] cannot"):
                guard(same)
            guard({"b": new})
        for sdata in (same, new):
            tl.predict(sdata, both)
        with pytest.raises(ValueError, match="Section 'renamed' was predicted by a model that was trained on it"):
            tl.predictable_genes(same, n_permutations=20)
        assert len(tl.predictable_genes(new, n_permutations=20)) == 8
    finally:
        contract.remember(same, sample=named)
        contract.remember(new, sample="c")


def test_weights_that_were_found_on_a_section_make_it_known(fitted: tuple) -> None:
    cohort, model = fitted
    both = tl.combine([model, model], weights="validation", validation={"v": cohort.sections["c"]})
    with pytest.raises(ValueError, match=r"so \['z'\] cannot"):
        tl.calibrate({"z": cohort.sections["c"]}, both)


def test_fingerprints_are_saved_and_models_without_go_by_names(fitted: tuple, tmp_path: Path) -> None:
    cohort, model = fitted
    back = models.load(model.save(tmp_path / "m.stimage"))
    assert remembered(back) == remembered(model)
    old = replace(model, training={key: value for key, value in model.training.items() if key != "fingerprints"})
    old = models.load(old.save(tmp_path / "old.stimage"))
    with pytest.raises(ValueError, match="the same names where the model stores names only"):
        tl.calibrate({"a": cohort.sections["c"]}, old)
    assert 0 < tl.calibrate({"other": cohort.sections["c"]}, old).interval_level < 1
    # in a combination too, whatever the other models remember
    with pytest.raises(ValueError, match=r"so \['a'\] cannot"):
        tl.calibrate({"a": cohort.sections["c"]}, tl.combine([model, old]))


def test_sections_of_few_counts_are_told_by_name(make_spots: Callable) -> None:
    """Spots without much to tell them apart are alike in any two sections."""
    random, source = np.random.default_rng(0), contract.Source()
    one, other = (make_spots(n_side=8, counts=random.poisson(0.5, (64, 2)), sample=name, tiled=False) for name in "ab")
    known = [contract.fingerprint(one, "a", genes=["G0"])]
    assert known[0]["spots"] == []
    assert not contract.is_seen(other, "b", known=known, genes=["G0"], source=source)
    assert contract.is_seen(other, "a", known=known, genes=["G0"], source=source)
    # other genes of the table can tell them; the table is left as it is
    wide = make_spots(n_side=8, counts=random.poisson(2.0, (64, 30)), sample="c", tiled=False)
    before = contract.counts(wide).X.copy()
    known = [contract.fingerprint(wide, "c", genes=["G0"])]
    assert (known[0]["over"], len(known[0]["spots"])) == ("all", 64)
    assert not contract.is_seen(other, "c", known=known, genes=["G0"], source=source)
    assert (before != contract.counts(wide).X).nnz == 0


def test_a_section_twice_in_a_cohort_is_refused(fitted: tuple) -> None:
    cohort, _ = fitted
    twice = {"a": cohort.sections["a"], "b": cohort.sections["b"], "again": cohort.sections["a"]}
    options = {"genes": cohort.genes[:4], "extractor": "toy"}
    for call in (
        partial(tl.fit_nb, **options),
        partial(tl.fit_baseline, recipe=baselines.MeanOnly(), **options),
        partial(tl.cross_validate, models={"nb": partial(tl.fit_nb, extractor="toy")}, genes=4),
    ):
        with pytest.raises(ValueError, match="Sections 'a' and 'again' hold the same spots with the same counts"):
            call(twice)
