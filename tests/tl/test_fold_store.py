"""Results of folds on disk: what is damaged is told and made again, what a kill put aside is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from stimage_sd.tl._score.fold_store import FoldResult, FoldStore

SETTINGS: dict[str, Any] = {"model": "nb", "fold": "a", "held_out": ["a"], "seed": 0}


def result() -> FoldResult:
    table = ad.AnnData(np.arange(6.0).reshape(2, 3), obs=pd.DataFrame(index=["x", "y"]))
    return FoldResult(pd.DataFrame({"gene": ["G1"], "pearson": [0.5]}), {"fit_seconds": 1.0}, {"a": table})


@pytest.mark.parametrize("name", ["made_with.json", "scores.parquet", "a.h5ad"])
@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_a_damaged_result_is_told_and_made_again(name: str, damage: str, tmp_path: Path) -> None:
    store = FoldStore(tmp_path)
    store.save(SETTINGS, result())
    file = tmp_path / "nb@a" / name
    content = file.read_bytes()
    file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"nb@a is damaged .* made again"):
        assert store.load(SETTINGS, predictions=True) is None
    store.save(SETTINGS, result())
    found = store.load(SETTINGS, predictions=True)
    assert found is not None
    np.testing.assert_array_equal(found.predictions["a"].X, result().predictions["a"].X)
    with pytest.raises(ValueError, match="`seed` was 0, is 1"):
        store.load(SETTINGS | {"seed": 1}, predictions=True)
    assert [path.name for path in tmp_path.iterdir()] == ["nb@a"]


def test_what_a_kill_put_aside_is_found(tmp_path: Path) -> None:
    FoldStore(tmp_path).save(SETTINGS, result())
    (tmp_path / "nb@a").rename(tmp_path / ".nb@a.replaced")
    found = FoldStore(tmp_path).load(SETTINGS, predictions=False)
    assert found is not None
    assert found.cost == {"fit_seconds": 1.0}
