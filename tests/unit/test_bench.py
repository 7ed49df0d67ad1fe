"""Timing, plots and receipts: what they compute, what they write, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch

from effnlp_lab.device import Device
from effnlp_lab.errors import UsageError
from effnlp_lab.notebook import bench, plots
from effnlp_lab.notebook.bench import Comparison, compare
from effnlp_lab.notebook.receipt import Receipt, Row

CPU = Device("cpu", True, "a processor", torch.float32, "absent", None, 2**30)


def comparison(**changes) -> Comparison:
    seconds = {"kernel": [0.5, 0.4, 9.0], "library": [1.0, 1.0, 1.0]}
    content = {"title": "Copy", "seconds": seconds, "ours": "kernel", "peer": "library", **changes}
    return Comparison(**content)


def test_contestants_take_turns_and_warm_up():
    order: list[str] = []
    contestants = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    result = compare("t", contestants, ours="a", peer="b", repeats=3, warmup=1, device=CPU)
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in result.seconds.items()} == {"a": 3, "b": 3}


def test_times_are_of_the_work():
    result = compare(
        "t", {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.02)},
        ours="a", peer="b", repeats=3, warmup=0, device=CPU,
    )
    assert 0.002 <= result.median("a") < result.median("b") and result.median("b") >= 0.02
    assert result.ratio > 1.5


def test_ratio_is_of_medians_and_higher_is_better_for_ours():
    assert comparison().ratio == 2.0
    rate = comparison(unit="MB/s", work=2e6, limit=8.0)
    assert rate.figure("kernel") == 4.0 and rate.figure("library") == 2.0
    assert "ours reaches 50%" in rate.table()
    assert "ours reaches 40%" in comparison(limit=0.2).table()


def test_tables_name_the_roles_and_the_missing():
    result = comparison(peer="absent", missing={"absent": "flash_attn is not installed"}, checks=["equal outputs"])
    assert result.ratio is None
    for written in (result.table(), result.markdown()):
        assert "kernel (ours)" in written and "absent (peer)" in written
        assert "flash_attn is not installed" in written and "Verified: equal outputs." in written
    rows = [line for line in result.markdown().splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unit": "kg"}, "Unknown unit 'kg'"),
        ({"unit": "TB/s"}, "needs work"),
        ({"ours": "c"}, "'c' is not among the contestants"),
        ({"peer": "c"}, "neither a contestant nor named in missing"),
        ({"repeats": 0}, "repeats=0 measures nothing"),
    ],
)
def test_bad_comparisons_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        compare("t", {"a": int, "b": int}, **{"ours": "a", "peer": "b", "device": CPU, **options})


def test_machine_names_what_figures_depend_on():
    found = bench.machine(CPU)
    assert found["device"] == "a processor" and found["cores"] >= 1 and found["versions"]["torch"] == torch.__version__
    assert f"{found['cores']} cores" in bench.describe(found) and "torch" in bench.describe(found)


SUITE = """
from effnlp_lab.notebook.bench import compare
def run(device, folder):
    return [compare("Nothing", {"mine": int, "theirs": int}, ours="mine", peer="theirs", repeats=1, device=device)]
"""


def test_suites_are_found_run_and_written(tmp_path, capsys):
    (tmp_path / "nothing.py").write_text(SUITE)
    (tmp_path / "on_gpu.py").write_text('NEEDS = "cuda"\n' + SUITE)
    (tmp_path / "_helper.py").write_text("")
    assert list(bench.suites(tmp_path)) == ["nothing", "on_gpu"]
    assert bench.main([], CPU, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "on_gpu: not run, needs cuda" in printed and "mine (ours)" in printed
    written = json.loads((tmp_path / "nothing.json").read_text())
    assert written["command"] == "python3 -m effnlp_lab bench nothing"
    assert written["comparisons"][0]["ratio"] > 0 and written["machine"]["versions"]
    assert "| mine (ours) |" in (tmp_path / "nothing.md").read_text()
    assert not (tmp_path / "on_gpu.json").exists()


def test_wrong_suites_are_told_in_one_sentence(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match="no benchmark 'speed': choose one of empty"):
        bench.main(["speed"], CPU, tmp_path)
    with pytest.raises(UsageError, match="empty.py is no benchmark"):
        bench.main(["empty"], CPU, tmp_path)


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0"), (0.0123456, "0.0123"), (12.345, "12.3"), (123456.0, "123,456")]
)
def test_numbers_have_three_digits(value, written):
    assert bench.number(value) == written


# Plots


def drawn():
    figure, axes = plots.figure("Memory", "length (tokens)", "peak (MiB)", caption="Linear and quadratic.")
    axes.plot([1, 2, 3], [1, 2, 3], label="flash")
    axes.plot([1, 2, 3], [1, 4, 9], label="standard")
    axes.legend()
    return figure


def test_pictures_are_the_same_bytes_and_hold_no_versions():
    first, second = plots.png(drawn()), plots.png(drawn())
    assert first == second
    assert b"Software" not in first and b"matplotlib" not in first and b"tEXt" not in first


def test_series_differ_in_more_than_colour():
    lines = drawn().axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines)
    looks = plots.looks(8)
    assert len({(look["marker"], look["color"]) for look in looks}) == 8


def test_show_displays_an_image_with_its_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plots.show(drawn(), alt='Memory "doubles" & more')
    bundle = shown[0]._repr_mimebundle_()
    attributes = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, found):
            attributes.update(found, tag=tag)

    Reader().feed(bundle["text/html"])
    assert attributes["tag"] == "img" and attributes["alt"] == 'Memory "doubles" & more'
    assert attributes["src"].startswith("data:image/png;base64,") and int(attributes["width"]) > 100
    assert bundle["text/plain"] == 'Figure: Memory "doubles" & more'


def test_figures_need_labels_and_alternative_text():
    with pytest.raises(UsageError, match="label with its unit on both axes"):
        plots.figure("Memory", "", "peak (MiB)")
    with pytest.raises(UsageError, match="needs alternative text"):
        plots.show(drawn(), alt=" ")


# Receipts


def receipt() -> Receipt:
    return (
        Receipt("06_flash_attention", quality="perplexity (lower is better)", device="a card")
        .add("baseline", "standard", quality=14.5, peak_bytes=4 * 2**30, seconds=0.02)
        .add("yours", quality=14.5, peak_bytes=2**30, seconds=0.005)
        .add("library", "flash-attn <2>", quality="equal", seconds=0.004, note="installed")
    )


def test_receipt_shows_costs_beside_the_baseline(capsys):
    receipt().show()
    printed = capsys.readouterr().out
    assert "4 GiB" in printed and "1 GiB (0.25 of baseline)" in printed and "20 ms" in printed
    assert "not measured" in printed and "Measured on a card." in printed
    assert "FLOPs" not in printed and "bytes moved" not in printed


def test_receipt_table_has_header_cells_and_escapes():
    written = receipt().html()
    assert written.count('scope="row"') == 3 and 'scope="col"' in written and "<caption" in written
    assert "flash-attn &lt;2&gt;" in written


def test_receipt_is_saved_where_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert receipt().save() == tmp_path / "receipt_06_flash_attention.json"
    monkeypatch.setenv("EFFNLP_RECEIPTS", str(tmp_path / "all"))
    path = receipt().save()
    assert path.parent == tmp_path / "all"
    again = Receipt.load(path)
    assert again.to_json() == receipt().to_json()
    path.write_text("[]")
    with pytest.raises(UsageError, match="holds no receipt"):
        Receipt.load(path)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [({"role": "mine"}, "Unknown role 'mine'"), ({"role": "yours", "seconds": float("nan")}, "of yours is nan")],
)
def test_bad_rows_are_refused(row, sentence):
    with pytest.raises(UsageError, match=sentence):
        Row(**row)


def test_cudnn_is_left_out_of_attention_and_put_back():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(KeyError), bench.without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_time_of_children_counts_as_cpu_time():
    work = "sum(range(10_000_000))"
    calls = {"child": lambda: subprocess.run([sys.executable, "-S", "-c", work], check=True)}
    made = compare("Sums", calls, ours="child", peer="child", repeats=1, warmup=0, device=CPU)
    assert made.cpu_seconds["child"][0] > 0.05
