"""Loops whose bound is known only at run time work in Triton's interpreter, whatever numpy says; it patches once."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
{first}
import numpy, torch, triton
import triton.language as tl

@triton.jit
def kernel(out_ptr, count, BLOCK: tl.constexpr):
    total = 0
    for start in range(0, count, BLOCK):
        total += start
    tl.store(out_ptr, total)

out = torch.zeros(1, dtype=torch.int64)
{then}
kernel[(1,)](out, 10, 4)
print(out.item())
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [("import effnlp_lab", ""), ("import os; os.environ['TRITON_INTERPRET'] = '1'", "import effnlp_lab")],
    ids=["before triton", "after triton"],
)
def test_a_loop_with_a_bound_of_run_time(first, then, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"EFFNLP_DEVICE": "cpu"}
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(first=first, then=then))
    ended = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "12", ended.stderr[-2000:]


COUNTED = """
import effnlp_lab
import torch, triton
import triton.language as tl
from triton.runtime import interpreter

before, members, found = tl.load, interpreter.inspect.getmembers, []
interpreter.inspect.getmembers = lambda *given: found.append(given) or members(*given)

@triton.jit
def twice(x):
    return tl.sum(x) + tl.cdiv(x.numel, 1)

@triton.jit
def kernel(out_ptr, count, BLOCK: tl.constexpr):
    total = 0.0
    for start in range(0, count):
        total += twice(tl.zeros((BLOCK,), tl.float32) + start)
    tl.store(out_ptr, total)

out = torch.zeros(1)
for count in (1, 1, 50):
    found.clear()
    kernel[(1,)](out, count, 4)
    print(out.item(), len(found), tl.load is before)
"""


def test_the_language_is_patched_once_a_launch(tmp_path):
    """However often a kernel calls functions; and after each launch it is what it was."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"EFFNLP_DEVICE": "cpu"}
    path = tmp_path / "program.py"
    path.write_text(COUNTED)
    ended = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[0] for line in lines] == ["4.0", "4.0", "5100.0"], ended.stderr[-2000:]
    assert lines[1][1] == lines[2][1] and {line[2] for line in lines} == {"True"}
