"""The run folder: atomic files that carry a schema version, the config they were made with and hashes of their inputs.

Files are the interface between stages, so every way in which one can be missing, stale or half-written is an error
here, and the error names the command that mends it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orca_rank.files import atomic

SCHEMA = 1
# Where files lie, and how hard the machine is worked, change nothing in a result.
IGNORED_KEYS = frozenset({"root", "cache", "workers", "num_workers", "enable_progress_bar", "default_root_dir"})


def stage_folder(config: DictConfig, stage: str) -> Path:
    """runs/<run>/<stage>; not created until something is written."""
    return Path(config.paths.runs) / str(config.run) / stage


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def contents_hash(paths: Sequence[Path]) -> str:
    """A short hash of what some files hold, wherever they lie; a file that is not there counts as missing."""
    return key([_hash_as_of(path, path.stat().st_mtime_ns) if path.is_file() else "missing" for path in paths])


@functools.cache
def _hash_as_of(path: Path, changed: int) -> str:
    """The stages of one process ask for the same large files again and again."""
    return file_hash(path)


def plain(node: Any) -> Any:
    """A config node as plain Python values, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def select(config: DictConfig, *sections: str) -> dict[str, Any]:
    """The named top-level sections of a config as plain values: what an artefact depends on."""
    return {name: plain(config[name]) for name in sections}


def key(values: Any) -> str:
    """A short stable name of plain values, for caches."""
    text = json.dumps(_without_ignored(plain(values)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(
    path: Path,
    payload: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Iterable[Path] = (),
) -> None:
    """Write `payload` with its schema version, the config sections it was made with and the hashes of its inputs."""
    run = path.parent.parent
    hashes = {os.path.relpath(item, run): file_hash(Path(item)) for item in inputs}
    content = {"schema": SCHEMA, "config": plain(config) or {}, "inputs": hashes, **payload}
    text = json.dumps(content, indent=1, default=_jsonable)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read an artefact that `python -m orca_rank <made_by>` writes.

    Raises:
        FileNotFoundError: if it is missing. ValueError: if it is damaged, or of another schema.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m orca_rank {made_by}` first")
    try:
        payload = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): run `python -m orca_rank {made_by} force=true`") from error
    found = payload.get("schema") if isinstance(payload, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found}, this version reads {SCHEMA}: run `python -m orca_rank {made_by} force=true`"
        )
    return payload


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; the columns are the names in the order in which the rows first use them."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read safetensors that `python -m orca_rank <made_by>` writes; errors as in `read_json`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m orca_rank {made_by}` first")
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): run `python -m orca_rank {made_by} force=true`") from error


def finished(path: Path, config: Mapping[str, Any], *, force: bool, made_by: str) -> bool:
    """Whether `path` already holds the result of this very config.

    Raises:
        ValueError: if it holds the result of another config, naming the options that differ.
    """
    if force or not path.exists():
        return False
    stored = read_json(path, made_by)
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
            raise FileNotFoundError(
                f"{path} was made from {source}, which is gone: run `python -m orca_rank {made_by}`"
            )
        if file_hash(source) != expected:
            raise ValueError(f"{source} changed after {path} was made from it: run `python -m orca_rank {made_by}`")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The options in which two plain configs differ, as "name: old -> new"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = (set(old) | set(new)) - IGNORED_KEYS
        return [
            line
            for name in names
            for line in differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else str(name))
        ]
    old, new = json.loads(json.dumps(old, default=str)), json.loads(json.dumps(new, default=str))
    return [] if old == new else [f"{prefix}: {old} -> {new}"]


def _without_ignored(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _without_ignored(value) for name, value in values.items() if name not in IGNORED_KEYS}
    return [_without_ignored(value) for value in values] if isinstance(values, list | tuple) else values


def _jsonable(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} to JSON: {value!r}")
