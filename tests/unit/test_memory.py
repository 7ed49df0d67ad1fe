"""Peak memory: the line, the counts, and an out-of-memory error that says what to do."""

import pytest
import torch

from effnlp_lab.notebook import memory
from effnlp_lab.notebook.memory import GIB, MIB, MemoryLine

LECTURE = (
    "CUDA out of memory. Tried to allocate 18.00 MiB. GPU 0 has a total capacity of 14.75 GiB of which 11.06 MiB is "
    "free. Of the allocated memory 14.18 GiB is allocated by PyTorch, and 437.93 MiB is reserved by PyTorch but "
    "unallocated."
)


def test_a_line_through_two_runs_gives_every_other():
    line = memory.memory_line(lambda size: 1000 + 7 * size, sizes=(3, 11))
    assert (line.fixed, line.each) == (1000, 7)
    assert line.at(100) == 1700


@pytest.mark.parametrize(("capacity", "most"), [(1000, 0), (1006, 0), (1007, 1), (1013, 1), (1014, 2), (10, 0)])
def test_the_largest_size_fits_and_the_next_does_not(capacity, most):
    line = MemoryLine(1000, 7)
    assert line.largest(capacity) == most
    assert line.at(most) <= capacity or most == 0
    assert line.at(most + 1) > capacity


def test_work_that_does_not_grow_has_no_largest_size():
    assert MemoryLine(1000, 0).largest(5000) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peaks_are_counted_with_and_without_numbers(device):
    x = torch.ones(256, 1024, device=device)  # 1 MiB
    assert memory.counted_peak(lambda: (x + 1).sum()) == MIB + 4
    assert memory.counted_peak(lambda: [x + 1, x + 2]) == 2 * MIB


def test_the_lectures_message_is_read():
    told = memory.explain(LECTURE, 100, MemoryLine(4 * GIB, 0.1 * GIB), int(14.75 * GIB), "prompts")
    assert told == (
        "Out of memory at 100 prompts: 18.00 MiB more was asked for, 14.18 GiB was held by tensors, the limit is "
        "14.75 GiB. Try at most 99 prompts at once (4.00 GiB whatever the number, and 102.40 MiB each)."
    )


def test_without_a_line_half_is_advised_and_one_is_not_halved():
    assert memory.explain(LECTURE, 100).endswith("Try 50 items at once.")
    assert "11.06 MiB was free" in memory.explain(LECTURE, 100)
    assert "half" not in memory.explain(LECTURE, 1) and "one already" in memory.explain(LECTURE, 1)


def test_a_message_of_another_kind_still_gives_a_sentence():
    told = memory.explain("no memory", 8)
    assert told == "Out of memory at 8 items: more memory was asked for than there was. Try 4 items at once."


def test_what_does_not_fit_at_all_says_so():
    told = memory.fits(5, MemoryLine(20 * GIB, GIB), 10 * GIB)
    assert "5 items do not fit" in told and "Not even one fits" in told


def test_what_fits_says_so():
    assert memory.fits(5, MemoryLine(4 * GIB, GIB), 10 * GIB, "prompts") == "5 prompts fit: 9.00 GiB of 10.00 GiB."


def test_an_out_of_memory_error_becomes_one_sentence():
    with pytest.raises(memory.OutOfMemory, match="Out of memory at 64 items: 18.00 MiB more was asked for"):
        with memory.sized(64):
            raise torch.OutOfMemoryError(LECTURE)


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        with memory.sized(64):
            raise ZeroDivisionError


def test_a_card_without_a_gpu_is_no_card():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: see tests/gpu")
    with memory.card_of(GIB):
        assert torch.ones(2).sum() == 2


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (18 * MIB, "18.00 MiB"), (1.5 * GIB, "1.50 GiB")],
)
def test_bytes_in_words(count, words):
    assert memory.gib(count) == words
