"""finetune.from: begin where another fine-tune ended, cut to other ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from shared import TINY_FINETUNE as TINY
from shared import apart

from orca_rank import load
from orca_rank.adapters import adapters, cut
from orca_rank.build import build
from orca_rank.stages import finetune

# A rate at which nothing moves: what the fine-tune ends with is what it began with.
STILL = ("finetune.optimizer.lr=1e-30", "finetune.optimizer.weight_decay=0", "finetune.tag=later")


def outputs(config: DictConfig, tag: str, ranks: dict[str, int] | int | None = None) -> torch.Tensor:
    fitted = load(Path(config.paths.runs) / config.run, tag=tag)
    if ranks is not None:
        names = adapters(fitted.model.body)
        cut(fitted.model.body, dict.fromkeys(names, ranks) if isinstance(ranks, int) else ranks)
    x = torch.cat([x for x, _ in build(config.data).loader("val")])
    with torch.inference_mode():
        return fitted.model(x)


@pytest.mark.parametrize("scaling", ["lora", "constant"])
def test_a_nested_adapter_is_cut_to_the_new_ranks(composed: Callable[..., DictConfig], scaling: str) -> None:
    first = composed(*TINY, "rank=uniform", "rank.r=4", "adapter=dylora", "finetune.tag=nested")
    finetune.run(first)
    options = (f"adapter.module.scaling={scaling}", "finetune.from=nested", "rank=uniform", "rank.r=2")
    finetune.run(composed(*TINY, *options, *STILL))
    assert apart(outputs(first, "later"), outputs(first, "nested", 2)) < 1e-5


def test_plain_lora_becomes_its_best_approximation_or_stays(composed: Callable[..., DictConfig]) -> None:
    first = composed(*TINY, "rank=uniform", "rank.r=4", "finetune.tag=high")
    finetune.run(first)
    options = ("finetune.from=high", "rank=uniform")
    finetune.run(composed(*TINY, *options, "rank.r=6", *STILL))
    assert apart(outputs(first, "later"), outputs(first, "high")) < 1e-5
    finetune.run(composed(*TINY, *options, "rank.r=2", *STILL, "finetune.tag=low"))
    run = Path(first.paths.runs) / first.run
    high, low = (adapters(load(run, tag=name).model.body) for name in ("high", "low"))
    for name, adapter in low.items():
        whole = high[name].delta_weight().detach()
        left = (whole - adapter.delta_weight().detach()).norm()
        assert float(left) == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-3, abs=1e-6)
    metrics = json.loads((run / "finetune/low/metrics.json").read_text())
    assert any(name.endswith("high/model.safetensors") for name in metrics["inputs"])


def test_train_high_cut_by_one_threshold_and_go_on(composed: Callable[..., DictConfig]) -> None:
    """experiment=para: the ranks are those of the largest s_k² per parameter of all layers, and the start is what these
    directions had learned."""
    options = (*TINY, "rank=uniform", "adapter.module.scaling=constant", "adapter.module.alpha=4")
    first = composed(*options, "finetune.tag=high", "finetune.keep_update=true", "budget.mean_rank=4")
    finetune.run(first)
    run = Path(first.paths.runs) / first.run
    update = run / "finetune/high/update.safetensors"
    cut = ("rank=trained", f"rank.update={update}", "finetune.from=high", "budget.mean_rank=null")
    finetune.run(composed(*options, *cut, "budget.parameters=400", *STILL))
    learned = load_file(update)
    ranks = json.loads((run / "finetune/later/ranks.json").read_text())["ranks"]
    assert 400 - 40 < sum(r * sum(learned[name].shape) for name, r in ranks.items()) <= 400
    worth = {name: torch.linalg.svdvals(w).square() / sum(w.shape) for name, w in learned.items()}
    kept = min(float(worth[name][r - 1]) for name, r in ranks.items() if r)
    left = {name: float(worth[name][r]) for name, r in ranks.items()}
    cheapest = min(sum(w.shape) for w in learned.values())
    assert all(value <= kept * (1 + 1e-4) for name, value in left.items() if sum(learned[name].shape) == cheapest)
    assert len(set(ranks.values())) > 1
    later = adapters(load(run, tag="later").model.body)
    for name, r in ranks.items():
        u, s, vh = torch.linalg.svd(learned[name])
        if r:
            assert apart(later[name].delta_weight(), (u[:, :r] * s[:r]) @ vh[:r]) < 1e-4
        else:
            assert name not in later


def test_what_cannot_be_gone_on_from_is_refused(composed: Callable[..., DictConfig]) -> None:
    finetune.run(composed(*TINY, "adapter=linear_probe", "finetune.tag=probe"))
    for options, error, message in (
        (("finetune.from=gone",), FileNotFoundError, "gone"),
        (("finetune.from=../x",), ValueError, "the folder of another fine-tune"),
        (("finetune.from=probe", "adapter=full"), ValueError, "adapter=lora to go on with"),
        (("finetune.from=probe",), ValueError, "from a fine-tune with adapters"),
        (("finetune.from=later",), ValueError, "another fine-tune"),
        (("finetune.from=probe", "seed=1"), ValueError, "another backbone's weights"),
    ):
        with pytest.raises(error, match=message):
            finetune.run(composed(*TINY, "finetune.tag=later", *options))
