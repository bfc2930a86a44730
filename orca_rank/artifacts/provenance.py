"""What an artefact was made from: options as plain values, hashes of data, and whether a result still holds."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orca_rank.artifacts.command import command
from orca_rank.artifacts.damaged import DamagedFile
from orca_rank.artifacts.files import file_hash, read_json

# Where files lie, and how hard the machine is worked, change nothing in a result.
IGNORED_KEYS = frozenset(
    {"root", "cache", "workers", "num_workers", "device", "enable_progress_bar", "default_root_dir"}
)

# Options younger than results that lie about, and the value that stands for what was done without them: such results
# are not of other options.
SINCE = {
    "adapter.most_blocks": 16,
    "rule.adapter.most_blocks": 16,  # of an arm of the evidence
    "finetune.decay_epochs": None,
    "finetune.reduction": "mean",
    "gap.measurements.mean_gradient": False,
    "gap.measurements.whitened_gradient": False,
    "rule_learned_at": 16,  # of a row of the evidence
    "rule_r_min": 0,
}
LARGE, BLOCK, BLOCKS = 2**30, 2**18, 256  # bytes of a file; of a block of it, and how many, that stand for a larger one


def contents_hash(paths: Sequence[Path], *, sampled: bool = False) -> str:
    """A short hash of what some files, or zarr's folders, hold, wherever they lie; one that is not there counts as
    missing.

    Args:
        sampled: of a file or folder of more than 1 GiB, its size and 256 blocks of it stand for what it holds, beside
            the names and sizes of all files in a folder.
    """
    there = [path.is_file() or (path.suffix.lower() == ".zarr" and path.is_dir()) for path in paths]
    return key(
        [
            _hash_as_of(path, changed(path), sampled) if here else "missing"
            for path, here in zip(paths, there, strict=True)
        ]
    )


def changed(path: Path) -> int:
    """A number that is another once a file was changed, or anything in a folder: the sum of when each was, last."""
    below = [Path(place, name) for place, folders, files in _walk(path) for name in folders + files]
    return sum(one.stat().st_mtime_ns for one in (path, *below) if one.exists())


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    return os.walk(path, followlinks=True)  # nothing of a file


@functools.cache
def _hash_as_of(path: Path, when: int, sampled: bool = False) -> str:
    """The stages of one process, and many results made from one file, ask for the same hash again and again."""
    files = sorted(Path(place, name) for place, _, names in _walk(path) for name in names) if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes)
    whole = not sampled or total <= LARGE
    if whole and not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256(str(total).encode())
    if path.is_dir():
        for file, size in zip(files, sizes, strict=True):
            digest.update(f"{file.relative_to(path).as_posix()} {size} {file_hash(file) if whole else ''}\n".encode())
    if not whole:
        ends = list(accumulate(sizes))
        for number in range(BLOCKS):
            place = number * (total - BLOCK) // (BLOCKS - 1)  # as if the files lay one behind the other
            which = bisect.bisect_right(ends, place)
            with open(files[which], "rb") as stream:
                stream.seek(place - (ends[which] - sizes[which]))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def plain(node: Any) -> Any:
    """A config node as plain Python values, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def select(config: DictConfig, *sections: str) -> dict[str, Any]:
    """The named top-level sections of a config as plain values: what an artefact depends on."""
    return {name: plain(config[name]) for name in sections}


def key(values: Any) -> str:
    """A short stable name of plain values, for caches."""
    text = json.dumps(_what_counts(plain(values)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(path: Path, config: Mapping[str, Any], *, force: bool, made_by: str) -> bool:
    """Whether `path` already holds the result of this very config.

    Raises:
        ValueError: if it holds the result of another config, naming the options that differ.
    """
    if force or not path.exists():
        return False
    stored = read_json(path, made_by)
    if not (isinstance(stored.get("config"), Mapping) and isinstance(stored.get("inputs"), Mapping)):
        raise DamagedFile(f"{path} does not say what it was made from: run `{command(made_by, 'force=true')}`")
    if differing := sorted(differences(stored["config"], plain(config))):
        raise ValueError(
            f"{path} was made with other options ({'; '.join(differing[:6])}): "
            f"add run=<another name> to keep it, or force=true to replace it"
        )
    try:
        check_inputs(path, stored, made_by)
    except (ValueError, FileNotFoundError):
        return False
    return True


def check_inputs(path: Path, payload: Mapping[str, Any], made_by: str) -> None:
    """Raise if a file that `path` was made from has changed or gone since."""
    for name, expected in payload["inputs"].items():
        source = path.parent.parent / name
        if not source.exists():
            raise FileNotFoundError(f"{path} was made from {source}, which is gone: run `{command(made_by)}`")
        if _hash_as_of(source, source.stat().st_mtime_ns) != expected:
            raise ValueError(f"{source} changed after {path} was made from it: run `{command(made_by)}`")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The options in which two plain configs differ, as "name: old -> new"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = (set(old) | set(new)) - IGNORED_KEYS
        return [
            line
            for name in names
            for place in [f"{prefix}.{name}" if prefix else str(name)]
            for line in differences(old.get(name, SINCE.get(place)), new.get(name, SINCE.get(place)), place)
        ]
    old, new = json.loads(json.dumps(old, default=str)), json.loads(json.dumps(new, default=str))
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def _what_counts(values: Any, prefix: str = "") -> Any:
    if isinstance(values, Mapping):
        places = {name: f"{prefix}.{name}" if prefix else str(name) for name in values}
        return {
            name: _what_counts(value, places[name])
            for name, value in values.items()
            if name not in IGNORED_KEYS and not (places[name] in SINCE and value == SINCE[places[name]])
        }
    return [_what_counts(value, prefix) for value in values] if isinstance(values, list | tuple) else values
