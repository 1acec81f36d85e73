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

#: spots of a training section
N_SPOTS = 90
#: learned genes, members and components; more make the file larger
N_LEARNED, N_MEMBERS, N_COMPONENTS = 16, 5, 24
#: genes that no image can predict, so that the example also shows what is not predictable
NOISE = ("NOISE001", "NOISE002")


def train(work: Path) -> NBModel:
    """Train on the sections of the seeds before the example's, and certify on that of the seed after it.

    Parameters
    ----------
    work
        Folder for the painted sections.
    """
    say = logging.getLogger(__name__).info
    seeds = {f"training_{seed + 1}": seed for seed in range(_example.SEED)} | {"tested": _example.SEED + 1}
    sections = {
        name: _example.embedded_section(work, seed=seed, n_spots=N_SPOTS, sample=name, say=say)
        for name, seed in seeds.items()
    }
    tested = {"tested": sections.pop("tested")}
    genes = pp.select_genes(sections, n_top=N_LEARNED, include=NOISE)
    # a single tile, which a visitor may upload, cannot be standardized by its section
    model = tl.fit_nb(sections, genes=genes, n_members=N_MEMBERS, n_components=N_COMPONENTS, standardize="cohort")
    return tl.certify(tested, model)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder)).save(_example.MODEL)
    sys.stdout.write(f"{_example.MODEL}: {_example.MODEL.stat().st_size:,} bytes\n")
