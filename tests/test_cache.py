"""What is compiled is kept: the second process takes it from disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import stimage_sd

FIT = """
    import json, sys
    from collections import Counter
    from pathlib import Path
    import jax, jax.monitoring, numpy as np
    events = Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
    import stimage_sd as sti
    path = Path({bundle!r})
    if not path.exists():
        sti.datasets.synthetic_visium(path, n_spots=40, n_genes=10)
    section = sti.io.visium(path, image=path / "image.tif")
    sti.pp.tile(section)
    sti.pp.embed(section, "tissue_statistics", fields_of_view=(1.0,), context_rings=0)
    before = jax.config.jax_compilation_cache_dir
    model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), extractor="tissue_statistics",
                          n_members=2, max_epochs=2)
    digest = float(np.abs(model.parameters["weight"]).sum())
    print(json.dumps(dict(hits=events["cache_hits"], digest=digest, before=before)))
"""


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fit(folder: Path) -> dict:
    printed = run(FIT.format(bundle=str(folder / "bundle")), STIMAGE_SD_CACHE=str(folder / "cache"))
    return json.loads(printed.splitlines()[-1])


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*-cache")}


@pytest.fixture
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_choice")
def test_a_second_process_takes_what_the_first_compiled(tmp_path: Path) -> None:
    first = fit(tmp_path)
    assert first["before"] is None  # nothing is switched on before something is compiled
    compiled = kept(tmp_path / "cache" / "jit")
    loops = {name for name in compiled if "run_block" in name}
    assert loops  # the training loop, which takes seconds

    second = fit(tmp_path)
    # a program compiled twice over in one process is a hit too, so that none is not to be asked of the first
    assert second["hits"] >= first["hits"] + len(loops)
    assert second["hits"] >= len(compiled)
    assert second["digest"] == first["digest"]
    again = kept(tmp_path / "cache" / "jit")
    assert compiled <= again
    assert {name for name in again if "run_block" in name} == loops


def test_a_folder_of_the_users_own_is_kept(tmp_path: Path) -> None:
    script = """
        import jax
        from stimage_sd._cache import keep_compiled
        keep_compiled()
        print(jax.config.jax_compilation_cache_dir, float(jax.jit(lambda x: x + 1)(1.0)))
    """
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    printed = run(script, STIMAGE_SD_CACHE=str(tmp_path / "cache"), **chosen)
    assert printed.split() == [str(tmp_path / "own"), "2.0"]
    assert kept(tmp_path / "own")
    assert not kept(tmp_path / "cache")


def test_an_installation_and_a_home_that_cannot_be_written_are_no_obstacle(tmp_path: Path) -> None:
    """Also for root, whom no permission stops: files lie where folders would be made."""
    package = Path(stimage_sd.__file__).parent
    shutil.copytree(package, tmp_path / "stimage_sd", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("", "likelihood"):
        (tmp_path / "stimage_sd" / folder / "__pycache__").touch()
    (tmp_path / "temporary").mkdir()
    script = """
        from stimage_sd._cache import cache_dir
        from stimage_sd.likelihood.predictive import _moments
        print(cache_dir())
        print(_moments._cache.cache_path)
    """
    environment = {"PATH": os.environ["PATH"], "HOME": "/dev/null", "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path / "temporary")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cache, kernels = map(Path, done.stdout.split())
    assert cache.parent == tmp_path / "temporary"
    assert kernels.is_relative_to(cache / "numba")
