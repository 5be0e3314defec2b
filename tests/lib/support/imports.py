"""What the project's files import, read from their sources: also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("sparselora_dist", "kernels", "launch")
_IMPORT_NAMES = {"kernels": "sparselora_kernels"}


def sources(folder: str) -> list[Path]:
    """The Python files of a folder of the repository; there is at least one."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no Python file"
    return found


def module_name(path: Path) -> str:
    """``sparselora_kernels.gpu.nf4`` for ``kernels/gpu/nf4.py``; a package for its ``__init__.py``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = _IMPORT_NAMES.get(parts[0], parts[0])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(module, name taken from it, leading dots) of every import in a file, absolute, wherever it stands."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name, node.level) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            constants = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from ((value, None, 0) for value in constants if isinstance(value, str))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports; ``from a import b`` gives ``a`` and ``a.b``."""
    for module, name, _ in statements(path):
        yield module
        if name:
            yield f"{module}.{name}"


def within(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages, or in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importers(*packages: str) -> set[str]:
    """Files, relative to the repository, that import one of the packages."""
    return {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sources(folder)
        if any(within(name, *packages) for name in imports(path))
    }


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> modules of ours that it imports. ``from a import b`` is an arrow to ``a.b`` where that is a module."""
    files = {module_name(path): path for folder in FOLDERS for path in sources(folder)}
    return {name: arrows(path, set(files)) for name, path in files.items()}


def arrows(path: Path, modules: set[str]) -> frozenset[str]:
    """The ``modules`` that a file imports."""
    found = {f"{m}.{n}" if n and f"{m}.{n}" in modules else m for m, n, _ in statements(path)}
    return frozenset(found & modules - {module_name(path)})


def circles(arrows: dict[str, frozenset[str]]) -> list[list[str]]:
    """Sets of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(arrows.get(module, ())):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            part = [stack.pop()]
            while part[-1] != module:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for module in sorted(arrows):
        if module not in order:
            visit(module)
    return found
