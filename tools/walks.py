"""Count the files that a reader opens to follow a call: ``python tools/walks.py``.

Three calls run on synthetic sections of three patients, with their defaults: an image to embeddings, counts to a model,
and predictions for a new patient to scores. Every function of the package that is entered is noted, on all threads. A
function's lines are its statements, without its docstring and the functions inside it.

Two figures per walk:

- *main path*: the fewest files that together hold four fifths of the lines that ran;
- *all*: the files of which more than 20 lines ran. Less is a helper that its name and docstring explain at the call.

The files of ``contract`` count as one, because walks read sections through its front page. Files at the root of the
package, such as the progress bar and the cache, do not count. The embedding starts with the extractor in hand: loading
the network and its weights is a walk of its own, listed last. Compiled code is noted when it is compiled.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

from spatialdata import SpatialData

import stimage_sd as sti

PACKAGE = Path(sti.__file__).parent
#: share of the lines that make the main path, and lines of a file that are few
MAIN, FEW = 0.8, 20
#: flag of the code of functions, in contrast to modules and classes
_OPTIMIZED = 2


def _file(code: CodeType) -> str:
    """Return the file of a function, `contract` as a whole, or an empty text for code that is not followed."""
    path = Path(code.co_filename)
    if PACKAGE not in path.parents or path.parent == PACKAGE or not code.co_flags & _OPTIMIZED:
        return ""
    room, _, rest = path.relative_to(PACKAGE).as_posix().partition("/")
    return room if room == "contract" or not rest else f"{room}/{rest}"


def walk(call: Callable[[], Any]) -> Counter[str]:
    """Run a call and return the lines of the functions that it entered, per file."""
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    lines: Counter[str] = Counter()
    for code in entered:
        if file := _file(code):
            lines[file] += len({line for *_, line in code.co_lines() if line and line != code.co_firstlineno})
    return lines


def main_path(lines: Counter[str]) -> list[str]:
    """Return the fewest files that hold `MAIN` of the lines."""
    files: list[str] = []
    for file, _ in lines.most_common():
        files.append(file)
        if sum(lines[name] for name in files) >= MAIN * lines.total():
            break
    return files


def _section(folder: Path, seed: int) -> SpatialData:
    path = sti.datasets.synthetic_visium(folder / str(seed), n_spots=120, n_genes=60, seed=seed)
    section = sti.io.visium(path, image=path / "image.tif", patient=f"patient-{seed}")
    return section


def walks(folder: Path) -> dict[str, Counter[str]]:
    """Run the walks on sections that are written to a folder."""
    train, new = {f"section-{seed}": _section(folder, seed) for seed in (0, 1)}, _section(folder, 2)
    for section in (*train.values(), new):
        sti.pp.stain_normalize(section, reference=train["section-0"])
        sti.pp.tile(section)
    made: list[Any] = []
    loading = walk(lambda: made.append(sti.models.get_extractor("efficientnet_lite0_stages")))
    embedding = walk(lambda: sti.pp.embed(new, made[0]))
    sti.pp.embed(train, made[0])
    genes = sti.pp.select_genes(train, n_top=20)
    fitting = walk(lambda: made.append(sti.tl.fit_nb(train, genes=genes)))
    sti.tl.predict(new, made[1])
    return {
        "counts -> tl.fit_nb": fitting,
        "an image -> pp.embed": embedding,
        "predictions -> tl.evaluate": walk(lambda: sti.tl.evaluate(new)),
        "weights -> models.get_extractor": loading,
    }


def main() -> None:
    """Print the figures and the files with their lines."""
    sys.stdout.write("| walk | main path | all |\n|---|---|---|\n")
    with TemporaryDirectory() as folder:
        found = walks(Path(folder))
    for name, lines in found.items():
        n_all = sum(count > FEW for count in lines.values())
        sys.stdout.write(f"| {name} | {len(main_path(lines))} | {n_all} |\n")
    for name, lines in found.items():
        sys.stdout.write(f"\n{name}: " + ", ".join(f"{file} ({count})" for file, count in lines.most_common()) + "\n")


if __name__ == "__main__":
    main()
