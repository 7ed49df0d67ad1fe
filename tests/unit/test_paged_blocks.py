"""The paged room's bookkeeping: the allocator under hypothesis, prefix keys, the scheduler, what allocators waste."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from effnlp_lab.errors import UsageError
from effnlp_lab.paged import (
    BlockManager,
    OutOfPages,
    SamplingParams,
    Scheduler,
    Sequence,
    cache_bytes_per_token,
    pages_for,
    waste,
)  # fmt: skip
from effnlp_lab.paged.requests import Request, State
from effnlp_lab.paged.sequence import NO_PAGE

PAGE = 4
TOKENS = st.integers(0, 1)


class Allocator(RuleBasedStateMachine):
    """Sequences beside plain lists of their tokens, with a memory that is written through the block tables."""

    sequences = Bundle("sequences")

    @initialize(pages=st.integers(2, 12), caching=st.booleans(), window=st.integers(1, 9), sinks=st.integers(0, 5))
    def start(self, pages, caching, window, sinks):
        self.manager = BlockManager(pages, PAGE, prefix_caching=caching)
        self.window, self.sinks = window, sinks
        self.memory = {}
        self.texts = {}  # sequence -> its tokens, None for those that a window has left behind
        self.floors = {}
        self.prefix_of = {}  # key of a page -> all tokens up to its end

    @rule(target=sequences, prompt=st.lists(TOKENS, max_size=14))
    def new(self, prompt):
        sequence = Sequence(self.manager)
        known = sequence.match(prompt)
        self.texts[sequence], self.floors[sequence] = prompt[:known], 0
        assert known % PAGE == 0 and (known == 0 or self.manager.prefix_caching)
        self.append(sequence, prompt[known:])
        return sequence

    @rule(sequence=sequences, tokens=st.lists(TOKENS, max_size=9))
    def append(self, sequence, tokens):
        before = list(sequence.pages), sequence.length, self.manager.free_pages
        try:
            copies = sequence.append(len(tokens))
        except OutOfPages:
            assert before == (sequence.pages, sequence.length, self.manager.free_pages)
            return
        for source, destination in copies:
            for place in range(PAGE):
                self.memory[destination, place] = self.memory.get((source, place))
        for i, token in enumerate(tokens, start=before[1]):
            self.memory[sequence.pages[i // PAGE], i % PAGE] = token
        self.texts[sequence] = self.texts[sequence] + tokens

    @rule(sequence=sequences, length=st.integers(0, 20))
    def truncate(self, sequence, length):
        if self.floors[sequence] <= length <= sequence.length:
            sequence.truncate(length)
            del self.texts[sequence][length:]
        else:
            with pytest.raises(UsageError):
                sequence.truncate(length)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        child = sequence.fork()
        self.texts[child], self.floors[child] = list(self.texts[sequence]), self.floors[sequence]
        return child

    @rule(sequence=sequences)
    def commit(self, sequence):
        text = self.texts[sequence]
        if None in text:
            return
        sequence.commit(text)
        for i, page in enumerate(sequence.pages[: len(text) // PAGE]):
            if key := self.manager.key(page):
                prefix = tuple(text[: (i + 1) * PAGE])
                assert self.prefix_of.setdefault(key, prefix) == prefix

    @rule(sequence=sequences)
    def roll(self, sequence):
        seen = {*range(min(self.sinks, sequence.length)), *range(sequence.length - self.window + 1, sequence.length)}
        held = sum(page != NO_PAGE for page in sequence.pages)
        sequence.roll(self.window, self.sinks, sequence.length)
        for i, page in enumerate(sequence.pages):
            if page == NO_PAGE:
                assert not seen & set(range(i * PAGE, (i + 1) * PAGE))
                self.texts[sequence][i * PAGE : (i + 1) * PAGE] = [None] * PAGE
        if sum(page != NO_PAGE for page in sequence.pages) < held:
            self.floors[sequence] = sequence.length

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        sequence.free()
        del self.texts[sequence], self.floors[sequence]
        assert sequence.length == 0 and not sequence.pages

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, text in self.texts.items():
            assert sequence.length == len(text) and len(sequence.pages) == pages_for(len(text), PAGE)
            found = [self.memory.get((sequence.pages[i // PAGE], i % PAGE)) for i in range(len(text))]
            assert all(wanted in (None, token) for wanted, token in zip(text, found, strict=True))

    @invariant()
    def no_page_is_lost_and_none_is_held_without_being_counted(self):
        held = Counter(page for sequence in self.texts for page in sequence.pages if page != NO_PAGE)
        assert all(self.manager.references(page) == held[page] for page in range(self.manager.pages))
        assert self.manager.free_pages == self.manager.pages - len(held)
        for sequence in self.texts:
            mine = [page for page in sequence.pages if page != NO_PAGE]
            assert len(mine) == len(set(mine))

    @invariant()
    def a_cached_page_holds_what_its_key_says(self):
        keys = {self.manager.key(page): page for page in range(self.manager.pages)}
        for key in keys.keys() - {None}:
            content = tuple(self.memory[keys[key], place] for place in range(PAGE))
            assert content == self.prefix_of[key][-PAGE:]

    def teardown(self):
        for sequence in self.texts:
            sequence.free()
        assert self.manager.free_pages == self.manager.pages
        assert sorted(self.manager.allocate(self.manager.pages)) == list(range(self.manager.pages))


TestAllocator = Allocator.TestCase
TestAllocator.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_the_paper_s_example_of_copy_on_write():
    """Kwon et al. 2023, figure 8: two samples of one prompt share its pages; the first to write gets a copy."""
    manager = BlockManager(8, 4)
    first = Sequence(manager)
    first.append(7)
    second = first.fork()
    assert first.pages == second.pages and manager.references(first.pages[1]) == 2
    shared = first.pages[1]
    assert first.append(1) == [(shared, first.pages[1])] and first.pages[1] != shared
    assert second.append(1) == [] and second.pages[1] == shared
    assert first.pages[0] == second.pages[0]


@pytest.mark.parametrize("length,pages", [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_a_prompt_of_exactly_k_pages_takes_k(length, pages):
    sequence = Sequence(BlockManager(4, 16))
    sequence.append(length)
    assert len(sequence.pages) == pages == pages_for(length, 16)


def test_the_same_tokens_after_another_beginning_are_not_found():
    manager = BlockManager(8, 4)
    known = Sequence(manager)
    known.append(8)
    known.commit([1, 1, 1, 1, 2, 2, 2, 2])
    other, same = Sequence(manager), Sequence(manager)
    assert other.match([3, 3, 3, 3, 2, 2, 2, 2]) == 0 and same.match([1, 1, 1, 1, 2, 2, 2, 2]) == 8
    assert same.pages == known.pages


def test_a_page_that_is_written_again_is_found_by_its_new_tokens_only():
    manager = BlockManager(8, 4)
    sequence = Sequence(manager)
    sequence.append(8)
    sequence.commit([1] * 8)
    sequence.truncate(6)
    sequence.append(6)
    found = []
    for tokens in ([1] * 8, [1] * 6 + [2] * 6):
        sequence.commit([1] * 6 + [2] * 6 if tokens[-1] == 2 else [1] * 6)
        other = Sequence(manager)
        found.append(other.match(tokens))
        other.free()
    assert found == [4, 12]


def test_the_page_free_longest_is_evicted_first_and_a_prefix_from_its_end():
    manager = BlockManager(4, 4)
    old, young = Sequence(manager), Sequence(manager)
    for sequence, tokens in ((old, [1] * 8), (young, [2] * 8)):
        sequence.append(8)
        sequence.commit(tokens)
    old.free()
    young.free()
    Sequence(manager).append(4)
    assert manager.evictions == 1
    assert Sequence(manager).match([1] * 8) == 4 and Sequence(manager).match([2] * 8) == 8


@pytest.mark.parametrize("call", (
    lambda: BlockManager(0, 16), lambda: BlockManager(2, 16).release(0), lambda: BlockManager(2, 16).share(5),
    lambda: Sequence(BlockManager(2, 16)).append(-1), lambda: Sequence(BlockManager(2, 16)).truncate(1),
    lambda: waste([5, 30], max_length=20), lambda: BlockManager(2, 16).allocate(3),
))  # fmt: skip
def test_misuse_is_refused_with_a_sentence(call):
    with pytest.raises(ValueError, match=r"^[A-Z0-9a-z].*\."):
        call()


def test_waste_by_hand():
    found = waste([1, 16, 17, 100], max_length=128, page_size=16)
    assert {name: w.reserved for name, w in found.items()} == {
        "maximum": 512, "powers of two": 1 + 16 + 32 + 128, "padded batch": 400, "paged": 16 + 16 + 32 + 112,
    }  # fmt: skip
    assert all(w.used == 134 for w in found.values()) and found["paged"].share == 1 - 134 / 176
    assert cache_bytes_per_token(40, 40, 128, 2) == 800 * 1024  # OPT-13B: 800 KB a token (Kwon et al., section 3)


# The scheduler, alone.


def request(number, prompt, new=4):
    made = Request(number, list(range(prompt)), SamplingParams(max_new_tokens=new), frozenset())
    made.prompt_length = prompt
    return made


def play(scheduler, steps=200):
    """Run it with a device that answers at once; returns what each step did."""
    log = []
    for _ in range(steps):
        if not scheduler.active and not scheduler.waiting:
            break
        plan = scheduler.schedule()
        assert plan, "nothing to do and not finished"
        log.append(([(c.request.id, c.start, c.count) for c in plan.chunks], [r.id for r in plan.decodes]))
        for r in [*plan.decodes, *(c.request for c in plan.chunks if c.last)]:
            assert r.computed == len(r.tokens) <= r.sequence.length
            r.in_flight -= 1
            r.tokens.append(7)
            if len(r.tokens) - r.prompt_length == r.params.max_new_tokens:
                scheduler.finish(r, "length")
    return log


def test_prompts_are_read_in_chunks_beside_decoding():
    scheduler = Scheduler(BlockManager(20, 16), max_batch=4, chunk=8)
    for r in (request(0, 5, 3), request(1, 12, 2)):
        scheduler.submit(r)
    assert play(scheduler) == [
        ([(0, 0, 5), (1, 0, 3)], []), ([(1, 3, 8)], [0]), ([(1, 11, 1)], [0]), ([], [1]),
    ]  # fmt: skip


def test_the_latest_arrival_is_preempted_and_everything_finishes():
    manager = BlockManager(5, 4, prefix_caching=False)
    scheduler = Scheduler(manager, max_batch=4, chunk=64)
    requests = [request(i, 4, 9) for i in range(3)]
    for r in requests:
        scheduler.submit(r)
    play(scheduler)
    assert scheduler.preemptions >= 1 and requests[0].preemptions == 0
    assert all(len(r.tokens) == 13 and r.state is State.FINISHED for r in requests)
    assert manager.free_pages == 5


def test_nobody_is_preempted_while_tokens_are_in_flight():
    scheduler = Scheduler(BlockManager(2, 4, prefix_caching=False), max_batch=2, chunk=64)
    for i in range(2):
        scheduler.submit(request(i, 4, 4))
    assert len(scheduler.schedule().chunks) == 1  # the page of the second is kept for the first to grow into
    scheduler = Scheduler(BlockManager(3, 4, prefix_caching=False), max_batch=2, chunk=64)
    for i in range(2):
        scheduler.submit(request(i, 4, 4))
    assert len(scheduler.schedule().chunks) == 2
    assert scheduler.schedule(settled=False) is None and scheduler.preemptions == 0


def test_a_window_gives_pages_back_and_a_long_text_fits_in_few():
    manager = BlockManager(6, 4)
    scheduler = Scheduler(manager, max_batch=2, chunk=4, window=6, sinks=2)
    scheduler.submit(request(0, 40, 30))
    play(scheduler)
    assert not scheduler.active and manager.free_pages == 6
