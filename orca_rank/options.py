"""Options as small frozen dataclasses, each value checked once: errors say option, value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read(kind: type[T], values: Any, name: str) -> T:
    """The dataclass `kind` from a mapping of its fields; a field that is a dataclass itself takes a mapping in turn.

    Args:
        values: as a config gives them. name: of the options in messages, such as "align".

    Raises:
        ValueError: for something other than a mapping, an unknown or missing option, or as `kind` says.
    """
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # `kind` is a dataclass
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}={shown(values)}: expected options among {', '.join(known)}")
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{name} has no option {unknown[0]}: expected {', '.join(known)}")
    hints = get_type_hints(kind)
    given = {key: _typed(f"{name}.{key}", value, hints[key]) for key, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field declares it: a number, a word, true or false, options inside, or one of several."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    if inner := [kind for kind in kinds if is_dataclass(kind)]:
        return read(inner[0], value, name)  # type: ignore[arg-type]  # a class, as it stands in an annotation
    for kind, (fits, expected) in PLAIN.items():
        if kind in kinds and not fits(value):
            raise ValueError(f"{name}={shown(value)}: expected {expected}{' or null' if NoneType in kinds else ''}")
    return value


def unfit(value: Any, hint: Any) -> str | None:
    """What an annotation expects, where a value is of another kind; None where it fits, or nothing plain is asked for.

    Args:
        hint: of numbers, words, true or false, None, paths, sequences and mappings of these, alone or joined by |.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    said = []
    for kind in kinds:
        fits, expected = _kind(kind)
        if fits(value):
            return None
        said.append(expected)
    return " or ".join(said)


def _kind(kind: Any) -> tuple[Callable[[Any], bool], str]:
    """Whether a value is of one kind, and that kind in words; what nothing plain is asked of takes all."""
    if kind in PLAIN:
        return PLAIN[kind]
    if kind is NoneType:
        return (lambda value: value is None), "null"
    if kind is Path:
        return (lambda value: isinstance(value, str | Path)), "a path"
    outer, inner = get_origin(kind), get_args(kind)
    if outer is Literal:
        return (lambda value: value in inner), " or ".join(map(str, inner))
    if outer in (Sequence, list, tuple) and inner:
        item = inner[0]
        return (
            lambda value: isinstance(value, list | tuple) and all(unfit(one, item) is None for one in value)
        ), f"a list of {_kind(item)[1].removeprefix('a ')}s"
    if outer in (Mapping, dict):
        return (lambda value: isinstance(value, Mapping)), "names and their values"
    return (lambda value: True), "anything"


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


PLAIN: dict[type, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: _is(value, Integral), "a whole number"),
    float: (lambda value: _is(value, Real), "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a word"),
}


def whole(name: str, value: Any, least: int = 1, most: int | None = None, *, null: bool = False) -> None:
    """Raise a ValueError unless `value` is a whole number from `least` to `most` (or None, where `null`)."""
    if value is None and null:
        return
    if not _is(value, Integral) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={shown(value)}: expected a whole number {limit}{' or null' if null else ''}")


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    null: bool = False,
) -> None:
    """Raise a ValueError unless `value` is a finite number within the given bounds (or None, where `null`)."""
    if value is None and null:
        return
    fits = _is(value, Real) and math.isfinite(value)
    for bound, inside in (
        (least, lambda v, b: v >= b),
        (above, lambda v, b: v > b),
        (most, lambda v, b: v <= b),
        (below, lambda v, b: v < b),
    ):
        fits = fits and (bound is None or inside(value, bound))
    if not fits:
        raise ValueError(
            f"{name}={shown(value)}: expected {_range(least, above, most, below)}{' or null' if null else ''}"
        )


def _range(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    low, high = least if above is None else above, most if below is None else below
    if low is not None and high is not None:
        return f"a number in {'[' if above is None else '('}{low:g}, {high:g}{']' if below is None else ')'}"
    if low is not None:
        return f"a number {'of at least' if above is None else 'above'} {low:g}"
    return "a finite number" if high is None else f"a number {'of at most' if below is None else 'below'} {high:g}"


def flag(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: expected true or false")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of some words."""
    if value not in allowed:
        first = ", ".join(allowed[:-1])
        raise ValueError(f"{name}={shown(value)}: expected {f'{first} or {allowed[-1]}' if first else allowed[-1]}")


def shown(value: Any) -> str:
    """A value as a config file writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
