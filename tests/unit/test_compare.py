"""compare.py: structures side by side."""

from __future__ import annotations

import pytest

from effnlp_lab.exercises.compare import leafwise


def test_leaves_are_changed_beside_their_counterparts():
    value, beside = {"a": [1, (2, 3)], "b": 4}, {"a": [10, [20, 30]], "b": 40}
    assert leafwise(lambda x, y: x + y, value, beside) == {"a": [11, [22, 33]], "b": 44}
    assert leafwise(lambda x, y: (x, y), [1, {"k": 2}], None) == [(1, None), {"k": (2, None)}]
    some = leafwise(lambda x, y: x if y is None else y, {"a": 1, "b": [2], "c": 3}, {"a": None, "b": None, "c": 4})
    assert some == {"a": 1, "b": [2], "c": 4}
    with pytest.raises(KeyError):
        leafwise(lambda x, y: x, {"a": 1}, {"b": 1})
