"""How long a new process takes to import the package, and to print the command line's help."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.measure import machine

#: what is run, and the seconds asked for
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "python -c 'import stimage_sd'": (["-c", "import stimage_sd"], 1.0),
    "stimage-sd --help": (["-m", "stimage_sd", "--help"], 1.5),
    "stimage-sd predict --help": (["-m", "stimage_sd", "predict", "--help"], 1.5),
}


def seconds_of(arguments: list[str]) -> float:
    """Wall-clock seconds of a Python process, its start and end included."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(runs: int) -> list[dict[str, Any]]:
    """Run every command in turn, once to fill the disk's cache and then `runs` times."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, (arguments, _) in COMMANDS.items():
            found[name].append(seconds_of(arguments))
    return [
        {
            "command": name,
            "seconds": round(statistics.median(seconds[1:]), 3),
            "seconds_all": [round(value, 3) for value in seconds[1:]],
            "asked": COMMANDS[name][1],
            "machine": machine(),
        }
        for name, seconds in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """One row per command."""
    lines = ["| command | seconds | asked |", "|---|---|---|"]
    for row in rows:
        met = "" if row["asked"] is None else f"under {row['asked']}"
        if row["asked"] is not None:
            met += ", met" if row["seconds"] < row["asked"] else ", **not met**"
        lines.append(f"| `{row['command']}` | {row['seconds']:.2f} | {met} |")
    return "\n".join(lines)
