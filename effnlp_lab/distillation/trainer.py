"""The distillation loss of a batch, and training's trainer with it: checkpoints, progress, evaluation, exact resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from effnlp_lab.distillation.fused_linear import Backend, chunked_linear_loss
from effnlp_lab.distillation.losses import IGNORED, hidden_cosine
from effnlp_lab.distillation.settings import LossSettings
from effnlp_lab.errors import UsageError
from effnlp_lab.training.accumulation import causal_lm_loss
from effnlp_lab.training.trainer import Trainer


class DistillationLoss:
    """(student, batch) -> (sum of the losses over tokens, number of tokens), as `training.Trainer` wants it.

    teacher: a causal language model with the student's vocabulary; put in evaluation mode, never changed. settings: the
    soft and hard losses (its reduction is ignored). weight_cosine: of the cosine between last hidden states, which
    needs equal widths. Batches are those of `training.causal_lm_loss`; neither model's logits are ever whole.
    """

    def __init__(self, teacher: PreTrainedModel, settings: LossSettings | None = None, *, weight_cosine: float = 0.0,
                 backend: Backend = "auto") -> None:  # fmt: skip
        self.teacher = teacher.eval().requires_grad_(False)
        self.settings, self.weight_cosine, self.backend = settings or LossSettings(), weight_cosine, backend

    def __call__(self, student: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        inputs, labels = inputs_and_labels(batch)
        return self.of_positions(student, inputs, labels)

    def of_positions(self, student: nn.Module, inputs: Mapping[str, Tensor],
                     labels: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """inputs: `input_ids` [batch, length] and what goes with them; labels [batch, length]: what each position is
        to predict, -100 where it does not count."""
        hidden = last_hidden(student, inputs).flatten(0, 1)
        with torch.no_grad():
            theirs = last_hidden(self.teacher, inputs).flatten(0, 1)
        labels = labels.flatten()
        mean = chunked_linear_loss(
            (hidden, head_weight(student)), (theirs, head_weight(self.teacher)), labels, self.settings,
            backend=self.backend,
        )  # fmt: skip
        if self.weight_cosine:
            mean = mean + self.weight_cosine * hidden_cosine(hidden, theirs, labels)
        count = (labels != IGNORED).sum()
        return mean * count.clamp(min=1), count  # a mean inside keeps half precision in range


class DistillationTrainer(Trainer):
    """Trains `student` on its teacher's distributions. `DistillationTrainer(student, teacher, batches, optimizer,
    steps=1000, folder="runs/student").run()`.

    Losses during training are those of `loss`; `evaluate` and the held-out losses are cross-entropy, so that students
    trained in different ways compare. Other options, files and errors as of `training.Trainer`. The teacher is not in
    the checkpoint: resume with the same one.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Any]],
                 optimizer: torch.optim.Optimizer, *, settings: LossSettings | None = None, weight_cosine: float = 0.0,
                 loss: DistillationLoss | None = None, **options: Any) -> None:  # fmt: skip
        if loss is None:
            loss = DistillationLoss(teacher, settings, weight_cosine=weight_cosine)
        elif settings is not None or weight_cosine:
            raise UsageError("Give either loss, or settings and weight_cosine to make one: not both.")
        if options.get("compile"):
            raise UsageError("compile is not used here: the loss calls the models' parts, not their forward.")
        super().__init__(student, batches, optimizer, loss=loss, **options)

    def evaluate(self, batches: Iterable[Mapping[str, Any]] | None = None) -> float:
        """The mean cross-entropy of a token over `held_out`, or other batches, without dropout."""
        loss, self.loss = self.loss, causal_lm_loss
        try:
            return super().evaluate(batches)
        finally:
            self.loss = loss


def last_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states that the head reads, [batch, length, hidden]."""
    base = getattr(model, "base_model", None)
    if base is None or base is model:
        raise UsageError(f"{type(model).__name__} has no base_model beside a head: give a transformers ...ForCausalLM.")
    return base(**inputs, use_cache=False).last_hidden_state


def head_weight(model: nn.Module) -> Tensor:
    """[vocabulary, hidden]. Raises UsageError for a head with a bias."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UsageError(f"{type(model).__name__} needs a linear head without bias for a loss in chunks.")
    return head.weight


def inputs_and_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs, and labels [batch, length] that say what each position is to predict (-100: nothing)."""
    if "input_ids" not in batch:
        raise UsageError(f"A batch needs 'input_ids' [batch, length]; this one has {', '.join(batch) or 'nothing'}.")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return inputs, F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def training_flops(student: nn.Module, teacher: nn.Module | None, tokens: int, sampled: int = 0) -> dict[str, float]:
    """Operations to train on `tokens`: 6 a parameter and token for the student, 2 for the teacher that only looks on,
    2 for each token that the student sampled itself (Kaplan et al. 2020, section 2.1; embeddings count once)."""
    size = sum(p.numel() for p in student.parameters())
    teaching = 0 if teacher is None else sum(p.numel() for p in teacher.parameters())
    return {"student": 6.0 * size * tokens, "teacher": 2.0 * teaching * tokens, "sampling": 2.0 * size * sampled}
