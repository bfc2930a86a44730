"""Damaged, hostile and oversized files: one sentence that names the file, before anything is allocated or run."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from shared import ZARR, write_zarr
from torchvision.datasets import CIFAR100

from orca_rank.artifacts.damaged import DamagedFile, limit_bytes, reading
from orca_rank.artifacts.files import read_json, read_record
from orca_rank.data import mat5
from orca_rank.data.array_files import read_arrays
from orca_rank.data.arrays import Arrays
from orca_rank.data.darcy import read_mat
from orca_rank.data.embedded import ARRAYS, Embedded
from orca_rank.weights import shipped

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from fuzz import fuzz

X, Y = np.random.default_rng(0).random((8, 1, 5, 5)), np.arange(8) % 2


def test_damaged_files_of_every_kind_are_one_sentence(monkeypatch):
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(CIFAR100, name, getattr(CIFAR100, name))  # fuzz sets them to its own files
    table, complaints = fuzz(files=220, seed=1)
    assert not complaints
    assert len(table) >= 20 and sum(counts["said"] for counts in table.values()) > 100


def header(shape: tuple[int, ...]) -> bytes:
    """A file in the npy format that declares an array of float64 and holds nothing."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_declared_sizes_beyond_the_limit_are_refused(tmp_path):
    huge = (10**6, 10**6)
    (tmp_path / "huge.npy").write_bytes(header(huge))
    np.save(tmp_path / "y.npy", Y)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", header(huge))
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("x", huge, "f8", chunks=True)
    torch.save({"x": torch.zeros(1).expand(huge)}, tmp_path / "huge.pt")  # a view of one number
    for files in (["huge.npy", "y.npy"], "huge.npz", "huge.h5", "huge.pt"):
        with pytest.raises(DamagedFile, match=r"huge\.\w+ declares.*GiB.*limit of 8 GiB.*ORCA_RANK_MAX_GIB"):
            read_arrays(tmp_path, files, "x", "y" if isinstance(files, list) else None)
    path = tmp_path / "huge.mat"
    scipy.io.savemat(path, {"coeff": np.ones((2, 3, 3)), "sol": np.ones((2, 3, 3))})
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<3i", 2, 3, 3))
    content[place : place + 12] = struct.pack("<3i", 2, 3 * 10**4, 3 * 10**4)
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="more than the limit"):
        read_mat(path)


@ZARR.marks[0]
def test_damaged_and_hostile_zarr(tmp_path, monkeypatch):
    """As the other formats; what its codecs would run is not read, a chunk beyond the limit is not allocated."""
    path = tmp_path / "a.zarr"
    write_zarr(path, train__x=X, y=Y)
    x, _, _ = read_arrays(tmp_path, "a.zarr", "train/x", "y")
    assert np.array_equal(x, X)
    with pytest.raises(KeyError, match=r"no array 'train'; it holds \['train/x', 'y'\]"):
        read_arrays(tmp_path, "a.zarr", "train", None)
    about = path / "train" / "x" / "zarr.json"
    right = json.loads(about.read_text())
    huge = {"name": "regular", "configuration": {"chunk_shape": [8 * 10**9, 1, 5, 5]}}
    for changed, said in (
        ({"shape": [8 * 10**9, 1, 5, 5]}, "declares 'train/x' of shape .*limit of 8 GiB"),
        ({"chunk_grid": huge}, "declares a chunk of 'train/x' of shape .*limit of 8 GiB"),
        ({"shape": "long"}, "cannot read"),
    ):
        about.write_text(json.dumps({**right, **changed}))
        with pytest.raises(DamagedFile, match=said):
            read_arrays(tmp_path, "a.zarr", "train/x", None)
    about.write_text(json.dumps(right))
    (chunk,) = (path / "train" / "x" / "c").rglob("0/0/0/0")
    chunk.write_bytes(chunk.read_bytes()[:20])
    for here in (True, False):
        with pytest.raises(DamagedFile, match="cannot read"):
            read_arrays(tmp_path, "a.zarr", "train/x", None, in_memory=here)
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # younger ones refuse
    write_zarr(tmp_path / "b.zarr", 2, x=X)
    about = tmp_path / "b.zarr" / "x" / ".zarray"
    filters = [{"id": "vlen-utf8"}, {"id": "pickle"}]
    hostile = {"dtype": "|O", "fill_value": "", "compressor": None, "filters": filters}
    about.write_text(json.dumps({**json.loads(about.read_text()), **hostile}))
    for chunk in about.parent.glob("0*"):
        chunk.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(DamagedFile, match="holds Python objects"):
        read_arrays(tmp_path, "b.zarr", "x", None)
    assert not (tmp_path / "touched").exists()


class Touch:
    """What leaves a file behind once it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_limit_is_an_option(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=X)
    monkeypatch.setenv("ORCA_RANK_MAX_GIB", "1e-6")
    assert limit_bytes() == 1073
    with pytest.raises(DamagedFile, match="ORCA_RANK_MAX_GIB"):
        read_arrays(tmp_path, "a.npz", "x", None)
    monkeypatch.setenv("ORCA_RANK_MAX_GIB", "lots")
    with pytest.raises(ValueError, match="must be a number"):
        limit_bytes()


def test_an_entry_longer_than_its_header_says_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header((1, 1)) + bytes(10**6))
    with pytest.raises(DamagedFile, match="not as long as its header says"):
        read_arrays(tmp_path, "a.npz", "x", None)


def test_groups_and_what_else_a_file_holds(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/x"], file["train/y"], file["note"] = X, Y, "text"
    extra = {"epoch": 3, "note": "text", "history": [0.1, {"lr": 1e-3}], "shape": (1, 2), "scale": np.float64(2.0)}
    torch.save({"train": {"x": torch.from_numpy(X), "y": torch.from_numpy(Y)}, **extra}, tmp_path / "a.pt")
    torch.save({"x": X, "y": Y, **extra}, tmp_path / "numpy.pt")
    np.savez(tmp_path / "a.npz", **{"train/x": X, "train/y": Y, "note": np.array("text")})
    for name, prefix in (("a.h5", "train/"), ("a.pt", "train/"), ("numpy.pt", ""), ("a.npz", "train/")):
        x, y, _ = read_arrays(tmp_path, name, f"{prefix}x", f"{prefix}y")
        assert np.array_equal(x, X) and np.array_equal(y, Y), name
        assert Arrays(root=tmp_path, train=name, x=f"{prefix}x", y=f"{prefix}y").task.output_shape == (2,)
    with pytest.raises(KeyError, match="'train/x', 'train/y'"):
        read_arrays(tmp_path, "a.h5", "train", None)
    with pytest.raises(KeyError, match="'train/x', 'train/y'"):
        read_arrays(tmp_path, "a.pt", "train/z", None)
    with pytest.raises(DamagedFile, match="'epoch' is a int"):
        read_arrays(tmp_path, "a.pt", "epoch", None)


def test_matlab_files_hold_what_scipy_reads(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "coeff": random.random((6, 5, 4)),
        "whole": np.arange(12.0).reshape(3, 4),  # stored in one byte a number
        "single": random.random((2, 3)).astype(np.float32),
        "bytes": random.integers(0, 255, (3, 4), dtype=np.uint8),
        "one": np.array([[7]], dtype=np.int16),
        "empty": np.zeros((0, 3)),
        "a_name_of_more_than_four_letters": np.ones((1, 2)),
    }
    others = {"text": "hello", "complex": np.array([1 + 2j]), "struct": {"a": 1}, "cell": np.array([1, "a"], object)}
    for compressed in (False, True):
        scipy.io.savemat(tmp_path / "a.mat", arrays | others, do_compression=compressed)
        found = mat5.read(tmp_path / "a.mat", [*arrays, *others])
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value)
        assert mat5.shapes(tmp_path / "a.mat") == {n: a.shape for n, a in arrays.items()} | dict.fromkeys(others)
    content = (tmp_path / "a.mat").read_bytes()
    (tmp_path / "a.mat").write_bytes(content[:126] + b"MI" + content[128:])  # the other byte order
    with pytest.raises(ValueError, match="version 5"):
        mat5.shapes(tmp_path / "a.mat")


def test_source_tokens_that_do_not_fit_each_other(tmp_path):
    with np.load(shipped("swin_micro", "source")) as stored:
        arrays = {name: stored[name] for name in ARRAYS}
    for change in (
        {"centre": arrays["centre"][:-1]},
        {"labels": arrays["labels"] + 500},
        {"tokens": arrays["tokens"].astype(np.float32)},
        {"rotation": np.full(arrays["rotation"].shape, "a")},
    ):
        np.savez(tmp_path / "a.npz", **{**arrays, **change})
        with pytest.raises(DamagedFile, match=r"a\.npz does not hold source tokens.*stage=pretrain"):
            Embedded(file=str(tmp_path / "a.npz"))


def test_artefacts_that_are_not_what_they_should_be_name_the_command(tmp_path):
    path = tmp_path / "measure" / "layers.json"
    path.parent.mkdir()
    for content in (b"\xff\xfe", b"[" * 100_000, b'{"schema": 1'):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"layers\.json.*stage=measure.*force=true"):
            read_json(path, "stage=measure")
    path.write_text('{"schema": 1, "layers": 3}')
    with pytest.raises(DamagedFile, match=r"layers\.json.*stage=measure.*force=true"):
        read_record(path, "stage=measure", lambda payload: [one["name"] for one in payload["layers"]])
    with pytest.raises(FileNotFoundError), reading(path, "do something"):
        raise FileNotFoundError
