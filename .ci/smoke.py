"""Check an installed wheel: version, bundled files, command line, and predictions of the bundled model.

``python -I .ci/smoke.py VERSION`` runs in the environment of the wheel. ``-I`` keeps the sources out of its path.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import files
from pathlib import Path

import numpy as np

import stimage_sd as sti

BUNDLED = ("py.typed", "app/example.stimage", "app/viewer.css", "app/viewer.html", "app/viewer.js")


def check(expected: str) -> None:
    """Raise `SystemExit` at the first thing that is wrong."""
    here = Path(sti.__file__).parent
    if not here.is_relative_to(sysconfig.get_path("purelib")):
        raise SystemExit(f"stimage_sd comes from {here}, not from the wheel.")
    if sti.__version__ != expected:
        raise SystemExit(f"Expected version {expected}, found {sti.__version__}.")
    listed = {str(path) for path in files("stimage-sd") or ()}
    if missing := [name for name in BUNDLED if f"stimage_sd/{name}" not in listed or not (here / name).is_file()]:
        raise SystemExit(f"The wheel lacks {', '.join(missing)}.")
    command = Path(sysconfig.get_path("scripts")) / "stimage-sd"
    model_file = here / "app" / "example.stimage"
    for arguments in (["--version"], ["info", str(model_file)]):
        subprocess.run([command, *arguments], check=True)
    model = sti.models.load(model_file)
    with tempfile.TemporaryDirectory() as folder:
        predict(model, Path(folder) / "visium", expected)


def predict(model: sti.models.NBModel, folder: Path, version: str) -> None:
    """Read a painted section, and predict the genes of a model on its tiles."""
    run = sti.datasets.synthetic_visium(folder, n_spots=60)
    section = sti.io.visium(run, image=run / "image.tif")
    sti.pp.prepare(section, model)
    sti.tl.predict(section, model)
    means = np.asarray(section.tables["predictions"].X)
    if not (means.shape[1] == len(model.genes) and np.isfinite(means).all() and (means > 0).all()):
        raise SystemExit(f"The predictions are not positive numbers: {means}.")
    print(f"predicted {means.shape[0]} tiles x {means.shape[1]} genes with {version}")


if __name__ == "__main__":
    check(sys.argv[1])
