"""Which adapter_config.json files say no more than the plain LoRA that is read here.

Every key is on one of three lists: without influence on what the stored tensors mean, read (see `peft_format`), or
refused with the reason. A key on none of them is refused as soon as it is set.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "init_lora_weights",
}
# Where adapters stand is read off the tensors; the rest tells PEFT how to find, start, store or place them.
WITHOUT_INFLUENCE = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Where W₀ stays as it is, so that the tensors stand beside the very weights of the bare model.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
REFUSED = {
    "fan_in_fan_out": "its matrices are stored transposed",
    "use_dora": "its matrices are normalised to learned magnitudes",
    "lora_bias": "its B has a bias of its own",
    "layer_replication": "it repeats layers of the model",
    "target_parameters": "it adapts Parameters that belong to no layer",
    "trainable_token_indices": "it stores rows of an embedding",
    "alora_invocation_tokens": "it acts from a token of the input on",
    "use_qalora": "it pools the input of A",
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(value: Any) -> bool:
    """Whether it is a table of regular expressions and numbers, or none."""
    if value is None:
        return True
    if not isinstance(value, Mapping) or not all(map(_number, value.values())):
        return False
    try:
        return all(re.compile(key) for key in value)
    except re.error:
        return False


KINDS = {
    "r": ("a whole number of at least 1", lambda value: _number(value) and value >= 1 and value == int(value)),
    "lora_alpha": ("a finite number", _number),
    "lora_dropout": ("a number in [0, 1)", lambda value: value is None or (_number(value) and 0 <= value < 1)),
    "use_rslora": ("true or false", lambda value: value in (None, True, False)),
    "rank_pattern": ("regular expressions and ranks", _patterns),
    "alpha_pattern": ("regular expressions and finite numbers", _patterns),
    "modules_to_save": ("a list of names", lambda value: value is None or isinstance(value, list)),
}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration whose tensors mean something else than W₀ + s B A on the bare model.

    Raises:
        ValueError: with the key, its value and the reason.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where} describes {config.get('peft_type')!r}; only 'LORA' is read here")
    for key, (expected, fits) in KINDS.items():
        if key in config and not fits(config[key]):
            raise ValueError(f"{where} sets {key}={config[key]!r}: expected {expected}")
    for key, value in config.items():
        if key in REFUSED and value:
            raise ValueError(f"{where} sets {key}={value!r}: {REFUSED[key]}, which plain LoRA cannot say")
        if key not in READ | WITHOUT_INFLUENCE | REFUSED.keys() and value not in (None, False, "", [], {}):
            raise ValueError(
                f"{where} sets {key}={value!r}, which is not known here and may change what its tensors mean; "
                "load it with PEFT, merge it and save the weights"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{where} sets bias={config['bias']!r}: it stores trained biases of the model's own layers, which adapters "
            "here leave as they are; load it with PEFT, merge it and save the weights"
        )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{where} sets init_lora_weights={start!r}: that start replaces W₀ by another matrix, beside which the "
            "tensors stand, or is not known here. Save it from PEFT with path_initial_model_for_weight_conversion, "
            "which writes the same update for the bare model"
        )
