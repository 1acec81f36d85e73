"""Run every comparison and write its table and growth curves into the docs: ``python -m benchmarks [NAME ...]``.

The packages that are compared with, torch among them, are installed by ``pip install -e ".[bench]"``.
With ``--tables-only``, tables and curves are made anew from ``benchmarks/results``. With ``--quick``, our side and the
peers that a factor is asked for run once at the smallest size, and one table is printed: what to look at before and
after a change. It leaves out the same work in other formats, sizes and layouts, unless they are named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compare import OURS, RESULTS, Comparison, MissingPeerError, child, run

DOCS = Path(__file__).parent.parent / "docs"
#: the comparisons, in the order of the work on a section
MODULES = (
    "reading",
    "reading_svs_jpeg2000",
    "reading_ome_jpeg",
    "reading_ome_jpeg2000",
    "stain",
    "embedding",
    "embedding_resnet50",
    "embedding_fields",
    "embedding_fields_lattice",
    "nb_fit",
    "nb_predict",
    "lime",
    "lime_default",
    "morans_i",
    "bivariate_morans_i",
    "pearson",
    "iou",
    "segment_nuclei",
    "embed_nuclei",
    "hovernet_nuclei",
    "hovernet",
    "hovernet_published",
    "slide_end_to_end",
)
#: the same work as another comparison's, in another format, size or layout
VARIANTS = (
    "reading_svs_jpeg2000",
    "reading_ome_jpeg",
    "reading_ome_jpeg2000",
    "embedding_resnet50",
    "embedding_fields_lattice",
    "lime_default",
    "bivariate_morans_i",
    "hovernet_published",
)
#: what is measured by itself: modules with `measure`, which gives rows, and `table`, which makes Markdown of them
ALONE = ("startup", "small")


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per size and side."""
    lines = [
        f"| {cases[0]['unit']} | side | seconds | first run | times as fast | asked | peak MB above imports |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for side, row in case["sides"].items():
            ratio = f"{case['times_as_fast'][side]:.2f}" if side != OURS else ""
            asked = f"{case['reach'][side]:g}" if side in case["reach"] else ""
            if side in case["met"]:
                asked += ", met" if case["met"][side] else ", **not met**"
            scaled = f" (scaled from {row['scaled_from']:,})" if row["scaled_from"] else ""
            scaled = " (a part, scaled)" if "times" in row["figures"] else scaled
            seconds = f"{_seconds(row['seconds'])} | {_seconds(row['seconds_first'])}"
            peak = f"{row['peak_mb_above_imports']:,}"
            lines.append(f"| {case['size']:,} | {side}{scaled} | {seconds} | {ratio} | {asked} | {peak} |")
    each = [case["sides"][OURS]["figures"].get("ms_a_tile") for case in cases]
    if all(each):
        growth = f"{each[-1] / each[0] - 1:+.0%} from the smallest size to the largest"
        lines += ["", f"Ours, milliseconds a tile: {', '.join(f'{value:.2f}' for value in each)}; {growth}."]
    on = cases[0]["machine"]
    used = sorted({f"{name} {version}" for case in cases for name, version in case["versions"].items()})
    versions = f"Python {on['python']}, {', '.join(used)}"
    return "\n".join([*lines, "", f"*{on['cores']} cores of {on['cpu']}; {versions}.*"])


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def curves(name: str, cases: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and peak memory against size, a line a side, both axes logarithmic."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [case["size"] for case in cases]
    for side in cases[0]["sides"]:
        style = {"color": "black", "linewidth": 2.2, "zorder": 3} if side == OURS else {"linewidth": 1.2}
        rows = [case["sides"][side] for case in cases]
        axes[0].plot(sizes, [row["seconds"] for row in rows], marker="o", markersize=4, label=side, **style)
        axes[1].plot(sizes, [max(row["peak_mb_above_imports"], 1) for row in rows], marker="o", markersize=4, **style)
    for ax, label in zip(axes, ("seconds", "peak MB above imports"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=cases[0]["unit"], ylabel=label)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(cases[0]["work"], fontsize=10)
    figure.savefig(path / f"growth_{name}.png", dpi=100)
    plt.close(figure)


def write(name: str, cases: list[dict[str, Any]]) -> None:
    """Put a table and curves where ``docs/benchmarks.md`` has a place for them."""
    curves(name, cases, DOCS / "_static")
    place(name, f"{table(cases)}\n\n![Seconds and memory against size](_static/growth_{name}.png)")


def place(name: str, content: str) -> None:
    """Put what was measured where ``docs/benchmarks.md`` has a place for it."""
    page = DOCS / "benchmarks.md"
    found = re.compile(rf"(<!-- compared: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text()
    if not found.search(text):
        raise SystemExit(f"{page} has no place `<!-- compared: {name} -->` ... `<!-- end -->` for the table.")
    page.write_text(found.sub(lambda marks: f"{marks[1]}{content}\n{marks[2]}", text))


def alone(name: str, path: Path, *, runs: int | None) -> None:
    """Measure what stands alone, or take what is kept, and put its table in the docs."""
    module = importlib.import_module(f"benchmarks.{name}")
    if runs is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(module.measure(runs), indent=1) + "\n")
    text = module.table(json.loads(path.read_text()))
    print(text, flush=True)
    place(name, text)


def quick(names: Iterable[str]) -> None:
    """Run ours and the peers of comparisons once at the smallest size, and print a row per side."""
    print("| comparison | size | side | seconds | first run | times as fast | peak MB above imports |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        work: Comparison = importlib.import_module(f"benchmarks.{name}").WORK
        size = work.sizes[0]
        ours = child(name, OURS, size)
        for side in (OURS, *work.reach):
            measured = min(size, work.at_most.get(side, size))
            try:
                row = ours if side == OURS else child(name, side, measured)
            except MissingPeerError:
                print(f"| {name} | {size:,} {work.unit} | {side} | not installed | | | |", flush=True)
                continue
            # as in the tables, the seconds of a slow peer are those of a smaller size, scaled
            scaled, first = (row[key] * size / measured for key in ("seconds", "seconds_first"))
            ratio = "" if side == OURS else f"{scaled / ours['seconds']:.2f}"
            seconds = f"{_seconds(scaled)} | {_seconds(first)}"
            peak = f"{row['peak_mb_above_imports']:,}"
            print(f"| {name} | {size:,} {work.unit} | {side} | {seconds} | {ratio} | {peak} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODULES + ALONE))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        quick(options.names or [name for name in MODULES if name not in VARIANTS])
        return
    for name in options.names or MODULES + ALONE:
        path = RESULTS / f"{name}.json"
        if name in ALONE:
            alone(name, path, runs=None if options.tables_only else options.runs)
            continue
        write(name, json.loads(path.read_text()) if options.tables_only else run(name, runs=options.runs))


if __name__ == "__main__":
    main()
