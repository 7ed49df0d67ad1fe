"""Learning-rate schedules: functions from the step (0 is the first) to a factor of the optimizer's own learning rate.

A schedule has no state: the step alone decides, so a resumed run continues exactly. `torch.optim.lr_scheduler.LambdaLR`
takes them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from effnlp_lab.errors import UsageError

Schedule = Callable[[int], float]


def constant_with_warmup(warmup: int) -> Schedule:
    """Rises linearly over `warmup` steps, the first step at 1 / warmup, then stays 1."""
    _check(warmup=warmup)
    return lambda step: min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine_with_warmup(warmup: int, steps: int, *, final: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine down to `final` at step `steps` (Loshchilov and Hutter 2017, equation 5, one cycle).

    Stays at `final` afterwards. Raises UsageError unless 0 <= warmup < steps and 0 <= final <= 1.
    """
    _check(warmup=warmup, final=final)
    if warmup >= steps:
        raise UsageError(f"Warm-up over {warmup} steps leaves nothing of {steps}: make it shorter than the run.")
    rise = constant_with_warmup(warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return rise(step)
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def warmup_stable_decay(warmup: int, steps: int, decay: int, *, final: float = 0.0) -> Schedule:
    """Warm-up, then 1, then down to `final` over the last `decay` of `steps` by 1 - sqrt(share of the decay done).

    Hu et al. 2024 (MiniCPM), with the decay of Hägele et al. 2024: the stable part can be prolonged, and a checkpoint
    of it decayed whenever a finished model is wanted. Raises UsageError where warm-up and decay do not fit in `steps`.
    """
    _check(warmup=warmup, decay=decay, final=final)
    if warmup + decay > steps:
        raise UsageError(f"Warm-up over {warmup} and decay over {decay} steps do not fit in a run of {steps}.")
    rise = constant_with_warmup(warmup)

    def factor(step: int) -> float:
        done = step - (steps - decay)
        if done < 0:
            return rise(step)
        share = min(1.0, done / decay) if decay else 1.0
        return final + (1 - final) * (1 - math.sqrt(share))

    return factor


def _check(**values: float) -> None:
    for name, value in values.items():
        if value < 0 or not math.isfinite(value) or (name == "final" and value > 1):
            expected = "from 0 to 1" if name == "final" else "0 or more steps"
            raise UsageError(f"{name} is {value}: expected {expected}.")
