"""Put adapters into a model, fold them in and out, and carry their tensors."""

import logging
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor, nn

from orca_rank.adapters.blocks import set_memory
from orca_rank.adapters.conv import AdaptedConv2d, check_adapter, check_convolution
from orca_rank.adapters.linear import THIRDS, WHOLE, AdaptedLinear, adapted, adapters, replace
from orca_rank.adapters.lora import LoRA
from orca_rank.adapters.peft_backed import PeftAdapter, tuner_of
from orca_rank.adapters.reads import read_layers
from orca_rank.ranks import RankPlan

log = logging.getLogger(__name__)
# A mapping's values are checked one by one, with the layer's name, so that the annotation leaves them open.
Ranks = RankPlan | Mapping[str, Any]


@overload
def inject(
    model: nn.Module,
    plan: Ranks,
    adapter: Callable[..., LoRA] = LoRA,
    *,
    memory: str = "auto",
    freeze: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, LoRA]: ...


@overload
def inject(
    model: nn.Module,
    plan: Ranks,
    adapter: PeftAdapter,
    *,
    memory: str = "auto",
    freeze: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]: ...


def inject(
    model: nn.Module,
    plan: object,
    adapter: Callable[..., LoRA] | PeftAdapter = LoRA,
    *,
    memory: str = "auto",
    freeze: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, LoRA] | dict[str, nn.Module]:
    """Adapt the named layers of ``model`` in place, each at the rank that the plan gives it.

    A name is a module path inside ``model``. ``<module>.q``, ``.k`` and ``.v`` adapt the thirds of a fused Linear
    (out_features divisible by 3) separately, as LoRA does on models with three matrices. A Conv2d (groups=1), such as
    the patch embedding, takes plain LoRA of its matrix (out, C kh kw). Rank 0 leaves a layer alone; a plan that adapts
    no layer at all is logged as a warning. Layers whose weight the model reads without calling them (see `reads`) are
    adapted through that weight. Everything is checked before anything is changed; `probe` shows that all take part.

    Args:
        model: any module that contains the layers.
        plan: a RankPlan, or a mapping layer -> rank (an integer of at least 0).
        adapter: ``adapter(weight, rank, name=..., generator=...)`` -> LoRA or a subclass, e.g. LoRA itself or a partial
            of it; or a PeftAdapter.
        memory: what a training step keeps: ``auto`` | ``lean`` | ``fast`` | ``plain``, see `set_memory`.
        freeze: freeze every parameter that ``model`` had, so that exactly the adapters' train.
        generator: source of the random initial values.

    Returns:
        layer -> adapter for every rank above 0; `describe` prints it.

    Raises:
        KeyError: for a name that is no module. TypeError: for another plan, a module that is neither Linear nor Conv2d,
            a rank that is no integer, or another adapter than LoRA on a Conv2d.
        ValueError: for a negative rank, a rank above min(d_in, d_out) unless ``plan.allow_above_full``, a matrix
            adapted both fused and in thirds, a model that already has adapters, or dropout, a Bottleneck or PEFT on a
            layer whose weight is read.
    """
    if isinstance(plan, RankPlan):
        ranks, above = plan.ranks, plan.allow_above_full
    elif isinstance(plan, Mapping):
        ranks, above = plan, False
    else:
        raise TypeError(f"plan is a {type(plan).__name__}; expected a RankPlan or a mapping of layer to rank")
    if tuner_of(model):
        raise ValueError("the model is adapted by PEFT already; start from a bare model")
    if present := adapted(model):
        raise ValueError(f"the model is adapted already ({len(present)} layers): call unload(model) first")
    targets = _check(model, ranks, above)
    if not targets:
        log.warning("the rank plan names %d layers, none of them at a rank above 0: nothing is adapted", len(ranks))
    read = read_layers(model, [name for name, (base, _) in targets.items() if isinstance(base, nn.Linear)])
    if isinstance(adapter, PeftAdapter):
        if read:
            raise ValueError(
                f"{read[0]}: the model reads its weight without calling it, so that PEFT's layer never runs"
            )
        return _with_peft(model, targets, adapter, freeze)
    build = {
        module: {
            part: adapter(_rows(base.weight, part), rank, name=_name(module, part), generator=generator)
            for part, rank in parts.items()
        }
        for module, (base, parts) in targets.items()
    }
    for module, (base, _) in targets.items():
        for branch in build[module].values():
            if not isinstance(branch, LoRA):
                raise TypeError(f"{module}: adapter made a {type(branch).__name__}; expected LoRA or a subclass of it")
        if isinstance(base, nn.Conv2d):
            check_adapter(module, build[module][WHOLE])
    for module in read:
        _check_read(module, build[module])
    if freeze:
        model.requires_grad_(False)
    for module, branches in build.items():
        layer = _host(targets[module][0], branches)
        if isinstance(layer, AdaptedLinear):
            layer.is_read = module in read
        replace(model, module, layer)
    set_memory(model, memory)
    found = adapters(model)
    log.info("%s", describe(model))
    return found


Targets = dict[str, tuple[nn.Linear | nn.Conv2d, dict[str, int]]]  # module path -> layer, part -> rank above 0


def _with_peft(model: nn.Module, targets: Targets, adapter: PeftAdapter, freeze: bool) -> dict[str, nn.Module]:
    if thirds := [name for name, (_, parts) in targets.items() if WHOLE not in parts]:
        raise ValueError(f"{thirds[0]}: PEFT adapts whole matrices; adapt q, k and v fused")
    for name, (base, _) in targets.items():
        if isinstance(base, nn.Conv2d):
            check_adapter(name, adapter)
    if not freeze:
        raise ValueError("PEFT freezes the model itself; leave freeze=True")
    model.requires_grad_(False)
    return adapter.into(model, {name: parts[WHOLE] for name, (_, parts) in targets.items()}) if targets else {}


def _check(model: nn.Module, ranks: Mapping[str, Any], above: bool) -> Targets:
    """The layers to adapt, or an error about the first entry that does not fit."""
    modules = dict(model.named_modules())
    targets: Targets = {}
    named: dict[str, set[str]] = {}
    for name, rank in ranks.items():
        module, base, part = _resolve(modules, name)
        if isinstance(rank, bool) or not isinstance(rank, Integral):
            raise TypeError(f"{name}: rank is {rank!r}; expected an integer")
        rank = int(rank)
        d_out, d_in = base.weight.flatten(1).shape
        full = min(d_in, d_out if part == WHOLE else d_out // 3)
        if rank < 0:
            raise ValueError(f"{name}: rank is {rank}; expected 0 or more (0 leaves the layer alone)")
        if rank > full and not above:
            raise ValueError(
                f"{name}: rank is {rank} but the matrix has full rank {full}; lower it, or use "
                "RankPlan(ranks, allow_above_full=True)"
            )
        named.setdefault(module, set()).add(part)
        if WHOLE in named[module] and len(named[module]) > 1:
            raise ValueError(f"{module} is adapted both as a whole and in thirds ({name}); choose one")
        if rank:
            targets.setdefault(module, (base, {}))[1][part] = rank
    return {module: (base, {p: parts[p] for p in (WHOLE, *THIRDS) if p in parts})
            for module, (base, parts) in targets.items()}  # fmt: skip


def _resolve(modules: Mapping[str, nn.Module], name: Any) -> tuple[str, nn.Linear | nn.Conv2d, str]:
    """A plan's name -> module path, the layer there, and part."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"a layer is named {name!r}; expected a module path (wrap a bare Linear in a Sequential)")
    module, part = name, WHOLE
    if name not in modules:
        module, _, part = name.rpartition(".")
        if part not in THIRDS or module not in modules:
            linear = [path for path, found in modules.items() if isinstance(found, nn.Linear)]
            raise KeyError(f"no module is called {name!r}; the Linear layers are {linear[:8]} ({len(linear)} in all)")
    base = modules[module]
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise TypeError(f"{name} is a {type(base).__name__}; only nn.Linear and nn.Conv2d can be adapted")
    if isinstance(base, nn.Conv2d):
        check_convolution(name, base)
    if part != WHOLE and (isinstance(base, nn.Conv2d) or base.out_features % 3):
        raise ValueError(f"{name}: {module} has {len(base.weight)} outputs, which do not split into q, k and v")
    if not base.weight.is_floating_point():
        raise TypeError(f"{name}: its weight is {base.weight.dtype}; expected a floating-point matrix")
    return module, base, part


def _check_read(name: str, branches: Mapping[str, LoRA]) -> None:
    """Refuse what a weight that is read cannot carry: something done to the input, or no ΔW."""
    for branch in branches.values():
        if branch.dropout > 0 or not branch.low_rank:
            what = f"dropout={branch.dropout} of its input" if branch.low_rank else f"a {type(branch).__name__}"
            raise ValueError(
                f"{name}: the model reads this layer's weight without calling the layer, where {what} cannot act; "
                "set dropout=0 and take an adapter with a ΔW, or leave the layer out of the rank plan"
            )


def _host(base: nn.Linear | nn.Conv2d, branches: Mapping[str, LoRA]) -> nn.Module:
    """The layer that takes the place of ``base``."""
    if isinstance(base, nn.Conv2d):
        return AdaptedConv2d(base, branches)
    host = type(next(iter(branches.values()))).host or AdaptedLinear
    return host(base, branches)


def _name(module: str, part: str) -> str:
    return module if part == WHOLE else f"{module}.{part}"


def _rows(weight: Tensor, part: str) -> Tensor:
    """The matrix that a part adapts; a convolution's is its flattened kernel."""
    matrix = weight.detach().flatten(1)
    return matrix if part == WHOLE else matrix.chunk(3)[THIRDS.index(part)]


def describe(model: nn.Module) -> str:
    """What is adapted: a line for each layer with its shape, rank and trainable parameters, and the total."""
    found = adapters(model)
    counts = {name: sum(p.numel() for p in a.parameters() if p.requires_grad) for name, a in found.items()}
    width = max((len(name) for name in found), default=0)
    lines = [
        f"{name:<{width}}  {type(a).__name__}  {a.d_in} -> {a.d_out}  rank {a.rank:>4}  {counts[name]:>9,}"
        for name, a in found.items()
    ]
    return "\n".join([*lines, f"{len(found)} layers adapted, {sum(counts.values()):,} trainable parameters"])


def merge(model: nn.Module) -> None:
    """Fold every ΔW into its W₀. Doing it twice changes nothing; W₀ is kept aside until `unmerge` or `unload`."""
    for module in adapted(model).values():
        module.merge()
    if tuner := tuner_of(model):
        tuner.merge()


def unmerge(model: nn.Module) -> None:
    """Give every W₀ its very bits back."""
    for module in adapted(model).values():
        module.unmerge()
    if tuner := tuner_of(model):
        tuner.unmerge()


def unload(model: nn.Module) -> None:
    """Replace every adapted layer by a plain one with the weight it has now: call `merge` first to keep ΔW."""
    set_memory(model, "plain")
    for name, module in adapted(model).items():
        replace(model, name, module.bare())


def trainable_adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters that learn."""
    if tuner_of(model):
        return [p for p in model.parameters() if p.requires_grad]
    return [p for adapter in adapters(model).values() for p in adapter.parameters() if p.requires_grad]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their names in ``model.state_dict()``; nothing of the model they sit in."""
    if tuner_of(model):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        f"{name}.branches.{key}": value.detach()
        for name, module in adapted(model).items()
        for key, value in module.branches.state_dict().items()
    }


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `adapter_state_dict` back, strictly.

    Raises:
        KeyError: for missing or unexpected tensors. ValueError: for a shape that differs. TypeError: for another dtype.
    """
    merged = [name for name, module in adapted(model).items() if module.merged]
    if merged:
        raise ValueError(f"{merged[0]} is merged; call unmerge(model) before loading other adapters")
    own = adapter_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise KeyError(f"adapters do not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, value in own.items():
        given = state[name]
        if given.shape != value.shape:
            raise ValueError(f"{name}: the file has shape {tuple(given.shape)}, the model {tuple(value.shape)}")
        if given.dtype != value.dtype:
            raise TypeError(f"{name}: the file has {given.dtype}, the model {value.dtype}; convert it first")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
