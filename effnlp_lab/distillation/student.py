"""A student that starts as a part of its teacher: the same width, every other layer (Sanh et al. 2019, section 2)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from effnlp_lab.errors import UsageError


def alternate_layers(total: int, kept: int | None = None) -> list[int]:
    """Which of `total` layers a student keeps: every other one, or `kept` of them at even distances, the first among
    them. Raises UsageError unless 1 <= kept <= total."""
    kept = (total + 1) // 2 if kept is None else kept
    if not 1 <= kept <= total:
        raise UsageError(f"{kept} of {total} layers cannot be kept: expected a number from 1 to {total}.")
    return [index * total // kept for index in range(kept)]


def student_from_layers(teacher: PreTrainedModel, layers: int | Sequence[int] | None = None) -> PreTrainedModel:
    """A new model with some of the teacher's layers, and its embeddings, last norm and head. Nothing is shared.

    teacher: any decoder of `transformers` whose layers are one nn.ModuleList. layers: how many (see
    `alternate_layers`), or which, in order; None for every other one. On the teacher's device, in its dtype, in
    evaluation mode. Raises UsageError for layers that are not there, and for a model without such a list.
    """
    name, total = _layer_list(teacher)
    chosen = alternate_layers(total, layers) if layers is None or isinstance(layers, int) else list(layers)
    if not chosen or not all(0 <= index < total for index in chosen):
        raise UsageError(f"The layers {chosen} are not all in a model of {total} layers (0 to {total - 1}).")
    config = copy.deepcopy(teacher.config)
    for key, value in vars(teacher.config).items():  # such as layer_types: one entry a layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[index] for index in chosen])
    config.num_hidden_layers = len(chosen)
    weights = {}
    for key, value in teacher.state_dict().items():
        match = re.match(rf"{re.escape(name)}\.(\d+)\.(.*)", key)
        if match is None:
            weights[key] = value
            continue
        for place, index in enumerate(chosen):
            if index == int(match[1]):
                weights[f"{name}.{place}.{match[2]}"] = value
    with torch.random.fork_rng(devices=[]):  # the first weights are thrown away: no random number is spent on them
        student = type(teacher)(config)
    student = student.to(teacher.device, next(teacher.parameters()).dtype)
    student.load_state_dict(weights)
    student.tie_weights()
    return student.eval()


def _layer_list(model: nn.Module) -> tuple[str, int]:
    """The name of the model's list of layers, and how many there are."""
    total = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, total
    raise UsageError(f"{type(model).__name__} has no nn.ModuleList of its layers: choose a decoder of transformers.")
