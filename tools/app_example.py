"""Train the model of the web app's bundled example.

``python tools/app_example.py`` writes ``src/stimage_sd/app/example.stimage``. Run it again after a change of the
example, of the synthetic sections or of the defaults of ``fit_nb``. ``tests/app/test_example.py`` compares the file
with a model that is trained anew.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from stimage_sd import pp, tl
from stimage_sd.app import _example
from stimage_sd.models import NBModel

#: learned genes, members and components; more make the file larger
N_LEARNED, N_MEMBERS, N_COMPONENTS = 16, 5, 24
#: genes that no image can predict, so that the example also shows what is not predictable
NOISE = ("NOISE001", "NOISE002")


def train(work: Path) -> NBModel:
    """Train on the sections of the seeds before the example's.

    Parameters
    ----------
    work
        Folder for the painted sections.
    """
    say = logging.getLogger(__name__).info
    cohort = {
        f"training_{seed + 1}": _example.embedded_section(work, seed=seed, sample=f"training_{seed + 1}", say=say)
        for seed in range(_example.SEED)
    }
    genes = pp.select_genes(cohort, n_top=N_LEARNED, include=NOISE)
    # a single tile, which a visitor may upload, cannot be standardized by its section
    return tl.fit_nb(cohort, genes=genes, n_members=N_MEMBERS, n_components=N_COMPONENTS, standardize="cohort")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder)).save(_example.MODEL)
    sys.stdout.write(f"{_example.MODEL}: {_example.MODEL.stat().st_size:,} bytes\n")
