"""Files that are there whole or not at all, with a schema version, the options they were made with and hashes of their
inputs; for every room, the pure ones too.

Files are the interface between stages, so every way in which one can be missing, stale or half-written is an error
here, and the error names the command that mends it.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orca_rank.artifacts.command import command
from orca_rank.artifacts.damaged import DamagedFile, reading

Record = TypeVar("Record")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place, once it is on the disk, when the block ends without an
    exception. What a killed process left half-written of the same file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    temporary.touch(mode=0o644)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what processes of this machine that are gone left half-written in a folder, of one file or of all."""
    own = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{own}.{glob.escape(platform.node())}-*.part"):
        if not _alive(left.name.removesuffix(".part").rpartition("-")[2]):
            left.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


SCHEMA = 1


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def input_hashes(folder: Path, inputs: Iterable[Path]) -> dict[str, str]:
    """File, as seen from beside the stage's folder -> hash of what it holds now."""
    return {os.path.relpath(item, folder.parent): file_hash(Path(item)) for item in inputs}


def write_json(
    path: Path,
    payload: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Iterable[Path] | Mapping[str, str] = (),
) -> None:
    """Write `payload` with its schema version, the config sections it was made with and the hashes of its inputs.

    Args:
        inputs: the files that it was made from, or what `input_hashes` said of them when the work began.
    """
    hashes = inputs if isinstance(inputs, Mapping) else input_hashes(path.parent, inputs)
    content = {"schema": SCHEMA, "config": dict(config or {}), "inputs": hashes, **payload}
    text = json.dumps(content, indent=1, default=_jsonable)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read an artefact that `python -m orca_rank <made_by>` writes.

    Raises:
        FileNotFoundError: if it is missing. DamagedFile: if it is damaged, or of another schema.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `{command(made_by)}` first")
    try:
        payload = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): run `{command(made_by, 'force=true')}`") from error
    found = payload.get("schema") if isinstance(payload, dict) else None
    if found != SCHEMA:
        raise DamagedFile(
            f"{path} has schema {found}, this version reads {SCHEMA}: run `{command(made_by, 'force=true')}`"
        )
    return payload


def read_record(path: Path, made_by: str, parse: Callable[[dict[str, Any]], Record]) -> Record:
    """What `parse` makes of an artefact that `read_json` reads; where it cannot, that is an error like there."""
    payload = read_json(path, made_by)
    with reading(path, f"run `{command(made_by, 'force=true')}`"):
        return parse(payload)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, atomically; the columns are the names in the order in which the rows first use them."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; what is the same has the same bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        if metadata:
            _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata, which the library writes in another order each time: a file's hash says what
    a later stage was made from."""
    with open(path, "r+b") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        entries = json.loads(header)
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        ordered = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= len(header):  # as long, but where the library escapes otherwise
            stream.seek(8)
            stream.write(ordered.ljust(len(header)))


def read_tensors(path: Path, made_by: str) -> dict[str, Tensor]:
    """Read safetensors that `python -m orca_rank <made_by>` writes; errors as in `read_json`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `{command(made_by)}` first")
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): run `{command(made_by, 'force=true')}`") from error


def _jsonable(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} to JSON: {value!r}")
