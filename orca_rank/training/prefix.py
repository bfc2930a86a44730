"""What a body's frozen first stages give, computed once a sample where the embedder is frozen too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from operator import or_
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from orca_rank.backbone import OrcaModel
from orca_rank.backbone.families import feature_info
from orca_rank.measuring.passes import watch
from orca_rank.training.forwards import replace_forward
from orca_rank.words import size

GIB = 2**30
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_stages(model: OrcaModel) -> list[str]:
    """The stages, or blocks, of the body before the first that is trained, in order; none where the embedder is
    trained, or something that stands beside the stages."""
    names = [str(stage["module"]) for stage in feature_info(model.body)]
    trained = [name for name, parameter in model.body.named_parameters() if parameter.requires_grad]
    beside = [name for name in trained if not name.startswith(tuple(f"{stage}." for stage in names))]
    if beside or any(parameter.requires_grad for parameter in model.embedder.parameters()):
        return []
    free = (any(one.startswith(f"{name}.") for one in trained) for name in names)
    return [name for name, taken in zip(names, accumulate(free, or_), strict=True) if not taken]


def before_chance(model: OrcaModel, names: Sequence[str]) -> list[str]:
    """Those of the stages that give the same for a sample each time: before the first dropout or stochastic depth."""
    drawn = (_draws(model.body.get_submodule(name)) for name in names)
    begin = _draws(model.embedder)
    return [name for name, taken in zip(names, accumulate(drawn, or_), strict=True) if not (begin or taken)]


def _draws(module: nn.Module) -> bool:
    return any(getattr(part, name, None) for part in module.modules() for name in ("p", "drop_prob"))


class FrozenPrefix(Callback):
    """Keeps what the frozen stages give for every sample, from one pass before the first step, and hands it on in place
    of computing it again. What it has not seen, such as an augmented sample, is computed as ever.

    A sample is known by its content, so that the order of batches, and which process sees which, does not matter. The
    pass is in the order of the data: what is kept does not depend on when a run began.

    Args:
        batches: of inputs as training and validation give them, (x, y), called once. limit: GiB that may be kept.
        say: told what is kept, or why nothing is.
    """

    def __init__(
        self, batches: Sequence[Callable[[], DataLoader]], limit: float, say: Callable[[str], object] = print
    ) -> None:
        self.batches, self.limit, self.say = batches, limit, say
        self.rows: dict[tuple[int, int], int] = {}
        self.kept: dict[str, Tensor] = {}  # stage -> (samples, ...)
        self.batch: list[int] | None = None
        self.factors: Tensor | None = None
        self.undo: list[Callable[[], object]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        model: Any = module.model
        frozen = frozen_stages(model)
        names = before_chance(model, frozen)
        if frozen and not names:
            self.say(
                "frozen stages skip blocks or values at random, so they are computed in every epoch; once would do "
                "with +backbone.options.drop_path_rate=0"
            )
        if names:
            with torch.random.fork_rng(), trainer.precision_plugin.train_step_context():
                self.fill(model, names, lambda x: trainer.precision_plugin.convert_input(x.to(module.device)))

    def fill(self, model: OrcaModel, names: Sequence[str], prepare: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """One pass over the samples, and from then on the model's frozen stages are looked up.

        Args:
            names: see `frozen_stages`, `before_chance`. prepare: from a batch as the loader gives it to one as the
                model takes it.
        """
        body = model.body
        reads = getattr(model.predictor, "reads", None) or ()
        read = {str(feature_info(body)[place]["module"]) for place in reads}
        wanted = [name for name in names if name in read or name == names[-1]]
        if not self._look(model, wanted, prepare):
            return
        for name in names:
            stage = body.get_submodule(name)
            self.undo.append(replace_forward(stage, partial(self._stage, name, stage.forward)))
        self.undo.append(model.register_forward_pre_hook(lambda _, args: self._know(args[0])).remove)
        self.undo.append(model.register_forward_hook(lambda *_: self._forget()).remove)
        kept = size(sum(values.nbytes for values in self.kept.values()))
        self.say(f"{len(names)} of {len(feature_info(body))} stages are frozen: computed once a sample ({kept})")

    def _look(self, model: OrcaModel, wanted: Sequence[str], prepare: Callable[[Tensor], Tensor]) -> bool:
        """Fill what is kept; False, and nothing is, where it would be too much or a stage gives something else."""
        found: dict[str, Tensor] = {}
        stages = {name: model.body.get_submodule(name) for name in wanted}
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), watch(stages, lambda name, _, out: found.update({name: out})):
                for x in self._inputs():
                    ready = prepare(x)
                    model.body(model.embedder(ready))
                    if not all(isinstance(found.get(n), Tensor) and len(found[n]) == len(x) for n in wanted):
                        return False  # a family whose stages give more than tokens, sample by sample
                    self._keep(ready, found)
        except _TooMuchError as error:
            self.say(str(error))
            return False
        finally:
            model.train(training)
        return bool(self.rows)

    def _inputs(self) -> Iterable[Tensor]:
        for make in self.batches:
            for batch in make():
                yield batch[0]

    def _keep(self, x: Tensor, found: dict[str, Tensor]) -> None:
        if not self.kept:
            total = sum(len(make().dataset) for make in self.batches)  # type: ignore[arg-type, misc]  # sized
            bytes_ = total * sum(values[0].nbytes for values in found.values())
            if bytes_ > self.limit * GIB:
                raise _TooMuchError(
                    f"what the frozen stages give would take {size(bytes_)}, more than finetune.cache={self.limit:g}: "
                    f"it is computed in every epoch"
                )
            self.kept = {name: values.new_empty(total, *values.shape[1:]) for name, values in found.items()}
        start = len(self.rows)
        places = [self.rows.setdefault(key, len(self.rows)) for key in self._keys(x)]
        new = [(place, i) for i, place in enumerate(places) if place >= start]
        if new:
            to, of = (list(each) for each in zip(*new, strict=True))
            for name, values in found.items():
                self.kept[name][to] = values[of]

    def _keys(self, x: Tensor) -> list[tuple[int, int]]:
        """Two 64-bit multilinear hashes (Dietzfelbinger 1996) of every sample's bytes."""
        words = x.detach().contiguous().flatten(1).view(WORDS[x.element_size()]).to(torch.int64)  # (B, words)
        if self.factors is None:
            draws = torch.Generator().manual_seed(0)
            self.factors = torch.randint(-(2**63), 2**63 - 1, (2, words.shape[1]), generator=draws).to(x.device)
        first, second = ((words * factor).sum(1).tolist() for factor in self.factors)
        return list(zip(first, second, strict=True))

    def _know(self, x: Tensor) -> None:
        places = [self.rows.get(key) for key in self._keys(x)]
        known = [place for place in places if place is not None]
        self.batch = known if len(known) == len(places) else None

    def _forget(self) -> None:
        self.batch = None

    def _stage(self, name: str, forward: Callable[..., Any], x: Any, *args: Any, **options: Any) -> Any:
        if self.batch is None:
            return forward(x, *args, **options)
        return (
            self.kept[name][self.batch] if name in self.kept else x
        )  # what comes between two that are kept is not used

    def close(self) -> None:
        """The model as it was."""
        for undo in self.undo:
            undo()
        self.undo, self.rows, self.kept, self.batch = [], {}, {}, None

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.close()


class _TooMuchError(Exception):
    """What would be kept is more than may be."""
