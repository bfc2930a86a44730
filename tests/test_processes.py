"""Several processes train as one: the shares of a batch, what each draws and counts, and how they start and end."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import members
import pytest
import torch
from omegaconf import DictConfig
from rich.progress import Progress
from safetensors.torch import load_file
from shared import TINY_SWIN, apart
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orca_rank import job, launch, processes
from orca_rank.backbone import OrcaModel
from orca_rank.data.module import Batches, EpochOrder, as_it_is
from orca_rank.data.shares import Shares, Sizes, share, sizes_of
from orca_rank.measuring import activations, gradients, hidden, passes
from orca_rank.measuring.gradients import Gradients
from orca_rank.measuring.passes import Shared
from orca_rank.processes import World
from orca_rank.stages import align, evidence, finetune, measure
from orca_rank.stages.trainer import processes_of
from orca_rank.training.finetune import REDUCTIONS, FineTune, FinetuneOptions
from orca_rank.training.stochastic_depth import SharedPaths

Compose = Callable[..., DictConfig]
ROOT = Path(__file__).parents[1]


def in_memory(count: int, augment: bool) -> DataLoader:
    """A loader as the data modules give it, in batches of 8 whose augmentation adds a draw to every sample."""
    x = torch.arange(float(count))
    dataset = Batches(
        x, 10 * x.long(), augment=(lambda x, draws: x + torch.rand(len(x), generator=draws)) if augment else None
    )
    return DataLoader(dataset, 8, sampler=EpochOrder(count, 3, dataset.draws), collate_fn=as_it_is)


def plain(count: int, augment: bool) -> DataLoader:
    x = torch.arange(float(count))
    return DataLoader(TensorDataset(x, 10 * x.long()), 8, sampler=EpochOrder(count, 3), drop_last=augment)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("make", [in_memory, plain])
@pytest.mark.parametrize(("count", "size"), [(19, 2), (17, 2), (21, 3), (16, 4)])
def test_processes_see_together_what_one_process_sees(
    make: Callable[[int, bool], DataLoader], augment: bool, count: int, size: int
) -> None:
    """In two epochs; the last batch of 17 has one sample, which the second process gets without counting it."""
    whole = make(count, augment)
    shares = [share(make(count, augment), rank, size) for rank in range(size)]
    for _ in range(2):
        for index, batches in enumerate(zip(whole, *shares, strict=True)):
            sizes = sizes_of(shares[0])
            assert sizes == sizes_of(whole) and sizes is not None
            (x, y), *parts = batches
            assert sizes.batch(index) == len(x)
            for rank, (own_x, own_y) in enumerate(parts):
                own = sizes.own(index, rank, size)
                assert len(own_x) == max(own, 1)
                assert torch.equal(own_x[:own], x[rank::size]) and torch.equal(own_y[:own], y[rank::size])


def test_one_process_keeps_its_loader_and_unknown_batches_are_refused() -> None:
    loader = in_memory(9, False)
    assert share(loader, 0, 1) is loader
    own = DataLoader(TensorDataset(torch.arange(4)), batch_sampler=[[0, 1], [2, 3]])
    assert sizes_of(own) is None
    with pytest.raises(ValueError, match="makes its batches itself: give it a batch_size"):
        share(own, 0, 2)
    with pytest.raises(ValueError, match=r"data.batch_size=8 is shared by 9 processes"):
        share(loader, 0, 9)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("count", "accumulate"), [(19, 1), (17, 1), (19, 2), (25, 3), (16, 3)])
def test_every_sample_of_a_step_weighs_the_same(
    monkeypatch: pytest.MonkeyPatch, size: int, count: int, accumulate: int, reduction: str
) -> None:
    """Lightning divides by the batches of a step and averages over processes; of loss_i = i the mean is left, or the
    sum, or the sum of the batches' means."""
    sizes = Sizes(count, 8)
    batches = -(-count // 8)
    found: dict[int, float] = {}
    terms: dict[int, float] = {}
    for rank in range(size):
        monkeypatch.setattr(processes, "_world", World(rank, size, rank))
        sampler = Shares(range(count), 8, False, rank, size)
        loader = DataLoader(TensorDataset(torch.arange(count)), batch_sampler=sampler)
        trainer = SimpleNamespace(
            accumulate_grad_batches=accumulate, num_training_batches=batches, train_dataloader=loader
        )
        module: Any = SimpleNamespace(trainer=trainer, options=FinetuneOptions(1, reduction=reduction))
        for index, (values,) in enumerate(loader):
            own, weight, once = FineTune._weights(module, index, len(values))
            assert own == sizes.own(index, rank, size)
            step = index // accumulate
            found[step] = found.get(step, 0.0) + weight * float(values.double().mean()) / accumulate / size
            terms[step] = terms.get(step, 0.0) + once / accumulate / size
    for step, value in found.items():
        seen = torch.arange(count, dtype=torch.float64)[step * accumulate * 8 :][: accumulate * 8]
        means = torch.stack([part.mean() for part in seen.split(8)])
        assert value == pytest.approx(
            float({"mean": seen.mean(), "sum": seen.sum(), "batches": means.sum()}[reduction])
        )
        assert terms[step] == pytest.approx(1.0)
    assert len(found) == -(-batches // accumulate)


def test_batches_of_unknown_size_count_the_same() -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=3, num_training_batches=5, train_dataloader=[])
    for reduction, weights in (("mean", (1.0, 1.5)), ("sum", (12.0, 12.0)), ("batches", (3.0, 3.0))):
        step: Any = SimpleNamespace(trainer=trainer, options=FinetuneOptions(1, reduction=reduction))
        assert FineTune._weights(step, 1, 4) == (4, weights[0], 1.0)
        assert FineTune._weights(step, 4, 4) == (4, weights[1], 1.5)


def test_the_same_samples_skip_the_same_blocks_as_in_one_process() -> None:
    def model() -> nn.Module:
        return nn.Sequential(DropPath(0.4), DropPath(0.0), DropPath(0.3))

    x = torch.ones(9, 2, 3)
    torch.manual_seed(5)
    whole = model()(x)
    assert 0 < int((whole == 0).sum()) < whole.numel()
    for rank in range(2):
        own = model()
        paths = SharedPaths(own, rank, 2)
        torch.manual_seed(11 * rank)
        paths.begin(5, 9, x.device)
        assert torch.equal(own(x[rank::2]), whole[rank::2])
        paths.begin(5, 1, x.device)
        assert len(own(x[:1])) == 1  # the second process's share of one sample is empty
        assert torch.equal(own.eval()(x), x)


@pytest.mark.parametrize(("count", "size"), [(19, 2), (17, 2), (16, 3)])
def test_processes_pass_together_what_one_process_passes(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    """Rows of other processes are zero until they are added up: of 17 images the second has none of the last batch."""
    x = torch.randn(25, 5, 6, generator=torch.Generator().manual_seed(1))  # 5 tokens an image
    y = torch.arange(25) % 3
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    watched: Any = {"0": model[0], "2": model[2]}

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(x, y), 8)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(prediction.mean(1), y)

    def all_of(batches: DataLoader, shared: Shared | None) -> dict[str, Tensor]:
        inputs, labels = activations.collect(model, watched, batches, count, tokens=13, seed=4, shared=shared)
        sums = gradients.collect_gradients(
            lambda x: x, model, loss, watched, batches, count, draws=3, moments=True, seed=4, shared=shared
        )
        states = hidden.hidden_dimensions(model, watched, {}, batches, count, shared=shared)
        assert labels is not None and all(one.count == count for one in sums.values())
        found = {"labels": labels}
        for name in watched:
            one: Gradients = sums[name]
            both = torch.tensor(states[name])
            values = (*inputs[name], both, one.total, one.signed, one.sign_sums, one.squares)
            found |= {f"{name}/{i}": value for i, value in enumerate((*values, *(one.moments or ())))}
        return found

    monkeypatch.setattr(hidden, "intrinsic_dimension", lambda rows: float((torch.arange(1.0, 1 + count) @ rows).sum()))
    expected = all_of(loader(), None)
    for module in (activations, gradients, passes):
        monkeypatch.setattr(module, "add_up", lambda *values: None)
    sizes = sizes_of(loader())
    assert sizes is not None
    parts = [all_of(share(loader(), rank, size), Shared(rank, size, sizes.batch)) for rank in range(size)]
    for name, value in expected.items():
        assert apart(torch.stack([part[name] for part in parts]).sum(0), value) < 1e-6, name
    assert expected["0/0"].shape == (count, 6) and expected["0/1"].shape == (13, 1, 6)


def test_fewer_images_than_processes_are_refused(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_world", World(0, 9, 0))
    passing = measure.Pass(8, 2, 0, torch.device("cpu"), Progress())
    data = measure.build(composed("data=digits").data)
    with pytest.raises(ValueError, match="8 images of the Digits data are shared by 9 processes: expected at least"):
        passing.side(OrcaModel(*(nn.Identity() for _ in range(3))), data, [], 0, "target")
    monkeypatch.setattr(processes, "_world", World(0, 2, 0))
    data = measure.build(composed("data=digits", "data.batch_size=1").data)
    with pytest.raises(ValueError, match=r"gap.batch_size, or the data's own batch_size=1 is shared by 2 processes"):
        passing.side(OrcaModel(*(nn.Identity() for _ in range(3))), data, [], 0, "target")


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": 2}, 2),
        ({"devices": "3", "num_nodes": 2}, 6),
        ({"devices": [0, 3]}, 2),
        ({"devices": "0,3"}, 2),
    ],
)
def test_processes_are_devices_times_nodes(options: dict[str, Any], count: int) -> None:
    assert processes_of(options) == count


@pytest.mark.parametrize("options", [{"devices": 0}, {"devices": "two"}, {"devices": 1, "num_nodes": 0}])
def test_devices_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trainer.devices=.* expected whole numbers of at least 1"):
        processes_of(options)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "{_target_: lightning.pytorch.strategies.FSDPStrategy}"])
def test_a_strategy_of_another_kind_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr(processes, "_world", World(0, 2, 0))
    config = composed("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", f"trainer.strategy={strategy}")
    with pytest.raises(ValueError, match=r"trainer.strategy=.*: expected auto, ddp, .*DDPStrategy"):
        finetune.check_options(config)


def test_a_strategy_with_options_reaches_lightning(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from orca_rank.stages.trainer import trainer_for

    monkeypatch.setattr(processes, "_world", World(0, 2, 0))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    mine = "{_target_: lightning.pytorch.strategies.DDPStrategy, gradient_as_bucket_view: true}"
    for strategy, expected in (
        ("ddp", {}),
        ("auto", {"find_unused_parameters": True}),
        (mine, {"gradient_as_bucket_view": True}),
    ):
        config = composed("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", f"trainer.strategy={strategy}")
        trainer = trainer_for(config.trainer, None, Path(config.paths.runs), [])
        assert type(trainer.strategy) is DDPStrategy and trainer.world_size == 2
        assert trainer.strategy._ddp_kwargs == expected


def test_what_cannot_start_is_said_before_any_work(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*options: str) -> None:
        job.run(composed("data=digits", "source=digits", *TINY_SWIN, "trainer.accelerator=cpu", *options), [], [])

    several = ("stage=finetune", "trainer=ddp", "trainer.devices=2")
    with pytest.raises(ValueError, match=r"trainer.num_nodes=2: start the processes of several machines with torchrun"):
        run(*several, "trainer.num_nodes=2")
    with pytest.raises(ValueError, match=r"asks for 2 processes, and this is one of 1.*other stages"):
        run("stage=pretrain", "trainer=ddp", "trainer.devices=2")
    with pytest.raises(ValueError, match=r"asks for 2 processes"):
        evidence.run(composed("experiment=evidence_small", "trainer=ddp", "trainer.devices=2"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"3 processes were started, trainer.devices=2 .* asks for 2: set trainer=ddp"):
        run(*several)
    with pytest.raises(ValueError, match=r"3 processes were started, trainer.devices=1 .* asks for 1: set trainer=ddp"):
        run("stage=finetune")
    assert not list(tmp_path.iterdir())


def test_one_process_of_several_does_the_other_stages(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(job, "_work", lambda config, *_: ran.append(os.environ["RANK"]))
    for rank in "01":
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        job.run(composed("stage=report", "trainer=ddp", "trainer.devices=2"), [], [])
    assert ran == ["0"]


def test_srun_is_read_as_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_JOB_ID": "1203",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[03-04,9]",
    }
    monkeypatch.setattr(os, "environ", environment)
    assert launch.outside() == 8
    found = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")}
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "gpu03"}
    monkeypatch.setattr(os, "environ", {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # the script, not a step of it
    assert launch.outside() == 1
    for nodes, name in (("n1", "n1"), ("a,b", "a"), ("rack[2,4]-n", "rack2-n"), ("n[007]", "n007")):
        assert launch._first_node(nodes) == name


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("end", None),
        ("raise", "^one of two$"),
        ("SIGKILL", "process 1 of 2 was ended by SIGKILL, and the others with it"),
    ],
)
def test_all_processes_end_when_one_ends_badly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str, message: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = (2, members.work, (str(tmp_path), do), members.report, 3)
    started = time.monotonic()
    if message is None:
        launch.start(*arguments)
    else:
        with pytest.raises(launch.ProcessFailed, match=message) as caught:
            launch.start(*arguments)
        assert caught.value.text.startswith("error: ")
    assert time.monotonic() - started < 55  # nobody waited for the one that is gone
    assert (tmp_path / "1").read_text() == "2 3"


# Counts that two do not divide: of 19 test samples process 0 sees ten, of the last training batch one more.
OPTIONS = (
    "data=digits",
    "data.train_limit=50",
    "data.test_limit=19",
    "data.batch_size=16",
    "source=digits",
    "source.train_limit=48",
    *TINY_SWIN,
    "rank=uniform",
    "rank.r=2",
    "embedder.aligned=false",
    "finetune.tag=mine",
    "finetune.optimizer.lr=0.02",
    "align.epochs=2",
    "align.held_out.resamples=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)
TWO = ("trainer=ddp", "trainer.devices=2")


def command(folder: Path, *options: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    options = tuple(sorted((*TWO, *OPTIONS, f"paths.runs={folder}", *options), key=lambda one: one[0] != "-"))
    words = [sys.executable, "-m", "orca_rank", *options]  # flags first
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))


def same_tensors(one: Path, other: Path) -> None:
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    whole: list[list[Tensor]] = [[tensors[name].flatten() for name in mine] for tensors in (mine, theirs)]
    assert apart(torch.cat(whole[0]), torch.cat(whole[1])) < 1e-5


def same_results(one: Path, other: Path) -> None:
    same_tensors(one / "model.safetensors", other / "model.safetensors")
    curves = [rows_of(folder) for folder in (one, other)]
    assert [row["epoch"] for row in curves[0]] == [row["epoch"] for row in curves[1]]
    for mine, theirs in zip(*curves, strict=True):
        for name, value in mine.items():
            assert float(value) == pytest.approx(float(theirs[name]), rel=1e-4), name
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert metrics[0]["test/error"] == pytest.approx(metrics[1]["test/error"], rel=1e-6)
    wrong = 19 * metrics[0]["test/error"]
    assert wrong == pytest.approx(round(wrong), abs=1e-4)
    assert 0 < metrics[0]["test/error"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        ("lora",),
        ("dylora", "finetune.accumulate=2", "finetune.clip=0.5"),
        ("lora", "finetune/curriculum=pare", "finetune.curriculum.drawn=0.5"),
        ("elalora", "adapter.module.every=2", "adapter.module.tinit=0", "finetune.accumulate=2"),
    ],
)
def test_two_processes_fine_tune_as_one(composed: Compose, tmp_path: Path, adapter: tuple[str, ...]) -> None:
    options = (f"adapter={adapter[0]}", "finetune.epochs=4", *adapter[1:])
    one = composed(*OPTIONS, *options, "run=one")
    finetune.run(one)
    status, out, errors = ended(command(tmp_path, "stage=finetune", "run=two", *options))
    assert status == 0, errors
    assert errors == "" and out.count("trainable: ") == 1
    folder = tmp_path / "two" / "finetune" / "mine"
    same_results(Path(one.paths.runs) / "one" / "finetune" / "mine", folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"metrics.json", "curve.csv", "ranks.json", "model.safetensors", "adapter", "log", "command.txt"}


def two_of_srun(folder: Path, *options: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
    return [command(folder, *options, **variables, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]


@pytest.mark.slow
def test_adapters_that_draw_or_move_do_so_alike_in_a_sweep_of_two_processes(composed: Compose, tmp_path: Path) -> None:
    """All in the same two processes: gates and projections are drawn, W follows a product, AdaLoRA moves ranks."""
    names = ("matryoshka", "gated", "rerandomised", "delta_lora", "adalora")
    options = ("layers.qkv=fused", "data.batch_size=5", "finetune.epochs=2", "finetune.tag='${adapter.name}'")
    for name in names:
        finetune.run(composed(*OPTIONS, *options, f"adapter={name}", "run=one"))
    sweep = ("-m", "stage=finetune", f"adapter={','.join(names)}")
    for status, _, errors in [ended(process) for process in two_of_srun(tmp_path, *options, "run=two", *sweep)]:
        assert status == 0, errors
    for name in names:
        same_results(*(folder / "finetune" / name for folder in (tmp_path / "runs" / "one", tmp_path / "two")))


@pytest.mark.slow
def test_processes_that_srun_starts_align_as_one(composed: Compose, tmp_path: Path) -> None:
    """The distance is that of the whole batch; batches of one sample leave process 1 with an empty share."""
    options = ("stage=align", "align.samples_per_class=1")
    one = composed(*OPTIONS, *options, "run=one")
    align.run(one)
    for process, lines in zip(two_of_srun(tmp_path, *options, "run=two"), (1, 0), strict=True):
        status, out, errors = ended(process)
        assert status == 0, errors
        assert out.count("held-out distance") == lines
    folders = Path(one.paths.runs) / "one" / "align", tmp_path / "two" / "align"
    same_tensors(*(folder / "embedder.safetensors" for folder in folders))
    losses = [[float(row["loss"]) for row in rows_of(folder)] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def same_numbers(one: Any, other: Any, place: str = "") -> None:
    """Singular values as near as the largest allows: of those about the rounding of float32 nothing is left to say."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name, value in one.items():
            same_numbers(value, other[name], f"{place}/{name}")
    elif isinstance(one, list) and place.endswith("singular_values"):
        kept = [[value for value in values if value > 1e-4 * values[0]] for values in (one, other)]
        assert kept[0] == pytest.approx(kept[1], rel=1e-4, abs=1e-5 * one[0]), place
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, value in enumerate(one):
            same_numbers(value, other[i], f"{place}/{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6), place
    else:
        assert one == other, place


@pytest.mark.slow
def test_two_processes_measure_as_one(composed: Compose, tmp_path: Path) -> None:
    """What gap=spectra and gap=gora measure, and a further target; process 1 has none of the 17th image."""
    options = (
        "stage=measure",
        r"layers.target='(attn\.qkv|mlp\.fc1)$'",
        "gap=spectra",
        "gap.measurements.whitened_gradient=true",
        "gap.measurements.mean_gradient=true",
        "gap.samples=17",
        "gap.batch_size=8",
        "gap.tokens=40",
        "gap.null_splits=2",
        "gap.bootstrap=5",
        "gap.permutations=9",
        "+data@measure.compare.near=digits_near",
    )
    one = composed(*OPTIONS, *options, "run=one")
    measure.run(one)
    status, out, errors = ended(command(tmp_path, *options, "run=two"))
    assert status == 0, errors
    assert errors == "" and out.count("written to ") == 1
    folders = Path(one.paths.runs) / "one" / "measure", tmp_path / "two" / "measure"
    for name in ("layers.json", "compare/near.json"):
        found = [json.loads((folder / name).read_text()) for folder in folders]
        assert len(found[0]["layers"]) == 8
        same_numbers(found[0]["layers"], found[1]["layers"], name)
    directions = [load_file(folder / "directions.safetensors") for folder in folders]
    for name in (name for name in directions[0] if name.startswith("mean_gradient")):
        assert apart(directions[1][name], directions[0][name]) < 1e-5, name
    left = {path.name for path in folders[1].iterdir()}
    assert left == {"layers.json", "compare", "directions.safetensors", "command.txt"}


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a command started to train in, first to last."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def killed(tmp_path: Path, folder: Path, *options: str) -> None:
    """End the second of two processes once a stage has left a checkpoint in its folder, and see the command end."""
    process, limit = command(tmp_path, *options), time.monotonic() + 200
    while not (folder / "previous.ckpt").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGKILL)
    status, _, errors = ended(process)
    assert status == 1
    assert "process 1 of 2 was ended by SIGKILL" in errors and "goes on from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert (folder / "last.ckpt").exists() and not (folder / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="children are looked up in /proc")
def test_a_killed_process_ends_the_command_which_can_be_gone_on_with(composed: Compose, tmp_path: Path) -> None:
    options = ("stage=finetune", "finetune.epochs=30", "finetune.optimizer.lr=0.002")
    folder = tmp_path / "two" / "finetune" / "mine"
    killed(tmp_path, folder, *options, "run=two")
    status, out, errors = ended(command(tmp_path, *options, "run=two"))
    assert status == 0, errors
    assert "going on from" in out
    one = composed(*OPTIONS, *options, "run=one")
    finetune.run(one)
    same_results(Path(one.paths.runs) / "one" / "finetune" / "mine", folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="children are looked up in /proc")
def test_an_alignment_whose_process_was_killed_is_gone_on_with(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one process, to the embedder that one process would have made without a break."""
    options = ("stage=align", "align.epochs=40", "align.samples_per_class=1")
    killed(tmp_path, tmp_path / "two" / "align", *options, "run=two")
    align.run(composed(*OPTIONS, *options, f"paths.runs={tmp_path}", "run=two"))
    assert "going on from" in capsys.readouterr().out
    align.run(composed(*OPTIONS, *options, f"paths.runs={tmp_path}", "run=one"))
    same_tensors(*(tmp_path / run / "align" / "embedder.safetensors" for run in ("one", "two")))
