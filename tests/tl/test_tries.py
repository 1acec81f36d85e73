"""Slides that end the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stimage_sd.tl._cohort.tries import Tries


@pytest.mark.slow
def test_a_slide_that_ends_the_process_is_done_last_and_given_up(tmp_path: Path) -> None:
    """Three runs over three slides, the first of which crashes as a decoder does."""
    script = f"""
        import os, pandas as pd
        from pathlib import Path
        from stimage_sd.tl._cohort.predict_cohort import _each
        from stimage_sd.tl._cohort.tries import Tries

        folder = Path({str(tmp_path)!r})
        for run in range(3):
            child = os.fork()
            if not child:
                table = pd.DataFrame({{"path": ["a", "b", "c"]}}, index=["crash", "good", "error"])
                report = table.assign(status="", reason="")

                def work(name, row):
                    with open(folder / f"order{{run}}", "a") as file:
                        file.write(name + " ")
                    if name == "crash":
                        os.abort()
                    if name == "error":
                        raise ValueError("no tissue")
                    return row["path"]

                results = _each(table, "predicting", work, report, Tries(folder / "trying"))
                report.to_csv(folder / "report.csv")
                (folder / "results").write_text(str(results))
                os._exit(0)
            os.waitpid(child, 0)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, capture_output=True)
    assert (tmp_path / "order0").read_text().split() == ["crash"]
    assert (tmp_path / "order1").read_text().split() == ["good", "error", "crash"]
    assert (tmp_path / "order2").read_text().split() == ["good", "error"]
    assert (tmp_path / "results").read_text() == "{'good': 'b'}"
    report = (tmp_path / "report.csv").read_text()
    assert "ValueError: no tissue" in report
    assert "ended 2 times during this slide" in report
    assert os.listdir(tmp_path / "trying") == ["crash"]


def test_an_interruption_is_no_crash(tmp_path: Path) -> None:
    tries = Tries(tmp_path / "trying")

    def work() -> None:
        with tries.trying("slide"):
            assert tries.ended("slide") == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert tries.ended("slide") == 0
    assert tries.why_not("slide") is None
