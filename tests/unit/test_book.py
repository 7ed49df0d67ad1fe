"""The benchmark book: every benchmark and peer is in it, measured or not; its ratios are those of the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from effnlp_lab.notebook import bench, book
from effnlp_lab.notebook.bench import Comparison

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"device": "Card of the test", "kind": "cuda", "driver": "1", "cpu": "a processor", "cores": 4,
           "load_average": 0.1, "python": "3.11", "versions": {"torch": "2.11", "triton": "3.6"}}  # fmt: skip


def save(folder: Path, name: str, *comparisons: Comparison) -> None:
    content = {"suite": name, "command": f"python3 -m effnlp_lab bench {name}", "machine": MACHINE,
               "comparisons": [one.to_json() for one in comparisons]}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "benchmarks"
    made.mkdir()
    (made / "copies.py").write_text('"""Copies beside a library.\n\nIn detail."""\nNEEDS = "cuda"\n')
    (made / "nothing.py").write_text('"""Was never run."""\nNEEDS = "cuda"\n')
    seconds = {"mine": [1.0, 1.0, 9.0], "theirs": [3.0, 3.0, 3.0], "others": [1.5]}
    rate = Comparison("Copy 8 [rows]", seconds, "mine", "theirs", unit="MB/s", work=2e6, limit=4.0)
    time = Comparison("Short copy", seconds, "mine", "theirs", limit=0.5)
    lost = Comparison("No peer", {"mine": [1.0]}, "mine", "absent", missing={"absent": "flash_attn is not installed"})
    save(made, "copies", rate, time, lost)
    return made


def test_every_figure_is_a_ratio_to_the_peer(folder):
    (copies, _) = book.load(folder)
    rate, time, lost = copies.ratios
    assert rate.speeds == time.speeds == {"mine": 3.0, "theirs": 1.0, "others": 2.0}
    assert rate.limit == 6.0 and rate.figure == "2 MB/s"  # 4 MB/s are twice ours, which is three times the peer
    assert time.limit == 6.0 and time.figure == "1 s"
    assert lost.ratio is None and lost.limit is None and copies.headlines == [rate, time]


def test_the_page_has_what_was_measured_and_what_was_not(folder):
    (folder / "plots").mkdir()
    (folder / "plots" / "old.png").write_bytes(b"")
    readme = folder.parent / "README.md"
    readme.write_text(f"before\n{book.BEGIN}\nold\n{book.END}\nafter\n")
    wrote = book.write(folder, readme)
    page = (folder / "README.md").read_text()
    assert "3.00x theirs | others 2.00x | 6.00x" in page and "Copies beside a library." in page
    assert "**Not run: absent** (flash_attn is not installed)." in page and "absent did not run" in page
    assert page.count("**Not measured**: `effnlp bench nothing` on a GPU.") == 1 and "**not measured**" in page
    assert "Card of the test" in page and "torch 2.11" in page and "In detail" not in page
    assert {path.name for path in wrote} == {"README.md", "overview.png", "copies.png"}
    assert {path.name for path in (folder / "plots").iterdir()} == {"overview.png", "copies.png"}
    for alt, target in re.findall(r"!\[(.*?)\]\((.*?)\)", page):
        assert "3.00 times theirs" in alt and (folder / target).read_bytes().startswith(b"\x89PNG")
    shown = readme.read_text()
    assert shown.startswith(f"before\n{book.BEGIN}\n![") and shown.endswith(f"{book.END}\nafter\n")
    assert "old" not in shown
    assert "(benchmarks/plots/overview.png)" in shown
    first = {path: path.read_bytes() for path in wrote}
    book.write(folder, readme)
    assert first == {path: path.read_bytes() for path in wrote}


def test_settings_of_ours_are_no_headlines(folder):
    (suite,) = [one for one in book.load(ROOT / "benchmarks") if one.name == "streaming"]
    assert len(suite.headlines) < len(suite.ratios)
    assert not any("growing" in one.title for one in suite.headlines)


def test_speculative_decoding_is_drawn_over_the_target_alone_at_the_same_temperature(folder):
    seconds = {"target alone (ours), temperature 0": 1.0, "draft, temperature 0, gamma 2 (ours)": 0.5,
               "target alone (ours), temperature 1": 3.0, "draft, temperature 1, gamma 4": 1.0}  # fmt: skip
    titles = ("Seconds a token, paged cache", "Seconds a token, static cache")
    save(folder, "speculative", *(Comparison(title, {name: [t] for name, t in seconds.items()}, *list(seconds)[1::-1])
                                  for title in titles))  # fmt: skip
    book.write(folder)
    page = (folder / "README.md").read_text()
    assert "draft at most 3.00 times, at temperature 1 with gamma 4](plots/speculative-gamma.png)" in page


def test_without_any_figures_the_book_says_so(tmp_path):
    (tmp_path / "nothing.py").write_text("")
    assert bench.main([], "cpu", tmp_path, tmp_path, book=True) == 0
    assert "**Not measured**: `effnlp bench nothing`." in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("plots/*"))


def test_the_committed_book_is_that_of_the_committed_figures():
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text()
    stale = [line for line in book.page(book.load(folder), {}).splitlines() if line not in text]
    assert not stale, "gather them anew: python3 -m effnlp_lab bench --book"
    project = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[(.+?)\]\((benchmarks/.*?)\)", project)
    assert len(pictures) == 3 and all(alt and (ROOT / path).stat().st_size < 300_000 for alt, path in pictures)
    assert all((folder / path).is_file() for path in re.findall(r"!\[.+?\]\((.*?)\)", text))
