"""predictor(body(embedder(x)))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.backbone.embedder import settle
from orca_rank.backbone.families import feature_info, maps_of
from orca_rank.measuring.passes import watch


class OrcaModel(nn.Module):
    """predictor(body(embedder(x))); x (B, C, H, W), the output as the task asks.

    What a predictor receives is said in `orca_rank.predictors`. Batch normalisation in the body keeps its statistics,
    in training too.
    """

    def __init__(self, embedder: nn.Module, body: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.embedder, self.body, self.predictor = embedder, body, predictor

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        return self.head(self.embedder(x))

    def head(self, tokens: Float[Tensor, "b ... d"]) -> Tensor:
        """The output from the embedder's tokens."""
        reads = getattr(self.predictor, "reads", None)
        return self.predictor(self.body(tokens) if reads is None else self.maps(tokens, reads))

    def output_and_last(self, tokens: Float[Tensor, "b ... d"]) -> tuple[Tensor, Float[Tensor, "b _h _w _d"]]:
        """`head`, and the last stage's map from the same pass."""
        reads = getattr(self.predictor, "reads", None)
        if reads is not None:
            *maps, last = self.maps(tokens, [*reads, -1])
            return self.predictor(maps), last
        whole, name = self.body(tokens), str(feature_info(self.body)[-1]["module"])
        size: Any = self.embedder.image_size
        return self.predictor(whole), maps_of(self.body, {name: whole}, [name], size)[0]

    def maps(self, tokens: Float[Tensor, "b ... d"], reads: Sequence[int]) -> list[Float[Tensor, "b _h _w _d"]]:
        """Feature maps of the stages `reads`. Those before the last are watched for this call, so the body keeps its
        names, its adapters and its own forward pass."""
        names = [str(info["module"]) for info in feature_info(self.body)]
        wanted = [names[i] for i in reads]
        found: dict[str, Any] = {}
        modules = {name: self.body.get_submodule(name) for name in {*wanted} - {names[-1]}}
        with watch(modules, lambda name, _, x: found.update({name: x})):
            found[names[-1]] = self.body(tokens)
        size: Any = self.embedder.image_size
        return maps_of(self.body, found, wanted, size)

    def train(self, mode: bool = True) -> OrcaModel:
        super().train(mode)
        settle(self.body)
        return self
