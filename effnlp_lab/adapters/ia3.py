"""(IA)3: learned factors on keys, values and the inner activations of the feed-forward network.

Liu et al. 2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning", section 3.3.
A factor a number: of a layer's output, or of the input of the layers named as feed-forward. All begin at one.
"""

from __future__ import annotations

from torch import Tensor, nn

from effnlp_lab.adapters.configurations import IA3Config
from effnlp_lab.adapters.injection import matches
from effnlp_lab.adapters.layerwise import LayerAdapter, Part, is_nf4, parameter_like
from effnlp_lab.errors import UsageError


class IA3Part(Part):
    """The factors of one layer: [out, 1] on its output or [1, in] on its input."""

    def __init__(self, base: nn.Module, on_input: bool) -> None:
        super().__init__()
        self.on_input = on_input
        self.factors = parameter_like(base, *((1, base.in_features) if on_input else (base.out_features, 1)))
        nn.init.ones_(self.factors)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        factors = self.factors.flatten()
        if self.on_input:
            return base((x * factors).to(x.dtype))
        out = base(x)
        return (out * factors).to(out.dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"ia3_l": self.factors}

    def merged(self, base: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        if is_nf4(base):
            raise UsageError(
                "A weight in NF4 cannot take a merge, which would be rounded away: merge into the dense base."
            )
        changes = [(base.weight, (base.weight * self.factors).to(base.weight.dtype))]
        if base.bias is not None and not self.on_input:
            changes.append((base.bias, (base.bias * self.factors.flatten()).to(base.bias.dtype)))
        return changes


class IA3(LayerAdapter):
    """The factors of all targets."""

    config: IA3Config

    def make_part(self, layer: str, base: nn.Module) -> IA3Part:
        return IA3Part(base, matches(layer, self.config.feedforward))
