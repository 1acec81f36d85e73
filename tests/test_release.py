"""Lists that have to agree when a version is released: dependencies, Pythons, citations, addresses, the changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import stimage_sd

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: names of the same libraries in conda-forge
CONDA = {"opencv-python-headless": "py-opencv", "openslide-bin": "openslide", "pyvips-binary": "libvips"}
FILES = (
    ".github/dependabot.yml",
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/config.yml",
    ".github/ISSUE_TEMPLATE/feature.yml",
    ".github/workflows/ci.yml",
    ".github/workflows/release.yml",
    ".pre-commit-config.yaml",
    ".readthedocs.yaml",
    "CITATION.cff",
    "codecov.yml",
    "conda/recipe.yaml",
    "ecosystem/meta.yaml",
)


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def content(name: str) -> Any:
    return yaml.safe_load(read(name))


@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_read(name: str) -> None:
    assert isinstance(content(name), dict)


def test_the_version_is_that_of_the_installed_package() -> None:
    version = Version(stimage_sd.__version__)
    assert version >= Version("0.1.0.dev0")
    assert "version" in PROJECT["dynamic"]


def test_the_conda_recipe_has_the_same_dependencies() -> None:
    recipe = dict(line.split(" ", 1) for line in content("conda/recipe.yaml")["requirements"]["run"])
    expected = {}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        expected[CONDA.get(requirement.name, requirement.name)] = requirement.specifier
    assert recipe.keys() - {"python"} == expected.keys()
    # conda-forge numbers the builds of OpenSlide by the library alone
    wrong = {name for name, specifier in expected.items() if recipe[name] != str(specifier)}
    assert wrong == {"openslide"}
    assert recipe["openslide"] == ">=4.0.0"
    assert content("conda/recipe.yaml")["context"]["python_min"] == PROJECT["requires-python"].removeprefix(">=")


def test_the_recipe_and_the_package_build_with_the_same_packages() -> None:
    build = tomllib.loads(read("pyproject.toml"))["build-system"]["requires"]
    host = content("conda/recipe.yaml")["requirements"]["host"]
    assert {line.replace(">=", " >=") for line in build} <= set(host)


def test_ci_tests_the_pythons_that_the_package_names() -> None:
    named = {line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    jobs = content(".github/workflows/ci.yml")["jobs"]
    setup = next(step for step in jobs["checks"]["steps"] if "python-version" in step.get("with", {}))
    tested = set(setup["with"]["python-version"].split())
    tested |= {row["python-version"] for row in jobs["quick-tests"]["strategy"]["matrix"]["include"]
               if not row["may-fail"]}  # fmt: skip
    assert named == tested
    matrix = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["envs"]["hatch-test"]["matrix"]
    assert set(matrix[0]["python"]) == named
    assert f">={min(named, key=Version)}" == PROJECT["requires-python"]
    assert content(".readthedocs.yaml")["build"]["tools"]["python"] in named


def test_workflows_use_the_same_versions_of_actions() -> None:
    used: dict[str, set[str]] = {}
    for name in ("ci", "release"):
        for action, version in re.findall(r"uses: (\S+)@(\S+)", read(f".github/workflows/{name}.yml")):
            used.setdefault(action, set()).add(version)
    assert used["actions/checkout"]
    assert {action: versions for action, versions in used.items() if len(versions) > 1} == {}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", version) for versions in used.values() for version in versions)


def test_nothing_is_published_before_it_is_tested() -> None:
    jobs = content(".github/workflows/release.yml")["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert set(jobs["pypi"]["needs"]) == {"ci", "build"}
    assert jobs["notes"]["needs"] == "pypi"


def test_citations_name_the_same_paper() -> None:
    citation = content("CITATION.cff")
    doi = citation["preferred-citation"]["doi"]
    assert f"https://doi.org/{doi}" in read("README.md")
    assert content("ecosystem/meta.yaml")["publications"] == [doi]
    assert citation["license"] == PROJECT["license"] == content("ecosystem/meta.yaml")["license"]
    assert citation["title"] == PROJECT["name"] == content("ecosystem/meta.yaml")["name"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]


def test_files_name_the_same_addresses() -> None:
    urls, entry, about = PROJECT["urls"], content("ecosystem/meta.yaml"), content("conda/recipe.yaml")["about"]
    assert entry["project_home"] == about["homepage"] == urls["Source"]
    assert entry["documentation_home"] == about["documentation"] == urls["Documentation"]
    assert entry["tutorials_home"].startswith(urls["Documentation"])
    assert entry["install"]["pypi"] == PROJECT["name"]
    assert about["summary"] == PROJECT["description"]
    links = {link["url"] for link in content(".github/ISSUE_TEMPLATE/config.yml")["contact_links"]}
    assert urls["Documentation"] in links


def test_the_changelog_keeps_its_form() -> None:
    text = read("CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text, flags=re.MULTILINE)
    assert versions
    assert len(versions) == text.count("\n## ")
    for name, date in versions:
        assert (name == "Unreleased" and not date) or (Version(name) and re.fullmatch(r"\d{4}-\d\d-\d\d", date))
        assert re.search(rf"^\[{re.escape(name)}\]: {PROJECT['urls']['Source']}/\S+$", text, flags=re.MULTILINE), name
    numbers = [Version(name) for name, _ in versions if name != "Unreleased"]
    assert numbers == sorted(numbers, reverse=True)
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
