"""Measure how the package is built: ``python tools/structure.py [FOLDER]``.

Prints a Markdown table: lines of code, docstrings and comments, the longest files and functions, private names that are
imported across packages, circles of imports, and public names. FOLDER is ``src/stimage_sd`` by default.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: packages whose `__all__` users are told about
PUBLIC = ("baselines", "datasets", "io", "models", "pl", "pp", "tl")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: what counts as long
LONG_FILE, LONG_FUNCTION = 450, 100


@dataclass(frozen=True)
class Module:
    """A file of the package, parsed."""

    name: str
    text: str
    tree: ast.Module

    @property
    def n_lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")

    def docstring_lines(self) -> set[int]:
        """Numbers of the lines that docstrings take."""
        lines: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                text = node.body[0]
                lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
        return lines

    def comment_lines(self) -> set[int]:
        """Numbers of the lines that hold a comment alone."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.line.lstrip()[0] == "#"}

    def functions(self) -> Iterator[tuple[int, str]]:
        """Yield length without docstring and name of every function."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                doc = ast.get_docstring(node) is not None
                skipped = first.end_lineno - first.lineno + 1 if doc and first.end_lineno else 0
                yield (node.end_lineno or node.lineno) - node.lineno + 1 - skipped, f"{self.name}.{node.name}"


def modules(folder: Path) -> list[Module]:
    """Parse all files of a package, in order of their names."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        found.append(Module(".".join(part for part in parts if part != "__init__"), text, ast.parse(text)))
    return found


def imports(module: Module, known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield every module of the package that a module imports, with the name that is imported from it."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner, ""
                elif node.module in known:
                    yield node.module, alias.name


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            groups.append(sorted(stack[start:]))
            del stack[start:]

    for name in graph:
        if name not in index:
            visit(name)
    return [group for group in groups if len(group) > 1]


def is_private_elsewhere(importer: str, module: str, name: str) -> bool:
    """Whether a private name is imported by a module of another file."""
    return name.startswith("_") and not name.startswith("__") and importer != module


def public_names(found: list[Module]) -> int:
    """Count the names that the public packages load on first use."""
    count = 0
    for module in found:
        if module.name.split(".")[-1] in PUBLIC and module.name.count(".") <= 2:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.keyword) and node.arg == "submod_attrs" and isinstance(node.value, ast.Dict):
                    count += sum(len(value.elts) for value in node.value.values if isinstance(value, ast.List))
    return count


def table(folder: Path) -> list[tuple[str, str]]:
    """Return the rows of the table: what is measured, and the figure."""
    found = modules(folder)
    known = {module.name for module in found}
    docstrings = sum(len(module.docstring_lines()) for module in found)
    comments = sum(len(module.comment_lines()) for module in found)
    blank = sum(not line.strip() for module in found for line in module.text.splitlines())
    total = sum(module.n_lines for module in found)
    inside = sum(
        not module.text.splitlines()[number - 1].strip() for module in found for number in module.docstring_lines()
    )
    functions = sorted((entry for module in found for entry in module.functions()), reverse=True)
    files = sorted(((module.n_lines, module.name) for module in found), reverse=True)
    used = {module.name: list(imports(module, known)) for module in found}
    graph = {name: {other for other, _ in pairs if other != name} for name, pairs in used.items()}
    private = sum(is_private_elsewhere(name, other, what) for name, pairs in used.items() for other, what in pairs)
    rings = circles(graph)
    return [
        ("files", f"{len(found)}"),
        ("lines", f"{total:,}"),
        ("of code", f"{total - docstrings - comments - blank + inside:,}"),
        ("of docstrings", f"{docstrings:,}"),
        ("of comments", f"{comments:,}"),
        (f"files over {LONG_FILE} lines", f"{sum(lines > LONG_FILE for lines, _ in files)}"),
        ("longest files", ", ".join(f"{name} ({lines})" for lines, name in files[:3])),
        (f"functions over {LONG_FUNCTION} lines", f"{sum(lines > LONG_FUNCTION for lines, _ in functions)}"),
        ("longest functions", ", ".join(f"{name} ({lines})" for lines, name in functions[:3])),
        ("private names imported by another file", f"{private}"),
        ("circles of imports", f"{len(rings)}" + "".join(f"; {len(ring)} files: {ring[0]} …" for ring in rings)),
        ("public functions and classes", f"{public_names(found)}"),
    ]


def main() -> None:
    """Print the table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "stimage_sd"
    sys.stdout.write("| | |\n|---|---|\n")
    sys.stdout.writelines(f"| {name} | {figure} |\n" for name, figure in table(folder))


if __name__ == "__main__":
    main()
