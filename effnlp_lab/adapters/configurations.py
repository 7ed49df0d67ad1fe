"""What each method is told. Numbers are checked when a configuration is made; names when it meets a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effnlp_lab.errors import UsageError

Targets = tuple[str, ...] | str
"""Module names, each the whole name or its last parts ("q_proj", "mlp.down_proj"); or one regular expression."""


@dataclass(frozen=True)
class LoRAConfig:
    """Hu et al. 2022, eq. 3. The update is scaled by alpha/r, or by alpha/sqrt(r) where `rank_stabilized`
    (Kalajdzievski 2023). `dropout` is of the update's input. Raises UsageError for numbers out of range.
    """

    targets: Targets = ("q_proj", "v_proj")
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        _check_targets(self)
        _check_count(self, "r")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"alpha is {self.alpha}: expected a positive number.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}: expected a probability from 0 to below 1.")

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)


@dataclass(frozen=True)
class IA3Config:
    """Liu et al. 2022, section 3.3: factors on the targets' outputs, on the inputs of those in `feedforward`."""

    targets: Targets = ("k_proj", "v_proj", "down_proj")
    feedforward: Targets = ("down_proj",)

    def __post_init__(self) -> None:
        _check_targets(self)
        _check_targets(self, "feedforward", empty=True)


@dataclass(frozen=True)
class BottleneckConfig:
    """Houlsby et al. 2019: after each target h becomes h + W_up f(W_down h + b_down) + b_up, W_up zero at first.

    size: numbers between the two. activation: "relu", "gelu", "silu" or "tanh".
    """

    targets: Targets = ("self_attn.o_proj", "mlp.down_proj")
    size: int = 16
    activation: str = "relu"

    def __post_init__(self) -> None:
        _check_targets(self)
        _check_count(self, "size")
        if self.activation not in ("relu", "gelu", "silu", "tanh"):
            raise UsageError(f"activation is {self.activation!r}: expected 'relu', 'gelu', 'silu' or 'tanh'.")


@dataclass(frozen=True)
class PromptTuningConfig:
    """Lester et al. 2021: learned embeddings before the tokens' own, begun from the embeddings of random tokens."""

    tokens: int = 20

    def __post_init__(self) -> None:
        _check_count(self, "tokens")


@dataclass(frozen=True)
class PrefixTuningConfig:
    """Li and Liang 2021, without reparametrization: learned keys and values before each layer's own."""

    tokens: int = 20

    def __post_init__(self) -> None:
        _check_count(self, "tokens")


@dataclass(frozen=True)
class BitFitConfig:
    """Ben Zaken et al. 2022: the biases alone. `targets` limits it to some modules; empty means all."""

    targets: Targets = ()

    def __post_init__(self) -> None:
        _check_targets(self, empty=True)


@dataclass(frozen=True)
class TopLayersConfig:
    """The last `layers` blocks of the model (its longest list of modules); `final_norm`: the norm after them too."""

    layers: int = 1
    final_norm: bool = True

    def __post_init__(self) -> None:
        _check_count(self, "layers")


Config = (
    LoRAConfig | IA3Config | BottleneckConfig | PromptTuningConfig | PrefixTuningConfig | BitFitConfig | TopLayersConfig
)


def _check_targets(config: object, field: str = "targets", empty: bool = False) -> None:
    names = getattr(config, field)
    if not isinstance(names, str):
        names = tuple(names)
        object.__setattr__(config, field, names)
    if not all(isinstance(name, str) for name in names) or (not names and not empty):
        raise UsageError(f"{field} is {names!r}: expected the names of modules, such as ('q_proj', 'v_proj').")


def _check_count(config: object, field: str) -> None:
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{field} is {value!r}: expected a whole number of at least 1.")
