"""Generalized knowledge distillation (Agarwal et al. 2024, algorithm 1): the student learns on what it writes itself.

Trained on texts of others alone, a student meets its own mistakes only when it is used. So a part of the batches are
continued by the student, and the teacher's distributions are matched there, by reverse KL or a Jensen-Shannon
divergence; no gradient passes through the sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnlp_lab.distillation.fused_linear import Backend
from effnlp_lab.distillation.losses import IGNORED
from effnlp_lab.distillation.settings import LossSettings
from effnlp_lab.distillation.trainer import DistillationLoss, inputs_and_labels
from effnlp_lab.errors import UsageError


class OnPolicyDistillation(DistillationLoss):
    """A loss for `DistillationTrainer(..., loss=OnPolicyDistillation(teacher, prompt_tokens=32))`.

    With probability `student_share` (lambda of the paper) the first `prompt_tokens` of each row are continued by the
    student at `temperature`, up to `new_tokens`, and the loss is over what it wrote; else over the batch as it is. The
    draws are of torch's own generators, so a resumed run repeats them. `sampled` counts the student's tokens.
    """

    def __init__(self, teacher: PreTrainedModel, settings: LossSettings | None = None, *, prompt_tokens: int,
                 new_tokens: int = 64, student_share: float = 1.0, temperature: float = 1.0,
                 backend: Backend = "auto") -> None:  # fmt: skip
        """settings: reverse KL when None. Raises UsageError for shares outside [0, 1] and sizes below 1."""
        super().__init__(teacher, settings or LossSettings("reverse_kl"), backend=backend)
        if not 0 <= student_share <= 1:
            raise UsageError(f"student_share is {student_share}: expected a probability.")
        if prompt_tokens < 1 or new_tokens < 1:
            raise UsageError(f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} must both be at least 1.")
        if not temperature > 0:
            raise UsageError(f"The sampling temperature is {temperature}: expected a number above 0.")
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.student_share, self.temperature, self.sampled = student_share, temperature, 0

    def __call__(self, student: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if torch.rand(()).item() >= self.student_share:
            return super().__call__(student, batch)
        prompts = inputs_and_labels(batch)[0]["input_ids"][:, : self.prompt_tokens]
        if "attention_mask" in batch and not bool(batch["attention_mask"][:, : prompts.shape[1]].all()):
            raise UsageError(f"A prompt has padding in its first {prompts.shape[1]} tokens: lower prompt_tokens.")
        ids, counts = sample_continuations(student, prompts, self.new_tokens, self.temperature)
        self.sampled += ids.shape[0] * (ids.shape[1] - prompts.shape[1])
        labels = torch.where(counts, ids, IGNORED)
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return self.of_positions(student, {"input_ids": ids}, labels)


@torch.no_grad()
def sample_continuations(model: PreTrainedModel, prompts: Tensor, new_tokens: int,
                         temperature: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The model's continuations of prompts [batch, length] of equal length, without top-k or top-p.

    Returns ids [batch, length + up to new_tokens], and a mask of the same shape that is True where the model wrote: up
    to and including its end token. Dropout is off meanwhile.
    """
    training = model.training
    model.eval()
    try:
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=temperature, top_k=0,
            top_p=1.0, max_new_tokens=new_tokens, use_cache=True, pad_token_id=_pad(model),
        )  # fmt: skip
    finally:
        model.train(training)
        torch.clear_autocast_cache()  # weights that autocast cast here, without a graph, must not serve the training
    wrote = torch.zeros_like(ids, dtype=torch.bool)
    wrote[:, prompts.shape[1] :] = True
    ends = model.generation_config.eos_token_id
    if ends is not None:
        ended = torch.isin(ids, torch.as_tensor(ends, device=ids.device)) & wrote
        wrote &= ended.long().cumsum(1) - ended.long() == 0  # nothing after the first end
    return ids, wrote


def _pad(model: PreTrainedModel) -> int:
    ends = model.generation_config.eos_token_id
    ends = ends[0] if isinstance(ends, list) else ends
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else ends if ends is not None else 0
