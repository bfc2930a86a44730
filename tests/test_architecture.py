"""The walls of the house: who may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import orca_rank

PACKAGE = Path(orca_rank.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_room_keeps_to_its_imports(path: Path) -> None:
    names = imported(path)
    if room(path) in ("distances", "ranks", "adapters"):
        assert not names & {"hydra", "omegaconf", "lightning", "wandb"}
    if room(path) not in ("stages", "data"):
        assert "lightning" not in names
    if room(path) not in ("__main__.py", "build.py"):
        assert "hydra" not in names


def test_the_walk_sees_the_rooms() -> None:
    assert {"distances", "ranks", "adapters", "stages", "data", "build.py"} <= {room(path) for path in FILES}
