"""The bundled example: a small synthetic section and a model, made on first use and kept in the cache folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stimage_sd import __version__
from stimage_sd._cache import cache_dir

#: sizes such that two cores make it in about half a minute
N_SPOTS, N_GENES, N_LEARNED = 90, 30, 12
N_MEMBERS, MAX_EPOCHS = 5, 60
#: how much of the surroundings the model sees: fewer fields of view are explained faster
FIELDS_OF_VIEW = (1.0, 2.0)
SECTION, MODEL = "section.zarr", "model.stimage"
#: raise it when the example changes
LAYOUT = 1

Say = Callable[[str], None]


def example_folder() -> Path:
    """Return where the example is, or will be, kept."""
    return cache_dir() / "app" / f"example-{__version__}-{LAYOUT}"


def make_example(say: Say) -> Path:
    """Make the example where it is not yet: train on two synthetic sections, keep a third with its nuclei.

    Parameters
    ----------
    say
        Is told which step is run.

    Returns
    -------
    The folder with `SECTION` and `MODEL`.
    """
    folder = example_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _make(work, work / "complete", say)
        try:
            os.replace(work / "complete", folder)
        except OSError:
            # another process finished it first: its copy is as good
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _make(work: Path, out: Path, say: Say) -> None:
    from stimage_sd import datasets, io, pp, tl

    sections: dict[str, Any] = {}
    reference: Any = None
    for seed, name in enumerate(("training_1", "training_2", "example")):
        say(f"Painting and embedding a synthetic section ({seed + 1} of 3)")
        run = datasets.synthetic_visium(
            work / name, n_spots=N_SPOTS, n_genes=N_GENES, seed=seed, stain_seed=seed, sample=name
        )
        sections[name] = io.visium(run, image=run / "image.tif", sample=name)
        reference = pp.stain_normalize(sections[name], reference)
        pp.tile(sections[name])
        pp.embed(sections[name], fields_of_view=FIELDS_OF_VIEW)
    example = sections.pop("example")
    say("Training a small model")
    model = tl.fit_nb(
        sections,
        genes=pp.select_genes(sections, n_top=N_LEARNED),
        n_members=N_MEMBERS,
        max_epochs=MAX_EPOCHS,
        # so that a tile alone, which is no section to standardise by, can be predicted too
        standardize="cohort",
    )
    say("Finding nuclei")
    pp.segment_nuclei(example)
    # made again from the H&E in no time
    del example.images["he_normalized"]
    out.mkdir()
    model.save(out / MODEL)
    example.write(out / SECTION)
