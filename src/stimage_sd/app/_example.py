"""Bundled example: a small model that comes with the package, and a synthetic section, made on first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stimage_sd import __version__
from stimage_sd._cache import cache_dir
from stimage_sd._cache_size import mark_used
from stimage_sd._files import replacing

#: the model, written by ``tools/app_example.py``
MODEL = Path(__file__).with_name("example.stimage")
SECTION = "section.zarr"
#: size of the section, which two cores paint, embed and write in about four seconds
N_SPOTS, N_GENES = 60, 30
#: seed of the section; the model was trained on the sections of the seeds before it
SEED = 2
#: version of the section; raise it when the section changes
LAYOUT = 3

Say = Callable[[str], None]


def example_folder() -> Path:
    """Return the folder of the section, which may not exist yet."""
    return cache_dir() / "app" / f"example-{__version__}-{LAYOUT}"


def make_example(say: Say) -> Path:
    """Make the section if it is missing, with tiles and embeddings.

    Parameters
    ----------
    say
        Called with the name of each step.

    Returns
    -------
    The folder with `SECTION`.
    """
    folder = example_folder()
    if folder.is_dir():
        mark_used(folder)
        return folder
    with replacing(folder) as complete:
        sdata = embedded_section(complete.parent, seed=SEED, n_spots=N_SPOTS, sample="example", say=say)
        complete.mkdir()
        sdata.write(complete / SECTION)
    return folder


def embedded_section(work: Path, *, seed: int, n_spots: int, sample: str, say: Say) -> Any:
    """Paint a synthetic Visium section and embed its tiles.

    Parameters
    ----------
    work
        Folder for the painted files.
    seed
        Seed of the tissue and the counts. The genes are the same for all seeds.
    n_spots
        Number of spots.
    sample
        Name of the section.
    say
        Called with the name of each step.
    """
    from stimage_sd import datasets, io, pp

    say("Painting a synthetic section")
    run = datasets.synthetic_visium(work / sample, n_spots=n_spots, n_genes=N_GENES, seed=seed, sample=sample)
    sdata = io.visium(run, image=run / "image.tif", sample=sample)
    say("Embedding its tiles")
    pp.tile(sdata)
    # one field of view is explained in half the time of two
    pp.embed(sdata, fields_of_view=(1.0,))
    return sdata
