"""Bottleneck adapters: a small residual network after a block, before the block is added to the stream.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", section 2.1 and figure 2: after the projection
that ends attention and after the one that ends the feed-forward network. W_up begins at zero: the network is the
identity.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from effnlp_lab.adapters.configurations import BottleneckConfig
from effnlp_lab.adapters.layerwise import LayerAdapter, Part, parameter_like

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


class BottleneckPart(Part):
    """h + W_up f(W_down h + b_down) + b_up, h the layer's output; W_down [size, out], W_up [out, size]."""

    def __init__(self, base: nn.Module, config: BottleneckConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.down = parameter_like(base, config.size, base.out_features)
        self.down_bias = parameter_like(base, config.size)
        self.up = parameter_like(base, base.out_features, config.size)
        self.up_bias = parameter_like(base, base.out_features)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        h = base(x)
        inner = self.activation(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return h + F.linear(inner, self.up.to(h.dtype), self.up_bias.to(h.dtype))

    def tensors(self) -> dict[str, nn.Parameter]:
        return {
            "adapter_down.weight": self.down,
            "adapter_down.bias": self.down_bias,
            "adapter_up.weight": self.up,
            "adapter_up.bias": self.up_bias,
        }


class Bottleneck(LayerAdapter):
    """The networks after all targets. They are not linear: no merge."""

    def make_part(self, layer: str, base: nn.Module) -> BottleneckPart:
        return BottleneckPart(base, self.config)

    def merged_weights(self):
        return super(LayerAdapter, self).merged_weights()
