"""The command line: the package's functions over zarr stores and model files.

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stimage_sd import __version__

if TYPE_CHECKING:
    from spatialdata import SpatialData


class Dataset(StrEnum):
    """What the demo runs on."""

    synthetic = "synthetic"
    her2st = "her2st"


class Stain(StrEnum):
    """How sections that are not normalised yet are normalised."""

    vahadane = "vahadane"
    macenko = "macenko"
    reinhard = "reinhard"
    none = "none"


class Head(StrEnum):
    """The head of the model."""

    paper = "paper"
    dispersion = "dispersion"


class Against(StrEnum):
    """What predictions are compared with."""

    counts = "counts"
    proteins = "proteins"


class Of(StrEnum):
    """What of a prediction is explained."""

    mean = "mean"
    epistemic = "epistemic"
    aleatoric = "aleatoric"
    total_variance = "total_variance"


class Standardize(StrEnum):
    """What embeddings are standardised by."""

    section = "section"
    cohort = "cohort"


class _Group(TyperGroup):
    """Turns a user's mistake into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, with warnings and errors a line each on standard error."""
        # a store of SpatialData is read with a notice about labels that are no image's
        logging.getLogger("ome_zarr").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                _show_warnings_to_users()
                return super().invoke(ctx)
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            if ctx.params.get("show_traceback"):
                typer.echo(traceback.format_exc(), err=True)
            typer.echo(f"stimage-sd: error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="stimage-sd",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Spatial gene expression from H&E images, as distributions with uncertainty. "
    "Works on zarr stores of sections (SpatialData), as the readers of stimage_sd.io and sdata.write() make them.",
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is complete.")]
Weights = Annotated[
    Path | None, typer.Option(help="Weights file of the extractor, where they are not found by themselves.")
]


def _one_line(error: BaseException) -> str:
    # str() of a KeyError is its message in quotes
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())


def _show_warnings_to_users() -> None:
    """Show what a user can act on, once and in one line; what is to come in other packages concerns developers."""
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message="zarr v3 autosharding", category=UserWarning)
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            typer.echo(f"stimage-sd: warning: {text}", err=True)

    warnings.showwarning = show


def _version(show: bool) -> None:
    if show:
        typer.echo(f"stimage-sd {__version__}")
        raise typer.Exit


def _say(message: str) -> None:
    typer.echo(f"- {message}")


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Take the options that all commands share; they are dealt with before and around them."""


@app.command()
def demo(
    dataset: Annotated[
        Dataset, typer.Option(help="synthetic: made for the occasion, offline; her2st: a breast tumour, fetched once.")
    ] = Dataset.synthetic,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("stimage-sd-demo"),
    overwrite: Overwrite = False,
) -> None:
    """Do the whole job: train on three sections, predict a fourth, score and draw it."""
    from stimage_sd._demo import run_demo
    from stimage_sd._report import score_report

    scores = run_demo(dataset.value, out, overwrite=overwrite, say=_say)
    typer.echo(f"\n{score_report(scores)}\n")
    typer.echo(
        f"In {out}: test_section.zarr (section with predictions), model.stimage (model), scores.csv (a row a gene), "
        "figures (PNG)."
    )


@app.command()
def train(
    sections: Annotated[list[Path], typer.Argument(metavar="ZARR...", help="Zarr stores of sections with counts.")],
    out: Annotated[Path, typer.Option(help="Where to save the model; one file where the name ends in .stimage.")],
    genes: Annotated[Path | None, typer.Option(help="Text file of genes to learn, one a line.")] = None,
    n_top: Annotated[int | None, typer.Option(min=1, help="Highly variable genes to learn [default: 1000].")] = None,
    include: Annotated[Path | None, typer.Option(help="Text file of genes to learn besides, one a line.")] = None,
    extractor: Annotated[str, typer.Option(help="Network that embeds the tiles.")] = "efficientnet_lite0",
    weights: Weights = None,
    stain: Annotated[Stain, typer.Option(help="Normalisation of sections that are not embedded yet.")] = Stain.vahadane,
    head: Annotated[Head, typer.Option(help="Head of the model.")] = Head.paper,
    standardize: Annotated[
        Standardize, typer.Option(help="Standardise embeddings by their own section, or by all.")
    ] = Standardize.section,
    n_members: Annotated[int, typer.Option(min=1, help="Members of the ensemble.")] = 10,
    max_epochs: Annotated[int, typer.Option(min=1, help="Epochs to train at most.")] = 100,
    validation: Annotated[
        list[str] | None, typer.Option(help="A section to validate on; by default each member has its own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fit a model on sections with counts.

    Sections that are not embedded yet are stain-normalised to the first, tiled and embedded, in memory: the stores
    are only read.
    """
    from stimage_sd import pp, tl
    from stimage_sd._steps import prepare_cohort
    from stimage_sd._store import check_free, read_section

    if genes is not None and (n_top is not None or include is not None):
        raise ValueError("--genes is the whole list; pass it, or --n-top and --include.")
    check_free(out, overwrite=overwrite)
    listed = None if genes is None else _read_genes(genes)
    besides = [] if include is None else _read_genes(include)
    cohort = _name_sections(sections, [read_section(path) for path in sections])
    chosen = pp.select_genes(cohort, listed, n_top=n_top or 1000, include=besides)
    prepare_cohort(
        cohort, extractor=extractor, stain=None if stain is Stain.none else stain.value, weights=weights, say=_say
    )
    _say(f"training on {', '.join(cohort)}: {len(chosen)} genes, {n_members} members")
    model = tl.fit_nb(
        cohort,
        genes=chosen,
        extractor=extractor,
        head=head.value,
        standardize=standardize.value,
        n_members=n_members,
        max_epochs=max_epochs,
        validation=validation or 0.3,
        seed=seed,
    )
    model.save(out)
    typer.echo(f"{model}\nModel in {out}. Next: stimage-sd predict SECTION.zarr --model {out} --out NEW.zarr")


@app.command()
def predict(
    section: Annotated[Path, typer.Argument(metavar="ZARR", help="Zarr store of a section; it needs no counts.")],
    model: Annotated[Path, typer.Option(help="Model, as train saved it.")],
    out: Annotated[Path | None, typer.Option(help="Zarr store to write; by default ZARR itself.")] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict genes with their uncertainty.

    Steps that the section lacks are run as the model expects them. A store is never changed where it stands: it is
    copied, tiles and predictions are written into the copy, and the complete copy is moved to --out, or, with
    --overwrite and without --out, to the place of ZARR. The stain-normalised image is not stored, as it is made
    again in no time.
    """
    from stimage_sd import contract, models, tl
    from stimage_sd._steps import prepare_for_model
    from stimage_sd._store import check_free, read_section, write_changed

    target = section if out is None else out
    if section.exists():
        check_free(target, overwrite=overwrite)
    fitted = models.load(model)
    sdata = read_section(section)
    on_disk = set(sdata.images)
    changed = prepare_for_model(sdata, fitted, weights=weights, say=_say)
    _say(f"{contract.sample(sdata)}: predicting {len(fitted.genes)} genes")
    tl.predict(sdata, fitted)
    for name in set(sdata.images) - on_disk:
        del sdata.images[name]
    write_changed(sdata, source=section, target=target, changed=[*changed, contract.PREDICTIONS], overwrite=overwrite)
    typer.echo(f"Predictions in {target}. Next: stimage-sd info {target}")


@app.command()
def evaluate(
    section: Annotated[Path, typer.Argument(metavar="ZARR", help="Zarr store with predictions and counts.")],
    against: Annotated[Against, typer.Option(help="What the predictions are compared with.")] = Against.counts,
    names: Annotated[
        Path | None, typer.Option(help="Table of genes and the names they were measured under, a pair a line.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File for the scores of each gene.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare predictions with counts, or proteins, and print the scores; the store is only read."""
    from stimage_sd import tl
    from stimage_sd._report import score_report
    from stimage_sd._store import check_free, read_section, staged

    if csv is not None:
        check_free(csv, overwrite=overwrite)
    scores = tl.evaluate(
        read_section(section), against=against.value, names=None if names is None else _read_names(names)
    )
    typer.echo(score_report(scores))
    if csv is not None:
        with staged(csv, overwrite=overwrite) as path:
            scores.to_csv(path, index=False)
        typer.echo(f"Scores of each gene in {csv}.")


@app.command()
def explain(
    section: Annotated[Path, typer.Argument(metavar="ZARR", help="Zarr store of a section with nuclei.")],
    model: Annotated[Path, typer.Option(help="Model, as train saved it.")],
    gene: Annotated[list[str], typer.Option(help="Gene to explain; several, where it is given several times.")],
    tile: Annotated[
        list[int] | None, typer.Option(help="Tile to explain; by default those with the highest prediction of a gene.")
    ] = None,
    n_tiles: Annotated[int, typer.Option(min=1, help="Tiles a gene, where none are named.")] = 5,
    of: Annotated[list[Of] | None, typer.Option(help="What is explained [default: mean].")] = None,
    segments: Annotated[str, typer.Option(help="nuclei, slic (superpixels), or the name of labels.")] = "nuclei",
    n_samples: Annotated[int, typer.Option(min=10, help="Perturbed copies of a tile.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the perturbations.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="PNG file for the explained tiles.")] = None,
    out: Annotated[Path | None, typer.Option(help="Zarr store to write; by default ZARR itself.")] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Score the nuclei that predictions rest on, by LIME.

    Steps that the section lacks are run as the model expects them, and the store is written as predict writes it.
    """
    from stimage_sd import contract, models, pl, tl
    from stimage_sd._steps import normalize_for_model, prepare_for_model
    from stimage_sd._store import check_free, read_section, staged, write_changed

    target = section if out is None else out
    if section.exists():
        check_free(target, overwrite=overwrite)
    if figure is not None:
        check_free(figure, overwrite=overwrite)
    fitted = models.load(model)
    sdata = read_section(section)
    on_disk = set(sdata.images)
    changed = prepare_for_model(sdata, fitted, weights=weights, say=_say)
    normalize_for_model(sdata, fitted.tiles, say=_say)
    tl.predict(sdata, fitted)
    chosen = tile or [number for name in gene for number in tl.top_tiles(sdata, name, n_tiles=n_tiles)]
    _say(f"{contract.sample(sdata)}: explaining {', '.join(gene)} on {len(set(chosen))} tiles")
    extractors = [] if weights is None else [models.get_extractor(fitted.tiles.extractor, weights=weights)]
    kinds: list[Any] = [kind.value for kind in of or [Of.mean]]
    tl.explain(
        sdata,
        fitted,
        gene,
        tiles=chosen,
        of=kinds,
        segments=segments,
        n_samples=n_samples,
        seed=seed,
        extractors=extractors,
    )
    if figure is not None:
        with staged(figure, overwrite=overwrite) as path:
            pl.explanation(sdata, gene)[0].figure.savefig(path, dpi=120)
    for name in set(sdata.images) - on_disk:
        del sdata.images[name]
    written = [contract.PREDICTIONS, contract.NUCLEI_EXPLAINED, contract.SEGMENTS_EXPLAINED, contract.EXPLANATIONS]
    write_changed(sdata, source=section, target=target, changed=[*changed, *written], overwrite=overwrite)
    table = contract.explanations(sdata)
    for name in gene if "r2" in table.layers else ():
        values = table[:, name].layers
        typer.echo(f"{name}: R² {_median(values['r2'])}, stability {_median(values['stability'])} (medians)")
    typer.echo(f"Explained nuclei in {target}.")


@app.command(name="app")
def serve(
    model: Annotated[Path | None, typer.Option(help="Model that visitors may choose.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ZARR", help="Zarr store of a section that they may choose.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Address to listen on; by default no other machine reaches the app.")
    ] = "localhost",
    max_upload: Annotated[int, typer.Option(min=1, max=4000, help="Largest file that may be uploaded, MB.")] = 200,
) -> None:
    """Serve the web app: predictions over a slide, and its tiles explained (extra app)."""
    from stimage_sd.app._launch import check_extra, launch

    check_extra()
    typer.echo(f"The app is at http://{address}:{port}; stop it with Ctrl-C.")
    launch(model=model, data=data, address=address, port=port, upload_mb=max_upload)


@app.command()
def info(path: Annotated[Path, typer.Argument(help="Zarr store of a section, or a model.")]) -> None:
    """Say what a section holds, what was done to it and what to run next; or what a model is."""
    from stimage_sd._store import is_store, read_section

    if not path.exists():
        raise FileNotFoundError(f"Nothing at {path}; expected the zarr store of a section, or a model.")
    if is_store(path):
        from stimage_sd._report import section_report

        typer.echo(section_report(read_section(path), path))
        return
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is neither the zarr store of a section nor a model.")
    from stimage_sd import models
    from stimage_sd._report import model_report

    typer.echo(model_report(models.load(path)))


def _read_genes(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"No list of genes at {path}.")
    genes = list(dict.fromkeys(path.read_text().split()))
    if not genes:
        raise ValueError(f"Expected genes in {path}, one a line, found none.")
    return genes


def _read_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"No table of names at {path}.")
    lines = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        wrong = next(line for line in lines if len(line) != 2)
        raise ValueError(f"Expected a gene and its other name a line in {path}, found {' '.join(wrong)!r}.")
    return dict(line for line in lines if line != ["gene", "channel"])


def _median(values: Any) -> str:
    import numpy as np

    found = np.asarray(values, dtype=float)
    return f"{np.nanmedian(found):.2f}" if np.isfinite(found).any() else "undefined"


def _name_sections(paths: Sequence[Path], sections: Sequence[SpatialData]) -> dict[str, SpatialData]:
    """Return a cohort, by sample id where these differ, by the stores' names otherwise."""
    from stimage_sd import contract

    stems = [path.resolve().stem for path in paths]
    for names in ([contract.sample(sdata) for sdata in sections], stems):
        if len(set(names)) == len(names):
            return dict(zip(names, sections, strict=True))
    raise ValueError(f"Expected sections of different names, found {stems}. Was one given twice?")
