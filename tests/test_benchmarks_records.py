"""`make records`: what produces the committed records, and puts them into the READMEs."""

import re
import sys

import pytest

pytest.importorskip("lightning")

from benchmarks import records
from fastrnn.bench.environment import read
from fastrnn.bench.report import markdown

READMES = ("README.md", "README.zh.md")


def committed():
    """The record that README.md names, and its path."""
    (name,) = set(re.findall(r"benchmarks/results/[\w./-]+\.jsonl", (records.ROOT / "README.md").read_text()))
    return read(records.ROOT / name), name


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_are_in_step_with_their_record(readme):
    text = (records.ROOT / readme).read_text()
    assert records.refreshed(text, *committed()) == text


@pytest.mark.parametrize("readme", READMES)
def test_another_record_changes_the_table_the_path_and_the_figures(readme):
    text, (old, name) = (records.ROOT / readme).read_text(), committed()
    faster = [
        {**r, "ratio": {k: 3 * v for k, v in r["ratio"].items()}} if r["kind"] == "measurement" else r for r in old
    ]
    new = records.refreshed(text, faster, "benchmarks/results/abacus/cpu-1.jsonl")
    assert name not in new
    assert "`benchmarks/results/abacus/cpu-1.jsonl`" in new
    assert markdown(faster) in new
    assert markdown(old) not in new
    (paragraph,) = (part for part in new.split("\n\n") if "abacus" in part)
    for figure in records.figures(faster):
        assert figure in paragraph, figure
    again = records.refreshed(text, faster, name)
    changed = [a for a, b in zip(text.split("\n\n"), again.split("\n\n"), strict=True) if a != b]
    assert len(changed) == 2  # the table, and that paragraph


def test_other_work_is_waited_for_and_then_refused():
    loads, slept = iter([2.0, 1.0, 0.3]), []
    records.wait_until_quiet(lambda: next(loads), slept.append, patience=10.0)
    assert slept == [5.0, 5.0]
    with pytest.raises(records.UsageError, match=r"the machine is busy \(load 2\.00\)"):
        records.wait_until_quiet(lambda: 2.0, slept.append, patience=10.0)
    assert slept == [5.0] * 4


def test_a_busy_machine_or_a_part_of_the_grid_changes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(records, "PATIENCE", 0.0)
    monkeypatch.setattr(records.os, "getloadavg", lambda: (3.0, 3.0, 3.0))
    monkeypatch.setattr(records, "execute", lambda *_: pytest.fail("it was measured"))
    for line, message in (
        (["--out", str(tmp_path)], "the machine is busy (load 3.00)"),
        (["--readme", "--budget", "3"], "--readme: the READMEs show the whole grid"),
        (["--readme", "--out", str(tmp_path)], "--readme: the READMEs show the whole grid"),
    ):
        assert records.main(line) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_each_step_runs_and_is_kept(monkeypatch, tmp_path):
    """The commands themselves; of the small ones one, of the others what they would be given."""
    ran, real = [], records.execute

    def execute(command, captured=False):
        ran.append(command[2:])
        return real(command, captured) if command[2] == "benchmarks.bandwidth" else "a table\n"

    monkeypatch.setattr(records, "execute", execute)
    assert records.main(["--anyway", "--budget", "3", "--small", "0.001", "--out", str(tmp_path)]) == 0
    assert [c[0] for c in ran] == ["benchmarks"] * 3 + [
        "benchmarks.end_to_end",
        *(f"benchmarks.{n}" for n in records.SMALL),
    ]
    assert ran[0] == ["benchmarks", "--threads", "1", "2", "--budget", "3", "--save", "--out", str(tmp_path)]
    assert ran[1][1:3] == ["--ddp", "2"]
    assert ran[2][1:3] == ["--peers", "compiled loop"]
    assert ran[2][-2:] == ["--out", str(tmp_path / "peers")]
    kept = {p.name.rsplit("-", 1)[0]: p.read_text() for p in tmp_path.rglob("*.txt")}
    assert kept.keys() == {name.replace("_", "-") for name in records.SMALL}
    assert kept["bandwidth"].startswith("$ python -m benchmarks.bandwidth 0.001\n")
    assert "LSTM   128" in kept["bandwidth"]


def test_a_benchmark_that_fails_is_one_line():
    with pytest.raises(records.UsageError, match="ended with exit code 3"):
        records.execute([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_the_commands_are_ones_that_bench_takes():
    from benchmarks import end_to_end
    from fastrnn.bench.options import parse_bench

    args = records.parser().parse_args(["--out", "x"])
    (_, grid), (_, ddp), (_, loop), (_, harness), *_ = records.steps(args)
    assert grid[:3] == [sys.executable, "-m", "benchmarks"]
    assert (parse_bench(grid[3:]).budget, parse_bench(grid[3:]).threads) == (0, [1, 2])
    assert parse_bench(ddp[3:]).ddp == 2
    assert parse_bench(loop[3:]).peers == ("compiled loop",)
    assert harness[2] == end_to_end.__name__
