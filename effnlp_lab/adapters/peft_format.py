"""Adapters saved and loaded as PEFT does it: adapter_config.json and adapter_model.safetensors in one folder.

LoRA, (IA)3, prompt tuning and prefix tuning are PEFT's own in both directions. For bottleneck adapters, BitFit and top
layers, which PEFT lacks, files have the same form with a `peft_type` of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.adapters import interface
from effnlp_lab.adapters.adapter import Adapter, check_finite
from effnlp_lab.adapters.configurations import (
    BitFitConfig,
    BottleneckConfig,
    Config,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TopLayersConfig,
)
from effnlp_lab.adapters.stored import read_files, write_files
from effnlp_lab.errors import UsageError

PREFIX = "base_model.model."
# configuration -> (PEFT's name, {our field: PEFT's})
FIELDS: dict[type, tuple[str, dict[str, str]]] = {
    LoRAConfig: ("LORA", {
        "targets": "target_modules", "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
        "rank_stabilized": "use_rslora",
    }),
    IA3Config: ("IA3", {"targets": "target_modules", "feedforward": "feedforward_modules"}),
    PromptTuningConfig: ("PROMPT_TUNING", {"tokens": "num_virtual_tokens"}),
    PrefixTuningConfig: ("PREFIX_TUNING", {"tokens": "num_virtual_tokens"}),
    BottleneckConfig: ("EFFNLP_BOTTLENECK", {"targets": "target_modules", "size": "size", "activation": "activation"}),
    BitFitConfig: ("EFFNLP_BITFIT", {"targets": "target_modules"}),
    TopLayersConfig: ("EFFNLP_TOP_LAYERS", {"layers": "layers", "final_norm": "final_norm"}),
}  # fmt: skip
# Fields of PEFT that say nothing about the computation, or hold sizes which the tensors show too.
HARMLESS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping",
    "init_lora_weights", "init_ia3_weights", "init_weights", "megatron_core", "qalora_group_size", "num_layers",
    "num_attention_heads", "num_transformer_submodules", "token_dim", "encoder_hidden_size", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "ensure_weight_tying", "loftq_config",
}  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Write an adapter (the active one) to a folder, which PEFT opens where it has the method.

    Raises UsageError for an unknown name, and for NaN or infinity; nothing is written then.
    """
    adapter = interface.get_adapter(model, name)
    check_finite(adapter.tensors(), f"adapter {adapter.name!r}")
    tensors = {_saved_name(key): tensor for key, tensor in adapter.tensors().items()}
    folder = Path(folder)
    write_files(folder, describe(model, adapter), tensors)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Adapter:
    """Add the adapter that a folder holds, ours or PEFT's, and make it the active one.

    Raises UsageError for a folder without an adapter, one that is cut short, a method or an option that the room lacks,
    and an adapter of another base or another rank than its configuration says. The model is then what it was.
    """
    folder = Path(folder)
    saved, tensors = read_files(folder)
    config = understand(saved, folder)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    active = [adapter.name for adapter in interface.adapters_of(model).values() if adapter.active]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        adapter = interface.add_adapter(model, config, name)
    except UsageError as error:
        _restore(model, active, trained)
        raise UsageError(f"{folder} does not fit this model: {error}") from None
    try:
        _check_shapes(adapter, tensors, folder)
    except UsageError:
        interface.remove_adapter(model, name)
        _restore(model, active, trained)
        raise
    with torch.no_grad():
        for key, parameter in adapter.tensors().items():
            parameter.copy_(tensors[key])
    return adapter


def describe(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """An adapter's configuration in PEFT's words."""
    kind, fields = FIELDS[type(adapter.config)]
    saved: dict[str, Any] = {"peft_type": kind, "inference_mode": True, "base_model_name_or_path": None}
    saved["task_type"] = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    if hasattr(model, "config"):
        saved["base_model_name_or_path"] = getattr(model.config, "_name_or_path", None) or None
    for ours, theirs in fields.items():
        value = getattr(adapter.config, ours)
        saved[theirs] = list(value) if isinstance(value, tuple) else value
    if isinstance(adapter.config, PromptTuningConfig):
        saved |= {"num_transformer_submodules": 1, "num_layers": model.config.num_hidden_layers}
        saved |= {"token_dim": adapter.tokens.shape[1], "num_attention_heads": model.config.num_attention_heads}
    if isinstance(adapter.config, PrefixTuningConfig):
        layers, heads, head_dim = adapter._shape()
        saved |= {"num_transformer_submodules": 1, "num_layers": layers, "token_dim": heads * head_dim}
        saved |= {"num_attention_heads": heads, "prefix_projection": False}
    return saved


def understand(saved: dict[str, Any], folder: Path) -> Config:
    """Our configuration for PEFT's. Raises UsageError for a method or an option that the room lacks."""
    kinds = {kind: (config, fields) for config, (kind, fields) in FIELDS.items()}
    if saved.get("peft_type") not in kinds:
        raise UsageError(f"{folder} holds {saved.get('peft_type')!r}: expected one of {', '.join(kinds)}.")
    config, fields = kinds[saved["peft_type"]]
    for option, value in saved.items():
        if option not in HARMLESS and option not in fields.values() and value not in (None, False, "none", 0, [], {}):
            raise UsageError(
                f"{folder} was made with {option}={value!r}, which is not offered here: load it with PEFT."
            )
    if isinstance(saved.get("init_lora_weights"), str) and saved["init_lora_weights"] not in ("gaussian", "orthogonal"):
        raise UsageError(
            f"{folder} was made with init_lora_weights={saved['init_lora_weights']!r}, which changes the base: load it "
            "with PEFT."
        )
    missing = [theirs for theirs in fields.values() if theirs not in saved]
    if missing:
        raise UsageError(f"The configuration in {folder} lacks {missing[0]}: save the adapter again.")
    values = {ours: saved[theirs] for ours, theirs in fields.items()}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _saved_name(key: str) -> str:
    return key if key == "prompt_embeddings" else PREFIX + key


def _check_shapes(adapter: Adapter, tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse tensors that are not this adapter's, with the first difference."""
    own = adapter.tensors()
    for key in [*own, *tensors]:
        if key not in own or key not in tensors:
            which = f"it lacks {key}" if key not in tensors else f"it holds {key}, which this model has no place for"
            raise UsageError(f"{folder} was made for another base: {which}. Load the model that it was trained on.")
    for key, parameter in own.items():
        found, wanted = tuple(tensors[key].shape), tuple(parameter.shape)
        rank = getattr(adapter.config, "r", None)
        if found != wanted and rank is not None and rank not in found:
            raise UsageError(f"{folder} was made with another rank: {key} is {found}, and r={rank} needs {wanted}.")
        if found != wanted:
            raise UsageError(f"{folder} was made for another base: {key} is {found}, and this model needs {wanted}.")


def _restore(model: nn.Module, active: list[str], trained: dict[nn.Parameter, bool]) -> None:
    for name in active:
        interface.set_adapter(model, name)
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)
