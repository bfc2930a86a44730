"""stage=predict on the data of the fine-tune and on new files: the statistics of training, every sample, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from shared import NO_ZARR, TINY_SWIN, write_zarr

from orca_rank import load
from orca_rank.__main__ import CONF
from orca_rank.artifacts.damaged import DamagedFile
from orca_rank.data.darcy import Darcy
from orca_rank.fitted import Fitted
from orca_rank.stages import finetune, predict
from orca_rank.stages.setup import changes, data_for

Arrays = dict[str, np.ndarray]


def images(count: int, seed: int) -> Arrays:
    """Labels 5, 6, 7; the mean brightness is the label's, in a unit of its own."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = 1e4 + 300 * y[:, None, None, None] + 100 * random.standard_normal((count, 3, 16, 16))
    return {"x": x.astype(np.float32), "y": y + 5}


def fields(count: int, seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    x = 1e-9 * random.standard_normal((count, 1, 16, 16)).astype(np.float32)
    return {"x": x, "y": 1e3 + 1e11 * x}


class Run:
    """A run folder with one fine-tune on train.npz, and new.npz of other samples, whose statistics are others."""

    def __init__(self, folder: Path, kind: Callable[[int, int], Arrays]) -> None:
        self.folder, self.made = folder, kind
        np.savez(folder / "train.npz", **kind(48, 0))
        self.new = {
            name: values[kind(18, 1)["y"] != 6] if kind is images else values for name, values in kind(18, 1).items()
        }
        np.savez(folder / "new.npz", **self.new)
        self.output = folder / "runs" / "default" / "predict"
        finetune.run(self.config())

    def config(self, *more: str) -> DictConfig:
        options = [
            f"paths.runs={self.folder / 'runs'}",
            f"paths.data={self.folder}",
            *(() if "data=image_folder" in more else ("data=arrays", "data.train=train.npz")),
            *TINY_SWIN,
            "predictor=linear" if self.made is images else "predictor=multiscale",
            "rank.r=1",
            "embedder.aligned=false",
            "finetune.epochs=1",
            "finetune.optimizer.lr=0.05",
            "trainer.enable_progress_bar=false",
            "trainer.accelerator=cpu",
            *more,
        ]
        with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
            return compose("config", options)

    def predict(self, *more: str) -> SimpleNamespace:
        """The one file that the command adds, and its record."""
        before = {path: path.read_bytes() for path in self.output.glob("*")}
        predict.run(self.config(*more))
        assert all(path.read_bytes() == content for path, content in before.items()), "a file was overwritten"
        (path,) = [path for path in set(self.output.glob("*.npz")) - set(before)]
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return SimpleNamespace(path=path, record=json.loads(path.with_suffix(".json").read_text()), **found)


@pytest.fixture(scope="module", params=[images, fields], ids=["images", "fields"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("predict"), request.param)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_new_data_are_predicted_whole_by_the_statistics_of_training(run: Run) -> None:
    first = run.predict()  # the test set of the fine-tune
    own = run.made(48, 0)
    fitted = load(run.output.parent)
    metric = fitted.task.metric_name
    assert first.path.name == "prediction.npz" and first.record["part"] == "test"
    assert first.metric.mean() == pytest.approx(fitted.metrics[f"test/{metric}"], rel=1e-4, abs=1e-6)

    found, bare = run.predict("data.train=new.npz"), run.predict("data.train=new.npz", "data.y=null")
    if not NO_ZARR:
        write_zarr(run.folder / "new.zarr", **run.new)
        by_rows = run.predict("data.train=new.zarr", "data.in_memory=false")
        assert np.array_equal(by_rows.prediction, found.prediction) and np.array_equal(by_rows.metric, found.metric)
    assert len(found.prediction) == found.record["samples"] == len(run.new["x"])
    assert np.array_equal(found.prediction, bare.prediction)
    assert not hasattr(bare, "target") and metric not in bare.record
    assert found.record[metric] == pytest.approx(found.metric.mean())
    np.save(run.folder / "x.npy", run.new["x"])
    assert np.array_equal(run.predict("data.train=[x.npy]").prediction, found.prediction)

    assert fitted.inputs is not None
    assert abs(float(fitted.inputs.mean.mean()) - own["x"].mean()) < 0.2 * own["x"].std()
    with torch.inference_mode():
        assert apart(fitted.predict(torch.from_numpy(run.new["x"])).numpy(), found.prediction) < 1e-5
        one = fitted.predict(torch.from_numpy(run.new["x"][:1])).numpy()  # alone or among others: the same
    assert apart(one, found.prediction[:1]) < 1e-4
    if run.made is images:
        assert set(found.label) <= {5, 6, 7}
        assert np.array_equal(found.metric, (found.label != run.new["y"]).astype(np.float32))
    else:
        error = np.linalg.norm((found.prediction - run.new["y"]).reshape(18, -1), axis=1)
        expected = error / np.linalg.norm(run.new["y"].reshape(18, -1), axis=1)
        assert apart(found.metric, expected) < 1e-3


def test_how_the_test_set_is_read_does_not_make_it_new() -> None:
    known = {"data": {"train": "a", "batch_size": 3, "seed": 0, "root": "x"}, "contents": {"data": "1"}}
    other = {"data": {"train": "a", "batch_size": 9, "seed": 4, "root": "y"}, "contents": {"data": "1"}}
    assert changes(known, other) == []
    assert changes(known, {**other, "contents": {"data": "2"}}) == ["contents: 1 -> 2"]
    assert changes(known, {**other, "data": {**other["data"], "split_seed": 1}}) != []


def test_a_new_test_file_is_predicted_and_not_the_training_file_again(run: Run) -> None:
    np.savez(run.folder / "two.npz", a=run.new["x"][:5], b=run.new["y"][:5])
    found = run.predict("data.test=two.npz", "+data.test_x=a", "+data.test_y=b")
    assert len(found.prediction) == 5
    assert apart(found.prediction, run.predict("data.train=new.npz", "data.seed=9").prediction[:5]) < 1e-4


def test_a_file_of_another_name_or_content_is_a_prediction_of_its_own(run: Run) -> None:
    np.savez(run.folder / "changed.npz", **run.made(7, 2))
    first = run.predict("data.train=changed.npz")
    np.savez(run.folder / "changed.npz", **run.made(9, 3))
    second = run.predict("data.train=changed.npz")
    assert first.path != second.path and len(second.prediction) == 9
    second.path.unlink()
    assert len(run.predict("data.train=changed.npz").prediction) == 9  # a record alone is not a prediction


def test_what_does_not_fit_is_refused_and_nothing_is_written(run: Run) -> None:
    before = sorted(run.output.glob("*"))
    if run.made is images:
        wrong = [
            ({**run.new, "x": run.new["x"][:, :2]}, "shape"),
            ({**run.new, "y": run.new["y"] + 1}, "classes that the training data lack: 8"),
            ({**run.new, "y": np.array([f"cat {i}" for i in run.new["y"]])}, "classes that the training data lack"),
            ({**run.new, "y": np.ones((12, 1, 16, 16), np.float32)}, "fine-tuned for classification"),
        ]
    else:
        wrong = [
            ({**run.new, "x": np.repeat(run.new["x"], 2, 1)}, "2 channels"),
            ({**run.new, "y": np.repeat(run.new["y"], 2, 1)}, "targets have shape"),
            ({**run.new, "y": np.arange(18) % 2}, "fine-tuned for dense"),
        ]
    for arrays, message in wrong:
        np.savez(run.folder / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            predict.run(run.config("data.train=wrong.npz"))
    assert sorted(run.output.glob("*")) == before


def test_another_unit_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.predict("data.train=new.npz", "data.split_seed=5")
    assert "another unit" not in capsys.readouterr().out
    np.savez(run.folder / "milli.npz", x=1000 * run.new["x"])
    run.predict("data.train=milli.npz", "data.y=null")
    assert "deviations of the training inputs from their mean: another unit" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("run", [images], indirect=True)
def test_images_of_a_folder_are_named_and_their_classes_are_the_models(run: Run) -> None:
    folder = run.folder / "photos"
    for name in ("b.png", "a.png"):
        (folder / "plain").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / "plain" / name)
    options = ("data=image_folder", "data.train=photos", "data.size=16")
    with pytest.raises(ValueError, match="not fine-tuned for"):
        predict.run(run.config(*options))
    for name in ("a.png", "b.png"):
        (folder / "plain" / name).rename(folder / name)
    (folder / "plain").rmdir()
    found = run.predict(*options)
    assert found.image.tolist() == ["a.png", "b.png"] and not hasattr(found, "target")


def test_new_inputs_are_normalised_as_the_model_was_trained_whatever_the_option(run: Run) -> None:
    expected = run.predict("data.train=new.npz", "data.in_memory=true")
    found = run.predict("data.train=new.npz", "data.normalise=none")
    assert np.array_equal(found.prediction, expected.prediction)
    fitted = load(run.output.parent)
    metrics = {**fitted.metrics, "config": {"data": {"normalise": "none"}}}
    with pytest.raises(ValueError, match=r"as they are: set data\.normalise=none"):
        data_for(run.config("data.train=new.npz").data, Fitted(fitted.model, fitted.task, metrics), "all")


def test_training_samples_among_what_is_predicted_are_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.predict("data.test_fraction=0.5")
    assert "its training samples among them" in " ".join(capsys.readouterr().out.split())
    run.predict("data.train=new.npz", "data.test_fraction=0.4")
    assert "its training samples among them" not in " ".join(capsys.readouterr().out.split())


def test_a_fine_tune_without_statistics_predicts_no_new_data(run: Run) -> None:
    fitted = load(run.output.parent)
    bare = Fitted(fitted.model, fitted.task, fitted.metrics)
    with pytest.raises(ValueError, match="kept no statistics"):
        data_for(run.config("data.train=new.npz").data, bare, "all")


def test_no_code_that_a_run_folder_names_is_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tuned,) = (run.folder / "runs" / "default" / "finetune").iterdir()
    folder = shutil.copytree(tuned, tmp_path / "tuned")
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text())
    hostile = {"_target_": "os.mkdir", "_args_": ["made"]}
    for target in (
        "os.mkdir",
        "orca_rank.predictors.linear.nn.Linear",
        "orca_rank.artifacts.unfinished._remove",
        3,
        "",
    ):
        for place, key in ((metrics["config"]["predictor"], "module"), (metrics, "adapter_module")):
            before = place[key]
            place[key] = {**hostile, "_target_": target}
            path.write_text(json.dumps(metrics))
            with pytest.raises(ValueError, match="could run any code"):
                load(folder)
            place[key] = {**before, "x": [hostile]}
            path.write_text(json.dumps(metrics))
            with pytest.raises(ValueError, match=r"names os\.mkdir, which is not part of"):
                load(folder)
            place[key] = before
    assert not (tmp_path / "made").exists()
    del metrics["config"]["embedder"]
    path.write_text(json.dumps(metrics))
    with pytest.raises(DamagedFile, match=r"metrics\.json.*force=true"):
        load(folder)


def test_darcys_new_samples_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    data = Darcy(cache=tmp_path, root=tmp_path, train=6, test=2, grid=29, stride=4)
    x, y = data.everything()
    train, test = data.arrays("train"), data.arrays("test")
    assert x.shape == y.shape == (8, 1, 8, 8)
    assert np.array_equal(y[:6, 0].numpy(), train.solution) and np.array_equal(x[6:, 0].numpy(), test.coefficient)
