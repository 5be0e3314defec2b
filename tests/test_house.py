"""The house has floors: imports point downwards, and nowhere in a circle. The picture is in docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.imports import ROOT, arrows, circles, graph, module_name, sources, statements

PICTURE = re.search(r"```\n(\d  .*?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.S)
PACKAGES = ("sparselora_dist", "sparselora_kernels")


def floors() -> dict[str, int]:
    """Room -> floor, as drawn: ``3  layers/  io/  plan/      what is in them``."""
    assert PICTURE, "docs/architecture.md has no picture of the floors"
    found: dict[str, int] = {}
    for line in PICTURE[1].splitlines():
        match = re.match(r"(\d)  ((?:[a-z_]+(?:/|\.py)\s+)+)", line)
        if match:
            for room in match[2].split():
                assert room not in found, f"{room} is drawn twice"
                found[room.removesuffix("/").removesuffix(".py")] = int(match[1])
    return found


def room(module: str) -> str:
    """``io`` of ``sparselora_dist.io.load``, ``kernels`` of ``sparselora_kernels.nf4``."""
    parts = module.split(".")
    return {"sparselora_kernels": "kernels", "launch": "launch"}.get(parts[0]) or "".join(parts[1:2])


def climbing(modules: dict[str, frozenset[str]], drawn: dict[str, int]) -> list[str]:
    """Arrows that do not lead to a lower floor; the package's own ``__init__`` hands out what all rooms hold."""
    return [
        f"{module} -> {other}"
        for module, others in modules.items()
        for other in others
        if room(module) and room(module) != room(other) and drawn[room(other)] >= drawn[room(module)]
    ]


def test_every_room_is_on_a_floor() -> None:
    assert {room(module) for module in graph()} - {""} == set(floors())


def test_arrows_point_downwards() -> None:
    assert not climbing(graph(), floors())


def test_nothing_goes_in_a_circle() -> None:
    assert not circles(graph())


def test_nothing_imports_the_package_that_hands_out_everything() -> None:
    assert not [module for module, others in graph().items() if "sparselora_dist" in others]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("method/flops.py", "from ..io.load import load_base"),
        ("layouts/ffn.py", "def f():\n    from ..layers import ffn"),
        ("engines/zero3.py", "import sparselora_dist.apply.model"),
        ("codecs/base.py", "if TYPE_CHECKING:\n    from ..layouts import DecoderLayer"),
        ("quality/probe.py", "import importlib\nimportlib.import_module('sparselora_dist.train.run')"),
    ],
)
def test_a_climbing_arrow_is_seen(file: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form, in every place."""
    path = tmp_path / "sparselora_dist" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setattr("support.imports.ROOT", tmp_path)
    found = {module_name(path): arrows(path, set(graph()))}
    assert len(climbing(found, floors())) == 1


def test_a_circle_is_seen() -> None:
    one, two, three = (f"sparselora_dist.io.{name}" for name in ("one", "two", "three"))
    assert circles({one: frozenset({two}), two: frozenset({three}), three: frozenset({one})}) == [
        sorted((one, two, three))
    ]
    assert circles({one: frozenset({two}), two: frozenset({three})}) == []


def test_one_import_style() -> None:
    """Relative inside a package, absolute across packages."""
    for folder, package in zip(("sparselora_dist", "kernels"), PACKAGES):
        for path in sources(folder):
            for module, _, dots in statements(path):
                assert dots or module.split(".")[0] != package, f"{path.relative_to(ROOT)}: {module} is not relative"


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml does not name would be missing from the wheel."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        module_name(path) for f in ("sparselora_dist", "kernels") for path in sources(f) if path.name == "__init__.py"
    }
    assert folders == named
