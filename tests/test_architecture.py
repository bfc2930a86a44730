"""The walls of the house: who may import what."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import orca_rank

PACKAGE = Path(orca_rank.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a room imports what stands before it, nothing that stands after.
FLOORS = (
    ("errors", "hints", "normaliser", "processes", "scoring", "words"),
    ("gpus", "launch", "options"),
    ("build", "artifacts", "task"),
    ("distances", "predictors", "evidence", "weights"),
    ("measuring",),
    ("ranks",),
    ("adapters",),
    ("backbone",),
    ("data", "report"),
    ("tracking",),
    ("fitted", "training"),
    ("stages",),
    ("api", "job"),
    ("__main__", "__init__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
# What a distribution is called when it is imported, where that is another name.
IMPORTED_AS = {"pot": "ot", "hydra-core": "hydra", "scikit-learn": "sklearn", "pillow": "PIL"}
# Reached through the config alone.
CONFIGURED = {"geomloss", "torchvision"}
PURE = ("distances", "ranks", "adapters", "predictors")


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(("orca_rank", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_room_keeps_to_its_imports(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)}
    if room(path) in PURE:
        assert not outside & {"hydra", "omegaconf", "lightning", "wandb"}
    if room(path) not in ("stages", "training", "data"):
        assert "lightning" not in outside
    if room(path) not in ("__main__", "build"):
        assert "hydra" not in outside
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("orca_rank.")} - {room(path)}
    above = {name for name in inside if name in FLOOR and FLOOR[name] >= FLOOR[room(path)]}
    assert not above, f"{path.name} imports from rooms that do not stand below its own: {above}"


def test_no_file_imports_itself_through_others() -> None:
    modules = {module(path): path for path in FILES}
    arrows = {
        name: {found for full in imported(path) for found in (full, full.rpartition(".")[0]) if found in modules}
        for name, path in modules.items()
    }
    arrows = {name: targets - {name, "orca_rank"} for name, targets in arrows.items()}
    while leaves := [name for name, targets in arrows.items() if not targets]:
        for leaf in leaves:
            del arrows[leaf]
        arrows = {name: targets - set(leaves) for name, targets in arrows.items()}
    # A package's __init__ gathers names from its own files, whose imports of it are no circle of meaning.
    assert not {name for name in arrows if not name.endswith("__init__")}, arrows


def test_the_walk_sees_the_rooms() -> None:
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_named_like_one_of_the_standard_library(path: Path) -> None:
    assert path.stem in ("__init__", "__main__", "build") or path.stem not in sys.stdlib_module_names


def test_the_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = {re.split(r"[<>=!\[ ]", requirement)[0] for requirement in requirements}
        return {IMPORTED_AS.get(name, name) for name in found}

    needed = names(project["dependencies"])
    extras = {name for requirements in project["optional-dependencies"].values() for name in names(requirements)}
    used = {name.split(".")[0] for path in FILES for name in imported(path)}
    outside = used - {"orca_rank"} - set(sys.stdlib_module_names)
    assert outside - extras <= needed, "imported, but not in pyproject.toml"
    assert needed - outside <= CONFIGURED, "in pyproject.toml, but not imported"
