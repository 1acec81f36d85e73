"""Enrichment of sets: the exact test of the 2 x 2 table, q-values over all sets, and files of sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

import stimage_sd as sti


def test_enrichment_is_the_hypergeometric_test(tmp_path: Path) -> None:
    tested = [f"G{i}" for i in range(200)]
    sets = {"early": tested[:20], "late": tested[150:190], "small": tested[:2], "elsewhere": ["X1", "X2", "X3"]}
    genes = [*tested[:12], *tested[150:153]]
    found = sti.tl.enrichment(genes, sets, background=tested).set_index("gene_set")
    assert list(found.index) == ["early", "late"]
    assert found.loc["early", "p_value"] == pytest.approx(stats.hypergeom.sf(11, 200, 20, 15), rel=1e-6)
    assert found.loc["late", "p_value"] == pytest.approx(stats.hypergeom.sf(2, 200, 40, 15), rel=1e-6)
    for name in found.index:
        a, of_set = found.loc[name, "n_overlap"], len(sets[name])
        table = [[a, of_set - a], [15 - a, 200 - of_set - 15 + a]]
        expected = stats.fisher_exact(table, alternative="greater")
        assert found.loc[name, "odds_ratio"] == pytest.approx(expected.statistic)
        assert found.loc[name, "p_value"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))
    assert found.loc["early", "n_overlap"] == 12
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("".join("\t".join([name, "about", *members]) + "\n" for name, members in sets.items()))
    pd.testing.assert_frame_equal(sti.tl.enrichment(genes, gmt, background=tested).set_index("gene_set"), found)
    with pytest.raises(FileNotFoundError, match="No GMT file"):
        sti.tl.enrichment(genes, tmp_path / "none.gmt", background=tested)
    with pytest.raises(ValueError, match="genes of the background, found 1 others"):
        sti.tl.enrichment(["X"], sets, background=tested)
    with pytest.raises(ValueError, match="No set has 3 genes"):
        sti.tl.enrichment(genes, {"elsewhere": ["X1", "X2", "X3"]}, background=tested)


def test_libraries_are_tested_apart_in_one_call(tmp_path: Path) -> None:
    tested = [f"G{i}" for i in range(100)]
    genes = tested[:8]
    gmt = tmp_path / "cc.gmt"
    gmt.write_text("\t".join(["membrane", "about", *tested[:6]]) + "\n")
    libraries = {
        "BP": {"growth": tested[:10], "rest": tested[50:70], "both": tested[5:12]},
        "CC": gmt,
        "MF": {"binding": tested[6:30]},
    }
    found = sti.tl.enrichment(genes, libraries, background=tested)
    assert found.columns[0] == "library"
    assert found["library"].tolist() == ["BP", "BP", "CC", "MF"]
    for library, sets in libraries.items():
        alone = sti.tl.enrichment(genes, sets, background=tested)
        part = found[found["library"] == library].drop(columns="library").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone)
    with pytest.raises(ValueError, match="No set has 3 genes") as error:
        sti.tl.enrichment(genes, {**libraries, "other": {"mouse": ["Actb", "Cd4", "Krt5"]}}, background=tested)
    assert error.value.__notes__ == ["while testing the library 'other'"]
    with pytest.raises(ValueError, match=r"or as libraries .* by name, found both"):
        sti.tl.enrichment(genes, {"BP": libraries["BP"], "growth": tested[:10]}, background=tested)


def test_sets_without_any_of_the_genes_count_in_the_q_values() -> None:
    tested = [f"G{i}" for i in range(300)]
    sets = {f"S{i}": tested[10 * i : 10 * i + 10] for i in range(30)}
    genes = [*tested[:5], tested[200]]
    found = sti.tl.enrichment(genes, sets, background=tested)
    assert found["gene_set"].tolist() == ["S0", "S20"]
    p_values = [stats.hypergeom.sf(sum(gene in of for gene in genes) - 1, 300, 10, 6) for of in sets.values()]
    expected = dict(zip(sets, multipletests(p_values, method="fdr_bh")[1], strict=True))
    np.testing.assert_allclose(found["q_value"], [expected["S0"], expected["S20"]], rtol=1e-10)


def test_a_null_list_is_not_enriched() -> None:
    """Lists of random genes: a q-value under 0.05 is in one of twenty at most."""
    tested = [f"G{i}" for i in range(400)]
    random = np.random.default_rng(0)
    sets = {f"S{i}": random.choice(tested, 8, replace=False).tolist() for i in range(100)}
    found = [sti.tl.enrichment(random.choice(tested, 10, replace=False), sets, background=tested) for _ in range(60)]
    assert np.mean([(table["q_value"] < 0.05).any() for table in found]) <= 0.05


def test_weighted_lines_are_read(tmp_path: Path) -> None:
    tested = [f"G{i}" for i in range(40)]
    lines = [
        "\ufeffcommas\t\tG0,1.0\tG1,0.5\tG2,1e-3\tG2,0.2\r",
        "spaces\tabout\tG3 , 1\t G4\tG5,.5\t\r",
        "tabs\tabout\tG6\t0.5\tG7\t0.25\tG8\t1\r",
    ]
    (tmp_path / "sets.gmt").write_bytes("\n".join(lines).encode())
    found = sti.tl.enrichment(tested[:9], tmp_path / "sets.gmt", background=tested).set_index("gene_set")
    assert found["genes"].to_dict() == {"commas": "G0,G1,G2", "spaces": "G3,G4,G5", "tabs": "G6,G7,G8"}
    assert found["n_set"].tolist() == [3, 3, 3]
    (tmp_path / "sets.gmt").write_text("one\tabout\tG0\tG1\tG2\ntwo G3 G4 G5\n")
    with pytest.raises(ValueError, match=r"separated by tabs, in line 2 of .*, found 'two G3 G4 G5'"):
        sti.tl.enrichment(tested[:9], tmp_path / "sets.gmt", background=tested)
    (tmp_path / "sets.gmt").write_text("one\tabout\tG0\tG1\tG2\none\tabout\tG3\tG4\tG5\n")
    with pytest.raises(ValueError, match="found two different ones of 'one'"):
        sti.tl.enrichment(tested[:9], tmp_path / "sets.gmt", background=tested)
