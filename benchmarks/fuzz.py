"""What becomes of damaged files: the table readers × outcomes, for every kind of file that is read.

    python benchmarks/fuzz.py [--files 2400] [--seed 0]

A valid file of each kind is cut off, has bytes changed, removed, inserted or overwritten, and is read again by the very
function that the program uses. Outcomes: "equal" to the undamaged file; "other": read without a word as something else,
which formats without checksums cannot tell; "said": one sentence of this program that names the file; "raw": any other
exception; "hang": more than 10 s. Exit status 1 if anything is raw or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import scipy.io
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR100

from orca_rank.artifacts.files import read_record, read_tensors, write_json
from orca_rank.artifacts.provenance import finished
from orca_rank.artifacts.unfinished import Unfinished
from orca_rank.data.array_files import read_arrays
from orca_rank.data.cifar import read_official
from orca_rank.data.darcy_data import generate, read_mat
from orca_rank.data.embedded import Embedded
from orca_rank.data.image_files import read_image
from orca_rank.measuring.activations import Inputs
from orca_rank.measuring.layers import Side
from orca_rank.ranks import Layer, RankPlan
from orca_rank.stages.planning import read_layers
from orca_rank.training.keep import checkpoint_of
from orca_rank.weights import shipped
from orca_rank.weights.file import load_weights

OUTCOMES = ("equal", "other", "said", "raw", "hang")
SECONDS = 10
Reader = tuple[Path, Callable[[], Any]]


class Hang(BaseException):
    """No Exception, so that no reader takes it for an error in its file."""


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """One kind of damage, at random places."""
    data, size = bytearray(content), len(content)
    kind = random.integers(6)
    # Headers are where it hurts: half of the time the damage is there.
    place = int(random.integers(min(size, 512) if random.random() < 0.5 else size))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        for at in random.integers(0, size, random.integers(1, 20)):
            data[at] ^= 1 << int(random.integers(8))
    elif kind == 2:
        data[place] ^= 1 << int(random.integers(8))
    elif kind == 3:
        length = int(random.integers(1, 65))
        data[place : place + length] = random.bytes(length)
    elif kind == 4:
        del data[place : place + int(random.integers(1, 65))]
    else:
        data[place:place] = random.choice([b"\0", b"\xff"]) * int(random.integers(1, 65))
    return bytes(data)


def readers(folder: Path) -> dict[str, Reader]:
    """Name -> a valid file and what reads it."""
    random = np.random.default_rng(0)
    x, y = random.random((6, 2, 5, 4)), np.arange(6) % 2
    found: dict[str, Reader] = {}

    def arrays(name: str, files: Any, damage: str) -> None:
        found[name] = folder / damage, lambda: read_arrays(folder, files, "x", "y")[:2]

    np.savez(folder / "a.npz", x=x, y=y)
    arrays("npz", "a.npz", "a.npz")
    np.savez_compressed(folder / "c.npz", x=x, y=y)
    arrays("npz, compressed", "c.npz", "c.npz")
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    arrays("npy", ["x.npy", "y.npy"], "x.npy")
    for name, options in (("h5", {}), ("h5, compressed", {"compression": "gzip", "chunks": True})):
        with h5py.File(folder / f"{len(options)}.h5", "w") as file:
            file.create_dataset("x", data=x, **options)
            file.create_dataset("y", data=y)
        arrays(name, f"{len(options)}.h5", f"{len(options)}.h5")
    if importlib.util.find_spec("zarr") is not None:
        import zarr

        for name, damage in (("zarr, what it says", "x/zarr.json"), ("zarr, what it holds", "x/c/0/0/0/0")):
            store = folder / f"{Path(damage).name}.zarr"
            group = zarr.open_group(store, mode="w")
            for member, array in (("x", x), ("y", y)):
                group.create_array(member, data=array)
            arrays(name, store.name, f"{store.name}/{damage}")
    torch.save({"x": torch.from_numpy(x), "y": torch.from_numpy(y), "note": "text"}, folder / "a.pt")
    arrays("pt", "a.pt", "a.pt")
    old = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    torch.save(old, folder / "old.pt", _use_new_zipfile_serialization=False)
    arrays("pt, before 1.6", "old.pt", "old.pt")

    field = random.random((6, 5, 5))
    for name, compressed in (("mat 5", False), ("mat 5, compressed", True)):
        path = folder / f"{compressed}.mat"
        scipy.io.savemat(path, {"coeff": field, "sol": field}, do_compression=compressed)
        found[name] = path, lambda path=path: read_mat(path)[:2]
    with h5py.File(folder / "seven.mat", "w", userblock_size=512) as file:
        file["coeff"], file["sol"] = field.T, field.T
    found["mat 7.3"] = folder / "seven.mat", lambda: read_mat(folder / "seven.mat")[:2]
    cache = folder / "cache"
    darcy = {"folder": cache, "grid": 8, "stride": 2, "progress": False}
    generate(2, **darcy)
    (kept,) = cache.iterdir()
    found["Darcy cache"] = kept, lambda: generate(2, **darcy)[:2]

    tokens = folder / "tokens.npz"
    with np.load(shipped("swin_micro", "source")) as stored:
        small = {name: stored[name] for name in stored.files}
    small["tokens"], small["labels"] = small["tokens"][:2], small["labels"][:2]
    np.savez(tokens, **small)
    found["source tokens"] = tokens, lambda: Embedded(file=str(tokens)).parts.train

    picture = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    for ending in ("png", "jpg", "tif", "webp", "bmp", "gif"):
        path = folder / f"picture.{ending}"
        picture.save(path)
        found[ending] = path, lambda path=path: read_image(path, 16)
    found["CIFAR-100"] = _cifar(folder)

    layers = folder / "run" / "measure" / "layers.json"
    layer = Layer("blocks.0.attn.qkv", 8, 24)
    write_json(layers, {"layers": [layer.to_dict()]}, config={"seed": 0})
    found["layers.json"] = layers, lambda: read_layers(layers)
    plan = folder / "run" / "plan" / "plan.json"
    write_json(plan, RankPlan({layer.name: 4}).to_dict(), config={"seed": 0})
    found["plan.json"] = plan, lambda: read_record(plan, "stage=plan", RankPlan.from_dict)
    weights = folder / "run" / "align" / "embedder.safetensors"
    weights.parent.mkdir()
    save_file({"a": torch.from_numpy(x), "b": torch.from_numpy(y)}, weights)
    found["safetensors"] = weights, lambda: list(read_tensors(weights, "stage=align").values())
    record = folder / "run" / "align" / "metrics.json"
    write_json(record, {"epochs": 3}, config={"seed": 0, "align": {"epochs": 3}}, inputs=[weights])
    made_from = {"seed": 0, "align": {"epochs": 3}}
    found["metrics.json"] = record, lambda: finished(record, made_from, force=False, made_by="stage=align")
    for ending, save in (("safetensors", save_file), ("pth", torch.save)):
        path = folder / f"swin.{ending}"
        save(_swin().state_dict(), path)
        found[f"weights .{ending}"] = path, lambda path=path: _weights(path)
    unfinished = Unfinished(folder / "run" / "measure", {}, records=(Side, Inputs))
    side = Side({"a": Inputs(torch.from_numpy(x).flatten(1), torch.ones(2, 3, 4))}, y)
    unfinished.part("source", lambda: side)
    part = unfinished.folder / "source.pt"
    found["part of measure"] = part, lambda: _again(unfinished, part)
    checkpoint = folder / "run" / "finetune" / "last.ckpt"
    checkpoint.parent.mkdir()
    state = {"state_dict": {"a": torch.from_numpy(x)}, "loops": {}, "callbacks": {}, "optimizer_states": [{"step": 3}]}
    torch.save(state, checkpoint)
    found["checkpoint"] = checkpoint, lambda: _checkpoint(checkpoint)
    return found


def _swin() -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 16, "patch_size": 4, "window_size": 2}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **options)


def _weights(path: Path) -> list[torch.Tensor]:
    model = _swin()
    load_weights(model, path)
    return [value.detach() for value in model.parameters()]


class Again(Exception):
    """A reader that does without a damaged file, and says so."""


def _again(unfinished: Unfinished, path: Path) -> Any:
    """A part of a measurement; one that is made again counts as said."""

    def make() -> Any:
        raise Again(f"{path} is made again")

    found = unfinished.part("source", make)
    return [*found.inputs["a"], found.labels]


def _checkpoint(path: Path) -> Any:
    """What a fine-tune goes on from; none counts as said."""
    with contextlib.redirect_stdout(io.StringIO()):
        whole = checkpoint_of(path.parent)
    if whole is None:
        raise Again(f"{path} is left out")
    return torch.load(whole, weights_only=True)["state_dict"]["a"]


def _cifar(folder: Path) -> Reader:
    """A file of CIFAR-100's layout, whose md5 takes the place of the official one."""
    import hashlib
    import pickle

    base = folder / CIFAR100.base_folder
    base.mkdir()
    content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1], "fine_label_names": ["a", "b"]}
    md5 = {}
    for name in ("train", "test", "meta"):
        (base / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((base / name).read_bytes(), usedforsecurity=False).hexdigest()
    CIFAR100.train_list, CIFAR100.test_list = [["train", md5["train"]]], [["test", md5["test"]]]
    CIFAR100.meta = {**CIFAR100.meta, "md5": md5["meta"]}
    return base / "train", lambda: read_official(folder, "train")


def same(a: Any, b: Any) -> bool:
    """Whether two results hold the same, whatever they are made of."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        a, b = a.numpy(), b.numpy()
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def outcome(path: Path, read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    """(outcome, message) of reading a damaged file."""

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = read()
        return ("equal" if same(result, expected) else "other"), ""
    except Hang:
        return "hang", "…"
    except Again as error:
        return "said", str(error)
    except (ValueError, KeyError, FileNotFoundError) as error:
        text = str(error.args[0]) if error.args else ""
        ours = _raised_here(error) and ("\n" not in text.strip()) and (path.name in text or path.parent.name in text)
        return ("said" if ours else "raw"), f"{type(error).__name__}: {text}"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def _raised_here(error: BaseException) -> bool:
    """Whether a file of this package raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and f"{os.sep}orca_rank{os.sep}" in trace.tb_frame.f_code.co_filename


def fuzz(files: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts of the outcomes for every reader, and what was raw or hung."""
    table: dict[str, Counter[str]] = {}
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        found = readers(Path(name))
        for kind, (path, read) in found.items():
            content, expected = path.read_bytes(), read()
            random = np.random.default_rng((seed, len(table)))
            counts: Counter[str] = Counter()
            for number in range(max(1, files // len(found))):
                path.write_bytes(damaged(content, random))
                result, message = outcome(path, read, expected)
                counts[result] += 1
                if result in ("raw", "hang"):
                    complaints.append(f"{kind}, file {number}: {result}: {message[:300]}")
            path.write_bytes(content)
            table[kind] = counts
    return table, complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    table, complaints = fuzz(options.files, options.seed)
    print(f"{'reader':20}" + "".join(f"{name:>8}" for name in OUTCOMES))
    for kind, counts in table.items():
        print(f"{kind:20}" + "".join(f"{counts[name]:8}" for name in OUTCOMES))
    total = sum(table.values(), Counter())
    print(f"{'all':20}" + "".join(f"{total[name]:8}" for name in OUTCOMES))
    print(f"{total.total()} files in {time.perf_counter() - started:.0f} s")
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
