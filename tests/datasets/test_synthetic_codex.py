"""Synthetic CODEX sections: the vendor's format, a truth that can be found again, the same for the same seed."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import flowio
import numpy as np
import pandas as pd
import pytest
import readfcs
import tifffile
from scipy import ndimage
from scipy.spatial import cKDTree

from stimage_sd import contract
from stimage_sd.datasets import synthetic_codex, synthetic_visium
from stimage_sd.datasets._synthetic_codex import _make_tissue, _write_fcs
from stimage_sd.datasets._truth import log_mean
from stimage_sd.io import codex

FIELDS = ["density", "size", "stroma"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_codex(tmp_path_factory.mktemp("synthetic") / "run", n_spots=60, n_proteins=6, seed=1)


def section(run: Path, cells: str = "cells.csv") -> object:
    return codex(run / cells, run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=run / "he_alignment.csv")


def test_the_image_is_a_pyramidal_ome_tiff(run: Path) -> None:
    with tifffile.TiffFile(run / "multiplex.ome.tif") as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        assert series.axes == "CYX"
        assert series.dtype == np.uint16
        assert series.shape[0] == 7
        assert len(series.levels) > 1
        assert series.keyframe.is_tiled
        finest, second = series.levels[0].asarray(), series.levels[1].asarray()
        assert 'PhysicalSizeX="0.8"' in tiff.ome_metadata
    blocks = finest[:, : second.shape[1] * 2, : second.shape[2] * 2].astype(float)
    blocks = blocks.reshape(7, second.shape[1], 2, second.shape[2], 2).mean(axis=(2, 4))
    np.testing.assert_allclose(second, blocks, atol=1.0)
    levels = contract.levels(section(run), "multiplex")
    assert list(levels[0].c.to_numpy()) == ["DAPI", *(f"AG{n:02d}" for n in range(1, 7))]
    np.testing.assert_array_equal(levels[0].data.compute(), finest)
    np.testing.assert_array_equal(levels[1].data.compute(), second)


def test_table_intensities_are_those_of_the_image(run: Path) -> None:
    """At a cell's own position the image shows its protein, over the camera's offset."""
    sdata = section(run)
    table = contract.proteins(sdata)
    image = contract.levels(sdata, "multiplex")[0].data.compute().astype(float)
    x, y = np.rint(table.obsm["spatial_um"] / 0.8).astype(int).T
    for channel in ("AG01", "AG04"):
        seen = image[1 + int(channel[-1]) - 1, y, x] - 100.0
        stated = table[:, channel].X.ravel()
        assert np.corrcoef(np.log1p(np.maximum(seen, 0)), np.log1p(stated))[0, 1] > 0.9
        assert np.median(np.abs(seen - stated) / stated) < 0.15


def test_nuclei_of_both_images_lie_where_the_alignment_says(run: Path) -> None:
    sdata = section(run)
    table = contract.proteins(sdata)
    he = np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1)
    dapi = contract.levels(sdata, "multiplex")[0].data[:1].compute()[0]
    on_dapi = (table.obsm["spatial_um"] / 0.8).round().astype(int)
    on_he = table.obsm["spatial"].round().astype(int)
    assert np.median(dapi[on_dapi[:, 1], on_dapi[:, 0]]) > 20 * np.median(dapi)
    tissue = ndimage.binary_fill_holes(he.min(axis=2) < 225)
    assert np.median(he[on_he[:, 1], on_he[:, 0], 0]) < np.median(he[tissue][:, 0]) - 25
    turned = np.loadtxt(run / "he_alignment.csv", delimiter=",")
    scale = np.sqrt(np.linalg.det(turned[:2, :2]))
    assert scale == pytest.approx(0.5 / 0.8)
    assert abs(np.degrees(np.arctan2(turned[1, 0], turned[0, 0]))) > 1.0


def test_proteins_follow_their_genes(run: Path) -> None:
    names, cells = pd.read_csv(run / "truth_names.csv"), pd.read_csv(run / "truth_cells.csv", index_col=0)
    genes = pd.read_csv(run / "truth_genes.csv", index_col=0)
    tissue, _ = _make_tissue(60, 1)
    expected = log_mean(tissue, cells[["x", "y"]].to_numpy(), genes.loc[names["gene"]])
    table = contract.proteins(section(run))
    measured = np.log(table[:, names["channel"].tolist()].X)
    for number, gene in enumerate(names["gene"]):
        if gene.startswith("SIGNAL"):
            assert np.corrcoef(expected[:, number], measured[:, number])[0, 1] > 0.5
        else:
            inputs = cells[FIELDS].to_numpy()
            assert np.abs(np.corrcoef(inputs.T, measured[:, number])[-1, :-1]).max() < 0.1
    # so do their means over the cells of a spot of 55 µm, as which a model trained on Visium sees them
    middles = cells[["x", "y"]].to_numpy()[::40]
    members = cKDTree(cells[["x", "y"]]).query_ball_point(middles, 27.5 / 0.5)
    spots = np.log([np.exp(measured[rows]).mean(axis=0) for rows in members])
    wanted = log_mean(tissue, middles, genes.loc[names["gene"]])
    signal = [number for number, gene in enumerate(names["gene"]) if gene.startswith("SIGNAL")]
    assert len(signal) == 4
    assert min(np.corrcoef(wanted[:, number], spots[:, number])[0, 1] for number in signal) > 0.75
    # log of a gamma variable of shape 4 has a variance of the trigamma function at 4, 0.2838
    residual = measured - expected
    np.testing.assert_allclose(residual.var(axis=0), 0.2838, rtol=0.12)


def test_the_genes_are_those_of_visium(run: Path, tmp_path: Path) -> None:
    visium = synthetic_visium(tmp_path / "visium", n_spots=5)
    pd.testing.assert_frame_equal(pd.read_csv(visium / "truth_genes.csv"), pd.read_csv(run / "truth_genes.csv"))


def test_fcs_as_other_readers_and_the_standard_have_it(tmp_path: Path) -> None:
    run = synthetic_codex(tmp_path / "run", n_spots=5, n_proteins=4, table_format="fcs")
    twin = pd.read_csv(synthetic_codex(tmp_path / "twin", n_spots=5, n_proteins=4) / "cells.csv")
    assert not (run / "cells.csv").exists()
    # by the standard's own page: places of the segments in the header, keywords and values in the text
    content = (run / "cells.fcs").read_bytes()
    assert content[:10] == b"FCS3.1    "
    text_from, text_to, data_from, data_to, *rest = (int(content[at : at + 8]) for at in range(10, 58, 8))
    assert rest == [0, 0]
    parts = content[text_from + 1 : text_to].decode().split("|")
    keywords = dict(zip(parts[::2], parts[1::2], strict=True))
    assert content[text_from : text_from + 1] == content[text_to : text_to + 1] == b"|"
    assert (int(keywords["$BEGINDATA"]), int(keywords["$ENDDATA"])) == (data_from, data_to)
    assert data_to == len(content) - 1
    n_cells, n_columns = int(keywords["$TOT"]), int(keywords["$PAR"])
    values = np.array(struct.unpack(f"<{n_cells * n_columns}f", content[data_from : data_to + 1]))
    values = values.reshape(n_cells, n_columns)
    names = [f"{keywords[f'$P{n}N']}:{keywords[f'$P{n}S']}" for n in range(1, n_columns + 1)]
    assert names == list(twin.columns)
    np.testing.assert_allclose(values, twin, rtol=1e-6)
    for number, column in enumerate(values.T, 1):
        assert int(keywords[f"$P{number}R"]) > column.max()
    # and by two other readers
    flow = flowio.FlowData(run / "cells.fcs")
    np.testing.assert_array_equal(flow.as_array(), values)
    assert [f"{first}:{second}" for first, second in zip(flow.pnn_labels, flow.pns_labels, strict=True)] == names
    read = readfcs.read(run / "cells.fcs")
    np.testing.assert_array_equal(read.X, values)
    assert list(read.var_names) == [name.partition(":")[2] for name in names]


def test_fcs_beyond_what_its_header_can_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that end beyond eight digits have zeros in the header, and their places in the text alone."""
    monkeypatch.setattr("stimage_sd.datasets._synthetic_codex.FCS_LIMIT", 500)
    _write_fcs(tmp_path / "large.fcs", pd.DataFrame({"x:x": np.arange(300.0)}))
    assert (tmp_path / "large.fcs").read_bytes()[26:42].split() == [b"0", b"0"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in folder.iterdir()}

    first, again, other, stained = (
        digests(synthetic_codex(tmp_path / name, n_spots=5, n_proteins=3, **arguments))
        for name, arguments in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"stain_seed": 4}))
    )
    assert first == again
    assert {name for name in first if first[name] != stained[name]} == {"he.tif"}
    assert {name for name in first if first[name] == other[name]} == {"truth_genes.csv", "truth_names.csv"}


def test_sizes_are_those_of_visible_cells(run: Path) -> None:
    table = pd.read_csv(run / "cells.csv")
    assert table["size:size"].min() >= 1
    assert table["cell_id:cell_id"].is_unique
    assert 12.0 < np.sqrt(4 * table["size:size"].median() * 0.64 / np.pi) + 2.0 < 18.0
    assert len(table) == len(pd.read_csv(run / "truth_cells.csv"))
    area_mm2 = 60 * 100.0**2 * np.sqrt(3) / 2 * 1e-6
    assert 900 < len(table) / area_mm2 < 9500


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`n_proteins` from 1 to `n_genes`, found 120, 6 and 7"):
        synthetic_codex(tmp_path / "a", n_genes=6, n_proteins=7)
    with pytest.raises(ValueError, match='to be "csv" or "fcs", found \'xlsx\''):
        synthetic_codex(tmp_path / "a", table_format="xlsx")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="Expected an empty or new folder"):
        synthetic_codex(tmp_path / "full")
