"""A notebook's kernels can be defined without Triton, and say what to do when they are launched."""

import importlib
import sys
from unittest import mock

import pytest

from effnlp_lab.errors import DeviceError
from effnlp_lab.notebook import portable


@pytest.fixture
def without_triton():
    hidden = dict.fromkeys(("triton", "triton.language"))
    with mock.patch.dict(sys.modules, hidden):
        yield importlib.reload(portable)
    importlib.reload(portable)


def test_with_triton_it_is_triton_itself():
    triton = pytest.importorskip("triton")
    assert portable.triton is triton


def test_a_kernel_is_defined_and_its_launch_refused(without_triton):
    triton, tl = without_triton.triton, without_triton.tl

    @triton.jit
    def add_kernel(x_ptr, BLOCK: tl.constexpr):
        """Adds."""

    @triton.jit(debug=True)
    def other_kernel(x_ptr):
        pass

    assert add_kernel.__doc__ == "Adds."
    with pytest.raises(DeviceError, match="add_kernel needs Triton, .* solve its PyTorch twin"):
        add_kernel[(1,)](None, BLOCK=4)
    with pytest.raises(DeviceError, match="other_kernel needs Triton"):
        other_kernel[(1,)](None)


def test_a_launchers_arithmetic_works(without_triton):
    assert [without_triton.triton.cdiv(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [without_triton.triton.next_power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
