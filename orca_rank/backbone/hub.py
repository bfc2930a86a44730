"""timm's hub: whether weights were fetched before, and whether they can be."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from orca_rank.backbone.the_timm import timm

SECONDS = 5.0  # to wait for the hub; its own client tries for a minute


def place_of(name: str) -> str | None:
    """The hub's repository of a timm model's weights; None where it has none."""
    known = timm.models.get_pretrained_cfg(name)
    return None if known is None or known.hf_hub_id is None else str(known.hf_hub_id)


def fetched(place: str) -> bool:
    """Whether the weights of a repository are in the hub's cache on this machine."""
    hub = importlib.import_module("huggingface_hub")  # comes with timm; here, because it takes a second
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(hub.try_to_load_from_cache(place, file), str) for file in files)


def unreachable() -> str | None:
    """Why the hub cannot be asked now, in a few words; None where it answers. It is asked once, as its client would:
    through proxies and with certificates; what it says does not matter."""
    hub = importlib.import_module("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever client it has
        return f"{hub.constants.ENDPOINT} does not answer: {type(error).__name__}"
    return None


def from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    """timm's model with the hub's weights.

    Raises:
        ConnectionError: if they cannot be had: within seconds where there is no network.
    """
    place = place_of(name)
    try:
        if place is not None and not fetched(place) and (reason := unreachable()) is not None:
            raise OSError(reason)
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise ConnectionError(
            f"could not get pretrained weights of {name} from timm's hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'}): set backbone.pretrained=<path of a weights "
            f"file>, or backbone.pretrained=false for random weights"
        ) from error
