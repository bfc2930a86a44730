"""stage=finetune on a tiny Swin and a few digits: what it writes, resuming, loading, and the errors it stops with."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_SWIN, break_off
from torch import nn

from orca_rank import load
from orca_rank.__main__ import CONF
from orca_rank.adapters import LoRA, inject
from orca_rank.adapters.lora import scale_of
from orca_rank.artifacts.files import write_json, write_tensors
from orca_rank.build import build
from orca_rank.measuring.matrices import adaptable_layers
from orca_rank.stages import finetune, predict
from orca_rank.stages.setup import build_model
from orca_rank.stages.trainable import audit
from orca_rank.stages.written import scale_in_use
from orca_rank.training.finetune import FinetuneOptions

TINY = (
    "stage=finetune",
    "data=digits",
    "data.train_limit=48",
    "data.batch_size=16",
    *TINY_SWIN,
    "rank=uniform",
    "rank.r=2",
    "embedder.aligned=false",
    "finetune.epochs=2",
    "finetune.warmup_epochs=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


def folder(config: DictConfig) -> Path:
    return Path(config.paths.runs) / config.run / "finetune" / finetune.tag(config)


def test_a_plan_that_adapts_no_layer_is_refused(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY, "adapter=lora", "rank.r=0", "finetune.tag=none")
    with pytest.raises(ValueError, match=r"adapts no layer: all 12 ranks are 0.*adapter=linear_probe"):
        finetune.run(config)
    assert not folder(config).exists()


ADAPTERS = sorted(path.stem for path in (CONF / "adapter").glob("*.yaml"))
OFTEN = ("lora", "dylora", "full", "linear_probe", "norm_only")
# What these take from stage=measure is tested below.
MEASURED = ("dylora_ibp", "matryoshka_ibp", "gated_ibp", "lora_directions", "gora")


@pytest.mark.parametrize(
    "adapter",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in ADAPTERS if name not in MEASURED],
)
def test_what_is_written_is_what_is_loaded(composed: Callable[..., DictConfig], adapter: str) -> None:
    qkv = "fused" if "PeftAdapter" in (CONF / "adapter" / f"{adapter}.yaml").read_text() else "separate"
    often = ["adapter.module.every=1"] if adapter == "elalora" else []  # of six steps
    config = composed(*TINY, f"adapter={adapter}", f"layers.qkv={qkv}", *often)
    finetune.run(config)
    metrics = json.loads((folder(config) / "metrics.json").read_text())
    assert {"test/error", "val/error", "trainable_parameters", "seconds", "config", "schema"} <= set(metrics)
    assert metrics["trainable_parameters"]["total"] > 0
    assert (config.adapter.method == "inject") == (folder(config) / "ranks.json").exists()
    if "alpha" in config.adapter.get("module", {}):
        ranks = json.loads((folder(config) / "ranks.json").read_text())
        module = config.adapter.module
        scales = {name: scale_of(module.alpha, rank, module.scaling) for name, rank in ranks["ranks"].items()}
        assert ranks["scales"] == scales and metrics["adapter_scale"] == next(iter(scales.values()))
    with open(folder(config) / "curve.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["0", "1"]

    fitted = load(folder(config).parents[1])
    data = build(config.data)
    data.setup("test")
    wrong = torch.cat([fitted(x).argmax(1) != y for x, y in data.test_dataloader()])
    assert wrong.float().mean().item() == pytest.approx(metrics["test/error"], abs=1e-6)

    predict.run(config)
    written = np.load(folder(config).parents[1] / "predict" / "prediction.npz")
    assert written["metric"].mean() == pytest.approx(metrics["test/error"], abs=1e-6)


def test_scales_that_differ_are_told_by_their_range() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert scale_in_use(model) is None
    inject(model, {"0": 1, "1": 4}, partial(LoRA, alpha=4, scaling="rslora"))
    assert scale_in_use(model) == {"min": 2.0, "max": 4.0}


def test_done_is_done_until_forced(composed: Callable[..., DictConfig], capsys: pytest.CaptureFixture) -> None:
    config = composed(*TINY, "finetune.tag=mine")
    finetune.run(config)
    written = (folder(config) / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    finetune.run(config)
    assert "is done" in capsys.readouterr().out
    assert (folder(config) / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"finetune\.epochs: 2 -> 3.*force=true"):
        finetune.run(composed(*TINY, "finetune.tag=mine", "finetune.epochs=3"))
    finetune.run(composed(*TINY, "finetune.tag=mine", "force=true"))
    assert (folder(config) / "metrics.json").stat().st_mtime_ns > written


RESUMED = {  # what makes an adapter draw, move or begin in a run this short
    "lora": ["adapter.module.dropout=0.2"],
    "dylora": ["adapter.module.dropout=0.2"],
    "elalora": ["adapter.module.every=1"],
    "adalora": ["adapter.module.target_r=1", "adapter.module.deltaT=1"],
}


@pytest.mark.parametrize(
    "adapter",
    [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in ADAPTERS if name not in MEASURED],
)
def test_an_interrupted_run_resumes_to_the_same_result(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    qkv = "fused" if "PeftAdapter" in (CONF / "adapter" / f"{adapter}.yaml").read_text() else "separate"
    options = [*TINY, f"adapter={adapter}", f"layers.qkv={qkv}", *RESUMED.get(adapter, ()), "finetune.epochs=3"]
    whole = composed(*options, "run=whole")
    finetune.run(whole)

    broken = composed(*options, "run=broken")
    break_off(monkeypatch, broken, epoch=1, batch=1)
    assert not (folder(broken) / "metrics.json").exists()
    tag = f"finetune.tag={folder(broken).name}"
    with pytest.raises(ValueError, match=r"unfinished run with other options \(finetune\.clip: None -> 1\.0"):
        finetune.run(composed(*options, "run=broken", tag, "finetune.clip=1.0"))
    finetune.run(broken)

    expected, got = load_file(folder(whole) / "model.safetensors"), load_file(folder(broken) / "model.safetensors")
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)
    assert (folder(broken) / "curve.csv").read_text() == (folder(whole) / "curve.csv").read_text()


def test_only_what_is_declared_moves(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY, "embedder.train=false")
    finetune.run(config)
    saved = load_file(folder(config) / "model.safetensors")
    before = build_model(config, build(config.data).task).embedder.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(saved[f"embedder.{name}"], value, rtol=0, atol=0)
    assert json.loads((folder(config) / "metrics.json").read_text())["trainable_parameters"]["embedder"] == 0


def test_bad_choices_stop_before_any_work(composed: Callable[..., DictConfig]) -> None:
    def attempt(*options: str) -> None:
        finetune.run(composed(*TINY, *options))

    with pytest.raises(ValueError, match=r"finetune\.schedule"):
        attempt("finetune.schedule=step")
    with pytest.raises(FileNotFoundError, match="stage=align"):
        attempt("embedder.aligned=true")
    with pytest.raises(ValueError, match="random weights and is frozen"):
        attempt("embedder.train=false", "embedder.init=random")
    with pytest.raises(ValueError, match="min"):
        attempt("rank.r=1000")
    with pytest.raises(ValueError, match="stage=measure"):
        finetune.run(composed(*(option for option in TINY if "rank" not in option), "rank=proportional"))
    config = composed(*TINY)
    assert not list(Path(config.paths.runs).rglob("*.json"))


def test_a_fresh_predictor_may_be_frozen_only_on_purpose(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY)
    data = build(config.data)
    model = build_model(config, data.task)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen_on_purpose"):
        audit(model, config.embedder, frozen_on_purpose=False)
    audit(model, config.embedder, frozen_on_purpose=True)


def test_a_loss_that_is_not_finite_stops_the_run(composed: Callable[..., DictConfig]) -> None:
    config = composed(*TINY, "finetune.optimizer.lr=1e30")
    with pytest.raises(FloatingPointError, match=r"finetune\.optimizer\.lr"):
        finetune.run(config)
    assert not (folder(config) / "metrics.json").exists()


def test_loading_says_what_there_is(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="stage=finetune"):
        load(tmp_path)
    config = composed(*TINY)
    finetune.run(config)
    finetune.run(composed(*TINY, "rank.r=1"))
    with pytest.raises(ValueError, match="2 fine-tunes"):
        load(folder(config).parents[1])
    with pytest.raises(FileNotFoundError, match="lora-uniform-r2"):
        load(folder(config).parents[1], "other")
    assert load(folder(config).parents[1], finetune.tag(config)).metrics["config"]["rank"]["r"] == 2


@pytest.mark.parametrize("adapter", [*MEASURED, "block_diagonal"])
def test_what_adapters_take_from_measure(composed: Callable[..., DictConfig], adapter: str) -> None:
    more = ["adapter.module.blocks=gradient"] if adapter == "block_diagonal" else []
    config = composed(*TINY, f"adapter={adapter}", *more)
    with pytest.raises((ValueError, FileNotFoundError), match="stage=measure"):
        finetune.run(config)
    body = build_model(config, build(config.data).task).body
    layers = adaptable_layers(body, config.layers.target, config.layers.qkv)
    gap = {"low": 0.0, "high": 9.0, "p": 0.01}
    records = [{**layer.to_dict(), "gap": {"mmd": {"value": float(i), **gap}}} for i, layer in enumerate(layers)]
    measured = folder(config).parents[1] / "measure"
    write_json(measured / "layers.json", {"layers": records})
    stored = {f"gradient/{layer.name}.A": torch.eye(2, layer.d_in) for layer in layers}
    stored |= {f"mean_gradient/{layer.name}.G": torch.eye(layer.d_out, layer.d_in) for layer in layers}
    write_tensors(measured / "directions.safetensors", stored)
    finetune.run(config)
    metrics = json.loads((folder(config) / "metrics.json").read_text())
    if adapter == "block_diagonal":  # of full effective rank: as many as have the plan's rank 2
        blocks = metrics["adapter_module"]["blocks"]
        assert blocks == {layer.name: min(layer.d_in, layer.d_out) // 2 for layer in layers}
        assert "../measure/directions.safetensors" in metrics["inputs"]
    elif adapter not in ("lora_directions", "gora"):
        alphas = metrics["adapter_module"]["concentration"]
        mean = config.adapter.prior.mean
        expected = [max(mean * i / np.mean(range(len(layers))), 0.01 * mean) for i in range(len(layers))]
        np.testing.assert_allclose([alphas[layer.name] for layer in layers], expected)
    load(folder(config).parents[1])


@pytest.mark.slow
def test_each_part_learns_at_its_own_rate(composed: Callable[..., DictConfig]) -> None:
    """A rate that moves nothing leaves a part where it was."""
    rates = {
        "adapter": "finetune.optimizer.lr",
        "embedder": "finetune.embedder_lr",
        "predictor": "finetune.predictor_lr",
    }
    for part, option in rates.items():
        chosen = {name: 1e-2 if name == option else 1e-30 for name in rates.values()}
        config = composed(
            *TINY, "finetune.epochs=1", f"finetune.tag={part}", "finetune.optimizer.weight_decay=0",
            *(f"{name}={value}" for name, value in chosen.items()),
        )  # fmt: skip
        data = build(config.data)
        before = build_model(config, data.task)
        finetune.run(config)
        saved = load_file(folder(config) / "model.safetensors")
        moved = {
            "embedder": not torch.equal(saved["embedder.proj.weight"], before.embedder.proj.weight),
            "predictor": any(
                not torch.equal(saved[f"predictor.{n}"], v) for n, v in before.predictor.named_parameters()
            ),
            "adapter": any(bool(v.abs().max() > 1e-20) for n, v in saved.items() if n.endswith("lora_B")),
        }
        assert moved == {name: name == part for name in rates}


def test_the_learning_rate_grows_step_by_step_and_falls_to_zero() -> None:
    options = FinetuneOptions(epochs=10, warmup=0.2)
    factors = [options.course(100).factor(step) for step in range(101)]
    assert factors[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert factors[20] == 1 and factors[60] == pytest.approx(0.5) and factors[100] == 0
    same = FinetuneOptions(epochs=10, warmup=0.9, warmup_epochs=2)
    assert [same.course(100).factor(step) for step in range(101)] == factors
    cosine = FinetuneOptions(epochs=10, schedule="cosine", warmup=0).course(100)
    assert [cosine.factor(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    constant = FinetuneOptions(epochs=10, schedule="constant", warmup=0).course(100)
    assert {constant.factor(step) for step in range(101)} == {1.0}
    decay = FinetuneOptions(epochs=10, schedule="wsd", warmup=0, decay=0.5).course(100)
    assert [decay.factor(step) for step in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])


def test_the_rate_may_follow_a_longer_course_than_the_run() -> None:
    """ORCA's on CIFAR-100: 5 epochs of warm-up, then linear to 0 at epoch 200, of which 60 are trained."""
    options = FinetuneOptions(epochs=60, warmup_epochs=5, decay_epochs=200)
    course, steps = options.course(60 * 44), 44
    factors = [course.factor(step) for step in range(60 * steps)]
    assert factors[: 5 * steps] == pytest.approx([(step + 1) / (5 * steps + 1) for step in range(5 * steps)])
    wanted = [(200 * steps - step) / (195 * steps) for step in range(5 * steps, 60 * steps)]
    assert factors[5 * steps :] == pytest.approx(wanted) and factors[-1] == pytest.approx(0.718, abs=1e-3)
    same = FinetuneOptions(epochs=60, schedule="cosine", warmup=0, decay_epochs=60).course(100)
    assert [same.factor(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    half = FinetuneOptions(epochs=10, schedule="cosine", warmup=0, decay_epochs=20).course(100)
    assert half.factor(100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"finetune\.decay_epochs=200 is the length of .*schedule=constant: set"):
        FinetuneOptions(epochs=60, schedule="constant", decay_epochs=200)
