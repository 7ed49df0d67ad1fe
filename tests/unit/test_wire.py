"""The wire carries values and layouts exactly, and nothing that arrives malformed escapes as another error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lab.exercises.compare import Foreign
from effnlp_lab.notebook import wire

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=40)
keys = st.integers() | st.text() | st.tuples(st.integers(), st.integers())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_plain_values_come_back(value):
    back = wire.unpack(wire.pack(value))
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool],
)
def test_dtypes_and_layouts_come_back(dtype):
    base = torch.arange(60).reshape(3, 4, 5).to(dtype)
    for tensor in (
        base,
        base.transpose(0, 2),
        base[:, 1:3],
        base[0].expand(7, 4, 5),
        base[:0],
        base[1, 2, 3],
        base[:, ::2, ::3],
        torch.empty(0, 3, dtype=dtype),
    ):
        back = wire.unpack(wire.pack(tensor))
        assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)
        if tensor.numel():
            assert back.stride() == tensor.stride()


def test_aliases_stay_aliases():
    base = torch.zeros(4, 4)
    whole, part = wire.unpack(wire.pack([base, base[1:3]]))
    whole[1, 0] = 5
    assert part[0, 0] == 5


def test_a_thin_view_does_not_drag_its_storage_along():
    huge = torch.zeros(1_000_000)
    assert len(wire.pack(huge[::100_000])) < 10_000


def test_what_has_no_form_travels_by_name():
    back = wire.unpack(wire.pack({"a": object(), "b": [lambda: 0], "c": torch.sparse_coo_tensor(size=(2, 2))}))
    assert isinstance(back["a"], Foreign) and back["a"].type_name == "object"
    assert back["b"][0].type_name == "function"
    assert "sparse" in back["c"].type_name
    assert math.isnan(wire.unpack(wire.pack(float("nan"))))


def test_limits():
    with pytest.raises(wire.WireError, match="at most 1,000"):
        wire.pack(torch.zeros(1000), limit=1000)
    nested = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(wire.WireError, match="nested"):
        wire.pack(nested)
    loop = []
    loop.append(loop)
    with pytest.raises(wire.WireError, match="nested"):
        wire.pack(loop)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_garbage_is_a_wire_error(data):
    with pytest.raises(wire.WireError):
        wire.unpack(data)


@settings(max_examples=300)
@given(st.data())
def test_damaged_messages_are_read_or_refused(data):
    message = bytearray(wire.pack({"x": torch.arange(6.0).reshape(2, 3).t(), "y": [1, (2, b"z")], "f": float("inf")}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.unpack(bytes(message))
    except wire.WireError:
        pass


def test_a_layout_cannot_look_outside_its_storage():
    message = wire.pack(torch.arange(6.0).reshape(2, 3))
    forged = message.replace(b"[2,3]", b"[9,3]")
    assert forged != message
    with pytest.raises(wire.WireError, match="outside its storage"):
        wire.unpack(forged)
