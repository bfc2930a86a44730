"""Token mean and one linear map: ORCA's predictor for classes (arXiv 2302.05738, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from orca_rank.predictors import Stages


class TokenMean(nn.Module):
    """y = W mean_j(x_j) + b over the tokens j of the last stage.

    Args:
        stages: of the body. output_shape: (classes,), (labels,) or (numbers,).

    Raises:
        ValueError: for a field or a segmentation.
    """

    reads = (-1,)

    def __init__(self, stages: Stages, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(output_shape) != 1:
            raise ValueError(
                f"this predictor is for classes, labels and vectors, the task asks for a field or a segmentation "
                f"{output_shape}: set predictor=multiscale or predictor=orca"
            )
        self.fc = nn.Linear(stages.widths[-1], output_shape[0])

    def forward(self, maps: Sequence[Float[Tensor, "b h w d"]]) -> Float[Tensor, "b classes"]:
        return self.fc(maps[0].mean((1, 2)))  # (B, h, w, d) -> (B, d) -> (B, classes)
