"""The order, its split, and the loader: beside the list of all items and torch's own sampler, and after a SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from itertools import islice

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import effnlp_lab.streaming as room
from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.order import SMALL, feistel

UNLIKELY = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*multi-threaded.*fork")


class Numbers:
    """The items are the numbers themselves."""

    def __init__(self, count, lengths=None):
        self.count, self.fingerprint = count, f"numbers-{count}"
        if lengths is not None:
            self.lengths = lengths

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return number


# -- order


@settings(max_examples=60, deadline=None)
@given(
    length=st.one_of(st.integers(0, 300), st.integers(SMALL - 1, SMALL + 40_000)),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 2**40),
)
def test_an_order_is_a_permutation_and_depends_on_nothing_else(length, seed, epoch):
    everything = room.Order(length, seed, epoch).at(np.arange(length))
    assert everything.dtype == np.int64 and np.array_equal(np.sort(everything), np.arange(length))
    some = np.random.default_rng(0).permutation(length)[:50].reshape(-1, 1)
    assert np.array_equal(room.Order(length, seed, epoch).at(some), everything[some])


def test_saved_states_need_orders_that_never_change():
    assert room.Order(10, 1, 0).at(range(10)).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]
    assert room.Order(10**12, 1, 2).at([0, 1, 2, 10**12 - 1]).tolist() == [
        564180315136,
        98855276499,
        672501743588,
        776021082059,
    ]


@pytest.mark.parametrize("bits", range(1, 13))
def test_feistel_is_a_bijection(bits):
    keys = np.arange(8, dtype=np.uint64) * np.uint64(77777777777)
    found = feistel(np.arange(1 << bits, dtype=np.uint64), bits, keys)
    assert np.array_equal(np.sort(found), np.arange(1 << bits))


def test_all_orders_of_five_items_are_equally_likely():
    seen = [tuple(room.Order(5, seed, epoch).at(range(5))) for seed in range(60) for epoch in range(100)]
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 120 and scipy.stats.chisquare(counts).pvalue > UNLIKELY


@pytest.mark.parametrize("length", [SMALL, SMALL + 1, 100_003, 1 << 20])
def test_an_order_is_even(length):
    items = room.Order(length, 3, 1).at(np.arange(length))
    where, step = np.arange(length) * 16 // length, np.diff(items, append=items[0]) % length
    table = np.histogram2d(where, items * 16 // length, bins=16)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > UNLIKELY
    assert scipy.stats.chisquare(np.bincount(step * 64 // length, minlength=64)).pvalue > UNLIKELY
    other = room.Order(length, 3, 2).at(np.arange(length))
    assert (items == other).sum() < 20  # of two permutations, one place in the mean


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 120), group=st.integers(1, 20), pool=st.none() | st.integers(1, 5))
def test_length_order_groups_by_length(data, count, group, pool):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    order = room.LengthOrder(room.Order(count, 5, 1), lengths, group, pool)
    items = order.at(np.arange(count))
    assert sorted(items) == list(range(count))
    size = group * pool if pool else count
    base = room.Order(count, 5, 1).at(np.arange(count))
    for first in range(0, count, size):
        inside = items[first : first + size]
        assert sorted(inside) == sorted(base[first : first + size])
        groups = [[lengths[i] for i in inside[k : k + group]] for k in range(0, len(inside), group)]
        full = sorted(g for g in groups if len(g) == group)
        assert sum(full, []) == sorted(sum(full, []))
    assert order.at(np.array([count - 1]))[0] == items[-1]


def test_length_order_shuffles_its_groups():
    order = room.LengthOrder(room.Order(400, 5), np.arange(400), 10)
    firsts = order.at(np.arange(0, 400, 10))
    assert sorted(firsts) == list(range(0, 400, 10)) and firsts.tolist() != sorted(firsts)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([1, float("nan")], "length of item 1 is nan"),
        ([1.5, 2], "length of item 0 is 1.5"),
        ([2, -1], "length of item 1 is -1"),
        ([float("inf"), 1], "length of item 0 is inf"),
        (["a", "b"], "one row of whole numbers"),
        ([1], "There are 1 lengths for 2 items"),
    ],
)
def test_bad_lengths_are_refused(lengths, words):
    with pytest.raises(UsageError, match=words):
        room.LengthOrder(room.Order(2), lengths, 1)


# -- split


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 100), batch_size=st.integers(1, 9), ranks=st.integers(1, 7))
def test_a_split_is_what_torch_deals_out(length, batch_size, ranks):
    data = range(length)
    for remainder in ("keep", "drop", "repeat"):
        if remainder == "keep" and length < ranks or remainder == "drop" and length < ranks * batch_size:
            with pytest.raises(UsageError):
                room.Split(length, batch_size, 0, ranks, remainder)
            continue
        drop, dealt = remainder == "drop", []
        for rank in range(ranks):
            split = room.Split(length, batch_size, rank, ranks, remainder)
            ours = [found for step in range(split.steps) if (found := split.positions(step).tolist())]
            sampler = DistributedSampler(data, ranks, rank, shuffle=False, drop_last=drop)
            theirs = list(sampler) if remainder != "keep" else list(data[rank::ranks])
            assert ours == list(BatchSampler(theirs, batch_size, drop))
            dealt += sum(ours, [])
            assert split.steps == 0 or split.after(split.steps - 1) == min(split.end, length)
        if remainder == "keep":
            assert sorted(dealt) == list(data)  # nothing lost, nothing twice
        assert len(set(dealt)) == length or drop


@settings(max_examples=100, deadline=None)
@given(data=st.data(), length=st.integers(1, 100))
def test_a_split_goes_on_from_anywhere_with_other_ranks(data, length):
    done, position = [], 0
    while position < length:
        ranks, batch_size = data.draw(st.integers(1, min(length, 6))), data.draw(st.integers(1, 9))
        splits = [room.Split(length, batch_size, rank, ranks, start=position) for rank in range(ranks)]
        steps = data.draw(st.integers(1, splits[0].steps))
        done += [int(p) for split in splits for step in range(steps) for p in split.positions(step)]
        position = splits[0].after(steps - 1)
        assert sorted(done) == list(range(position))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2, "ranks": 2}, "rank is 2, and 2 ranks have numbers 0 to 1"),
        ({"ranks": 11}, "11 ranks cannot share 10 items: use fewer ranks"),
        ({"remainder": "lose"}, "Unknown remainder 'lose'"),
        ({"batch_size": 0}, "batch_size is 0: expected a whole number, 1 or more"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"ranks": True}, "ranks is True"),
        ({"batch_size": 11, "remainder": "drop"}, "fill no global batch of 11"),
        ({"start": 11}, "Position 11 is outside"),
    ],
)
def test_bad_splits_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        room.Split(**{"length": 10, "batch_size": 3, **options})


# -- stream


def items_of(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 3), (1, 1), (2, 1), (3, 2)])
def test_every_rank_delivers_its_share_in_order_epoch_after_epoch(workers, ranks):
    data = Numbers(79)  # the steps of an epoch are no multiple of the workers
    for rank in range(ranks):
        with room.StreamLoader(data, 4, seed=9, rank=rank, ranks=ranks, num_workers=workers) as loader:
            for epoch in range(3):
                assert (loader.epoch, loader.position) == (epoch, 0)
                mine = room.Order(79, 9, epoch).at(range(79))[rank::ranks]
                expected = [mine[k : k + 4].tolist() for k in range(0, len(mine), 4)]
                assert len(loader) == len(expected) and items_of(loader) == expected


def test_torchs_own_loader_takes_a_batch_stream():
    stream = room.BatchStream(Numbers(50), 8, seed=2)
    for epoch in (0, 5):
        stream.set_epoch(epoch)
        order = room.Order(50, 2, epoch).at(range(50)).tolist()
        for workers in (0, 2):
            loader = DataLoader(stream, batch_size=None, num_workers=workers)
            assert sum(items_of(loader), []) == order


def test_a_loop_that_was_left_goes_on_in_the_next(workers=2):
    with room.StreamLoader(Numbers(40), 6, seed=1, num_workers=workers) as loader:
        whole = items_of(loader)
        for stop in (3, 7):  # in the middle, and right after the last batch
            loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
            seen = [batch.tolist() for batch in islice(loader, stop)]
            assert seen == whole[:stop] and loader.epoch == (stop == 7)
            rest = items_of(loader)
            assert rest == whole[stop:] or stop == 7 and len(rest) == 7 and loader.epoch == 2


def test_the_state_counts_what_was_delivered_not_what_lies_ready():
    with room.StreamLoader(Numbers(1000), 5, seed=1, num_workers=2, prefetch_factor=8) as loader:
        whole = items_of(loader)
    loader = room.StreamLoader(Numbers(1000), 5, seed=1, num_workers=2, prefetch_factor=8)
    prefetcher = room.Prefetcher(loader, depth=6)
    for number, batch in enumerate(prefetcher, 1):
        time.sleep(0.02)
        assert batch.tolist() == whole[number - 1]
        assert prefetcher.state_dict()["position"] == 5 * number
        if number == 5:
            assert loader.position > 5 * number  # the thread is ahead
            break
    state = json.loads(json.dumps(prefetcher.state_dict()))
    assert items_of(prefetcher) == whole[5:]  # left early, it begins with what lay ready
    for workers in (0, 1):
        with room.StreamLoader(Numbers(1000), 5, seed=77, num_workers=workers) as again:
            again.load_state_dict(state)
            assert items_of(again) == whole[5:]
    loader.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(6, 90), by_length=st.none() | st.integers(1, 4))
def test_other_numbers_of_ranks_continue_the_same_epochs(data, count, by_length):
    """Phases with ranks of their own, each resumed from the state of the one before: every epoch is whole."""
    lengths = np.arange(count) * 7 % 10
    delivered, state = {}, None
    for _ in range(data.draw(st.integers(1, 5))):
        ranks, batch_size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
        loaders = [
            room.StreamLoader(Numbers(count, lengths), batch_size, seed=4, rank=r, ranks=ranks, by_length=by_length)
            for r in range(ranks)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(json.loads(json.dumps(state)))
        steps = data.draw(st.integers(1, 6))
        epoch = loaders[0].epoch
        for loader in loaders:
            for batch in islice(loader, steps):
                delivered.setdefault(epoch, []).extend(batch.tolist())
        state = loaders[0].state_dict()
    for epoch, items in delivered.items():
        assert len(set(items)) == len(items)
        if epoch < state["epoch"]:
            assert sorted(items) == list(range(count))
        elif by_length is None:
            assert sorted(items) == sorted(room.Order(count, 4, epoch).at(range(state["position"])))


def test_the_same_global_batches_for_any_ranks_that_divide_them():
    steps = {}
    for ranks in (1, 2, 3, 6):
        loaders = [room.StreamLoader(Numbers(50), 12 // ranks, seed=1, rank=r, ranks=ranks) for r in range(ranks)]
        batches = [items_of(loader) for loader in loaders]
        steps[ranks] = [sorted(sum((b[t] for b in batches if t < len(b)), [])) for t in range(5)]
    assert steps[1] == steps[2] == steps[3] == steps[6]


def _stream(folder, state):
    """Log each batch, then save the state after it: what a training loop does."""
    loader = room.StreamLoader(Numbers(20_000), 4, seed=6, num_workers=2, prefetch_factor=8)
    prefetcher = room.Prefetcher(loader, depth=4)
    if state is not None:
        prefetcher.load_state_dict(state)
    with open(folder / "log", "a", buffering=1) as log:
        for batch in prefetcher:
            print(json.dumps(batch.tolist()), file=log)
            room.save_state(folder / "state.json", prefetcher.state_dict())


def test_a_killed_process_continues_the_undisturbed_stream(tmp_path):
    delivered, state = [], None
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=_stream, args=(tmp_path, state))
        process.start()
        already = state["position"] if state else 0
        while (
            not (tmp_path / "state.json").exists()
            or room.load_state(tmp_path / "state.json")["position"] < already + 80
        ):
            assert process.is_alive()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        state = room.load_state(tmp_path / "state.json")
        log = (tmp_path / "log").read_text().splitlines()
        (tmp_path / "log").unlink()
        # The last line may be of a batch that was logged and whose state was not saved any more.
        counted = (state["position"] - already) // 4
        assert 20 <= counted <= len(log) <= counted + 1
        delivered += [json.loads(line) for line in log[:counted]]
    expected = room.Order(20_000, 6, 0).at(range(20_000)).reshape(-1, 4)
    assert delivered == expected[: len(delivered)].tolist()
    with room.StreamLoader(Numbers(20_000), 4, num_workers=1) as loader:
        loader.load_state_dict(state)
        rest = [batch.tolist() for batch in islice(loader, 100)]
    assert rest == expected[len(delivered) : len(delivered) + 100].tolist()


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"{n}\n" for n in range(211)))
    return room.TextSource(tmp_path / "x.txt")


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_a_source_is_dealt_out_like_a_view(lines, workers, ranks):
    for remainder in ("keep", "drop"):
        order = [list(map(int, room.ShuffleBuffer(lines, 30, 5, epoch))) for epoch in range(2)]
        for rank in range(ranks):
            options = {"seed": 5, "buffer": 30, "rank": rank, "ranks": ranks, "remainder": remainder}
            with room.StreamLoader(lines, 4, num_workers=workers, **options) as loader:
                for items in order:
                    mine = items[: 211 // (4 * ranks) * 4 * ranks] if remainder == "drop" else items
                    mine = mine[rank::ranks]
                    expected = [mine[k : k + 4] for k in range(0, len(mine), 4)]
                    assert [[int(row) for row in batch] for batch in loader] == expected


def test_a_source_is_resumed_with_other_ranks_and_workers(lines):
    order = [int(row) for epoch in range(2) for row in room.ShuffleBuffer(lines, 30, 5, epoch)]
    for stop in (1, 5, 24, 26):  # 26 steps and a short one: the buffer runs empty from step 23 on
        loaders = [room.StreamLoader(lines, 4, seed=5, buffer=30, rank=r, ranks=2, num_workers=r) for r in range(2)]
        seen = [int(row) for loader in loaders for batch in islice(loader, stop) for row in batch]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert states[0] == states[1] and sorted(seen) == sorted(order[: 8 * stop])
        for workers in (0, 2):
            with room.StreamLoader(lines, 3, num_workers=workers) as loader:
                loader.load_state_dict(states[1])
                rest = [int(row) for _ in range(2) for batch in loader for row in batch]
            assert rest == order[8 * stop :]
        for loader in loaders:
            loader.close()


def test_a_bad_line_is_one_sentence_from_a_worker_too(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 30 + "oops\n")
    source = room.open_source(tmp_path / "x.jsonl")
    for workers in (0, 2):
        loader = room.StreamLoader(source, 4, shuffle=False, num_workers=workers)
        seen = []
        with pytest.raises(UsageError, match="x.jsonl, line 31: this is no JSON") as caught:
            for batch in loader:
                seen += batch
        assert len(seen) == 28 and "\n" not in str(caught.value)


def test_states_of_something_else_are_refused():
    loader = room.StreamLoader(Numbers(40), 6)
    state = loader.state_dict()
    for wrong, words in (
        (
            {**state, "data": "other"},
            "belongs to another data set .its fingerprint is 'other', here it is 'numbers-40'",
        ),
        ({**state, "items": 41}, "another data set .its number of items"),
        ({**state, "version": 0}, "has version 0"),
        ({**state, "position": 41}, "damaged"),
        ({**state, "position": -1}, "position is -1"),
        ({**state, "epoch": 0.5}, "epoch is 0.5"),
        ({**state, "order": {}}, "damaged"),
        ({**state, "order": {"seed": 1, "shuffle": True, "pool": 2, "group": 3}}, "has no `lengths`"),
        ({"epoch": 0}, "no state of a StreamLoader"),
        (None, "no state of a StreamLoader"),
    ):
        with pytest.raises(UsageError, match=words):
            loader.load_state_dict(wrong)
    assert loader.state_dict() == state


def test_a_state_of_other_windows_is_refused_and_files_of_no_state(tmp_path):
    shards = room.write_shards(tmp_path / "s", [range(100)], 100)
    state = room.StreamLoader(room.Windows(shards, 10), 2).state_dict()
    with pytest.raises(UsageError, match="another data set"):
        room.StreamLoader(room.Windows(shards, 5), 2).load_state_dict(state)
    path = room.save_state(tmp_path / "state.json", state)
    assert room.load_state(path) == state and len(list(tmp_path.iterdir())) == 2
    path.write_text("{")
    with pytest.raises(UsageError, match="holds no state"):
        room.load_state(path)
    with pytest.raises(UsageError, match="There is no state at"):
        room.load_state(tmp_path / "none.json")


def test_loading_a_state_ends_a_loop_that_runs():
    loader = room.StreamLoader(Numbers(40), 6)
    loop = iter(loader)
    next(loop)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(UsageError, match="begin a new loop"):
        next(loop)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (object(), {}, "A object cannot be streamed"),
        (Numbers(3), {"rank": 0, "ranks": 4}, "4 ranks cannot share 3 items"),
        (Numbers(3), {"rank": 0}, "Give both rank and ranks"),
        (Numbers(3), {"by_length": 2}, "has no `lengths`"),
        (Numbers(3), {"num_workers": -1}, "num_workers is -1"),
        (Numbers(3), {"seed": None}, "seed is None"),
    ],
)
def test_bad_loaders_are_refused(data, options, words):
    with pytest.raises(UsageError, match=words):
        room.StreamLoader(data, 1, **options)


def test_a_source_allows_no_repeats_and_no_empty_ranks(lines):
    for options in ({"remainder": "repeat"}, {"by_length": 3}):
        with pytest.raises(UsageError, match="needs random access"):
            room.StreamLoader(lines, 4, **options)
    with pytest.raises(UsageError, match="300 ranks cannot share the 211 rows"):
        list(room.StreamLoader(lines, 1, rank=0, ranks=300))
    with pytest.raises(UsageError, match="fill no global batch of 400"):
        list(room.StreamLoader(lines, 400, remainder="drop"))


def test_workers_leave_torchs_random_state_alone():
    before = torch.get_rng_state()
    with room.StreamLoader(Numbers(20), 4, num_workers=1) as loader:
        assert len(items_of(loader)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_come_from_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    mine = room.Order(20, 0, 0).at(range(20))[1::3]
    assert sum(items_of(room.StreamLoader(Numbers(20), 4)), []) == mine.tolist()
