"""her2st, from the data folder and by fetching from a server on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stimage_sd import contract
from stimage_sd.datasets import _her2st, her2st

SECTION = "C5"


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(data_dir: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve one section as the public repository lays it out; yields the address and the folder."""
    root = tmp_path / "repository"
    published = {
        "image.jpg": f"data/ST-imgs/C/{SECTION}/5714_HE_BT_E1.jpg",
        "counts.tsv.gz": f"data/ST-cnts/{SECTION}.tsv.gz",
        "spots.tsv": f"data/ST-spotfiles/{SECTION}_selection.tsv",
        "clusters.tsv.gz": f"res/ST-cluster/lbl/{SECTION}-cluster-annotation.tsv.gz",
    }
    for name, place in published.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes((data_dir / "her2st" / SECTION / name).read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", root
        http.shutdown()
        thread.join()


def test_from_the_data_folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STIMAGE_SD_DATA", str(data_dir))
    sdata = her2st(SECTION)
    table = contract.counts(sdata)
    assert contract.sample(sdata) == SECTION
    assert contract.patients({"mine": sdata}) == {"mine": "C"}
    published = pd.read_csv(data_dir / "her2st" / SECTION / "clusters.tsv.gz", sep="\t", index_col=0)
    assert table.obs["cluster"].dtype == "category"
    for row in published.sample(20, random_state=0).itertuples():
        assert table.obs.loc[f"{row.x}x{row.y}", "cluster"] == str(row.label)
        np.testing.assert_allclose(
            table.obsm["spatial"][table.obs_names.get_loc(f"{row.x}x{row.y}")], [row.pixel_x, row.pixel_y]
        )


def test_hashes_are_those_of_the_files(data_dir: Path) -> None:
    import hashlib

    for section, (_, hashes) in _her2st.REGISTRY.items():
        for name, known in zip(_her2st.FILES, hashes, strict=True):
            assert hashlib.sha256((data_dir / "her2st" / section / name).read_bytes()).hexdigest() == known


@pytest.mark.slow
def test_fetched_checked_and_kept(
    server: tuple[str, Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, root = server
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STIMAGE_SD_DATA", raising=False)
    monkeypatch.setattr(_her2st, "BASE_URL", address)
    counts = root / "data" / "ST-cnts" / f"{SECTION}.tsv.gz"
    whole = counts.read_bytes()
    counts.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="hash"):
        her2st(SECTION)
    counts.write_bytes(whole)
    fetched = her2st(SECTION)
    for place in root.rglob("*.*"):
        place.unlink()
    again = her2st(SECTION)
    monkeypatch.setenv("STIMAGE_SD_DATA", str(data_dir))
    local = her2st(SECTION)
    for sdata in (fetched, again):
        pd.testing.assert_frame_equal(contract.counts(sdata).obs, contract.counts(local).obs)
        assert (contract.counts(sdata).X != contract.counts(local).X).nnz == 0


def test_sections_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STIMAGE_SD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"Expected a section of her2st, one of A1, .* H3; found 'Z9'"):
        her2st("Z9")
    with pytest.raises(ValueError, match=r"'A1' of her2st cannot be fetched.*: C2, C3, C4, C5"):
        her2st("A1")
    (tmp_path / "her2st" / "A1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"Expected a table of counts at .*A1"):
        her2st("A1")
