"""Prefetching to a GPU: right contents on any stream, no races, copies beside kernels, memory that stays bounded."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

import effnlp_lab.streaming as room
from effnlp_lab.streaming import prefetch

DELAY = 30_000_000  # cycles that a kernel sleeps: some 20 ms
NUMBERS = 1 << 22  # int64 numbers in a batch: 32 MiB


def batches(count, numbers=NUMBERS):
    """Batch i holds i everywhere, so that any mixture of two shows."""
    return (torch.full((numbers,), number) for number in range(count))


def pinned(count):
    """The same, pinned already: they are there at once, while the kernels of earlier batches still wait."""
    return [batch.pin_memory() for batch in batches(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


@pytest.fixture
def slow_copies(monkeypatch):
    """Every copy starts late: whoever does not wait for it reads what was there before."""
    plain = prefetch._pinned

    def late(tensor):
        torch.cuda._sleep(DELAY)
        return plain(tensor)

    monkeypatch.setattr(prefetch, "_pinned", late)


def wrong_sums(found, count):
    return [n for n, total in enumerate(found[:count]) if int(total) != n * NUMBERS]


def sums(count, side_stream=False, depth=2):
    """The sum of each batch, taken on the current stream by a kernel that runs late."""
    totals = []
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for batch in room.Prefetcher(pinned(count), "cuda", depth=depth):
            assert batch.is_cuda
            torch.cuda._sleep(DELAY)
            totals.append(batch.sum())
            del batch
    torch.cuda.synchronize()
    return totals


def test_every_structure_arrives_as_it_was():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(513, 7, generator=generator)
    packed = room.pack([[1, 2, 3], [4, 5]], 4)
    given = [x, {"a": x.half(), "n": 3}, (x.bfloat16(), [x[:, ::2], "s"]), packed, torch.empty(0), x.pin_memory()]
    found = list(room.Prefetcher(given, "cuda"))
    assert torch.equal(found[0].cpu(), x) and torch.equal(found[1]["a"].cpu(), x.half()) and found[1]["n"] == 3
    assert torch.equal(found[2][0].cpu(), x.bfloat16()) and torch.equal(found[2][1][0].cpu(), x[:, ::2])
    assert found[2][1][1] == "s" and found[3].cu_seqlens.is_cuda and found[3].cu_seqlens.dtype == torch.int32
    assert torch.equal(found[3].input_ids.cpu(), packed.input_ids) and found[3].max_seqlen == packed.max_seqlen
    assert found[4].is_cuda and torch.equal(found[5].cpu(), x) and not threads()


@pytest.mark.parametrize("side_stream", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_kernels_that_run_late_read_their_own_batch(side_stream, depth):
    assert not wrong_sums(sums(12, side_stream, depth), 12)


@pytest.mark.alone
def test_without_record_stream_they_would_not(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    torch.cuda.empty_cache()
    assert wrong_sums(sums(12), 12), "the test above cannot see a race any more"


def late_totals(count):
    totals = []
    for batch in room.Prefetcher(pinned(count), "cuda"):
        totals.append(batch.sum())  # at once: the copy has not begun
    torch.cuda.synchronize()
    return totals


def test_kernels_wait_for_copies_that_come_late(slow_copies):
    assert not wrong_sums(late_totals(8), 8)


@pytest.mark.alone
def test_without_the_event_they_would_not(slow_copies, monkeypatch):
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda self, event: None)
    torch.cuda.empty_cache()
    assert wrong_sums(late_totals(8), 8), "the test above cannot see a race any more"


@pytest.mark.alone
def test_copies_run_beside_kernels():
    large = [torch.full((1 << 25,), n).pin_memory() for n in range(10)]  # 256 MiB: some 5 ms on PCIe 5
    kernel = 2 * DELAY

    def serial():
        for batch in large:
            batch = batch.to("cuda", non_blocking=True)
            torch.cuda._sleep(kernel)

    def overlapped():
        for _ in room.Prefetcher(large, "cuda"):
            torch.cuda._sleep(kernel)

    def kernels():
        for _ in large:
            torch.cuda._sleep(kernel)

    def seconds(work):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[1]

    one_by_one, together, alone = seconds(serial), seconds(overlapped), seconds(kernels)
    copies = one_by_one - alone
    assert copies > 0.01, "the copies are too short to see"
    # All copies but the first hide behind kernels.
    assert together < alone + 0.5 * copies, (
        f"kernels {alone:.3f}, one by one {one_by_one:.3f}, together {together:.3f} s"
    )


def test_memory_is_bounded_by_the_depth():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for batch in room.Prefetcher(batches(20), "cuda", depth=2):
        batch.mul_(2)
        torch.cuda.synchronize()
    # Two ready, one on its way, one in the loop and one that the loop is about to let go.
    assert torch.cuda.max_memory_allocated() - before <= 5 * NUMBERS * 8
    del batch
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_errors_surface_and_early_ends_are_clean():
    def broken():
        yield from batches(3, 10)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in room.Prefetcher(broken(), "cuda"):
            seen.append(int(batch[0]))
    assert seen == [0, 1, 2] and not threads()
    for batch in room.Prefetcher((torch.full((10,), n) for n in itertools.count()), "cuda"):
        if int(batch[0]) == 5:
            break
    assert not threads()


def test_a_loader_with_workers_continues_exactly_on_the_gpu(tmp_path):
    ids = np.random.default_rng(0).integers(0, 60_000, 100_000)
    shards = room.write_shards(tmp_path / "s", np.split(ids, 50), 60_000, shard_tokens=30_000)
    windows = room.Windows(shards, 128, overlap=1)
    undisturbed = room.StreamLoader(windows, 8, seed=3)
    expected = [batch for _ in range(2) for batch in undisturbed]
    with room.StreamLoader(windows, 8, seed=3, num_workers=2, prefetch_factor=4) as loader:
        prefetcher = room.Prefetcher(loader, "cuda", depth=4)
        seen = list(itertools.islice(prefetcher, 20))
        prefetcher.close()
        state = prefetcher.state_dict()
    with room.StreamLoader(windows, 8, num_workers=1) as loader:
        prefetcher = room.Prefetcher(loader, "cuda")
        prefetcher.load_state_dict(state)
        seen += [batch for _ in range(2) for batch in prefetcher]
    assert len(seen) == len(expected)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(seen, expected, strict=True))
    assert int(seen[0].max()) > 32_767  # uint16, not int16


def test_packed_batches_through_flash_attention_equal_separate_documents():
    import effnlp_lab.attention as attention

    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 99, (n,), generator=generator) for n in (5, 130, 64, 1, 300, 77, 256)]
    (batch,) = room.Prefetcher([room.pack(documents, 256, method="best_fit")], "cuda")
    table = torch.randn(3, 100, 2, 64, generator=generator).cuda()
    q, k, v = (part[batch.input_ids.flatten()] for part in table)
    packed = attention.flash_attention_varlen(q, k, v, batch.cu_seqlens, batch.cu_seqlens, causal=True)
    edges = batch.cu_seqlens.tolist()
    for number, document in enumerate(documents):
        for piece, place in zip(document.split(256), (batch.documents == number).nonzero().flatten(), strict=True):
            alone = (part[piece.cuda()].transpose(0, 1)[None].double() for part in table)
            right = attention.standard_attention(*alone, causal=True)[0].transpose(0, 1)
            torch.testing.assert_close(packed[edges[place] : edges[place + 1]].double(), right, rtol=1e-4, atol=1e-5)
