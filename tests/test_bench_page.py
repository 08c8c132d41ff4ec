"""What a run leaves for a reader: tables, pictures, and one page without anything from the network."""

import re
import sys

import pytest
from bench_support import record, write

from fastrnn.bench import environment, page, pictures, report
from fastrnn.cli import main

SHAPE = {"T": 10, "I": 8, "layers": 1, "bidirectional": False, "form": "dense", "device": "cpu", "dtype": "float32"}


def records():
    """Two by two shapes; one of them slower than torch.nn, one with everything that a record may hold."""
    made = []
    for H, B, ratio in ((8, 1, 2.0), (8, 4, 0.5), (16, 1, 4.0), (16, 4, 8.0)):
        times = {"p20": 0.9e-3, "p50": 1e-3, "p80": 1.1e-3}
        bound = {"seconds": 4e-4, "limit": "weights", "parts": {}, "share": {"subject": 0.4, "baseline": 0.2}}
        more = {"H": H, "B": B, "tokens": 10 * B, "bound": bound, "baseline": times, "subject": times, **SHAPE}
        made.append(record(f"T10-B{B}-H{H}", ratio, **more))
    made[-1] |= {
        "peers": {"Haste": {"absent": "haste_pytorch is not installed"}, "loop <a>": {"ratio": {"p50": 1.25}}},
        "kernels": {"torch.nn": ["aten::gru"], "fastrnn": ["fastrnn::recurrence"]},
        "joules": {"torch.nn": 2.0, "fastrnn": 1.0},
    }
    key = {"case": "T1-B1-H8", "cell": "GRU", "mode": "inference", "threads": 1}
    latency = {"kind": "latency", **key, "steps": 100, "baseline": {"p50": 2e-5, "p99": 9e-5}}
    memory = {"kind": "memory", **key, "baseline": 8 << 20, "subject": 4 << 20}
    note = {"kind": "note", "message": "energy is not measured: no counter"}
    failure = {"kind": "failure", "what": "timing", **key, "message": "Mismatch: y: differs by 1.0"}
    return [*made, {**latency, "subject": {"p50": 1e-5, "p99": 3e-5}}, memory, note, failure]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "cpu-1.jsonl"
    made = records()
    more = [{**made[0], "ratio": {q: k * v for q, v in made[0]["ratio"].items()}} for k in (1.125, 0.875)]
    write(path, [*made, *({**r, "pass": number} for number, r in enumerate(more, 1))])
    return path


def test_the_page_holds_everything_and_nothing_from_outside(saved, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    assert main(["bench", "--report", str(saved)]) == 0
    assert str(saved.with_suffix(".html")) in capsys.readouterr().out
    text = saved.with_suffix(".html").read_text()
    for word in (
        "Abacus",
        "T10-B4-H16",
        "haste_pytorch is not installed",
        "loop &lt;a&gt; 1.25",
        "aten::gru",
        "weights",
    ):
        assert word in text, word
    assert "40% (torch.nn 20%)" in text
    assert "<td>2.00 2.25 1.75</td>" in text
    assert text.count('<tr class="slower">') == 1
    assert "Mismatch: y: differs by 1.0" in text
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    drawn = sorted(p.name for p in saved.with_suffix("").iterdir())
    names = ("speedup-cpu-gru-float32-training-1-thread", "steps-cpu-float32-training-1-thread")
    assert drawn == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert text.count("data:image/png;base64,") == 2


def test_without_matplotlib_there_is_a_page_and_a_line_that_says_so(saved, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--report", str(saved)]) == 0
    assert pictures.MISSING in capsys.readouterr().out
    assert "<img" not in saved.with_suffix(".html").read_text()
    assert not saved.with_suffix("").exists()


def test_a_heat_map_shows_each_ratio_at_its_place():
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    (axes, _) = pictures.heat_map(records()[:4], "title").axes
    shown = {t.get_position(): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "2.00", (1, 0): "0.50", (0, 1): "4.00", (1, 1): "8.00"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["8", "16"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "4"]


def test_bars_count_the_steps_of_both_ways_and_the_bound():
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    (axes,) = pictures.bars(records()[:1], "title").axes
    assert [round(p.get_width()) for p in axes.patches] == [50, 50]  # 1 ms by 10 steps forward and 10 backward
    (line,) = axes.lines
    assert list(line.get_xdata()) == pytest.approx([20, 20])


def test_pictures_of_records_made_before_they_held_sizes():
    made = record("T100-B64-H256", 2.0)
    assert {k: pictures.sizes_of(made)[k] for k in ("T", "B", "H")} == {"T": 100, "B": 64, "H": 256}


def test_tables_tell_everything(saved):
    text = report.full(environment.read(saved))
    for part in (
        "GRU  training  T10-B4-H16",
        " 40%  cpu",
        "absent: haste_pytorch is not installed",
        "1.25 of torch.nn",
        "GRU  latency   T1-B1-H8                    1       20 us     90 us     10 us     30 us  of 100 steps",
        "8.0 MiB     4.0 MiB    0.50",
        "energy is not measured: no counter",
        "FAILED timing GRU T1-B1-H8 inference, 1 threads: Mismatch: y: differs by 1.0",
    ):
        assert part in text, part
    assert "LSTM T=1 B=1 H=128" not in text  # targets are of the CPU's own shapes


def test_rows_have_the_columns_of_the_head():
    assert all(len(page.row(r)) == len(page.HEAD) for r in records()[:4])
