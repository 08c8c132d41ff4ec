"""Files of records that are broken or of something else, and runs that measure nothing: one line, exit code 2."""

import json
import sys
from pathlib import Path

import pytest
from bench_support import record, write

from fastrnn.bench import commands, page, records
from fastrnn.cli import main

KEY = {"case": "T1-B1-H128", "cell": "GRU", "mode": "training", "threads": 1}
TIMES = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "p99": 1.0}
MADE = {
    "measurement": record("T1-B1-H128", 2.0),
    "latency": {"kind": "latency", **KEY, "steps": 100, "baseline": TIMES, "subject": TIMES},
    "memory": {"kind": "memory", **KEY, "baseline": 0, "subject": 5},
    "failure": {"kind": "failure", **KEY, "what": "timing", "message": "planted"},
    "note": {"kind": "note", "message": "planted"},
    "ddp": {"kind": "ddp", "world": 2, "threads": 1, "baseline": TIMES, "subject": TIMES, "ratio": TIMES},
}


def one_line(argv, capsys):
    """What is printed on stderr; it is one line, and the exit code 2."""
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith("fastrnn bench: error: ")) == (1, True)
    return err


@pytest.fixture
def environment(tmp_path):
    return json.loads(Path(write(tmp_path / "environment.jsonl", [])).read_text())


def test_every_kind_is_a_record_and_lacks_no_field(environment):
    made = {**MADE, "environment": environment}
    assert made.keys() == records.REQUIRED.keys()
    for kind, whole in made.items():
        assert records.fault(whole) is None, kind
        for name in records.REQUIRED[kind]:
            without = {k: v for k, v in whole.items() if k != name}
            assert records.fault(without) == f"{kind}: {name} is missing"
            assert records.fault({**whole, name: {1: 2}} if name in KEY else {**whole, name: object()}), (kind, name)


@pytest.mark.parametrize("command", ["--compare {0} {0}", "--resume {0}", "--report {0}", "--check {0}"])
@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("no json", "no JSON"),
        ("[1]", "it has no kind"),
        ('{"kind": []}', "it has no kind"),
        ('{"kind": "recipe"}', "there is no kind 'recipe'"),
        ('{"kind": "measurement", "case": "a"}', "measurement: cell is missing"),
        (json.dumps({**record("a", 2.0), "cell": "LSTN"}), "cell cannot be 'LSTN'"),
        (json.dumps({**record("a", 2.0), "ratio": {"p20": 1.0, "p50": 0.0}}), "ratio: p50 cannot be 0.0"),
        (json.dumps({**record("a", 2.0), "ratio": {"p20": float("nan")}}), "ratio: p20 cannot be nan"),
        (json.dumps({**record("a", 2.0), "H": 8}), "measurement: T is missing"),
        (json.dumps({**record("a", 2.0), "peers": {"x": {"ratio": {}}}}), "peers cannot be"),
        ('{"kind": "environment", "cpu": 3}', "cpu cannot be 3"),
    ],
)
def test_a_file_that_is_not_of_records_is_one_line(command, broken, why, tmp_path, capsys):
    path = tmp_path / "cpu-1.jsonl"
    write(path, [record("a", 2.0)])
    path.write_text(path.read_text() + broken + "\n")
    err = one_line(command.format(path).split(), capsys)
    assert f"{path}: line 3 is not a record of fastrnn bench" in err
    assert why in err


@pytest.mark.parametrize("command", ["--compare {0} {0}", "--report {0}", "--check {0}"])
@pytest.mark.parametrize("content", ["", "environment"])
def test_a_file_without_measurements_is_no_success(command, content, tmp_path, capsys):
    path = tmp_path / "cpu-1.jsonl"
    write(path, [])
    if not content:
        path.write_text("")
    assert str(path) in one_line(command.format(path).split(), capsys)
    assert sorted(tmp_path.iterdir()) == [path]


def test_two_runs_without_a_common_case_are_not_compared(tmp_path, capsys):
    a, b = (write(tmp_path / name, [record(name, 2.0)]) for name in "ab")
    assert "have no case in common" in one_line(["--compare", a, b], capsys)


def test_a_case_of_unknown_size_is_not_reported(tmp_path, capsys):
    assert "mine is no case" in one_line(["--report", write(tmp_path / "a", [record("mine", 2.0)])], capsys)


def test_the_module_is_guarded_as_the_command_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--report", write(tmp_path / "a", [record("T1-B1-H128", 2.0)])])
    for raised, code, text in (
        (OSError(28, "No space left"), 2, "python -m benchmarks: error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "python -m benchmarks: interrupted"),
    ):

        def fails(*_, raised=raised):
            raise raised

        monkeypatch.setattr(page, "write", fails)
        assert commands.main() == code
        assert capsys.readouterr().err.strip() == text
