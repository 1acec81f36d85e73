"""Objects show themselves: one line per fact as text, a table with escaped values in notebooks."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stimage_sd import models, pp
from stimage_sd._shown import Facts, shown

STORED = sorted((Path(__file__).parent / "models" / "stored").glob("*.stimage"))


class Cells(HTMLParser):
    """The texts of a table, and how its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def rows(html: str) -> tuple[str, dict[str, str]]:
    """Return the title and the rows of a table."""
    cells = Cells(html)
    assert cells.open == []
    title, *texts = cells.texts
    return title, dict(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_models_show_their_facts(path: Path) -> None:
    model = models.load(path)
    facts = model.facts()
    assert rows(model._repr_html_()) == (type(model).__name__, facts)
    first, *lines = repr(model).split("\n")
    assert first == type(model).__name__
    assert [line.split(maxsplit=1)[0] for line in lines] == [name.split()[0] for name in facts]
    assert all(line.endswith(value) for line, value in zip(lines, facts.values(), strict=True))
    names = getattr(model, "genes", ()) or model.classes
    kind = "genes" if hasattr(model, "genes") else "types"
    assert facts[kind].startswith(f"{len(names)}: {names[0]}")


def test_values_are_escaped() -> None:
    @shown
    class Hostile:
        def facts(self) -> Facts:
            return {"<b>name": "<script>alert(1)</script> & more"}

    html = Hostile()._repr_html_()
    assert "<script>" not in html
    assert rows(html) == ("Hostile", {"<b>name": "<script>alert(1)</script> & more"})


def test_wrapped_predictors_name_the_next_call() -> None:
    def constant(sdata: object) -> np.ndarray:
        return np.ones((1, 2))

    facts = models.wrap(constant, genes=["A", "B"]).facts()
    assert facts["predictor"] == "constant, values are means"
    assert facts["genes"] == "2: A, B"
    assert "tl.calibrate" in facts["next"]


def test_stainings_show_what_their_method_has() -> None:
    matrix = ((0.65, 0.07, 0.27), (0.7, 0.99, 0.57), (0.29, 0.11, 0.78))
    vahadane = pp.StainReference("vahadane", (255.0,) * 3, stain_matrix=matrix, concentrations=(1.5, 1.25))
    assert vahadane.facts()["hematoxylin"] == "optical densities 0.65, 0.7, 0.29"
    assert vahadane.facts()["concentrations"] == "1.5, 1.25"
    reinhard = pp.StainReference("reinhard", (255.0,) * 3, mean=(1.0, 2.0, 3.0), deviation=(0.1, 0.2, 0.3))
    assert set(reinhard.facts()) == {"method", "white point", "mean", "deviation"}
