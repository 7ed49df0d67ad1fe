"""Whatever bytes a session sends, the proctor ends it or reads them: no exception escapes, and nothing blocks."""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import threading
from unittest import mock

import pytest
import torch
from classes import ROOT  # noqa: F401  puts grading/ on the path
from effnlp_grading import connection
from effnlp_grading.connection import Connection, Ended
from effnlp_grading.limits import DEFENCES, Limits
from effnlp_grading.records import Record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effnlp_lab import exercises
from effnlp_lab.exercises.compare import Foreign
from effnlp_lab.notebook import wire
from effnlp_lab.notebook.judge import judge, read_response

FUZZ = int(os.environ.get("EFFNLP_FUZZ", "2000")) // 3  # of this file's two parts, and test_repair's
SETTINGS = settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Scripted(Connection):
    """A connection whose other end has sent `data` and hung up."""

    def __init__(self, data: bytes, limits: Limits | None = None) -> None:
        ours, theirs = socket.socketpair()
        self._session = _Session(ours)
        self._channel, self.limits, self.defences, self._gpu = ours, limits or Limits(reply=1 << 16), DEFENCES, None
        self.memory, self._number, self._buffer, self._baseline = 1 << 40, 0, bytearray(), 0
        self.peak = self.most_processes = 0
        self._thread = threading.Thread(target=_say, args=(theirs, data))
        self._thread.start()

    def close(self) -> None:
        self._channel.close()
        self._thread.join()


class _Session:
    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.first, self.student = channel, os.getpid(), os.getpid()

    def end(self) -> None:
        self.channel.close()


def _say(channel: socket.socket, data: bytes) -> None:
    with channel:
        try:
            channel.sendall(data)
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(1 << 16):
                pass
        except OSError:
            pass


def frame(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


GOOD = wire.pack({"status": "ok", "outputs": {"a": torch.ones(2), "b": [1, (2.5, None)]}, "observed": {"changed": []}})
LENGTHS = st.integers(0, 1 << 64).map(lambda n: struct.pack("<Q", min(n, (1 << 64) - 1)))
RAN = json.dumps({"error": None, "printed": ""}).encode()
PIECES = st.one_of(st.binary(max_size=40), LENGTHS, st.sampled_from([
    frame(b"{}"), frame(b'{"number": 1}'), frame(GOOD), frame(b"[" * 5000), frame(b'{"number": NaN}'), frame(RAN)]))


@SETTINGS
@given(st.lists(PIECES, max_size=5).map(b"".join))
def test_any_bytes_are_read_or_end_the_session(data):
    one = Scripted(data)
    try:
        for ask in (lambda: one.run("x = 1"), lambda: one.case("f", b"request", 1.0)):
            try:
                reply = ask()
            except Ended as end:
                assert end.status in ("died", "broke the protocol") and str(end)
                break
            assert isinstance(reply, (dict, bytes))
    finally:
        one.close()


LEAF = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=8),
                 st.binary(max_size=8))
VALUE = st.recursive(LEAF, lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(
    st.text(max_size=4) | st.integers(), v, max_size=3), max_leaves=6)
TAGS = st.sampled_from(["$tensor", "$bytes", "$map", "$tuple", "$set", "$float", "$dtype", "$foreign", "x"])
TREE = st.recursive(st.none() | st.integers() | st.text(max_size=6) | st.sampled_from(["t0", "t1"]),
                    lambda v: st.lists(v, max_size=3) | st.dictionaries(TAGS, v, max_size=2), max_leaves=8)
LAYOUT = st.dictionaries(st.sampled_from(["t0", "t1"]), st.lists(st.lists(st.integers(-2, 1 << 40), max_size=3)
                         | st.integers(-2, 9) | st.sampled_from(["cpu", "t0", None]), max_size=6), max_size=2)


@SETTINGS
@given(st.one_of(
    st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=6)).map(
        lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] + len(cut[1]):]),
    st.tuples(TREE, LAYOUT).map(lambda pair: _message({"json": pair[0], "layout": pair[1]})),
    st.tuples(VALUE, VALUE, VALUE).map(lambda v: wire.pack({"status": v[0], "outputs": v[1], "observed": v[2]})),
    st.tuples(VALUE, VALUE).map(lambda v: wire.pack(
        {"status": "ok", "outputs": v[0], "observed": {"changed": v[1], "usage": v[0], "stdout_characters": v[1]}}))))
def test_any_response_is_judged_or_refused(data):
    """Every response becomes a verdict, whatever it holds: the comparison with a reference included."""
    try:
        read_response(data)
    except wire.WireError:
        pass
    lab, spec = exercises.find("count_pairs")
    with mock.patch.dict(exercises.reference_module(lab.name).REFERENCES, {spec.name: OneCase()}):
        verdict = judge(spec, lab.name, lambda request: data, seed=1, guarded=True)
    assert verdict.score == 0.0 and verdict.sentence and verdict.state != "correct"


class OneCase(type(exercises.reference_of("count_pairs"))):
    """The exercise with its first case and its first mistakes."""

    mistakes = exercises.reference_of("count_pairs").mistakes[:2]

    def cases(self, rng, variant):
        return itertools.islice(super().cases(rng, variant), 1)


def _message(head: dict) -> bytes:
    from safetensors.torch import save

    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + save({"t0": torch.zeros(4), "t1": torch.ones(3, dtype=torch.int64)})


def test_tensors_that_show_more_than_the_limit_are_refused():
    wide = torch.zeros(1).expand(1 << 16, 1 << 16)
    with pytest.raises(wire.WireError, match="show more than"):
        wire.unpack(wire.pack(wide))
    assert isinstance(wire.unpack(wire.pack(Foreign("", ""))), Foreign)


def test_no_pickle_in_what_reads_a_sessions_bytes():
    for module in (connection, wire):
        assert "pickle" not in [name for name in vars(module)]


def test_record_survives_a_cut_line(tmp_path):
    path = tmp_path / "lab" / "ada.jsonl"
    first = Record(path, "digest")
    first.keep({"exercise": "a", "score": 1.0})
    with path.open("a") as file:
        file.write('{"exercise": "b", "sco')
    again = Record(path, "digest")
    assert again.verdicts == {"a": {"exercise": "a", "score": 1.0}}
    again.keep({"exercise": "b", "score": 0.5})
    assert set(Record(path, "digest").verdicts) == {"a", "b"}
    assert Record(path, "another text").verdicts == {}
