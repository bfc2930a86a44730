"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT reads what `save_peft` writes (`PeftModel.from_pretrained` on the same model gives the same outputs), and
`load_peft` reads what PEFT writes. Adapters that are not plain LoRA are written as the plain LoRA with the same ΔW.
Separate q, k, v become one LoRA of the fused matrix: A stacked, B block-diagonal.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from orca_rank.adapters.conv import AdaptedConv2d, check_peft
from orca_rank.adapters.inject import inject
from orca_rank.adapters.linear import THIRDS, WHOLE, AdaptedModule, adapted, adapters
from orca_rank.adapters.lora import LoRA, NotExpressible, scale_of
from orca_rank.adapters.peft_backed import tuner_of
from orca_rank.adapters.peft_config import check_config
from orca_rank.artifacts.files import atomic, write_tensors
from orca_rank.ranks import RankPlan
from orca_rank.ranks.peft import exactly, patterns, value_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_peft(model: nn.Module, folder: str | os.PathLike[str], modules_to_save: Sequence[str] = ()) -> None:
    """Write the adapters of ``model``, and whole modules beside them such as a trained head, for PEFT to load.

    Both files are put in place atomically. A model without adapters (every rank 0) gives a file without tensors.

    Args:
        model: what `inject` adapted; PEFT must later be given the same bare model.
        folder: made if it is not there.
        modules_to_save: paths of modules inside ``model`` to store whole.

    Raises:
        NotExpressible: for an adapter whose ΔW is no plain LoRA, or a dilated convolution. KeyError: if a module to
            save is not there.
    """
    if tuner := tuner_of(model):
        raise NotExpressible(f"{tuner.method} is PEFT's own; its trained tensors are in adapter_state_dict(model)")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    parts: dict[str, dict[str, int]] = {}
    modules = adapted(model)
    for name, module in modules.items():
        a, b, scale = _stack(module)
        if isinstance(module, AdaptedConv2d):
            check_peft(name, module)
            a, b = module.kernels(a, b)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
        ranks[name], scales[name] = a.shape[0], scale
        if WHOLE not in module.branches:
            parts[name] = {part: len(branch.plain()[0]) for part, branch in module.parts.items()}
    known = dict(model.named_modules())
    for name in modules_to_save:
        if name not in known:
            raise KeyError(f"modules_to_save names {name!r}, which the model does not have")
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in known[name].state_dict().items()}
    branches = [branch for module in modules.values() for branch in module.parts.values()]
    # PEFT knows no constant scale: it is written as each layer's own alpha.
    scaling = "rslora" if branches and branches[0].scaling == "rslora" else "lora"
    dropout = branches[0].dropout if branches else 0.0
    config = _config(ranks, scales, scaling, dropout, list(known), list(modules_to_save))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: value.detach().clone() for key, value in tensors.items()}  # no two names for one memory
    write_tensors(folder / WEIGHTS, own, {"orca_rank": json.dumps({"parts": parts})})
    with atomic(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _stack(module: AdaptedModule) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of the whole matrix; thirds are stacked, with one common s and what differs from it put into B."""
    plain = {part: branch.plain() for part, branch in module.parts.items()}
    if WHOLE in plain:
        return plain[WHOLE]
    first_a, _, common = next(iter(plain.values()))
    b = torch.block_diag(
        *(
            plain[part][1] * (plain[part][2] / common)
            if part in plain
            else first_a.new_zeros(module.out_features // 3, 0)
            for part in THIRDS
        )
    )
    return torch.cat([a for a, _, _ in plain.values()]), b, common


def _config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    scaling: str,
    dropout: float,
    known: Sequence[str],
    modules_to_save: Sequence[str],
) -> dict[str, Any]:
    """PEFT's LoraConfig: the commonest rank is ``r``, the rest stand in patterns that match one layer each."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 1
    alphas = {name: scales[name] / scale_of(1.0, ranks[name], scaling) for name in ranks}
    alphas = {name: round(a) if abs(a - round(a)) < 1e-9 * abs(a) else a for name, a in alphas.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count) if alphas else 16
    # PEFT reads a list of targets as suffixes; where a suffix would reach further, an exact expression takes its place.
    reaches = any(other.endswith(f".{name}") for name in ranks for other in known)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": scaling == "rslora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": exactly(sorted(ranks)) if reaches else sorted(ranks),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": patterns({name: r for name, r in ranks.items() if r != rank}),
        "alpha_pattern": patterns({name: a for name, a in alphas.items() if a != alpha}),
    }


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, LoRA]:
    """Adapt ``model`` with what lies in ``folder``, written by `save_peft` or by PEFT, strictly.

    A bare model is injected as the file says; a model that is adapted already must have the very layers and ranks of
    the file, as plain LoRA, and keeps its modules.

    Returns:
        layer -> adapter, as `inject`.

    Raises:
        FileNotFoundError: if a file is missing. ValueError: for another method than LoRA, a setting with which the
            tensors mean something else (see `peft_config`), or for shapes that differ.
        NotExpressible: for a convolution that PEFT adapts otherwise.
        KeyError: for tensors that are missing or not expected, or that fit no module.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; save_peft(model, folder) writes it")
    config = json.loads((folder / CONFIG).read_text())
    check_config(config, str(folder / CONFIG))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        extra = json.loads((file.metadata() or {}).get("orca_rank", "{}"))
    for key, value in tensors.items():
        if not (value.is_floating_point() and value.isfinite().all()) and ".lora_" in key:
            raise ValueError(f"{folder / WEIGHTS} holds {key} of {value.dtype} with NaN, infinity or no fractions")
    layers, others = _group(tensors)
    parts = extra.get("parts", {})
    ranks = {
        name if part == WHOLE else f"{name}.{part}": rank
        for name, (a, _) in layers.items()
        for part, rank in parts.get(name, {WHOLE: len(a)}).items()
    }
    scaling = "rslora" if config.get("use_rslora") else "lora"
    saved = _saved_modules(model, config.get("modules_to_save") or [], others)
    _check_shapes(model, layers)
    _check_ranks(layers, config, folder)
    if not adapted(model) and ranks:
        make = partial(LoRA, scaling=scaling, dropout=config.get("lora_dropout") or 0.0)
        inject(model, RankPlan(ranks, allow_above_full=True), adapter=make)  # PEFT allows ranks above full
    found = adapted(model)
    if found.keys() != layers.keys():
        raise KeyError(f"file and model adapt different layers, e.g. {sorted(found.keys() ^ layers.keys())[0]!r}")
    for name, (a, b) in layers.items():
        alpha = value_of(name, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8))
        _fill(name, found[name], a, b, float(alpha), scaling)
    with torch.no_grad():
        for target, value in saved:
            target.copy_(value)
    return adapters(model)


def _group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Module path -> (A, B), and the tensors that belong to no LoRA."""
    halves: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if match:
            halves.setdefault(match[1], {})[match[2]] = value
        else:
            others[key] = value
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise KeyError(f"the file has only lora_{next(iter(half))} of {name}")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}, others


def _check_ranks(layers: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any], folder: Path) -> None:
    """Refuse tensors of other ranks than the configuration says: it is not theirs, or its patterns, which PEFT sorts by
    name when it saves them, do not mean what they meant, nor do those of alpha."""
    for name, (a, _) in layers.items():
        said = value_of(name, config.get("rank_pattern") or {}, config.get("r", 8))
        if said != len(a):
            raise ValueError(
                f"{folder / WEIGHTS} has rank {len(a)} in {name}, {CONFIG} says {said}: it belongs to other tensors, "
                f"or two of its patterns reach one layer; give each layer a pattern of its own"
            )
    if not layers and config.get("target_modules"):
        raise ValueError(
            f"{folder / WEIGHTS} holds no LoRA, and {CONFIG} says there is one of {config['target_modules']}"
        )


def _saved_modules(
    model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, tensor of the file) for whole modules; both sides must have the same names and shapes.

    As in PEFT, a name stands for every module whose path ends in it.
    """
    state = model.state_dict()
    whole = [path for path, _ in model.named_modules() if path.endswith(tuple(names))] if names else []
    own = {key: value for key, value in state.items() if any(key.startswith(f"{path}.") for path in whole)}
    given = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    if own.keys() != given.keys():
        raise KeyError(
            f"whole modules in the file do not fit the model: missing {sorted(own.keys() - given.keys())[:5]}, "
            f"unexpected {sorted(given.keys() - own.keys())[:5]}"
        )
    for key, value in own.items():
        if value.shape != given[key].shape:
            raise ValueError(f"{key}: the file has shape {tuple(given[key].shape)}, the model {tuple(value.shape)}")
    return [(value, given[key]) for key, value in own.items()]


def _check_shapes(model: nn.Module, layers: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    modules = dict(model.named_modules())
    for name, (a, b) in layers.items():
        base = modules.get(name)
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise KeyError(f"the file adapts {name!r}, which is no Linear or Conv2d of this model")
        if isinstance(base, nn.Conv2d):
            check_peft(name, base)
        d_out, *rest = base.weight.shape
        ones = [1] * (len(rest) - 1)  # the kernel of a convolution's B
        if list(a.shape[1:]) != rest or list(b.shape) != [d_out, len(a), *ones]:
            raise ValueError(
                f"{name}: the file has A {tuple(a.shape)} and B {tuple(b.shape)}; expected {('r', *rest)} and "
                f"{(d_out, 'r', *ones)}"
            )


@torch.no_grad()
def _fill(name: str, module: AdaptedModule, a: Tensor, b: Tensor, alpha: float, scaling: str) -> None:
    """Copy a layer's tensors into its adapters; thirds are cut out of the stacked form."""
    if module.merged:
        raise ValueError(f"{name} is merged; call unmerge(model) before loading other adapters")
    if any(type(branch) is not LoRA or branch.moves_base for branch in module.parts.values()):
        raise ValueError(f"{name} has another adapter than plain LoRA; load into a bare model")
    total = sum(branch.rank for branch in module.parts.values())
    if total != len(a):
        raise ValueError(f"{name}: the file has rank {len(a)}, the model's adapter {total}")
    a, b = a.flatten(1), b.flatten(1)
    scale, start = scale_of(alpha, len(a), scaling), 0
    for part, branch in module.parts.items():
        inside = slice(start, start + branch.rank)
        start += branch.rank
        own_rows = module.rows(part)
        outside = b[:, inside].clone()
        outside[own_rows] = 0
        if bool(outside.any()):
            raise ValueError(f"{name}: B is not block-diagonal, so it does not split into q, k and v")
        branch.lora_A.copy_(a[inside])
        branch.lora_B.copy_(b[own_rows, inside])
        branch.scaling = scaling
        branch.alpha = scale / scale_of(1.0, branch.rank, scaling)
