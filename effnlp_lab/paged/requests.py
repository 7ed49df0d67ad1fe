"""A request: what was asked, what has come out, and the sentences for what cannot be served."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.sampling import SamplingParams
from effnlp_lab.paged.sequence import Sequence as CachedSequence
from effnlp_lab.paged.sizes import pages_for


class RequestError(UsageError):
    """A request that cannot be served. The others go on."""


class State(enum.Enum):
    """Where a request is in its life. A preempted one is WAITING again."""

    WAITING = "waiting"
    READING = "reading"
    """Its prompt is being computed, in one or several chunks."""
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One request. `tokens` are the prompt and all that came out so far.

    `computed` counts the tokens whose keys and values are in the cache, or will be when what was started is done;
    `in_flight` the tokens that were started and not yet read from the device.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    stops: frozenset[int]
    on_token: Callable[[int, int], None] | None = None
    state: State = State.WAITING
    sequence: CachedSequence | None = None
    slot: int = -1
    computed: int = 0
    in_flight: int = 0
    uploaded: int = 0
    prompt_length: int = 0
    cached: int = 0
    preemptions: int = 0
    reason: str | None = None
    error: str | None = None
    submitted: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.prompt_length :]

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def next_position(self) -> int:
        """The position of the newest token, which the next step takes in."""
        return len(self.tokens) + self.in_flight - 1

    @property
    def exhausted(self) -> bool:
        """Whether all tokens that were asked for are started: it only waits to be read."""
        return len(self.tokens) - self.prompt_length + self.in_flight >= self.params.max_new_tokens


@dataclass(frozen=True)
class Output:
    """What became of a request.

    reason: "stop" (a stop token, the last of `tokens`), "length", "cancelled" or "error"; `error` is then a sentence.
    `cached` prompt tokens were found in the prefix cache. `times` are the seconds from its submission to each token.
    """

    id: int | None
    prompt: list[int]
    tokens: list[int]
    reason: str
    error: str | None = None
    text: str | None = None
    cached: int = 0
    preemptions: int = 0
    times: list[float] = field(default_factory=list)


def check_prompt(prompt: Any, vocabulary: int, tokenizer: Any = None) -> list[int]:
    """Token ids of a prompt: a list of whole numbers, a 1-dimensional tensor, or a text where there is a tokenizer.

    Raises RequestError for one that is empty, malformed or outside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("The prompt is a text and the engine has no tokenizer: give token ids, or a tokenizer.")
        prompt = tokenizer(prompt)["input_ids"] if prompt else []
    elif isinstance(prompt, torch.Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise RequestError(
                f"The prompt is a tensor {tuple(prompt.shape)} of {prompt.dtype}: give one dimension of whole numbers."
            )
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(f"The prompt is a {type(prompt).__name__}: give a list of token ids.")
    prompt = list(prompt)
    if not prompt:
        raise RequestError("The prompt is empty: give at least one token, such as the beginning-of-sequence token.")
    wrong = [kind for kind in set(map(type, prompt)) if kind is bool or not hasattr(kind, "__index__")]
    if wrong:
        x = next(x for x in prompt if type(x) in wrong)
        raise RequestError(f"The prompt holds {x!r}, which is no token id: give whole numbers.")
    ids = list(map(operator.index, prompt))
    if min(ids) < 0 or max(ids) >= vocabulary:
        outside = next(x for x in ids if not 0 <= x < vocabulary)
        raise RequestError(f"The prompt holds token {outside}: ids of this model go from 0 to {vocabulary - 1}.")
    return ids


def check_params(params: Any) -> SamplingParams:
    """Sampling parameters, the default ones for None. Raises RequestError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(f"The sampling parameters are a {type(params).__name__}: give SamplingParams(...) or None.")
    return params


def check_length(prompt: int, new: int, max_length: int, pages: int, page_size: int, windowed: bool) -> None:
    """Raise RequestError for a request that cannot fit, even alone."""
    if prompt + new > max_length:
        raise RequestError(
            f"The prompt has {prompt} tokens and {new} more are asked for, but a sequence holds at most {max_length}: "
            "shorten the prompt, or lower max_new_tokens."
        )
    if not windowed and pages_for(prompt + new, page_size) > pages:
        raise RequestError(
            f"{prompt + new} tokens need {pages_for(prompt + new, page_size)} pages, and the cache has {pages}: "
            "shorten the prompt, lower max_new_tokens, or give the engine more pages."
        )
