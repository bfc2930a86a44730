"""A task whose right rank plan is known: the answers of a teacher that is the body itself, changed in known layers.

    y = h(g′(f(x))),  g′ the body g with W + ΔW,  ΔW = strength ‖W‖ BA / ‖BA‖ of rank r in the layers that `pattern`
    names and 0 in all others, less the mean answer

x are smooth random fields, f is the body's own patch embedding, h a predictor drawn at random; nothing is noisy. A
student that starts from the same body and has rank r in just those layers can undo what the body changed, so a protocol
that compares rank plans must prefer `rank=only` with that pattern, or say that it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.backbone import OrcaModel, create_model
from orca_rank.data.checks import check_inputs, check_targets
from orca_rank.data.module import InMemory, Parts, check_fraction, check_whole
from orca_rank.data.reaction_diffusion import random_field
from orca_rank.measuring.matrices import adaptable_layers, matrix_of
from orca_rank.predictors import Stages
from orca_rank.predictors.multiscale import multiscale
from orca_rank.task import Normaliser, Task, typical_norm
from orca_rank.weights import shipped

_CHANNELS = 3
_CHUNK = 64  # samples that the teacher answers at a time


class Planted(InMemory):
    """Fields (3, k, k) and a teacher's answers (1, k, k) about the mean answer, in units of their standard deviation.

    Args:
        backbone: the run's backbone; its weights must be those of every seed (shipped, a file, or timm's hub).
        pattern: regular expression, searched in the names of the body's Linear modules: where the teacher differs.
        rank: of the teacher's update in each of them. strength: its Frobenius norm over the weight's.
        k: points a side. train, test: samples. val_fraction: of the former, held out.
        predictor: makes h, as `orca_rank.predictors` says.
        data_seed: of fields, update and h. batch_size, seed: see `InMemory`.

    Raises:
        ValueError: for sizes out of range, a body of random weights, or a pattern that names no layer.
    """

    def __init__(
        self,
        *,
        backbone: Mapping[str, Any],
        pattern: str,
        rank: int = 16,
        strength: float = 3.0,
        k: int = 32,
        train: int = 5500,
        test: int = 1000,
        val_fraction: float = 0.1,
        predictor: Callable[[Stages, tuple[int, ...]], nn.Module] = multiscale,
        data_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("train", train), ("test", test), ("rank", rank)):
            check_whole(name, value)
        check_whole("k", k, least=8)
        check_whole("data_seed", data_seed, least=0)
        check_fraction("val_fraction", val_fraction)
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be a number above 0, received {strength!r}")
        if backbone["pretrained"] in (False, "on_source"):
            raise ValueError(
                f"a planted task needs a body that is the same for every seed and source, received backbone.pretrained="
                f"{backbone['pretrained']}: expected shipped, true (timm's hub) or a file of weights"
            )
        self.backbone, self.pattern, self.rank, self.strength, self.predictor = (
            dict(backbone),
            pattern,
            rank,
            float(strength),
            predictor,
        )
        self.k, self.train, self.test, self.val_fraction, self.data_seed = k, train, test, val_fraction, data_seed

    @property
    def outline(self) -> Task:
        return Task("dense", (_CHANNELS, self.k, self.k), (1, self.k, self.k))

    def load(self) -> Parts:
        x, x_test = self._fields(0, self.train), self._fields(1, self.test)
        count = max(1, round(self.train * (1 - self.val_fraction)))
        inputs = self.inputs(x[:count], "channel")
        answer = self._teacher()
        y, y_test = (torch.cat([answer(inputs.encode(part)) for part in every.split(_CHUNK)]) for every in (x, x_test))
        mean = y[:count].mean(0)  # most of an answer is the same for every field
        std = (y[:count] - mean).std()
        y, y_test = (y - mean) / std, (y_test - mean) / std
        parts = {"train": (x[:count], y[:count]), "val": (x[count:], y[count:]), "test": (x_test, y_test)}
        fitted = Normaliser.fit(y[:count], "channel")
        task = Task("dense", self.outline.input_shape, self.outline.output_shape, fitted, typical_norm(y[:count]))
        notes = (*check_inputs(parts, inputs), *check_targets(parts, task))
        return Parts(task, parts["train"], parts["val"], parts["test"], inputs.encode, inputs=inputs, notes=notes)

    def _fields(self, part: int, count: int) -> Float[Tensor, "n c k k"]:
        fields = random_field(count * _CHANNELS, self.k, seed=self.data_seed, stream=part)
        return torch.from_numpy(fields.reshape(count, _CHANNELS, self.k, self.k).astype(np.float32))

    def _teacher(self) -> Callable[[Tensor], Tensor]:
        backbone = dict(self.backbone)
        if backbone["pretrained"] == "shipped":
            backbone["pretrained"] = str(shipped(backbone["shipped"]))
        with torch.random.fork_rng():
            torch.manual_seed(self.data_seed)
            model = create_model(backbone, self.outline, "pretrained", self.predictor)
        plant(model, self.pattern, self.rank, self.strength, self.data_seed)
        return torch.no_grad()(model.eval())


@torch.no_grad()
def plant(model: OrcaModel, pattern: str, rank: int, strength: float, seed: int) -> None:
    """Add ΔW = strength ‖W‖ BA / ‖BA‖, A and B Gaussian of the given rank, to the Linear modules that a pattern names.

    Raises:
        ValueError: if it names none.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adaptable_layers(model.body, pattern):
        weight = matrix_of(model.body, layer.name).weight
        b, a = (torch.randn(shape, generator=generator) for shape in ((layer.d_out, rank), (rank, layer.d_in)))
        update = b @ a  # (d_out, d_in)
        weight += strength * weight.norm() / update.norm() * update.to(weight).view_as(weight)
