"""A user's own model, as it is called and watched while its layers are measured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orca_rank.api.batches import Batch
from orca_rank.measuring.activations import collect
from orca_rank.measuring.matrices import matrix_of
from orca_rank.measuring.passes import mapped


@contextlib.contextmanager
def as_found(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode for as long as the block runs; each module is then in the mode that it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes.

    Raises:
        ValueError: if it has no weights yet, or they are on several devices.
    """
    places = {values.device for values in itertools.chain(model.parameters(), model.buffers())}
    if torch.device("meta") in places:
        raise ValueError("the model has weights on the meta device, which hold no numbers: load its weights first")
    if len(places) > 1 and not hasattr(model, "hf_device_map"):
        raise ValueError(f"the model is on several devices ({', '.join(sorted(map(str, places)))}): move it to one")
    return next(iter(values.device for values in model.parameters()), torch.device("cpu"))


def check_like(model: nn.Module, other: nn.Module, watched: Sequence[str]) -> None:
    """See that another model has the watched layers too.

    Raises:
        ValueError: naming a layer that is missing or of another shape; see `device_of`.
    """
    theirs = dict(other.named_modules())
    for name in watched:
        own = matrix_of(model, name).weight.shape
        if name not in theirs or getattr(theirs[name], "weight", torch.empty(0)).shape != own:
            raise ValueError(f"target_model has no layer {name} of shape {tuple(own)}: it must have the model's layers")
    for one in (model, other):
        device_of(one)


def watched_in(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names that hold a matrix, by name."""
    return {name: matrix_of(model, name) for name in names}


def called(model: nn.Module, side: str) -> Callable[[Any], Any]:
    """The model as a function of images, in its own precision, with an error that says what it was given."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def fitting(values: Tensor) -> Tensor:
        return values.to(kind) if values.is_floating_point() else values

    def call(x: Any) -> Any:
        x = mapped(x, fitting)
        try:
            return model(x) if isinstance(x, Tensor) else model(**x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AssertionError) as error:
            given = {name: tuple(v.shape) for name, v in x.items()} if isinstance(x, dict) else tuple(x.shape)
            raise ValueError(
                f"the model does not take the {side} batches, x {given}: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}"
            ) from error

    return call


def check_alone(call: Callable[[Any], Any], modules: Mapping[str, nn.Module], batch: Batch, side: str) -> None:
    """Pass a batch forwards and backwards: what reaches a layer from an image must not depend on its place.

    Raises:
        ValueError: naming a layer where it does.
    """
    device = next(iter(modules.values())).get_parameter("weight").device
    x = mapped(batch.x, lambda values: values[:16])
    pooled = [
        collect(call, modules, [(mapped(x, turn), None)], 16, device=device)[0]
        for turn in (lambda values: values, lambda values: values.flip(0))
    ]
    for name, module in modules.items():
        forward, backward = (one[name].pooled.double() for one in pooled)  # (b, d)
        noise = 1e3 * torch.finfo(module.get_parameter("weight").dtype).eps
        spread = float((forward - forward.mean(0)).norm())
        if float((forward - backward.flip(0)).norm()) > 0.1 * spread + noise * float(forward.norm()):
            raise ValueError(
                f"what reaches {name} from a {side} image depends on the images beside it, or is random: a layer must "
                f"receive (images, ..., d) with the image as its first axis (as with batch_first=True), and the model "
                f"in evaluation mode must not mix images; leave it out of layers, or measure a model that does so"
            )
