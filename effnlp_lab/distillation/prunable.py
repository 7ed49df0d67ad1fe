"""Structured pruning to a target shape (Xia et al. 2023, Sheared LLaMA, section 3.1).

Four kinds of masks lie over a Llama-type model: whole layers, groups of heads in each layer (a key head with its query
heads), MLP dimensions in each layer, and dimensions of the residual stream, which all layers share. Weights and masks
learn together under the constraint that the expected number of each kind is the target's:

    min over weights and masks, max over lambda and phi:   loss + sum  lambda (s - t) + phi (s - t)^2

with s and t as shares of the whole, one constraint a layer for heads and MLP (equation 3 and what follows). The target
moves from the whole model to its shape over the first steps, so that weights can follow. `cutting.cut` then makes the
smaller model, and its training goes on as any other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnlp_lab.distillation.hard_concrete import HardConcrete
from effnlp_lab.errors import UsageError
from effnlp_lab.training.accumulation import causal_lm_loss

KINDS = ("layers", "heads", "mlp", "hidden")


@dataclass(frozen=True)
class TargetShape:
    """What the pruned model has. kv_heads: groups, so query heads fall with them; None keeps all of a kind."""

    layers: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    hidden: int | None = None


class PrunableModel(nn.Module):
    """`model` under masks; called like it, it gives what the pruned model would.

    model: a Llama-type model of transformers (LlamaForCausalLM and those with its module names). In training each call
    draws new masks and moves `step` on; in evaluation masks are `decided`, with exactly the target's counts once
    `harden` is set. State, multipliers and step are in its state_dict, so `training.Trainer` resumes it.
    """

    def __init__(self, model: PreTrainedModel, target: TargetShape, *, warmup_steps: int = 0,
                 penalty: float = 20.0) -> None:  # fmt: skip
        """warmup_steps: over which the target moves from the whole model to `target`. penalty: where phi begins; the
        paper's 0 leaves the shares swinging around their targets for thousands of steps. Raises UsageError for a target
        that the model does not contain, and for models of another build."""
        super().__init__()
        self.model, self.target, self.warmup_steps, self.harden = model, target, warmup_steps, False
        self.sizes = shape_of(model)
        self.counts = target_counts(target, self.sizes)
        layers = self.sizes["layers"]
        device = next(model.parameters()).device
        shapes = {"layers": (layers,), "heads": (layers, self.sizes["heads"]), "mlp": (layers, self.sizes["mlp"]),
                  "hidden": (self.sizes["hidden"],)}  # fmt: skip
        wanted = [kind for kind in KINDS if self.counts[kind] < self.sizes[kind]]
        self.masks = nn.ModuleDict({kind: HardConcrete(*shapes[kind]) for kind in wanted}).to(device)
        rows = {kind: layers if kind in ("heads", "mlp") else 1 for kind in wanted}
        self.linear = nn.ParameterDict({kind: nn.Parameter(torch.zeros(rows[kind])) for kind in wanted}).to(device)
        self.square = nn.ParameterDict({kind: nn.Parameter(torch.full((rows[kind],), penalty)) for kind in wanted})
        self.square.to(device)
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=device))
        self._current: dict[str, Tensor] = {}
        self._hook()

    @property
    def config(self):
        return self.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._current = self.drawn() if self.training else self.decided()
        if self.training:
            self.step += 1
        try:
            return self.model(*args, **kwargs)
        finally:
            self._current = {}

    def drawn(self) -> dict[str, Tensor]:
        """Random masks of every kind that is pruned."""
        return {kind: mask.draw() for kind, mask in self.masks.items()}

    def decided(self) -> dict[str, Tensor]:
        """The masks without randomness; hardened, the most likely entries in the target's number."""
        return {kind: mask.decided(self.counts[kind] if self.harden else None) for kind, mask in self.masks.items()}

    def shares(self) -> dict[str, Tensor]:
        """The expected share that is kept: [1] for layers and hidden, [layers] for heads and mlp."""
        return {kind: mask.expected().mean(-1).reshape(-1) for kind, mask in self.masks.items()}

    def targets(self) -> dict[str, Tensor]:
        """The share that is wanted at this step, 0-dimensional."""
        done = 1.0 if self.warmup_steps == 0 else (self.step / self.warmup_steps).clamp(max=1.0)
        return {kind: 1 - done * (1 - self.counts[kind] / self.sizes[kind]) for kind in self.masks}

    def constraint(self) -> Tensor:
        """sum lambda (s - t) + phi (s - t)^2, a scalar."""
        total = torch.zeros((), device=self.step.device)
        targets = self.targets()
        for kind, share in self.shares().items():
            apart = share - targets[kind]
            total = total + (self.linear[kind] * apart + self.square[kind] * apart**2).sum()
        return total

    def _hook(self) -> None:
        """Where the masks act: residual stream (embedding and both outputs of a layer), heads, MLP."""
        base = self.model.model
        base.embed_tokens.register_forward_hook(lambda module, inputs, out: self._write(out, None))
        for index, layer in enumerate(base.layers):
            heads, mlp = layer.self_attn.o_proj, layer.mlp.down_proj
            heads.register_forward_pre_hook(lambda module, inputs, i=index: (self._heads(inputs[0], i),))
            mlp.register_forward_pre_hook(lambda module, inputs, i=index: (self._mlp(inputs[0], i),))
            for output in (heads, mlp):
                output.register_forward_hook(lambda module, inputs, out, i=index: self._write(out, i))

    def _write(self, x: Tensor, layer: int | None) -> Tensor:
        """What is written to the residual stream [..., hidden], by the embedding (None) or a layer."""
        if "hidden" in self._current:
            x = x * self._current["hidden"].to(x.dtype)
        if "layers" in self._current and layer is not None:
            x = x * self._current["layers"][layer].to(x.dtype)
        return x

    def _heads(self, x: Tensor, layer: int) -> Tensor:
        """[..., heads * head_dim], the heads of a group side by side."""
        if "heads" not in self._current:
            return x
        mask = self._current["heads"][layer].to(x.dtype)
        return x * mask.repeat_interleave(x.shape[-1] // mask.numel())

    def _mlp(self, x: Tensor, layer: int) -> Tensor:
        return x * self._current["mlp"][layer].to(x.dtype) if "mlp" in self._current else x


def pruning_loss(model: PrunableModel, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus, while training, the constraint of every token: a loss for `training.Trainer`."""
    total, count = causal_lm_loss(model, batch)
    return (total + model.constraint() * count, count) if model.training else (total, count)


def pruning_parameters(model: PrunableModel, lr: float, *, mask_lr: float = 0.2,
                       multiplier_lr: float = 0.1) -> list[dict[str, Any]]:  # fmt: skip
    """Parameter groups for torch.optim.AdamW: weights and masks go down, the multipliers up (`maximize`).

    As in the paper, masks and multipliers learn far faster than weights.
    """
    multipliers = [*model.linear.parameters(), *model.square.parameters()]
    return [
        {"params": list(model.model.parameters()), "lr": lr},
        {"params": list(model.masks.parameters()), "lr": mask_lr, "weight_decay": 0.0},
        {"params": multipliers, "lr": multiplier_lr, "weight_decay": 0.0, "maximize": True},
    ]


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """The sizes of each kind. Raises UsageError for a model without Llama's modules."""
    base, config = getattr(model, "model", None), model.config
    layers = getattr(base, "layers", None)
    usual = layers is not None and hasattr(base, "norm") and hasattr(base, "embed_tokens")
    usual = usual and all(hasattr(x, "self_attn") and hasattr(x, "mlp") for x in layers)
    usual = usual and all(hasattr(x.self_attn, "o_proj") and hasattr(x.mlp, "down_proj") for x in layers)
    usual = usual and all(hasattr(x, "input_layernorm") and hasattr(x, "post_attention_layernorm") for x in layers)
    if not usual:
        raise UsageError(f"{type(model).__name__} is not built like Llama (model.layers with self_attn and mlp).")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"layers": len(layers), "heads": heads, "mlp": config.intermediate_size, "hidden": config.hidden_size}


def target_counts(target: TargetShape, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many of each kind stay. Raises UsageError for numbers below 1 or above the model's, and where none is less.

    The hidden size and head size are independent: a Llama-type model states its head size.
    """
    wanted = {"layers": target.layers, "heads": target.kv_heads, "mlp": target.intermediate, "hidden": target.hidden}
    counts = {kind: sizes[kind] if count is None else count for kind, count in wanted.items()}
    for kind, count in counts.items():
        if not 1 <= count <= sizes[kind]:
            raise UsageError(f"The target keeps {count} of {sizes[kind]} {kind}: expected 1 to {sizes[kind]}.")
    if counts == dict(sizes):
        raise UsageError("The target is the whole model: name fewer layers, kv_heads, intermediate or hidden.")
    return counts
