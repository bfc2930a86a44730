"""Arrays that stay on disk: the numbers of those in memory, read by rows, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from shared import TINY_FINETUNE, ZARR, write_zarr

from orca_rank import normaliser
from orca_rank.artifacts import provenance
from orca_rank.artifacts.provenance import contents_hash
from orca_rank.data import stored
from orca_rank.data.arrays import Arrays
from orca_rank.data.stored import NpyRows, Stored
from orca_rank.normaliser import Normaliser
from orca_rank.stages import align, finetune

RANDOM = np.random.default_rng(0)
FIELDS = RANDOM.normal(300, 40, (60, 6, 5)).astype(np.float64)


def write(folder: Path, kind: str, x: np.ndarray, y: np.ndarray) -> Any:
    """What data.train is set to."""
    if kind == "npy":
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", y)
        return ["x.npy", "y.npy"]
    if kind == "zarr":
        write_zarr(folder / "mine.zarr", x=x, y=y)
        return "mine.zarr"
    with h5py.File(folder / "mine.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(7, *x.shape[1:]))
        file["y"] = y
    return "mine.h5"


CASES = {
    "fields": (RANDOM.integers(0, 255, (60, 6, 5, 3), np.uint8), FIELDS, {"channels": "last"}),
    "pixel": (FIELDS.astype(np.float32)[:, None], FIELDS[:, ::-1].astype(np.float32), {"normalise": "pixel"}),
    "classes": (RANDOM.normal(0, 1e-12, (60, 3, 6, 5)), np.arange(60) % 3, {"channels": "first"}),
    "int16": (RANDOM.integers(-300, 300, (60, 6, 5), np.int16), FIELDS, {}),
    "series": (RANDOM.random((60, 40)), np.arange(60) % 2, {"train_limit": 30, "test_limit": 5}),
    "masks": (RANDOM.random((60, 6, 5)), RANDOM.integers(0, 3, (60, 6, 5), np.uint8), {"task": "segmentation"}),
    "filled": (np.where(RANDOM.random((60, 6, 5)) < 0.1, -9999, FIELDS), FIELDS, {"fill": -9999}),
}


@pytest.mark.parametrize("kind", ["npy", "h5", ZARR])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_by_rows_is_what_memory_would_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, kind: str
) -> None:
    """The same samples in the same order, to the rounding of statistics; a pass takes many parts, the file has runs."""
    monkeypatch.setattr(stored, "CHUNK", 300)
    monkeypatch.setattr(normaliser, "_CHUNK", 300)
    x, y, options = CASES[case]
    files = write(tmp_path, kind, x, y)
    whole, by_rows = (
        Arrays(root=tmp_path, train=files, in_memory=here, batch_size=7, **options) for here in (True, False)
    )
    assert type(by_rows.parts.train[0]) is Stored and type(whole.parts.train[0]) is torch.Tensor
    assert (type(by_rows.parts.train[1]) is Stored) == (whole.task.kind == "dense")
    mine, other = whole.task.to_dict(), by_rows.task.to_dict()
    assert other.pop("typical_norm", 0) == pytest.approx(mine.pop("typical_norm", 0), rel=1e-6)
    assert mine == other
    for part in ("train", "val", "test", "all"):
        for (a, b), (c, d) in zip(whole.loader(part, shuffle=True), by_rows.loader(part, shuffle=True), strict=True):
            torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(d.to(b), b, rtol=1e-6, atol=0, equal_nan=True)
    for one, two in ((whole.parts.inputs, by_rows.parts.inputs), (whole.task.normaliser, by_rows.task.normaliser)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(two.mean.double(), one.mean.double(), rtol=1e-6, atol=1e-18)
            torch.testing.assert_close(two.std.double(), one.std.double(), rtol=1e-6, atol=1e-18)


def test_every_row_is_read_once_for_the_statistics_and_only_its_own_for_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "SAMPLE", 4 * 6 * 5 * 8)
    monkeypatch.setattr(stored, "GAP", 1)
    monkeypatch.setattr(normaliser, "_CHUNK", 5 * 30)
    files = write(tmp_path, "npy", FIELDS, FIELDS)
    read: list[int] = []
    take = NpyRows.read
    monkeypatch.setattr(NpyRows, "read", lambda self, a, b: (read.extend(range(a, b)), take(self, a, b))[1])
    data = Arrays(root=tmp_path, train=files, in_memory=False, batch_size=4)
    train = len(data.parts.train[0])
    # x: a sample, the first rows and one pass over the training part; y: the same, and norms of val and test.
    assert len(read) == (4 + 5 + train) + (4 + 5 + 60)
    read.clear()
    next(iter(data.loader("val")))
    assert len(read) == 2 * 4


def test_what_a_pass_has_found_is_not_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file was written, an option is another, or what was kept is of no use."""
    monkeypatch.setattr(stored, "SAMPLE", 4 * 6 * 5 * 8)
    files = write(tmp_path, "npy", FIELDS, FIELDS)
    read: list[int] = []
    take = NpyRows.read
    monkeypatch.setattr(NpyRows, "read", lambda self, a, b: (read.extend(range(a, b)), take(self, a, b))[1])

    def rows_read(**options: Any) -> tuple[int, Arrays]:
        read.clear()
        data = Arrays(root=tmp_path, train=files, in_memory=False, cache=tmp_path / "cache", **options)
        data.setup()
        return len(read), data

    every, first = rows_read()
    sample, again = rows_read()
    assert every > len(FIELDS) and sample <= 2 * 4 + 2 * stored.GAP
    assert again.task.to_dict() == first.task.to_dict() and again.notes == first.notes
    for mine, other in ((again.parts.inputs, first.parts.inputs), (again.task.normaliser, first.task.normaliser)):
        assert mine is not None and other is not None
        assert torch.equal(mine.mean, other.mean) and torch.equal(mine.std, other.std)
        assert mine.mean.dtype == other.mean.dtype
    for options in ({"normalise": "pixel"}, {"split_seed": 1}, {"train_limit": 20}):
        assert rows_read(**options)[0] > 20 and rows_read(**options)[0] == sample
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(kept.read_bytes()[:-8])
    assert rows_read(train_limit=20)[0] > 20
    write(tmp_path, "npy", FIELDS + 1.0, FIELDS)
    os.utime(tmp_path / "x.npy", ns=(1, 1))
    changed, anew = rows_read()
    assert changed == every
    torch.testing.assert_close(anew.parts.inputs.mean, first.parts.inputs.mean + 1.0)


def test_the_rest_of_a_tensor_on_disk_is_refused_in_one_sentence(tmp_path: Path) -> None:
    files = write(tmp_path, "npy", FIELDS, FIELDS)
    x = Arrays(root=tmp_path, train=files, in_memory=False).parts.train[0]
    assert "x.npy" in repr(x)
    with pytest.raises(ValueError, match=r"stays on disk, read by rows: set data.in_memory=true"):
        x + 1
    np.savez(tmp_path / "both.npz", x=FIELDS, y=FIELDS)
    with pytest.raises(ValueError, match=r"both.npz cannot be read by rows, .* save x and y as npy, h5 or zarr"):
        Arrays(root=tmp_path, train="both.npz", in_memory=False).setup()
    damaged = FIELDS.copy()
    damaged[37, 2, 2] = np.nan
    files = write(tmp_path, "npy", damaged, FIELDS)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 sample\(s\), the first is number 37"):
        Arrays(root=tmp_path, train=files, in_memory=False).setup()
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(ValueError, match=r"x.npy .*shorter than its header says"):
        Arrays(root=tmp_path, train=files, in_memory=False).setup()


def test_statistics_of_one_pass_keep_their_digits_far_from_0_and_where_the_first_rows_are_alike(tmp_path: Path) -> None:
    x = RANDOM.normal(1e6, 1e-3, (4000, 1, 2, 3))
    x[:300] = 1e6
    np.save(tmp_path / "x.npy", x)
    rows = NpyRows(tmp_path / "x.npy", x.shape, x.dtype, os.path.getsize(tmp_path / "x.npy") - x.nbytes)
    tensor = Stored(rows, lambda part, _: torch.from_numpy(part), x.shape, torch.float64)
    for per, axes in (("channel", (0, 2, 3)), ("pixel", (0,))):
        fitted = Normaliser.fit(tensor, per)
        np.testing.assert_allclose(fitted.mean.squeeze(), x.mean(axes).squeeze(), rtol=1e-14)
        np.testing.assert_allclose(fitted.std.squeeze(), x.std(axes, ddof=per == "pixel").squeeze(), rtol=1e-7)
    same = Stored(rows, lambda part, _: torch.zeros(len(part), 1, 2, 3) + 0.1, x.shape, torch.float32)
    assert float(Normaliser.fit(same, "pixel").std.max()) == 0


def test_a_large_file_is_known_by_its_size_and_blocks_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(bytes(5000))
    exact = contents_hash([path], sampled=True)
    assert exact == contents_hash([path])
    monkeypatch.setattr(provenance, "LARGE", 4000)
    monkeypatch.setattr(provenance, "BLOCK", 10)
    monkeypatch.setattr(provenance, "BLOCKS", 5)
    provenance._hash_as_of.cache_clear()
    first = contents_hash([path], sampled=True)
    assert first != exact == contents_hash([path])
    for place, differs in ((4995, True), (0, True), (2500, True), (100, False)):
        content = bytearray(5000)
        content[place] = 1
        path.write_bytes(content)
        provenance._hash_as_of.cache_clear()
        assert (contents_hash([path], sampled=True) != first) == differs
    provenance._hash_as_of.cache_clear()


@ZARR.marks[0]
def test_a_folder_of_zarr_is_known_by_what_is_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "zarr", FIELDS, FIELDS)
    chunks = sorted(path for path in (tmp_path / "mine.zarr").rglob("c/*/*/*"))
    data = Arrays(root=tmp_path, train="mine.zarr")
    before = data.contents
    shutil.copytree(tmp_path / "mine.zarr", tmp_path / "other" / "copy.zarr")
    assert Arrays(root=tmp_path / "other", train="copy.zarr").contents == before
    monkeypatch.setattr(provenance, "BLOCK", 10)
    monkeypatch.setattr(provenance, "BLOCKS", 5000)
    for large in (provenance.LARGE, 100):
        monkeypatch.setattr(provenance, "LARGE", large)
        provenance._hash_as_of.cache_clear()
        before = data.contents
        old = chunks[-1].read_bytes()
        chunks[-1].write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        assert data.contents != before
        chunks[-1].write_bytes(old)
        assert data.contents == before
        chunks[0].rename(tmp_path / "kept")
        assert data.contents != before
        (tmp_path / "kept").rename(chunks[0])
    provenance._hash_as_of.cache_clear()
    folder = tmp_path / "photos"
    folder.mkdir()
    assert contents_hash([folder]) == contents_hash([tmp_path / "nothing"])  # not looked through


def test_stages_work_on_arrays_that_stay_on_disk(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    """align and finetune give what they give in memory, to the rounding of the statistics."""
    files = write(tmp_path, "npy", *CASES["fields"][:2])
    found = []
    for here in ("true", "false"):
        config = composed(
            *TINY_FINETUNE, "predictor=orca", "data=arrays", f"data.root={tmp_path}", f"data.train=[{','.join(files)}]",
            "data.channels=last", f"data.in_memory={here}", f"run=r_{here}", "source=digits", "source.train_limit=40",
            "align=l2", "align.epochs=1", "align.held_out.resamples=0", "align.clusters=2", "rank=uniform", "rank.r=1",
        )  # fmt: skip
        for stage in (align, finetune):
            stage.run(config)
        (metrics,) = (Path(config.paths.runs) / config.run / "finetune").glob("*/metrics.json")
        distances = json.loads((Path(config.paths.runs) / config.run / "align" / "metrics.json").read_text())[
            "distances"
        ]
        found.append([json.loads(metrics.read_text())["test/relative_l2"], distances["sliced"]["after"]["value"]])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


PEAK = """
import json, resource, sys
import torch
from orca_rank.data.arrays import Arrays

torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = Arrays(root=sys.argv[1], train=json.loads(sys.argv[2]), channels="first", batch_size=32)
x, y = next(iter(data.train_dataloader()))
assert x.shape == (32, 3, 64, 64) and y.shape == (32, 1, 64, 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "h5"])
def test_four_gigabytes_train_in_a_quarter_of_one(tmp_path: Path, kind: str) -> None:
    """Inputs of 3 GiB and fields of 1 in sparse files: reading, statistics and a batch."""
    n = 2**16 + 1
    some = RANDOM.random((256, 3, 64, 64), np.float32)
    if kind == "npy":
        x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (n, 3, 64, 64))
        y = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (n, 64, 64))
        x[:256], y[:256] = some, some[:, 0]
        del x, y
    else:
        with h5py.File(tmp_path / "mine.h5", "w") as file:
            file.create_dataset("x", (n, 3, 64, 64), np.float32, chunks=(32, 3, 64, 64))[:256] = some
            file.create_dataset("y", (n, 64, 64), np.float32, chunks=(32, 64, 64))[:256] = some[:, 0]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PEAK, str(tmp_path), '["x.npy", "y.npy"]' if kind == "npy" else '"mine.h5"']
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 256 * 1024  # KiB
