"""LoRA: W stays as it is, and s B A x is added to W x, with A [r, in] and B [out, r].

Hu et al. 2022, "LoRA: Low-rank adaptation of large language models", eq. 3. A is random and B zero, so that the model
is unchanged at first and B's gradient is not zero. With A = 0 too, both gradients would be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effnlp_lab.adapters.configurations import LoRAConfig
from effnlp_lab.adapters.layerwise import LayerAdapter, Part, is_nf4, parameter_like
from effnlp_lab.adapters.lora_product import lora_linear
from effnlp_lab.errors import UsageError


class LoRAPart(Part):
    """A and B of one layer."""

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.scaling, self.dropout = config.scaling, config.dropout
        self.a = parameter_like(base, config.r, base.in_features)
        self.b = parameter_like(base, base.out_features, config.r)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # uniform in ±1/sqrt(in_features), as a linear layer begins
        nn.init.zeros_(self.b)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return lora_linear(x, base, self.a, self.b, self.scaling, self.dropout if self.training else 0.0)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.a, "lora_B.weight": self.b}

    def delta(self) -> Tensor:
        """The update of the weight, [out, in], in A's dtype."""
        return self.scaling * (self.b @ self.a)

    def merged(self, base: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        if is_nf4(base):
            raise UsageError(
                "A weight in NF4 cannot take a merge, which would be rounded away: merge into the dense base."
            )
        wide = torch.promote_types(base.weight.dtype, self.a.dtype)
        return [(base.weight, (base.weight.to(wide) + self.delta().to(wide)).to(base.weight.dtype))]


class LoRA(LayerAdapter):
    """The parts of all targets."""

    def make_part(self, layer: str, base: nn.Module) -> LoRAPart:
        if self.config.r > min(base.in_features, base.out_features):
            raise UsageError(
                f"r={self.config.r} is more than {layer} has: it is [{base.out_features}, {base.in_features}]; "
                f"choose r up to {min(base.in_features, base.out_features)}."
            )
        return LoRAPart(base, self.config)
