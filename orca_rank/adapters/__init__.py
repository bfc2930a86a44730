"""Adapters for the matrices of a frozen model: small modules, strict injection, exact merging, PEFT's file layout."""

from orca_rank.adapters.block_diagonal import BlockDiagonalLoRA
from orca_rank.adapters.blocks import set_memory
from orca_rank.adapters.bottleneck import Bottleneck
from orca_rank.adapters.conv import AdaptedConv2d
from orca_rank.adapters.dylora import DyLoRA, cut, evaluate_ranks, set_rank
from orca_rank.adapters.elastic import ElaLoRA
from orca_rank.adapters.gated import GatedLoRA, prune
from orca_rank.adapters.inject import (
    adapter_state_dict,
    describe,
    inject,
    load_adapter_state_dict,
    merge,
    trainable_adapter_parameters,
    unload,
    unmerge,
)
from orca_rank.adapters.linear import AdaptedLinear, adapted, adapters
from orca_rank.adapters.lora import LoRA, NotExpressible
from orca_rank.adapters.matryoshka import MatryoshkaLoRA
from orca_rank.adapters.mixers import FLoRA, MoSLoRA, TwoSubspaces
from orca_rank.adapters.peft_backed import PeftAdapter
from orca_rank.adapters.peft_format import load_peft, save_peft
from orca_rank.adapters.probe import probe
from orca_rank.adapters.quantised import QLoRA, paged_adamw
from orca_rank.adapters.steps import (
    Steps,
    begin_step,
    end_step,
    extra_loss,
    moved_ranks,
    parameter_groups,
    scales,
)
from orca_rank.adapters.variants import Additive, DeltaLoRA, ReRandomised

__all__ = [
    "AdaptedConv2d",
    "AdaptedLinear",
    "Additive",
    "BlockDiagonalLoRA",
    "Bottleneck",
    "DeltaLoRA",
    "DyLoRA",
    "ElaLoRA",
    "FLoRA",
    "GatedLoRA",
    "LoRA",
    "MatryoshkaLoRA",
    "MoSLoRA",
    "NotExpressible",
    "PeftAdapter",
    "QLoRA",
    "ReRandomised",
    "Steps",
    "TwoSubspaces",
    "adapted",
    "adapter_state_dict",
    "adapters",
    "begin_step",
    "cut",
    "describe",
    "end_step",
    "evaluate_ranks",
    "extra_loss",
    "inject",
    "load_adapter_state_dict",
    "load_peft",
    "merge",
    "moved_ranks",
    "paged_adamw",
    "parameter_groups",
    "probe",
    "prune",
    "save_peft",
    "scales",
    "set_memory",
    "set_rank",
    "trainable_adapter_parameters",
    "unload",
    "unmerge",
]
