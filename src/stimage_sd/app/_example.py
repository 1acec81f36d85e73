"""Bundled example: a small synthetic section and a model, made on first use and kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stimage_sd import __version__
from stimage_sd._cache import cache_dir
from stimage_sd._cache_size import mark_used
from stimage_sd._files import replacing

#: sizes that two cores compute in about half a minute
N_SPOTS, N_GENES, N_LEARNED = 90, 30, 12
N_MEMBERS, MAX_EPOCHS = 5, 60
#: fields of view of the model; fewer are explained faster
FIELDS_OF_VIEW = (1.0, 2.0)
SECTION, MODEL = "section.zarr", "model.stimage"
#: version of the example; raise it when the example changes
LAYOUT = 1

Say = Callable[[str], None]


def example_folder() -> Path:
    """Return the folder of the example, which may not exist yet."""
    return cache_dir() / "app" / f"example-{__version__}-{LAYOUT}"


def make_example(say: Say) -> Path:
    """Make the example if it is missing: train on two synthetic sections and keep a third with its nuclei.

    Parameters
    ----------
    say
        Called with the name of each step.

    Returns
    -------
    The folder with `SECTION` and `MODEL`.
    """
    folder = example_folder()
    if folder.is_dir():
        mark_used(folder)
        return folder
    with replacing(folder) as complete:
        _make(complete.parent, complete, say)
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
        # a single tile cannot be standardized by its section
        standardize="cohort",
    )
    say("Finding nuclei")
    pp.segment_nuclei(example)
    # the app recomputes this image quickly from the H&E
    del example.images["he_normalized"]
    out.mkdir()
    model.save(out / MODEL)
    example.write(out / SECTION)
