"""Members of ensembles as models of their own, and the accuracy of members pooled at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract, models, pl, tl
from stimage_sd.models._members import Members
from stimage_sd.tl._score.cross_validate import shallow_copy

OPTIONS: dict[str, Any] = {"extractor": "toy", "n_members": 6, "max_epochs": 4}


@pytest.fixture(scope="module")
def cohort(planted: Callable) -> Any:
    return planted(("a", "b", "test"), n_side=10, n_features=5, n_genes=6, strength=1.0)


@pytest.fixture(scope="module")
def model(cohort: Any) -> models.NBModel:
    return tl.fit_nb({name: cohort.sections[name] for name in "ab"}, genes=cohort.genes, **OPTIONS)


def parameters(model: Any, section: SpatialData) -> tuple[np.ndarray, np.ndarray]:
    return model.open(section, section="test").r_and_p(slice(0, 20))


def test_a_model_of_members_predicts_as_these_members_of_the_whole(model: models.NBModel, cohort: Any) -> None:
    test = cohort.sections["test"]
    r, p = parameters(model, test)
    for index, chosen in ((2, [2]), (-1, [5]), (slice(1, 4), [1, 2, 3]), ([4, 0], [4, 0]), (np.array([3, 1]), [3, 1])):
        part = model.members[index]
        assert type(part) is models.NBModel
        assert part.n_members == len(part.members) == len(chosen)
        for found, whole in zip(parameters(part, test), (r, p), strict=True):
            np.testing.assert_allclose(found, whole[chosen], rtol=1e-5)
    assert [one.training["members"] for one in model.members] == [[number] for number in range(6)]
    # the moments of the paper's Eq. 7, by a plain loop over members
    section = shallow_copy(test)
    tl.predict(section, model.members[[0, 3]])
    means = [r[member] * (1 - p[member]) / p[member] for member in (0, 3)]
    np.testing.assert_allclose(contract.predictions(section).X[:20], sum(means) / 2, rtol=1e-4)


def test_the_record_of_a_fit_is_of_the_chosen_members(model: models.NBModel, tmp_path: Path) -> None:
    part = model.members[[4, 1]]
    whole = model.history
    for number, member in enumerate((4, 1)):
        expected = whole.loc[whole["member"] == member, ["epoch", "training_nll", "validation_nll"]]
        own = part.history.loc[part.history["member"] == number, expected.columns]
        assert own.to_numpy().tolist() == expected.to_numpy().tolist()
        assert part.training["metrics"]["validation_nll"][number] == model.training["metrics"]["validation_nll"][member]
        assert part.training["validation"][number] == model.training["validation"][member]
    assert part.training["sections"] == model.training["sections"]
    back = models.load(part.members[1].save(tmp_path / "one.stimage"))
    assert back.training["members"] == [1]
    np.testing.assert_array_equal(back.parameters["bias"], model.parameters["bias"][[1]])
    assert len(model.history) == len(whole)


def test_members_of_a_combination_keep_their_share(model: models.NBModel, cohort: Any) -> None:
    both = tl.combine([model.members[:3], model.members[3:5]], weights=[0.6, 0.4])
    test = cohort.sections["test"]
    r, p = parameters(both, test)
    # 0.6 / 3 and 0.4 / 2 each
    part = both.members[[0, 2, 4]]
    np.testing.assert_allclose(part.member_weights, np.array([0.2, 0.2, 0.2]) / 0.6)
    np.testing.assert_allclose(parameters(part, test)[0], r[[0, 2, 4]], rtol=1e-5)
    assert len(both.members[3:].parts) == 1
    np.testing.assert_allclose(parameters(both.members[3:], test)[1], p[3:], rtol=1e-5)


def test_members_of_an_adapted_model(model: models.NBModel, cohort: Any) -> None:
    test = cohort.sections["test"]
    adapted = tl.adapt(model, test, spots=contract.counts(test).obs_names[:20])
    part = adapted.members[[5, 2]]
    assert isinstance(part, models.AdaptedModel)
    for found, whole in zip(parameters(part, test), parameters(adapted, test), strict=True):
        np.testing.assert_allclose(found, whole[[5, 2]], rtol=1e-5)


def test_indices_that_are_no_members() -> None:
    members = Members(3, list)
    for index in ([], slice(3, 9)):
        with pytest.raises(ValueError, match="at least one of 3 members, found none"):
            members[index]
    with pytest.raises(ValueError, match=r"every member at most once, found \[1, 1\]"):
        members[[1, -2]]
    with pytest.raises(IndexError, match="No member 3: the model has 3 members"):
        members[3]
    for index in ("0", True, 1.0, [0, 1.5]):
        with pytest.raises(TypeError, match="Expected integers, a slice or a list of integers"):
            members[index]  # type: ignore[index]


@pytest.mark.parametrize("transform", ["log1p", "raw"])
def test_pools_score_as_their_models_do(
    model: models.NBModel, cohort: Any, transform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stimage_sd.tl._score.pool_members._BLOCK", 1000)  # several blocks of tiles
    section = cohort.sections["test"]
    before = set(section.tables)
    plain = replace(model, shifts=None, total=None)  # without exposure
    for fitted, size, n_pools in ((model, 3, 2), (plain, 2, 1)):
        scores = tl.pool_members(section, fitted, size=size, n_pools=n_pools, transform=transform, seed=1)
        assert set(section.tables) == before
        assert len(scores) == len(fitted.genes) * (fitted.n_members + n_pools)
        for (kind, _, members), one in scores.groupby(["kind", "number", "members"]):
            chosen = [int(member) for member in members.split()]
            assert len(chosen) == (size if kind == "pool" else 1)
            copy = shallow_copy(section)
            tl.predict(copy, fitted.members[chosen])
            expected = tl.evaluate(copy, transform=transform).set_index("gene")["pearson"]
            np.testing.assert_allclose(one.set_index("gene")["pearson"], expected.loc[one["gene"]], rtol=1e-4)


def test_pooling_helps_and_pools_differ(model: models.NBModel, cohort: Any) -> None:
    scores = tl.pool_members(cohort.sections, model, size=4, n_pools=15)
    assert list(scores["section"].unique()) == ["a", "b", "test"]
    pools = scores.loc[scores["kind"] == "pool", "members"]
    assert pools.nunique() == 15 == len(pools) / (3 * 6)
    mean = scores.groupby("kind")["pearson"].mean()
    assert mean["pool"] > mean["member"]
    (panel,) = pl.scores(scores)
    labels = {text.get_text() for text in panel.get_legend().get_texts()}
    assert labels == {"single members", "pools of 4 members"}
    again = tl.pool_members(cohort.sections["test"], model, size=4, n_pools=15)
    assert again.equals(scores[scores["section"] == "test"].reset_index(drop=True))


def test_what_cannot_be_pooled(model: models.NBModel, cohort: Any, make_spots: Callable) -> None:
    with pytest.raises(ValueError, match=r"16 different pools of 4 members, found 6 members, which have 15"):
        tl.pool_members(cohort.sections, model, size=4, n_pools=16)
    with pytest.raises(ValueError, match="`size` and `n_pools` of at least 1, found 0 and 5"):
        tl.pool_members(cohort.sections, model, size=0)
    with pytest.raises(ValueError, match='`transform` to be "log1p" or "raw", found \'lognorm\''):
        tl.pool_members(cohort.sections, model, transform="lognorm")  # type: ignore[arg-type]
    other = make_spots(n_side=10, features=np.zeros((100, 5)), genes=["X1", "X2", "X3", "X4"])
    with pytest.raises(ValueError, match="None of the 6 predicted genes was measured in section 'made', such as 'G0'"):
        tl.pool_members(other, model)


def test_constant_genes_are_nan(model: models.NBModel, cohort: Any) -> None:
    section = shallow_copy(cohort.sections["test"])
    table = section.tables[contract.COUNTS].copy()
    counts = table.X.toarray()
    counts[:, 0] = 3
    table.X = sp.csr_matrix(counts)
    section.tables[contract.COUNTS] = table
    scores = tl.pool_members(section, model, size=2)
    assert scores.loc[scores["gene"] == "G0", "pearson"].isna().all()
    assert scores.loc[scores["gene"] != "G0", "pearson"].notna().all()
