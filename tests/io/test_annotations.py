"""Categories of spots from Loupe Browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io import from_anndata, read_loupe

BARCODES = ["AAACAAGTATCTCCCA-1", "AAACACCAATAACTGC-1", "AAACAGAGCGACTCCT-1", "AAACAGCTTTCAGAAG-1"]
IMAGE = np.full((200, 200, 3), 230, np.uint8)


@pytest.fixture
def section() -> SpatialData:
    return make()


def make(barcodes: list[str] = BARCODES) -> SpatialData:
    n = len(barcodes)
    adata = AnnData(
        np.ones((n, 2), np.int32),
        obs=pd.DataFrame({"total": np.arange(n)}, index=barcodes),
        obsm={"spatial": np.linspace(20, 180, 2 * n).reshape(n, 2)},
    )
    return from_anndata(adata, IMAGE, sample="V1", spot_diameter_px=10.0)


def put(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labels(section: SpatialData, column: str) -> list[str | None]:
    return [None if pd.isna(value) else value for value in contract.counts(section).obs[column]]


def test_loupes_export(section: SpatialData, tmp_path: Path) -> None:
    path = put(
        tmp_path / "loupe.csv",
        "Barcode,Graph-based,Pathology (2024)",
        f"{BARCODES[1]},Cluster 10,Invasive carcinoma",
        f"{BARCODES[0]},Cluster 9,",
        f'{BARCODES[3]},Cluster 9,"DCIS, solid"',
    )
    read_loupe(section, path)
    assert labels(section, "Graph-based") == ["Cluster 9", "Cluster 10", None, "Cluster 9"]
    assert labels(section, "Pathology__2024_") == [None, "Invasive carcinoma", None, "DCIS, solid"]
    assert contract.counts(section).obs["Graph-based"].cat.categories.tolist() == ["Cluster 9", "Cluster 10"]
    step = contract.info(section)["history"][-1]
    assert (step["step"], step["parameters"]["n_matched"]) == ("io.read_loupe", 3)
    section.write(tmp_path / "section.zarr")
    assert labels(spatialdata.read_zarr(tmp_path / "section.zarr"), "Pathology__2024_")[3] == "DCIS, solid"


def test_space_rangers_clusters(section: SpatialData, tmp_path: Path) -> None:
    path = tmp_path / "clusters.csv"
    rows = "".join(f"{name},{number}\r\n" for number, name in enumerate(BARCODES, 1))
    path.write_bytes(f"\ufeffBarcode,Cluster\r\n{rows}".encode())
    read_loupe(section, path)
    assert labels(section, "Cluster") == ["1", "2", "3", "4"]
    read_loupe(section, put(path, "Barcode,Cluster", f"{BARCODES[0]},7"))
    assert labels(section, "Cluster") == ["7", None, None, None]


@pytest.mark.parametrize("suffix_on", ["file", "section"])
def test_the_gem_well_is_left_out_where_that_is_clear(tmp_path: Path, suffix_on: str) -> None:
    bare = [name.removesuffix("-1") for name in BARCODES]
    section = make(bare if suffix_on == "file" else BARCODES)
    names = BARCODES if suffix_on == "file" else bare
    read_loupe(section, put(tmp_path / "a.csv", "Barcode,Kind", *(f"{name},{name[:8]}" for name in names)))
    assert labels(section, "Kind") == [name[:8] for name in BARCODES]


def test_two_wells_are_not_mixed_up(tmp_path: Path) -> None:
    section = make(["AAAC", "AAAG"])
    path = put(tmp_path / "a.csv", "Barcode,Kind", "AAAC-1,a", "AAAC-2,b")
    with pytest.raises(ValueError, match=r"Expected barcodes of section 'V1', such as 'AAAC', .* such as 'AAAC-1'"):
        read_loupe(section, path)


def test_unknown_barcodes(section: SpatialData, tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "Barcode,Kind", f"{BARCODES[0]},a", "TTTT-1,b", "TTTA-1,b")
    with pytest.warns(UserWarning, match=r"2 of 3 barcodes in a.csv are not in section 'V1', such as 'TTTT-1'"):
        read_loupe(section, path)
    assert labels(section, "Kind") == ["a", None, None, None]
    assert contract.counts(section).obs["Kind"].cat.categories.tolist() == ["a"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    st.dictionaries(st.sampled_from(BARCODES), st.text("ab ,\"'é-1", min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_every_category_reaches_its_spot(tmp_path: Path, kinds: dict[str, str]) -> None:
    section = make()
    path = tmp_path / "kinds.csv"
    pd.DataFrame({"Barcode": list(kinds), "Kind": list(kinds.values())}).to_csv(path, index=False)
    read_loupe(section, path)
    assert labels(section, "Kind") == [kinds.get(name) for name in BARCODES]


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["Spot,Kind", "A,b"], KeyError, r"Expected a column `Barcode` and one per category .*\['Spot', 'Kind'\]"),
        (["Barcode", "A"], KeyError, r"Expected a column `Barcode` and one per category"),
        (["Barcode,Kind", f"{BARCODES[0]},a", f"{BARCODES[0]},b"], ValueError, "every barcode once in .*, found 1"),
        (["Barcode,region", f"{BARCODES[0]},a"], ValueError, "found 'region', while the table of counts has a column"),
        (["Barcode,Total", f"{BARCODES[0]},a"], ValueError, "found 'Total', .* has a column 'total'"),
        (["Barcode,a b,a(b", f"{BARCODES[0]},a,b"], ValueError, "names differ in letters and digits"),
        (["Barcode,Kind", "TTTT-1,a"], ValueError, "found none; its barcodes are such as 'TTTT-1'"),
        (["Barcode,Kind"], ValueError, "found none; its barcodes are such as None"),
        (["Barcode,Kind", "A,b", "A,b,c,d"], ValueError, "found one that cannot be read"),
    ],
)
def test_files_that_are_refused(
    section: SpatialData, tmp_path: Path, lines: list[str], error: type[Exception], message: str
) -> None:
    before = list(contract.counts(section).obs)
    with pytest.raises(error, match=message):
        read_loupe(section, put(tmp_path / "a.csv", *lines))
    assert list(contract.counts(section).obs) == before


def test_no_file(section: SpatialData, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a CSV file of categories at"):
        read_loupe(section, tmp_path / "none.csv")
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(ValueError, match="Expected a CSV file at"):
        read_loupe(section, tmp_path / "none.csv")
