"""Run the package's functions on zarr stores and model files from the command line.

Heavy imports are inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stimage_sd import __version__
from stimage_sd._cli_choices import Against, Dataset, Head, Model, Of, On, Overwrite, Stain, Standardize, Weights
from stimage_sd._cli_messages import OneLineErrors, say
from stimage_sd._damaged_files import reading

if TYPE_CHECKING:
    from spatialdata import SpatialData


app = typer.Typer(
    name="stimage-sd",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Spatial gene expression from H&E images, as distributions with uncertainty. "
    "Works on zarr stores of sections (SpatialData), made with a reader of stimage_sd.io and sdata.write().",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"stimage-sd {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
) -> None:
    """Declare the options that all commands share."""


@app.command()
def demo(
    dataset: Annotated[
        Dataset, typer.Option(help="synthetic (generated, offline) or her2st (a breast tumor, downloaded once).")
    ] = Dataset.synthetic,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("stimage-sd-demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run the whole pipeline: train on three sections, then predict, score and draw a fourth."""
    from stimage_sd._demo import run_demo
    from stimage_sd._report import score_report

    scores = run_demo(dataset.value, out, overwrite=overwrite, say=say)
    typer.echo(f"\n{score_report(scores)}\n")
    typer.echo(
        f"In {out}: test_section.zarr (section with predictions), model.stimage (model), scores.csv (one row per gene) "
        "and figures (PNG)."
    )


@app.command()
def train(
    sections: Annotated[list[Path], typer.Argument(metavar="ZARR...", help="Zarr stores of sections with counts.")],
    out: Annotated[Path, typer.Option(help="Path of the model. A name ending in .stimage makes one file.")],
    genes: Annotated[Path | None, typer.Option(help="Text file of genes to learn, one per line.")] = None,
    n_top: Annotated[int | None, typer.Option(min=1, help="Highly variable genes to learn [default: 1000].")] = None,
    include: Annotated[Path | None, typer.Option(help="Text file of additional genes to learn, one per line.")] = None,
    extractor: Annotated[str, typer.Option(help="Network that embeds the tiles.")] = "efficientnet_lite0_stages",
    weights: Weights = None,
    stain: Annotated[Stain, typer.Option(help="Stain normalization of sections without embeddings.")] = Stain.vahadane,
    head: Annotated[Head, typer.Option(help="Head of the model.")] = Head.paper,
    standardize: Annotated[
        Standardize, typer.Option(help="Standardize embeddings within every section, or over the cohort.")
    ] = Standardize.section,
    n_members: Annotated[int, typer.Option(min=1, help="Members of the ensemble.")] = 10,
    max_epochs: Annotated[int, typer.Option(min=1, help="Largest number of training epochs.")] = 100,
    validation: Annotated[
        list[str] | None, typer.Option(help="A section to validate on. By default every member holds out 30% of them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fit a model on sections with counts.

    Sections without embeddings are stain-normalized to the first section, tiled and embedded in memory. The stores are
    not changed.
    """
    from stimage_sd import pp, tl
    from stimage_sd._store import check_free, read_section
    from stimage_sd.pp._prepare import prepare_cohort

    if genes is not None and (n_top is not None or include is not None):
        raise ValueError("--genes is the whole list of genes. Pass either --genes, or --n-top and --include.")
    check_free(out, overwrite=overwrite)
    listed = None if genes is None else _read_genes(genes)
    besides = [] if include is None else _read_genes(include)
    cohort = _name_sections(sections, [read_section(path) for path in sections])
    chosen = pp.select_genes(cohort, listed, n_top=n_top or 1000, include=besides)
    prepare_cohort(
        cohort, extractor=extractor, stain=None if stain is Stain.none else stain.value, weights=weights, say=say
    )
    say(f"training on {', '.join(cohort)}: {len(chosen)} genes, {n_members} members")
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
    section: Annotated[
        Path, typer.Argument(metavar="ZARR|SLIDE", help="Zarr store of a section, or an image or whole slide.")
    ],
    model: Model,
    on: Annotated[On, typer.Option(help="What to predict; nuclei and grid need a model of these.")] = On.tiles,
    out: Annotated[
        Path | None,
        typer.Option(help="Zarr store to write, by default ZARR itself. For a slide, a folder for store and report."),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Micrometers per pixel of an image that does not state them.")
    ] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict genes with their uncertainty.

    A slide needs --out: a folder for the section (section.zarr) and a report (report.html).

    Missing steps are run with the model's settings. A store is never changed in place. It is copied, tiles and
    predictions are written into the copy, and the complete copy is moved to --out. With --overwrite and without --out,
    the copy replaces ZARR. The stain-normalized image is not stored, as it is quick to compute again.
    """
    from stimage_sd import contract, tl
    from stimage_sd._files import restored
    from stimage_sd._store import check_free, is_store, read_section, write_changed
    from stimage_sd.models._resolve import as_model
    from stimage_sd.pp._prepare import prepare_for_model

    if not restored(section).exists():
        raise FileNotFoundError(f"No zarr store, image or slide at {section}.")
    if section.is_file() or (section.is_dir() and not is_store(section) and section.suffix != ".zarr"):
        return _predict_slide(section, model, out=out, mpp=mpp, weights=weights, overwrite=overwrite)
    if mpp is not None:
        raise ValueError("--mpp is for images and slides. A section states its resolution.")
    target = section if out is None else out
    check_free(target, overwrite=overwrite)
    fitted: Any = as_model(model)
    sdata = read_section(section)
    on_disk = set(sdata.images)
    changed = prepare_for_model(sdata, fitted, weights=weights, say=say)
    say(f"{contract.sample(sdata)}: predicting {len(fitted.genes)} genes")
    tl.predict(sdata, fitted, on=on.value)
    for name in set(sdata.images) - on_disk:
        del sdata.images[name]
    write_changed(
        sdata, source=section, target=target, changed=[*changed, contract.predictions_key(on)], overwrite=overwrite
    )
    typer.echo(f"Predictions in {target}. Next: stimage-sd info {target}")


@app.command()
def evaluate(
    section: Annotated[Path, typer.Argument(metavar="ZARR", help="Zarr store with predictions and counts.")],
    against: Annotated[Against, typer.Option(help="Measurements to compare predictions with.")] = Against.counts,
    names: Annotated[
        Path | None, typer.Option(help="Table of genes and their names in the measurements, one pair per line.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File for the scores per gene.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare predictions with counts or proteins, and print the scores. The store is not changed."""
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
        typer.echo(f"Scores per gene in {csv}.")


@app.command()
def explain(
    section: Annotated[Path, typer.Argument(metavar="ZARR", help="Zarr store of a section with nuclei.")],
    model: Model,
    gene: Annotated[list[str], typer.Option(help="Gene to explain. Repeat the option for several genes.")],
    tile: Annotated[
        list[int] | None,
        typer.Option(help="Tile to explain. By default the tiles with the highest prediction of a gene."),
    ] = None,
    n_tiles: Annotated[int, typer.Option(min=1, help="Tiles per gene, if --tile is not given.")] = 5,
    of: Annotated[list[Of] | None, typer.Option(help="Part of the prediction to explain [default: mean].")] = None,
    segments: Annotated[str, typer.Option(help="nuclei, slic (superpixels), or the name of labels.")] = "nuclei",
    n_samples: Annotated[
        int, typer.Option(min=10, help="Most perturbed copies per tile. Fewer are used where scores are stable.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the perturbations.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="PNG file for the explained tiles.")] = None,
    out: Annotated[Path | None, typer.Option(help="Zarr store to write. By default ZARR itself.")] = None,
    weights: Weights = None,
    overwrite: Overwrite = False,
) -> None:
    """Score nuclei by their effect on predictions, with LIME.

    Missing steps are run with the model's settings. The store is written in the same way as by predict.
    """
    from stimage_sd import contract, models, pl, tl
    from stimage_sd._store import check_free, read_section, staged, write_changed
    from stimage_sd.models._resolve import as_model
    from stimage_sd.pp._prepare import normalize_for_model, prepare_for_model

    target = section if out is None else out
    if section.exists():
        check_free(target, overwrite=overwrite)
    if figure is not None:
        check_free(figure, overwrite=overwrite)
    fitted: Any = as_model(model)
    sdata = read_section(section)
    on_disk = set(sdata.images)
    changed = prepare_for_model(sdata, fitted, weights=weights, say=say)
    normalize_for_model(sdata, fitted.tiles, say=say)
    tl.predict(sdata, fitted)
    chosen = tile or [tile_id for name in gene for tile_id in tl.top_tiles(sdata, name, n_tiles=n_tiles)]
    say(f"{contract.sample(sdata)}: explaining {', '.join(gene)} on {len(set(chosen))} tiles")
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
            pl.explanation(sdata, gene, save=path)
    for name in set(sdata.images) - on_disk:
        del sdata.images[name]
    written = [contract.PREDICTIONS, contract.NUCLEI_EXPLAINED, contract.SEGMENTS_EXPLAINED, contract.EXPLANATIONS]
    write_changed(sdata, source=section, target=target, changed=[*changed, *written], overwrite=overwrite)
    table = contract.explanations(sdata)
    for name in gene if "r2" in table.layers else ():
        values = table[:, name].layers
        typer.echo(f"{name}: held-out R² {_median(values['r2'])}, stability {_median(values['stability'])} (medians)")
    typer.echo(f"Explained nuclei in {target}.")


@app.command()
def cohort(
    slides: Annotated[
        Path, typer.Argument(help="CSV table of slides with column path, and optionally slide, patient, mpp.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results. The same command resumes an interrupted run.")],
    weights: Weights = None,
    quality: Annotated[bool, typer.Option(help="Leave out slides of poor quality.")] = True,
    stores: Annotated[bool, typer.Option(help="Also write one zarr store per slide, without the image.")] = False,
) -> None:
    """Predict a cohort of whole slides, with one row and one status per slide."""
    import pandas as pd

    from stimage_sd import tl
    from stimage_sd.io._text import open_text, punctuation
    from stimage_sd.models._resolve import as_model

    if not slides.is_file():
        raise FileNotFoundError(f"No table of slides at {slides}.")
    with reading(slides, what="a CSV table of slides"), open_text(slides) as lines:
        marks = punctuation(lines, ",")
        table = pd.read_csv(lines, **marks, dtype={"slide": str, "patient": str, "path": str})
    predictions = tl.predict_cohort(table, as_model(model), out=out, quality=quality, stores=stores, weights=weights)
    report = predictions.uns["slides"]
    for name, row in report[report["status"] != "predicted"].iterrows():
        typer.echo(f"{name}: {row['status']}: {row['reason']}", err=True)
    typer.echo(f"{predictions.n_obs} of {len(report)} slides x {predictions.n_vars} genes in {out / 'cohort.h5ad'}")


@app.command(name="app")
def serve(
    model: Annotated[
        Path | None, typer.Option(help="Model that visitors may choose, or the name of a ready model.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ZARR", help="Zarr store of a section that visitors may choose.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Address to listen on. By default only this computer reaches the app.")
    ] = "localhost",
    max_upload: Annotated[int, typer.Option(min=1, max=4000, help="Largest file that may be uploaded, MB.")] = 200,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name for the app in browsers, such as a proxy's."),
    ] = None,
) -> None:
    """Serve the web app with predictions and explanations of a slide (needs the extra app)."""
    from stimage_sd.app._launch import check_extra, launch
    from stimage_sd.models._ready import is_ready, path_of, pretrained

    check_extra()
    if model is not None and not model.exists() and is_ready(model):
        pretrained(str(model))
        model = path_of(str(model))
    typer.echo(f"The app is at http://{address}:{port}. Stop the app with Ctrl-C.")
    launch(model=model, data=data, address=address, port=port, upload_mb=max_upload,
           allow_hosts=tuple(allow_host or ()))  # fmt: skip


@app.command()
def cache(
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Delete the oldest images, tables and interrupted runs until they take this many GB."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything that no process works in.")] = False,
) -> None:
    """List the cache folder, and delete files from it.

    First close sections that were read from JPEG, PNG or striped TIFF, because their pixels are in the cache folder.
    """
    from stimage_sd import _cache_size

    if clear and limit is not None:
        raise ValueError("--clear deletes everything. Pass either --clear or --limit.")
    if clear:
        typer.echo(f"Deleted {_cache_size.clear() / 1e9:.3f} GB.")
    elif limit is not None:
        typer.echo(f"Deleted {_cache_size.trim(limit * 1e9, in_use=0.0) / 1e9:.3f} GB.")
    typer.echo(_cache_size.report())


@app.command()
def ready() -> None:
    """List the ready models, which predict, explain, cohort and app take by name."""
    from stimage_sd import models

    for row in models.pretrained().itertuples():
        cost = "in the cache" if row.path else f"first use: {row.minutes} min, {row.download_mb} MB"
        typer.echo(f"{row.name:<16} {row.tissue}; {row.platform}; {cost}")


@app.command()
def info(
    path: Annotated[
        Path,
        typer.Argument(help="Store, model, slide, table, GeoJSON, folder of a run or results, or ready model."),
    ],
) -> None:
    """Say what a file, folder or ready model is, and which command or call comes next."""
    from stimage_sd._describe import describe

    typer.echo(describe(path))


def _predict_slide(
    slide: Path, model: Path, *, out: Path | None, mpp: float | None, weights: Path | None, overwrite: bool
) -> None:
    from stimage_sd import contract, io
    from stimage_sd._slide_report import predict_and_report
    from stimage_sd._store import check_free
    from stimage_sd.models._resolve import as_model

    if slide.suffix == ".h5ad":
        raise ValueError(
            f"{slide} holds an AnnData. Make a section of it and its H&E in Python, "
            f'`stimage_sd.io.from_anndata(anndata.read_h5ad("{slide}"), "he.tif").write("section.zarr")`, and pass '
            "section.zarr."
        )
    if out is None:
        raise ValueError(f"{slide} is an image. Pass --out FOLDER for its store and report.")
    check_free(out, overwrite=overwrite)
    sdata = io.slide(slide, mpp=mpp)
    if contract.mpp(sdata) is None:
        raise ValueError(
            f"{slide} does not state its micrometers per pixel. Pass --mpp: about 0.25 for a scan at 40x, 0.5 at 20x."
        )
    typer.echo(predict_and_report(sdata, as_model(model), out, weights=weights, overwrite=overwrite, say=say))


def _read_genes(path: Path) -> list[str]:
    from stimage_sd.io._text import open_text

    if not path.is_file():
        raise FileNotFoundError(f"No list of genes at {path}.")
    with reading(path, what="a list of genes"), open_text(path) as text:
        genes = list(dict.fromkeys(text.read().split()))
    if not genes:
        raise ValueError(f"Expected genes in {path}, one per line, found none.")
    return genes


def _read_names(path: Path) -> dict[str, str]:
    from stimage_sd.io._text import open_text

    if not path.is_file():
        raise FileNotFoundError(f"No table of names at {path}.")
    with reading(path, what="a table of names"), open_text(path) as text:
        lines = [line.replace(",", " ").split() for line in text.read().splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        wrong = next(line for line in lines if len(line) != 2)
        raise ValueError(f"Expected one gene and its other name per line in {path}, found {' '.join(wrong)!r}.")
    return dict(line for line in lines if line != ["gene", "channel"])


def _median(values: Any) -> str:
    import numpy as np

    array = np.asarray(values, dtype=float)
    return f"{np.nanmedian(array):.2f}" if np.isfinite(array).any() else "undefined"


def _name_sections(paths: Sequence[Path], sections: Sequence[SpatialData]) -> dict[str, SpatialData]:
    """Return a cohort with sample ids as names, or with the stores' names if sample ids repeat."""
    from stimage_sd import contract

    stems = [path.resolve().stem for path in paths]
    for names in ([contract.sample(sdata) for sdata in sections], stems):
        if len(set(names)) == len(names):
            return dict(zip(names, sections, strict=True))
    raise ValueError(f"Expected sections of different names, found {stems}. Was one given twice?")
