"""Runs of `fastrnn bench`: what is measured, kept, continued, and what ends them."""

import json
import os

import pytest
import torch
from bench_support import QUICK, SAVED, STEP, TINY, stand_in, write

from fastrnn.bench import commands, environment, records, report, run
from fastrnn.bench.apart import Apart
from fastrnn.cli.parser import UsageError

stand_in = pytest.fixture(stand_in)


def test_a_wrong_result_ends_the_run_with_failure_and_without_its_number(stand_in, capsys):
    stand_in(error=1e-3, cases=[TINY[0]])
    argv = [*QUICK, "--cells", "GRU", "--parts", "timing", "--modes", "inference", "training"]
    assert commands.bench(argv) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED timing GRU T1-B1-H128 inference, 1 threads: Mismatch: y: differs") == 2
    assert "0 of 0 measurements" in printed


def test_a_run_measures_reports_and_saves(stand_in, capsys, tmp_path):
    library = stand_in()
    before = torch.get_num_threads()
    argv = ["--threads", "1", "2", "--sample", "0", "--rounds", "2", "--parts", "timing", "--save", "--backend", "cpu"]
    argv += ["--cells", "GRU", "--no-apart", "--malloc", "system"]
    assert commands.bench([*argv, "--out", str(tmp_path), "--budget", "0", "--peers", "none"]) == 0
    assert torch.get_num_threads() == before
    assert set(library.requested) == {"cpu"}
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    records = environment.read(saved)
    assert [r["kind"] for r in records] == ["environment"] + ["measurement"] * 2 * 2 * 3
    assert records[0]["command"].startswith("fastrnn bench --threads 1 2")
    assert {r["threads"] for r in records[1:]} == {1, 2}
    assert {r["mode"] for r in records[1:]} == {"inference", "forward", "training"}
    assert {r["chosen"] for r in records[1:]} == {"cpu"}
    assert all(r["rounds"] >= 2 and r["ratio"]["p20"] <= r["ratio"]["p50"] <= r["ratio"]["p80"] for r in records[1:])
    assert all(0 < r["bound"]["share"]["subject"] < 1 for r in records[1:])
    assert saved.with_suffix(".txt").read_text() == report.full(records)
    assert report.summarise(records) in capsys.readouterr().out


def test_a_run_that_measures_nothing_is_no_success(stand_in, monkeypatch, capsys):
    stand_in(cases=[STEP])
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    assert commands.bench([*SAVED, "--budget", "5"]) == 1
    assert "0 of 1 measured" in capsys.readouterr().out


def test_a_spent_budget_leaves_what_there_is(stand_in, capsys, tmp_path, monkeypatch):
    stand_in()
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    argv = [*QUICK[:-2], "--budget", "25", "--parts", "timing", "--save", "--out", str(tmp_path)]
    assert commands.bench(argv) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    kinds = [r["kind"] for r in environment.read(saved)]
    assert kinds == ["environment", "measurement", "measurement", "note"]
    assert "budget of 25 s spent: 2 of 54 measured" in capsys.readouterr().out


# Files of records


def test_what_a_file_holds_is_not_measured_again(stand_in, tmp_path, capsys):
    stand_in(cases=[STEP])
    argv = [*QUICK, "--parts", "timing", "latency", "--cells", "GRU"]
    assert commands.bench([*argv, "--modes", "inference", "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    before = environment.read(saved)
    assert [r["kind"] for r in before] == ["environment", "measurement", "latency"]
    assert commands.bench([*argv, "--resume", str(saved)]) == 0
    assert "4 of 10 are in the file already" in capsys.readouterr().out
    after = environment.read(saved)
    assert after[:3] == before
    assert [(r["kind"], r.get("mode")) for r in after[3:]] == [
        ("environment", None),
        ("measurement", "training"),
        ("measurement", "forward"),
    ]


def test_passes_go_over_the_whole_grid_and_are_continued(stand_in, tmp_path, monkeypatch):
    """Each case once before any is measured again; a budget cuts off passes, which --resume adds."""
    stand_in(cases=[STEP, TINY[-1]])
    argv = [*QUICK[:-2], "--parts", "timing", "latency", "--cells", "LSTM", "--modes", "inference"]
    ticks = iter(range(0, 1000, 10))
    with monkeypatch.context() as patched:
        patched.setattr(run.time, "monotonic", lambda: next(ticks))
        assert commands.bench([*argv, "--save", "--out", str(tmp_path), "--budget", "35"]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")

    def turns():
        return [(r["kind"], r["case"], r.get("pass")) for r in environment.lines(saved) if "case" in r]

    whole = [turn[:2] for turn in turns()]
    assert len(whole) == 3  # the first pass, with the steps of the one case that is a stream
    assert commands.bench([*argv, "--budget", "0", "--resume", str(saved)]) == 0
    timed = [case for kind, case in whole if kind == "measurement"]
    assert turns()[3:] == [("measurement", case, k) for k in (1, 2) for case in timed]
    assert [len(r["passes"]) for r in environment.read(saved) if r["kind"] == "measurement"] == [3, 3]
    text = saved.with_suffix(".txt").read_text()
    for r in (r for r in environment.read(saved) if r["kind"] == "measurement"):
        assert f"passes {min(r['passes']):.2f}..{max(r['passes']):.2f}" in text
    stand_in(error=1e-3, cases=[STEP, TINY[-1]])
    wrong = ["--passes", "1", "--kernels", "--budget", "0", "--resume", str(saved)]
    assert commands.bench([*argv, *wrong]) == 1
    assert {kind for kind, *_ in turns()} == {"failure", "latency"}  # no pass of what is wrong is left


def test_what_failed_and_is_not_measured_again_is_not_forgotten(stand_in, tmp_path):
    stand_in(error=1e-3, cases=[STEP, TINY[-1]])
    argv = [*QUICK, "--parts", "timing", "--cells", "LSTM", "--modes", "inference"]
    assert commands.bench([*argv, "--save", "--out", str(tmp_path)]) == 1
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    stand_in(cases=[STEP, TINY[-1]])
    assert commands.bench([*argv, "--cases", STEP.name, "--resume", str(saved)]) == 1
    found = {r["case"]: r["kind"] for r in environment.read(saved) if "case" in r}
    assert found == {STEP.name: "measurement", TINY[-1].name: "failure"}


def test_a_process_that_dies_takes_no_pass_with_it(stand_in, tmp_path, monkeypatch):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--passes", "1", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")

    def dies(*_):
        raise Apart("the measuring process ended with exit code -9, without an answer")

    monkeypatch.setattr(run.measuring, "measure", dies)
    assert commands.bench([*SAVED, "--passes", "2", "--resume", str(saved)]) == 1
    assert [r["kind"] for r in environment.lines(saved) if r["kind"] != "environment"] == ["measurement", "failure"]


@pytest.mark.parametrize(("asked", "passes"), [([], 1), (["--passes", "2"], 2)])
def test_what_is_not_kept_has_one_pass(stand_in, capsys, asked, passes):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, *asked]) == 0
    head, _, tables = capsys.readouterr().out.partition("geometric means")
    assert head.count("GRU  inference T1-B1-H128") == passes
    assert tables


def test_a_file_of_other_hardware_is_not_continued(stand_in, tmp_path):
    stand_in(cases=[TINY[0]])
    path = write(tmp_path / "other.jsonl", [])
    with pytest.raises(UsageError, match="made on hardware abacus-1-cores, this is "):
        commands.bench([*QUICK, "--resume", path])


def change(path, kind, **changes):
    """Rewrite all records of a kind in a file."""
    records = [{**r, **changes} if r["kind"] == kind else r for r in environment.lines(path)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("name", records.SETUP)
def test_a_run_is_continued_only_with_what_it_was_made_with(stand_in, tmp_path, name):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    change(saved, "environment", **{name: "planted"})
    before = saved.read_text()
    with pytest.raises(UsageError, match=f"--resume .*: made on {name} planted, this is "):
        commands.bench([*SAVED, "--resume", str(saved)])
    assert saved.read_text() == before


def test_a_case_without_what_is_asked_for_now_is_measured_anew(stand_in, tmp_path, capsys):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    peer = "torch.nn graph"  # of GPUs: absent here, and the record says so
    again = [*SAVED[: SAVED.index("--peers")], "--peers", peer, *SAVED[SAVED.index("--peers") + 2 :]]
    for argv, measured in (([*again, "--kernels"], True), ([*again, "--kernels"], False), (SAVED, False)):
        before = environment.read(saved)[1:]
        assert commands.bench([*argv, "--resume", str(saved)]) == 0
        (kept,) = (r for r in environment.read(saved) if r["kind"] == "measurement")
        assert kept["peers"].keys() == {peer}
        assert kept["kernels"]
        assert (kept not in before) == measured
        assert ("3 of 3 are in the file already" in capsys.readouterr().out) != measured


def test_a_wrong_result_replaces_the_number_it_had(stand_in, tmp_path):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    stand_in(error=1e-3, cases=[STEP])
    assert commands.bench([*SAVED, "--kernels", "--resume", str(saved)]) == 1
    assert [r["kind"] for r in environment.read(saved) if r["kind"] != "environment"] == ["failure"]


def test_a_continued_run_forgets_that_its_budget_was_spent(stand_in, tmp_path):
    stand_in(cases=[STEP])
    assert commands.bench([*SAVED, "--save", "--out", str(tmp_path)]) == 0
    (saved,) = tmp_path.glob("*/cpu-*.jsonl")
    notes = [{"kind": "note", "message": f"{run.BUDGET} 5 s spent"}, {"kind": "note", "message": "planted"}]
    saved.write_text(saved.read_text() + "".join(json.dumps(n) + "\n" for n in notes))
    assert commands.bench([*SAVED, "--resume", str(saved)]) == 0
    assert [r["message"] for r in environment.read(saved) if r["kind"] == "note"] == ["planted"]


def test_write_is_atomic_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "results" / "run.jsonl"
    environment.write(path, "old")
    store = environment.Store(path)
    store.add({"kind": "measurement", "value": 1.5})
    assert json.loads(path.read_text()) == {"kind": "measurement", "value": 1.5}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add({"kind": "measurement", "value": 2.5})
    assert json.loads(path.read_text()) == {"kind": "measurement", "value": 1.5}


def test_hardware_is_named_by_model_vectors_and_cores():
    facts = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "flags": ["avx2", "fma", "avx512f"], "cores": 4}
    assert environment.slug(facts) == "intel-xeon-cpu-2-20ghz-avx512-4-cores"
