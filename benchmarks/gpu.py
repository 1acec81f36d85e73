"""Everything that a GPU changes, each against torch on the same card: one table in under eight minutes.

Run on a machine with a card, a bare Python 3.12 and a folder of wheels, from the root of the repository:

    python3.12 -m benchmarks.gpu --wheels wheels

The folder is filled before, on a machine of the same kind with a network connection:

    pip wheel ".[dev,bench]" "jax[cuda12]" -w wheels

Without ``--wheels``, this interpreter runs everything. With ``--tiny``, all rows run at a very small size, also on a
CPU, which checks the script and measures nothing. Each side of each row is a process of its own with a time limit, so
that a row that fails costs no other. The table is printed, and written to ``benchmarks/results/gpu.json`` and
``gpu.md``.

What the rows do is in `benchmarks.gpu_rows`, and the networks in torch are in `benchmarks.gpu_torch`. Both sides use
their library's default precision of float32, which on recent cards is TensorFloat-32 in convolutions. The parity tests
run with full precision (``JAX_DEFAULT_MATMUL_PRECISION=highest``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS, TORCH = "stimage-sd", "torch"
#: seconds that a whole run may take
MOST_S = 470.0


class Row(NamedTuple):
    """A row: seconds that each side may take, and whether torch has a side."""

    limit_s: float
    has_peer: bool = True


#: what is run, the most important first
ROWS = {
    "parity": Row(150.0, has_peer=False),
    "embedding": Row(45.0),
    "fit_nb": Row(45.0),
    "finetune_nb": Row(45.0),
    "hovernet": Row(45.0),
    "hist2st": Row(45.0),
    "igidl": Row(45.0),
}


def installed(wheels: Path, folder: Path) -> str:
    """Make an environment of the wheels in a folder, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    own = next(wheels.glob("stimage_sd-*.whl"))
    cuda = sorted({path.name.split("_plugin")[0].replace("_", "-") for path in wheels.glob("jax_cuda*_plugin-*.whl")})
    jax = [f"jax[{name.removeprefix('jax-')}]" for name in cuda]
    subprocess.run([*install, f"{own}[dev,bench]", *jax], check=True)
    return python


def side(python: str, row: str, name: str, *, tiny: bool, limit_s: float, given: dict[str, Any]) -> dict[str, Any]:
    """Run one side of a row in a process of its own, and return its figures or what went wrong."""
    command = [python, "-W", "ignore", "-m", "benchmarks.gpu_rows", row, name, json.dumps(given)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STIMAGE_SD_CACHE": cache, "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *(["--tiny"] if tiny else [])],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"longer than {limit_s:.0f} s"}
    seconds = round(time.monotonic() - begin, 1)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip()[-1500:], "process_s": seconds}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": seconds}


def run(python: str, rows: list[str], *, tiny: bool, until: float) -> dict[str, Any]:
    """Run the rows one after another, as long as there is time."""
    # a tiny run is on CPUs that may do other work
    factor = 20.0 if tiny else 1.0
    result: dict[str, Any] = {
        "about": side(python, "about", OURS, tiny=tiny, limit_s=factor * 60, given={}),
        "rows": {},
    }
    for name in rows:
        sides: dict[str, Any] = {}
        for one in (OURS, TORCH) if ROWS[name].has_peer else (OURS,):
            limit_s = min(factor * ROWS[name].limit_s, until - time.monotonic())
            if limit_s < 5:
                sides[one] = {"failed": "no time left"}
                continue
            given = sides[OURS].get("figures", {}) if one == TORCH else {}
            sides[one] = side(python, name, one, tiny=tiny, limit_s=limit_s, given=given)
        result["rows"][name] = sides
        print("\n".join(lines(name, sides)), flush=True)
    return result


def lines(name: str, sides: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, one per case of a row."""
    failed = [f"{one}: {found['failed'].splitlines()[-1]}" for one, found in sides.items() if "failed" in found]
    ours = sides[OURS].get("seconds", {})
    theirs = sides.get(TORCH, {}).get("seconds", {})
    made = [f"| {name} | | | | | failed: {why} |" for why in failed]
    for case in ours | theirs:
        pair = ours.get(case), theirs.get(case)
        times = f"{pair[1] / pair[0]:.2f}" if pair[0] and pair[1] else ""
        seconds = ["" if value is None else f"{value:.3g}" for value in pair]
        made.append(f"| {name} | {case} | {seconds[0]} | {seconds[1]} | {times} | {_remarks(sides)} |")
    if not ours and not theirs and not failed:
        made.append(f"| {name} | | | | | {_remarks(sides)} |")
    return made


def _remarks(sides: dict[str, Any]) -> str:
    own, other = (sides.get(one, {}).get("figures", {}) for one in (OURS, TORCH))
    return "; ".join(
        " and ".join([f"{name} {_number(value)}", *([_number(other[name])] if name in other else [])])
        for name, value in own.items()
    )


def _number(value: float) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"


def table(result: dict[str, Any]) -> str:
    """Return all rows as Markdown."""
    head = ["| row | case | ours, s | torch, s | times as fast | ours and torch |", "|---|---|---|---|---|---|"]
    body = [line for name, sides in result["rows"].items() for line in lines(name, sides)]
    about = result["about"]
    told = about.get("figures") or about.get("versions") or about
    versions = ", ".join(f"{name} {value}" for name, value in about.get("versions", told).items())
    size = " At a very small size, which measures nothing." if result["tiny"] else ""
    return "\n".join([*head, *body, "", f"*{versions}. {result['minutes']:.1f} minutes.{size}*"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--wheels", type=Path, help="folder of wheels to make an environment of")
    parser.add_argument("--tiny", action="store_true", help="check the script at a very small size, also on a CPU")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"Expected rows out of {list(ROWS)}, found {sorted(unknown)}.")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        python = sys.executable if options.wheels is None else installed(options.wheels.resolve(), Path(folder))
        until = begin + (MOST_S if not options.tiny else 50 * MOST_S)
        result = run(python, options.rows, tiny=options.tiny, until=until)
    result |= {"tiny": options.tiny, "minutes": (time.monotonic() - begin) / 60}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
