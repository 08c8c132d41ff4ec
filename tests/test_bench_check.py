"""`fastrnn bench --check`: what it holds itself against, and what it names."""

from pathlib import Path

import pytest
from bench_support import passes, record, write

import fastrnn as library
from fastrnn.bench import check, environment, report
from fastrnn.bench.shapes import CASES
from fastrnn.cli import main
from fastrnn.cli.parser import UsageError


def this_hardware():
    here = environment.describe(library, [])
    return {key: here[key] for key in ("cpu", "flags", "cores", "torch")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses, and memory is kept in what is told alone."""
    monkeypatch.setattr(check, "PAUSE", 0.0)
    monkeypatch.setattr(check, "keep_freed_memory", lambda: True)


@pytest.mark.parametrize(
    ("measured", "code"),
    [
        ((2.0,), 0),
        ((1.2, 1.2, 1.2), 1),
        ((1.2, 1.95, 1.95), 0),  # after two, the median of which is a suspect though the last is none
        ((1.2, 2.2, 2.0), 0),  # after two that lie apart
        ((1.2, 1.2, 1.8), 1),
        ((1.2, 1.9, 1.5), 0),  # too far apart to tell
        ((1.88, 1.95), 0),
    ],
)
def test_a_check_names_what_is_slower_with_all_its_tries(tmp_path, monkeypatch, capsys, measured, code):
    name = CASES[0].name
    known = [*passes(name, 2.0, 2.02, 1.98), *passes("gone", 2.0, 2.0)]
    baseline = write(tmp_path / "cpu-1.jsonl", known, **this_hardware())
    ratios = iter(measured)
    seen = []

    def measure(job, options, echo):
        seen.append(job.case.name)
        return record(name, next(ratios))

    monkeypatch.setattr(check, "measure", measure)
    assert main(["bench", "--check", baseline, "--threads", "1"]) == code
    assert len(seen) == len(measured)
    out = capsys.readouterr().out
    assert ("REGRESSION" in out) == bool(code)
    assert "1 of 1 cases measured, 0 failed" in out


def test_a_regression_that_fails_when_it_is_measured_again_is_a_failure(tmp_path, monkeypatch, capsys):
    name = CASES[0].name
    baseline = write(tmp_path / "cpu-1.jsonl", passes(name, 2.0, 2.1, 1.9))
    key = {"case": name, "cell": "GRU", "mode": "training", "threads": 1}
    failure = {"kind": "failure", "what": "timing", **key, "message": "Mismatch: y: differs"}
    answers = iter([record(name, 1.2), failure])
    monkeypatch.setattr(check, "measure", lambda *_: next(answers))
    assert main(["bench", "--check", baseline, "--threads", "1"]) == 1
    assert "1 of 1 cases measured, 1 failed" in capsys.readouterr().out


def test_a_check_that_measures_nothing_is_no_success(tmp_path, monkeypatch, capsys):
    baseline = write(tmp_path / "cpu-1.jsonl", passes(CASES[0].name, 2.0, 2.1, 1.9))
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(check.time, "monotonic", lambda: next(ticks))
    assert main(["bench", "--check", baseline, "--threads", "1", "--budget", "5"]) == 1
    assert "0 of 1 cases measured" in capsys.readouterr().out


def test_a_check_grants_what_the_passes_of_the_records_differ_by(tmp_path, monkeypatch, capsys):
    """And beside records of other hardware 30 percent; those of two machines are of another."""
    name = CASES[0].name
    same = this_hardware()
    ratios = {"quiet": (2.0, 2.02, 1.98), "noisy": (2.0, 1.5, 2.1)}
    for kind, seen, facts, code in (
        ("quiet", 1.8, same, 1),
        ("noisy", 1.45, same, 0),
        ("quiet", 1.45, {}, 0),
        ("quiet", 1.3, {}, 1),
    ):
        baseline = write(tmp_path / "cpu-1.jsonl", passes(name, *ratios[kind]), **facts)
        monkeypatch.setattr(check, "measure", lambda *_, seen=seen: record(name, seen))
        assert main(["bench", "--check", baseline, "--threads", "1"]) == code, (kind, seen)
        assert ("REGRESSION" in capsys.readouterr().out) == bool(code)
    other = write(tmp_path / "other.jsonl", [])
    baseline = write(tmp_path / "cpu-1.jsonl", passes(name, *ratios["quiet"]), **same)
    both = Path(baseline).read_text() + Path(other).read_text()
    Path(baseline).write_text(both)
    monkeypatch.setattr(check, "measure", lambda *_: record(name, 1.45))
    assert main(["bench", "--check", baseline, "--threads", "1"]) == 0


def test_a_slow_down_of_all_is_found_though_none_of_the_cases_tells(tmp_path, monkeypatch, capsys):
    some = [c.name for c in CASES if "GRU" in c.cells and "training" in c.modes][:8]
    spread = (2.0, 2.0 * 1.06, 2.0 / 1.06)
    baseline = write(tmp_path / "cpu-1.jsonl", [r for name in some for r in passes(name, *spread)], **this_hardware())
    monkeypatch.setattr(check, "measure", lambda job, *_: record(job.case.name, 1.75))
    assert main(["bench", "--check", baseline, "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "0 regressions" in out
    assert "geometric mean of all cases 0.875, a REGRESSION" in out


def test_records_of_a_single_pass_are_no_measure(tmp_path, capsys):
    baseline = write(tmp_path / "cpu-1.jsonl", [record(CASES[0].name, 2.0)])
    assert main(["bench", "--check", baseline, "--threads", "1"]) == 2
    assert "measure with --passes 3 --budget 0" in capsys.readouterr().err
    (tmp_path / "abacus-1-cores").mkdir()
    write(tmp_path / "abacus-1-cores" / "cpu-2.jsonl", [record("a", 1.0)], backend="auto")
    with pytest.raises(UsageError, match=r"cpu-2\.jsonl is of too few passes"):
        check.newest(tmp_path, HERE)


def test_what_the_records_do_not_tell_of_is_not_judged_in_silence(tmp_path, monkeypatch, capsys):
    name = CASES[0].name
    known = [*passes(name, 2.0, 2.02, 1.98, threads=1), record(name, 2.0, threads=2)]
    baseline = write(tmp_path / "cpu-1.jsonl", known)
    monkeypatch.setattr(check, "measure", lambda job, *_: record(name, 2.0 / job.threads, threads=job.threads))
    assert main(["bench", "--check", baseline, "--threads", "1", "2"]) == 0
    assert "not compared: 1 cases" in capsys.readouterr().out


HERE = {"cpu": "Abacus", "flags": [], "cores": 1, "device": "cpu", "subject": "fastrnn", "malloc": "keep"}
HERE |= {"backend": "auto", "apart": True}


def test_a_check_takes_the_newest_records_of_this_hardware(tmp_path):
    made = ("abacus-1-cores", "cpu-2"), ("abacus-1-cores", "cpu-3"), ("other", "cpu-9"), ("abacus-1-cores", "gpu-8")
    for folder, name in made:
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / f"{name}.jsonl", passes("a", 1.0, 1.0), backend="auto")
    assert check.newest(tmp_path, HERE).name == "cpu-3.jsonl"
    assert check.newest(tmp_path, {**HERE, "cpu": "New"}).name == "cpu-9.jsonl"
    with pytest.raises(UsageError, match="no records"):
        check.newest(tmp_path / "none", HERE)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subject": "torch.nn"}, "made with subject torch.nn, not fastrnn"),
        ({"malloc": "system"}, "made with malloc system, not keep"),
        ({"backend": "reference"}, "made with backend reference, not auto"),
        ({"apart": False}, "made with apart False, not True"),
        ({"load": report.BUSY}, "of a busy machine"),
        ({"load": None}, "not a file of records"),
    ],
)
def test_a_check_passes_over_records_that_measure_something_else(tmp_path, changes, why):
    folder = tmp_path / "abacus-1-cores"
    folder.mkdir()
    write(folder / "cpu-2.jsonl", passes("a", 1.0, 1.0), **{"backend": "auto", **changes})
    with pytest.raises(UsageError, match=f"cpu-2.jsonl is {why}"):
        check.newest(tmp_path, HERE)
    write(folder / "cpu-1.jsonl", passes("a", 1.0, 1.0, backend="auto"))  # as before environments told it
    assert check.newest(tmp_path, HERE).name == "cpu-1.jsonl"


def test_a_check_keeps_freed_memory_but_with_malloc_system(tmp_path, monkeypatch, capsys):
    known = passes(CASES[0].name, 2.0, 2.1, 1.9)
    baseline, other = write(tmp_path / "cpu-1.jsonl", known), write(tmp_path / "cpu-2.jsonl", known, malloc="system")
    told = []
    monkeypatch.setattr(check, "keep_freed_memory", lambda: told.append(True) or True)
    monkeypatch.setattr(check, "measure", lambda *_: record(CASES[0].name, 2.0))
    assert main(["bench", "--check", other, "--threads", "1", "--malloc", "system"]) == 0
    assert not told
    assert main(["bench", "--check", baseline, "--threads", "1", "--malloc", "system"]) == 2
    assert "its records were made with malloc keep, not system" in capsys.readouterr().err
    assert main(["bench", "--check", baseline, "--threads", "1"]) == 0
    assert told
