"""What `import orca_rank` offers: the same names to Python, to a type checker and to `dir`."""

import ast
from pathlib import Path

import pytest

import orca_rank

TREE = ast.parse(Path(orca_rank.__file__).read_text())


def typed() -> dict[str, str]:
    """name -> module of the block for type checkers."""
    (block,) = (node for node in TREE.body if isinstance(node, ast.If))
    return {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}


def test_names_are_the_same_to_python_and_to_a_type_checker():
    homes = {name: f"orca_rank.{home}" for home, names in orca_rank._HOMES.items() for name in names}
    assert typed() == homes
    assert sorted(homes) == orca_rank.__all__
    assert set(homes) <= set(dir(orca_rank))


@pytest.mark.parametrize("name", orca_rank.__all__)
def test_every_name_is_there_and_explains_itself(name):
    found = getattr(orca_rank, name)
    assert callable(found)
    assert len(found.__doc__) > 20
    assert getattr(orca_rank, name) is found


def test_other_names_are_errors():
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        orca_rank.mesure  # noqa: B018
