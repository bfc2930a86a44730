"""Labels, layouts and splits of a user's own arrays: taken where they are unambiguous, refused where they are not."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from orca_rank.data.arrays import Arrays
from orca_rank.data.labels import class_labels
from orca_rank.data.splits import covered

N = 40
X = np.random.default_rng(0).random((N, 1, 6, 5))
CLASS = np.arange(N) % 4


def load(folder, x=X, y=CLASS, name="data.npz", **options) -> Arrays:
    np.savez(folder / name, x=x, y=y)
    return Arrays(root=folder, train=name, **options)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "y",
    [
        CLASS[:, None],
        CLASS.astype(np.float64),
        CLASS[:, None, None],
        CLASS.astype(np.uint8),
        np.eye(4)[CLASS],
        np.eye(4, dtype=np.bool_)[CLASS],
    ],
    ids=["column", "whole floats", "one each", "bytes", "one-hot", "one-hot booleans"],
)
def test_labels_that_mean_classes_from_0(tmp_path, y):
    expected, found = load(tmp_path).parts, load(tmp_path, y=y).parts
    assert torch.equal(found.train[1], expected.train[1]) and torch.equal(found.test[1], expected.test[1])
    assert found.task.output_shape == (4,) and found.task.classes is None and found.notes == ()


@pytest.mark.parametrize(
    ("y", "classes", "said"),
    [
        (CLASS + 1, (1, 2, 3, 4), "1 … 4"),
        (np.array([0, 3, 7, 255])[CLASS], (0, 3, 7, 255), "0, 3, 7, 255"),
        (np.array([0, 1, 2, 10**9])[CLASS], (0, 1, 2, 10**9), "1000000000"),
        (np.array(["dog", "ant", "cat", "bee"])[CLASS], ("ant", "bee", "cat", "dog"), "'ant', 'bee', 'cat', 'dog'"),
        (np.array([b"dog", b"ant", b"cat", b"bee"])[CLASS], ("ant", "bee", "cat", "dog"), "'ant'"),
        (np.array([-1, 1])[CLASS % 2], (-1, 1), "-1, 1"),
    ],
    ids=["1-based", "gapped", "huge", "strings", "bytes", "signs"],
)
def test_other_labels_are_mapped_and_it_is_said_how(tmp_path, caplog, y, classes, said):
    data = load(tmp_path, y=y)
    assert data.task.classes == classes and data.task.output_shape == (len(classes),)
    assert said in data.notes[0] and data.notes[0] in caplog.text
    stored = {
        bytes(image): str(label, "utf-8") if isinstance(label, bytes) else label
        for image, label in zip(X.astype(np.float32), y.tolist(), strict=True)
    }
    for images, labels in (data.parts.train, data.parts.val, data.parts.test):
        assert [classes[label] for label in labels.tolist()] == [stored[bytes(image.numpy())] for image in images]


def test_booleans_are_two_classes(tmp_path):
    assert load(tmp_path, y=CLASS > 1).task.output_shape == (2,)


def test_strings_in_hdf5(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = X, [("a", "b")[k % 2] for k in CLASS]
        file["g/x"], file["g/y"] = 2 * X, CLASS
    assert Arrays(root=tmp_path, train="data.h5").task.classes == ("a", "b")
    assert Arrays(root=tmp_path, train="data.h5", x="g/x", y="g/y").parts.train[0].max() > 1.5


ONE_POSITIVE = np.zeros(N, np.int64)
ONE_POSITIVE[7] = 1
HUGE = CLASS.copy()
HUGE[5] = 10**12


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.where(CLASS == 0, np.nan, CLASS), "number 0 is nan.*data.task=regression"),
        (np.eye(4, dtype=np.int64)[CLASS] * 3, "do not say what they are: set data.task=regression"),
        (np.array(["1", "2"] * 20)[:, None].repeat(2, 1), "dtype <U1"),
        (CLASS - 1, "smallest is -1.*without a label"),
        (ONE_POSITIVE, r"1 class\(es\) of fewer than 3 samples: 1 \(1\)"),
        (HUGE, r"fewer than 3 samples: 1000000000000 \(1\)"),
        (np.arange(N), r"40 class\(es\).*data.task=regression"),
        (np.full(N, 7), "all 7: expected at least 2"),
        (CLASS.astype(np.uint64) + 2**63, "below 2\\^63"),
    ],
)
def test_labels_that_are_ambiguous_or_cannot_be_learned(tmp_path, y, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, y=y).setup()


def test_the_test_set_has_the_classes_of_the_training_set(tmp_path):
    load(tmp_path, X, np.array([0, 1, 2, 9])[CLASS], "test.npz")
    with pytest.raises(ValueError, match="the training data lack: 9"):
        load(tmp_path, test="test.npz").setup()
    load(tmp_path, X, CLASS[::-1].copy() % 2 + 2, "test.npz")  # only classes 2 and 3 of four
    assert set(load(tmp_path, test="test.npz").parts.test[1].tolist()) == {2, 3}
    words = np.array(["a", "b", "c", "d"])
    load(tmp_path, X[:10], np.array(["d"] * 10), "test.npz")
    assert load(tmp_path, y=words[CLASS], test="test.npz").parts.test[1].tolist() == [3] * 10


def test_small_classes_stand_in_every_part(tmp_path):
    y = np.zeros(N, np.int64)
    y[:3], y[3:7] = 1, 2
    for seed in range(20):
        parts = load(tmp_path, y=y, split_seed=seed).parts
        assert [len(part[1]) for part in (parts.train, parts.val, parts.test)] == [29, 3, 8]
        for part in (parts.train, parts.val, parts.test):
            assert set(part[1].tolist()) == {0, 1, 2}
    train, val = np.array([0, 1, 2, 3]), np.array([4, 5])
    labels = np.array([0, 0, 1, 1, 0, 1])
    assert all(np.array_equal(a, b) for a, b in zip(covered(train, val, labels), (train, val), strict=True))
    labels = np.array([0, 0, 1, 1, 0, 0])
    moved = covered(train, val, labels)
    assert sorted(labels[moved[1]]) == [0, 1] and sorted(np.concatenate(moved)) == [0, 1, 2, 3, 4, 5]


def test_labels_by_the_names_of_a_fine_tuned_model():
    assert class_labels(np.array(["b", "b"]), "y", ["a", "b"]).y.tolist() == [1, 1]
    assert class_labels(np.array([5, 9]), "y", [9, 5]).y.tolist() == [1, 0]
    for y, classes in ((np.array(["z"]), ["a", "b"]), (np.array([3]), [0, 1])):
        with pytest.raises(ValueError, match="training data lack"):
            class_labels(y, "y", classes)
    with pytest.raises(ValueError, match="one-hot with 3 columns"):
        class_labels(np.eye(3), "y", [0, 1])


# ---------------------------------------------------------------- layouts


def shapes(folder, x, y, **options):
    task = load(folder, x, y, **options).task
    return task.input_shape, task.output_shape


def test_channels_of_inputs_and_fields(tmp_path):
    random = np.random.default_rng(0).random
    x, u = random((8, 12, 10, 3)), random((8, 12, 10, 1))
    last, first = (lambda a: a), (lambda a: np.moveaxis(a, 3, 1))
    expected = ((3, 12, 10), (1, 12, 10))
    assert shapes(tmp_path, last(x), last(u), channels="last") == expected
    assert shapes(tmp_path, first(x), first(u), channels="first") == expected
    assert shapes(tmp_path, first(x), last(u)) == shapes(tmp_path, first(x), first(u)) == expected  # by the grid
    assert shapes(tmp_path, last(x), first(u), channels="last", y_channels="first") == expected
    assert shapes(tmp_path, last(x), u[..., 0], channels="last") == expected
    assert shapes(tmp_path, x[..., 0], last(u), channels="last") == ((1, 12, 10), (1, 12, 10))
    assert shapes(tmp_path, x[..., 0], u[..., 0], channels="none") == ((1, 12, 10), (1, 12, 10))
    with pytest.raises(ValueError, match=r"not be on the inputs' grid.*data\.y_channels=first"):
        shapes(tmp_path, last(x), first(u), channels="last")
    with pytest.raises(ValueError, match=r"data\.channels=none expected \(n, H, W\)"):
        shapes(tmp_path, x, u, channels="none")
    values = load(tmp_path, last(x), last(u), channels="last").parts.train
    both = load(tmp_path, first(x), first(u)).parts.train
    assert torch.equal(values[0], both[0]) and torch.equal(values[1], both[1])


def test_a_shape_that_does_not_say_where_its_channels_are(tmp_path):
    x = np.random.default_rng(0).random((8, 100, 9, 9))
    y = np.arange(8) % 2
    with pytest.raises(ValueError, match=r"data\.channels=first or data\.channels=last"):
        shapes(tmp_path, x, y)
    assert shapes(tmp_path, x, y, channels="first") == ((100, 9, 9), (2,))
    assert shapes(tmp_path, x, y, channels="last") == ((9, 100, 9), (2,))
    with pytest.raises(ValueError, match=r"data\.y_channels=first or"):
        shapes(tmp_path, x[:, 0], np.random.default_rng(0).random((8, 100, 7, 7)))


# ---------------------------------------------------------------- new data for a fine-tuned model


def test_new_data_are_normalised_by_given_statistics(tmp_path):
    old = load(tmp_path)
    new = load(tmp_path, 3 * X + 5, name="new.npz", statistics=old.statistics)
    for part in ("train", "test"):
        x = getattr(new.parts, part)[0]
        assert torch.equal(new.parts.encode(x), old.parts.encode(x))
    assert torch.equal(new.statistics["mean"], old.statistics["mean"])
    assert not torch.equal(load(tmp_path, 3 * X + 5, name="new.npz").statistics["mean"], old.statistics["mean"])
    other = Arrays(
        root=tmp_path, train="new.npz", statistics={"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    )
    with pytest.raises(ValueError, match="other data than the model was fine-tuned on"):
        other.everything()


def test_all_of_a_file_in_its_order_with_or_without_targets(tmp_path):
    words = np.array(["d", "a", "b", "c"])
    old = load(tmp_path, y=words[CLASS])
    given = {"statistics": old.statistics, "classes": old.task.classes}
    new = Arrays(root=tmp_path, train="data.npz", batch_size=7, **given)
    x, y = (torch.cat(part) for part in zip(*new.loader("all"), strict=True))
    assert torch.equal(x, old.parts.encode(torch.from_numpy(X).float()))
    assert [old.task.classes[label] for label in y] == words[CLASS].tolist()
    np.savez(tmp_path / "bare.npz", x=X[:1])
    np.save(tmp_path / "bare.npy", X[:1])
    for name, options in (("bare.npz", {}), ("bare.npz", {"y": None}), ("bare.npy", {}), (["bare.npy"], {})):
        bare = Arrays(root=tmp_path, train=name, **given, **options)
        ((x, y),) = bare.loader("all")
        assert y is None and torch.equal(x, old.parts.encode(torch.from_numpy(X[:1]).float()))
    with pytest.raises(KeyError, match="'y'"):
        Arrays(root=tmp_path, train="bare.npz").setup()
    with pytest.raises(ValueError, match="only be measured and predicted"):
        Arrays(root=tmp_path, train="data.npz", y=None).setup()
    np.savez(tmp_path / "other.npz", x=X, y=np.array(["z"] * N))
    with pytest.raises(ValueError, match="lack: 'z'"):
        Arrays(root=tmp_path, train="other.npz", **given).everything()


def test_a_test_set_that_was_trained_on_is_refused_or_named(tmp_path):
    for options in ({"test": "data.npz"}, {"test": "data.npz", "test_x": "x"}):
        with pytest.raises(ValueError, match="is the training set itself"):
            load(tmp_path, **options)
    np.savez(tmp_path / "new.npz", x=np.concatenate([X[:3], X[:7] + 1]), y=CLASS[:10])
    assert (
        "3 of 10 test samples of new.npz are among the training or validation samples too"
        in load(tmp_path, test="new.npz").notes[-1]
    )
    np.savez(tmp_path / "new.npz", x=X + 1, y=CLASS)
    assert load(tmp_path, test="new.npz").notes == ()


def test_names_in_other_encodings_stay_apart(tmp_path):
    names = np.array(["café".encode("latin-1"), "cafè".encode("latin-1"), b"tea", b"milk"])
    assert set(load(tmp_path, y=names[CLASS]).task.classes) == {"café", "cafè", "tea", "milk"}
    assert set(load(tmp_path, y=np.char.encode(["ä", "ö", "ü", "ß"], "utf-8")[CLASS]).task.classes) == {*"äöüß"}
