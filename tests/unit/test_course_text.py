"""The course's text: the split, the deduplication, and loading from files and data sets."""

from __future__ import annotations

import json
import platform

import pytest

from effnlp_lab.course import text as course
from effnlp_lab.course.text import Document, load_text, text_version
from effnlp_lab.errors import UsageError

HELD = next(f"module{number}" for number in range(1000) if course.is_held_out(f"module{number}"))
KEPT = next(f"module{number}" for number in range(1000) if not course.is_held_out(f"module{number}"))


def body(tag: str, lines: int) -> str:
    return "".join(f"    value_{number} = compute_something_long({tag!r}, {number})\n" for number in range(lines))


@pytest.fixture
def library(tmp_path):
    """A library of one held-out and one other module, with files that are no text to learn from."""
    folder = tmp_path / "library"
    for name in (f"{HELD}.py", f"{KEPT}.py"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(body(name, 20))
    (folder / "test").mkdir()
    (folder / "test" / "test_it.py").write_text(body("test", 20))
    (folder / "encodings").mkdir()
    (folder / "encodings" / "cp1.py").write_text(body("table", 20))
    return folder


@pytest.fixture
def package(tmp_path):
    """A package with a vendored copy of the held-out module, an innocent file, and one file twice."""
    folder = tmp_path / "package"
    (folder / "vendor").mkdir(parents=True)
    (folder / "vendor" / "copied.py").write_text("# vendored\n" + body(f"{HELD}.py", 20).replace("    ", "\t"))
    (folder / "innocent.py").write_text(body("innocent", 30) + body(f"{HELD}.py", 3))
    (folder / "guilty.py").write_text(body("guilty", 30) + body(f"{HELD}.py", 4))
    (folder / "short.py").write_text("x = 1\n")
    (folder / "twice.py").write_text(body("twice", 9))
    (folder / "vendor" / "twice.py").write_text(body("twice", 9))
    (folder / "binary.py").write_bytes(b"\xff\xfe\x00")
    return folder


def test_deduplication_drops_a_copy_and_keeps_an_innocent_file(library, package):
    names = {document.name for document in course.train_documents(library, {"package": package})}
    assert "package/vendor/copied.py" not in names
    assert "package/guilty.py" not in names  # 4 of 34 lines: more than a tenth
    assert {"package/innocent.py", "package/short.py", f"{KEPT}.py"} <= names  # 3 of 33: less
    assert len(names & {"package/twice.py", "package/vendor/twice.py"}) == 1
    assert not any(name.startswith(("test/", "encodings/")) or name == f"{HELD}.py" for name in names)


def test_split_is_disjoint_and_deterministic(library, package):
    held = [document.name for document in course.heldout_documents(library)]
    train = [document.name for document in course.train_documents(library, {"package": package})]
    assert held == [f"{HELD}.py"] and not set(held) & set(train)
    assert train == [document.name for document in course.train_documents(library, {"package": package})]


def test_split_of_the_real_library_does_not_overlap():
    held = list(load_text("course-heldout"))
    assert held == list(load_text("course-heldout"))
    modules = {document.name.split("/")[0].removesuffix(".py") for document in held}
    assert {"dataclasses", "textwrap"} <= modules and "argparse" not in modules
    lines = course.long_lines(held)
    for document in load_text("course-train", limit_bytes=1_000_000):
        assert course.shared_lines(document.text, lines) <= course.SHARED
        assert document.name.removesuffix(".py") not in modules


def test_a_prefix_is_a_sample_of_all_sources():
    sources = {document.name.split("/")[0] for document in load_text(limit_bytes=3_000_000)}
    assert {"torch", "transformers", "numpy"} <= sources


@pytest.mark.parametrize("name", ["course-train", "course-heldout", "course-english"])
def test_limit_is_kept_to_the_byte(name):
    whole = load_text(name, limit_bytes=20_000)
    assert sum(len(text.encode()) for text in whole.texts()) == 20_000
    assert list(whole) == list(whole)


def test_limit_cuts_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("aéé", encoding="utf-8")
    assert [document.text for document in load_text(tmp_path, limit_bytes=4)] == ["aé"]


def test_english_is_the_language_reference():
    topics = {document.name: document.text for document in load_text("course-english")}
    assert "try" in topics["topics/try"] and sum(map(len, topics.values())) > 300_000


def test_version_names_python_and_packages():
    assert text_version() == f"Python {platform.python_version()}"
    assert text_version("course-train").startswith(f"Python {platform.python_version()}, torch ")
    assert platform.python_version() in repr(load_text("course-heldout"))


def test_reads_a_file_and_a_folder_in_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first")
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(load_text(tmp_path)) == [Document("a/z.md", "first"), Document("b.txt", "second")]
    assert list(load_text(str(tmp_path / "b.txt"))) == [Document("b.txt", "second")]


def test_reads_tables_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one", "code": "a"}, {"text": "", "code": "b"}, {"text": "three", "code": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [document.text for document in load_text(tmp_path / "rows.jsonl")] == ["one", "three"]
    assert [document.text for document in load_text(tmp_path, column="code")] == ["a", "b", "c"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    documents = list(load_text(tmp_path / "rows.parquet"))
    assert documents == [Document("rows.parquet/0", "one"), Document("rows.parquet/2", "three")]
    with pytest.raises(UsageError, match="no column 'body': choose one of text, code"):
        list(load_text(tmp_path / "rows.jsonl", column="body"))


def test_hub_names_go_through_datasets(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            return [{"text": "row"}]

    monkeypatch.setattr(course, "_datasets", lambda: Library)
    assert list(load_text("wikitext", split="validation")) == [Document("wikitext/0", "row")]
    assert list(load_text("user/data", config="en", streaming=False)) == [Document("user/data/0", "row")]
    assert asked[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation", "streaming": True})
    assert asked[1] == (("user/data", "en"), {"split": "train", "streaming": False})


def test_a_hub_that_cannot_be_reached_is_told_in_one_sentence(monkeypatch):
    class Library:
        @staticmethod
        def load_dataset(*arguments, **options):
            raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(course, "_datasets", lambda: Library)
    with pytest.raises(UsageError, match=r"'user/data' could not be loaded .*\(Couldn't reach the Hub\)"):
        load_text("user/data")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("course-test", {}, "no course text 'course-test': choose one of course-train"),
        ("./nowhere", {}, "no file or folder ./nowhere"),
        ("notes.txt", {}, "no file or folder notes.txt"),
        ("course-train", {"limit_bytes": 0}, "limit_bytes=0 leaves no text"),
    ],
)
def test_bad_input_is_told_in_one_sentence(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_text(name, **options)


def test_what_is_no_text_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="holds no text"):
        list(load_text(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match="latin.txt is not UTF-8"):
        list(load_text(tmp_path))
    with pytest.raises(UsageError, match="No Python source"):
        list(course.heldout_documents(tmp_path))
