"""Darcy data on disk and the Darcy DataModule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from orca_rank.data import darcy_data
from orca_rank.data.darcy import Darcy, classical_baseline, coarse_solve, generate, read_mat, sample_coefficient, solve

SMALL = {"grid": 29, "stride": 4}  # 8 points


def test_samples_are_the_subsampled_solutions(tmp_path):
    for mode, positions in (("fno", "centres"), ("clean", "nodes")):
        data = generate(3, folder=tmp_path, mode=mode, seed=5, **SMALL)
        a = sample_coefficient(3, 29, seed=5, positions=positions)
        np.testing.assert_array_equal(data.coefficient, a[:, ::4, ::4])
        np.testing.assert_allclose(data.solution, solve(a, mode)[:, ::4, ::4], rtol=0, atol=1e-7)
        assert data.solution.dtype == np.float32 and data.solution.shape == (3, 8, 8)
        assert data.metadata["mode"] == mode and data.metadata["fallbacks"] == 0


def test_the_cache_is_read_back_and_distinguishes_parameters(tmp_path, monkeypatch):
    first = generate(3, folder=tmp_path, **SMALL)
    other = generate(3, folder=tmp_path, stream=1, **SMALL)
    assert not np.array_equal(first.coefficient, other.coefficient)
    monkeypatch.setattr(darcy_data, "solve_all", lambda *_: pytest.fail("solved again"))
    again = generate(3, folder=tmp_path, **SMALL)
    np.testing.assert_array_equal(again.solution, first.solution)
    assert again.metadata == first.metadata
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_processes_change_nothing(tmp_path):
    one = generate(33, folder=tmp_path / "one", workers=1, grid=16, stride=1)
    two = generate(33, folder=tmp_path / "two", workers=2, grid=16, stride=1)
    fewer = generate(5, folder=tmp_path / "one", grid=16, stride=1)
    assert two.metadata["workers"] == 2
    np.testing.assert_array_equal(one.coefficient, two.coefficient)
    np.testing.assert_array_equal(one.solution, two.solution)
    np.testing.assert_array_equal(one.solution[:5], fewer.solution)


def test_a_failure_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(stream, **arrays):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(darcy_data.np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(2, folder=tmp_path, **SMALL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_call_is_gone_on_with(tmp_path, monkeypatch):
    whole = generate(40, folder=tmp_path / "whole", workers=1, **SMALL)
    made = []

    def stopping(first, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(first)
        return sample_pairs(first, *rest)

    sample_pairs = darcy_data.sample_pairs
    monkeypatch.setattr(darcy_data, "sample_pairs", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate(40, folder=tmp_path / "cut", workers=1, **SMALL)
    next((tmp_path / "cut").glob("*.parts/16.npz")).write_bytes(b"damaged")
    made.clear()
    monkeypatch.setattr(darcy_data, "sample_pairs", lambda *given: made.append(given[0]) or sample_pairs(*given))
    again = generate(40, folder=tmp_path / "cut", workers=1, **SMALL)
    assert made == [16, 32]
    np.testing.assert_array_equal(again.solution, whole.solution)
    assert again.metadata["mean_iterations"] == whole.metadata["mean_iterations"]
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".npz"]


def test_a_device_solves_batches_and_one_that_is_not_there_is_an_error(tmp_path):
    here = generate(3, folder=tmp_path, **SMALL)
    there = generate(3, folder=tmp_path, device="cpu:0", **SMALL)
    assert len(list(tmp_path.iterdir())) == 2
    assert np.linalg.norm(here.solution - there.solution) < 1e-6 * np.linalg.norm(here.solution)
    with pytest.raises(ValueError, match=r"data\.device=nowhere.*expected cpu, or a GPU"):
        generate(3, folder=tmp_path, device="nowhere", **SMALL)


def test_a_damaged_cache_says_so(tmp_path):
    generate(2, folder=tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="delete the file"):
        generate(2, folder=tmp_path, **SMALL)


@pytest.mark.slow
def test_a_script_without_a_main_guard_makes_data_and_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('begin')\n"
        "from orca_rank.data.darcy import generate\n"
        "data = generate(33, folder='made', workers=2, grid=16, stride=1)\n"
        "import sys\n"
        "assert sys.modules['__main__'].data is data\n"
        "print(data.metadata['workers'], data.solution.shape)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(darcy_data.__file__).parents[2])}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begin", "2 (33, 16, 16)"]


@pytest.mark.parametrize("options", [{"grid": 3}, {"stride": 0}, {"mode": "fem"}, {"workers": 0}, {"n": 0}])
def test_bad_generator_options(tmp_path, options):
    arguments = {"n": 1, "folder": tmp_path, **SMALL, **options}
    with pytest.raises(ValueError, match="received"):
        generate(**arguments)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- official files


def write_v5(path, a, u):
    scipy.io.savemat(path, {"coeff": a, "sol": u})


def write_v73(path, a, u):
    with h5py.File(path, "w") as file:  # MATLAB's axes, reversed
        file["coeff"], file["sol"] = a.transpose(2, 1, 0), u.transpose(2, 1, 0)


@pytest.mark.parametrize("write", [write_v5, write_v73])
def test_both_versions_of_mat_files(tmp_path, write):
    a = np.random.default_rng(0).random((6, 13, 13)) + 1
    write(tmp_path / "a.mat", a, 2 * a)
    data = read_mat(tmp_path / "a.mat", stride=3, limit=4)
    np.testing.assert_allclose(data.coefficient, a[:4, ::3, ::3], rtol=1e-6)
    np.testing.assert_allclose(data.solution, 2 * a[:4, ::3, ::3], rtol=1e-6)
    with pytest.raises(ValueError, match="holds 6 samples, 7 were asked for"):
        read_mat(tmp_path / "a.mat", limit=7)
    a[2, 0, 0] = np.nan
    write(tmp_path / "a.mat", a, a)
    with pytest.raises(ValueError, match="NaN"):
        read_mat(tmp_path / "a.mat")
    write(tmp_path / "a.mat", a, a[:, :5])
    with pytest.raises(ValueError, match="one shape"):
        read_mat(tmp_path / "a.mat")


@pytest.mark.parametrize("smooth", [True, False])
def test_as_many_samples_as_points(tmp_path, smooth):
    """Who wrote an HDF5 file tells then whose order of axes it has: MATLAB marks its own; smooth fields tell too."""
    a = np.random.default_rng(0).random((9, 9, 9)) + 1
    if smooth:
        a = sample_coefficient(9, 9, seed=0, dtype=np.float64)
    u = solve(a) if smooth else 2 * a
    with h5py.File(tmp_path / "python.mat", "w") as file:
        file["coeff"], file["sol"] = a, u
    write_v73(tmp_path / "matlab.mat", a, u)
    with h5py.File(tmp_path / "matlab.mat", "a") as file:
        for name in ("coeff", "sol"):
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    write_v5(tmp_path / "five.mat", a, u)
    names = ["python.mat", "matlab.mat", "five.mat"]
    if smooth:
        write_v73(tmp_path / "unmarked.mat", a, u)
        names.append("unmarked.mat")
    for name in names:
        data = read_mat(tmp_path / name, stride=2, limit=5)
        np.testing.assert_allclose(data.coefficient, a[:5, ::2, ::2], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(data.solution, u[:5, ::2, ::2], rtol=1e-5, err_msg=name)


def test_the_outline_is_that_of_the_file(tmp_path):
    a = np.random.default_rng(0).random((6, 13, 13)) + 1
    options = {"cache": tmp_path, "root": tmp_path, "source": "mat", "train": 4, "test": 2, "stride": 3}
    names = ("one.mat", "two.mat")
    assert Darcy(**options, files=names).outline.input_shape == (3, 141, 141)  # as the options say: no file yet
    for write in (write_v5, write_v73):
        for name in names:
            write(tmp_path / name, a, 1e-13 * a)
        data = Darcy(**options, files=names)
        assert data.outline.input_shape == data.task.input_shape == (3, 5, 5)
        assert data.task.typical_norm == pytest.approx(1e-13 * 1.5 * 5, rel=0.1)
        assert data.task.metric(data.task.normaliser.encode(data.parts.test[1]), data.parts.test[1]).max() < 1e-5


def test_files_that_are_no_mat_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"paths\.data"):
        read_mat(tmp_path / "missing.mat")
    (tmp_path / "text.mat").write_text("hello " * 50)
    with pytest.raises(ValueError, match="MATLAB"):
        read_mat(tmp_path / "text.mat")
    scipy.io.savemat(tmp_path / "other.mat", {"z": np.ones(3)})
    with pytest.raises(ValueError, match="coeff"):
        read_mat(tmp_path / "other.mat")
    with h5py.File(tmp_path / "other73.mat", "w") as file:
        file["z"] = np.ones(3)
    with pytest.raises(ValueError, match="coeff"):
        read_mat(tmp_path / "other73.mat")


def test_module_on_mat_files(tmp_path):
    for part, seed in (("smooth1", 0), ("smooth2", 1)):
        a = sample_coefficient(8, 13, seed=seed, dtype=np.float64)
        write_v5(tmp_path / f"piececonst_r421_N1024_{part}.mat", a, solve(a))
    data = Darcy(cache=tmp_path, root=tmp_path, source="mat", train=6, test=4, stride=3, grid=13)
    assert data.task.input_shape == (3, 5, 5)
    np.testing.assert_array_equal(data.parts.test[0][:, 0].numpy(), sample_coefficient(4, 13, seed=1)[:, ::3, ::3])


# ---------------------------------------------------------------- module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Darcy:
    return Darcy(cache=tmp_path_factory.mktemp("cache"), train=40, test=8, **SMALL)


def test_outline_needs_no_data(tmp_path):
    outline = Darcy(cache=tmp_path).outline
    assert (outline.input_shape, outline.output_shape) == ((3, 85, 85), (1, 85, 85))
    assert list(tmp_path.iterdir()) == []


def test_validation_is_a_split_of_train_and_never_test(data):
    everything = data.arrays("train").coefficient
    parts = data.parts
    train, val, test = (set(map(bytes, part[0].numpy())) for part in (parts.train, parts.val, parts.test))
    assert (len(train), len(val), len(test)) == (36, 4, 8)
    assert train | val == set(map(bytes, everything)) and not train & val and not test & (train | val)


def test_channels_and_normalisers(data):
    assert (data.task.input_shape, data.task.output_shape) == (data.outline.input_shape, data.outline.output_shape)
    a, u = data.parts.train
    x, y = (torch.cat(batches) for batches in zip(*data.loader("train"), strict=True))
    assert x.dtype == y.dtype == torch.float32
    assert torch.equal(y, u)  # physical units
    std = a.std(0)
    torch.testing.assert_close(x[:, :1], torch.where(std > 0, (a - a.mean(0)) / std, 0.0), atol=1e-5, rtol=1e-5)
    line = torch.linspace(0, 1, 8)
    assert torch.equal(x[3, 1], line.expand(8, 8)) and torch.equal(x[3, 2], line[:, None].expand(8, 8))
    encoded = data.task.normaliser.encode(u)
    torch.testing.assert_close(encoded.mean(0), torch.zeros(1, 8, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.task.decode(encoded), u)
    assert data.task.metric(encoded, u).max() < 1e-5
    assert torch.allclose(data.task.metric(data.task.normaliser.encode(2 * u), u), torch.ones(len(u)))


def test_batches_repeat_exactly_and_are_shuffled(data):
    first, second = list(data.train_dataloader()), list(data.train_dataloader())
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(torch.cat([y for _, y in first]), data.parts.train[1])
    loader = data.train_dataloader()
    assert not torch.equal(next(iter(loader))[1], next(iter(loader))[1])  # another order each epoch


def test_limits(data):
    small = Darcy(cache=data.cache, train=40, test=8, train_limit=10, test_limit=3, **SMALL)
    assert [len(part[0]) for part in (small.parts.train, small.parts.val, small.parts.test)] == [9, 1, 3]
    assert torch.equal(small.parts.test[1], data.parts.test[1][:3])


@pytest.mark.parametrize("options", [{"source": "web"}, {"files": ("one.mat",)}, {"batch_size": 0}])
def test_bad_module_options(tmp_path, options):
    with pytest.raises(ValueError, match="received"):
        Darcy(cache=tmp_path, **options)


def test_classical_baseline_is_exact_on_the_full_grid_and_close_on_a_coarse_one(tmp_path):
    full = Darcy(cache=tmp_path, train=2, test=2, grid=21, stride=1, mode="clean")
    assert classical_baseline(full) < 1e-6
    published = Darcy(cache=tmp_path, train=2, test=2, grid=21, stride=1)
    assert classical_baseline(published, upsample=True) < 1e-6
    coarse = Darcy(cache=tmp_path, train=2, test=4, grid=121, stride=4)
    assert 1e-4 < classical_baseline(coarse) < 0.1
    with pytest.raises(ValueError, match="every 3-th"):
        coarse_solve(np.ones((1, 5, 5), np.float32), 20, 3)
