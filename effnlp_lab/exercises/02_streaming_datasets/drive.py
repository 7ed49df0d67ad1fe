"""How the answers of lab 02 are called: with files in a folder of their own, streams that count, and scripts."""

import json
import struct
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

SMALL_READ = 1 << 20  # bytes that a read of a few tokens may take
SMALL_STATE = 500  # characters of JSON
PATIENCE = 300  # looks, a millisecond apart, that a thread gets to run ahead
SETTLED = 30  # looks after which a bounded thread stands still


class Interrupted(Exception):
    """Ends a stream of documents in the middle, as a full disk or a lost connection would."""


def write_shards(answer, documents, shard_tokens, interrupted_after=None, full=None):
    """The index and the tokens on disk; of an interrupted run, what stands in the first `full` shards."""

    def stream():
        for number, document in enumerate(documents):
            if number == interrupted_after:
                raise Interrupted
            yield list(document)

    with tempfile.TemporaryDirectory() as name:
        folder, index = Path(name), None
        try:
            index = answer(stream(), folder, shard_tokens)
        except Interrupted:
            if interrupted_after is None:
                raise
        files = {path.name: _tokens(path.read_bytes()) for path in sorted(folder.glob("*.bin"))}
    if interrupted_after is not None:
        return {"files": dict(list(files.items())[:full])}
    return {"index": index, "files": files}


def _tokens(data):
    """Two bytes a token, little end first; an odd byte at the end counts as one more."""
    return list(struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2])) + list(data[len(data) // 2 * 2 :])


def read_document(answer, shards, index, numbers, absent=(), gap=0):
    """The documents `numbers`, one call each. `absent`: shards that are not on disk. `gap`: zeros that no document
    asked for holds, before the last shard's last run of tokens; then the memory of the last call is told as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, runs in enumerate(shards):
            if number in absent:
                continue
            with open(folder / f"shard_{number:05d}.bin", "wb") as file:
                for at, run in enumerate(runs):
                    if gap and number == len(shards) - 1 and at == len(runs) - 1:
                        file.seek(2 * gap, 1)  # a hole: it takes no place on the disk
                    file.write(struct.pack(f"<{len(run)}H", *run))
        found = [answer(folder, index, number) for number in numbers[:-1]]
        tracemalloc.start()
        try:
            found.append(answer(folder, index, numbers[-1]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        found = [one.clone() if hasattr(one, "clone") else one for one in found]  # a mapping ends with its file
    large = "the shard" if peak <= 6 * gap else "several copies of the shard"
    return {"documents": found, "memory": large if gap and peak > SMALL_READ else "small"}


def worker_batches(answer, count, global_batch, seed, epoch, ranks, workers):
    """What every worker of every rank delivers: [rank][worker] -> list of batches."""
    return [
        [answer(count, global_batch, seed, epoch, rank, ranks, worker, workers) for worker in range(workers)]
        for rank in range(ranks)
    ]


def shuffle_buffer(answer, stream, size, uniforms):
    """What is delivered, and whether at most `size` items were ever held."""
    drawn, delivered, held = 0, [], 0

    def source():
        nonlocal drawn
        for item in stream:
            drawn += 1
            yield item

    for item in answer(source(), size, iter(uniforms)):
        delivered.append(item)
        held = max(held, drawn - len(delivered))
    return {"delivered": delivered, "held_at_most_size": held <= size}


def ResumableStream(answer, count, seed, script):
    """Run a script on named streams.

    ["new", stream, rank, ranks, prefetch]; ["next", streams, times] asks each in turn, `times` times;
    ["save", stream, state] keeps its state as JSON; ["load", stream, state]. Returns a line for each "next" (what came,
    and how many samples were fetched and not delivered after each) and for each "save" (whether the state is small).
    """
    streams, states, fetched, delivered, trace = {}, {}, {}, {}, []

    def fetch_for(name):
        def fetch(number):
            fetched[name] += 1
            return f"sample {number}"

        return fetch

    for what, name, *rest in script:
        if what == "new":
            fetched[name] = delivered[name] = 0
            streams[name] = answer(fetch_for(name), count, seed, *rest)
        elif what == "next":
            line = {"came": [], "waiting": []}
            for _ in range(rest[0]):
                for one in name:
                    line["came"].append(next(streams[one]))
                    delivered[one] += 1
                    line["waiting"].append(fetched[one] - delivered[one])
            trace.append(line)
        elif what == "save":
            states[rest[0]] = json.dumps(streams[name].state_dict())
            trace.append({"small_state": len(states[rest[0]]) <= SMALL_STATE})
        elif what == "load":
            fetched[name] = delivered[name] = 0
            streams[name].load_state_dict(json.loads(states[rest[0]]))
    return trace


def padded_batches(answer, samples, batch_size, window, pad_id):
    return answer(samples, batch_size, window, pad_id)


def pack_documents(answer, documents, length):
    return answer(documents, length)


def prefetch(answer, items, depth, fails=False, watched=False):
    """What is delivered and raised, where the source ran, and, when `watched`, how far ahead after the first item."""
    drawn, here, there, daemons = [], threading.get_ident(), set(), set()

    def source():
        for item in items:
            there.add(threading.get_ident())
            daemons.add(threading.current_thread().daemon)
            drawn.append(item)
            yield item
        if fails:
            wait_for(delivered, min(1, len(items)), SETTLED)  # so that the error comes while items lie ready
            raise ValueError("the disk is gone")

    def wait_for(filled, count, looks):
        while len(filled) < count and looks:
            time.sleep(0.001)  # looks are counted, not seconds: a machine may be busy elsewhere
            looks -= 1

    delivered, raised, ahead = [], None, depth
    try:
        for item in answer(source(), depth):
            delivered.append(item)
            if len(delivered) > 1 or here in there:
                continue
            if watched:
                wait_for(drawn, 1 + depth, PATIENCE)
                wait_for(drawn, 1 + depth + 2, SETTLED)
                ahead = len(drawn) - 1
            elif fails:
                wait_for(drawn, len(items) + 1, SETTLED)
    except ValueError as error:
        raised = str(error)
    return {
        "delivered": delivered,
        "raised": raised,
        "in_a_thread": here not in there,
        "ends_with_the_program": here in there or False not in daemons,
        "runs_ahead": ahead >= depth,
        "stops_ahead": ahead <= depth + 1,
    }
