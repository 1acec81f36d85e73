"""The documentation: every public name is on an API page, the README's commands are marked, links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
API = sorted((DOCS / "api").glob("*.md"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(REPOSITORY)) for path in [*sorted(DOCS.glob("*.md")), *API]),
]
#: lazy subpackages, whose `__all__` is what they expose
SUBPACKAGES = ["baselines", "datasets", "io", "models", "pl", "pp", "tl"]
#: modules, which expose what they define
MODULES = ["likelihood.negative_binomial", "stats.spatial"]


def public_names(module: ModuleType) -> set[str]:
    """`__all__` where there is one; else the functions and classes that are defined there."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__wrapped__"))
        and getattr(value, "__module__", None) == module.__name__
    }


def documented_names() -> set[str]:
    """Full names of the entries of every `autosummary` of the API pages."""
    names, module = set(), ""
    for line in "\n".join(page.read_text(encoding="utf-8") for page in API).splitlines():
        if match := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = match[1]
        elif match := re.match(r"    ([A-Za-z_]\w*)$", line):
            names.add(f"{module}.{match[1]}")
    return names


@pytest.mark.parametrize("name", [*SUBPACKAGES, *MODULES])
def test_every_public_name_is_on_an_api_page(name):
    module = importlib.import_module(f"stimage_sd.{name}")
    expected = {f"stimage_sd.{name}.{entry}" for entry in public_names(module)}
    assert expected, f"stimage_sd.{name} exposes nothing"
    assert expected <= documented_names()


@pytest.mark.parametrize("page", PAGES)
def test_the_calls_on_a_page_exist(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    calls = set(re.findall(r"\bsti\.(io|pp|tl|pl|models|datasets|baselines)\.(\w+)", text))
    missing = [call for call in calls if not hasattr(importlib.import_module(f"stimage_sd.{call[0]}"), call[1])]
    assert missing == []
    assert page != "docs/paper.md" or len(calls) > 50


def test_the_tests_on_the_page_of_the_paper_exist():
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`(tests/[\w/.]+)`", text))
    assert len(paths) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_plot_has_a_picture_and_a_place_among_the_thumbnails():
    plots = set(importlib.import_module("stimage_sd.pl").__all__)
    pictures = {path.stem: path.stat().st_size for path in (DOCS / "_static" / "pl").glob("*.webp")}
    assert set(pictures) == plots
    assert max(pictures.values()) < 40_000
    assert sum(pictures.values()) < 400_000
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert set(re.findall(r"img-top: _static/pl/(\w+)\.webp", gallery)) == plots


def test_the_errors_on_the_page_of_troubleshooting_are_those_of_the_code():
    files = (REPOSITORY / "src" / "stimage_sd").rglob("*.py")
    # messages that go over several lines, as one
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    *messages, table = re.findall(r"^## (.+)$", page, flags=re.MULTILINE)
    assert table == "Memory, time and installation"
    assert len(messages) == 11
    assert [message for message in messages if message not in code] == []


def test_nothing_on_the_api_pages_is_gone():
    def exists(name: str) -> bool:
        module, _, attribute = name.rpartition(".")
        return hasattr(importlib.import_module(module), attribute)

    gone = sorted(name for name in documented_names() if not exists(name))
    assert gone == []


def test_every_public_name_has_a_docstring_with_an_example():
    without = []
    for name in SUBPACKAGES:
        module = importlib.import_module(f"stimage_sd.{name}")
        for entry in module.__all__:
            text = inspect.getdoc(getattr(module, entry)) or ""
            if inspect.isfunction(getattr(module, entry)) and not re.search(r"Examples\n-+\n", text):
                without.append(f"{name}.{entry}")
    assert without == []


def test_the_readme_has_its_two_commands_and_no_third():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
    marked = re.findall(r"<!-- ci: ([\w ]+) -->\n```bash\n(.*?)\n```", readme, flags=re.DOTALL)
    assert len(commands) == 2
    assert [name for name, _ in marked] == ["main job", "tests"]
    # users install with pip; developers make the environment with uv
    assert [command.split(" && ")[0] for _, command in marked] == ["python3.11 -m venv .venv", "uv venv --python 3.11"]
    assert not any("\n" in command for _, command in marked)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_to_files(page):
    path = REPOSITORY / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [*re.findall(r"\]\(([^)#\s]+)[^)]*\)", text), *re.findall(r'src="([^"]+)"', text)]
    missing = [
        target
        for target in targets
        # the notebooks are made in the docs build
        if "://" not in target and "tutorials/" not in target and not (path.parent / target).exists()
    ]
    assert missing == []
