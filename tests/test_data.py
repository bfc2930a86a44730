"""Digits, CIFAR-100, your own arrays, and what all datasets share."""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from shared import ZARR, write_zarr
from torchvision.datasets import CIFAR100

from orca_rank import normaliser
from orca_rank.data import cifar
from orca_rank.data.arrays import Arrays, pseudo_labels
from orca_rank.data.cifar import Cifar100, crop_and_flip
from orca_rank.data.digits import Digits
from orca_rank.data.splits import stratified_order
from orca_rank.normaliser import Normaliser


def everything(data, part):
    x, y = (torch.cat(batches) for batches in zip(*data.loader(part), strict=True))
    return x, y


def sizes(data):
    return [len(getattr(data.parts, part)[0]) for part in ("train", "val", "test")]


# ---------------------------------------------------------------- splits


def test_every_prefix_of_the_order_is_stratified():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    order = stratified_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    for length in (7, 10, 33, 80):
        counts = np.bincount(labels[order[:length]], minlength=3)
        assert (abs(counts - length * np.array([0.5, 0.3, 0.2])) <= 1.5).all()
    np.testing.assert_array_equal(order, stratified_order(labels, seed=3))
    assert not np.array_equal(order, stratified_order(labels, seed=4))


def test_channel_statistics_over_chunks_and_constant_channels(monkeypatch):
    x = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 7
    monkeypatch.setattr(normaliser, "_CHUNK", 8 * 60)
    fitted = Normaliser.fit(x, "channel")
    torch.testing.assert_close(fitted.mean.flatten(), x.double().mean((0, 2, 3)))
    torch.testing.assert_close(fitted.std.flatten()[:2], x.double().std((0, 2, 3), correction=0)[:2])
    assert fitted.std[2] == 0 and not fitted.encode(x + 1)[:, 2].any()  # what never varied says nothing


# ---------------------------------------------------------------- digits


def test_digits_parts_are_disjoint_stratified_and_normalised():
    data = Digits(channels=1)
    assert data.task.input_shape == (1, 8, 8) and data.task.output_shape == (10,)
    x, y = everything(data, "train")
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert sum(sizes(data)) == 1797 and sizes(data)[2] == 359
    assert x.mean().abs() < 1e-5 and (x.std() - 1).abs() < 1e-3
    for part in ("val", "test"):
        share = torch.bincount(everything(data, part)[1], minlength=10) / len(getattr(data.parts, part)[1])
        assert (share - 0.1).abs().max() < 0.02
    images = [set(map(bytes, getattr(data.parts, part)[0].contiguous().numpy())) for part in ("train", "val", "test")]
    assert not images[0] & images[2] and not images[0] & images[1] and not images[1] & images[2]


def test_digits_near_is_the_mirror_image_of_the_source():
    source, near = Digits(channels=3), Digits(channels=1, invert=True, mirror=True)
    x, y = source.parts.train
    z, labels = near.parts.train
    assert torch.equal(y, labels)
    torch.testing.assert_close(z, 1 - x[:, :1].flip(-1))
    assert torch.equal(x[:, 0], x[:, 2])


def test_digits_order_depends_on_the_seed_and_the_split_does_not():
    one, two = Digits(seed=1), Digits(seed=2)
    assert torch.equal(one.parts.test[0], two.parts.test[0])
    first, again, other = (next(iter(data.train_dataloader()))[1] for data in (one, Digits(seed=1), two))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(one.parts.test[1], Digits(split_seed=1).parts.test[1])


def test_limits_and_errors():
    assert sizes(Digits(train_limit=50, test_limit=20)) == [45, 5, 20]
    assert set(Digits(train_limit=50).parts.train[1].tolist()) == set(range(10))
    with pytest.raises(ValueError, match="channels=2"):
        Digits(channels=2)
    with pytest.raises(ValueError, match="left to train on"):
        _ = Digits(train_limit=2).task
    with pytest.raises(ValueError, match="test_limit"):
        _ = Digits(test_limit=0).task
    with pytest.raises(ValueError, match="between 0 and 1"):
        _ = Digits(val_fraction=0.0).task
    with pytest.raises(ValueError, match="'train', 'val' or 'test'"):
        Digits().loader("validation")


# ---------------------------------------------------------------- CIFAR-100


def test_augmentation_shifts_and_mirrors():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(1, 1 + 2 * 6 * 7).reshape(1, 2, 6, 7).repeat(200, 1, 1, 1)
    out = crop_and_flip(x, generator, padding=2)
    padded = torch.nn.functional.pad(x[0], (2,) * 4)
    crops = [padded[:, i : i + 6, j : j + 7] for i in range(5) for j in range(5)]
    allowed = {bytes(v.contiguous().numpy()) for crop in crops for v in (crop, crop.flip(-1))}
    found = {bytes(image.contiguous().numpy()) for image in out}
    assert found <= allowed and len(found) > 40
    assert torch.equal(out, crop_and_flip(x, torch.Generator().manual_seed(0), padding=2))


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_a_file_with_another_md5_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-100-python"
    data = Cifar100(root=tmp_path)
    assert data.outline.output_shape == (100,)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python.*paths\.data"):
        data.setup()
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="md5"):
        data.setup()
    assert not (tmp_path / "unpickled").exists()


def test_cifar_parts_from_files_of_the_official_layout(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 300), ("test", 100), ("meta", 0)):
        batch = {
            "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [*range(100)] * (count // 100),
            "fine_label_names": [str(number) for number in range(100)],
        }
        (folder / part).write_bytes(pickle.dumps(batch))
        digest = hashlib.md5((folder / part).read_bytes(), usedforsecurity=False).hexdigest()
        name, value = (
            ("meta", {**CIFAR100.meta, "md5": digest}) if part == "meta" else (f"{part}_list", [[part, digest]])
        )
        monkeypatch.setattr(CIFAR100, name, value)
    data = Cifar100(root=tmp_path, train_limit=200, test_limit=50, batch_size=60)
    assert sizes(data) == [180, 20, 50]
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (60, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    plain, _ = everything(data, "train")
    raw = data.parts.train[0].float() / 255
    expected = (raw - torch.tensor(cifar.MEAN)[:, None, None]) / torch.tensor(cifar.STD)[:, None, None]
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    again, _ = next(iter(data.train_dataloader()))
    assert torch.equal(x, again)


real = pytest.mark.skipif(
    not os.environ.get("ORCA_RANK_DATA"), reason="set ORCA_RANK_DATA to a folder with the real data sets"
)


@real
@pytest.mark.slow
def test_real_cifar_100():
    root = Path(os.environ["ORCA_RANK_DATA"])
    if not (root / "cifar-100-python").exists():
        pytest.skip("no cifar-100-python in ORCA_RANK_DATA")
    data = Cifar100(root=root, test_limit=1000)
    assert sizes(data) == [45000, 5000, 1000]
    assert set(torch.bincount(data.parts.val[1]).tolist()) <= {49, 50, 51}
    x, _ = next(iter(data.loader("train")))
    assert x.mean().abs() < 0.3


@real
def test_real_neuralop_darcy():
    root = Path(os.environ["ORCA_RANK_DATA"])
    if not (root / "darcy_neuralop").exists():
        pytest.skip("no darcy_neuralop in ORCA_RANK_DATA")
    data = Arrays(
        root=root, train="darcy_neuralop/darcy_train_16.pt", test="darcy_neuralop/darcy_test_16.pt", normalise="pixel"
    )
    assert sizes(data) == [900, 100, 50]
    assert data.task.kind == "dense" and data.task.output_shape == (1, 16, 16)
    mismatched = Arrays(root=root, train="darcy_neuralop/darcy_train_16.pt", test="darcy_neuralop/darcy_test_32.pt")
    with pytest.raises(ValueError, match="does not match"):
        _ = mismatched.task


# ---------------------------------------------------------------- your own arrays


def classification(n=40, dtype=np.float32):
    random = np.random.default_rng(1)
    return (10 * random.random((n, 2, 6, 5))).astype(dtype), np.arange(n) % 3


def save(folder: Path, kind: str, x: np.ndarray, y: np.ndarray):
    if kind == "npy":
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", y)
        return ["x.npy", "y.npy"]
    path = folder / f"data.{kind}"
    if kind == "zarr":
        write_zarr(path, x=x, y=y)
    elif kind == "npz":
        np.savez(path, x=x, y=y)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = x, y
    else:
        torch.save({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, path)
    return path.name


@pytest.mark.parametrize("kind", ["npz", "npy", "h5", ZARR, "pt"])
def test_all_formats_hold_the_same_data(tmp_path, kind):
    x, y = classification()
    data = Arrays(root=tmp_path, train=save(tmp_path, kind, x, y))
    assert data.task.kind == "classification"
    assert (data.task.input_shape, data.task.output_shape) == ((2, 6, 5), (3,))
    assert sizes(data) == [29, 3, 8]
    stored = {bytes(image): int(label) for image, label in zip(x, y, strict=True)}
    for part in ("train", "val", "test"):
        for image, label in zip(*getattr(data.parts, part), strict=True):
            assert stored.pop(bytes(image.numpy())) == label
    assert not stored
    inputs, _ = everything(data, "train")
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.float64])
def test_input_dtypes(tmp_path, dtype):
    x, y = classification(dtype=dtype)
    if dtype is np.bool_:
        x[:, :, ::2] = False
    data = Arrays(root=tmp_path, train=save(tmp_path, "npz", x, y))
    inputs, _ = everything(data, "train")
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)


def test_dense_regression_with_a_separate_test_file(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.random((20, 6, 6)) < 0.5, random.random((20, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "both.npz", x=x, y=y, x_test=x[:7], y_test=2 * y[:7])
    data = Arrays(root=tmp_path, train="both.npz", test="both.npz", test_x="x_test", test_y="y_test", normalise="pixel")
    assert (data.task.kind, data.task.input_shape, data.task.output_shape) == ("dense", (1, 6, 6), (1, 6, 6))
    assert sizes(data) == [18, 2, 7]
    _, u = everything(data, "train")
    assert torch.equal(u, data.parts.train[1]) and u.dtype == torch.float32
    encoded = data.task.normaliser.encode(u)
    torch.testing.assert_close(encoded.std(0), torch.ones(1, 6, 6), atol=1e-3, rtol=0)
    assert data.task.metric(encoded, u).max() < 1e-5


def test_channels_last(tmp_path):
    x, y = classification(dtype=np.uint8)
    name = save(tmp_path, "npz", np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y)
    last, first = Arrays(root=tmp_path, train=name, channels="last"), Arrays(root=tmp_path, train="first.npz")
    np.savez(tmp_path / "first.npz", x=x, y=y)
    assert torch.equal(last.parts.train[0], first.parts.train[0]) and last.task.input_shape == (2, 6, 5)


def test_labels_for_images_without_any(tmp_path):
    dark, bright = np.zeros((20, 3, 32, 32), np.uint8), np.full((12, 3, 32, 32), 200, np.uint8)
    x = np.concatenate([dark, bright]) + np.random.default_rng(0).integers(0, 20, (32, 3, 32, 32), dtype=np.uint8)
    labels = pseudo_labels(torch.from_numpy(x), 2, seed=0)
    assert sorted(torch.bincount(labels).tolist()) == [12, 20] and len(set(labels[:20].tolist())) == 1
    np.savez(tmp_path / "photos.npz", x=x)
    clustered = Arrays(root=tmp_path, train="photos.npz", labels="kmeans", clusters=2)
    assert clustered.task.output_shape == (2,)
    assert Arrays(root=tmp_path, train="photos.npz", labels="index").task.output_shape == (32,)
    with pytest.raises(ValueError, match="clusters"):
        _ = Arrays(root=tmp_path, train="photos.npz", labels="kmeans", clusters=50).task


def broken(**changes):
    x, y = classification()
    arrays = {"x": x, "y": y, **changes}
    return {name: value for name, value in arrays.items() if value is not None}


X, Y = classification()
NAN = X.copy()
NAN[3, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": NAN}, "NaN or infinite values in 1 sample.*number 3"),
        ({"x": X[:, 0, 0, 0]}, "shape"),
        ({"x": X.astype(complex)}, "dtype complex"),
        ({"x": np.array([["text"]])}, "dtype"),
        ({"x": np.ones((40, 40, 40, 3), np.float32)}, "channels='first'"),
        ({"y": Y[:-1]}, "one for every input"),
        ({"y": Y - 1}, "smallest is -1"),
        ({"y": 0 * Y}, "at least 2 classes"),
        ({"x": X[:3], "y": Y[:3]}, "at least 4"),
        ({"y": np.where(np.arange(40)[:, None, None] == 5, np.inf, np.ones((40, 6, 5)))}, "number 5"),
        ({"x": np.array([{}] * 40)}, "cannot read"),
    ],
)
def test_bad_arrays_are_one_clear_error(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **broken(**arrays))
    with pytest.raises(ValueError, match=message):
        _ = Arrays(root=tmp_path, train="bad.npz").task


def test_bad_files_are_one_clear_error(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, z=Y)
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    for name in ("damaged.h5", "damaged.pt", "table.csv"):
        (tmp_path / name).write_text("hello")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(FileNotFoundError, match=r"paths\.data"):
        _ = Arrays(root=tmp_path, train="missing.npz").task
    with pytest.raises(KeyError, match="'x', 'z'"):
        _ = Arrays(root=tmp_path, train="a.npz").task
    for name in ("damaged.npz", "damaged.h5", "damaged.pt"):
        with pytest.raises(ValueError, match="cannot read"):
            _ = Arrays(root=tmp_path, train=name).task
    with pytest.raises(ValueError, match="dictionary of tensors"):
        _ = Arrays(root=tmp_path, train="list.pt").task
    with pytest.raises(ValueError, match="unknown format"):
        _ = Arrays(root=tmp_path, train="table.csv").task
    for files in ("x.npy", ["x.npy"], ["x.npy", "a.npz"]):
        with pytest.raises(ValueError, match="expected x and y"):
            _ = Arrays(root=tmp_path, train=files).task


def test_a_hostile_pt_file_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="cannot read"):
        _ = Arrays(root=tmp_path, train="hostile.pt").task
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "options", [{"labels": "guess"}, {"channels": "middle"}, {"normalise": "all"}, {"labels": "index", "test": "b.npz"}]
)
def test_bad_array_options(tmp_path, options):
    with pytest.raises(ValueError, match=r"labels|channels|normalise"):
        Arrays(root=tmp_path, train="a.npz", **options)


def test_what_netcdf_says_of_its_numbers_is_not_passed_over(tmp_path):
    x, y = classification()
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = (100 * x).astype(np.int16), y
        file["x"].attrs["_FillValue"] = (100 * x).astype(np.int16).max()
    for options in ({}, {"in_memory": False}):
        with pytest.raises(ValueError, match=r"takes for missing ones: set data\.fill="):
            Arrays(root=tmp_path, train="data.h5", **options).setup()
    Arrays(root=tmp_path, train="data.h5", fill="none").setup()
    Arrays(root=tmp_path, train="data.h5", fill=float((100 * x).astype(np.int16).max())).setup()
    with h5py.File(tmp_path / "data.h5", "a") as file:
        file["x"].attrs["scale_factor"] = 0.01
    with pytest.raises(ValueError, match=r"packed by its attributes.*scale_factor"):
        Arrays(root=tmp_path, train="data.h5", fill="none").setup()


@ZARR.marks[0]
def test_what_xarray_writes_of_the_numbers_in_zarr_is_not_passed_over(tmp_path):
    """Format 2 has `_FillValue` as the array's own fill value, where its dimensions are named; 3 as an attribute."""
    x, y = classification()
    low = float(x.min())
    encoded = base64.standard_b64encode(struct.pack("<d", low)).decode()
    written = {
        "v2": (2, {"_ARRAY_DIMENSIONS": ["n", "c", "h", "w"]}, low),
        "v3": (3, {"_FillValue": encoded}, 0.0),
        "plain": (2, {}, low),  # what is not stored, nothing else
    }
    for name, (version, attributes, fill_value) in written.items():
        write_zarr(tmp_path / f"{name}.zarr", version, fill_value, x=x, y=y)
        write_zarr(tmp_path / f"{name}.zarr", attributes=attributes)
        for here in (True, False):
            if name != "plain":
                with pytest.raises(ValueError, match=r"attribute _FillValue takes for missing ones: set data\.fill="):
                    Arrays(root=tmp_path, train=f"{name}.zarr", in_memory=here).setup()
            for fill in ("none", low):
                Arrays(root=tmp_path, train=f"{name}.zarr", in_memory=here, fill=fill).setup()
        write_zarr(tmp_path / f"{name}.zarr", attributes={"scale_factor": 0.01})
        with pytest.raises(ValueError, match=r"packed by its attributes.*scale_factor"):
            Arrays(root=tmp_path, train=f"{name}.zarr", fill="none").setup()


def test_zarr_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(ModuleNotFoundError, match=r'mine\.zarr needs .* zarr .*: pip install "orca_rank\[zarr\]"'):
        Arrays(root=tmp_path, train="mine.zarr").setup()
