"""PaRe (Cai et al. 2024, ICML): a fine-tune whose batches also pass with some of their tokens replaced by the source's.

Read from the paper's abstract and its authors' code (BIT-DA/PaRe, src/main_PaRe_dense.py and configs/darcy_PaRe.yaml):

- a gate, Linear(d, 1) and a sigmoid, scores the embedder's tokens of a target image and of a source image;
- of T places, the T − k best tokens of the target stay where they are, and the k best tokens of the source take the
  other places, both in the order of their places;
- for the first epochs (ten of a hundred) the best are drawn: Gumbel noise on the scores, a relaxed top k (Xie and Ermon
  2019) whose gradient the gate gets, and exact zeros and ones forward; then the best are taken, and the gate rests;
- k falls linearly with the epoch, and with λ = k / T

      L = L(target, y_t) + w [ (1 − λ) L(mix, y_t) + λ L_src(mix, y_s) ].

Of the code's two ways with classes, two heads (its configs) and one softmax over the target's and the source's (its
`multilabel`), this is the second: the predictor's scores and, beside them, those of a linear map of the last stage's
mean to the source's classes. L(target) is over the target's classes alone, as it is judged. Targets of another kind
leave the source's classes to that map alone (the code compares its one output with the foreground of PASCAL's masks,
which a source of classes has not).

Where the code differs from itself: once nothing is drawn, it replaces the *best* tokens of the target, which the
abstract and its own first epochs keep; `replaced: best` does so. In its configs "end_num" is what k falls by, not what
it falls to (the same for Darcy, 1000 and 500 of 3136; not for its class tasks, 2000 and 1500, where w is 1 too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from orca_rank.backbone import OrcaModel
from orca_rank.options import number, one_of
from orca_rank.task import Task


@dataclass(frozen=True)
class PareOptions:
    """`conf/finetune/curriculum/pare.yaml` says what each option is.

    Raises:
        ValueError: for a value that means nothing, naming the option.
    """

    name: str
    begin: float
    end: float
    weight: float
    drawn: float
    temperature: float
    replaced: str

    def __post_init__(self) -> None:
        one_of("finetune.curriculum.name", self.name, ("pare",))
        number("finetune.curriculum.begin", self.begin, least=0, most=1)
        number("finetune.curriculum.end", self.end, least=0, most=self.begin)
        number("finetune.curriculum.weight", self.weight, least=0)
        number("finetune.curriculum.drawn", self.drawn, least=0, most=1)
        number("finetune.curriculum.temperature", self.temperature, above=0)
        one_of("finetune.curriculum.replaced", self.replaced, ("worst", "best"))

    def count(self, epoch: int, epochs: int, tokens: int) -> int:
        """k of an epoch 0, 1, …: from `begin` of the tokens linearly towards `end`, where epoch number `epochs` would
        be."""
        return round(tokens * (self.begin + (self.end - self.begin) * epoch / epochs))


class Place(NamedTuple):
    """A batch of a run: its epoch and number there, its samples over all processes, and which process of how many."""

    epoch: int
    batch: int
    samples: int
    rank: int = 0
    size: int = 1

    def own(self, rows: Tensor) -> Tensor:
        """This process's rows of (samples, ...), see `orca_rank.data.shares.share`."""
        return rows[self.rank :: self.size] if len(rows) > self.rank else rows[:1]


class Lender:
    """Labelled source images in an order that depends on seed and epoch alone, so that a resumed run and several
    processes draw what an uninterrupted one does.

    Args:
        dataset: of (x, y), y classes. collate: what makes batches of it, as of a DataLoader.
    """

    def __init__(self, dataset: Dataset, collate: Any, seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def take(self, place: Place, batch_size: int) -> tuple[Tensor, Int[Tensor, " b"]]:
        """This process's images and classes beside a batch of the target; the source begins again when it ends.

        Args:
            batch_size: samples of a full batch.
        """
        dataset: Any = self.dataset
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + 100_003 * place.epoch + 314_159)
        order = torch.randperm(len(dataset), generator=draws)
        first = place.batch * batch_size
        chosen = place.own(order[torch.arange(first, first + place.samples) % len(order)]).tolist()
        found = dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[i] for i in chosen]
        x, y = self.collate(found)
        return x, y


def trained_parts(width: int, features: int, classes: int) -> nn.ModuleDict:
    """What PaRe trains beside the model: the gate of tokens of `width`, and the head from `features` of the body's last
    stage to the source's classes. Neither is needed to predict."""
    return nn.ModuleDict({"gate": nn.Linear(width, 1), "head": nn.Linear(features, classes)})


class PaRe(nn.Module):
    """w [(1 − λ) L(mix, y_t) + λ L_src(mix, y_s)] of a batch.

    Args:
        options: see `PareOptions`. task: the target's. lender: of source images. embedder: their pretrained embedder,
            which is not trained. parts: see `trained_parts`. epochs: of the run. seed: of the noise.
    """

    def __init__(
        self,
        options: PareOptions,
        task: Task,
        lender: Lender,
        embedder: nn.Module,
        parts: nn.ModuleDict,
        epochs: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.options, self.task, self.lender, self.epochs, self.seed = options, task, lender, epochs, seed
        self.embedder = embedder.requires_grad_(False)
        self.parts = parts

    def train(self, mode: bool = True) -> PaRe:
        super().train(mode)
        self.embedder.eval()
        return self

    def forward(
        self, model: OrcaModel, tokens: Float[Tensor, "b ... d"], y: Tensor, place: Place, batch_size: int
    ) -> Float[Tensor, ""]:
        """The term, a mean over this process's samples.

        Args:
            tokens: of the target images, as the embedder gives them. y: their targets. place, batch_size: of the batch.
        """
        x_source, y_source = self.lender.take(place, batch_size)
        with torch.no_grad():
            source = self.embedder(x_source.to(tokens.device)).flatten(1, -2).to(tokens.dtype)
        flat = tokens.flatten(1, -2)  # (B, ..., d) -> (B, T, d)
        count = self.options.count(place.epoch, self.epochs, flat.shape[1])
        mixed = self.mix(flat, source, count, place)
        output, last = model.output_and_last(mixed.view_as(tokens))
        share = count / flat.shape[1]
        on_target, on_source = self.losses(output, self.parts["head"](last.mean((1, 2))), y, y_source.to(tokens.device))
        return self.options.weight * ((1 - share) * on_target + share * on_source)

    def losses(
        self, output: Tensor, scores: Float[Tensor, "b n_s"], y: Tensor, y_source: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """L(mix, y_t) and L_src(mix, y_s) from the predictor's output and the source head's scores: classes of both in
        one softmax, other targets as they are trained on, apart from it."""
        if self.task.kind != "classification":
            return self.task.loss(output, y), F.cross_entropy(scores.float(), y_source)
        joint = torch.cat([output, scores], 1).float()  # (B, n + n_s)
        return F.cross_entropy(joint, y), F.cross_entropy(joint, output.shape[1] + y_source)

    def mix(
        self, target: Float[Tensor, "b T d"], source: Float[Tensor, "b T d"], count: int, place: Place
    ) -> Float[Tensor, "b T d"]:
        """The target's tokens with `count` of them replaced by the source's."""
        if place.epoch >= self.options.drawn * self.epochs:
            with torch.no_grad():
                best = self.options.replaced == "best"
                kept = one_hot_top(self.scores(target) * (-1 if best else 1), target.shape[1] - count)
                lent = one_hot_top(self.scores(source), count)
            return replace(target, source, kept, lent)
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + 100_003 * place.epoch + place.batch + 271_828_183)
        uniform = torch.rand(place.samples, 2, target.shape[1], generator=draws).clamp_min(torch.finfo().tiny)
        noise = place.own(-torch.log(-torch.log(uniform))).to(target.device)  # (B, 2, T), Gumbel
        temperature = self.options.temperature
        kept = straight_through_top(self.scores(target) + noise[:, 0], target.shape[1] - count, temperature)
        lent = straight_through_top(self.scores(source) + noise[:, 1], count, temperature)
        return replace(target, source, kept, lent)

    def scores(self, tokens: Float[Tensor, "b T d"]) -> Float[Tensor, "b T"]:
        """The gate's, in (0, 1)."""
        return self.parts["gate"](tokens)[..., 0].float().sigmoid()


def replace(
    target: Float[Tensor, "b T d"],
    source: Float[Tensor, "b T d"],
    kept: Float[Tensor, "b T"],
    lent: Float[Tensor, "b T"],
) -> Float[Tensor, "b T d"]:
    """The tokens of the target that are kept, at their places, and those of the source that are lent at the others, in
    order; each times its mask, through which the gate gets a gradient.

    Args:
        kept, lent: ones and zeros; of `lent` as many ones as of `kept` zeros.
    """
    count = target.shape[1] - int(kept[0].sum())
    free = kept.detach().argsort(dim=1, stable=True)[:, :count]  # (B, k): zeros before ones, in the order of places
    taken = (-lent.detach()).argsort(dim=1, stable=True)[:, :count]
    wide = (-1, -1, target.shape[2])
    tokens = (source * lent[..., None].to(source)).gather(1, taken[..., None].expand(wide))
    return (target * kept[..., None].to(target)).scatter(1, free[..., None].expand(wide), tokens)


def one_hot_top(scores: Float[Tensor, "b T"], k: int) -> Float[Tensor, "b T"]:
    """Ones at the k largest scores of every row, zeros elsewhere."""
    return torch.zeros_like(scores).scatter(1, scores.topk(k, 1).indices, 1.0)


def relaxed_top(scores: Float[Tensor, "b T"], k: int, temperature: float) -> Float[Tensor, "b T"]:
    """The relaxed top k of Xie and Ermon 2019 (Reparameterizable subset sampling, section 3.2): the sum of k softmaxes,
    each of the scores with what the ones before took away; rows sum to k."""
    chosen = taken = torch.zeros_like(scores)
    for _ in range(k):
        scores = scores + torch.log((1 - taken).clamp_min(torch.finfo(scores.dtype).tiny))
        taken = torch.softmax(scores / temperature, 1)
        chosen = chosen + taken
    return chosen


def straight_through_top(scores: Float[Tensor, "b T"], k: int, temperature: float) -> Float[Tensor, "b T"]:
    """Exact ones at the k largest entries of the relaxed top k and zeros elsewhere, with its gradient."""
    soft = relaxed_top(scores, k, temperature)
    return one_hot_top(soft.detach(), k) + (soft - soft.detach())
