"""Interrupted, moved, damaged and contested run folders of stage=finetune and stage=align."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_SWIN

from orca_rank.artifacts.files import atomic, write_tensors
from orca_rank.artifacts.lock import locked
from orca_rank.artifacts.provenance import plain
from orca_rank.artifacts.unfinished import Unfinished, tidy
from orca_rank.stages import align, finetune, measure, predict
from orca_rank.training.keep import save
from orca_rank.training.packed import SMALL, pack, unpack

Compose = Callable[..., DictConfig]
TINY = (
    "data=digits",
    "data.train_limit=48",
    "data.test_limit=32",
    "data.batch_size=16",
    "source=digits",
    "source.train_limit=48",
    *TINY_SWIN,
    "rank=uniform",
    "rank.r=2",
    "embedder.aligned=false",
    "finetune.tag=mine",
    "finetune.epochs=4",
    "align.epochs=2",
    "align.held_out.resamples=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)
ROOT = Path(__file__).parents[1]


def folder(config: DictConfig) -> Path:
    return Path(config.paths.runs) / config.run / "finetune" / "mine"


Results = tuple[dict[str, torch.Tensor], dict[str, object], str]


def results(config: DictConfig) -> Results:
    """What a fine-tune leaves, without what depends on the clock."""
    metrics = json.loads((folder(config) / "metrics.json").read_text())
    del metrics["seconds"]
    return load_file(folder(config) / "model.safetensors"), metrics, (folder(config) / "curve.csv").read_text()


def same(config: DictConfig, expected: Results) -> bool:
    (mine, *rest), (other, *others) = results(config), expected
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine) and rest == others


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, ...], Results]:
    return {}


@pytest.fixture
def uninterrupted(composed: Compose, seen: dict[tuple[str, ...], Results]) -> Callable[..., Results]:
    """What the fine-tune with these options leaves when nothing happens to it."""

    def run(*options: str) -> Results:
        if options not in seen:
            config = composed(*options, "run=whole")
            if config.embedder.aligned:
                align.run(config)
            finetune.run(config)
            seen[options] = results(config)
        return seen[options]

    return run


class PowerCut(Exception):
    pass


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """dies(config, epoch=2): the fine-tune dies in the first batch of an epoch; epoch=None: when it would write."""

    def run(config: DictConfig, epoch: int | None = None) -> None:
        step = finetune.FineTune.training_step

        def failing(self: finetune.FineTune, batch: object, index: int) -> torch.Tensor:
            if self.current_epoch == epoch:
                raise PowerCut
            return step(self, batch, index)

        def cut(*_: object) -> None:
            raise PowerCut

        with monkeypatch.context() as patch:
            patch.setattr(finetune.FineTune, "training_step", failing)
            if epoch is None:
                patch.setattr(finetune, "write_model", cut)
            with pytest.raises(PowerCut):
                finetune.run(config)

    return run


def test_a_finished_stage_leaves_nothing_to_go_on_with(composed: Compose) -> None:
    config = composed(*TINY, "finetune.epochs=1")
    finetune.run(config)
    left = {path.name for path in folder(config).iterdir()}
    assert left == {"metrics.json", "curve.csv", "ranks.json", "model.safetensors", "adapter", "log"}


def test_a_packed_checkpoint_unpacks_to_the_same_values_and_another_to_itself() -> None:
    bare = torch.arange(6.0).view(2, 3)
    nest = {
        "state_dict": OrderedDict(a=bare, half=bare.half().T, scalar=torch.tensor(3), none=torch.zeros(0, 2)),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.98)}]}],
        "large": torch.ones(SMALL + 1),
        "word": "packed",
    }
    packed = pack(nest)
    assert set(packed) == {*nest, "packed"} and packed["large"] is nest["large"]
    assert {dtype: len(values) for dtype, values in packed["packed"].items()} == {
        "torch.float32": 7, "torch.float16": 6, "torch.int64": 1
    }  # fmt: skip
    found = unpack(packed)
    assert list(found) == list(nest) and type(found["state_dict"]) is OrderedDict
    for name, value in nest["state_dict"].items():
        assert found["state_dict"][name].dtype == value.dtype and torch.equal(found["state_dict"][name], value)
    state = found["optimizer_states"][0]
    assert state["state"][0]["step"].shape == () and state["param_groups"] == [{"betas": (0.9, 0.98)}]
    assert unpack({"epoch": 3}) == {"epoch": 3}


def test_checkpoints_hold_tensors_and_plain_values_alone(composed: Compose, dies: Callable[..., None]) -> None:
    config = composed(*TINY)
    dies(config, 1)
    found = torch.load(folder(config) / "last.ckpt", weights_only=True)
    assert found["epoch"] == 0


@pytest.mark.parametrize("patience", [pytest.param("null", marks=pytest.mark.slow), "1"])
def test_killed_before_the_result_is_written_it_is_not_trained_on(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None], patience: str
) -> None:
    """With a learning rate of 1e-30 no epoch is better than the first: patience stops after the second."""
    options = (*TINY, f"finetune.patience={patience}", "finetune.optimizer.lr=1e-30")
    whole, broken = uninterrupted(*options), composed(*options, "run=broken")
    dies(broken)
    finetune.run(broken)
    assert whole[1]["epochs"] == (4 if patience == "null" else 2)
    assert same(broken, whole)


@pytest.mark.slow
def test_averaged_weights_are_gone_on_with(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None]
) -> None:
    options = (*TINY, "finetune.ema=0.9", "finetune.optimizer.lr=0.01")
    broken = composed(*options, "run=broken")
    dies(broken, 2)
    finetune.run(broken)
    assert same(broken, uninterrupted(*options))


def test_what_frozen_stages_give_is_the_same_after_an_interruption(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    frozen = ("embedder.train=false", "embedder.init=pretrained", "+backbone.options.drop_path_rate=0")
    options = (*TINY, *frozen, "layers.target='^layers.1.*(qkv|fc1)$'")
    broken = composed(*options, "run=broken")
    dies(broken, 2)
    finetune.run(broken)
    assert "1 of 2 stages are frozen" in capsys.readouterr().out
    assert same(broken, uninterrupted(*options))


@pytest.mark.parametrize("epoch", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_curriculum_is_gone_on_with(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None], epoch: int
) -> None:
    """While its gate learns, and when it rests: its weights and moments, the source's order and the noise."""
    options = (*TINY, "finetune/curriculum=pare", "finetune.curriculum.drawn=0.75", "finetune.curriculum.weight=1")
    broken = composed(*options, "run=broken")
    dies(broken, epoch)
    kept = torch.load(folder(broken) / "last.ckpt", weights_only=True)
    assert {"curriculum.parts.gate.weight", "curriculum.parts.head.bias"} <= set(kept["state_dict"])
    finetune.run(broken)
    assert same(broken, uninterrupted(*options))


@pytest.mark.slow
def test_a_moved_folder_goes_on_from_its_own_files(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None]
) -> None:
    """The best epoch is before the interruption: a rate that explodes makes every later one worse."""
    options = (*TINY, "finetune.optimizer.lr=3", "finetune.clip=1.0", "finetune.warmup=0")
    original, copy = (composed(*options, f"run={name}") for name in ("original", "copy"))
    dies(original, 3)
    shutil.copytree(folder(original).parents[1], folder(copy).parents[1])
    before = {path.name for path in folder(original).iterdir()}
    finetune.run(copy)
    assert same(copy, uninterrupted(*options))
    assert {path.name for path in folder(original).iterdir()} == before


@pytest.mark.parametrize(
    "damage", ["truncated", *(pytest.param(one, marks=pytest.mark.slow) for one in ("empty", "gone"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    composed: Compose,
    uninterrupted: Callable[..., Results],
    dies: Callable[..., None],
    damage: str,
    capsys: pytest.CaptureFixture,
) -> None:
    expected, broken = uninterrupted(*TINY), composed(*TINY, "run=broken")
    dies(broken, 3)
    last = folder(broken) / "last.ckpt"
    if damage == "gone":
        last.unlink()
    else:
        os.truncate(last, 0 if damage == "empty" else last.stat().st_size // 2)
    capsys.readouterr()
    finetune.run(broken)
    shown = "".join(capsys.readouterr().out.split())
    assert f"goingonfrom{folder(broken) / 'previous.ckpt'}" in shown
    assert (f"{last}isdamaged" in shown) == (damage != "gone")
    assert same(broken, expected)


def test_other_inputs_are_not_gone_on_with(
    composed: Compose, uninterrupted: Callable[..., Results], dies: Callable[..., None]
) -> None:
    """The embedder is aligned again between the interruption and the next start."""
    options = (*TINY, "embedder.aligned=true")
    broken = composed(*options, "run=broken")
    align.run(broken)
    embedder = folder(broken).parents[1] / "align" / "embedder.safetensors"
    kept = load_file(embedder)
    write_tensors(embedder, {name: 2 * value for name, value in kept.items()})
    dies(broken, 2)
    write_tensors(embedder, kept)
    finetune.run(broken)
    assert same(broken, uninterrupted(*options))


def test_a_result_of_other_inputs_is_made_anew(composed: Compose) -> None:
    options = (*TINY, "embedder.aligned=true", "finetune.epochs=1")
    config = composed(*options)
    align.run(config)
    finetune.run(config)
    first = results(config)
    embedder = folder(config).parents[1] / "align" / "embedder.safetensors"
    write_tensors(embedder, {name: 2 * value for name, value in load_file(embedder).items()})
    finetune.run(config)
    assert results(config)[1]["inputs"] != first[1]["inputs"]
    assert not torch.equal(results(config)[0]["embedder.proj.weight"], first[0]["embedder.proj.weight"])


@pytest.mark.slow
def test_force_starts_again_once_and_is_then_gone_on_with(
    composed: Compose, dies: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    config, forced = composed(*TINY), composed(*TINY, "force=true")
    dies(config, 2)
    dies(forced, 1)  # not from epoch 2 of the run before
    capsys.readouterr()
    dies(forced, 3)
    assert "going on from" in capsys.readouterr().out
    finetune.run(forced)
    assert "going on from" in capsys.readouterr().out
    dies(forced, 1)  # a finished one is begun again, and its result is gone
    assert not (folder(forced) / "metrics.json").exists()


def test_parts_made_with_force_are_kept_when_it_is_resumed(tmp_path: Path) -> None:
    made: list[str] = []

    def part(force: bool) -> torch.Tensor:
        return Unfinished(tmp_path, "options", force=force).part("x", lambda: made.append("x") or torch.ones(1))

    for force, count in ((False, 1), (False, 1), (True, 2), (True, 2)):
        part(force)
        assert len(made) == count


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("run",)


class Kept(NamedTuple):
    values: dict[str, torch.Tensor]
    labels: np.ndarray


def test_no_code_of_a_part_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unfinished = Unfinished(tmp_path, "options", records=(Kept,))
    kept = Kept({"a": torch.ones(2)}, np.arange(3))
    unfinished.part("x", lambda: kept)
    again = unfinished.part("x", lambda: pytest.fail("it was there"))
    assert type(again) is Kept and torch.equal(again.values["a"], torch.ones(2)) and again.labels.tolist() == [0, 1, 2]
    path = unfinished.folder / "x.pt"
    for content in (Hostile(), {"a": Hostile()}, Kept({"a": Hostile()}, np.arange(3)), Path("x")):  # type: ignore[dict-item]
        torch.save(content, path)
        assert unfinished.part("x", lambda: 5) == 5
        assert not (tmp_path / "run").exists()
    for damage in (b"", b"PK", path.read_bytes()[:-7], pickle.dumps(Hostile())):
        path.write_bytes(damage)
        assert unfinished.part("x", lambda: 6) == 6
    assert not (tmp_path / "run").exists()
    torch.save(torch.arange(1000), path)
    whole = path.read_bytes()
    place = whole.index(torch.arange(1000).numpy().tobytes()) + 4000
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert unfinished.part("x", lambda: 7) == 7  # one bit of a tensor


def test_a_folder_has_one_owner_who_is_named(composed: Compose) -> None:
    config = composed(*TINY)
    path = folder(config)
    holder = (
        "import sys; from pathlib import Path; from orca_rank.artifacts.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on .*another name"), locked(path):
            pass
    finally:
        process.kill()
        process.communicate()
    assert (path / ".lock").exists()
    with locked(path):  # a dead owner's lock is taken over
        assert str(os.getpid()) in (path / ".lock").read_text()
    with locked(path / "new" / "one"):
        pass
    assert not list(path.iterdir())  # nothing was written, so nothing is left


def test_a_folder_that_its_owner_removes_is_waited_for(tmp_path: Path) -> None:
    waiter = (
        "import sys; from pathlib import Path; from orca_rank.artifacts.lock import locked\n"
        "for line in sys.stdin:\n"
        "    with locked(Path(sys.argv[1]), wait=True): print('held', flush=True)"
    )
    environment, place = {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "new" / "one"
    process = subprocess.Popen(
        [sys.executable, "-c", waiter, str(place)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    for _ in range(5):
        with locked(place):
            process.stdin.write("now\n")
            process.stdin.flush()
            assert "waiting for it" in process.stderr.readline()
        assert process.stdout.readline() == "held\n"
    process.communicate()
    assert process.returncode == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", [align, finetune, measure, predict], ids=lambda stage: stage.__name__)
def test_a_stage_does_not_write_beside_another_process(
    composed: Compose, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*TINY)
    place = folder(config) if stage is finetune else folder(config).parents[1] / stage.__name__.rpartition(".")[2]
    monkeypatch.setattr(predict, "chosen_folder", lambda *_: place)
    fitted = SimpleNamespace(metrics={"config": {"data": plain(config.data)}})
    monkeypatch.setattr(predict, "load", lambda *_, **__: fitted)
    with locked(place), pytest.raises(BlockingIOError, match=f"{place} is being written by process {os.getpid()}"):
        stage.run(config)
    assert not place.exists()


def test_a_finished_stage_tidies_what_a_kill_left(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stage = tmp_path / "finetune" / "mine"
    kept = Unfinished(stage, "options", force=True)
    kept.part("x", lambda: torch.ones(1))
    for name in ("last.ckpt", "previous.ckpt", "begun.json", ".lock", "metrics.json"):
        (stage / name).touch()
    with atomic(stage / "curve.csv") as temporary:
        (stage / temporary.name.replace(str(os.getpid()), str(gone.pid))).touch()
        names = {path.name for path in stage.iterdir()}
        with locked(stage):  # of another process
            tidy(stage)
            assert {path.name for path in stage.iterdir()} == names
        tidy(stage)
        left = {path.name for path in stage.iterdir()}
    assert left == {"metrics.json", "unfinished", temporary.name}
    kept.root.joinpath("abc").mkdir()
    kept.folder.rename(kept.root / "other")
    tidy(stage)
    assert {path.name for path in stage.iterdir()} == {"metrics.json", "curve.csv"}


def test_what_a_killed_process_left_half_written_is_cleaned(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with atomic(tmp_path / "file") as temporary:
        dead = temporary.with_name(temporary.name.replace(str(os.getpid()), str(gone.pid)))
        alive = temporary.with_name(temporary.name.replace(str(os.getpid()), str(os.getppid())))
    dead.write_text("half")
    alive.write_text("half")
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", alive.name}


def test_a_stop_between_two_checkpoints_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter("1234")

    class Writer(L.Trainer):
        def __init__(self) -> None: ...

        def save_checkpoint(self, path: Path, weights_only: bool | None = None, storage_options: object = None) -> None:
            path.write_text(next(texts))

    def stopped(source: Path, target: Path) -> None:
        if Path(target).name == "last.ckpt":
            raise KeyboardInterrupt
        replace(source, target)

    def found() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    replace = os.replace
    save(Writer(), tmp_path)
    save(Writer(), tmp_path)
    assert found() == {"last.ckpt": "2", "previous.ckpt": "1"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stopped)
        save(Writer(), tmp_path)
    assert found() == {"last.ckpt": "2", "previous.ckpt": "2"}
    save(Writer(), tmp_path)
    assert found() == {"last.ckpt": "4", "previous.ckpt": "2"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("stage", ["finetune", "align", "pretrain"])
def test_a_signal_ends_with_its_status_and_the_way_on(
    tmp_path: Path, stage: str, number: signal.Signals, status: int
) -> None:
    options = [*TINY, "finetune.epochs=2000", "align.epochs=2000", "++backbone.recipe.epochs=2000", "run=long"]
    command = [sys.executable, "-m", "orca_rank", f"stage={stage}", *options, f"paths.runs={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored in what a shell starts in the background
    )  # fmt: skip
    end = time.monotonic() + 300
    while not list(tmp_path.rglob("previous.ckpt")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert "the same command goes on from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.rglob("last.ckpt")) and not list(tmp_path.rglob("metrics.json"))
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".lock"))
