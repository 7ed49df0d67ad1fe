"""What a generation came to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Sums over rows and steps. A row's step counts while the row is not finished.

    `tested` counts drafted tokens up to and including the first rejected one: what lies behind it was never compared,
    and counting it would lower the rate. `trace` has, for each row, (accepted, new tokens) of each of its steps: the
    last new token is the target's own, but where a step was cut short by an end.
    """

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    trace: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """alpha: accepted of the tested tokens; 0 where none was tested."""
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the steps alone, without the prompt's pass."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, row: int, made: int, accepted: int, tested: int, drafted: int) -> None:
        """One step of one row that was not finished before it."""
        self.steps += 1
        self.tokens += made
        self.accepted += accepted
        self.tested += tested
        self.drafted += drafted
        self.trace[row].append((min(accepted, made), made))
