"""Weights from a file into a timm model, adapted as timm adapts them."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.artifacts.damaged import DamagedFile, check_size, reading

State = dict[str, Tensor]
STEM = "patch_embed.proj.weight"
_MEND = "set backbone.pretrained to another file, true or false"


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a timm model; every parameter of the model must be there.

    timm's own filter for the model's family renames what older or original checkpoints call otherwise and resamples
    position tables and patches for another window, image or patch size. Filters of one input channel become a third
    each of three, three become the sum in one. Where the model is a part of what was saved, as in the checkpoint of a
    LightningModule that calls it `model`, that part is taken. A classification head in the file is left out. Only
    tensors and plain values are read (weights_only).

    Raises:
        FileNotFoundError: no such file. DamagedFile: not a state dict. ValueError: missing or misshapen tensors, blocks
            that the model has not, several such models, or values that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file at {path}: set backbone.pretrained to an existing file, true or false"
        )
    read = _read(path)
    state = _fitted(_one_model(read, model, path), model, path)
    wanted = model.state_dict()
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of this model, for example {missing[:3]}; it has {list(read)[:3]}: "
            f"{_MEND}"
        )
    blocks = tuple(f"{name}." for name, _ in model.named_children() if name in ("blocks", "layers"))
    if beyond := [name for name in state if name.startswith(blocks) and name not in wanted and "mask" not in name]:
        raise ValueError(
            f"{path} has {len(beyond)} tensors for which this model has no place, for example {beyond[:3]}: it is of a "
            f"deeper or other model; set backbone.name or backbone.options to its own"
        )
    state = {name: value for name, value in state.items() if name in wanted}
    if wrong := [
        f"{name}: {tuple(value.shape)}, expected {tuple(wanted[name].shape)}"
        for name, value in state.items()
        if value.shape != wanted[name].shape
    ]:
        raise ValueError(f"{path} does not fit this backbone: {'; '.join(wrong[:3])}")
    if whole := [name for name, value in state.items() if wanted[name].is_floating_point() > value.is_floating_point()]:
        raise ValueError(
            f"{path} has whole numbers where weights are meant in {len(whole)} tensors, for example {whole[:3]}: it is "
            f"quantised, and without its scales; {_MEND}"
        )
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(
            f"{path} has NaN or infinite values in {len(broken)} tensors, for example {broken[:3]}: its training "
            f"diverged, or it is damaged; {_MEND}"
        )
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> State:
    """The state dict in a file, out of its wrappers, floats as float32."""
    from timm.models import load_state_dict  # here: backbone/the_timm.py says what it may import

    check_size(path, "weights", (path.stat().st_size,), 1)
    what = f"it is not a safetensors file or a torch state dict of plain tensors: {_MEND}"
    with reading(path, what):
        state: Any = load_state_dict(str(path), weights_only=True)
        for wrapper in ("state_dict", "model"):
            if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DamagedFile(f"{path} does not hold a state dict (names to tensors): {_MEND}")
    with reading(path, what):
        # Prefixes of DistributedDataParallel and of torch.compile, in an inner dictionary too.
        clean = {name.removeprefix("_orig_mod.").removeprefix("module."): value for name, value in state.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in clean.items()}


def _one_model(state: State, model: nn.Module, path: Path) -> State:
    """The tensors of the model in a file, named as from it: with what stands before most of their names cut off."""
    names = {name for name, _ in model.named_parameters()}
    before = Counter(
        name[:cut]
        for name in state
        for cut in (0, *(place + 1 for place, letter in enumerate(name) if letter == "."))
        if name[cut:] in names
    )
    if not before:  # of other names, which timm's filter may know
        shared = os.path.commonpath([name.replace(".", "/") for name in state]) if len(state) > 1 else ""
        before[shared.replace("/", ".") + "." * bool(shared)] = 1
    most = max(before.values())
    alike = [prefix for prefix, count in before.items() if count == most]
    prefix = "" if "" in alike else alike[0]
    if len(alike) > 1 and prefix:
        raise ValueError(
            f"{path} holds {len(alike)} such models, {', '.join(sorted(alike))}: save one in a file of its own, its "
            f"names without that, and set backbone.pretrained to it"
        )
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _fitted(state: State, model: nn.Module, path: Path) -> State:
    """The state dict in the model's own names and shapes, as far as timm's filter can."""
    family: Callable[[State, nn.Module], State] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    names = [name for name, _ in model.named_parameters()]
    candidates = [state]
    if family is not None:
        # Some versions of timm take every Swin file without a head for one of the old names.
        headed = {"head.fc.weight": torch.zeros(0), **state}
        with reading(path, f"it does not fit this backbone, as timm reads it: {_MEND}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how fast timm resamples
            candidates = [family(dict(one), model) for one in (state, headed)]
    best = min(candidates, key=lambda one: sum(name not in one for name in names))
    return {**best, STEM: _channels(best[STEM], model)} if STEM in best else best


def _channels(weight: Tensor, model: nn.Module) -> Tensor:
    """Filters (d, C', p, p) for the model's own number of channels, which give the same for equal channels."""
    wanted = model.get_parameter(STEM).shape[1]
    if weight.ndim != 4 or weight.shape[1] == wanted:
        return weight
    if wanted == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, wanted, 1, 1) / wanted if weight.shape[1] == 1 else weight
