"""The command that makes or mends a file, as the user would type it: with the options of the running command."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

TYPED = "ORCA_RANK_TYPED"  # the command line as it was typed, also for the processes that it starts
LEFT = "command.txt"  # in a stage's folder, the command that made it
_given: tuple[str, ...] = ()
_flags: tuple[str, ...] = ()


def remember(options: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Keep the options (`name=value`, Hydra's overrides) and flags of the running command for `command`."""
    global _given, _flags
    _given, _flags = tuple(options), tuple(flags)


def given() -> list[str]:
    """The words of the running command, without those that start the program."""
    return [*_flags, *_given]


def command(*options: str, of: Sequence[str] | None = None) -> str:
    """The running command with these options (as a shell takes them) in place of its own, quoted for a shell.

    `stage=measure` takes the place of whatever chose or changed the stage, `rank.r=4` of that one option; `force=true`
    is said only where it is asked for. Without a running command, as in a notebook, the options alone.

    Args:
        of: the words of another command in place of the running one's, as `left` gives them.
    """
    wanted = [word for option in options for word in shlex.split(option)]
    replaced = {_name(option) for option in wanted} | {"force"}
    kept = [word for word in (given() if of is None else of) if not _said_by(word, replaced)]
    return shlex.join(["python", "-m", "orca_rank", *kept, *wanted])


def leave(folder: Path) -> None:
    """Write the running command into a stage's folder as command.txt, for who looks at it or goes on from it."""
    path = folder / LEFT
    if _given:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(command() + "\n", encoding="utf-8")
    else:  # a function's work: what a command left is not how it was made
        path.unlink(missing_ok=True)


def left(folder: Path) -> list[str]:
    """The words of the command that made a stage's folder, without those that start the program; none if unknown."""
    with contextlib.suppress(OSError, ValueError):
        return shlex.split((folder / LEFT).read_text(encoding="utf-8"))[3:]
    return []


def other_rule(rule: str, words: Sequence[str], r: int | None) -> list[str]:
    """The options that choose another rank rule at the budget of a command with these words.

    Args:
        r: its rank.r, which the other rule may not have; None without one.
    """
    if r is None:
        return [f"rank={rule}"]
    typed = any(_name(word) == "rank.r" for word in words)  # goes with its rule; one of an experiment's stays
    drop = [] if typed and not any(_name(word) == "experiment" for word in words) else ["'~rank.r'"]
    if typed and drop:  # the experiment may have none, and what is not there cannot be dropped
        drop.insert(0, f"++rank.r={r}")
    dropped = [] if rule == "uniform" else drop
    return [f"rank={rule}", *dropped, f"budget.mean_rank={r}", "budget.total_rank=null", "budget.parameters=null"]


def sweep_of(text: str) -> str:
    """A command line for several values at once; Hydra takes its flags first."""
    start = "python -m orca_rank "
    return text if text.startswith(f"{start}-m ") else text.replace(start, f"{start}-m ", 1)


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


def _name(word: str) -> str:
    """What an override is about: `rank` of rank=uniform, `rank.r` of +rank.r=4 and ~rank.r."""
    return word.lstrip("+~").partition("=")[0]


def _said_by(word: str, names: Collection[str]) -> bool:
    """Whether one of these names, or a group that has it, says anew what an override says."""
    parts = _name(word).split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts) + 1))
