"""What an artefact was made from: options as plain values, hashes of data, and whether a result still holds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
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
    "finetune.reduction": "mean",
    "gap.measurements.mean_gradient": False,
    "gap.measurements.whitened_gradient": False,
}
LARGE, BLOCK, BLOCKS = 2**30, 2**18, 256  # bytes of a file; of a block of it, and how many, that stand for a larger one


def contents_hash(paths: Sequence[Path], *, sampled: bool = False) -> str:
    """A short hash of what some files hold, wherever they lie; a file that is not there counts as missing.

    Args:
        sampled: of a file of more than 1 GiB, its size and 256 blocks of it stand for what it holds.
    """
    return key([_hash_as_of(path, path.stat().st_mtime_ns, sampled) if path.is_file() else "missing" for path in paths])


@functools.cache
def _hash_as_of(path: Path, changed: int, sampled: bool = False) -> str:
    """The stages of one process, and many results made from one file, ask for the same hash again and again."""
    size = path.stat().st_size
    if not sampled or size <= LARGE:
        return file_hash(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for number in range(BLOCKS):
            stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
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
