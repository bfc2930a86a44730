"""What to say beside Hydra's own words when a command line names an option that is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Groups whose target takes more options than its file lists, and what takes them.
OPEN = {"trainer": "lightning.Trainer", "logger": "the logger"}


def hint(error: BaseException, conf: Path) -> str | None:
    """One sentence that mends the command line, for Hydra's errors of names; None for others.

    Args:
        conf: the folder of the config groups.
    """
    said = str(error)
    if found := re.search(r"Could not override '([^']+)'|full_key: ([\w.@/]+)", said):
        return _of_option(found[1] or found[2], conf)
    if (found := re.search(r"Could not find '([^']+)'", said)) and "/" in found[1]:
        group, name = found[1].rsplit("/", 1)
        near = get_close_matches(name, _options(conf / group), 1)
        return f"did you mean {group}={near[0]}?" if near else None
    return None


def _of_option(name: str, conf: Path) -> str | None:
    place, _, rest = name.partition(".")
    group, path = (place, rest.split(".")) if rest else (place, [])
    if path and (conf / group).is_dir():
        takers = [option for option in _options(conf / group) if _at(_file(conf / group, option), path) is not _NOWHERE]
        if takers:
            return f"{name} is an option of {_listed([f'{group}={option}' for option in takers])}: give one of them too"
        if group in OPEN:
            return f"an option of {OPEN[group]} that is not in conf/{group} is given as +{name}=…"
    known = _names(_base(conf))
    for option in _options(conf / group) if (conf / group).is_dir() else []:
        known |= {f"{group}.{one}" for one in _names(_file(conf / group, option))}
    known |= {entry.name for entry in conf.iterdir() if entry.is_dir()}
    for default in _base(conf)["defaults"]:  # groups at another place, as optimizer@finetune.optimizer
        group, _, package = next(iter(default), "").partition("@") if isinstance(default, dict) else ("", "", "")
        for option in _options(conf / group) if package else []:
            known |= {f"{package}.{one}" for one in _names(_file(conf / group, option))}
    # Of the same group and called the same, as finetune.optimizer.lr for finetune.lr; else alike in letters.
    deeper = [one for one in sorted(known) if path and one.startswith(f"{place}.") and one.endswith(f".{path[-1]}")]
    near = deeper[:3] or get_close_matches(name, known, 3, cutoff=0.75)
    return f"there is no option {name}; did you mean {_listed(near)}?" if near else None


_NOWHERE = object()


def _options(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def _base(conf: Path) -> dict[str, Any]:
    return _read(conf / "config.yaml")


def _file(folder: Path, option: str) -> dict[str, Any]:
    """A file of a group with what it inherits from others of its group."""
    content = _read(folder / f"{option}.yaml")
    merged: dict[str, Any] = {}
    for parent in content.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_" and (folder / f"{parent}.yaml").exists():
            merged = _merged(merged, _file(folder, parent))
    return _merged(merged, content)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], dict) and isinstance(second[name], dict):
            both[name] = _merged(first[name], second[name])
    return both


def _at(content: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(content, Mapping) or name not in content:
            return _NOWHERE
        content = content[name]
    return content


def _names(content: Mapping[str, Any], before: str = "") -> set[str]:
    """Every dotted name of a mapping."""
    found = set()
    for name, value in content.items():
        if name in ("defaults", "hydra"):
            continue
        found.add(f"{before}{name}")
        if isinstance(value, Mapping):
            found |= _names(value, f"{before}{name}.")
    return found


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
