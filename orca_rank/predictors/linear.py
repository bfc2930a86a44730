"""Token mean and one linear map: the predictor for classes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ClassPredictor(nn.Module):
    """Token mean → Linear.

    Args:
        width: features d of the body. classes: outputs. prefix: class and register tokens to leave out of the mean.
    """

    def __init__(self, width: int, classes: int, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix
        self.fc = nn.Linear(width, classes)

    def forward(self, features: Float[Tensor, "b ... d"]) -> Float[Tensor, "b classes"]:
        tokens = features.flatten(1, -2)[:, self.prefix :]  # (B, ..., d) -> (B, N, d)
        return self.fc(tokens.mean(1))
