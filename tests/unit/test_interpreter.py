"""Loops whose bound is known only at run time work in Triton's interpreter, whatever numpy says."""

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
