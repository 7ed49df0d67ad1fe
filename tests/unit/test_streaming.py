"""Shards, views and sources: what is written is read, lazily, and what is wrong is refused in one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effnlp_lab.streaming as room
from effnlp_lab.errors import UsageError

DOCUMENTS = [list(range(n % 23)) for n in range(1, 60)]


@pytest.fixture
def shards(tmp_path):
    return room.write_shards(tmp_path / "shards", DOCUMENTS, 100, shard_tokens=64)


# -- shards


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=12), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 40),
    wide=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, documents, shard_tokens, wide):
    vocab_size = 70_000 if wide else 65_536
    documents = [[min(i, vocab_size - 1) for i in document] for document in documents]
    folder = tmp_path_factory.mktemp("shards") / "s"
    found = room.write_shards(folder, iter(documents), vocab_size, shard_tokens).verify()
    flat = list(itertools.chain(*documents))
    assert (found.documents, found.tokens) == (len(documents), len(flat))
    assert found.lengths().tolist() == [len(document) for document in documents]
    assert [found.document(i).tolist() for i in range(len(documents))] == documents
    for start, stop in itertools.combinations_with_replacement(range(0, len(flat) + 1, 5), 2):
        assert found.tokens_at(start, stop).tolist() == flat[start:stop]
    on_disk = b"".join(path.read_bytes() for path in sorted(folder.glob("*.tokens")))
    assert on_disk == np.array(flat, "<u4" if wide else "<u2").tobytes()
    again = pickle.loads(pickle.dumps(found))
    assert again.fingerprint == found.fingerprint and again.document(0).tolist() == documents[0]


def test_shards_close_at_their_size_and_a_long_document_has_its_own(tmp_path):
    found = room.write_shards(tmp_path / "s", [[1] * n for n in (3, 4, 30, 1, 9, 1)], 2, shard_tokens=10)
    assert [shard["tokens"] for shard in found.shards] == [7, 30, 10, 1]
    digest = hashlib.sha256((tmp_path / "s" / "00001.tokens").read_bytes()).hexdigest()
    assert found.shards[1]["tokens_sha256"] == digest


def test_views_are_read_only_and_writers_take_tensors(tmp_path):
    found = room.write_shards(tmp_path / "s", [torch.tensor([5, 6]), np.array([7], np.uint8)], 8)
    assert [found.document(i).tolist() for i in range(2)] == [[5, 6], [7]]
    with pytest.raises(ValueError, match="read-only"):
        found.document(0)[0] = 1


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([1, -1], "Document 1 holds the id -1 at position 1: .* from 0 to 99"),
        ([0, 1, 100], "Document 1 holds the id 100 at position 2"),
        ([0.5], "Document 1 is no sequence of whole numbers"),
        ([[1], [1, 2]], "Document 1 is no sequence"),
        (["a"], "Document 1 is no sequence"),
        ([float("nan")], "Document 1 is no sequence"),
        (3, "Document 1 is no sequence"),
    ],
)
def test_bad_documents_leave_nothing_on_disk(tmp_path, document, words):
    with pytest.raises(UsageError, match=words):
        room.write_shards(tmp_path / "s", [[1, 2], document], 100)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_and_nothing_of_nothing(tmp_path, shards):
    with pytest.raises(UsageError, match="exists already"):
        room.write_shards(shards.folder, [[1]], 100)
    assert room.Shards(shards.folder).verify().documents == len(DOCUMENTS)
    with pytest.raises(UsageError, match="Nothing was written"):
        room.write_shards(tmp_path / "none", [], 100)
    with pytest.raises(UsageError, match="vocab_size is 0"):
        room.write_shards(tmp_path / "none", [[1]], 0)
    with pytest.raises(UsageError, match="by this process already"):
        with room.ShardWriter(tmp_path / "none", 100), room.ShardWriter(tmp_path / "none", 100):
            pass
    with pytest.raises(UsageError, match="not open"):
        room.ShardWriter(tmp_path / "none", 10).add([1])
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def _write_for_ever(folder):
    with room.ShardWriter(folder, 100) as writer:
        while True:
            writer.add(range(100))


def test_a_killed_writer_leaves_no_shards_and_the_next_one_clears_up(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path / "s",))
    process.start()
    while not list(tmp_path.glob(".s.*.part/*.tokens")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "s").exists() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UsageError, match="holds no token shards"):
        room.Shards(tmp_path / "s")
    (leftover,) = tmp_path.iterdir()
    (tmp_path / leftover.name.replace(str(process.pid), str(os.getpid()))).mkdir()  # of a process that had our number
    room.write_shards(tmp_path / "s", [[1]], 100)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def _edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _cut(f / "00001.tokens", 7), "00001.tokens is truncated: it has 7 bytes, and index.json says"),
        (lambda f: _cut(f / "00000.ends", 999), "00000.ends is too long"),
        (lambda f: (f / "00001.tokens").unlink(), "00001.tokens is missing"),
        (lambda f: (f / "index.json").unlink(), "holds no token shards"),
        (lambda f: (f / "index.json").write_text("{"), "is damaged"),
        (lambda f: (f / "index.json").write_text("[]"), "is not an index of token shards"),
        (lambda f: _edit_index(f, version=9), "has version 9"),
        (lambda f: _edit_index(f, tokens=1), "does not fit together"),
        (lambda f: _edit_index(f, vocab_size=70_000), "does not fit together"),
        (lambda f: _edit_index(f, shards=[]), "does not fit together"),
        (lambda f: _edit_index(f, shards=[{"name": "../x"}]), "does not fit together"),
    ],
)
def test_damaged_shards_are_refused(shards, damage, words):
    damage(shards.folder)
    with pytest.raises(UsageError, match=words):
        room.Shards(shards.folder)


def test_other_vocabularies_and_changed_bytes_are_refused(shards):
    with pytest.raises(UsageError, match="vocabulary of 100 ids, and 4096 were expected"):
        room.Shards(shards.folder, vocab_size=4096)
    path = shards.folder / "00001.tokens"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="00001.tokens is not what was written"):
        room.Shards(shards.folder).verify()


@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (16, 0), (16, 1), (100, 7)])
def test_windows_cut_the_tokens(shards, length, overlap):
    windows = room.Windows(shards, length, overlap)
    flat = torch.tensor(list(itertools.chain(*DOCUMENTS)))
    expected = flat.unfold(0, length + overlap, length)
    assert torch.equal(windows.batch(range(len(windows))), expected) and windows[3].dtype == torch.int64
    assert windows.left_over == len(flat) - len(expected) * length
    for bad in (len(windows), -1):
        with pytest.raises(IndexError):
            windows[bad]


def test_windows_longer_than_the_data_are_refused(shards):
    with pytest.raises(UsageError, match="too few for a window of 10000"):
        room.Windows(shards, 10_000)


def anonymous_megabytes():
    """RssAnon of this process: what it holds itself, without the mapped pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def test_anonymous_memory_is_flat_while_much_is_read(tmp_path):
    ids = np.arange(1 << 20) % 1000
    shards = room.write_shards(tmp_path / "s", itertools.repeat(ids, 48), 1000, shard_tokens=1 << 22)  # 96 MiB
    loader = room.StreamLoader(room.Windows(shards, 1024), 64, seed=1)
    stream = iter(loader)
    next(stream)
    before, most, total = anonymous_megabytes(), 0.0, 0
    for number, batch in enumerate(stream):
        total += int(batch.sum())
        most = max(most, anonymous_megabytes()) if number % 32 == 0 else most
    assert most - before < 8, f"{before:.0f} MB grew to {most:.0f} MB"
    assert abs(total - 48 * int(ids.sum())) < 64 * 1024 * 1000
    held = mmap.mmap(-1, 96 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(bytes(range(256)) * (96 << 12))
    assert anonymous_megabytes() - before > 80  # the meter does see what a process holds
    held.close()


# -- sources

ROWS = [{"text": f"row {n} é" * (n % 5), "n": n} for n in range(300)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)]
    (folder / "a.jsonl").write_text("\n".join(lines[:130]))
    (folder / "b.jsonl").write_text("\r\n\r\n".join(lines[130:]) + "\n", newline="")
    (folder / "c.jsonl").write_text("")
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table.slice(0, 170), folder / "a.parquet", row_group_size=64)
    pyarrow.parquet.write_table(table.slice(170), folder / "b.parquet", row_group_size=1000)
    (folder / "lines.txt").write_text("".join(f"line {n} é\n" + "\n" * (n % 3) for n in range(300)))
    return folder


def hub_data(files):
    paths = [str(files / "a.jsonl"), str(files / "b.jsonl")]
    return datasets.load_dataset("json", data_files=paths, split="train", streaming=True)


def sources(files):
    return {
        "json": room.JsonLinesSource(files),
        "parquet": room.ParquetSource(files),
        "hub": room.open_source(hub_data(files)),
        "text": room.TextSource(files / "lines.txt"),
        "column": room.open_source([files / "a.parquet", files / "b.parquet"], "text"),
    }


@pytest.mark.parametrize("kind", ["json", "parquet", "hub", "text", "column"])
def test_sources_give_the_rows_and_begin_again_anywhere(files, kind):
    source = sources(files)[kind]
    expected = {"text": [f"line {n} é" for n in range(300)], "column": [row["text"] for row in ROWS]}.get(kind, ROWS)
    pairs = list(source.rows())
    assert [row for _, row in pairs] == expected == list(source)
    if kind == "json":
        assert expected == list(hub_data(files))
    for first in (0, 1, 63, 64, 129, 130, 170, 299):
        place = json.loads(json.dumps(pairs[first][0]))
        assert [row for _, row in itertools.islice(source.rows(place), 70)] == expected[first : first + 70]


def test_workers_read_all_of_a_hub_stream_and_each_row_once(files):
    """`datasets` deals a stream's files out to torch's workers, which would lose rows and their order."""
    with room.StreamLoader(room.HubSource(hub_data(files)), 7, shuffle=False, num_workers=2) as loader:
        assert [row for batch in loader for row in batch] == ROWS


def test_a_whole_file_is_a_row(files):
    text = (files / "lines.txt").read_text()
    assert list(room.TextSource([files / "lines.txt", files / "a.jsonl"], unit="file"))[0] == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', "x.jsonl, line 2: this is no JSON .*mend or remove the line"),
        (b'{"text": "a"}\n\n[1]\n', "x.jsonl, line 3: expected a JSON object, found a list"),
        (b'{"text": "a"}\n{"other": 1}\n', "x.jsonl, line 2 has no column 'text': choose one of other"),
        (b'{"text": "\xff"}\n', "x.jsonl, line 1: this is no JSON .no UTF-8"),
        (b"", "nothing but empty files"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        list(room.open_source(tmp_path / "x.jsonl", "text"))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path, files):
    (tmp_path / "x.txt").write_bytes(b"good\nbad \xff\n")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 but not really")
    cases = {
        "x.txt, line 2: this is no UTF-8": lambda: list(room.open_source(tmp_path / "x.txt")),
        "y.parquet is no Parquet file": lambda: room.open_source(tmp_path / "y.parquet"),
        "a.parquet has no column 'txt': choose one of text, n": lambda: room.open_source(files / "a.parquet", "txt"),
        "There is no file or folder": lambda: room.open_source("./missing.jsonl"),
        "give files of one kind": lambda: room.open_source(files),
        "There is no .parquet file in": lambda: room.ParquetSource(_empty(tmp_path)),
        "Unknown unit 'word'": lambda: room.TextSource(files / "lines.txt", unit="word"),
        "has no column 'txt'": lambda: room.open_source(hub_data(files), "txt"),
        "is no IterableDataset": lambda: room.HubSource(datasets.Dataset.from_list(ROWS)),
    }
    for words, call in cases.items():
        with pytest.raises(UsageError, match=words):
            call()


def _empty(folder):
    (folder / "empty").mkdir(exist_ok=True)
    return folder / "empty"


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_shuffle_buffer_loses_nothing_and_continues_exactly(files, size):
    source = room.JsonLinesSource(files)
    buffer = room.ShuffleBuffer(source, size, seed=3, epoch=1)
    states, rows = [json.dumps(buffer.state_dict())], []
    for row in buffer:
        rows.append(row)
        states.append(json.dumps(buffer.state_dict()))
    assert sorted(row["n"] for row in rows) == list(range(300))
    places = [row["n"] for row in rows]
    assert (places == sorted(places)) == (size == 1)
    assert all(place < turn + size for turn, place in enumerate(places))  # at most size - 1 steps early
    for emitted in (0, 1, 5, 236, 237, 298, 300):
        again = room.ShuffleBuffer(source, size, 3, 1, json.loads(states[emitted]))
        assert list(again) == rows[emitted:], emitted
    other = list(room.ShuffleBuffer(source, size, seed=3, epoch=2))
    assert (other == rows) == (size == 1)


def test_a_resumed_buffer_reads_only_what_it_needs(tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"{n}\n" for n in range(10_000)))
    source = room.TextSource(tmp_path / "x.txt")
    buffer = room.ShuffleBuffer(source, 20, seed=1)
    rows = list(itertools.islice(buffer, 9000))
    state = buffer.state_dict()
    assert state["oldest"] > 8500 and len(json.dumps(state)) < 200
    rest = list(room.ShuffleBuffer(source, 20, 1, 0, state))
    assert sorted(map(int, rows + rest)) == list(range(10_000))
    assert rest == list(buffer)


def test_a_source_that_shrank_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("a\n" * 50)
    buffer = room.ShuffleBuffer(room.TextSource(tmp_path / "x.txt"), 10, seed=1)
    list(itertools.islice(buffer, 30))
    state = buffer.state_dict()
    (tmp_path / "x.txt").write_text("a\n" * 35)
    with pytest.raises(UsageError, match="fewer rows than when this state was saved"):
        list(room.ShuffleBuffer(room.TextSource(tmp_path / "x.txt"), 10, 1, 0, state))
