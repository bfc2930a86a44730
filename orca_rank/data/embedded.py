"""A sample of source data as the tokens of a backbone's own patch embedding: source features without the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from orca_rank.artifacts.damaged import DamagedFile
from orca_rank.artifacts.files import atomic
from orca_rank.artifacts.provenance import contents_hash
from orca_rank.backbone import Embedder, weights_hash
from orca_rank.data.array_files import read_npz
from orca_rank.data.module import InMemory, Parts
from orca_rank.data.splits import stratified_order
from orca_rank.task import Task
from orca_rank.weights import shipped

STEP = 1 / 6  # of the rotated tokens, whose variance after LayerNorm is about 1: 5 % of error in 3 bits a value
ARRAYS = ("tokens", "labels", "means", "mean_labels", "centre", "rotation", "image_shape", "classes", "embedder")


@dataclass(frozen=True)
class Unpack:
    """Stored tokens (B, ..., d) int8 to the embedder's tokens, float32: STEP · q Rᵀ + c, R (d, d) a rotation."""

    rotation: Float[Tensor, "d d"]
    centre: Float[Tensor, " d"]

    def __call__(self, q: Tensor) -> Tensor:
        return STEP * q.float() @ self.rotation.T + self.centre


class Embedded(InMemory):
    """What the patch embedding of one backbone makes of a sample of its source: a source for stage=align and measure.

    Batches hold tokens in place of images, so the embedder is left out; `means` has the token means of more images,
    for alignment. There is no validation or test part.

    Args:
        file: an npz that stage=pretrain wrote, or the name of weights that come with the package.
        batch_size, seed: see `InMemory`.

    Raises:
        FileNotFoundError: no such file. DamagedFile: a file of something else, or what is left of one.
    """

    embedded = True

    def __init__(self, *, file: str = "swin_micro", batch_size: int = 32, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        self.path = Path(file) if Path(file).suffix else shipped(file, "source")
        if not self.path.is_file():
            raise FileNotFoundError(f"no source tokens at {self.path}: set source.file to what stage=pretrain wrote")
        try:
            self.arrays = read_npz(self.path, ARRAYS)
            _check(self.arrays)
        except (KeyError, ValueError) as error:
            reason = error.__cause__ or error.args[0]
            raise DamagedFile(
                f"{self.path} does not hold source tokens ({reason}): source.file takes what stage=pretrain wrote"
            ) from error

    @property
    def contents(self) -> str:
        return contents_hash([self.path])

    def load(self) -> Parts:
        a = self.arrays
        x, y = torch.from_numpy(a["tokens"]), torch.from_numpy(a["labels"].astype(np.int64))
        channels, height, width = a["image_shape"].tolist()
        return Parts(
            task=Task("classification", (channels, height, width), (int(a["classes"]),)),
            train=(x, y),
            val=(x[:0], y[:0]),
            test=(x[:0], y[:0]),
            encode=Unpack(torch.from_numpy(a["rotation"]), torch.from_numpy(a["centre"])),
        )

    def means(self, limit: int) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """Token means of up to `limit` images, and their classes."""
        means = torch.from_numpy(self.arrays["means"][:limit].astype(np.float32))
        return means, torch.from_numpy(self.arrays["mean_labels"][:limit].astype(np.int64))

    def check(self, embedder: Embedder, pretrained: bool = True) -> None:
        """Raise ValueError if the tokens were made by another embedder than this one.

        A body from scratch (pretrained=False) has no source of its own: tokens of the right shape will do for it.
        """
        shape = embedder.grid[0] * embedder.grid[1], embedder.width
        tokens = self.arrays["tokens"]  # (p, N, d) or (p, h, w, d)
        fits = (np.prod(tokens.shape[1:-1]), tokens.shape[-1]) == shape
        if not fits or (pretrained and str(self.arrays["embedder"]) != weights_hash(embedder)):
            raise ValueError(
                f"the source tokens in {self.path.name} belong to another backbone than the configured: give images "
                f"instead (source=digits, tiny_imagenet, cifar10_5k, imagenet_1k, image_folder or arrays), or set "
                f"source.file to the source.npz that stage=pretrain wrote with these weights"
            )


def _check(a: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless the arrays fit each other."""
    width, count, means = a["centre"].size, len(np.atleast_1d(a["tokens"])), len(np.atleast_1d(a["means"]))
    shapes = {"labels": (count,), "means": (means, width), "mean_labels": (means,), "centre": (width,)}
    shapes |= {"rotation": (width, width), "image_shape": (3,), "classes": (), "embedder": ()}
    wrong = [f"{name} {a[name].shape}" for name, shape in shapes.items() if a[name].shape != shape]
    if a["tokens"].ndim not in (3, 4) or a["tokens"].shape[-1] != width or a["tokens"].dtype != np.int8:
        wrong.append(f"tokens {a['tokens'].shape} {a['tokens'].dtype}")
    numbers = [name for name in shapes if name != "embedder" and a[name].dtype.kind not in "iuf"]
    if wrong or numbers or a["embedder"].dtype.kind != "U":
        raise ValueError(f"arrays that do not fit each other: {', '.join(wrong or numbers or ['embedder'])}")
    for name in ("labels", "mean_labels"):
        if a[name].size and not 0 <= a[name].min() <= a[name].max() < a["classes"]:
            raise ValueError(f"{name} from {a[name].min()} to {a[name].max()} for {a['classes']} classes")


@torch.no_grad()
def write_embedded(path: Path, embedder: nn.Module, parts: Parts, tokens: int = 256, means: int = 2000) -> None:
    """Write what `Embedded` reads, of training images with the classes in their proportions.

    Args:
        embedder: images (B, C, H, W) -> tokens (B, ..., d). parts: the source. tokens, means: images, at most.
    """
    x, y = parts.train
    order = torch.from_numpy(stratified_order(y.numpy(), 0)[:means])
    pieces: list[Tensor] = []
    averages: list[Tensor] = []
    for index in order.split(64):
        made = embedder(parts.encode(x[index]))  # (b, ..., d)
        averages.append(made.flatten(1, -2).mean(1))
        if sum(map(len, pieces)) < tokens:
            pieces.append(made)
    kept = torch.cat(pieces)[:tokens]
    rows = kept.flatten(0, -2)
    centre = rows.mean(0)
    rotation = torch.linalg.svd(rows - centre, full_matrices=False)[2].T.contiguous()  # (d, d)
    arrays = {
        "tokens": ((kept - centre) @ rotation / STEP).round().clamp(-127, 127).to(torch.int8),
        "labels": y[order[: len(kept)]].int(),
        "means": torch.cat(averages).half(),
        "mean_labels": y[order].int(),
        "centre": centre,
        "rotation": rotation,
        "image_shape": torch.tensor(parts.task.input_shape),
        "classes": torch.tensor(parts.task.output_shape[0]),
    }
    with atomic(path) as temporary, temporary.open("wb") as stream:
        numbers = {name: value.numpy() for name, value in arrays.items()}
        np.savez_compressed(stream, embedder=np.array(weights_hash(embedder)), **numbers)
