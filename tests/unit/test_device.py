"""device.py: what we run on, what overrides what, and Triton's mode."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from effnlp_lab import device as devices
from effnlp_lab.device import DeviceError, ceilings, resolve
from effnlp_lab.errors import EffnlpError

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv("EFFNLP_DEVICE", raising=False)
    monkeypatch.delenv("EFFNLP_FAST", raising=False)


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that sees no GPU; None removes a variable."""
    fresh = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None, "EFFNLP_DEVICE": None, **environment}
    fresh = {name: value for name, value in fresh.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=fresh, timeout=120)


def test_cpu():
    device = resolve("cpu")
    assert (device.kind, device.fast, device.dtype, device.capability) == ("cpu", True, torch.float32, None)
    assert device.torch == torch.device("cpu")
    assert device.memory_bytes > 2**30
    assert device.describe().startswith("cpu: ") and "fast" in device.describe()


def test_auto_takes_the_gpu_where_there_is_one():
    assert resolve().kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve().fast == (not torch.cuda.is_available())


@pytest.mark.parametrize("word, fast", [("0", False), ("1", True), ("true", True), ("FALSE", False), (False, False)])
def test_fast_words(word, fast):
    assert resolve("cpu", word).fast is fast


def test_pick():
    assert resolve("cpu", "1").pick(fast=1, full=2) == 1
    assert resolve("cpu", "0").pick(fast=1, full=2) == 2


def test_environment_overrides_what_a_notebook_asks_for(monkeypatch):
    monkeypatch.setenv("EFFNLP_DEVICE", "cpu")
    monkeypatch.setenv("EFFNLP_FAST", "0")
    device = resolve("cuda", "1")
    assert (device.kind, device.fast) == ("cpu", False)


def test_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("EFFNLP_FAST", "quick")
    with pytest.raises(DeviceError, match="'quick'.*expected"):
        resolve("cpu")


@pytest.mark.parametrize("word", ["gpu", "cuda:1", "tpu", ""])
def test_unknown_device(word):
    with pytest.raises(DeviceError, match="expected 'auto', 'cpu' or 'cuda'"):
        resolve(word)


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(devices, "cuda_available", lambda: False)
    with pytest.raises(EffnlpError) as error:
        resolve("cuda")
    assert "torch finds none" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "capability, dtype",
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_dtype_by_card(monkeypatch, capability, dtype):
    class Properties:
        name, total_memory = "Card", 16 * 2**30
        major, minor = capability

    monkeypatch.setattr(devices, "cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    device = resolve("cuda")
    assert (device.dtype, device.capability, device.fast) == (dtype, capability, False)
    assert device.describe().startswith(f"cuda: Card, compute capability {capability[0]}.{capability[1]}, 16.0 GiB")


def test_ceilings_are_measured_once():
    first = ceilings(resolve("cpu"))
    assert first is ceilings(resolve("cpu", "0"))
    assert 1e8 < first.copy_bytes_per_second < 1e13
    assert 1e8 < first.matmul_flops_per_second < 1e14


def test_import_is_light_without_a_gpu():
    result = python("import effnlp_lab, sys; print('torch' in sys.modules, 'triton' in sys.modules)")
    if devices._driver_present():
        assert result.stdout.strip().endswith("False")
    else:
        assert result.stdout.strip() == "False False"


TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this system")


@TRITON
def test_import_turns_on_the_interpreter():
    code = (
        "import effnlp_lab, triton.language as tl; from effnlp_lab.device import resolve;"
        "print(type(tl.sum).__name__, resolve().triton)"
    )
    assert python(code).stdout.split() == ["InterpretedFunction", "interpreted"]


@TRITON
def test_refuses_when_triton_came_first():
    result = python("import triton.language\ntry:\n import effnlp_lab\nexcept ValueError as e: print(e)")
    assert "Triton was imported before effnlp_lab" in result.stdout and "restart" in result.stdout


@TRITON
def test_accepts_triton_first_in_its_interpreter():
    result = python("import triton.language, effnlp_lab; print('fine')", TRITON_INTERPRET="1")
    assert result.stdout == "fine\n", result.stderr


@TRITON
@pytest.mark.parametrize("order", ["effnlp_lab, triton", "triton, effnlp_lab"])
def test_interpreter_explicitly_off_is_respected(order):
    """As when kernels are compiled for a card that is not here."""
    code = f"import {order}; import os; from effnlp_lab.device import resolve; print(resolve('cpu').triton)"
    assert python(code, TRITON_INTERPRET="0").stdout == "absent\n"


@TRITON
def test_cpu_by_override_turns_on_the_interpreter_on_any_machine():
    code = "import effnlp_lab, os; print(os.environ['TRITON_INTERPRET'])"
    assert python(code, EFFNLP_DEVICE="cpu", CUDA_VISIBLE_DEVICES=None).stdout == "1\n"


def test_without_triton():
    code = (
        "import importlib.util as u; real = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else real(name, *rest);"
        "import effnlp_lab, os; from effnlp_lab.device import resolve;"
        "print(os.environ.get('TRITON_INTERPRET'), resolve().triton)"
    )
    assert python(code).stdout == "None absent\n"
