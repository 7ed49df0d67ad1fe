"""Gradient accumulation: the gradient of a large batch from small ones, one at a time.

The mean loss over a batch is sum / count, with both taken over all of its tokens. Micro-batches have unequal counts
(padding, masked labels), so the mean of their means is another number. What adds up is the sum: each micro-batch adds
the gradient of its sum of losses, and the total is divided by the total count once, at the end. Each graph is freed by
its own backward; one backward after the loop would keep them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.errors import UsageError

IGNORED = -100
"""The label of a position that is not to be predicted (PyTorch's and transformers' own number)."""

Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int]]
"""(model, batch) -> (sum of the losses of the batch, in float32, with its graph; number of tokens they are over)."""


@dataclass
class Accumulated:
    """Totals over micro-batches, on the device: nothing is read back to the host until it is asked for."""

    loss_sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean loss of a token, 0-dimensional, on the device."""
        return self.loss_sum / self.count


def causal_lm_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token, summed, and how many tokens that is over. In float32.

    batch: `input_ids` [batch, length], optionally `attention_mask` [batch, length] and `labels` [batch, length], where
    -100 is not predicted; without labels the inputs are their own, padding left out. The model is of transformers'
    kind: called with input_ids (and attention_mask), it returns an object with `logits` [batch, length, vocabulary],
    or the logits.
    """
    if "input_ids" not in batch:
        raise UsageError(f"A batch needs 'input_ids' [batch, length]; this one has {', '.join(batch) or 'nothing'}.")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # keys and values kept for generation would only take memory
    out = model(**inputs)
    logits = getattr(out, "logits", out)
    target = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()  # position t is asked for token t + 1
    total = F.cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORED, reduction="sum")
    return total, (target != IGNORED).sum()


def accumulate(model: nn.Module, micro_batches: Iterable[Batch], loss: LossFunction = causal_lm_loss, *,
               weight: float | Tensor = 1.0) -> Accumulated:  # fmt: skip
    """Add the gradient of weight * (sum of the losses) of every micro-batch to the parameters' `.grad`.

    Gradients are not zeroed and not divided: afterwards divide them by weight * count (`divide_gradients`), and they
    are those of the mean over all tokens. `weight` keeps float16 gradients in range: a loss scale over an expected
    count. Returns the totals, unweighted. No host synchronisation. Raises UsageError when there is no micro-batch.
    """
    total: Accumulated | None = None
    for batch in micro_batches:
        loss_sum, count = loss(model, batch)
        (loss_sum * weight).backward()
        loss_sum = loss_sum.detach().float()
        if not isinstance(count, Tensor):  # a copy to the card would wait for it, a fill does not
            count = torch.full((), count, device=loss_sum.device)
        if total is None:
            total = Accumulated(loss_sum, count)
        else:
            total = Accumulated(total.loss_sum + loss_sum, total.count + count)
    if total is None:
        raise UsageError("There is no micro-batch to accumulate: give at least one.")
    return total


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], divisor: float | Tensor) -> None:
    """Divide every `.grad` in place by a number or a 0-dimensional tensor, without a host synchronisation."""
    by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_place.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for (device, dtype), gradients in by_place.items():
        if isinstance(divisor, Tensor):
            divisor = divisor.to(device, torch.promote_types(dtype, torch.float32))
        torch._foreach_div_(gradients, divisor)


def split_batch(batch: Batch, micro_batch_size: int) -> list[dict[str, Any]]:
    """The rows of a batch, `micro_batch_size` at a time; the last may have fewer. Other values go along unchanged.

    Raises UsageError for a size below 1, a batch without tensors, and tensors of different numbers of rows.
    """
    if micro_batch_size < 1:
        raise UsageError(f"micro_batch_size is {micro_batch_size}: a micro-batch needs at least 1 row.")
    rows = {name: value.shape[0] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if not rows:
        raise UsageError("There is no tensor with rows in this batch: nothing to split.")
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} has {n}" for name, n in rows.items())
        raise UsageError(f"The tensors of a batch must have the same number of rows, but {listed}.")
    total = next(iter(rows.values()))
    return [
        {name: value[start : start + micro_batch_size] if name in rows else value for name, value in batch.items()}
        for start in range(0, total, micro_batch_size)
    ]
