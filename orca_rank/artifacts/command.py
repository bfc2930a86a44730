"""The command that makes or mends a file, as the user would type it: with the options of the running command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

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


def _group(option: str) -> str:
    """What an override is about: `rank` of rank=uniform, +rank.r=4 and ~rank; `paths.runs` of paths.runs=x."""
    name = option.lstrip("+~").partition("=")[0]
    return name if name.startswith("paths.") else name.partition(".")[0]
