"""The command that makes or mends a file, as the user would type it: with the options of the running command."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

TYPED = "ORCA_RANK_TYPED"  # the command line as it was typed, also for the processes that it starts
_given: tuple[str, ...] = ()
_flags: tuple[str, ...] = ()


def remember(options: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Keep the options (`name=value`, Hydra's overrides) and flags of the running command for `command`."""
    global _given, _flags
    _given, _flags = tuple(options), tuple(flags)


def command(*options: str) -> str:
    """The running command with these options (as a shell takes them) in place of its own, quoted for a shell.

    `stage=measure` takes the place of whatever chose or changed the stage; `force=true` is said only where it is asked
    for. Without a running command, as in a notebook, the options alone.
    """
    wanted = [word for option in options for word in shlex.split(option)]
    replaced = {_group(option) for option in wanted} | {"force"}
    kept = [option for option in _given if _group(option) not in replaced]
    return shlex.join(["python", "-m", "orca_rank", *_flags, *kept, *wanted])


def swept(options: Sequence[str] | None = None) -> list[str]:
    """Those of the options, by default of the running command's, that a sweep has chosen for this point: what tells it
    from the others."""
    typed = dict(word.partition("=")[::2] for word in shlex.split(os.environ.get(TYPED, "")) if "=" in word)
    if not typed:
        return []
    return [
        option
        for option in (_given if options is None else options)
        if _several(typed.get(option.partition("=")[0], ","))
    ]


def runs_apart() -> bool:
    """Whether each point of the sweep has a run folder of its own, as run='x_${seed}' or run=a,b makes."""
    return any(option.startswith("run=") and ("${" in option or option in swept()) for option in _given)


def alike(failures: Sequence[tuple[str, str]]) -> list[str]:
    """A sweep's failures, (point, message), in lines: a message once, with the points that failed so beside the first.

    Messages are alike that differ in nothing but the options that make the point, as the command that mends it does.
    """
    kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for point, message in failures:
        own = point.split()
        kinds.setdefault(tuple(word for word in message.split() if word not in own), []).append((point, message))
    lines = []
    for (point, message), *others in kinds.values():
        lines.append(f"{point}: {message}")
        if others:
            lines.append(f"for the same reason: {'; '.join(other for other, _ in others)}")
    return lines


def _several(value: str) -> bool:
    """Whether Hydra sweeps over a value as it was typed: a, b or choice(a, b), range(3), but not [a, b]."""
    outside = re.sub(r"'[^']*'|\"[^\"]*\"", "", value)
    while (inner := re.sub(r"[\[{(][^\[\]{}()]*[\])}]", "()", outside)) != outside:
        outside = inner
    return "," in outside or re.match(r"(choice|range|interval|glob|shuffle|sort|tag)\(", outside) is not None


def _group(option: str) -> str:
    """What an override is about: `rank` of rank=uniform, +rank.r=4 and ~rank; `paths.runs` of paths.runs=x."""
    name = option.lstrip("+~").partition("=")[0]
    return name if name.startswith("paths.") else name.partition(".")[0]
